"Formulas against their definitions: slow loops, enumeration, finite differences, published examples."
import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAULTY, SCENE
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from vlmrlhf_course.rl.advantages import ValueHead, gae, potential_shaping, token_rewards, vision_gamma, whiten
from vlmrlhf_course.world.hallucination import SCHEDULED, PenaltyConfig, hallucinations, overall_rate, penalty, pope_questions, severity
from vlmrlhf_course.rl.kl import AdaptiveController, ProportionalController, full_kl, kl_by_grounding, kl_estimate
from vlmrlhf_course.rl.ppo import PPOConfig, phase, ppo_policy_loss, value_loss
from vlmrlhf_course.data.preferences import (annotate, balance, cohen_kappa, dedupe, doctor, fleiss_kappa, length_bias, most_diverse, pairwise_votes,
                                        ranking_pairs, similarity, tie_break, true_score, unsafe_claims)
from vlmrlhf_course.train.reward import (ScoreHead, bt_loss, composite_weights, consistency, crossed_pairs, diagnose, early_stop, gated_score, last_real,
                                   reliability, segment_scores, swap_pictures)
from vlmrlhf_course.rl.rollout import length_groups, padding_share, plan_prompts
from vlmrlhf_course.train.sft import careless, converged, unfrozen_layers, warmup_cosine
from vlmrlhf_course.model.vlm import masked_mean, token_logprobs
from vlmrlhf_course.world.scenes import (KINDS, NOUNS, PLACES, RESERVED, Prompt, describe, imagine, judge, make_prompt, parse_scene, sample_scene,
                                  sample_scenes, split_of, summarise)

seeds = st.integers(0, 10 ** 6)


def rand(*shape, seed=0, scale=1.): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
def right_mask(lengths, A): return torch.arange(A) < torch.tensor(lengths).unsqueeze(1)


# --- advantages -----------------------------------------------------------------------------------------------------

def gae_by_definition(r, v, gamma, lam, after):
    "One answer: A_t = sum over l of (γλ)^l δ_{t+l}, with δ_t = r_t + γ V_{t+1} - V_t, as a double sum."
    n = len(r)
    delta = [r[t] + gamma * (v[t + 1] if t + 1 < n else after) - v[t] for t in range(n)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1), seeds, st.booleans())
def test_gae_is_the_double_sum(lengths, gamma, lam, seed, truncated):
    B, A = len(lengths), max(lengths)
    r, v, mask = rand(B, A, seed=seed), rand(B, A, seed=seed + 1), right_mask(lengths, A)
    after = rand(B, seed=seed + 2) if truncated else None
    adv, ret = gae(r, v, mask, gamma, lam, after)
    for i, n in enumerate(lengths):
        want = gae_by_definition(r[i, :n].tolist(), v[i, :n].tolist(), gamma, lam, float(after[i]) if truncated else 0.)
        assert_close(adv[i, :n], torch.tensor(want, dtype=torch.float64))
        assert_close(ret[i, :n], adv[i, :n] + v[i, :n])
        assert not adv[i, n:].any() and not ret[i, n:].any()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), seeds, st.integers(0, 3))
def test_gae_does_not_see_padding(lengths, seed, extra):
    B, A = len(lengths), max(lengths)
    r, v, mask = rand(B, A, seed=seed), rand(B, A, seed=seed + 1), right_mask(lengths, A)
    want = gae(r, v, mask, .9, .8)
    wide = right_mask(lengths, A + extra)
    dirty = [torch.where(wide, torch.cat([x, torch.zeros(B, extra)], 1), 1e6) for x in (r, v)]
    got = gae(*dirty, wide, .9, .8)
    for g, w in zip(got, want): assert_close(g[:, :A], w), assert_close(g[:, A:], torch.zeros(B, extra, dtype=g.dtype))


def test_gae_with_a_discount_for_each_answer():
    r, v, mask, gamma = rand(3, 4), rand(3, 4, seed=1), right_mask([4, 2, 3], 4), torch.tensor([.5, .9, 1.], dtype=torch.float64)
    adv, ret = gae(r, v, mask, gamma, .7)
    for i in range(3):
        one = gae(r[i:i + 1], v[i:i + 1], mask[i:i + 1], float(gamma[i]), .7)
        assert_close(adv[i:i + 1], one[0]), assert_close(ret[i:i + 1], one[1])


def test_gae_limits():
    "λ = 1: discounted return minus value. λ = 0: the one-step error. A perfect critic: no advantage."
    r, v, mask = rand(1, 4), rand(1, 4, seed=1), torch.ones(1, 4, dtype=torch.bool)
    adv, ret = gae(r, v, mask, .9, 1.)
    want = torch.stack([sum(.9 ** k * r[0, t + k] for k in range(4 - t)) for t in range(4)])
    assert_close(ret[0], want)
    assert_close(gae(r, v, mask, .9, 0.)[0][0, :3], r[0, :3] + .9 * v[0, 1:] - v[0, :3])
    assert_close(gae(r, want.unsqueeze(0), mask, .9, .95)[0], torch.zeros(1, 4, dtype=torch.float64))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), seeds)
def test_token_rewards(lengths, seed):
    B, A = len(lengths), max(lengths) + 1
    score, cost, mask = rand(B, seed=seed), rand(B, A, seed=seed + 1), right_mask(lengths, A)
    out = token_rewards(score, cost, mask)
    for i, n in enumerate(lengths):
        want = [-float(cost[i, t]) + (float(score[i]) if t == n - 1 else 0.) for t in range(n)] + [0.] * (A - n)
        assert_close(out[i], torch.tensor(want, dtype=torch.float64))


def test_token_rewards_with_padding_on_the_left():
    mask = torch.tensor([[False, True, True]])
    assert_close(token_rewards(torch.tensor([5.]), torch.ones(1, 3), mask), torch.tensor([[0., -1., 4.]]))


