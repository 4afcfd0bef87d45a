"Agreement of annotators: published examples, matrix forms, and noise that is turned up."

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmrlhf_course.data.preferences import cohen_kappa, fleiss_kappa
from vlmrlhf_course.world.rubric import annotate


def test_fleiss_kappa_published_example():
    """Fleiss 1971's worked example in the form found in
    textbooks: 14 raters, 10 items, 5 categories, κ = 0.210."""
    counts = [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([[3, 0], [0, 3]]) == 1.0
    assert fleiss_kappa([[3, 0], [3, 0]]) == 1.0
    assert fleiss_kappa([[1, 1], [1, 1]]) == -1.0


def test_fleiss_kappa_of_coin_tossers_is_zero():
    rng = random.Random(0)
    heads = [sum(rng.random() < 0.5 for _ in range(3)) for _ in range(4000)]
    assert abs(fleiss_kappa([[k, 3 - k] for k in heads])) < 0.03


def test_cohen_kappa():
    a = ["y"] * 25 + ["n"] * 25
    b = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(a, b) == pytest.approx(0.4)
    assert cohen_kappa(a, a) == 1.0
    assert cohen_kappa(["y"], ["y"]) == 1.0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30))
def test_cohen_kappa_with_weights(pairs):
    "Against the matrix form: 1 - Σ w·observed / Σ w·expected."
    a, b = map(list, zip(*pairs))
    seen = np.zeros((4, 4))
    for x, y in pairs:
        seen[x, y] += 1 / len(pairs)
    chance = np.outer(seen.sum(1), seen.sum(0))
    squares = np.subtract.outer(np.arange(4), np.arange(4)) ** 2
    for name, w in (("quadratic", squares), ("none", 1 - np.eye(4))):
        by_chance = (w * chance).sum()
        want = 1 - (w * seen).sum() / by_chance if by_chance > 0 else 1.0
        assert cohen_kappa(a, b, name) == pytest.approx(want)


def test_annotators():
    scores = [3.0, 9.0, 5.0, 1.0]
    assert annotate(scores, 0.0, random.Random(0)) == [2, 0, 1, 3]
    noisy = [annotate(scores, 3.0, random.Random(i)) for i in range(300)]
    assert all(sorted(r) == [0, 1, 2, 3] for r in noisy) and len({tuple(r) for r in noisy}) > 5
    assert 0.6 < sum(r[1] < r[0] for r in noisy) / 300 < 1.0
