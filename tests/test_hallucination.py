"The penalty for hallucinations, POPE's questions, and the overall rate."

from dataclasses import replace

import pytest
from conftest import FAULTY, SCENE

from vlmrlhf_course.rl.penalty import SCHEDULED, PenaltyConfig, penalty, severity
from vlmrlhf_course.world.hallucination import hallucinations, overall_rate, pope_questions
from vlmrlhf_course.world.judge import judge
from vlmrlhf_course.world.scenes import NOUNS, PLACES, describe, sample_scenes, scene_of


class TestPenalty:
    v = judge(FAULTY, SCENE)  # one false object, one false colour, two of three things named

    def test_example(self):
        assert [k for k, _ in hallucinations(self.v)] == ["existence", "colour"]
        assert penalty(self.v) == pytest.approx(0.5 * (-2 - 1 + 4 * 2 / 3))
        errors_only = PenaltyConfig(weight=1.0, coverage=0.0, count_power=1.2)
        assert penalty(self.v, errors_only) == pytest.approx(-3)
        half_way = penalty(self.v, PenaltyConfig(ramp=100), step=50)
        assert half_way == pytest.approx(0.5 * (1.5 * -3 + 4 * 2 / 3))

    def test_more_than_the_sum(self):
        three = judge("a fish and a lamp and a star .", SCENE)
        cfg = PenaltyConfig(weight=1.0, coverage=0.0, count_power=1.2)
        assert penalty(three, cfg) == pytest.approx(-2 * 3**1.2)

    def test_relations_count(self):
        wrong = judge("a cat behind a boat .", SCENE)
        assert penalty(wrong) == pytest.approx(0.5 * (-0.5 + 4 * 2 / 3))

    def test_count_and_place_cost_what_they_are_given(self):
        text = "in this night scene there is a small red cat . there are six things ."
        wrong = judge(text, SCENE)
        assert wrong.count_right is False and wrong.place_right is False
        flat = PenaltyConfig(weight=1.0, coverage=0.0)
        assert penalty(wrong, flat) == 0
        assert penalty(wrong, replace(flat, count=-1.5)) == -1.5
        assert penalty(wrong, replace(flat, place=-0.5)) == -0.5
        unsaid = judge("a small red cat .", SCENE)
        assert penalty(unsaid, replace(flat, count=-9.0, place=-9.0)) == 0

    def test_the_scheduled_table(self):
        s = SCHEDULED
        assert (s.object, s.count, s.attribute) == (-2.0, -1.5, -1.0)
        assert (s.relation, s.place) == (-0.8, -0.5)
        assert (s.count_power, s.ramp) == (1.2, 10_000)
        assert s.coverage > 0
        text = "in this night scene there is a fish and a lamp and a star . there are six things ."
        three = judge(text, SCENE)
        assert penalty(three, s) == pytest.approx(-2 * 3**1.2 - 1.5 - 0.5)
        assert penalty(three, s, 5_000) == pytest.approx(1.5 * penalty(three, s))

    def test_silence_does_not_win(self):
        truth, silence, faulty = (penalty(judge(t, SCENE)) for t in (describe(SCENE), "", FAULTY))
        assert truth > faulty and truth > silence == 0.0

    def test_severity(self):
        assert [severity(s, 10) for s in (0, 5, 10, 99)] == [1.0, 1.5, 2.0, 2.0]
        assert severity(99, 0) == 1.0


class TestPope:
    scenes = sample_scenes(60, seed="pope")

    @pytest.mark.parametrize("kind", ["random", "popular", "adversarial"])
    def test_questions(self, kind):
        questions = pope_questions(self.scenes, kind)
        assert len(questions) == 2 * len(self.scenes)
        assert sum(q.answer == "yes ." for q in questions) == len(self.scenes)
        freq = {n: sum(s.find(n) is not None for s in self.scenes) for n in NOUNS}
        for q, s in zip(questions, [s for s in self.scenes for _ in "yn"]):
            noun = q.text.split()[-2]
            assert scene_of(q) == s
            assert (q.answer == "yes .") == (s.find(noun) is not None)
            assert q.text == f"is there a {noun} ?"
            if q.answer == "yes .":
                continue
            absent = [n for n in NOUNS if not s.find(n)]
            if kind == "popular":
                assert sum(freq[n] > freq[noun] for n in absent) < 3
            at_home = set(absent) & set(PLACES[s.place])
            if kind == "adversarial" and at_home:
                assert noun in at_home
        assert questions == pope_questions(self.scenes, kind)
        assert questions != pope_questions(self.scenes, kind, seed=1)

    def test_kinds_differ(self):
        def absent_nouns(kind):
            return {q.text.split()[-2] for q in pope_questions(self.scenes, kind)[1::2]}

        assert len(absent_nouns("popular")) < len(absent_nouns("random"))


def test_overall_rate():
    rates = dict(chair_i=0.2, attribute_error=0.5, relation_error=1.0)
    assert overall_rate(rates) == pytest.approx(0.1 + 0.15 + 0.2)