class TestWhiten:
    x, mask = rand(3, 5, scale=4.) + 7, right_mask([5, 2, 3], 5)

    def test_moments(self):
        y = whiten(self.x, self.mask)
        real = y[self.mask]
        assert abs(real.mean()) < 1e-9 and abs(real.std(correction=0) - 1) < 1e-6 and not y[~self.mask].any()

    def test_keeps_the_mean_on_demand(self):
        y = whiten(self.x, self.mask, shift=False)[self.mask]
        assert_close(y.mean(), self.x[self.mask].mean()), assert_close(y.std(correction=0), torch.tensor(1., dtype=y.dtype), atol=1e-6, rtol=0)

    def test_padding_does_not_count(self):
        assert_close(whiten(torch.where(self.mask, self.x, 1e9), self.mask), whiten(self.x, self.mask))

    def test_no_spread_is_no_catastrophe(self): assert_close(whiten(torch.full((2, 3), 4.), torch.ones(2, 3).bool()), torch.zeros(2, 3))

    def test_over_processes(self):
        "Two processes that hold parts of the rows, and sum over both, whiten as one process would."
        want, real = whiten(self.x, self.mask), self.x[self.mask]
        sums = [torch.tensor(float(len(real))), real.sum(), ((real - real.mean()) ** 2).sum()]
        seen = []
        for rows in (slice(0, 1), slice(1, 3)):
            mine, total = [], iter(sums)
            def reduce(t): mine.append(t); return next(total)
            assert_close(whiten(self.x[rows], self.mask[rows], reduce=reduce), want[rows])
            seen.append(mine)
        for a, b, s in zip(*seen, sums): assert_close(a + b, s, check_dtype=False)


@given(seeds, st.floats(.1, 1))
def test_potential_shaping_telescopes(seed, gamma):
    "The discounted sum of the shaping is -Φ(s_0): it cannot change which answer is best."
    mask, phi = right_mask([5, 2, 1], 5), rand(3, 5, seed=seed)
    f = potential_shaping(phi, mask, gamma)
    assert_close((f * gamma ** torch.arange(5)).sum(1), -phi[:, 0], check_dtype=False), assert_close(f * ~mask, torch.zeros_like(f))


def test_value_head_looks_at_the_picture():
    torch.manual_seed(0)
    head, h, seen, pictures = ValueHead(8, 6, heads=2).double(), rand(3, 4, 8), torch.tensor([True, False, True]), rand(2, 5, 6, seed=1)
    assert not head(h, pictures, seen).any(), "it starts by predicting zero"
    torch.nn.init.normal_(head.out.weight)
    v = head(h, pictures, seen)
    assert v.shape == (3, 4)
    assert_close(v[:1], head(h[:1], pictures[:1], seen[:1])), assert_close(v[2:], head(h[2:], pictures[1:], seen[2:])), assert_close(v[1:2], head(h[1:2], None, seen[1:2]))
    assert ((v - head(h, pictures + rand(2, 5, 6, seed=2), seen)).abs().amax(1) > 1e-6).tolist() == seen.tolist()
    moved = h.clone()
    moved[:, 2] = rand(3, 8, seed=3)
    assert ((v - head(moved, pictures, seen)).abs() > 1e-9).all(0).tolist() == [False, False, True, False], "each token has its own value"


def test_vision_gamma(): assert_close(vision_gamma(torch.tensor([-1., 0., .5, 1., 9.])), torch.tensor([.99, .99, .965, .94, .94]))


# --- losses ---------------------------------------------------------------------------------------------------------

class TestBradleyTerry:
    @given(st.floats(-8, 8), st.floats(-8, 8), st.floats(0, 2), st.floats(0, 1), st.floats(0, 1), st.floats(.1, 3))
    def test_definition(self, w, l, margin, c1, c2, weight):
        want = weight * (-math.log(1 / (1 + math.exp(l - w))) + c1 * max(0., margin - (w - l)) + c2 * (w * w + l * l) / 2)
        t = [torch.tensor([x], dtype=torch.float64) for x in (w, l, weight)]
        assert_close(bt_loss(*t, margin, c1, c2), torch.tensor([want], dtype=torch.float64))

    def test_one_loss_for_each_pair(self):
        c, r = rand(4), rand(4, seed=1)
        assert_close(bt_loss(c, r), torch.stack([bt_loss(c[i:i + 1], r[i:i + 1])[0] for i in range(4)]))

    def test_far_apart(self):
        "log(sigmoid(-1000)) is -inf; the loss and its gradient must stay finite."
        c = torch.tensor([-1000., 1000.], requires_grad=True)
        loss = bt_loss(c, torch.zeros(2))
        loss.sum().backward()
        assert_close(loss, torch.tensor([1000., 0.])), assert_close(c.grad, torch.tensor([-1., 0.]))

    def test_gradient(self):
        c, r, w = rand(5).requires_grad_(), rand(5, seed=1).requires_grad_(), rand(5, seed=2).abs()
        assert gradcheck(lambda a, b: bt_loss(a, b, w, .5, .3, .2), (c, r))


def policy_loss_by_definition(new, old, adv, mask, eps):
    total = 0.
    for n, o, a, m in zip(*(x.flatten().tolist() for x in (new, old, adv, mask))):
        ratio = math.exp(n - o)
        if m: total -= min(ratio * a, min(max(ratio, 1 - eps), 1 + eps) * a)
    return total


class TestPolicyLoss:
    @given(seeds, st.floats(.05, .5))
    def test_definition(self, seed, eps):
        new, old, adv, mask = rand(3, 4, seed=seed), rand(3, 4, seed=seed + 1), rand(3, 4, seed=seed + 2), right_mask([4, 1, 2], 4)
        assert_close(float(ppo_policy_loss(new, old, adv, mask, eps)), policy_loss_by_definition(new, old, adv, mask, eps))

    @pytest.mark.parametrize("move, adv, slope", [(.5, 1., 0.), (-.5, -1., 0.), (.5, -1., 1.), (-.5, 1., 1.), (.01, 1., 1.), (.01, -1., 1.)])
    def test_gradient_stops_only_where_it_would_move_further(self, move, adv, slope):
        new = torch.tensor([[move]], dtype=torch.float64, requires_grad=True)
        ppo_policy_loss(new, torch.zeros(1, 1), torch.tensor([[adv]]), torch.ones(1, 1).bool(), .2).backward()
        assert_close(float(new.grad), -adv * math.exp(move) * slope)

    def test_gradient_by_finite_differences(self):
        old, adv, mask = rand(2, 3, seed=1), rand(2, 3, seed=2), right_mask([3, 1], 3)
        assert gradcheck(lambda x: ppo_policy_loss(x, old, adv, mask), (rand(2, 3).requires_grad_(),))

    def test_only_the_policy_learns(self):
        new, old, adv = (rand(2, 3, seed=i, scale=.1).requires_grad_() for i in range(3))   # near: nothing is clipped
        ppo_policy_loss(new, old, adv, right_mask([3, 1], 3), .9).backward()
        assert old.grad is None and adv.grad is None and new.grad[0].all() and not new.grad[1, 1:].any()


