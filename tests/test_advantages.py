"Advantages against their definitions: token rewards, GAE, whitening, shaping, the value head."

import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import rand, right_mask, seeds
from torch.testing import assert_close

from vlmrlhf_course.rl.advantages import ValueHead, gae, potential_shaping, token_rewards, whiten


def gae_by_definition(r, v, gamma, lam, after):
    "One answer: A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} - V_t, as a double sum."
    n = len(r)
    delta = [r[t] + gamma * (v[t + 1] if t + 1 < n else after) - v[t] for t in range(n)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
    seeds,
    st.booleans(),
)
def test_gae_is_the_double_sum(lengths, gamma, lam, seed, truncated):
    B, A = len(lengths), max(lengths)
    r, v, mask = rand(B, A, seed=seed), rand(B, A, seed=seed + 1), right_mask(lengths, A)
    after = rand(B, seed=seed + 2) if truncated else None
    adv, ret = gae(r, v, mask, gamma, lam, after)
    for i, n in enumerate(lengths):
        value_after = float(after[i]) if truncated else 0.0
        want = gae_by_definition(r[i, :n].tolist(), v[i, :n].tolist(), gamma, lam, value_after)
        assert_close(adv[i, :n], torch.tensor(want, dtype=torch.float64))
        assert_close(ret[i, :n], adv[i, :n] + v[i, :n])
        assert not adv[i, n:].any() and not ret[i, n:].any()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), seeds, st.integers(0, 3))
def test_gae_does_not_see_padding(lengths, seed, extra):
    B, A = len(lengths), max(lengths)
    r, v, mask = rand(B, A, seed=seed), rand(B, A, seed=seed + 1), right_mask(lengths, A)
    want = gae(r, v, mask, 0.9, 0.8)
    wide = right_mask(lengths, A + extra)
    dirty = [torch.where(wide, torch.cat([x, torch.zeros(B, extra)], 1), 1e6) for x in (r, v)]
    got = gae(*dirty, wide, 0.9, 0.8)
    for g, w in zip(got, want):
        assert_close(g[:, :A], w)
        assert_close(g[:, A:], torch.zeros(B, extra, dtype=g.dtype))


def test_gae_with_a_discount_for_each_answer():
    r = rand(3, 4)
    v = rand(3, 4, seed=1)
    mask = right_mask([4, 2, 3], 4)
    gamma = torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)
    adv, ret = gae(r, v, mask, gamma, 0.7)
    for i in range(3):
        one = gae(r[i : i + 1], v[i : i + 1], mask[i : i + 1], float(gamma[i]), 0.7)
        assert_close(adv[i : i + 1], one[0])
        assert_close(ret[i : i + 1], one[1])


def test_gae_limits():
    """λ = 1: discounted return minus value. λ = 0: the
    one-step error. A perfect critic: no advantage."""
    r, v, mask = rand(1, 4), rand(1, 4, seed=1), torch.ones(1, 4, dtype=torch.bool)
    adv, ret = gae(r, v, mask, 0.9, 1.0)
    want = torch.stack([sum(0.9**k * r[0, t + k] for k in range(4 - t)) for t in range(4)])
    assert_close(ret[0], want)
    assert_close(gae(r, v, mask, 0.9, 0.0)[0][0, :3], r[0, :3] + 0.9 * v[0, 1:] - v[0, :3])
    perfect = want.unsqueeze(0)
    assert_close(gae(r, perfect, mask, 0.9, 0.95)[0], torch.zeros(1, 4, dtype=torch.float64))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), seeds)
def test_token_rewards(lengths, seed):
    B, A = len(lengths), max(lengths) + 1
    score, cost, mask = rand(B, seed=seed), rand(B, A, seed=seed + 1), right_mask(lengths, A)
    out = token_rewards(score, cost, mask)
    for i, n in enumerate(lengths):
        want = torch.zeros(A, dtype=torch.float64)
        want[:n] = -cost[i, :n]
        want[n - 1] += score[i]
        assert_close(out[i], want)


