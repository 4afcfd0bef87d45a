"""Weights and figures that are no numbers: noticed, rolled back, or said in a line."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SCENE
from small_models import SMALL, small_ppo

from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.report import evaluate as evaluate_module
from vlmrlhf_course.report.page import Findings, before_after_figure, html_card, picture_of
from vlmrlhf_course.report.record import curve
from vlmrlhf_course.rl import rollout
from vlmrlhf_course.rl import state as state_of_a_run
from vlmrlhf_course.rl.loop import train
from vlmrlhf_course.rl.state import RECOVERY
from vlmrlhf_course.world.llava import build_model, build_processor
from vlmrlhf_course.world.scenes import describe
from vlmrlhf_course.world.source import DrawnWorld, detail_prompts


def spoil_once(policy, calls, at):
    "From its call number `at` on, one weight of the actor is no number, until it is restored."

    original = rollout.sample
    named = policy.named_parameters()
    weight = next(p for name, p in named if "lora_B" in name and ".actor." in name)

    def before(vlm, *args):
        calls.append(1)
        if len(calls) == at:
            with torch.no_grad():
                weight.fill_(float("nan"))
        return original(vlm, *args)

    return before


def small(**changes):
    "A small policy and what its training needs."
    return small_ppo(VLM(build_model(SMALL), build_processor(SMALL)), **changes)


def test_a_policy_that_cannot_be_sampled_is_rolled_back(tmp_path, monkeypatch):
    """It counts as an emergency: the last good weights, a lower rate, no update; then the run goes
    on."""
    policy, scores, pool = small(iterations=4, eval_every=4)
    monkeypatch.setattr(rollout, "sample", spoil_once(policy, [], 3))
    state = train(policy, scores, pool, pool[:2], tmp_path / "ppo")
    rows = read_jsonl(tmp_path / "ppo" / "metrics.jsonl")
    assert [r["emergency"] for r in rows] == [False, False, True, False] and state.emergencies == 1
    assert "loss" not in rows[2]
    assert math.isnan(rows[2]["kl"])
    assert state.lr_scale == pytest.approx(0.1 * 10 ** (1 / RECOVERY))  # one good one since
    assert all(p.isfinite().all() for p in policy.parameters())
    assert [r["step"] for r in curve(tmp_path / "ppo" / "metrics.jsonl")] == [0, 1, 3]


def test_a_policy_that_cannot_be_validated_is_not_the_best(tmp_path, monkeypatch):
    policy, scores, pool = small(iterations=2, eval_every=1, keep="best")
    # sampled, validated, sampled, validated
    monkeypatch.setattr(rollout, "sample", spoil_once(policy, [], 4))
    state = train(policy, scores, pool, pool[:2], tmp_path / "ppo")
    rows = read_jsonl(tmp_path / "ppo" / "metrics.jsonl")
    assert math.isnan(rows[1]["validation"]) and state.best == rows[0]["validation"]
    assert all(p.isfinite().all() for p in policy.parameters())


def test_never_finite_ends_with_a_line(tmp_path, monkeypatch):
    def never(*args):
        raise FloatingPointError

    policy, scores, pool = small(iterations=9)
    monkeypatch.setattr(rollout, "sample", never)
    with pytest.raises(UserError, match="KL nan was not below kl_emergency"):
        train(policy, scores, pool, pool[:2], tmp_path / "ppo")


def never_validated(monkeypatch):
    "Answers can be sampled to learn from, and not to validate."
    monkeypatch.setattr(state_of_a_run, "try_sample", lambda *args: None)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_sft_model_is_not_a_result(tmp_path, monkeypatch, keep):
    "No validation was a number, and the weights are those of the beginning: no policy to keep."
    rates = dict(actor_lr=0.0, critic_lr=0.0) if keep == "last" else {}
    policy, scores, pool = small(keep=keep, **rates)
    never_validated(monkeypatch)
    with pytest.raises(UserError, match="ppo: no validation was a number.*actor_lr"):
        train(policy, scores, pool, pool[:2], tmp_path / "ppo")


def test_what_was_learned_last_is_a_result_without_a_validation(tmp_path, monkeypatch):
    policy, scores, pool = small(keep="last")
    never_validated(monkeypatch)
    assert not math.isfinite(train(policy, scores, pool, pool[:2], tmp_path / "ppo").best)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sampling_notices(vlm, prompts, value):
    "Whatever is not finite in the logits."
    vlm.model.lm_head.weight.data[7] = value
    with pytest.raises(FloatingPointError):
        rollout.sample(vlm, prompts)
    assert rollout.try_sample(vlm, prompts) is None


def test_figures_that_are_no_numbers(vlm, monkeypatch):
    monkeypatch.setattr(evaluate_module, "score_texts", lambda *a: torch.tensor([float("nan")]))
    with pytest.raises(UserError, match="reward is nan"):
        evaluate_module.figures(DrawnWorld(), detail_prompts([SCENE]), [describe(SCENE)], None)


def found(texts):
    "Findings of a model that says these texts about one picture, before and after."
    prompts, names = detail_prompts([SCENE] * len(texts)), dict(sft="SFT", ppo="PPO")
    said = dict.fromkeys(names, texts)
    return Findings(DrawnWorld(), prompts, said, {}, names, ("sft", "ppo"))


def test_nothing_false_to_show():
    "Good news: then just the first pictures are shown."
    assert found([describe(SCENE)] * 4).worst(3) == [0, 1, 2]
    assert found([]).worst(3) == []
    before_after_figure(found([describe(SCENE)]), [0])
    assert found([describe(SCENE), "a blue fish ."]).worst(3) == [1]


def test_answers_without_marks_stay_in_the_report():
    "A source that cannot mark says so with []; the words are there, and none of them is red."
    for marks in ([], None, [True], [True] * 99):
        source = SimpleNamespace(mark=lambda prompt, text: marks)
        unmarked = replace(found(["a blue fish ."]), source=source)
        unmarked.worst(3)
        page = html_card(unmarked, 0)
        assert page.count("fish") == 2 and page.count("<mark>a</mark>") == 2 * bool(marks)
        written = [text.get_text() for text in before_after_figure(unmarked, [0]).axes[1].texts]
        assert written.count("fish") == 2


@pytest.mark.parametrize("image", [(f"scene:{SCENE}", "blank"), ("blank",), None])
def test_prompts_with_several_pictures_or_none(image):
    several = found(["a cat ."])
    several.source = SimpleNamespace(mark=lambda prompt, text: [])
    several.prompts = [replace(several.prompts[0], image=image)]
    assert "data:image/png" in html_card(several, 0)
    before_after_figure(several, [0])
    wide = 288 * max(1, len(image or ()))
    assert picture_of(several.prompts[0]).size == (wide, 288)
