"Evaluation: intervals against theory and simulation, greedy answers, and the smoke run's report."

import json
import math

import pytest
import torch
from conftest import SCENE, SMALL
from hypothesis import given
from hypothesis import strategies as st

from vlmrlhf_course.base.config import arms_layer
from vlmrlhf_course.base.runs import Run
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vlm import VLM, answer, token_logprobs
from vlmrlhf_course import pipeline  # noqa: F401  (fills the table of stages)
from vlmrlhf_course.report.evaluate import EvaluateConfig, Policies, bootstrap_interval
from vlmrlhf_course.report.evaluate import figures, quiz, speak_greedily
from vlmrlhf_course.report.page import COLUMNS, Findings, over_optimisation_figure, report_html
from vlmrlhf_course.report.page import row_names, text_table
from vlmrlhf_course.report.record import curve, training_curves
from vlmrlhf_course.train.reward import RewardConfig, RewardModel
from vlmrlhf_course.world.llava import build_model, build_processor
from vlmrlhf_course.world.scenes import describe, sample_scenes
from vlmrlhf_course.world.source import DrawnWorld, detail_prompts

LAYERS = arms_layer()
ARMS, HEADLINE = LAYERS["evaluate"]["arms"], LAYERS["evaluate"]["headline"]
NAMES = row_names({arm: LAYERS[arm]["label"] for arm in ARMS}, HEADLINE)


class TestBootstrap:
    def test_of_a_mean_is_that_of_the_normal_theory(self):
        x = torch.randn(2000, generator=torch.Generator().manual_seed(0)).double()
        for level, z in ((0.95, 1.96), (0.5, 0.674)):
            low, high = bootstrap_interval(x, torch.ones(2000), draws=4000, level=level)
            assert high - low == pytest.approx(2 * z * float(x.std()) / 2000**0.5, rel=0.07)
            assert low < float(x.mean()) < high

    def test_of_a_ratio_is_that_of_the_delta_method(self):
        g = torch.Generator().manual_seed(1)
        b = torch.randint(1, 7, (1500,), generator=g).double()
        a = torch.binomial(b, torch.rand(1500, generator=g).double(), generator=g)
        r = float(a.sum() / b.sum())
        std = float((a - r * b).std()) / (float(b.mean()) * 1500**0.5)
        low, high = bootstrap_interval(a, b, draws=4000)
        assert low < r < high and high - low == pytest.approx(2 * 1.96 * std, rel=0.07)

    @given(st.integers(0, 10**6))
    def test_pictures_are_drawn_whole(self, seed):
        "With one rate in every picture nothing is left to chance, however unequal they are."
        b = torch.randint(1, 9, (12,), generator=torch.Generator().manual_seed(seed))
        assert bootstrap_interval(0.25 * b, b, draws=50, seed=seed) == pytest.approx((0.25, 0.25))

    def test_nothing_was_mentioned(self):
        assert bootstrap_interval(torch.zeros(4), torch.zeros(4)) == (0.0, 0.0)

    def test_repeats_with_its_seed(self):
        x, ones = torch.arange(30.0), torch.ones(30)
        once = bootstrap_interval(x, ones, seed=3)
        assert once == bootstrap_interval(x, ones, seed=3)
        assert once != bootstrap_interval(x, ones, seed=4)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    vlm = VLM(build_model(SMALL).requires_grad_(False), build_processor(SMALL))
    with torch.no_grad():
        vlm.model.lm_head.weight.mul_(4)  # random weights with an opinion
    return vlm, RewardModel(vlm, RewardConfig(lora=LoRAConfig(r=4, alpha=8))).requires_grad_(False)


