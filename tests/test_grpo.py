"""GRPO and RLOO, the formulas: advantages and losses against loops by hand, gradients against sums
over every sample of a tiny policy."""

import itertools
import math
from functools import partial

import pytest
import torch
from small_models import mask, rand, slope
from torch.testing import assert_close

from vlmrlhf_course.rl.grpo import (
    LENGTHS,
    GRPOConfig,
    RLOOConfig,
    group_advantages,
    grpo_loss,
    per_length,
    rloo_advantages,
    rloo_loss,
)

# --- advantages -----------------------------------------------------------------------------------


def test_group_advantages_by_hand():
    scores = [3.0, 1.0, 1.0, -1.0, 0.5, 0.0, 2.0, 0.1]
    want = []
    for group in (scores[:4], scores[4:]):
        mean = sum(group) / 4
        deviation = math.sqrt(sum((s - mean) ** 2 for s in group) / 3)
        want += [(s - mean) / (deviation + 1e-4) for s in group]
    x = torch.tensor(scores, dtype=torch.float64)
    assert_close(group_advantages(x, 4), torch.tensor(want, dtype=torch.float64))
    centred = [s - 1.0 for s in scores[:4]] + [s - 0.65 for s in scores[4:]]
    want = torch.tensor(centred, dtype=torch.float64)
    assert_close(group_advantages(x, 4, scale=False), want)


def test_group_advantages_where_all_scores_are_alike():
    found = group_advantages(torch.full((6,), 2.5), 3)
    assert torch.equal(found, torch.zeros(6))