class TestValueLoss:
    @given(seeds, st.floats(.05, 2))
    def test_definition(self, seed, eps):
        v, old, ret, mask = rand(2, 4, seed=seed), rand(2, 4, seed=seed + 1), rand(2, 4, seed=seed + 2, scale=2.), right_mask([4, 2], 4)
        want = 0.
        for a, o, g, m in zip(*(x.flatten().tolist() for x in (v, old, ret, mask))):
            near = min(max(a, o - eps), o + eps)
            want += m * .5 * max((a - g) ** 2, (near - g) ** 2)
        assert_close(float(value_loss(v, old, ret, mask, eps)), want)

    @pytest.mark.parametrize("value, target, slope", [(.5, 1., 0.), (-.5, -1., 0.), (.5, -1., 1.), (-.5, 1., 1.), (.1, 1., 1.), (-.1, -1., 1.)])
    def test_clips_on_both_sides(self, value, target, slope):
        "A value that already moved further than the clip towards its target gets no gradient, upwards and downwards."
        v = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
        value_loss(v, torch.zeros(1, 1), torch.tensor([[target]]), torch.ones(1, 1).bool(), .2).backward()
        assert_close(float(v.grad), (value - target) * slope)

    def test_only_the_critic_learns(self):
        v, old, ret = (rand(2, 3, seed=i).requires_grad_() for i in range(3))
        value_loss(v, old, ret, right_mask([3, 1], 3), 10.).backward()
        assert old.grad is None and ret.grad is None and not v.grad[1, 1:].any()
        assert_close(v.grad[0], (v - ret).detach()[0])


# --- KL -------------------------------------------------------------------------------------------------------------

class TestKL:
    def pair(self, seed, near=1.):
        "Two distributions over five tokens: log-probabilities (1, 5)."
        p = rand(1, 5, seed=seed)
        return p.log_softmax(-1), (p + near * rand(1, 5, seed=seed + 1)).log_softmax(-1)

    def expected(self, kind, p, q): return float((p.exp() * kl_estimate(p, q, kind)).sum())
    def exact(self, p, q): return sum(math.exp(a) * (a - b) for a, b in zip(p[0].tolist(), q[0].tolist()))

    @given(seeds)
    def test_k1_and_k3_are_unbiased(self, seed):
        "The expectation over every token, weighted by the policy, is the divergence itself."
        p, q = self.pair(seed)
        for kind in ("k1", "k3"): assert abs(self.expected(kind, p, q) - self.exact(p, q)) < 1e-9

    @given(seeds)
    def test_k2_and_k3_are_never_negative(self, seed):
        p, q = self.pair(seed)
        assert (kl_estimate(p, q, "k2") >= 0).all() and (kl_estimate(p, q, "k3") >= 0).all()

    def test_k2_is_biased_but_right_to_second_order(self):
        p, q = self.pair(3, near=2.)
        assert abs(self.expected("k2", p, q) / self.exact(p, q) - 1) > .02
        p, q = self.pair(5, near=1e-3)
        assert abs(self.expected("k2", p, q) / self.exact(p, q) - 1) < 1e-2

    def test_values(self):
        new, ref = torch.tensor([[math.log(.5)]]), torch.tensor([[math.log(.25)]])
        for kind, want in (("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", .5 - 1 + math.log(2))):
            assert_close(kl_estimate(new, ref, kind), torch.tensor([[want]]))
        with pytest.raises(ValueError, match="k4"): kl_estimate(new, ref, "k4")

    @given(seeds)
    def test_gradients(self, seed):
        "Of all uses of an estimator only k2 as a loss and k1 as a reward have the gradient of KL[policy‖ref] in expectation (all tokens enumerated)."
        logits, ref = rand(5, seed=seed).requires_grad_(), rand(5, seed=seed + 1)
        def gradient(loss_of):   # samples carry no gradient, so their weights are constants
            logp = logits.log_softmax(-1)
            return torch.autograd.grad((logp.detach().exp() * loss_of(logp)).sum(), logits)[0]
        def as_loss(kind): return gradient(lambda logp: kl_estimate(logp, ref.log_softmax(-1), kind))
        def as_reward(kind): return gradient(lambda logp: kl_estimate(logp, ref.log_softmax(-1), kind).detach() * logp)
        true, other = (torch.autograd.grad(full_kl(logits, ref, way), logits)[0] for way in ("policy||ref", "ref||policy"))
        for right in (as_loss("k2"), as_reward("k1")): assert_close(right, true)
        assert_close(as_loss("k1"), torch.zeros(5, dtype=torch.float64))
        assert_close(as_loss("k3"), other), assert_close(as_reward("k3"), true - other)
        assume(true.norm() > .1 and (true - other).norm() > .1 * true.norm())
        for wrong in (as_loss("k1"), as_loss("k3"), as_reward("k2"), as_reward("k3")): assert (wrong - true).norm() > 1e-3

    @given(seeds)
    def test_full_kl_in_both_directions(self, seed):
        p, q = self.pair(seed)
        forth, back = self.exact(p, q), self.exact(q, p)
        assume(abs(forth - back) > 1e-3)
        logits = p.unsqueeze(1) + 3., q.unsqueeze(1) - 1.   # unnormalised
        assert_close(float(full_kl(*logits)), forth), assert_close(float(full_kl(*logits, "ref||policy")), back)
        assert full_kl(*logits).shape == (1, 1)

    def test_full_kl_is_zero_only_for_equals(self):
        p, q = self.pair(1)
        assert abs(float(full_kl(p, p))) < 1e-12 < float(full_kl(p, q))
        with pytest.raises(ValueError, match="direction"): full_kl(p, q, "new||ref")

    def test_no_cap_hides_the_gradient(self):
        "Far beyond 100 nats the gradient is still there."
        p, q = torch.tensor([[[5., 0.]]], dtype=torch.float64, requires_grad=True), torch.tensor([[[0., 400.]]], dtype=torch.float64)
        kl = full_kl(p, q).sum()
        kl.backward()
        assert kl > 300 and p.grad.abs().max() > 1

    def test_full_kl_gradient(self):
        q = rand(1, 2, 4, seed=1)
        for way in ("policy||ref", "ref||policy"): assert gradcheck(lambda x: full_kl(x, q, way).sum(), (rand(1, 2, 4).requires_grad_(),))

    def test_by_grounding(self):
        kl, mask = torch.tensor([[4., 1., 2., 99.]]), torch.tensor([[True, True, True, False]])
        grounded = torch.tensor([[True, False, False, False]])
        assert kl_by_grounding(kl, grounded, mask) == pytest.approx(dict(grounded=4., prior=1.5, share=4 / 7))