def test_greedy_answers_and_their_kl(small):
    vlm, _ = small
    prompts = detail_prompts(sample_scenes(5, seed="greedy"))
    said, kl = speak_greedily(vlm, prompts)
    assert said == answer(vlm, prompts, 0.0) == speak_greedily(vlm, prompts)[0]
    alone = []  # one answer after the other: the chance that the reference says exactly this
    for p, a in zip(prompts, said):
        b = vlm.batch([p], [a])
        alone.append(-float(token_logprobs(vlm.rule_out(vlm.answer_logits(b)), b.answers).sum()))
    assert kl == pytest.approx(sum(alone) / 5, rel=1e-4) and kl > 0


class TestFigures:
    def test_of_answers_that_are_known(self, small):
        prompts, said = detail_prompts([SCENE] * 6), ["a cat and a fish .", describe(SCENE)] * 3
        f = figures(DrawnWorld(), prompts, said, small[1], 1.5)
        assert f["chair_i"] == pytest.approx(1 / 5) and f["kl"] == 1.5
        assert 0 <= f["chair_i_low"] < 1 / 5 < f["chair_i_high"] < 0.5
        assert f["overall"] == pytest.approx(0.5 * f["chair_i"])

    def test_what_nobody_knows_is_left_out(self, small, monkeypatch):
        "No zero in its place, and no column in a table."
        monkeypatch.setattr(DrawnWorld, "judge", lambda *a: None)
        monkeypatch.setattr(DrawnWorld, "truth", lambda *a: None)
        f = figures(DrawnWorld(), detail_prompts([SCENE]), ["a cat ."], small[1])
        assert set(f) == {"kl", "reward"}
        assert text_table(dict(sft=f), NAMES).splitlines()[0].split() == ["learned", "reward", "KL"]

    def test_weights_that_have_left_the_numbers(self, small):
        rm = small[1]
        shift = rm.shift.clone()
        rm.shift.fill_(math.nan)
        with pytest.raises(UserError, match="lower the learning rate"):
            figures(DrawnWorld(), detail_prompts([SCENE]), ["a cat ."], rm)
        rm.shift.copy_(shift)


class TestArms:
    def test_rows_are_called_by_labels(self):
        names = row_names(dict(ppo="PPO", my="mine"), "my")
        assert names["ppo"] == "PPO" and names["my_greedy"] == "mine, greedy"
        assert names["my_novel"] == "mine, unseen combinations" and "ppo_greedy" not in names

    def test_headline_is_one_of_them(self):
        with pytest.raises(ValueError, match="give one of the arms, gold, my"):
            EvaluateConfig(arms=("gold", "my"))
        assert EvaluateConfig(arms=("gold", "my"), headline="my").headline == "my"

    @pytest.mark.parametrize("arm", ["sft", "best_of_n", "pope", "reward_model", "ppo_greedy"])
    def test_none_takes_the_place_of_something_else(self, arm):
        with pytest.raises(ValueError, match="something else in a report"):
            EvaluateConfig(arms=("ppo", arm))

    def test_all_of_them_speak(self, small):
        vlm, rm = small
        with pytest.raises(UserError, match="'reward' gives no policy"):
            Policies(vlm, rm, dict(reward=rm), "reward")


def test_curves_of_arms_that_sample(tmp_path):
    log = tmp_path / "metrics.jsonl"
    rows = [dict(step=i, kl=float(i), reward=0.5) for i in range(3)]
    log.write_text("\n".join(map(json.dumps, [*rows, rows[0] | dict(kl=math.nan)])))
    assert curve(log) == rows
    assert len(over_optimisation_figure(rows).axes) == 1  # the true score is not known
    with_truth = [row | dict(true_score=5.0) for row in rows]
    assert len(over_optimisation_figure(with_truth).axes) == 2
    log.write_text(json.dumps(dict(step=0, loss=0.7)))
    with pytest.raises(UserError, match="line 1"):  # no log of an arm that samples
        curve(log)
    log.write_text("\n".join(map(json.dumps, [rows[0], dict(step=1, kl=1.0)])))
    with pytest.raises(UserError, match="line 2"):
        curve(log)


