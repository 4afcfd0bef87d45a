"""Every exercise's check refuses all of its known mistakes, and accepts other right solutions, for
twenty seeds; and no two mistakes are the same."""

import itertools

import pytest

from vlmrlhf_course.classroom.check import kill, same_outcome
from vlmrlhf_course.classroom.items import mistakes_of, with_mistake
from vlmrlhf_course.classroom.outcome import outcome
from vlmrlhf_course.classroom.register import EXERCISES


@pytest.mark.parametrize("name", sorted(EXERCISES))
def test_mistakes_fail_and_right_solutions_pass(name):
    found = kill(name)
    assert found.missed == [] and found.refused == []
    assert found.mistakes >= 5 and found.equivalents >= 2


@pytest.mark.parametrize("name", sorted(EXERCISES))
def test_no_two_mistakes_are_the_same(name):
    "Else a learner would be told two names."
    item, results = EXERCISES[name], {}
    cases = [item.case(0, number) for number in range(item.cases)]
    for mistake in mistakes_of(name):
        wrong = with_mistake(item, mistake)
        results[mistake.what] = [outcome(wrong, item, case) for case in cases]
    pairs = itertools.combinations(results.items(), 2)
    alike = [(a, b) for (a, x), (b, y) in pairs if all(map(same_outcome, x, y))]
    assert alike == []
