"Heads, token scores, early stopping and checks of a reward model, as formulas."

import math
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import rand, right_mask, seeds
from torch import nn
from torch.testing import assert_close

from vlmrlhf_course.train.checks import diagnose, segment_scores
from vlmrlhf_course.train.dpo import DPOConfig, train_dpo
from vlmrlhf_course.train.fit import EarlyStopping, FitConfig, early_stop, in_epochs
from vlmrlhf_course.train.parts import composite_weights, consistency, gated_score
from vlmrlhf_course.train.reward import (
    RewardConfig,
    ScoreHead,
    last_real,
    swap_pictures,
    train_reward,
)


def test_last_real():
    x = torch.arange(12.0).view(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]]).bool()
    assert_close(last_real(x, mask), torch.tensor([1.0, 7.0, 10.0]))
    twice = last_real(x.unsqueeze(-1).expand(3, 4, 2), mask)
    assert_close(twice, torch.tensor([[1.0, 1.0], [7.0, 7.0], [10.0, 10.0]]))


@pytest.mark.parametrize("pooling", ["last", "mean", "attention"])
@pytest.mark.parametrize("norm", ["layer", "tanh", "none"])
def test_score_head_does_not_see_padding(pooling, norm):
    torch.manual_seed(0)
    head = ScoreHead(8, pooling=pooling, norm=norm).double()
    x = rand(2, 5, 8)
    mask = right_mask([3, 5], 5)
    dirty = torch.where(mask.unsqueeze(-1), x, 1e3)
    assert head(x, mask).shape == (2,)
    assert_close(head(dirty, mask), head(x, mask))
    assert_close(head(x[:1, :3], mask[:1, :3]), head(x, mask)[:1])
    token = ScoreHead(4, "token", norm=norm).double()(x, mask)
    assert token.shape == (2, 5)


def test_diagnose():
    "Each check turns on what it is about, and on nothing else."
    healthy = rand(400)
    good_figures = dict(train_accuracy=0.8, accuracy=0.75, image_ablated=0.55, asked=0.9)

    def sick(rewards=healthy, **change):
        checks = diagnose(rewards, **(good_figures | change))
        return [name for name, (good, _) in checks.items() if not good]

    assert sick() == [] == sick(healthy * 100 + 7)
    assert sick(accuracy=0.64) == ["accuracy"]
    assert sick(train_accuracy=0.95, accuracy=0.69) == ["overfit"]
    assert sick(train_accuracy=0.95, accuracy=0.71) == []
    assert sick(image_ablated=0.72) == ["looks"]
    assert sick(image_ablated=None, asked=None) == []
    assert sick(asked=0.6) == ["reads"] == sick(text_ablated=0.8)
    assert sick(healthy * 1e-3) == ["collapse"] == sick(torch.zeros(400))
    assert sick(torch.tanh(5 * healthy)) == ["skew"]