def test_an_arm_that_samples_nothing_has_no_curve(tmp_path):
    "DPO's log has no KL of sampled answers, and is not asked for one."
    run = Run(tmp_path, "smoke")
    run.path("ppo").mkdir()
    (run.path("ppo") / "metrics.jsonl").write_text(json.dumps(dict(step=0, kl=1.0, reward=0.5)))
    cfg = EvaluateConfig(arms=("ppo", "dpo"), headline="ppo")
    assert list(training_curves(run, cfg)) == ["ppo"]


def test_tables_show_greedy_rows_and_the_interval():
    interval = dict(chair_i=0.125, chair_i_low=0.1, chair_i_high=0.16)
    row = dict.fromkeys(COLUMNS, 0.25) | interval | dict(length=28.0)
    result = {name: row for name in NAMES} | dict(reward_model=dict(pair_accuracy=0.75))
    result["pope"] = {name: dict(accuracy=0.5, yes_rate=0.03) for name in ("sft", "ppo")}
    lines = text_table(result, NAMES).splitlines()
    assert len(lines) == 1 + len(NAMES)
    assert all("0.125 ± 0.030" in line and "28.00" in line for line in lines[1:])
    for start in ("SFT, greedy", "PPO, reward model + penalty, greedy"):
        assert any(line.startswith(start) for line in lines)
    said = {name: ["a cat and a fish ."] for name in ("sft", "ppo")}
    found = Findings(DrawnWorld(), detail_prompts([SCENE]), said, result, NAMES, ("sft", "ppo"))
    page = report_html(found, {}, 1)
    assert page.count("0.125 ± 0.030") == len(NAMES)
    for text in ("<mark>fish</mark>", "yes-rate 0.030", "SFT, greedy"):
        assert text in page


def test_report_of_a_run(smoke_run):
    report = json.loads((smoke_run / "report.json").read_text())
    page = (smoke_run / "report.html").read_text()
    for policy, name in NAMES.items():
        f = report[policy]
        assert f["chair_i_low"] <= f["chair_i"] <= f["chair_i_high"], policy
        assert all(math.isfinite(f[column]) for column in COLUMNS), policy
        assert name in page
    greedy = report["sft_greedy"]["kl"], report["ppo_greedy"]["kl"]
    assert min(greedy) > 0, "one answer is never as wide as the reference"
    assert {"accuracy", "yes_rate"} <= report["pope"]["sft"].keys()
    assert "±" in page and "POPE" in page
    assert {"kl", "reward", "true_score"} == report["over_optimisation"].keys()


class Counted:
    "What the penalty must know, and no more: the contract `Counts`."

    false_objects, false_attributes, false_relations = ("fish",), (), ()
    count_right = place_right = None
    recall = 0.5


def test_counts_are_enough_for_an_evaluation(small, monkeypatch):
    "The interval needs mentions, too; without them there is none, and the table shows the share."
    monkeypatch.setattr(DrawnWorld, "judge", lambda *a: Counted())
    monkeypatch.setattr(DrawnWorld, "summarise", lambda self, verdicts: dict(chair_i=0.25))
    f = figures(DrawnWorld(), detail_prompts([SCENE]), ["a cat ."], small[1])
    assert f["chair_i"] == 0.25 and "chair_i_low" not in f
    assert text_table(dict(sft=f), NAMES).splitlines()[1].split()[1] == "0.250"


@pytest.mark.parametrize("said, yes", [("Yes .", 1), (" yes, it is", 1), ("YES", 1), ("No .", 0)])
def test_yes_is_yes_however_it_is_written(small, monkeypatch, said, yes):
    monkeypatch.setattr(
        "vlmrlhf_course.report.evaluate.answer", lambda *a, **k: [said, "yesterday"]
    )
    asked = [Prompt("exists", "is there a cat ?", text, None) for text in ("Yes.", "no .")]
    assert quiz(small[0], asked)["accuracy"] == (1 + yes) / 2
