"""The benchmarks compute what they say: both sides agree, the iteration is PPO's, FLOPs are those
executed."""

import copy
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from conftest import REPO, SMALL
from matplotlib.axes import Axes
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(REPO))
from benchmarks import breakdown, common, gpu, naive, report, scaling, textbook, trl_peer
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.rl import loop
from vlmrlhf_course.rl.ppo import PPOConfig
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.world.source import sample_prompts

SIZES = dict(answers=6, minibatch=3, micro_batch=2, max_new_tokens=30, pool=20)
HOW = dict(reward=common.PAID, lora=LoRAConfig(r=4, alpha=8), actor_lr=1e-3, critic_lr=1e-3)
CFG = PPOConfig(**SIZES, **HOW)


def pair(cfg, sizes=SMALL, **kwargs):
    "Policy and reward model in float64, every role different from the others."
    policy, rm = common.build(cfg, sizes, **kwargs)
    common.shake(policy, rm, 0.1)
    return policy.double(), rm.double()


# --- the same thing, computed twice -----------------------------------------------------------


OTHER = dict(gamma=0.9, value_clip=0.3, no_eos=-8.0, reward=dict(rm=0.7, penalty=1.0))


@pytest.mark.parametrize("critic", ["head", "adapter"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("changes", [{}, OTHER], ids=["defaults", "others"])
def test_both_sides_agree(critic, shared, changes, prompts):
    """Six prompts, one of them without a picture: log-probabilities, values, scores and their
    units, advantages, loss, gradient."""
    cfg = replace(CFG, critic=critic, **changes)
    policy, rm = pair(cfg)
    lib, other = common.Library(policy, rm), textbook.Naive(policy, rm, cfg, shared)
    found = textbook.check(lib, other, prompts, atol=1e-8)
    wanted = "old ref values score units advantages returns loss gradient"
    assert found.keys() >= {*wanted.split()}


@pytest.mark.parametrize(
    "wrong",
    [
        dict(lam=0.5),
        dict(gamma=0.9),
        dict(beta=0.3),
        dict(value_coef=1.0),
        dict(temperature=1.2),
        dict(reward=dict(rm=1.0)),
        dict(reward=dict(rm=1.0, penalty=1.1)),
        dict(no_eos=-99.0),
        dict(dense=False),
    ],
)
def test_the_check_sees_a_difference(wrong, prompts):
    policy, rm = pair(CFG)
    other = textbook.Naive(policy, rm, replace(CFG, **wrong))
    with pytest.raises(AssertionError):
        textbook.check(common.Library(policy, rm), other, prompts, atol=1e-8)


def test_the_check_sees_a_model_that_differs(prompts):
    policy, rm = pair(CFG)
    other = textbook.Naive(policy, rm, CFG)
    with torch.no_grad():
        next(iter(other.language("reference").layers.parameters())).mul_(1.01)
    with pytest.raises(AssertionError, match="ref"):
        textbook.check(common.Library(policy, rm), other, prompts, atol=1e-8)


def test_pictures_are_counted():
    "Textbook: one for sampling, four for scoring, two an epoch. Library: one for each picture."
    result = naive.compare(replace(CFG, answers=3), 1, SMALL)
    lib, other = result["sides"]
    assert lib["images"] == 1 and other["images"] == 1 + 4 + 2 * CFG.epochs
    assert lib["all"] > 0
    assert other["sample"] + other["score"] + other["update"] <= other["all"]
    assert result["ratio"] > 0
    assert naive.rows(dict(critics=[result])).count("\n") == 3


def test_the_iteration_is_that_of_train(tmp_path):
    "The same weights after an iteration, bit for bit: what is timed is what trains."
    cfg = replace(CFG, iterations=1, keep="last")
    policy, rm = pair(cfg)
    pool = sample_prompts(cfg.pool, "train", cfg.kinds, "tests")
    other, other_rm = copy.deepcopy((policy, rm))
    loop.train(policy, common.Library(policy, rm).scores, pool, pool[:4], tmp_path, seed=3)
    asked = loop.ask(pool, cfg, "ppo/3/0", 0, 1)
    common.Library(other, other_rm, seed=3).iteration(asked, 0)
    was, _ = pair(cfg)
    theirs, before = dict(other.named_parameters()), dict(was.named_parameters())
    moved = 0
    for name, p in policy.named_parameters():
        assert torch.equal(p, theirs[name]), name
        moved += not torch.equal(p, before[name])
    assert moved > 10


def test_an_iteration_without_updates_is_no_measurement():
    cfg = replace(CFG, kl_emergency=1e-9)
    with pytest.raises(RuntimeError, match="left out"):
        common.Library(*pair(cfg)).iteration(common.fresh_prompts(cfg, cfg.answers, 1)[0], 0)


# --- FLOPs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_flops_are_those_that_torch_executes(critic):
    """Without padding, and with attention written out: torch multiplies both halves of the
    triangle, we count one."""
    cfg = replace(CFG, critic=critic, answers=4, minibatch=4, micro_batch=4)
    policy, rm = common.build(cfg, replace(SMALL, width=96, layers=3))
    policy.vlm.__class__ = common.Endless
    prompts = sample_prompts(4, "train", {"detail": 1.0}, "flops")
    lib = common.Library(policy, rm)
    exp, _ = lib.experience(prompts, 0)
    counted = common.update_flops(policy, exp.batch)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        lib.update(exp, range(4))
    rows, positions = exp.batch.attention_mask.shape
    other_half = rows * positions**2 * 96 * 6 * 3 * (2 if critic == "adapter" else 1)
    assert counted + other_half == pytest.approx(counter.get_total_flops(), rel=0.03)


# --- parts, scaling, memory -------------------------------------------------------------------


def test_parts_add_up():
    found = breakdown.parts(CFG, 1, SMALL)
    assert sum(v for k, v in found.items() if k != "all") == pytest.approx(found["all"])
    assert all(v > 0 for v in found.values())
    assert found["rest"] < 0.2 * found["all"]


def test_update_rate_and_operations(monkeypatch):
    monkeypatch.setattr(breakdown, "matmul_rate", lambda **kwargs: 1e11)
    row = breakdown.update_rate(CFG, SMALL, 1)
    assert row["width"] == SMALL.width
    assert row["ratio"] == pytest.approx(row["gflop_per_s"] / 100)
    assert 0 <= row["padding"] < 1
    assert row["gflop_per_s"] == pytest.approx(row["mflop"] / row["ms"])
    assert 1e9 < common.matmul_rate(n=256) < 1e15
    shares = breakdown.op_shares(CFG, SMALL)
    assert sum(shares.values()) == pytest.approx(1) and shares["matrix products"] > 0.01
    kinds = {
        "aten::mm": "matrix products",
        "aten::mul": "element-wise, norms, softmax",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "aten::copy_": "copies and memory",
        "Optimizer.step#AdamW.step": "optimiser",
        "MulBackward0": breakdown.REST,
    }
    for op, kind in kinds.items():
        assert breakdown.kind_of(op) == kind, op


def test_every_cache_says_the_same():
    ways = breakdown.caches(CFG, 1, SMALL)
    assert len(ways) == 5 and all(t > 0 for t in ways.values())


def test_endless_answers_have_the_length_asked_for():
    policy, _ = common.build(CFG, SMALL)
    policy.vlm.__class__ = common.Endless
    asked = common.fresh_prompts(CFG, 5, 1)[0]
    roll = sample(policy.vlm, asked, "actor", max_new_tokens=7)
    assert roll.batch.lengths.tolist() == [7] * 5


def test_cost_and_memory_are_measured():
    assert scaling.cost(replace(CFG, answers=2, minibatch=2), 1, SMALL)["all"] > 0
    assert len(scaling.memory(replace(CFG, answers=2, minibatch=2, pool=4), 3, SMALL)) == 3


def test_the_curves_are_drawn(tmp_path, monkeypatch):
    """Every measured point is on one of them, and the picture in README.md was made of the results
    that stand there."""
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    drawn = dict(loglog=[], stackplot=[])

    def watch(name):
        original = getattr(Axes, name)

        def watched(self, x, y, *args, **kwargs):
            drawn[name].append([*y])
            return original(self, x, y, *args, **kwargs)

        monkeypatch.setattr(Axes, name, watched)

    watch("loglog")
    watch("stackplot")
    result = report.results()["scaling"]
    scaling.plot(result)
    assert drawn["loglog"][0] == [r["all"] for r in result["by_prompts"]]
    stacks = zip(*drawn["stackplot"][0])
    for r, heights in zip(result["by_length"], stacks, strict=True):
        seconds = r["sample"] + r["score"] + r["backward"] + r["step"]
        assert sum(heights) == pytest.approx(1000 * seconds / result["answers"])
    for folder in (tmp_path, common.RESULTS):
        assert Image.open(folder / "scaling.png").text["Description"] == scaling.drawn(result)


def test_a_full_model_has_no_adapters(prompts):
    policy, _ = pair(CFG)
    assert policy.vlm.lora_layers()
    full = textbook.full_model(policy.vlm, "actor")
    assert not common.VLM(full, policy.vlm.processor).lora_layers()


def test_slopes():
    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    leak = scaling.drift([100 + 0.5 * i for i in range(40)])
    assert leak["kib_per_iteration"] == pytest.approx(512)
    assert scaling.drift([100.0] * 40)["kib_per_iteration"] == 0
    filling = [100 + i for i in range(20)] + [120.0] * 20  # of a cache: no leak
    assert scaling.drift(filling)["kib_per_iteration"] == 0


def test_rounds_show_different_pictures():
    rounds = common.fresh_prompts(CFG, 5, 4)
    assert [len(r) for r in rounds] == [5] * 4
    assert len({p.image for r in rounds for p in r}) == 20


# --- GPU, TRL ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_step_on_the_cpu(dtype):
    """The code that a GPU runs, on a tiny shape: CLIP tower without its class token, shared trunk,
    autocast."""
    torch.manual_seed(0)
    cfg = replace(CFG, answers=2, minibatch=2)
    lib, other = gpu.measure(gpu.llava("tiny", "cpu", dtype), cfg, 1, 1)
    assert lib["answers_per_s"] > 0
    assert lib["tflops"] > 0
    assert 0 < lib["mfu"] < 1.2
    assert other["all"] > 0
    assert gpu.rows(dict(machine="CPU", sides=[lib, other])).count("|") > 40


def test_gpu_sides_agree(prompts):
    torch.manual_seed(0)
    policy, rm = pair(CFG, None, vlm=gpu.llava("tiny", "cpu", torch.float32))
    lib, other = common.Library(policy, rm), textbook.Naive(policy, rm, CFG, shared=True)
    textbook.check(lib, other, prompts, atol=1e-8)


@pytest.mark.parametrize(
    "name, rate",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", None),
    ],
)
def test_peak_rates(name, rate):
    assert gpu.peak_rate(name) == rate


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line(capsys):
    assert gpu.main([]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "GPU" in err


@pytest.mark.parametrize("have", [None, "1.12.0"])
def test_without_trl_one_line(have, monkeypatch, capsys):
    def version(name):
        if have is None:
            raise PackageNotFoundError(name)
        return have

    monkeypatch.setattr(trl_peer, "version", version)
    assert trl_peer.main([]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "1.16.0" in err and (have or "none") in err