def test_token_rewards_with_padding_on_the_left():
    mask = torch.tensor([[False, True, True]])
    got = token_rewards(torch.tensor([5.0]), torch.ones(1, 3), mask)
    assert_close(got, torch.tensor([[0.0, -1.0, 4.0]]))


class TestWhiten:
    x, mask = rand(3, 5, scale=4.0) + 7, right_mask([5, 2, 3], 5)

    def test_moments(self):
        y = whiten(self.x, self.mask)
        real = y[self.mask]
        assert abs(real.mean()) < 1e-9
        assert abs(real.std(correction=0) - 1) < 1e-6
        assert not y[~self.mask].any()

    def test_keeps_the_mean_on_demand(self):
        y = whiten(self.x, self.mask, shift=False)[self.mask]
        assert_close(y.mean(), self.x[self.mask].mean())
        assert_close(y.std(correction=0), torch.tensor(1.0, dtype=y.dtype), atol=1e-6, rtol=0)

    def test_padding_does_not_count(self):
        dirty = torch.where(self.mask, self.x, 1e9)
        assert_close(whiten(dirty, self.mask), whiten(self.x, self.mask))

    def test_no_spread_is_no_catastrophe(self):
        assert_close(whiten(torch.full((2, 3), 4.0), torch.ones(2, 3).bool()), torch.zeros(2, 3))

    def test_over_processes(self):
        "Two processes that hold parts of the rows, and sum over both, whiten as one process would."
        want, real = whiten(self.x, self.mask), self.x[self.mask]
        sums = [torch.tensor(float(len(real))), real.sum(), ((real - real.mean()) ** 2).sum()]
        seen = []
        for rows in (slice(0, 1), slice(1, 3)):
            mine, total = [], iter(sums)

            def reduce(t):
                mine.append(t)
                return next(total)

            assert_close(whiten(self.x[rows], self.mask[rows], reduce=reduce), want[rows])
            seen.append(mine)
        for a, b, s in zip(*seen, sums):
            assert_close(a + b, s, check_dtype=False)


@given(seeds, st.floats(0.1, 1))
def test_potential_shaping_telescopes(seed, gamma):
    "The discounted sum of the shaping is -Φ(s_0): it cannot change which answer is best."
    mask, phi = right_mask([5, 2, 1], 5), rand(3, 5, seed=seed)
    f = potential_shaping(phi, mask, gamma)
    assert_close((f * gamma ** torch.arange(5)).sum(1), -phi[:, 0], check_dtype=False)
    assert_close(f * ~mask, torch.zeros_like(f))


def test_potential_shaping_looks_at_no_padding():
    "Not even where nothing but NaN stands there."
    mask, phi = right_mask([5, 2, 1], 5), rand(3, 5)
    found = potential_shaping(phi.masked_fill(~mask, torch.nan), mask, 0.9)
    assert torch.equal(found, potential_shaping(phi, mask, 0.9))


def test_value_head_looks_at_the_picture():
    torch.manual_seed(0)
    head = ValueHead(8, 6, heads=2).double()
    h = rand(3, 4, 8)
    seen = torch.tensor([True, False, True])
    pictures = rand(2, 5, 6, seed=1)
    assert not head(h, pictures, seen).any(), "it starts by predicting zero"
    torch.nn.init.normal_(head.out.weight)
    v = head(h, pictures, seen)
    assert v.shape == (3, 4)
    assert_close(v[:1], head(h[:1], pictures[:1], seen[:1]))
    assert_close(v[2:], head(h[2:], pictures[1:], seen[2:]))
    assert_close(v[1:2], head(h[1:2], None, seen[1:2]))
    other_pictures = pictures + rand(2, 5, 6, seed=2)
    felt = (v - head(h, other_pictures, seen)).abs().amax(1) > 1e-6
    assert felt.tolist() == seen.tolist()
    moved = h.clone()
    moved[:, 2] = rand(3, 8, seed=3)
    changed = ((v - head(moved, pictures, seen)).abs() > 1e-9).all(0)
    assert changed.tolist() == [False, False, True, False], "each token has its own value"
