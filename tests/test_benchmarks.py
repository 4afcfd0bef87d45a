"The benchmarks compute what they say: both sides agree, the iteration is PPO's, FLOPs are those executed, tables say what was measured."
import copy
import json
import random
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from conftest import REPO, SMALL
from matplotlib.axes import Axes
from PIL import Image
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(REPO))
from benchmarks import breakdown, common, gpu, naive, report, scaling, trl_peer
from vlmrlhf_course.rl.ppo import PPOConfig, train_ppo
from vlmrlhf_course.data.preferences import sample_prompts
from vlmrlhf_course.rl.rollout import plan_prompts, sample
from vlmrlhf_course.model.vlm import LoRAConfig

CFG = PPOConfig(answers=6, minibatch=3, micro_batch=2, max_new_tokens=30, pool=20, lora=LoRAConfig(r=4, alpha=8), actor_lr=1e-3,
                critic_lr=1e-3)


def pair(cfg, sizes=SMALL, **kwargs):
    "Policy and reward model in float64, every role different from the others."
    policy, rm = common.build(cfg, sizes, **kwargs)
    common.shake(policy, rm, .1)
    return policy.double(), rm.double()


# --- the same thing, computed twice -----------------------------------------------------------------------------------

@pytest.mark.parametrize("critic", ["head", "adapter"])
@pytest.mark.parametrize("shared", [False, True])
def test_both_sides_agree(critic, shared, prompts):
    "Six prompts, one of them without a picture: log-probabilities, values, scores, advantages, loss, gradient."
    cfg = replace(CFG, critic=critic)
    policy, rm = pair(cfg)
    found = naive.check(common.Library(policy, rm, cfg), naive.Naive(policy, rm, cfg, shared), prompts, atol=1e-8)
    assert found.keys() >= {"old", "ref", "values", "score", "advantages", "returns", "loss", "gradient"}


@pytest.mark.parametrize("wrong", [dict(lam=.5), dict(gamma=.9), dict(beta=.3), dict(value_coef=1.), dict(temperature=1.2),
                                   dict(reward="rm"), dict(no_eos=0.), dict(dense=False)])
def test_the_check_sees_a_difference(wrong, prompts):
    policy, rm = pair(CFG)
    other = naive.Naive(policy, rm, replace(CFG, **wrong))
    with pytest.raises(AssertionError): naive.check(common.Library(policy, rm, CFG), other, prompts, atol=1e-8)


def test_the_check_sees_a_model_that_differs(prompts):
    policy, rm = pair(CFG)
    other = naive.Naive(policy, rm, CFG)
    with torch.no_grad(): next(iter(other.language("reference").layers.parameters())).mul_(1.01)
    with pytest.raises(AssertionError, match="ref"): naive.check(common.Library(policy, rm, CFG), other, prompts, atol=1e-8)


def test_pictures_are_counted():
    "Textbook: one for sampling, four for scoring, two an epoch. Library: one for each picture."
    result = naive.compare(replace(CFG, answers=3), 1, SMALL)
    lib, other = result["sides"]
    assert lib["images"] == 1 and other["images"] == 1 + 4 + 2 * CFG.epochs
    assert lib["all"] > 0 and other["sample"] + other["score"] + other["update"] <= other["all"] and result["ratio"] > 0
    assert naive.rows(dict(critics=[result])).count("\n") == 3


def test_the_iteration_is_that_of_train_ppo(tmp_path):
    "The same weights after an iteration, bit for bit: what is timed is what trains."
    cfg = replace(CFG, iterations=1, keep="last")
    policy, rm = pair(cfg)
    pool = sample_prompts(cfg.pool, "train", cfg.kinds, "tests")
    other, other_rm = copy.deepcopy((policy, rm))
    train_ppo(policy, rm, pool, pool[:4], cfg, tmp_path, seed=3)
    common.Library(other, other_rm, cfg, seed=3).iteration(plan_prompts(pool, cfg.answers, random.Random("ppo/3/0")), 0)
    was, _ = pair(cfg)
    moved = 0
    for (name, p), q, before in zip(policy.named_parameters(), other.parameters(), was.parameters()):
        assert torch.equal(p, q), name
        moved += not torch.equal(p, before)
    assert moved > 10