class TestControllers:
    @pytest.mark.parametrize("kl, beta, after", [(9.01, .1, .15), (9., .1, .1), (6., .1, .1), (3., .1, .1), (2.99, .1, .075), (50., 9., 10.), (0., .0011, .001)])
    def test_adaptive(self, kl, beta, after):
        c = AdaptiveController(beta, 6.)
        assert c.update(kl) == pytest.approx(after) and c.beta == pytest.approx(after)

    @pytest.mark.parametrize("kl, after", [(6., .1), (6.6, .1 * 1.01), (5.4, .1 * .99), (600., .1 * 1.02), (0., .1 * .98)])
    def test_proportional(self, kl, after): assert ProportionalController(.1, 6., gain=.1).update(kl) == pytest.approx(after)

    def test_proportional_stays_in_its_bounds(self):
        assert ProportionalController(10., 6.).update(100.) == 10. and ProportionalController(.001, 6.).update(0.) == .001

    @pytest.mark.parametrize("cls", [AdaptiveController, ProportionalController])
    def test_state(self, cls):
        a, b = cls(.1, 6.), cls(.1, 6.)
        for _ in range(3): a.update(100.)
        b.load_state_dict(a.state_dict())
        assert b.beta == a.beta != .1


# --- small tensor functions -----------------------------------------------------------------------------------------

def test_last_real():
    x = torch.arange(12.).view(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]]).bool()
    assert_close(last_real(x, mask), torch.tensor([1., 7., 10.]))
    assert_close(last_real(x.unsqueeze(-1).expand(3, 4, 2), mask), torch.tensor([[1., 1.], [7., 7.], [10., 10.]]))


@pytest.mark.parametrize("pooling", ["last", "mean", "attention"])
@pytest.mark.parametrize("norm", ["layer", "tanh", "none"])
def test_score_head_does_not_see_padding(pooling, norm):
    torch.manual_seed(0)
    head, x, mask = ScoreHead(8, pooling=pooling, norm=norm).double(), rand(2, 5, 8), right_mask([3, 5], 5)
    dirty = torch.where(mask.unsqueeze(-1), x, 1e3)
    assert head(x, mask).shape == (2,)
    assert_close(head(dirty, mask), head(x, mask)), assert_close(head(x[:1, :3], mask[:1, :3]), head(x, mask)[:1])
    token = ScoreHead(8, "token", norm=norm).double()(x, mask)
    assert token.shape == (2, 5)


def test_token_logprobs():
    z, tokens = rand(2, 3, 7, scale=3.), torch.randint(7, (2, 3), generator=torch.Generator().manual_seed(0))
    for T in (1., .5, 2.):
        want = [[math.log(math.exp(z[i, t, tokens[i, t]] / T) / sum(math.exp(v / T) for v in z[i, t].tolist())) for t in range(3)] for i in range(2)]
        assert_close(token_logprobs(z, tokens, T), torch.tensor(want, dtype=torch.float64))
    half = token_logprobs(z.bfloat16(), tokens)
    assert half.dtype == torch.float32


def test_masked_mean():
    assert float(masked_mean(torch.tensor([[1., 9.], [2., 3.]]), torch.tensor([[True, False], [True, True]]))) == 2.
    assert float(masked_mean(torch.ones(1, 2), torch.zeros(1, 2).bool())) == 0.


def test_warmup_cosine():
    f = [warmup_cosine(s, 100, .1) for s in range(100)]
    assert f[:10] == pytest.approx([(s + 1) / 10 for s in range(10)]) and max(f) == 1. and all(a > b for a, b in zip(f[10:], f[11:]))
    assert f[55] == pytest.approx(.5) and 0 < f[-1] < .01 and warmup_cosine(100, 100, .1) == pytest.approx(0.)
    assert 0 < warmup_cosine(0, 1) <= 1


def test_phases():
    cfg = PPOConfig(iterations=20, warmup=.1, finish=.2)
    plan = [phase(s, cfg) for s in range(20)]
    assert [p[0] for p in plan] == ["warm-up"] * 2 + ["main"] * 14 + ["finish"] * 4
    assert {p[1:] for p in plan[:2]} == {(.1, 5.)} and {p[1:] for p in plan[2:16]} == {(1., 1.)}
    assert [p[1] for p in plan[16:]] == pytest.approx([.8, .6, .4, .2])
    assert {phase(0, PPOConfig(iterations=3))[0]} == {"main"}, "too short for phases"


class TestConverged:
    def test_by_definition(self):
        "Welch's statistic of the last fifth against the one before, whatever came earlier."
        before, last = [3., 5., 4., 4.], [1., 3., 2., 3.]
        m = [sum(w) / 4 for w in (before, last)]
        s2 = [sum((x - c) ** 2 for x in w) / 3 for w, c in zip((before, last), m)]
        level, z = converged([99.] * 12 + before + last)
        assert z == pytest.approx((m[0] - m[1]) / math.sqrt((s2[0] + s2[1]) / 4)) and level == (abs(z) < 2)

    @given(st.floats(.1, 10), st.floats(-5, 5), seeds)
    def test_units_do_not_matter(self, scale, shift, seed):
        losses = [random.Random(f"{seed}/{i}").gauss(0, 1) for i in range(40)]
        assert converged([scale * x + shift for x in losses])[1] == pytest.approx(converged(losses)[1], rel=1e-6, abs=1e-9)

    def test_verdicts(self):
        assert not converged([10 * .95 ** i for i in range(50)])[0], "falling"
        assert not converged([float(i) for i in range(50)])[0], "rising is not level"
        assert converged([5.] * 30 + [1.] * 20) == (True, 0.)
        assert converged([2.] * 8 + [1.] * 2) == (False, math.inf)
        with pytest.raises(ValueError, match="at least 10"): converged([1.] * 9)


@pytest.mark.parametrize("progress, layers, want", [(0., 24, 0), (.2999, 24, 0), (.3, 24, 1), (.6999, 24, 1), (.7, 24, 24), (1., 24, 24), (.5, 1, 1)])
def test_unfrozen_layers(progress, layers, want): assert unfrozen_layers(progress, layers) == want


def test_diagnose():
    "Each check turns on what it is about, and on nothing else."
    healthy, ok = rand(400), dict(train_accuracy=.8, accuracy=.75, image_ablated=.55, asked=.9)
    def sick(rewards=healthy, **change): return [k for k, (good, _) in diagnose(rewards, **(ok | change)).items() if not good]
    assert sick() == [] == sick(healthy * 100 + 7)
    assert sick(accuracy=.64) == ["accuracy"] and sick(train_accuracy=.95, accuracy=.69) == ["overfit"] and sick(train_accuracy=.95, accuracy=.71) == []
    assert sick(image_ablated=.72) == ["looks"] and sick(asked=.6) == ["reads"] == sick(text_ablated=.8)
    assert sick(healthy * 1e-3) == ["collapse"] == sick(torch.zeros(400)) and sick(torch.tanh(5 * healthy)) == ["skew"]


