"Evaluation: intervals against theory and simulation, greedy answers, and the smoke run's report."

import html
import json
import math

import pytest
import torch
from conftest import SCENE
from hypothesis import given
from hypothesis import strategies as st

from vlmrlhf_course import pipeline  # noqa: F401  (fills the table of stages)
from vlmrlhf_course.base.config import arms_layer
from vlmrlhf_course.base.runs import Run
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.vlm import answer, token_logprobs
from vlmrlhf_course.report.evaluate import (
    EvaluateConfig,
    Policies,
    bootstrap_interval,
    figures,
    quiz,
    quiz_figures,
    speak_greedily,
    wins,
)
from vlmrlhf_course.report.page import (
    COLUMNS,
    Findings,
    over_optimisation_figure,
    report_html,
    row_names,
    text_table,
)
from vlmrlhf_course.report.record import budget, curve, training_curves
from vlmrlhf_course.train.reward import score_texts
from vlmrlhf_course.world.rubric import true_score
from vlmrlhf_course.world.scenes import describe, sample_scenes
from vlmrlhf_course.world.source import DrawnWorld, detail_prompts

LAYERS = arms_layer()
ARMS = LAYERS["evaluate"]["arms"]
NAMES = row_names({arm: LAYERS[arm]["label"] for arm in ARMS})


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
        assert f["recall"] == pytest.approx((1 / 3 + 1) / 2) and f["chair_s"] == 0.5
        low, high = f["intervals"]["chair_i"]
        assert 0 <= low < 1 / 5 < high < 0.5

    def test_every_figure_has_its_interval(self, small):
        "That of its own numerators and denominators, which are counted here by hand."
        prompts, said = detail_prompts([SCENE] * 6), ["a cat and a fish .", describe(SCENE)] * 3
        f = figures(DrawnWorld(), prompts, said, small[1], 1.5)
        assert f["intervals"].keys() == f.keys() - {"kl", "reward", "intervals"}
        assert {"chair_i", "repeats", "recall", "facts", "true_score"} <= f["intervals"].keys()
        truth = [true_score(p, text) for p, text in zip(prompts, said)]
        by_hand = dict(
            chair_i=([1, 0] * 3, [2, 3] * 3),
            chair_s=([1, 0] * 3, [1] * 6),
            recall=([1 / 3, 1] * 3, [1] * 6),
            length=([6, len(describe(SCENE).split())] * 3, [1] * 6),
            true_score=(truth, [1] * 6),
        )
        for name, (above, below) in by_hand.items():
            want = bootstrap_interval(torch.tensor(above), torch.tensor(below))
            assert f["intervals"][name] == pytest.approx(want, rel=1e-6), name

    def test_a_tie_counts_half(self, small):
        "Equal answers win against each other half of the time."
        prompts, said = detail_prompts([SCENE] * 2), ["a cat .", "a boat ."]
        rows = dict(sft=said, other=said, sft_greedy=said[::-1], other_greedy=said)
        assert wins(small[1], prompts, rows, "other") == 0.5
        assert wins(small[1], prompts, rows, "other_greedy") == 0.5  # one is better, one worse
        rows["other"] = [max(said, key=lambda x: score_texts(small[1], prompts[:1], [x]))] * 2
        assert wins(small[1], prompts, rows, "other") == 0.75

    def test_what_nobody_knows_is_left_out(self, small, monkeypatch):
        "No zero in its place, and no column in a table."
        monkeypatch.setattr(DrawnWorld, "judge", lambda *a: None)
        monkeypatch.setattr(DrawnWorld, "truth", lambda *a: None)
        f = figures(DrawnWorld(), detail_prompts([SCENE]), ["a cat ."], small[1])
        assert set(f) == {"kl", "reward", "length"}
        assert text_table(dict(sft=f), NAMES).splitlines()[0].split() == ["words", "reward", "KL"]

    def test_weights_that_have_left_the_numbers(self, small):
        rm = small[1]
        shift = rm.shift.clone()
        rm.shift.fill_(math.nan)
        with pytest.raises(UserError, match="lower the learning rate"):
            figures(DrawnWorld(), detail_prompts([SCENE]), ["a cat ."], rm)
        rm.shift.copy_(shift)