# --- FLOPs --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_flops_are_those_that_torch_executes(critic):
    "Without padding, and with attention written out: torch multiplies both halves of the triangle, we count one."
    cfg = replace(CFG, critic=critic, answers=4, minibatch=4, micro_batch=4)
    policy, rm = common.build(cfg, replace(SMALL, width=96, layers=3))
    policy.vlm.__class__ = common.Endless
    prompts = sample_prompts(4, "train", {"detail": 1.}, "flops")
    lib = common.Library(policy, rm, cfg)
    roll, exp, _ = lib.experience(prompts, 0)
    counted = common.update_flops(policy, roll.batch, critic)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH): lib.update(exp,
                                                                                                                                   torch.arange(4))
    rows, positions = roll.batch.attention_mask.shape
    other_half = rows * positions ** 2 * 96 * 6 * 3 * (2 if critic == "adapter" else 1)
    assert counted + other_half == pytest.approx(counter.get_total_flops(), rel=.03)


# --- parts, scaling, memory -----------------------------------------------------------------------------------------------

def test_parts_add_up():
    found = breakdown.parts(CFG, 1, SMALL)
    assert sum(v for k, v in found.items() if k != "all") == pytest.approx(found["all"]) and found["rest"] < .2 * found["all"]


def test_update_rate_and_operations(monkeypatch):
    monkeypatch.setattr(breakdown, "matmul_rate", lambda **kwargs: 1e11)
    row = breakdown.update_rate(CFG, SMALL, 1)
    assert row["width"] == SMALL.width and row["ratio"] == pytest.approx(row["gflop_per_s"] / 100) and 0 <= row["padding"] < 1
    assert row["gflop_per_s"] == pytest.approx(row["mflop"] / row["ms"])
    assert 1e9 < common.matmul_rate(n=256) < 1e15
    shares = breakdown.op_shares(CFG, SMALL)
    assert sum(shares.values()) == pytest.approx(1) and shares["matrix products"] > .01
    kinds = {op: breakdown.kind_of(op) for op in ("aten::mm", "aten::mul", "aten::_scaled_dot_product_flash_attention_for_cpu",
                                                  "aten::copy_", "Optimizer.step#AdamW.step", "MulBackward0")}
    assert [*kinds.values()] == ["matrix products", "element-wise, norms, softmax", "attention", "copies and memory", "optimiser",
                                 breakdown.REST]


def test_every_cache_says_the_same():
    ways = breakdown.caches(CFG, 1, SMALL)
    assert len(ways) == 5 and all(t > 0 for t in ways.values())


def test_endless_answers_have_the_length_asked_for():
    policy, _ = common.build(CFG, SMALL)
    policy.vlm.__class__ = common.Endless
    assert sample(policy.vlm, common.fresh_prompts(CFG, 5, 1)[0], "actor", max_new_tokens=7).batch.lengths.tolist() == [7] * 5


def test_cost_and_memory_are_measured():
    assert scaling.cost(replace(CFG, answers=2, minibatch=2), 1, SMALL)["all"] > 0
    assert len(scaling.memory(replace(CFG, answers=2, minibatch=2, pool=4), 3, SMALL)) == 3


def test_the_curves_are_drawn(tmp_path, monkeypatch):
    "Every measured point is on one of them, and the picture in README.md was made of the results that stand there."
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    lines, stacks = [], []
    monkeypatch.setattr(Axes, "loglog", lambda self, x, y, *a, own=Axes.loglog, **k: lines.append(list(y)) or own(self, x, y, *a, **k))
    monkeypatch.setattr(Axes, "stackplot", lambda self, x, y, *a, own=Axes.stackplot, **k: stacks.append(y) or own(self, x, y, *a, **k))
    result = report.results()["scaling"]
    scaling.plot(result)
    assert lines[0] == [r["all"] for r in result["by_prompts"]]
    for r, heights in zip(result["by_length"], zip(*stacks[0]), strict=True):
        assert sum(heights) == pytest.approx(1000 * (r["sample"] + r["score"] + r["backward"] + r["step"]) / result["answers"])
    for folder in (tmp_path, common.RESULTS): assert Image.open(folder / "scaling.png").text["Description"] == scaling.drawn(result)


def test_a_full_model_has_no_adapters(prompts):
    policy, _ = pair(CFG)
    assert policy.vlm.lora_layers() and not common.VLM(naive.full_model(policy.vlm, "actor"), policy.vlm.processor).lora_layers()


