"""Who samples: our loop, `generate`, vLLM (a stand-in). The same answers where there is no chance,
weights of 1 where the policy drew, and other weights, said and used, where somebody else did."""

import copy
import inspect
import json
import sys
from types import SimpleNamespace

import fake_vllm
import pytest
import torch
from conftest import REPO
from other_models import tiny_other
from own_data import checkpoint, lines, recipe, squares
from small_models import SMALL_LORA, shake, small_ppo
from torch.testing import assert_close

from vlmrlhf_course import own as own_source
from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.cli import main
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.family import FAMILIES, tiny_model
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vlm import VLM, token_logprobs
from vlmrlhf_course.rl import vllm_engine
from vlmrlhf_course.rl.engines import Generate, RolloutConfig, VLLMConfig, corrected, importance
from vlmrlhf_course.rl.loop import Learner, ask, iteration
from vlmrlhf_course.rl.rollout import sample, texts, try_sample
from vlmrlhf_course.rl.vllm_engine import VLLM, engine_of

COPY = LoRAConfig(r=0)
NEAR = 1e-5  # how far weights are from 1 where float32 alone rounds


def opinionated(kind: str, lora=SMALL_LORA) -> VLM:
    "A tiny model in float32 with a role that is far from the trunk."
    torch.manual_seed(0)
    vlm = VLM(*tiny_model(kind))
    vlm.model.requires_grad_(False)
    vlm.add_role("actor", lora)
    shake(vlm, "actor", std=0.05 if lora is COPY else 0.3)
    return vlm


@pytest.fixture
def asked(pictures):
    "Questions with a picture, another one, none, and two."
    wide, tall, square = pictures
    return [
        Prompt("", "describe the picture .", "", wide),
        Prompt("", "is there a cat ?", "", tall),
        Prompt("", "what colour is there ?", ""),
        Prompt("", "is there a boat ?", "", (square, wide)),
    ]


def off(roll) -> float:
    "How far the furthest weight is from 1."
    return float((importance(roll) - 1).abs().max())


# --- the weight -----------------------------------------------------------------------------------


def told(sampled, cap=2.0):
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logprobs = torch.tensor([[0.5, 0.2, 0.9], [0.3, 0.4, 0.7]]).log()
    return SimpleNamespace(
        logprobs=logprobs, sampled=sampled, cap=cap, batch=SimpleNamespace(answer_mask=mask)
    )


def test_weights_by_hand():
    roll = told(torch.tensor([[0.5, 0.4, 0.1], [0.6, 0.25, 0.1]]).log())
    exp = SimpleNamespace(tokens=dict(advantages=torch.full((2, 3), -2.0)))
    figures = corrected(exp, roll)
    assert_close(exp.tokens["advantages"], torch.tensor([[-2.0, -1, -4], [-1, -3.2, -2]]))
    assert figures == pytest.approx(dict(tis_mean=5.6 / 5, tis_max=9.0, tis_truncated=1 / 5))


def test_one_weight_for_a_whole_answer():
    roll = told(torch.tensor([[0.5, 0.4, 0.1], [0.6, 0.25, 0.1]]).log(), cap=3.0)
    exp = SimpleNamespace(tokens=dict(advantages=torch.ones(2, 3)))
    figures = corrected(exp, roll, whole=True)
    assert_close(exp.tokens["advantages"], torch.tensor([[3.0, 3, 3], [0.8, 0.8, 0.8]]))
    assert figures["tis_max"] == pytest.approx(4.5)


def test_our_own_loop_has_no_weights():
    tokens = dict(advantages=torch.ones(2, 3))
    assert corrected(SimpleNamespace(tokens=tokens), told(None)) == {}
    assert_close(tokens["advantages"], torch.ones(2, 3), rtol=0, atol=0)


def test_an_algorithm_without_advantages():
    with pytest.raises(UserError, match="rollout.engine=own"):
        corrected(SimpleNamespace(tokens={}), told(torch.zeros(2, 3)))