class TestArms:
    def test_rows_are_called_by_labels(self):
        names = row_names(dict(ppo="PPO", my="mine"))
        assert names["ppo"] == "PPO" and names["my_greedy"] == "mine, greedy"
        first = ["sft", "sft_greedy", "sft_blank", "sft_cooled", "best_of_n"]
        assert list(names) == [*first, "ppo", "ppo_greedy", "my", "my_greedy"]

    def test_headline_is_one_of_them(self):
        with pytest.raises(ValueError, match="give one of the arms, oracle, my"):
            EvaluateConfig(arms=("oracle", "my"))
        assert EvaluateConfig(arms=("oracle", "my"), headline="my").headline == "my"

    @pytest.mark.parametrize(
        "arm", ["sft", "best_of_n", "reward_model", "detector", "ppo_greedy", "sft_greedy"]
    )
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
    own = dict(chair_i=0.125, intervals=dict(chair_i=(0.1, 0.16)), length=28.0, iterations=48)
    row = dict.fromkeys(COLUMNS, 0.25) | own | dict(pope_yes_rate=0.03)
    result = {name: row for name in NAMES} | dict(reward_model=dict(pair_accuracy=0.75))
    result["detector"] = dict(novel=dict(precision=dict(things=0.875), recall=dict(things=0.5)))
    lines = text_table(result, NAMES).splitlines()
    assert len(lines) == 1 + len(NAMES)
    assert lines[0].split() == [word for _, short in COLUMNS.values() for word in short.split()]
    assert all("0.125 ± 0.030" in line and "28.00" in line for line in lines[1:])
    assert all(line.endswith(" 48") for line in lines[1:])
    for start in ("SFT, greedy", "PPO, reward model + detector, greedy"):
        assert any(line.startswith(start) for line in lines)
    said = {name: ["a cat and a fish ."] for name in ("sft", "ppo_rm")}
    found = Findings(DrawnWorld(), detail_prompts([SCENE]), said, result, NAMES, ("sft", "ppo_rm"))
    page = report_html(found, {}, 1)
    assert page.count("0.125 ± 0.030") == len(NAMES) == page.count("<td>0.030</td>")
    for text in ("<mark>fish</mark>", "<th>POPE yes-rate</th>", "SFT, greedy"):
        assert text in page
    assert "Detector, novel: precision things 0.875 · recall things 0.500" in page


def test_report_of_a_run(smoke_run):
    report = json.loads((smoke_run / "report.json").read_text())
    page = (smoke_run / "report.html").read_text()
    others = {"reward_model", "detector", "over_optimisation", "run"}
    assert report.keys() == {*NAMES, *others}
    for policy, name in NAMES.items():
        f, trained = report[policy], policy.removesuffix("_greedy") in ARMS
        for figure, (low, high) in f["intervals"].items():
            assert low <= f[figure] <= high, (policy, figure)
        left_out = {"wins"} if trained else {"wins", "iterations"}  # who knows the truth needs none
        left_out |= {"below_sft"} if policy in ("sft", "sft_greedy") else set()
        known = [column for column in COLUMNS if column not in left_out]
        assert all(math.isfinite(f[column]) for column in known), policy
        assert ("iterations" in f) == trained and html.escape(name) in page
    greedy = [report[f"{name}_greedy"]["kl"] for name in ("sft", *ARMS)]
    assert min(greedy) > 0, "one answer is never as wide as the reference"
    assert "±" in page and "POPE" in page
    assert {"kl", "reward", "true_score"} == report["over_optimisation"].keys()