def test_slopes():
    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    leak = scaling.drift([100 + .5 * i for i in range(40)])
    assert leak["kib_per_iteration"] == pytest.approx(512) and scaling.drift([100.] * 40)["kib_per_iteration"] == 0
    assert scaling.drift([100 + i for i in range(20)] + [120.] * 20)["kib_per_iteration"] == 0   # filling a cache is no leak


def test_rounds_show_different_pictures():
    rounds = common.fresh_prompts(CFG, 5, 4)
    assert [len(r) for r in rounds] == [5] * 4 and len({p.image for r in rounds for p in r}) == 20


# --- GPU, TRL ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_step_on_the_cpu(dtype):
    "The code that a GPU runs, on a tiny shape: CLIP tower without its class token, shared trunk, autocast."
    torch.manual_seed(0)
    cfg = replace(CFG, answers=2, minibatch=2)
    lib, other = gpu.measure(gpu.llava("tiny", "cpu", dtype), cfg, 1, 1)
    assert lib["answers_per_s"] > 0 and lib["tflops"] > 0 and 0 < lib["mfu"] < 1.2 and other["all"] > 0
    assert gpu.rows(dict(machine="CPU", sides=[lib, other])).count("|") > 40


def test_gpu_sides_agree(prompts):
    torch.manual_seed(0)
    policy, rm = pair(CFG, None, vlm=gpu.llava("tiny", "cpu", torch.float32))
    naive.check(common.Library(policy, rm, CFG), naive.Naive(policy, rm, CFG, shared=True), prompts, atol=1e-8)


@pytest.mark.parametrize("name, rate", [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
                                        ("NVIDIA L40S", 362e12), ("Tesla T4", None)])
def test_peak_rates(name, rate): assert gpu.peak_rate(name) == rate


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line(capsys):
    assert gpu.main([]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "GPU" in err


@pytest.mark.parametrize("have", [None, "1.12.0"])
def test_without_trl_one_line(have, monkeypatch, capsys):
    def version(name):
        if have is None: raise PackageNotFoundError(name)
        return have
    monkeypatch.setattr(trl_peer, "version", version)
    assert trl_peer.main([]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "1.16.0" in err and (have or "none") in err


# --- tables ---------------------------------------------------------------------------------------------------------------------

def test_readme_says_what_the_results_say():
    text = report.README.read_text("utf-8")
    assert report.render(text, report.results()) == text, "run python -m benchmarks.report"


def test_chapters_say_what_the_results_say():
    quoted = [c for c in report.CHAPTERS if report.quoting(c, {}) != report.quoting(c, report.results())]
    assert "09_rollout.ipynb" in [c.name for c in quoted]
    for chapter in quoted: assert json.loads(report.quoting(chapter, report.results())) == json.loads(chapter.read_text("utf-8")), "run python -m benchmarks.report"


def test_every_result_has_its_place():
    assert {p.stem for p in common.RESULTS.glob("*.json")} == report.results().keys() >= {"naive", "breakdown", "scaling", "trl_peer"}


@pytest.mark.parametrize("name", ["naive", "trl_peer", "breakdown", "scaling"])
def test_another_result_gives_another_readme(name):
    "Scale every figure of a result: its table must change."
    found, text = report.results(), report.README.read_text("utf-8")
    def scaled(x):
        if isinstance(x, dict): return {k: scaled(v) for k, v in x.items()}
        if isinstance(x, list): return [scaled(v) for v in x]
        return x * 1.37 if isinstance(x, float) else x
    assert report.render(text, found | {name: json.loads(json.dumps(scaled(found[name])))}) != text


def test_prose_has_no_measured_figures():
    "Figures live in the generated blocks; outside them a decimal number would go stale (versions and code aside)."
    import re
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->|```.*?```|`[^`]*`", "", report.README.read_text("utf-8"), flags=re.S)
    assert not re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.-])|\d+ ?[×x] |\d+ ?%", text)


def test_numbers_and_tables():
    assert [common.number(x) for x in (0, .0123, 1.234, 12.34, 1234.5)] == ["0", "0.012", "1.23", "12.3", "1234"]
    assert common.table(["a", "b"], [[1, 22]]).splitlines() == ["| a |  b |", "|---|---:|", "| 1 | 22 |"]
    assert_close(common.medians([dict(a=1.), dict(a=5.), dict(a=2.)])["a"], 2.)