# --- reward ---------------------------------------------------------------------------------------------------------

@given(seeds, st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_segment_scores_by_definition(seed, lengths):
    A = max(lengths) + 1
    scores, mask = rand(len(lengths), A, seed=seed), right_mask(lengths, A)
    ends = rand(len(lengths), A, seed=seed + 1) > 0
    got = segment_scores(scores, ends, mask)
    for row, (n, s, e) in enumerate(zip(lengths, scores.tolist(), ends.tolist())):
        want, since = [0.] * A, 0.
        for t in range(n):
            since += s[t]
            if e[t] or t == n - 1: want[t], since = since, 0.
        assert got[row].tolist() == pytest.approx(want)


@given(st.lists(st.sampled_from([.5, .6, .7]), max_size=8), st.integers(1, 4))
def test_early_stop(history, patience):
    "Replayed with a counter: a new best resets it."
    best, waited = -1., 0
    for x in history: best, waited = (x, 0) if x > best else (best, waited + 1)
    assert early_stop(history, patience) == (waited >= patience)


@given(seeds, st.integers(1, 40), st.sampled_from([2, 5, 10]))
def test_reliability_by_definition(seed, n, bins):
    p, seen = rand(n, seed=seed).sigmoid(), rand(n, seed=seed + 1).sigmoid()
    table, error = reliability(p, seen, bins)
    groups = {}
    for a, b in zip(p.tolist(), seen.tolist()): groups.setdefault(int(a * bins), []).append((a, b))
    want = [[sum(a for a, _ in g) / len(g), sum(b for _, b in g) / len(g), len(g)] for _, g in sorted(groups.items())]
    assert table.tolist() == [pytest.approx(row, abs=1e-6) for row in want]
    assert error == pytest.approx(sum(abs(a - b) * k for a, b, k in want) / n, abs=1e-6)


class TestComposites:
    @given(seeds, st.sets(st.sampled_from("cat boat kite fish".split())), st.sets(st.sampled_from("cat boat kite".split()), min_size=1))
    def test_consistency(self, seed, mentioned, detected):
        image, text = rand(5, seed=seed), rand(5, seed=seed + 1)
        got, cosine = consistency(image, text, mentioned, detected), float(image @ text / (image.norm() * text.norm()))
        if mentioned: assert got == pytest.approx(.6 * cosine + .4 * sum(m in detected for m in mentioned) / len(mentioned)) and got >= -.6
        else: assert got == -.6, "silence never wins"
        assert consistency(image, text, set(), set()) == pytest.approx(.6 * cosine + .4)

    @given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
    def test_gate(self, t, v, a):
        one = [torch.tensor([x], dtype=torch.float64) for x in (t, v, a)]
        g = 1 / (1 + math.exp(-(a - .5) / .1))
        assert_close(gated_score(*one), torch.tensor([(.2 + .2 * g) * t + (.2 + .1 * g) * v + (.6 - .3 * g) * a], dtype=torch.float64), rtol=1e-5, atol=1e-6)
        more = one[:2] + [one[2] + .01]
        assert gated_score(*more) > gated_score(*one), "never falls as alignment rises"

    def test_narrow_gates_fall(self):
        a = torch.linspace(0, 1, 200)
        assert gated_score(0 * a, 0 * a, a, .03).diff().min() < 0 < gated_score(0 * a, 0 * a, a, .1).diff().min()

    @pytest.mark.parametrize("known", [(.7, .2, .1), (.1, .1, .8), (1 / 3, 1 / 3, 1 / 3)])
    def test_weights_are_found_again(self, known):
        torch.manual_seed(0)
        a, b, w = torch.rand(6000, 3), torch.rand(6000, 3), torch.tensor(known)
        first = torch.bernoulli((8 * (a - b) @ w).sigmoid()).bool().unsqueeze(1)
        got = composite_weights(torch.where(first, a, b), torch.where(first, b, a))
        assert_close(got, w, rtol=0, atol=.05)
        assert float(got.sum()) == pytest.approx(1) and (got > 0).all()


def test_crossed_pairs():
    a, b = (Prompt("detail", q, ans, "scene:x") for q, ans in (("q1", "one ."), ("q2", "two .")))
    first, second = crossed_pairs(a, b)
    assert (first["prompt"], first["chosen"], first["rejected"]) == ("q1", "one .", "two .") and (second["prompt"], second["chosen"], second["rejected"]) == ("q2", "two .", "one .")
    assert crossed_pairs(a, Prompt("brief", "q3", "one .", None)) == []


def test_swap_pictures():
    rows = [dict(image=i, k=k) for k, i in enumerate(["p", "p", "q", None, "r"])]
    assert [r["image"] for r in swap_pictures(rows)] == ["q", "q", "r", None, "p"] and [r["k"] for r in swap_pictures(rows)] == [0, 1, 2, 3, 4]
    assert rows[0]["image"] == "p"


def test_batch_norm_counts_real_tokens_only():
    torch.manual_seed(0)
    head, x, mask = ScoreHead(8, "token", norm="batch").double(), rand(2, 5, 8), right_mask([3, 5], 5)
    dirty = torch.where(mask.unsqueeze(-1), x, 1e3)
    assert_close(head(x, mask)[mask], head(dirty, mask)[mask])
    assert_close(head.norm.running_mean, sum((1 - .1) ** i * .1 for i in range(2)) * x[mask].mean(0))


# --- preferences ----------------------------------------------------------------------------------------------------

def test_fleiss_kappa_published_example():
    "Fleiss 1971's worked example in the form found in textbooks: 14 raters, 10 items, 5 categories, κ = 0.210."
    counts = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
              [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
    assert fleiss_kappa(counts) == pytest.approx(.210, abs=5e-4)
    assert fleiss_kappa([[3, 0], [0, 3]]) == 1. and fleiss_kappa([[3, 0], [3, 0]]) == 1. and fleiss_kappa([[1, 1], [1, 1]]) == -1.


def test_fleiss_kappa_of_coin_tossers_is_zero():
    rng = random.Random(0)
    rows = [(k := sum(rng.random() < .5 for _ in range(3))) and [k, 3 - k] or [0, 3] for _ in range(4000)]
    assert abs(fleiss_kappa(rows)) < .03


def test_cohen_kappa():
    a, b = ["y"] * 25 + ["n"] * 25, ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(a, b) == pytest.approx(.4) and cohen_kappa(a, a) == 1. and cohen_kappa(["y"], ["y"]) == 1.


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30))
def test_cohen_kappa_with_weights(pairs):
    "Against the matrix form: 1 - Σ w·observed / Σ w·expected."
    a, b = map(list, zip(*pairs))
    seen = np.zeros((4, 4))
    for x, y in pairs: seen[x, y] += 1 / len(pairs)
    chance = np.outer(seen.sum(1), seen.sum(0))
    for name, w in (("quadratic", np.subtract.outer(np.arange(4), np.arange(4)) ** 2), ("none", 1 - np.eye(4))):
        want = 1 - (w * seen).sum() / (w * chance).sum() if (w * chance).sum() > 0 else 1.
        assert cohen_kappa(a, b, name) == pytest.approx(want)