# --- generate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_generate_says_what_our_loop_says(kind, asked):
    vlm = opinionated(kind)
    if kind == "paligemma":
        asked = [p for p in asked if p.image]
    how = dict(role="actor", max_new_tokens=6, seed=2)
    ours = sample(vlm, asked, temperature=1e-5, **how)
    theirs = Generate()(vlm, asked, temperature=1e-5, **how)
    assert texts(vlm, ours) == texts(vlm, theirs)
    assert torch.equal(ours.batch.answers, theirs.batch.answers)
    assert torch.equal(ours.ended, theirs.ended)
    drawn = Generate()(vlm, asked * 3, temperature=0.8, **how)
    assert off(drawn) < NEAR
    assert len({*texts(vlm, drawn)}) > len(asked), "the same answers: this tests little"
    again = Generate()(vlm, asked * 3, temperature=0.8, **how)
    assert torch.equal(again.batch.input_ids, drawn.batch.input_ids)


def test_generate_for_a_class_without_a_family(asked):
    torch.manual_seed(0)
    vlm = VLM(*tiny_other("llava_onevision"))
    assert vlm.family.whole
    how = dict(max_new_tokens=4, seed=2)
    ours = sample(vlm, asked[:2], temperature=1e-5, **how)
    assert texts(vlm, ours) == texts(vlm, Generate()(vlm, asked[:2], temperature=1e-5, **how))
    assert off(Generate()(vlm, asked[:2], **how)) < NEAR


@pytest.mark.parametrize("batch", [0, 2])
def test_generate_with_a_full_copy_in_parts(asked, batch):
    vlm = opinionated("llava", COPY)
    vlm.limits = vlm.limits.__class__(batch=batch)
    roll = Generate()(vlm, asked * 2, "actor", max_new_tokens=5, seed=1)
    assert off(roll) < NEAR
    trunk = Generate()(vlm, asked * 2, None, max_new_tokens=5, seed=1)
    assert off(trunk) < NEAR and not torch.equal(trunk.batch.answers, roll.batch.answers)


def test_generate_leaves_the_world_as_it_was(asked):
    "A checkpoint's own wishes are not followed, and stay; no random number is taken."
    vlm = opinionated("llava")
    plain = Generate()(vlm, asked, "actor", max_new_tokens=6)
    vlm.model.generation_config.update(repetition_penalty=9.0, top_k=1, max_new_tokens=2)
    torch.manual_seed(99)
    before, wishes = torch.get_rng_state(), vlm.model.generation_config
    again = Generate()(vlm, asked, "actor", max_new_tokens=6)
    assert torch.equal(plain.batch.input_ids, again.batch.input_ids) and off(again) < NEAR
    assert torch.equal(torch.get_rng_state(), before)
    assert vlm.model.generation_config is wishes


def test_what_is_no_number_is_no_rollout(asked):
    vlm = opinionated("llava")
    vlm.sampler = Generate()
    assert try_sample(vlm, asked, "actor", 1.0, 3, 0) is not None
    vlm.model.get_output_embeddings().weight.data.fill_(float("nan"))
    assert try_sample(vlm, asked, "actor", 1.0, 3, 0) is None
    with pytest.raises(ValueError, match="temperature 0"):
        vlm.sampler(vlm, asked, temperature=0)


# --- vLLM, a stand-in -----------------------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch):
    for name, module in fake_vllm.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return monkeypatch


def engine(**more) -> VLLM:
    return engine_of(RolloutConfig(engine="vllm", vllm=VLLMConfig(**more)))


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "gemma3"])
def test_vllm_speaks_with_the_adapter_as_it_is_now(vllm, kind, asked):
    vlm, served = opinionated(kind), engine()
    how = dict(role="actor", temperature=0.7, max_new_tokens=6, seed=2)
    first = served(vlm, asked, **how)
    assert off(first) < NEAR
    shake(vlm, "actor", std=0.3, seed=5)  # an iteration later
    second = served(vlm, asked, **how)
    assert off(second) < NEAR
    assert not torch.equal(first.batch.answers, second.batch.answers)
    assert off(served(vlm, asked, None, max_new_tokens=6)) < NEAR
    again = served(vlm, asked, **how)
    assert torch.equal(again.batch.input_ids, second.batch.input_ids)
    once = ["wake ['weights']", "wake ['kv_cache']", "generate", "sleep 1"]
    assert served.llm.calls == ["sleep 1", *once * 4]