@given(seeds, st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_segment_scores_by_definition(seed, lengths):
    A = max(lengths) + 1
    scores, mask = rand(len(lengths), A, seed=seed), right_mask(lengths, A)
    ends = rand(len(lengths), A, seed=seed + 1) > 0
    got = segment_scores(scores, ends, mask)
    for row, (n, s, e) in enumerate(zip(lengths, scores.tolist(), ends.tolist())):
        want, since = [0.0] * A, 0.0
        for t in range(n):
            since += s[t]
            if e[t] or t == n - 1:
                want[t], since = since, 0.0
        assert got[row].tolist() == pytest.approx(want)


@given(st.lists(st.sampled_from([0.5, 0.6, 0.7]), max_size=8), st.integers(1, 4))
def test_early_stop(history, patience):
    "Replayed with a counter: a new best resets it."
    best, waited = -1.0, 0
    for x in history:
        best, waited = (x, 0) if x > best else (best, waited + 1)
    assert early_stop(history, patience) == (waited >= patience)


def test_early_stopping_keeps_the_weights_of_the_best_look():
    "It looks without dropout, trains on with it, and keeps the first best: for any model."
    model, found, modes = nn.Linear(1, 1), iter([0.5, 0.9, 0.6, 0.9, 0.8]), []

    def look():
        modes.append(model.training)
        return next(found)

    watch = EarlyStopping(model, model.state_dict, look, every=2, patience=3)
    stopped = []
    for step in range(1, 11):
        with torch.no_grad():
            model.weight.fill_(step)
        stopped.append(watch(step))
        assert model.training
    assert stopped == [False] * 9 + [True]
    assert watch.history == [0.5, 0.9, 0.6, 0.9, 0.8] and not any(modes)
    assert float(watch.best["weight"]) == 4.0, "the weights of the second look"


class TestComposites:
    @given(
        seeds,
        st.sets(st.sampled_from("cat boat kite fish".split())),
        st.sets(st.sampled_from("cat boat kite".split()), min_size=1),
    )
    def test_consistency(self, seed, mentioned, detected):
        image, text = rand(5, seed=seed), rand(5, seed=seed + 1)
        got = consistency(image, text, mentioned, detected)
        cosine = float(image @ text / (image.norm() * text.norm()))
        if mentioned:
            found = sum(m in detected for m in mentioned) / len(mentioned)
            assert got == pytest.approx(0.6 * cosine + 0.4 * found)
            assert got >= -0.6
        else:
            assert got == -0.6, "silence never wins"
        assert consistency(image, text, set(), set()) == pytest.approx(0.6 * cosine + 0.4)

    @given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
    def test_gate(self, t, v, a):
        one = [torch.tensor([x], dtype=torch.float64) for x in (t, v, a)]
        g = 1 / (1 + math.exp(-(a - 0.5) / 0.1))
        want = (0.2 + 0.2 * g) * t + (0.2 + 0.1 * g) * v + (0.6 - 0.3 * g) * a
        assert_close(
            gated_score(*one), torch.tensor([want], dtype=torch.float64), rtol=1e-5, atol=1e-6
        )
        more = one[:2] + [one[2] + 0.01]
        assert gated_score(*more) > gated_score(*one), "never falls as alignment rises"

    def test_narrow_gates_fall(self):
        a = torch.linspace(0, 1, 200)
        narrow, wide = (gated_score(0 * a, 0 * a, a, width) for width in (0.03, 0.1))
        assert narrow.diff().min() < 0 < wide.diff().min()

    @pytest.mark.parametrize("known", [(0.7, 0.2, 0.1), (0.1, 0.1, 0.8), (1 / 3, 1 / 3, 1 / 3)])
    def test_weights_are_found_again(self, known):
        torch.manual_seed(0)
        a, b, w = torch.rand(6000, 3), torch.rand(6000, 3), torch.tensor(known)
        first = torch.bernoulli((8 * (a - b) @ w).sigmoid()).bool().unsqueeze(1)
        got = composite_weights(torch.where(first, a, b), torch.where(first, b, a))
        assert_close(got, w, rtol=0, atol=0.05)
        assert float(got.sum()) == pytest.approx(1) and (got > 0).all()


def test_swap_pictures():
    rows = [dict(image=i, k=k) for k, i in enumerate(["p", "p", "q", None, "r"])]
    assert [r["image"] for r in swap_pictures(rows)] == ["q", "q", "r", None, "p"]
    assert [r["k"] for r in swap_pictures(rows)] == [0, 1, 2, 3, 4]
    assert rows[0]["image"] == "p"


def test_batch_norm_counts_real_tokens_only():
    torch.manual_seed(0)
    head = ScoreHead(4, "token", norm="batch").double()
    x = rand(2, 5, 8)
    mask = right_mask([3, 5], 5)
    dirty = torch.where(mask.unsqueeze(-1), x, 1e3)
    assert_close(head(x, mask)[mask], head(dirty, mask)[mask])
    weight = sum((1 - 0.1) ** i * 0.1 for i in range(2))  # of a moving average, after two batches
    assert_close(head.norm.running_mean, weight * x[mask].mean(0))


def test_a_batch_is_as_large_as_it_says():
    "Also where it holds several epochs: 12 from 4 groups are each of them three times."
    items_at = in_epochs(list(range(4)), 12, "reward/0")
    for step in range(3):
        assert sorted(items_at(step)) == sorted([*range(4)] * 3)
    across = in_epochs(list(range(4)), 3, "reward/0")
    assert [i for step in range(4) for i in across(step)] == items_at(0)


@pytest.mark.parametrize("trainer, config", [(train_reward, RewardConfig), (train_dpo, DPOConfig)])
def test_both_trainers_take_their_batches_there(trainer, config, monkeypatch, tmp_path):
    taken = []
    module = sys.modules[trainer.__module__]
    monkeypatch.setattr(module, "fit", lambda task, items_at, *a, **k: taken.append(items_at(1)))
    monkeypatch.setattr("vlmrlhf_course.train.reward.fix_scale", lambda rm, pairs: None)
    rows = [dict(image=None, prompt=str(i), chosen="a .", rejected="b .") for i in range(4)]
    trainer(mock.MagicMock(), rows, config(fit=FitConfig(batch=12)), tmp_path)
    assert len(taken[0]) == 12


@pytest.mark.parametrize("trainer, config", [(train_reward, RewardConfig), (train_dpo, DPOConfig)])
@pytest.mark.parametrize("epochs, size, steps", [(1, 1, 3), (3, 1, 9), (3, 2, 4), (0.1, 2, 1)])
def test_both_take_as_many_steps_as_their_epochs_have(
    trainer, config, epochs, size, steps, monkeypatch, tmp_path
):
    "Of prompts, not of pairs: a prompt's pairs are one item."
    taken = []
    module = sys.modules[trainer.__module__]
    monkeypatch.setattr(module, "fit", lambda task, items, how, *a, **k: taken.append(how.steps))
    monkeypatch.setattr("vlmrlhf_course.train.reward.fix_scale", lambda rm, pairs: None)
    rows = [dict(image=None, prompt=str(i // 2), chosen="a .", rejected="b .") for i in range(6)]
    cfg = config(fit=FitConfig(batch=size), epochs=epochs)
    rm = mock.MagicMock()
    rm.cfg = cfg
    trainer(rm, rows, cfg, tmp_path)
    assert taken == [steps]


def test_a_score_head_starts_small():
    "Its output weights have a deviation of a tenth over the root of the width."
    torch.manual_seed(0)
    weights = torch.cat([ScoreHead(64, "token").out.weight.flatten() for _ in range(40)])
    width = ScoreHead(64, "token").out.in_features
    assert float(weights.detach().std() * width**0.5) == pytest.approx(0.1, rel=0.05)