class TestRankingPairs:
    def test_example(self):
        "Mean ranks 0, 1.5, 1.5: the second and third tie, the first beats both equally."
        assert ranking_pairs([[0, 1, 2], [0, 2, 1]]) == [(0, 1, 1.), (0, 2, 1.)]
        assert ranking_pairs([[2, 1, 0]]) == [(1, 0, .75), (2, 0, 1.5), (2, 1, .75)]
        assert ranking_pairs([[0, 1], [1, 0]]) == [] == ranking_pairs([[0]])

    @given(st.lists(st.permutations(range(5)), min_size=1, max_size=4))
    def test_properties(self, rankings):
        pairs, total = ranking_pairs(rankings), [sum(r[i] for r in rankings) for i in range(5)]
        assert {(i, j) for i, j, _ in pairs} == {(i, j) for i, j in itertools.permutations(range(5), 2) if total[i] < total[j]}
        if pairs:
            assert sum(w for *_, w in pairs) / len(pairs) == pytest.approx(1)
            assert len({round(w / (total[j] - total[i]), 6) for i, j, w in pairs}) == 1, "proportional to the gap"

    def test_close_calls_give_no_pair(self):
        rankings = [[0, 1, 2], [0, 2, 1], [1, 0, 2]]   # mean ranks 1/3, 1, 5/3
        assert [(i, j) for i, j, _ in ranking_pairs(rankings, 1.)] == [(0, 2)] and ranking_pairs(rankings, 1.)[0][2] == pytest.approx(1)
        assert [(i, j) for i, j, _ in ranking_pairs(rankings, 2 / 3)] == [(0, 1), (0, 2), (1, 2)], "a gap of just this size counts"
        assert ranking_pairs(rankings, 1.5) == []

    def test_votes(self): assert pairwise_votes([[0, 1, 2], [0, 2, 1], [1, 0, 2]]) == [[2, 1], [3, 0], [2, 1]]


words = st.lists(st.sampled_from("a red cat on the boat .".split()), max_size=7).map(" ".join)


class TestDedupe:
    @given(words, words)
    def test_similarity(self, a, b):
        assert similarity(a, b) == similarity(b, a) and 0 <= similarity(a, b) <= 1 and (similarity(a, b) == 1 or a != b) and similarity(a, a) == 1

    def test_similarity_example(self):
        "<a, ab, b> against <a, ac, c>: one shared pair of three and three."
        assert similarity("a b", "a c") == pytest.approx(2 / 6) and similarity("yes .", "no .") < .9 and similarity("yes", "no") == 0

    @given(st.lists(words, max_size=8), st.floats(0, 1))
    def test_dedupe(self, answers, most):
        kept = dedupe(answers, most)
        assert kept == sorted(kept) and kept[:1] == [0][:len(answers)]
        for i, j in itertools.combinations(kept, 2): assert similarity(answers[i], answers[j]) <= most
        for i in set(range(len(answers))) - set(kept): assert any(similarity(answers[i], answers[k]) > most for k in kept if k < i)


    @given(st.lists(words, max_size=6), st.integers(0, 7))
    def test_most_diverse(self, answers, k):
        "Each step takes an answer that no other would beat in distance to its nearest chosen neighbour."
        kept = most_diverse(answers, k)
        assert len(kept) == len(set(kept)) == min(k, len(answers)) and kept[:1] == [0][:len(kept)]
        def near(i, chosen): return max(similarity(answers[i], answers[j]) for j in chosen)
        for n in range(1, len(kept)):
            assert near(kept[n], kept[:n]) == min(near(i, kept[:n]) for i in range(len(answers)) if i not in kept[:n])


def test_annotators():
    scores = [3., 9., 5., 1.]
    assert annotate(scores, 0., random.Random(0)) == [2, 0, 1, 3]
    noisy = [annotate(scores, 3., random.Random(i)) for i in range(300)]
    assert all(sorted(r) == [0, 1, 2, 3] for r in noisy) and len({tuple(r) for r in noisy}) > 5
    assert .6 < sum(r[1] < r[0] for r in noisy) / 300 < 1.


def test_balance():
    rows = [dict(kind=k, i=i) for i, k in enumerate("a" * 100 + "b" * 40 + "c" * 2)]
    out = balance(rows, most=2, least=10)
    assert [sum(r["kind"] == k for r in out) for k in "abc"] == [20, 20, 2] and [r["i"] for r in out] == sorted(r["i"] for r in out)
    assert balance([]) == []


@pytest.mark.parametrize("change, fault", [({}, None), (dict(chosen=" "), "empty"), (dict(rejected=""), "empty"), (dict(rejected="a  cat ."), "equals"), (dict(chosen="a cat"), "cut off"), (dict(weight=0), "weight")])
def test_doctor(change, fault):
    found = doctor(dict(chosen="a cat .", rejected="a dog .", weight=1.) | change)
    assert found is None if fault is None else fault in found


def test_true_score_prefers_the_truth():
    prompt = Prompt("detail", "describe the picture .", describe(SCENE), f"scene:{SCENE}")
    best, faulty, empty = (true_score(prompt, t) for t in (describe(SCENE), FAULTY, ""))
    assert best == pytest.approx(10) and 0 <= empty < faulty < best
    yes = Prompt("exists", "is there a cat ?", "yes .", f"scene:{SCENE}")
    assert true_score(yes, "yes .") == pytest.approx(10) and true_score(yes, "no .") < 5


class TestTieBreak:
    ask = Prompt("detail", "describe the picture .", describe(SCENE), f"scene:{SCENE}")
    ranked = [("a small red cat on a large blue boat .", "a small red cat ."),             # both right: more facts
              (describe(SCENE).replace("red", "green"), FAULTY),                            # both wrong: fewer errors
              ("a cat .", describe(SCENE).replace("red", "green")),                         # right beats wrong
              (FAULTY, ""), ("a cat .", "nothing .")]                                       # claiming nothing is wrong

    @pytest.mark.parametrize("better, worse", ranked)
    def test_rules(self, better, worse): assert tie_break(self.ask, better, worse) == 1 and tie_break(self.ask, worse, better) == -1

    def test_undecided(self):
        "As many errors in both, however much else they say."
        one, short = describe(SCENE).replace("red", "green"), "a green cat ."
        assert tie_break(self.ask, one, short) == 0 == tie_break(self.ask, "", "") == tie_break(self.ask, "a cat .", "a boat .")

    def test_questions(self):
        p = Prompt("exists", "is there a cat ?", "yes .", f"scene:{SCENE}")
        assert [tie_break(p, *x) for x in (("yes .", "no ."), ("no .", "yes ."), ("yes .", "yes ."), ("no .", "maybe ."))] == [1, -1, 0, 0]


