"Losses against their definitions and finite differences: Bradley–Terry, policy, value."

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import rand, right_mask, seeds
from torch.autograd import gradcheck
from torch.testing import assert_close

from vlmrlhf_course.rl.ppo import PPOConfig, ppo_policy_loss, value_loss
from vlmrlhf_course.train.reward import bt_loss


class TestBradleyTerry:
    @given(
        st.floats(-8, 8),
        st.floats(-8, 8),
        st.floats(0, 2),
        st.floats(0, 1),
        st.floats(0, 1),
        st.floats(0.1, 3),
    )
    def test_definition(self, w, l, margin, c1, c2, weight):
        likelihood = -math.log(1 / (1 + math.exp(l - w)))
        hinge = max(0.0, margin - (w - l))
        want = weight * (likelihood + c1 * hinge + c2 * (w * w + l * l) / 2)
        t = [torch.tensor([x], dtype=torch.float64) for x in (w, l, weight)]
        assert_close(bt_loss(*t, margin, c1, c2), torch.tensor([want], dtype=torch.float64))

    def test_one_loss_for_each_pair(self):
        c, r = rand(4), rand(4, seed=1)
        alone = [bt_loss(c[i : i + 1], r[i : i + 1])[0] for i in range(4)]
        assert_close(bt_loss(c, r), torch.stack(alone))

    def test_far_apart(self):
        "log(sigmoid(-1000)) is -inf; the loss and its gradient must stay finite."
        c = torch.tensor([-1000.0, 1000.0], requires_grad=True)
        loss = bt_loss(c, torch.zeros(2))
        loss.sum().backward()
        assert_close(loss, torch.tensor([1000.0, 0.0]))
        assert_close(c.grad, torch.tensor([-1.0, 0.0]))

    def test_gradient(self):
        c = rand(5).requires_grad_()
        r = rand(5, seed=1).requires_grad_()
        w = rand(5, seed=2).abs()
        assert gradcheck(lambda a, b: bt_loss(a, b, w, 0.5, 0.3, 0.2), (c, r))


def policy_loss_by_definition(new, old, adv, mask, eps):
    total = 0.0
    for n, o, a, m in zip(*(x.flatten().tolist() for x in (new, old, adv, mask))):
        ratio = math.exp(n - o)
        if m:
            total -= min(ratio * a, min(max(ratio, 1 - eps), 1 + eps) * a)
    return total


class TestPolicyLoss:
    @given(seeds, st.floats(0.05, 0.5))
    def test_definition(self, seed, eps):
        new = rand(3, 4, seed=seed)
        old = rand(3, 4, seed=seed + 1)
        adv = rand(3, 4, seed=seed + 2)
        mask = right_mask([4, 1, 2], 4)
        assert_close(
            float(ppo_policy_loss(new, old, adv, mask, eps)),
            policy_loss_by_definition(new, old, adv, mask, eps),
        )

    @pytest.mark.parametrize(
        "move, adv, slope",
        [
            (0.5, 1.0, 0.0),
            (-0.5, -1.0, 0.0),
            (0.5, -1.0, 1.0),
            (-0.5, 1.0, 1.0),
            (0.01, 1.0, 1.0),
            (0.01, -1.0, 1.0),
        ],
    )
    def test_gradient_stops_only_where_it_would_move_further(self, move, adv, slope):
        new = torch.tensor([[move]], dtype=torch.float64, requires_grad=True)
        old, mask = torch.zeros(1, 1), torch.ones(1, 1).bool()
        ppo_policy_loss(new, old, torch.tensor([[adv]]), mask, 0.2).backward()
        assert_close(float(new.grad), -adv * math.exp(move) * slope)

    def test_gradient_by_finite_differences(self):
        old, adv, mask = rand(2, 3, seed=1), rand(2, 3, seed=2), right_mask([3, 1], 3)
        new = rand(2, 3).requires_grad_()
        assert gradcheck(lambda x: ppo_policy_loss(x, old, adv, mask), (new,))

    def test_only_the_policy_learns(self):
        # near each other, so that nothing is clipped
        new, old, adv = (rand(2, 3, seed=i, scale=0.1).requires_grad_() for i in range(3))
        ppo_policy_loss(new, old, adv, right_mask([3, 1], 3), 0.9).backward()
        assert old.grad is None
        assert adv.grad is None
        assert new.grad[0].all()
        assert not new.grad[1, 1:].any()


class TestValueLoss:
    @given(seeds, st.floats(0.05, 2))
    def test_definition(self, seed, eps):
        v = rand(2, 4, seed=seed)
        old = rand(2, 4, seed=seed + 1)
        ret = rand(2, 4, seed=seed + 2, scale=2.0)
        mask = right_mask([4, 2], 4)
        want = 0.0
        for a, o, g, m in zip(*(x.flatten().tolist() for x in (v, old, ret, mask))):
            near = min(max(a, o - eps), o + eps)
            want += m * 0.5 * max((a - g) ** 2, (near - g) ** 2)
        assert_close(float(value_loss(v, old, ret, mask, eps)), want)

    @pytest.mark.parametrize(
        "value, target, slope",
        [
            (0.5, 1.0, 0.0),
            (-0.5, -1.0, 0.0),
            (0.5, -1.0, 1.0),
            (-0.5, 1.0, 1.0),
            (0.1, 1.0, 1.0),
            (-0.1, -1.0, 1.0),
        ],
    )
    def test_clips_on_both_sides(self, value, target, slope):
        """A value that already moved further than the clip towards
        its target gets no gradient, upwards and downwards."""
        v = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
        old, mask = torch.zeros(1, 1), torch.ones(1, 1).bool()
        value_loss(v, old, torch.tensor([[target]]), mask, 0.2).backward()
        assert_close(float(v.grad), (value - target) * slope)

    @given(seeds)
    def test_without_a_clip_it_is_the_squared_error(self, seed):
        "However far the critic has moved: the default."
        v, old, ret = (rand(2, 4, seed=seed + i, scale=5.0) for i in range(3))
        mask = right_mask([4, 2], 4)
        want = float(0.5 * ((v - ret) ** 2)[mask].sum())
        assert_close(float(value_loss(v, old, ret, mask)), want)
        assert_close(float(value_loss(v, old, ret, mask, 0.0)), want)
        assert PPOConfig().value_clip == 0.0

    def test_only_the_critic_learns(self):
        v, old, ret = (rand(2, 3, seed=i).requires_grad_() for i in range(3))
        value_loss(v, old, ret, right_mask([3, 1], 3), 10.0).backward()
        assert old.grad is None and ret.grad is None and not v.grad[1, 1:].any()
        assert_close(v.grad[0], (v - ret).detach()[0])


@pytest.mark.parametrize("there", [0.0, 3.0, -1e30, 1e30, torch.inf])
def test_policy_loss_looks_at_no_padding(there):
    "Infinity times a mask of 0 would be NaN; value and gradient are those without padding."
    mask = right_mask([1, 3], 3)
    now, old, adv = (torch.randn(2, 3, dtype=torch.float64) for _ in range(3))
    results = []
    for at_padding in (0.0, there):
        new = now.masked_fill(~mask, 0.0).requires_grad_()
        loss = ppo_policy_loss(new, old.masked_fill(~mask, -at_padding), adv, mask, 0.2)
        loss.backward()
        results.append((loss.detach(), new.grad))
    (loss, grad), (other, other_grad) = results
    assert torch.equal(loss, other) and torch.equal(grad, other_grad)
