"Who is compared, and what is asked of whom; and rows of a report that nobody trained."

from dataclasses import replace

import pytest
from conftest import SCENE

from vlmrlhf_course.base.metrics import seed_of
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.vlm import Speaker
from vlmrlhf_course.report.evaluate import (
    BESIDES,
    EvaluateConfig,
    Policies,
    below_sft,
    compare,
    cooled_to,
    likelihood,
    quizzed,
    speak,
    speak_blindly,
    voices,
)
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.world.judge import judge
from vlmrlhf_course.world.source import DrawnWorld, detail_prompts


@pytest.fixture
def who(small):
    "SFT and an arm, which is the same model: what they say is put in their mouths."
    vlm, rm = small
    return Policies(vlm, rm, dict(my=Speaker(vlm, "mine")), "my")


def asked(*answers):
    return [Prompt("exists", "is there a cat ?", text, "blank") for text in answers]


def test_a_policy_is_quizzed_greedily_and_a_row_that_is_none_by_what_it_says(who, monkeypatch):
    replies = {None: ["yes ."] * 4, "mine": ["no .", "no .", "yes .", "no ."]}
    monkeypatch.setattr(
        "vlmrlhf_course.report.evaluate.answer", lambda vlm, q, *a, role=None, **k: replies[role]
    )
    questions = asked("yes .", "yes .", "yes .", "no .")

    def never(prompts):
        raise AssertionError("a policy answers greedily")

    for row in ("sft", "sft_greedy"):
        got = quizzed(row, never, who, questions)
        assert got == dict(pope_accuracy=3 / 4, pope_yes_rate=1.0)
    for row in ("my", "my_greedy"):
        assert quizzed(row, never, who, questions) == dict(pope_accuracy=2 / 4, pope_yes_rate=1 / 4)
    said = ["yes , there is .", "yes .", "no .", "no ."]
    got = quizzed("best_of_n", lambda prompts: (said, 0.0), who, questions)
    assert got == dict(pope_accuracy=3 / 4, pope_yes_rate=2 / 4)


def test_a_policy_named_like_a_rival_is_quizzed_itself(small, monkeypatch):
    "`x_cooled` is an arm of that name, and not the arm x at another temperature."
    vlm, rm = small
    arms = {"x": Speaker(vlm, "x"), "x_cooled": Speaker(vlm, "mine")}
    who, asked_of = Policies(vlm, rm, arms, "x"), []
    module = "vlmrlhf_course.report.evaluate"
    monkeypatch.setattr(
        f"{module}.answer", lambda vlm, q, *a, role, **k: asked_of.append(role) or q
    )
    monkeypatch.setattr(f"{module}.quiz_figures", lambda *a: dict(accuracy=1.0, yes_rate=0.5))
    for row in ("x_cooled", "x_cooled_greedy", "x", "sft_cooled"):
        quizzed(row, None, who, [])
    assert asked_of == ["mine", "mine", "x", None]


def test_how_far_a_row_is_below_sft_by_hand():
    """One false mention of four in both pictures, against two of four and none of two: the
    difference of ratios; and an interval that both share, so that what is the same has none."""
    source, prompts = DrawnWorld(), detail_prompts([SCENE, SCENE])
    few = ["a cat and a kite and a fish .", "a cat and a boat ."]
    said = dict(
        sft=["a cat and a fish .", "a fish ."], my=few, again=["a cat and a fish .", "a fish ."]
    )
    found = below_sft(source, prompts, said, "my")
    assert found["value"] == pytest.approx(2 / 3 - 1 / 5)
    low, high = found["interval"]
    assert low < found["value"] < high
    assert below_sft(source, prompts, said, "again") == dict(value=0.0, interval=(0.0, 0.0))
    said |= dict(sft_greedy=few, my_greedy=few)
    assert below_sft(source, prompts, said, "my_greedy")["value"] == 0.0  # not against `sft`


def test_every_policy_answers_at_both_temperatures(who, monkeypatch):
    rows = voices(who, best_of=3)
    assert {*rows} == {*BESIDES, "sft_greedy", "my", "my_greedy"}
    module = "vlmrlhf_course.report.evaluate"

    def spoken(usual):
        def said(vlm, prompts, role=None, temperature=usual, longest=0):
            assert longest == 9
            return (temperature, role), 0

        return said

    monkeypatch.setattr(f"{module}.speak", spoken(1))
    monkeypatch.setattr(f"{module}.speak_greedily", spoken(0))
    two = [*asked("yes ."), Prompt("text", "what ?", "", None)]
    rows = voices(who, 3, temperature=0.4, longest=9)
    assert rows["sft_cooled"](two)[0] == (0.4, None)
    seen = {row: rows[row](two)[0][:2] for row in ("sft", "sft_greedy", "my", "my_greedy")}
    assert seen == dict(sft=(1, None), sft_greedy=(0, None), my=(1, "mine"), my_greedy=(0, "mine"))
    called = []
    monkeypatch.setattr(f"{module}.best_of_n", lambda *a, **k: called.append((a[2], k)))
    voices(who, 3, longest=9)["best_of_n"](two)
    assert called == [(two, dict(n=3, longest=9))]


