"Learning rates, phases of PPO, thawing of the tower, and when a curve is level."

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import seeds

from vlmrlhf_course.rl.algorithm import phase
from vlmrlhf_course.rl.ppo import PPOConfig
from vlmrlhf_course.train.fit import converged, warmup_cosine
from vlmrlhf_course.train.sft import unfrozen_layers


def test_warmup_cosine():
    f = [warmup_cosine(s, 100, 0.1) for s in range(100)]
    assert f[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert max(f) == 1.0
    assert all(a > b for a, b in zip(f[10:], f[11:]))
    assert f[55] == pytest.approx(0.5)
    assert 0 < f[-1] < 0.01
    assert warmup_cosine(100, 100, 0.1) == pytest.approx(0.0)
    assert 0 < warmup_cosine(0, 1) <= 1


def test_phases():
    cfg = PPOConfig(iterations=20, warmup=0.1, finish=0.2)
    plan = [phase(s, cfg) for s in range(20)]
    assert [p[0] for p in plan] == ["warm-up"] * 2 + ["main"] * 14 + ["finish"] * 4
    assert {p[1:] for p in plan[:2]} == {(0.1, 5.0)}
    assert {p[1:] for p in plan[2:16]} == {(1.0, 1.0)}
    assert [p[1] for p in plan[16:]] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert {phase(0, PPOConfig(iterations=3))[0]} == {"main"}, "too short for phases"


class TestConverged:
    def test_by_definition(self):
        "Welch's statistic of the last fifth against the one before, whatever came earlier."
        before, last = [3.0, 5.0, 4.0, 4.0], [1.0, 3.0, 2.0, 3.0]
        m = [sum(w) / 4 for w in (before, last)]
        s2 = [sum((x - c) ** 2 for x in w) / 3 for w, c in zip((before, last), m)]
        level, z = converged([99.0] * 12 + before + last)
        assert z == pytest.approx((m[0] - m[1]) / math.sqrt((s2[0] + s2[1]) / 4))
        assert level == (abs(z) < 2)

    @given(st.floats(0.1, 10), st.floats(-5, 5), seeds)
    def test_units_do_not_matter(self, scale, shift, seed):
        losses = [random.Random(f"{seed}/{i}").gauss(0, 1) for i in range(40)]
        z = converged([scale * x + shift for x in losses])[1]
        assert z == pytest.approx(converged(losses)[1], rel=1e-6, abs=1e-9)

    def test_verdicts(self):
        assert not converged([10 * 0.95**i for i in range(50)])[0], "falling"
        assert not converged([float(i) for i in range(50)])[0], "rising is not level"
        assert converged([5.0] * 30 + [1.0] * 20) == (True, 0.0)
        assert converged([2.0] * 8 + [1.0] * 2) == (False, math.inf)
        with pytest.raises(ValueError, match="at least 10"):
            converged([1.0] * 9)


@pytest.mark.parametrize(
    "progress, layers, want",
    [
        (0.0, 24, 0),
        (0.2999, 24, 0),
        (0.3, 24, 1),
        (0.6999, 24, 1),
        (0.7, 24, 24),
        (1.0, 24, 24),
        (0.5, 1, 1),
    ],
)
def test_unfrozen_layers(progress, layers, want):
    assert unfrozen_layers(progress, layers) == want