@given(st.lists(st.tuples(words, words), max_size=12))
def test_length_bias(pairs):
    got = length_bias([dict(chosen=a, rejected=b) for a, b in pairs])
    unequal = [(len(a.split()), len(b.split())) for a, b in pairs if len(a.split()) != len(b.split())]
    n, wins = len(unequal), sum(a > b for a, b in unequal)
    assert got["longer"] == pytest.approx(wins / n if n else .5)
    assert got["z"] == pytest.approx((wins - n / 2) / math.sqrt(n / 4) if n else 0.)
    if pairs: assert got["chosen"] == pytest.approx(sum(len(a.split()) for a, _ in pairs) / len(pairs))


class TestUnsafeClaims:
    @given(seeds, st.sampled_from([((0, 0, 1, 1), range(9)), ((0, 0, 1, 2 / 3), range(6)), ((1 / 3, 1 / 3, 1, 1), (4, 5, 7, 8)), ((.05, .05, .95, .95), (4,)), ((.5, .5, .6, .6), ())]))
    def test_crops_against_the_judge(self, seed, crop):
        "Whatever the judge calls false in the cropped scene, or true there and false before, has been named."
        box, cells = crop
        scene = sample_scene(random.Random(seed))
        left = type(scene)(scene.place, tuple(g for g in scene.groups if g.cell in cells))
        text = describe(imagine(scene, random.Random(seed + 1)))
        before, after, named = judge(text, scene), judge(text, left), unsafe_claims(text, scene, "crop", box)
        changed = [n for n in after.false_objects if n not in before.false_objects]
        assert set(changed) <= set(named) and ("count" in named or before.count_right == after.count_right)
        assert set(before.true_attributes) - set(after.true_attributes) <= {(n, k, v) for n, k, v in before.true_attributes if f"{v} {n}" in named}

    @pytest.mark.parametrize("text, how, want", [
        ("a cat on a boat .", "vflip", ["cat on boat"]), ("a cat behind a boat .", "vflip", []), ("a kite above a cat .", "vflip", ["above"]),
        ("a cat on a boat .", "hflip", []), ("a cat left of a kite .", "hflip", ["left"]), ("a kite at the top right .", "crop", ["top", "right"])])
    def test_words_and_relations(self, text, how, want): assert unsafe_claims(text, SCENE, how, (0., 1 / 3, 1., 1.)) == want

    def test_a_crop_zooms(self):
        "Nothing is lost, and yet sizes may change; the whole picture changes nothing."
        assert unsafe_claims("a small red cat .", SCENE, "crop", (0., .2, 1., 1.)) == ["small cat"]
        assert unsafe_claims(describe(SCENE), SCENE, "crop") == []
        with pytest.raises(ValueError, match="hflip"): unsafe_claims("", SCENE, "rotate")


# --- hallucination and world ----------------------------------------------------------------------------------------

class TestPenalty:
    v = judge(FAULTY, SCENE)   # one false object, one false colour, two of three things named

    def test_example(self):
        assert [k for k, _ in hallucinations(self.v)] == ["existence", "colour"]
        assert penalty(self.v) == pytest.approx(.5 * (-2 - 1 + 4 * 2 / 3))
        assert penalty(self.v, PenaltyConfig(weight=1., coverage=0., count_power=1.2)) == pytest.approx(-3)
        assert penalty(self.v, PenaltyConfig(ramp=100), step=50) == pytest.approx(.5 * (1.5 * -3 + 4 * 2 / 3))

    def test_more_than_the_sum(self):
        three = judge("a fish and a lamp and a star .", SCENE)
        cfg = PenaltyConfig(weight=1., coverage=0., count_power=1.2)
        assert penalty(three, cfg) == pytest.approx(-2 * 3 ** 1.2)

    def test_relations_count(self):
        wrong = judge("a cat behind a boat .", SCENE)
        assert penalty(wrong) == pytest.approx(.5 * (-.5 + 4 * 2 / 3))

    def test_count_and_place_cost_what_they_are_given(self):
        wrong = judge("in this night scene there is a small red cat . there are six things .", SCENE)
        assert wrong.count_right is False and wrong.place_right is False
        flat = PenaltyConfig(weight=1., coverage=0.)
        assert penalty(wrong, flat) == 0
        assert penalty(wrong, replace(flat, count=-1.5)) == -1.5 and penalty(wrong, replace(flat, place=-.5)) == -.5
        unsaid = judge("a small red cat .", SCENE)
        assert penalty(unsaid, replace(flat, count=-9., place=-9.)) == 0

    def test_the_scheduled_table(self):
        s = SCHEDULED
        assert (s.object, s.count, s.attribute, s.relation, s.place, s.count_power, s.ramp) == (-2., -1.5, -1., -.8, -.5, 1.2, 10_000) and s.coverage > 0
        three = judge("in this night scene there is a fish and a lamp and a star . there are six things .", SCENE)
        assert penalty(three, s) == pytest.approx(-2 * 3 ** 1.2 - 1.5 - .5) and penalty(three, s, 5_000) == pytest.approx(1.5 * penalty(three, s))

    def test_silence_does_not_win(self):
        truth, silence, faulty = (penalty(judge(t, SCENE)) for t in (describe(SCENE), "", FAULTY))
        assert truth > faulty and truth > silence == 0.

    def test_severity(self): assert [severity(s, 10) for s in (0, 5, 10, 99)] == [1., 1.5, 2., 2.] and severity(99, 0) == 1.


class TestPope:
    scenes = sample_scenes(60, seed="pope")

    @pytest.mark.parametrize("kind", ["random", "popular", "adversarial"])
    def test_questions(self, kind):
        questions = pope_questions(self.scenes, kind)
        assert len(questions) == 2 * len(self.scenes) and sum(q.answer == "yes ." for q in questions) == len(self.scenes)
        freq = {n: sum(s.find(n) is not None for s in self.scenes) for n in NOUNS}
        for q, s in zip(questions, [s for s in self.scenes for _ in "yn"]):
            noun = q.text.split()[-2]
            assert q.scene == s and (q.answer == "yes .") == (s.find(noun) is not None) and q.text == f"is there a {noun} ?"
            if q.answer == "yes .": continue
            absent = [n for n in NOUNS if not s.find(n)]
            if kind == "popular": assert sum(freq[n] > freq[noun] for n in absent) < 3
            if kind == "adversarial" and (home := set(absent) & set(PLACES[s.place])): assert noun in home
        assert questions == pope_questions(self.scenes, kind) != pope_questions(self.scenes, kind, seed=1)

    def test_kinds_differ(self):
        said = {k: [q.text for q in pope_questions(self.scenes, k)] for k in ("random", "popular", "adversarial")}
        assert len({n for t in said["popular"][1::2] for n in [t.split()[-2]]}) < len({n for t in said["random"][1::2] for n in [t.split()[-2]]})