@pytest.mark.parametrize("more", [True, False])
def test_what_a_row_holds(who, monkeypatch, more):
    "Unseen combinations and POPE by hand; where a source has neither, there is no such figure."
    said = dict(sft=["a cat and a fish .", "a fish ."], my=["a cat .", "a kite and a fish ."])

    def voice(name):
        return lambda prompts: ([said[name][prompts[0].image == "blank"]], 0.5)

    class Two(DrawnWorld):
        splits = ("test", "novel") if more else ("test",)

        def prompts(self, split, n, kinds, seed):
            (prompt,) = detail_prompts([SCENE])
            return [replace(prompt, image="blank") if split == "novel" else prompt]

        def judge(self, prompt, text):
            return judge(text, SCENE)

        def truth(self, prompt, text):
            return 7.0

        def quiz(self, prompts):
            return asked("yes .") * more

    rows = {name: voice(name) for name in said}
    monkeypatch.setattr("vlmrlhf_course.report.evaluate.voices", lambda *a: rows)
    monkeypatch.setattr("vlmrlhf_course.report.evaluate.cooled_to", lambda *a: 1.0)
    monkeypatch.setattr("vlmrlhf_course.report.evaluate.speak", lambda *a, **k: ([], 1.0))
    monkeypatch.setattr("vlmrlhf_course.report.evaluate.answer", lambda *a, **k: ["yes ."])
    result, answers, _ = compare(who, Two(), EvaluateConfig(arms=("my",), headline="my"))
    assert answers == dict(sft=["a cat and a fish ."], my=["a cat ."])
    assert result["sft"]["chair_i"] == 0.5 and result["my"]["chair_i"] == 0.0
    assert result["sft"]["kl"] == 0.5 and result["my"]["true_score"] == 7.0
    figures_of = {"novel_chair_i", "novel_recall", "pope_accuracy", "pope_yes_rate"}
    for row in result.values():
        assert figures_of & row.keys() == (figures_of if more else set())
    if more:
        novel = [(row["novel_chair_i"], row["novel_recall"]) for row in result.values()]
        assert novel == [(1.0, 0.0), (0.5, pytest.approx(1 / 3))]
        assert result["my"]["pope_accuracy"] == result["my"]["pope_yes_rate"] == 1.0


def test_who_does_not_look_is_quizzed_without_pictures(who, monkeypatch):
    seen = []

    def answered(vlm, questions, *a, **k):
        seen.append([q.image for q in questions])
        return ["yes ."] * len(questions)

    monkeypatch.setattr("vlmrlhf_course.report.evaluate.answer", answered)
    questions = [Prompt("exists", "is there a cat ?", "yes .", f"scene:{SCENE}")]
    for row in ("sft_blank", "sft_cooled", "sft"):
        quizzed(row, None, who, questions)
    assert seen == [[("blank",)], [f"scene:{SCENE}"], [f"scene:{SCENE}"]]


def test_how_far_one_is_without_pictures_and_when_it_is_cold(small, monkeypatch):
    "By hand: from likelihoods of the very answers; and by a KL that falls with the temperature."
    vlm, prompts = small[0], detail_prompts([SCENE] * 3)
    said, kl = speak_blindly(vlm, prompts)
    unseen = [replace(p, image=("blank",)) for p in prompts]
    want = [likelihood(vlm, unseen, said) - likelihood(vlm, prompts, said)]
    assert kl == pytest.approx(float(want[0].mean())) and kl > 0
    module = "vlmrlhf_course.report.evaluate"
    monkeypatch.setattr(
        f"{module}.speak", lambda *a, temperature, longest: ([], 4 * (1 - temperature))
    )
    assert cooled_to(vlm, prompts, 2.0) == pytest.approx(0.5, abs=0.02)


def test_a_policy_is_far_from_itself_at_another_temperature(small):
    "KL[π_T || π_1] by enumeration of each token's distribution; none at temperature 1."
    vlm, prompts = small[0], detail_prompts([SCENE] * 4)
    assert speak(vlm, prompts)[1] == 0.0
    _, kl = speak(vlm, prompts, temperature=0.5, seed=3)
    roll = sample(vlm, prompts, None, 0.5, seed=seed_of(3, 0))
    logits = vlm.rule_out(vlm.answer_logits(roll.batch))
    cold, warm = (logits / 0.5).log_softmax(-1), logits.log_softmax(-1)
    nats = (cold.exp() * (cold - warm)).sum(-1) * roll.batch.answer_mask
    assert kl == pytest.approx(float(nats.sum(1).mean()), rel=1e-4) and kl > 0.1
