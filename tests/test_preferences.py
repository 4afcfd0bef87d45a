"From rankings and answers to pairs: weights, near-duplicates, balance, length bias."

import itertools
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmrlhf_course.data import preferences
from vlmrlhf_course.data.pairs import text_fault
from vlmrlhf_course.data.preferences import (
    PreferencesConfig,
    balance,
    dedupe,
    length_bias,
    most_diverse,
    pairwise_votes,
    ranked_pairs,
    ranking_pairs,
    similarity,
)
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.world.source import DrawnWorld


class TestRankingPairs:
    def test_example(self):
        "Mean ranks 0, 1.5, 1.5: the second and third tie, the first beats both equally."
        assert ranking_pairs([[0, 1, 2], [0, 2, 1]]) == [(0, 1, 1.0), (0, 2, 1.0)]
        assert ranking_pairs([[2, 1, 0]]) == [(1, 0, 0.75), (2, 0, 1.5), (2, 1, 0.75)]
        assert ranking_pairs([[0, 1], [1, 0]]) == [] == ranking_pairs([[0]])

    @given(st.lists(st.permutations(range(5)), min_size=1, max_size=4))
    def test_properties(self, rankings):
        pairs = ranking_pairs(rankings)
        total = [sum(r[i] for r in rankings) for i in range(5)]
        both_ways = itertools.permutations(range(5), 2)
        want = {(i, j) for i, j in both_ways if total[i] < total[j]}
        assert {(i, j) for i, j, _ in pairs} == want
        if pairs:
            assert sum(w for *_, w in pairs) / len(pairs) == pytest.approx(1)
            per_gap = {round(w / (total[j] - total[i]), 6) for i, j, w in pairs}
            assert len(per_gap) == 1, "proportional to the gap"

    def test_close_calls_give_no_pair(self):
        rankings = [[0, 1, 2], [0, 2, 1], [1, 0, 2]]  # mean ranks 1/3, 1, 5/3
        assert [(i, j) for i, j, _ in ranking_pairs(rankings, 1.0)] == [(0, 2)]
        assert ranking_pairs(rankings, 1.0)[0][2] == pytest.approx(1)
        # a gap of just this size counts
        assert [(i, j) for i, j, _ in ranking_pairs(rankings, 2 / 3)] == [(0, 1), (0, 2), (1, 2)]
        assert ranking_pairs(rankings, 1.5) == []

    def test_votes(self):
        assert pairwise_votes([[0, 1, 2], [0, 2, 1], [1, 0, 2]]) == [[2, 1], [3, 0], [2, 1]]


words = st.lists(st.sampled_from("a red cat on the boat .".split()), max_size=7).map(" ".join)


class TestDedupe:
    @given(words, words)
    def test_similarity(self, a, b):
        assert similarity(a, b) == similarity(b, a)
        assert 0 <= similarity(a, b) <= 1
        assert similarity(a, b) == 1 or a != b
        assert similarity(a, a) == 1

    def test_similarity_example(self):
        "<a, ab, b> against <a, ac, c>: one shared pair of three and three."
        assert similarity("a b", "a c") == pytest.approx(2 / 6)
        assert similarity("yes .", "no .") < 0.9
        assert similarity("yes", "no") == 0

    @given(st.lists(words, max_size=8), st.floats(0, 1))
    def test_dedupe(self, answers, most):
        kept = dedupe(answers, most)
        assert kept == sorted(kept) and kept[:1] == [0][: len(answers)]
        for i, j in itertools.combinations(kept, 2):
            assert similarity(answers[i], answers[j]) <= most
        for i in set(range(len(answers))) - set(kept):
            assert any(similarity(answers[i], answers[k]) > most for k in kept if k < i)

    @given(st.lists(words, max_size=6), st.integers(0, 7))
    def test_most_diverse(self, answers, k):
        """Each step takes an answer that no other would
        beat in distance to its nearest chosen neighbour."""
        kept = most_diverse(answers, k)
        assert len(kept) == len(set(kept)) == min(k, len(answers))
        assert kept[:1] == [0][: len(kept)]

        def near(i, chosen):
            return max(similarity(answers[i], answers[j]) for j in chosen)

        for n in range(1, len(kept)):
            chosen = kept[:n]
            others = set(range(len(answers))) - set(chosen)
            assert near(kept[n], chosen) == min(near(i, chosen) for i in others)


def test_balance():
    rows = [dict(kind=k, i=i) for i, k in enumerate("a" * 100 + "b" * 40 + "c" * 2)]
    out = balance(rows, most=2, least=10)
    assert [sum(r["kind"] == k for r in out) for k in "abc"] == [20, 20, 2]
    assert [r["i"] for r in out] == sorted(r["i"] for r in out)
    assert balance([]) == []


@pytest.mark.parametrize(
    "change, fault",
    [
        ({}, None),
        (dict(chosen=" "), "empty"),
        (dict(rejected=""), "empty"),
        (dict(rejected="a  cat ."), "equals"),
        (dict(chosen="a cat"), "cut off"),
        (dict(weight=0), "weight"),
    ],
)
def test_doctor(change, fault):
    found = text_fault(dict(chosen="a cat .", rejected="a dog .", weight=1.0) | change)
    if fault is None:
        assert found is None
    else:
        assert fault in found


@given(st.lists(st.tuples(words, words), max_size=12))
def test_length_bias(pairs):
    got = length_bias([dict(chosen=a, rejected=b) for a, b in pairs])
    lengths = [(len(a.split()), len(b.split())) for a, b in pairs]
    n, wins = sum(a != b for a, b in lengths), sum(a > b for a, b in lengths)
    assert got["longer"] == pytest.approx(wins / n if n else 0.5)
    assert got["z"] == pytest.approx((wins - n / 2) / math.sqrt(n / 4) if n else 0.0)
    if pairs:
        assert got["chosen"] == pytest.approx(sum(a for a, _ in lengths) / len(lengths))


def test_a_closed_question_is_ranked_with_all_its_answers(monkeypatch):
    "And with no others; the model is asked the open ones only, and each gets its own answers."
    prompts = [Prompt(kind, "?", "yes .", "blank") for kind in ("exists", "exists", "detail")]
    opened, ranked = [], []

    def sampled(ask, prompts, cfg, seed):
        opened.extend(prompts)
        return [["a cat .", "a fish ."]]

    class Watched(DrawnWorld):
        def prompts(self, *a):
            return prompts

        def rank(self, prompts, answers, cfg, seed):
            ranked.extend(answers)
            return []

    monkeypatch.setattr(preferences, "sample_candidates", sampled)
    run = SimpleNamespace(source=Watched(), seed=0)
    needed = dict(sft=SimpleNamespace(answer=None))
    cfg = PreferencesConfig(balance=0)
    ranked_pairs(SimpleNamespace(run=run, cfg=cfg, needed=needed), "train", 3)
    assert opened == prompts[2:]
    assert ranked == [["yes .", "no ."], ["yes .", "no ."], ["a cat .", "a fish ."]]