def test_overall_rate(): assert overall_rate(dict(chair_i=.2, attribute_error=.5, relation_error=1.)) == pytest.approx(.1 + .15 + .2)


@given(seeds)
def test_the_truth_is_judged_true(seed):
    scene = sample_scene(random.Random(seed))
    assert parse_scene(str(scene)) == scene
    v = judge(describe(scene), scene)
    assert not hallucinations(v) and v.recall == 1 and v.count_right and v.place_right and not v.missed
    assert len(v.true_attributes) == 2 * len(scene.things) and len(v.true_relations) == sum(g.other is not None for g in scene.groups)


@given(seeds)
def test_what_is_imagined_is_judged_by_comparison_of_scenes(seed):
    "The errors found in the text are the differences between the two scenes."
    rng = random.Random(seed)
    scene = sample_scene(rng)
    believed = imagine(scene, rng)
    v, true, said = judge(describe(believed), scene), {t.noun: t for t in scene.things}, {t.noun: t for t in believed.things}
    assert set(v.false_objects) == said.keys() - true.keys() and set(v.missed) == true.keys() - said.keys()
    both = said.keys() & true.keys()
    assert len(v.false_attributes) == sum((said[n].colour != true[n].colour) + (said[n].size != true[n].size) for n in both)
    assert v.count_right is (len(said) == len(true))


@given(seeds, st.sampled_from(KINDS))
def test_careful_and_careless_answers(seed, kind):
    "A careful answer gets the full score; a careless one answers the same question, and text-only prompts stay as they are."
    rng = random.Random(seed)
    p = make_prompt(sample_scene(rng), kind, rng)
    assert true_score(p, p.answer) == pytest.approx(10)
    c = careless(p, rng)
    assert (c.text, c.kind, c.image) == (p.text, p.kind, p.image) and c.answer.endswith(" .")
    assert (p.image is None) == (p.kind == "text") and (p.image is not None or c == p)


@given(st.text(max_size=60))
def test_any_text_can_be_judged(text):
    v = judge(text, SCENE)
    assert 0 <= v.recall <= 1 and v.length == len(text.split())


@pytest.mark.parametrize("text, field, want", [
    ("a boat on a cat .", "false_relations", (("boat", "on", "cat"),)),
    ("a cat on a boat .", "true_relations", (("cat", "on", "boat"),)),
    ("a cat and a kite and a cat .", "false_objects", ("cat",)),
    ("a red fish on a boat .", "false_attributes", ()),
    ("a red fish on a boat .", "false_relations", ()),
    ("a large green boat .", "false_attributes", (("boat", "colour", "green"),)),
    ("there are four things .", "count_right", False), ("in this room scene", "place_right", False), ("a cat .", "count_right", None)])
def test_judge(text, field, want):
    "`on` has a direction, naming a thing twice claims a second one, what is said about absent things is not judged again."
    assert getattr(judge(text, SCENE), field) == want


def test_beside_has_no_direction():
    scene = parse_scene("room: small red cat beside large blue cup @0; small red ball @4")
    for text in ("a cat beside a cup .", "a cup beside a cat ."): assert not judge(text, scene).false_relations and judge(text, scene).true_relations
    assert judge("a cat beside a ball .", scene).false_relations


def test_summary_of_the_example():
    s = summarise([judge(FAULTY, SCENE), judge(describe(SCENE), SCENE)])
    assert s["chair_i"] == pytest.approx(1 / 6) and s["chair_s"] == .5 and s["recall"] == pytest.approx(5 / 6)
    assert s["attribute_error"] == pytest.approx(1 / 10) and s["relation_error"] == 0 and summarise([])["recall"] == 0


def test_splits():
    for split in ("train", "validation", "test", "novel"):
        scenes = sample_scenes(25, split, 4)
        assert len({str(s) for s in scenes}) == 25 and {split_of(s) for s in scenes} == {split} and scenes == sample_scenes(25, split, 4)
        assert any(RESERVED[t.noun] == t.colour for s in scenes for t in s.things) == (split == "novel")


# --- batches --------------------------------------------------------------------------------------------------------

@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 6))
def test_length_groups(lengths, size):
    groups = length_groups(torch.tensor(lengths), size)
    assert sorted(torch.cat(groups).tolist()) == list(range(len(lengths))) and max(map(len, groups)) <= size and len(groups) == math.ceil(len(lengths) / size)
    in_order = [lengths[i] for g in groups for i in g.tolist()]
    assert in_order == sorted(lengths)
    plain = list(torch.arange(len(lengths)).split(size))
    assert 0 <= padding_share(torch.tensor(lengths), groups) <= padding_share(torch.tensor(lengths), plain) + 1e-12 < 1


def test_padding_share():
    assert padding_share(torch.tensor([2, 4, 4]), [torch.tensor([0, 1]), torch.tensor([2])]) == pytest.approx(2 / 12)


class TestPlan:
    pool = [Prompt("detail", "q", "", f"img{i % 8}") for i in range(24)] + [Prompt("text", f"t{i}", "") for i in range(3)]

    def plan(self, n, share=0., seed=0, pool=None): return plan_prompts(pool or self.pool, n, random.Random(seed), share)

    @given(st.integers(0, 8), st.floats(0, 1), seeds)
    def test_no_picture_twice_and_the_share_of_text(self, n, share, seed):
        out = self.plan(n, share, seed)
        images = [p.image for p in out if p.image]
        assert len(out) == n and len(set(images)) == len(images) == n - round(n * share)

    def test_too_few_pictures(self):
        with pytest.raises(ValueError, match="9 different pictures wanted, 8 there"): self.plan(9)

    def test_no_text_there(self): assert len([p for p in self.plan(4, .5, pool=self.pool[:24]) if p.image]) == 4

    def test_repeats_with_its_seed(self):
        assert self.plan(6, .3) == self.plan(6, .3) != self.plan(6, .3, seed=1)
        assert len({p.image for s in range(40) for p in self.plan(2, seed=s)}) == 8