def test_rloo_advantages_by_hand():
    scores = [3.0, 1.0, 1.0, -1.0, 0.5, 0.0, 2.0, 0.1]
    want = []
    for group in (scores[:4], scores[4:]):
        for i, s in enumerate(group):
            others = group[:i] + group[i + 1 :]
            want.append(s - sum(others) / 3)
    found = rloo_advantages(torch.tensor(scores, dtype=torch.float64), 4)
    assert_close(found, torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("way", [group_advantages, rloo_advantages])
def test_advantages_of_groups_sum_to_zero_and_ignore_a_constant(way):
    x = rand(12, seed=1)
    assert_close(way(x, 4).view(3, 4).sum(1), torch.zeros(3, dtype=torch.float64))
    assert_close(way(x + 5, 4), way(x, 4))
    assert_close(way(x, 4)[4:8], way(x[4:8], 4))  # groups know nothing of each other


# --- by enumeration: every group that a tiny policy can draw --------------------------------------

LOGITS = torch.tensor([-0.5, 0.3, 0.0, 0.2], dtype=torch.float64)
WORTH = torch.tensor([10.0, 1.0, 0.0, -1.0], dtype=torch.float64)


def true_gradient():
    logits = LOGITS.clone().requires_grad_()
    return slope((logits.softmax(0) * WORTH).sum(), logits)


def expected_step(loss_of, k):
    "The expected gradient of −loss over all groups of k answers, weighted by their probabilities."
    logits, total = LOGITS.clone().requires_grad_(), torch.zeros(4, dtype=torch.float64)
    for drawn in itertools.product(range(4), repeat=k):
        index = torch.tensor(drawn)
        logp = logits.log_softmax(0)[index]
        total -= logp.sum().exp().detach() * slope(loss_of(logp, WORTH[index], k) / k, logits)
    return total


def through_rloo(logp, worth, k):
    real = torch.ones(k, 1, dtype=torch.bool)
    advantages = rloo_advantages(worth, k).unsqueeze(1)
    return rloo_loss(logp.unsqueeze(1), logp.detach().unsqueeze(1), advantages, real)


def through_grpo(logp, worth, k, scale):
    real = torch.ones(k, 1, dtype=torch.bool)
    advantages = group_advantages(worth, k, scale).unsqueeze(1)
    old = logp.detach().unsqueeze(1)
    return grpo_loss(logp.unsqueeze(1), old, old, advantages, real)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_rloo_is_unbiased(k):
    assert_close(expected_step(through_rloo, k), true_gradient())


@pytest.mark.parametrize("k", [2, 3, 4])
def test_grpo_without_scale_is_shorter_by_one_kth(k):
    found = expected_step(partial(through_grpo, scale=False), k)
    assert_close(found, true_gradient() * (k - 1) / k)


def test_grpo_with_scale_points_elsewhere():
    found, true = expected_step(partial(through_grpo, scale=True), 2), true_gradient()
    cosine = float(found @ true / (found.norm() * true.norm()))
    assert 0.5 < cosine < 0.8
    assert found[1] > 0 > true[1], "an answer below the average that wins often is raised"


def test_k3_in_the_loss_has_the_gradient_of_the_other_direction():
    "Through `grpo_loss` itself, with advantages of 0: what is left is the leash."
    ref = rand(4, seed=5).log_softmax(0)
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(0)
    column, none = logp.unsqueeze(1), torch.zeros(4, 1, dtype=torch.float64)
    real = torch.ones(4, 1, dtype=torch.bool)
    found = torch.zeros(4, dtype=torch.float64)
    for i, chance in enumerate(logp.detach().exp()):
        row = slice(i, i + 1)
        parts = (column[row], column.detach()[row], ref.unsqueeze(1)[row], none[row], real[row])
        loss = grpo_loss(*parts, beta=0.7)
        found += chance * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    backward = (ref.exp() * (ref - logits.log_softmax(0))).sum()
    assert_close(found, 0.7 * slope(backward, logits))


# --- losses ---------------------------------------------------------------------------------------


def loop_grpo(new, old, ref, adv, real, clip, beta, length, most):
    "The loss of the paper, with loops and floats."
    total = 0.0
    for row, n in enumerate(real.sum(1).tolist()):
        losses = []
        for t in range(n):
            ratio = math.exp(float(new[row, t] - old[row, t]))
            near = min(max(ratio, 1 - clip), 1 + clip)
            a = float(adv[row, t])
            log_r = float(ref[row, t] - new[row, t])
            k3 = math.exp(log_r) - 1 - log_r
            losses.append(-min(ratio * a, near * a) + beta * k3)
        divisor = dict(answer=n, tokens=1, constant=most)[length]
        total += sum(losses) / divisor
    return total


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_grpo_loss_by_hand(length, beta):
    new, old, ref = (rand(4, 6, seed=s, scale=0.5) for s in (1, 2, 3))
    adv = rand(4, 1, seed=4).expand(4, 6)
    found = grpo_loss(new, old, ref, adv, mask(), 0.2, beta, length, 9)
    want = loop_grpo(new, old, ref, adv, mask(), 0.2, beta, length, 9)
    assert float(found) == pytest.approx(want, rel=1e-12)


def test_rloo_loss_by_hand():
    new, old = rand(4, 6, seed=1, scale=0.2), rand(4, 6, seed=2, scale=0.2)
    adv, want = rand(4, 1, seed=4), 0.0
    for row, n in enumerate(mask().sum(1).tolist()):
        ratio = math.exp(float((new - old)[row, :n].sum()))
        near = min(max(ratio, 0.8), 1.2)
        want -= min(ratio * float(adv[row]), near * float(adv[row]))
    found = rloo_loss(new, old, adv.expand(4, 6), mask())
    assert float(found) == pytest.approx(want, rel=1e-12)


def test_per_length_of_an_empty_answer():
    "No token, no loss, and no division by zero."
    losses, nothing = rand(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    for length in LENGTHS:
        assert torch.equal(per_length(losses, nothing, length, 9), torch.zeros(2).double())


@pytest.mark.parametrize("length", LENGTHS)
def test_grpo_gradient(length):
    "Finite differences, away from the kinks of the clip."
    old, ref, adv = rand(4, 6, seed=2), rand(4, 6, seed=3), rand(4, 1, seed=4).expand(4, 6)
    new = (old + rand(4, 6, seed=5, scale=0.05)).requires_grad_()
    loss = partial(grpo_loss, mask=mask(), beta=0.3, length=length, most=9)
    assert torch.autograd.gradcheck(lambda x: loss(x, old, ref, adv), new)
    push = slope(loss(new, old, ref, adv), new)
    assert not push[~mask()].any() and push[mask()].all()


def test_rloo_gradient():
    old, adv = rand(4, 6, seed=2), rand(4, 1, seed=4).expand(4, 6)
    new = (old + rand(4, 6, seed=5, scale=0.02)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rloo_loss(x, old, adv, mask()), new)
    push = slope(rloo_loss(new, old, adv, mask()), new)
    assert not push[~mask()].any()
    assert_close(push[0], push[0, :1].expand(6))  # each token of an answer alike


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize("loss_of", ["grpo", "rloo"])
def test_the_clip_is_pessimistic(good, loss_of):
    "Beyond ε there is no slope in the direction of gain; back there always is."
    one, real = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    adv = one + (1.0 if good else -1.0)
    for ratio, moves in ((1.5, not good), (0.5, good), (1.1, True), (0.9, True)):
        new = torch.full((1, 1), math.log(ratio), dtype=torch.float64).requires_grad_()
        if loss_of == "grpo":
            loss = grpo_loss(new, one, one, adv, real)
        else:
            loss = rloo_loss(new, one, adv, real)
        assert bool(slope(loss, new).any()) == moves, ratio


def test_only_the_policy_learns():
    new, old, ref, adv = (rand(4, 6, seed=s).requires_grad_() for s in (1, 2, 3, 4))
    grpo_loss(new, old, ref, adv, mask(), beta=0.3).backward()
    rloo_loss(new, old, adv, mask()).backward()
    assert new.grad.any() and old.grad is None and ref.grad is None and adv.grad is None


@pytest.mark.parametrize("garbage", [-1e38, 1e38, float("inf"), float("-inf"), float("nan")])
def test_what_stands_at_padding_changes_nothing(garbage):
    "Neither the losses nor their gradients: 0 · ∞ is no number."
    real, adv = mask(), rand(4, 1, seed=4).expand(4, 6)
    found = []
    for filler in (0.0, garbage):
        parts = [rand(4, 6, seed=s).masked_fill(~real, filler) for s in (1, 2, 3)]
        new, old, ref = parts[0].requires_grad_(), parts[1], parts[2]
        losses = [grpo_loss(new, old, ref, adv, real, beta=0.3, length=x) for x in LENGTHS]
        losses.append(rloo_loss(new, old, adv, real))
        found.append((torch.stack(losses), [slope(loss, new) for loss in losses]))
    assert_close(found[0], found[1], rtol=0, atol=0)
    assert found[1][0].isfinite().all()


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig])
def test_one_answer_is_no_group(config):
    with pytest.raises(ValueError, match="answers_per_prompt=1.*two or more"):
        config(answers_per_prompt=1)
    assert config().answers_per_prompt == 4


@pytest.mark.parametrize("wrong", [dict(length="token"), dict(kl="k3"), dict(answers=10)])
def test_settings_that_cannot_work(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GRPOConfig(**wrong)
