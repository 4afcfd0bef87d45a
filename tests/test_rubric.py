"The exact score and the rules that break its ties."

import random

import pytest
from conftest import FAULTY, SCENE

from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.world.hallucination import hallucinations
from vlmrlhf_course.world.judge import judge
from vlmrlhf_course.world.llava import build_tokenizer
from vlmrlhf_course.world.rubric import tie_break, true_score
from vlmrlhf_course.world.scenes import describe, make_prompt, sample_scenes, scene_of


def test_true_score_prefers_the_truth():
    prompt = Prompt("detail", "describe the picture .", describe(SCENE), f"scene:{SCENE}")
    best, faulty, empty = (true_score(prompt, t) for t in (describe(SCENE), FAULTY, ""))
    assert best == pytest.approx(10) and 0 <= empty < faulty < best
    yes = Prompt("exists", "is there a cat ?", "yes .", f"scene:{SCENE}")
    assert true_score(yes, "yes .") == pytest.approx(10) and true_score(yes, "no .") < 5


def changed(words, vocabulary, rng):
    "A word more, some words fewer, or a piece of the text once more."
    new, at, change = list(words), rng.randrange(len(words) + 1), rng.randrange(3)
    if change == 0:
        new.insert(at, rng.choice(vocabulary))
    elif change == 1:
        del new[at : at + rng.randint(1, 3)]
    else:
        new[at:at] = new[max(0, at - rng.randint(1, 8)) : at]
    return new


def climbed(prompt, text, vocabulary, rng, tries=250):
    "The best text that a search from `text` finds, and its score."
    best, score = text.split(), true_score(prompt, text)
    for _ in range(tries):
        new = changed(best, vocabulary, rng)
        if true_score(prompt, " ".join(new)) >= score:
            best, score = new, true_score(prompt, " ".join(new))
    return " ".join(best), score


def says_the_same(prompt, text):
    "Every claim of the careful answer, and nothing else."
    scene = scene_of(prompt)
    if prompt.kind not in ("detail", "brief"):
        return set(text.split()) - {"a", "the"} == set(prompt.answer.split()) - {"a", "the"}
    v, careful = judge(text, scene), judge(prompt.answer, scene)
    lists = ("true_objects", "true_attributes")
    same = all(set(getattr(v, n)) == set(getattr(careful, n)) for n in lists)
    return same and not hallucinations(v) and not v.repeats


WORDS = sorted(set(build_tokenizer().get_vocab()) - {"<image>", "<pad>", "<unk>", "</s>"})


@pytest.mark.parametrize("kind", ["detail", "brief", "exists", "count", "colour", "relation"])
def test_no_text_scores_like_the_truth_and_is_not_it(kind):
    """What a policy that maximises the score would find: searched from the truth, from nothing, and
    from what an earlier version of the score paid 10 points for."""
    rng = random.Random(kind)
    for seed in range(4):
        prompt = make_prompt(sample_scenes(1, "train", seed)[0], kind, rng)
        for start in (prompt.answer, "", prompt.answer + PADDING, describe(scene_of(prompt))):
            text, score = climbed(prompt, start, WORDS, rng)
            assert score <= 10 + 1e-9
            assert score < 10 - 1e-9 or says_the_same(prompt, text), text


PADDING = " there is one . there are two ." * 6


def test_saying_nothing_is_worth_nothing():
    for kind in ("detail", "brief", "exists"):
        prompt = make_prompt(SCENE, kind, random.Random(0))
        assert [true_score(prompt, text) for text in ("", ".", ". .", "of the")] == [0, 0, 0, 0]
    prompt = make_prompt(SCENE, "detail", random.Random(0))
    scores = [true_score(prompt, describe(SCENE) + PADDING[: 16 * n]) for n in range(4)]
    assert scores == sorted(scores, reverse=True) and scores[1] < 9.5  # each piece costs


class TestTieBreak:
    ask = Prompt("detail", "describe the picture .", describe(SCENE), f"scene:{SCENE}")
    ranked = [
        ("a small red cat on a large blue boat .", "a small red cat ."),  # both right: more facts
        (describe(SCENE).replace("red", "green"), FAULTY),  # both wrong: fewer errors
        ("a cat .", describe(SCENE).replace("red", "green")),  # right beats wrong
        (FAULTY, ""),  # claiming nothing is wrong
        ("a cat .", "nothing ."),
    ]

    @pytest.mark.parametrize("better, worse", ranked)
    def test_rules(self, better, worse):
        assert tie_break(self.ask, better, worse) == 1
        assert tie_break(self.ask, worse, better) == -1

    def test_undecided(self):
        "As many errors in both, however much else they say."
        one, short = describe(SCENE).replace("red", "green"), "a green cat ."
        for a, b in ((one, short), ("", ""), ("a cat .", "a boat .")):
            assert tie_break(self.ask, a, b) == 0

    def test_questions(self):
        p = Prompt("exists", "is there a cat ?", "yes .", f"scene:{SCENE}")
        assert tie_break(p, "yes .", "no .") == 1
        assert tie_break(p, "no .", "yes .") == -1
        assert tie_break(p, "yes .", "yes .") == 0
        assert tie_break(p, "no .", "maybe .") == 0
