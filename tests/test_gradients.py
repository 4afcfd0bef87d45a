"Gradients of the KL estimators and of PPO, exactly: every token, every answer is enumerated."

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import rand, seeds
from torch.testing import assert_close

from vlmrlhf_course.rl.advantages import gae, potential_shaping, token_rewards
from vlmrlhf_course.rl.kl import full_kl, kl_estimate
from vlmrlhf_course.rl.ppo import ppo_policy_loss


def gradient(y, x):
    return torch.autograd.grad(y, x, retain_graph=True)[0]


class TestKLGradients:
    """Every token of a small vocabulary is enumerated. Tokens are
    sampled, so no gradient flows through their probabilities."""

    def setting(self, seed, V=5):
        "Logits that learn, log-probabilities (V,) of the policy and of the reference."
        theta = rand(V, seed=seed).requires_grad_()
        return theta, theta.log_softmax(0), rand(V, seed=seed + 1).log_softmax(0)

    def as_loss(self, kind, theta, p, q):
        "Expected gradient where the estimate is added to the loss."
        return gradient((p.exp().detach() * kl_estimate(p, q, kind)).sum(), theta)

    def as_cost(self, kind, theta, p, q):
        """Expected gradient where the estimate is a cost of the
        sampled token, which only moves the token's probability."""
        return gradient((p.exp().detach() * kl_estimate(p, q, kind).detach() * p).sum(), theta)

    def exact(self, theta, p, q):
        return gradient((p.exp() * (p - q)).sum(), theta)  # of KL[p||q]

    @given(seeds)
    def test_k2_as_a_loss_has_the_gradient_of_the_divergence(self, seed):
        assert_close(self.as_loss("k2", *self.setting(seed)), self.exact(*self.setting(seed)))

    @given(seeds)
    def test_k1_as_a_loss_pulls_nowhere(self, seed):
        """Unbiased in value, useless as a loss: E[∇ log π] = 0,
        whatever the reference; one sample does push, as noise."""
        theta, p, q = self.setting(seed)
        assert self.as_loss("k1", theta, p, q).abs().max() < 1e-12
        assert gradient(kl_estimate(p, q, "k1")[0], theta).abs().max() > 1e-3

    @given(seeds)
    def test_k3_as_a_loss_pulls_in_the_other_direction(self, seed):
        theta, p, q = self.setting(seed)
        assert_close(self.as_loss("k3", theta, p, q), gradient((q.exp() * (q - p)).sum(), theta))

    @given(seeds)
    def test_k1_as_a_cost_has_the_gradient_of_the_divergence(self, seed):
        "This is how PPO uses it: inside the reward."
        assert_close(self.as_cost("k1", *self.setting(seed)), self.exact(*self.setting(seed)))

    def test_the_others_are_really_other(self):
        """Where k2 and k3 are costs, and where k3 is a
        loss, the gradient is not that of the divergence."""
        want = self.exact(*self.setting(3))
        for got in (
            self.as_cost("k2", *self.setting(3)),
            self.as_cost("k3", *self.setting(3)),
            self.as_loss("k3", *self.setting(3)),
        ):
            assert (got - want).abs().max() > 0.05

    @given(seeds)
    def test_full_kl_in_both_directions(self, seed):
        theta, p, q = self.setting(seed)
        z, ref = theta.view(1, 1, -1), q.view(1, 1, -1) + 2.0
        assert_close(gradient(full_kl(z, ref).sum(), theta), self.exact(theta, p, q))
        back = gradient(full_kl(z, ref, "ref||policy").sum(), theta)
        assert_close(back, gradient((q.exp() * (q - p)).sum(), theta))


class TestPolicyGradient:
    """Every answer of at most two tokens over {a, b, EOS}: costs,
    advantages and loss together give the gradient of E[score] - β·KL."""

    # EOS (2) ends; what follows is padding
    answers = torch.tensor([[2, 2], *itertools.product((0, 1), (0, 1, 2))])
    mask = torch.tensor([[True, False]] + [[True, True]] * 6)
    # 0: nothing said yet, 1: `a` said, 2: `b` said
    state = torch.tensor([[0, 0]] + [[0, 1 + a] for a, _ in answers[1:].tolist()])

    def setting(self, seed):
        """Logits that learn, scores, log-probabilities of tokens;
        for each answer its probability and log-ratio."""

        def said(z):
            return z.log_softmax(1)[self.state].gather(2, self.answers.unsqueeze(2)).squeeze(2)

        theta, score = rand(3, 3, seed=seed).requires_grad_(), rand(7, seed=seed + 2)
        lp, ref = said(theta), said(rand(3, 3, seed=seed + 1))
        prob = (lp * self.mask).sum(1).exp()
        log_ratio = ((lp - ref) * self.mask).sum(1)
        return theta, score, lp, ref, prob, log_ratio

    def by_ppo(self, theta, score, lp, ref, prob, beta, value, lam=1.0, potential=None):
        """Expected gradient of the library's loss, at the
        moment when the policy is the one that sampled."""
        rewards = token_rewards(score, beta * kl_estimate(lp, ref, "k1"), self.mask).detach()
        if potential is not None:
            rewards = rewards + potential_shaping(potential, self.mask)
        advantages, _ = gae(rewards, value, self.mask, 1.0, lam)
        rows = [slice(i, i + 1) for i in range(7)]
        losses = [ppo_policy_loss(lp[i], lp[i].detach(), advantages[i], self.mask[i]) for i in rows]
        return gradient((prob.detach() * torch.stack(losses)).sum(), theta)

    @given(seeds, st.floats(0, 2))
    def test_any_baseline_and_any_potential(self, seed, beta):
        "A critic, right or wrong, and shaping by a potential change the variance only (λ = 1)."
        theta, score, lp, ref, prob, log_ratio = self.setting(seed)
        assert_close(float(prob.detach().sum()), 1.0)
        want = -gradient((prob * score).sum() - beta * (prob * log_ratio).sum(), theta)
        value, potential = rand(3, seed=seed + 3)[self.state], rand(3, seed=seed + 4)[self.state]
        plain = self.by_ppo(theta, score, lp, ref, prob, beta, value)
        shaped = self.by_ppo(theta, score, lp, ref, prob, beta, value, potential=potential)
        assert_close(plain, want)
        assert_close(shaped, want)

    @given(seeds, st.floats(0, 2), st.floats(0, 1))
    def test_a_perfect_critic_allows_any_lambda(self, seed, beta, lam):
        theta, score, lp, ref, prob, log_ratio = self.setting(seed)
        gain = score - beta * log_ratio
        first, later = (prob * gain).sum(), []
        for s in (1, 2):  # value after the first token: what is still to come
            rows = self.state[:, 1] == s
            to_come = score - beta * ((lp - ref) * self.mask)[:, 1]
            later.append((prob * to_come)[rows].sum() / prob[rows].sum())
        value = torch.stack([first, *later]).detach()[self.state]
        got = self.by_ppo(theta, score, lp, ref, prob, beta, value, lam)
        assert_close(got, -gradient((prob * gain).sum(), theta))
