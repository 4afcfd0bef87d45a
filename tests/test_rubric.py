"The exact score and the rules that break its ties."

import pytest
from conftest import FAULTY, SCENE

from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.world.rubric import tie_break, true_score
from vlmrlhf_course.world.scenes import describe


def test_true_score_prefers_the_truth():
    prompt = Prompt("detail", "describe the picture .", describe(SCENE), f"scene:{SCENE}")
    best, faulty, empty = (true_score(prompt, t) for t in (describe(SCENE), FAULTY, ""))
    assert best == pytest.approx(10) and 0 <= empty < faulty < best
    yes = Prompt("exists", "is there a cat ?", "yes .", f"scene:{SCENE}")
    assert true_score(yes, "yes .") == pytest.approx(10) and true_score(yes, "no .") < 5


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
