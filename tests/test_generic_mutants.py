"""Each exercise's check refuses every generic change of its reference that is not listed as
equivalent (`generic_mutants.py`), for a learner's own seed and two others; the script tries
twenty. About 4000 changes."""

import ast
import inspect
from dataclasses import replace

import pytest
import torch
from generic_mutants import Change, changes_of, review, reviewed, tried
from generic_rules import texts

from vlmrlhf_course.classroom.items import Exercise
from vlmrlhf_course.classroom.register import EXERCISES

SEEDS = [0, 1, 2]


@pytest.mark.parametrize("name", sorted(EXERCISES))
def test_every_change_that_shows_is_refused(name):
    found = review(EXERCISES[name], SEEDS)
    assert found.survivors == {}, "strengthen the inputs, or list it with a reason"
    assert found.stale == []
    assert found.changes > 5


def test_who_is_listed_is_an_exercise():
    assert set(reviewed()) <= set(EXERCISES)
    assert all(why and len(why) < 120 for rows in reviewed().values() for why in rows.values())


@pytest.mark.parametrize("name", sorted(EXERCISES))
def test_the_reference_itself_passes(name):
    "Else a harness that breaks would refuse everything."
    item = EXERCISES[name]
    assert tried(item, [Change("", inspect.getsource(item.function))], SEEDS) == [SEEDS]


def unpadded(draw):
    B, A = draw.sizes(2)
    return dict(x=draw.normal(B, A), mask=torch.ones(B, A, dtype=torch.bool))


def test_a_weak_check_is_noticed(monkeypatch):
    "Without padding, and without hard cases, nobody sees what is done with a mask."
    monkeypatch.setattr(Exercise, "hard", ())
    weak = replace(EXERCISES["whiten"], inputs=unpadded)
    survivors = review(weak, [0]).survivors
    assert "mean = reduce((x * mask).sum()) / n → mean = reduce(x.sum()) / n" in survivors
    assert len(survivors) > 10


def test_what_is_no_longer_equivalent_is_noticed(monkeypatch):
    row = {"n = reduce(mask.sum().to(x.dtype)) → pass": "wrong", "gone → gone": "no such line"}
    monkeypatch.setattr("generic_mutants.reviewed", lambda: dict(whiten=row))
    assert review(EXERCISES["whiten"], [0]).stale == list(row)


def test_what_does_not_end_is_refused_and_the_rest_goes_on(monkeypatch):
    monkeypatch.setattr("generic_mutants.SECONDS", 0.3)
    ends = "import os\n\n\ndef whiten(x, mask, **more):\n    os._exit(1)\n"
    hangs = "def whiten(x, mask, **more):\n    while True:\n        pass\n"
    right = inspect.getsource(EXERCISES["whiten"].function)
    changes = [Change("", text) for text in (right, hangs, ends, "def whiten(", right)]
    assert tried(EXERCISES["whiten"], changes, [0, 1]) == [[0, 1], [], [], [], [0, 1]]


SMALL = '''
def f(x, a=2, b=None):
    """Not a word of it."""
    if a > 1 and not b:
        a -= 1
    for i in range(3):
        x = x[1:].sum(0, keepdim=True).clamp(min=a)
    return max(x, a)
'''
WANTED = """a=3 | a=None | if a >= 1 and | if a > 2 and | if a > 1 or | if a > 1: | if True:
if not b: | if not (a > 1 and (not b)) | a = 1 | a += 1 | list(range(3))[1:] | range(2) | x[2:]
x[:-1].sum | x = x[1:].clamp | sum(1, | .mean(0, | sum(0).clamp | keepdim=False | clamp(max=a)
min(x, a) | pass"""


def test_which_changes_there_are():
    made = list(texts(ast.parse(SMALL).body[0]))
    assert len(made) == len(set(made)) and all("Not a word of it." in text for text in made)
    wanted = WANTED.replace("\n", " | ").split(" | ")
    missing = [part for part in wanted if not any(part in text for text in made)]
    assert missing == []


def test_changes_are_told_apart():
    names = [change.name for change in changes_of(EXERCISES["whiten"].function)]
    assert len(names) == len(set(names)) > 50
