"KL estimators, the full divergence, and the controllers that hold β."

import math

import pytest
import torch
from hypothesis import assume, given
from small_models import rand, seeds
from torch.autograd import gradcheck
from torch.testing import assert_close

from vlmrlhf_course.rl.kl import (
    AdaptiveController,
    ProportionalController,
    full_kl,
    kl_by_grounding,
    kl_estimate,
)


class TestKL:
    def pair(self, seed, near=1.0):
        "Two distributions over five tokens: log-probabilities (1, 5)."
        p = rand(1, 5, seed=seed)
        return p.log_softmax(-1), (p + near * rand(1, 5, seed=seed + 1)).log_softmax(-1)

    def expected(self, kind, p, q):
        return float((p.exp() * kl_estimate(p, q, kind)).sum())

    def exact(self, p, q):
        return sum(math.exp(a) * (a - b) for a, b in zip(p[0].tolist(), q[0].tolist()))

    @given(seeds)
    def test_k1_and_k3_are_unbiased(self, seed):
        "The expectation over every token, weighted by the policy, is the divergence itself."
        p, q = self.pair(seed)
        for kind in ("k1", "k3"):
            assert abs(self.expected(kind, p, q) - self.exact(p, q)) < 1e-9

    @given(seeds)
    def test_k2_and_k3_are_never_negative(self, seed):
        p, q = self.pair(seed)
        assert (kl_estimate(p, q, "k2") >= 0).all() and (kl_estimate(p, q, "k3") >= 0).all()

    def test_k2_is_biased_but_right_to_second_order(self):
        p, q = self.pair(3, near=2.0)
        assert abs(self.expected("k2", p, q) / self.exact(p, q) - 1) > 0.02
        p, q = self.pair(5, near=1e-3)
        assert abs(self.expected("k2", p, q) / self.exact(p, q) - 1) < 1e-2

    def test_values(self):
        new, ref = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
        log2 = math.log(2)
        for kind, want in (("k1", log2), ("k2", log2**2 / 2), ("k3", 0.5 - 1 + log2)):
            assert_close(kl_estimate(new, ref, kind), torch.tensor([[want]]))
        with pytest.raises(ValueError, match="k4"):
            kl_estimate(new, ref, "k4")

    @given(seeds)
    def test_gradients(self, seed):
        """Of all uses of an estimator only k2 as a loss and k1 as a reward have the gradient of
        KL[policy‖ref] in expectation (all tokens enumerated)."""
        logits, ref = rand(5, seed=seed).requires_grad_(), rand(5, seed=seed + 1)
        ref_logp = ref.log_softmax(-1)

        def gradient(loss_of):  # samples carry no gradient, so their weights are constants
            logp = logits.log_softmax(-1)
            return torch.autograd.grad((logp.detach().exp() * loss_of(logp)).sum(), logits)[0]

        def as_loss(kind):
            return gradient(lambda logp: kl_estimate(logp, ref_logp, kind))

        def as_reward(kind):
            return gradient(lambda logp: kl_estimate(logp, ref_logp, kind).detach() * logp)

        true, other = (
            torch.autograd.grad(full_kl(logits, ref, way), logits)[0]
            for way in ("policy||ref", "ref||policy")
        )
        for right in (as_loss("k2"), as_reward("k1")):
            assert_close(right, true)
        assert_close(as_loss("k1"), torch.zeros(5, dtype=torch.float64))
        assert_close(as_loss("k3"), other)
        assert_close(as_reward("k3"), true - other)
        assume(true.norm() > 0.1 and (true - other).norm() > 0.1 * true.norm())
        for wrong in (as_loss("k1"), as_loss("k3"), as_reward("k2"), as_reward("k3")):
            assert (wrong - true).norm() > 1e-3

    @given(seeds)
    def test_full_kl_in_both_directions(self, seed):
        p, q = self.pair(seed)
        forth, back = self.exact(p, q), self.exact(q, p)
        assume(abs(forth - back) > 1e-3)
        logits = p.unsqueeze(1) + 3.0, q.unsqueeze(1) - 1.0  # unnormalised
        assert_close(float(full_kl(*logits)), forth)
        assert_close(float(full_kl(*logits, "ref||policy")), back)
        assert full_kl(*logits).shape == (1, 1)

    def test_full_kl_is_zero_only_for_equals(self):
        p, q = self.pair(1)
        assert abs(float(full_kl(p, p))) < 1e-12 < float(full_kl(p, q))
        with pytest.raises(ValueError, match="direction"):
            full_kl(p, q, "new||ref")

    def test_no_cap_hides_the_gradient(self):
        "Far beyond 100 nats the gradient is still there."
        p = torch.tensor([[[5.0, 0.0]]], dtype=torch.float64, requires_grad=True)
        q = torch.tensor([[[0.0, 400.0]]], dtype=torch.float64)
        kl = full_kl(p, q).sum()
        kl.backward()
        assert kl > 300 and p.grad.abs().max() > 1

    def test_full_kl_gradient(self):
        q = rand(1, 2, 4, seed=1)
        for way in ("policy||ref", "ref||policy"):
            assert gradcheck(lambda x: full_kl(x, q, way).sum(), (rand(1, 2, 4).requires_grad_(),))

    def test_by_grounding(self):
        kl = torch.tensor([[4.0, 1.0, 2.0, 99.0]])
        mask = torch.tensor([[True, True, True, False]])
        grounded = torch.tensor([[True, False, False, False]])
        want = dict(grounded=4.0, prior=1.5, share=4 / 7)
        assert kl_by_grounding(kl, grounded, mask) == pytest.approx(want)


class TestControllers:
    @pytest.mark.parametrize(
        "kl, beta, after",
        [
            (9.01, 0.1, 0.15),
            (9.0, 0.1, 0.1),
            (6.0, 0.1, 0.1),
            (3.0, 0.1, 0.1),
            (2.99, 0.1, 0.075),
            (50.0, 9.0, 10.0),
            (0.0, 0.0011, 0.001),
        ],
    )
    def test_adaptive(self, kl, beta, after):
        c = AdaptiveController(beta, 6.0)
        assert c.update(kl) == pytest.approx(after) and c.beta == pytest.approx(after)

    @pytest.mark.parametrize(
        "kl, after",
        [(6.0, 0.1), (6.6, 0.1 * 1.01), (5.4, 0.1 * 0.99), (600.0, 0.1 * 1.02), (0.0, 0.1 * 0.98)],
    )
    def test_proportional(self, kl, after):
        assert ProportionalController(0.1, 6.0, gain=0.1).update(kl) == pytest.approx(after)

    def test_proportional_stays_in_its_bounds(self):
        assert ProportionalController(10.0, 6.0).update(100.0) == 10.0
        assert ProportionalController(0.001, 6.0).update(0.0) == 0.001

    @pytest.mark.parametrize("cls", [AdaptiveController, ProportionalController])
    def test_no_leash_stays_none(self, cls):
        "β = 0, as Dr. GRPO has it, is not raised to the lower limit."
        c = cls(0.0, 6.0)
        assert [c.update(kl) for kl in (0.0, 6.0, 1e9)] == [0.0, 0.0, 0.0]
        assert cls(1e-9, 6.0).update(0.0) == 0.001

    @pytest.mark.parametrize("cls", [AdaptiveController, ProportionalController])
    def test_state(self, cls):
        a, b = cls(0.1, 6.0), cls(0.1, 6.0)
        for _ in range(3):
            a.update(100.0)
        b.load_state_dict(a.state_dict())
        assert b.beta == a.beta != 0.1