def test_vllm_reads_a_full_copy_and_then_the_trunk(vllm, asked):
    vlm, served = opinionated("llava", COPY), engine()
    for role in ("actor", "actor", None, None):
        shake(vlm, "actor", std=0.05, seed=7)
        assert off(served(vlm, asked, role, max_new_tokens=5)) < NEAR
    read = [call for call in served.llm.calls if call[:5] in ("reloa", "reset", "sleep")]
    again = ["reload_weights", "reset"]  # of keys and values
    copies = [*again, "sleep 2"] * 2
    assert read == ["sleep 1", *copies, *again, "sleep 1", "sleep 1"]


def test_vllm_that_does_not_sleep(vllm, asked):
    vlm, served = opinionated("llava"), engine(sleep=False)
    assert off(served(vlm, asked, "actor", max_new_tokens=5)) < NEAR
    assert served.llm.calls == ["generate"]


def test_the_stand_in_tells_what_is_easily_got_wrong(vllm, asked):
    "An adapter under its old number; raw log-probabilities; a checkpoint's own wishes."
    vlm, served = opinionated("llava"), engine()
    served(vlm, asked, "actor", max_new_tokens=6)
    shake(vlm, "actor", std=0.3, seed=5)
    served.swaps -= 1
    assert off(served(vlm, asked, "actor", max_new_tokens=6)) > 0.1
    served.llm.mode = "raw_logprobs"
    assert off(served(vlm, asked, "actor", 0.5, max_new_tokens=6)) > 0.1


@pytest.mark.parametrize("name", ["transformers", "vllm"])
def test_an_answer_ends_with_eos_and_is_padded(vllm, name, asked):
    vlm = opinionated("llava")
    roll = engine_of(RolloutConfig(engine=name))(vlm, asked * 10, "actor", 2.0, max_new_tokens=6)
    assert 0 < roll.ended.sum() < len(roll.ended)
    for row, mask, ended in zip(roll.batch.answers, roll.batch.answer_mask, roll.ended):
        n = int(mask.sum())
        assert (row[n:] == vlm.pad_id).all() and (row[: n - 1] != vlm.eos_id).all()
        assert (row[n - 1] == vlm.eos_id) == ended and (ended or n == 6)


def test_vllm_has_read_another_prompt(vllm, asked):
    vllm.setattr(fake_vllm.LLM, "more", 2)
    with pytest.raises(UserError, match="vLLM reads other tokens than we do, from token"):
        engine()(opinionated("llava"), asked, "actor", max_new_tokens=3)


def test_what_vllm_cannot_do_is_refused(vllm, asked):
    vlm, served = opinionated("llava"), engine()
    served(vlm, asked, "actor", max_new_tokens=3)
    vlm.add_role("wide", LoRAConfig(r=9))
    with pytest.raises(UserError, match="wide.lora.r=9: vLLM was started for 8"):
        served(vlm, asked, "wide", max_new_tokens=3)
    with pytest.raises(ValueError, match="another model"):
        served(opinionated("llava"), asked, "actor", max_new_tokens=3)
    weight = next(vlm.tower.parameters()).requires_grad_(True)
    with pytest.raises(UserError, match="the vision tower trains"):
        served(vlm, asked, "actor", max_new_tokens=3)
    weight.requires_grad_(False).ds_id = 0
    for other in (served, Generate()):
        with pytest.raises(UserError, match="ZeRO-3"):
            other(vlm, asked, "actor", max_new_tokens=3)
    assert vllm_engine.rank_for(vlm) == 16
    vlm.add_role("wider", LoRAConfig(r=600))
    with pytest.raises(UserError, match="up to 512"):
        vllm_engine.rank_for(vlm)


# --- an iteration, and a run ----------------------------------------------------------------------