def test_the_budget_of_an_arm_is_what_it_logged(tmp_path):
    run = Run(tmp_path / "run", "smoke")
    (run.path("ppo_rm")).mkdir(parents=True)
    log = run.path("ppo_rm") / "metrics.jsonl"
    log.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n')
    assert budget(run, "ppo_rm") == 3


def test_what_an_arm_cost_and_what_it_is_asked_do_not_depend_on_the_temperature(smoke_run):
    "Both rows of a policy have its iterations, or DPO's steps; and POPE is asked greedily."
    report = json.loads((smoke_run / "report.json").read_text())
    for arm in ARMS:
        log = (smoke_run / arm / "metrics.jsonl").read_text().splitlines()
        for row in (arm, f"{arm}_greedy"):
            assert report[row]["iterations"] == len(log)
    assert report["ppo_rm"]["iterations"] == report["grpo"]["iterations"] == 3
    for name in ("sft", *ARMS):
        for key in ("pope_accuracy", "pope_yes_rate"):
            assert report[name][key] == report[f"{name}_greedy"][key]


def test_the_report_says_what_the_detector_sees(smoke_run):
    detector = json.loads((smoke_run / "report.json").read_text())["detector"]
    record = json.loads((smoke_run / "detector" / "done.json").read_text())
    assert detector.keys() == {"validation", "novel"}
    for split, quality in detector.items():
        assert quality == record[split] and quality.keys() == {"precision", "recall"}
        for shares in quality.values():
            assert shares.keys() == {"things", "attributes", "relations"}
            assert all(0 <= share <= 1 for share in shares.values())


class Counted:
    "What the penalty must know, and no more: the contract `Counts`."

    false_objects, false_attributes, false_relations = ("fish",), (), ()
    count_right = place_right = None
    recall = 0.5


def test_counts_are_enough_for_an_evaluation(small, monkeypatch):
    "A source counts of them what it can: figures and intervals are of that, and of nothing else."

    def parts(self, verdicts):
        return dict(chair_i=([len(v.false_objects) for v in verdicts], [4, 2]))

    monkeypatch.setattr(DrawnWorld, "judge", lambda *a: Counted())
    monkeypatch.setattr(DrawnWorld, "parts", parts)
    f = figures(DrawnWorld(), detail_prompts([SCENE] * 2), ["a cat ."] * 2, small[1])
    assert f["chair_i"] == pytest.approx(2 / 6) and "recall" not in f
    assert f["intervals"].keys() == {"chair_i", "true_score"}
    assert f["intervals"]["chair_i"] == (1 / 4, 1 / 2)  # one of the two pictures, twice
    assert text_table(dict(sft=f), NAMES).splitlines()[1].split()[1:4] == ["0.333", "±", "0.125"]


@pytest.mark.parametrize("said, yes", [("Yes .", 1), (" yes, it is", 1), ("YES", 1), ("No .", 0)])
def test_yes_is_yes_however_it_is_written(small, monkeypatch, said, yes):
    monkeypatch.setattr(
        "vlmrlhf_course.report.evaluate.answer", lambda *a, **k: [said, "yesterday"]
    )
    asked = [Prompt("exists", "is there a cat ?", text, None) for text in ("Yes.", "no .")]
    found = quiz(small[0], asked)
    assert (found["accuracy"], found["yes_rate"], found["answered"]) == (yes / 2, yes / 2, 1 / 2)


def test_who_says_neither_yes_nor_no_is_wrong():
    "Also where no would have been right: red is no answer to whether there is a cat."
    asked = [Prompt("exists", "is there a cat ?", text, None) for text in ("yes .", "no .", "no .")]
    found = quiz_figures(asked, ["yes .", "red .", "No, none."])
    shares = dict(accuracy=2 / 3, precision=1.0, recall=1.0, f1=1.0, yes_rate=1 / 3, answered=2 / 3)
    assert found == pytest.approx(shares)