def one_iteration(small, served):
    "PPO's first iteration on the pretrained sizes, in float32."
    vlm, _ = small
    policy, scores, pool = small_ppo(vlm, reward=dict(rm=1.0))
    shake(vlm, policy.actor.name, std=0.1)
    vlm.sampler = served
    learner = Learner.of(policy, scores, "ppo")
    try:
        return iteration(learner, ask(pool, policy.cfg, "x", 0, 1), 0)
    finally:
        vlm.sampler = None


@pytest.fixture
def fresh(small):
    "`small`, whose roles a test may add to."
    return copy.deepcopy(small)


@pytest.mark.parametrize("name", ["transformers", "vllm"])
def test_an_iteration_of_ppo(vllm, fresh, name):
    figures = one_iteration(fresh, engine_of(RolloutConfig(engine=name)))
    assert figures["tis_mean"] == pytest.approx(1, abs=NEAR)
    assert figures["tis_max"] == pytest.approx(1, abs=NEAR)
    assert figures["tis_truncated"] == 0 and figures["skipped"] == 0
    assert figures["length"] > 1 and figures["grad_norm"] > 0


def test_another_policy_is_seen_and_weighed_down(vllm, fresh, asked):
    "Logits that are off by 1.5. Old log-probabilities are our own all the same."
    vllm.setattr(fake_vllm.LLM, "noise", 1.5)
    vlm = opinionated("llava")
    roll = engine()(vlm, asked, "actor", max_new_tokens=6)
    with torch.no_grad():
        logits = vlm.rule_out(vlm.answer_logits(roll.batch, "actor"))
    ours = token_logprobs(logits, roll.batch.answers) * roll.batch.answer_mask
    assert_close(roll.logprobs, ours, atol=NEAR, rtol=0)
    figures = one_iteration(fresh, engine())
    assert figures["tis_mean"] < 0.95 and figures["tis_max"] > 2
    assert 0 < figures["tis_truncated"] < 0.5


def test_no_figures_of_our_own_loop(fresh):
    assert not [name for name in one_iteration(fresh, None) if name.startswith("tis")]


@pytest.fixture
def own(tmp_path):
    "Arguments for a checkpoint and pairs of one's own."
    data = lines(squares(30, tmp_path / "pictures"), tmp_path / "pairs.jsonl")
    given = ["--model", checkpoint("llava", tmp_path / "llava"), "--data", data]
    return [*map(str, [*given, "--config", recipe(tmp_path), "--out", tmp_path / "run"])]


def test_settings_are_refused_in_a_line(own, capsys, monkeypatch):
    "Before the model is loaded."
    monkeypatch.setattr(own_source, "load_checkpoint", None)
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    for setting, said in (
        ("rollout.engine=sglang", "give one of own, transformers, vllm"),
        ("rollout.cap=0.5", "[1, inf)"),
        ("rollout.vllm.memory=2", "(0, 1)"),
        ("rollout.engine=vllm", "pip install 'vlmrlhf_course[vllm]'"),
    ):
        assert main(["ppo", *own, "--set", setting]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_run_and_the_same_run_with_another_engine(vllm, own, tmp_path, capsys):
    assert main(["ppo", *own, "--set", "rollout.engine=vllm"]) == 0
    rows = read_jsonl(tmp_path / "run" / "ppo" / "metrics.jsonl")
    assert [row["tis_mean"] for row in rows] == pytest.approx([1, 1], abs=1e-4)
    before = json.loads((tmp_path / "run" / "ppo" / "done.json").read_text("utf-8"))
    assert main(["ppo", *own]) == 0  # no record names the engine
    assert json.loads((tmp_path / "run" / "ppo" / "done.json").read_text("utf-8")) == before


def test_the_extra_is_named():
    text = (REPO / "pyproject.toml").read_text("utf-8")
    assert 'vllm = ["vllm>=0.33' in text


def test_the_package_has_the_signatures_of_the_stand_in():
    vllm = pytest.importorskip("vllm")
    for name in ("generate", "sleep", "wake_up", "collective_rpc", "reset_prefix_cache"):
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (fake_vllm.LLM, vllm.LLM))
        assert ours.parameters.keys() <= theirs.parameters.keys()
