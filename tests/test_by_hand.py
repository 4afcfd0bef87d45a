"By hand: what a step of learning is made of, put together again from its definition and compared."
import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SCENE
from test_model import SMALL_LORA, close, push
from test_properties import cast, experience, rand, rescaled, roll  # noqa: F401 (cast and roll are fixtures)
from torch import nn
from torch.testing import assert_close

from vlmrlhf_course.rl.kl import grounded_mask
from vlmrlhf_course.rl.ppo import PPOConfig, PPOState, PPOTask, answer_scores, minibatches, shares, validate
from vlmrlhf_course.data.preferences import ranking_pairs
from vlmrlhf_course.train.reward import RewardTask, ScoreHead, group_pairs, score_texts
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.base.runs import UserError
from vlmrlhf_course.train.sft import FitConfig, SFTTask, fit
from vlmrlhf_course.model.vlm import answer, token_logprobs
from vlmrlhf_course.world.scenes import judge, summarise


def reference(cast, roll):
    with torch.no_grad(): return token_logprobs(cast.vlm.rule_out(cast.vlm.answer_logits(roll.batch)), roll.batch.answers, roll.temperature)


def test_token_scores_are_paid_once_and_scaled_like_the_reward(cast, roll):
    "λ = 1: a return is the score, less the token scores already paid, less the KL still to be charged."
    rm, mask = rescaled(cast.rm, 2., 3.), roll.batch.answer_mask
    exp, _ = experience(cast, roll, rm, reward="rm", lam=1., no_eos=-200.)
    score = torch.where(roll.ended, rm(roll.batch), -200.)
    paid = (rm.token_scores(roll.batch) / 3. if rm.cfg.kind == "token" else torch.zeros_like(roll.logprobs)).cumsum(1)
    cost = .1 * (roll.logprobs - reference(cast, roll)) * mask
    want = score.unsqueeze(1) - torch.cat([torch.zeros(6, 1), paid[:, :-1]], 1) - cost.flip(1).cumsum(1).flip(1)
    close(exp.returns[mask], want[mask])


def test_one_temperature_for_sampling_reference_and_ratio(cast):
    hot = sample(cast.vlm, cast.prompts, "actor", .6, max_new_tokens=6, seed=5)
    exp, info = experience(cast, hot)
    log_r = (reference(cast, hot) - hot.logprobs) * hot.batch.answer_mask
    assert info["kl"] == pytest.approx(float((log_r.exp() - 1 - log_r).sum(1).mean()))
    task = PPOTask(cast.policy, PPOConfig(critic=cast.policy.kind, lora=SMALL_LORA, temperature=.6))
    _, metrics = task(task.collate([(exp, i) for i in range(6)]))
    assert metrics["clipped"] == 0
    assert metrics["policy_loss"] == pytest.approx(float(-exp.advantages[hot.batch.answer_mask].mean()), abs=1e-6)


def test_ppo_loss_by_hand(cast, roll):
    "Each of its two parts with its own clip, the values of each state, and the coefficient."
    exp, mask = experience(cast, roll)[0], roll.batch.answer_mask
    exp = replace(exp, logprobs=exp.logprobs + .3 * rand(*mask.shape, seed=1), values=exp.values + rand(*mask.shape, seed=2))
    task = PPOTask(cast.policy, PPOConfig(critic=cast.policy.kind, lora=SMALL_LORA, clip=.1, value_clip=.4, value_coef=.7))
    got, _ = task(task.collate([(exp, i) for i in range(6)]))
    with torch.no_grad(): new, v, _ = cast.policy(roll.batch, exp.states)
    ratio, near = (new - exp.logprobs).exp(), exp.values + (v[:, :-1] - exp.values).clamp(-.4, .4)
    pg = -torch.minimum(ratio * exp.advantages, ratio.clamp(.9, 1.1) * exp.advantages)
    vf = .5 * torch.maximum((v[:, :-1] - exp.returns) ** 2, (near - exp.returns) ** 2)
    close(got.detach(), ((pg + .7 * vf) * mask).sum())


def test_validation_is_the_score_less_the_cost_of_kl(cast):
    cfg = PPOConfig(reward="rm", lora=SMALL_LORA, max_new_tokens=6)
    free, dear = (validate(cast.policy, cast.rm, cast.prompts, cfg, beta) for beta in (0., 2.))
    roll = sample(cast.vlm, cast.prompts, "actor", max_new_tokens=6, seed=1)
    log_r = (reference(cast, roll) - roll.logprobs) * roll.batch.answer_mask
    assert free == pytest.approx(float(answer_scores(cast.rm, roll, cfg)[0].mean()))
    assert free - dear == pytest.approx(2 * float((log_r.exp() - 1 - log_r).sum(1).mean())) and free > dear


def test_minibatches_are_random_and_sorted_inside():
    "Every row once an epoch, each process its share of a minibatch, like lengths side by side; another order in another epoch and step."
    lengths, cfg = torch.tensor([5, 9, 1, 7, 3, 8, 2, 6]), PPOConfig(minibatch=4, epochs=3)
    found = list(minibatches(lengths, cfg, "0/0"))
    assert [len(g) for g in found] == [4] * 6 and [len(g) for g in minibatches(lengths, cfg, "0/0", world=2)] == [2] * 12
    for epoch in range(3): assert sorted(found[2 * epoch] + found[2 * epoch + 1]) == list(range(8))
    assert all(lengths[g].tolist() == sorted(lengths[g].tolist()) for g in found)
    assert len({frozenset(g) for g in found[::2]}) > 1 and found == list(minibatches(lengths, cfg, "0/0")) != list(minibatches(lengths, cfg, "0/1"))
    assert any(max(lengths[g]) - min(lengths[g]) > 4 for g in found), "sorted over the whole batch: updates would see one kind of answer each"
    with pytest.raises(UserError, match="minibatch=4.*answers_per_prompt, 3 × 1"): shares(cfg, SimpleNamespace(process_index=0, num_processes=3))


def test_emergency_and_controller():
    "Rolls back to the newest good weights; the learning rate falls, β rises, up to 10; the controller rests on demand."
    net, cfg = nn.Linear(2, 1), PPOConfig(beta=4., kl_target=6., kl_emergency=10.)
    state = PPOState(net, cfg)
    def move():
        with torch.no_grad(): net.weight.add_(1.)
        return net.weight.detach().clone()
    good = move()
    assert not state.after(1., cfg, control=False) and state.control.beta == 4.
    assert not state.after(1., cfg) and state.control.beta == 3.
    for lr, beta in ((.1, 9.), (.01, 10.)):
        move()
        assert state.after(10.1, cfg) and torch.equal(net.weight, good)
        assert (state.lr_scale, state.control.beta) == (pytest.approx(lr), pytest.approx(beta))


@pytest.mark.parametrize("pooling", ["last", "mean", "attention"])
def test_pooling_by_definition(pooling):
    torch.manual_seed(0)
    head, x, mask = ScoreHead(8, pooling=pooling).double(), rand(2, 5, 8), torch.arange(5) < torch.tensor([[3], [5]])
    for row, m, got in zip(x, mask, head.pool(x, mask)):
        real = row[m]
        if pooling == "last": want = real[-1]
        elif pooling == "mean": want = real.mean(0)
        else: want = (head.attend(real).softmax(0) * real).sum(0)
        close(got, want)


def test_reward_task_by_hand(cast):
    "The sum over pairs of -log σ(gap), margin and pull; the chosen answer is the one that is to win."
    def score(p, text): return float(score_texts(cast.rm, [p], [text]))
    rows, want = [], 0.
    for p, w in zip([p for p in cast.prompts if p.image], (.5, 1., 1.5)):
        rows.append(dict(image=p.image, prompt=p.text, chosen=p.answer, rejected="a cat .", weight=w))
        c, r = score(p, p.answer), score(p, "a cat .")
        want += w * (math.log1p(math.exp(r - c)) + .1 * max(0., .5 - (c - r)) + .01 * (c * c + r * r) / 2)
    task = RewardTask(cast.rm)
    loss, metrics = task(task.collate(group_pairs(rows)))
    assert float(loss) == pytest.approx(want, rel=1e-6)


def test_grounded_tokens_are_answer_tokens(cast):
    "Padding after an answer sees the picture, too, but nobody says it."
    blank = cast.vlm.batch(cast.prompts, [p.answer for p in cast.prompts], images=["blank"] * 6)
    got = grounded_mask(cast.vlm, cast.full, blank, threshold=-1.)
    assert torch.equal(got, cast.full.answer_mask) and not got.all()


def test_neither_placeholder_nor_padding_is_ever_sampled(vlm, prompts):
    "Named here one by one: a list that lost an entry must not decide what it forbids."
    banned = [vlm.tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "<pad>", "<unk>")]
    push(vlm, banned, 40.)
    said = sample(vlm, prompts, max_new_tokens=4, seed=0).batch
    assert not torch.isin(said.answers[said.answer_mask], torch.tensor(banned)).any()
    for text in answer(vlm, prompts, max_new_tokens=4): assert len(vlm.tokenizer(text).input_ids) == 4, "decoding drops special tokens"


def test_a_gap_of_just_the_limit_gives_a_pair():
    assert ranking_pairs([[0, 1]], min_gap=1.) == [(0, 1, 1.)] and ranking_pairs([[0, 1]], min_gap=1.01) == []
    thirds = [[0, 1], [0, 1], [1, 0]]   # mean ranks 1/3 and 2/3, which floats do not hold exactly
    assert ranking_pairs(thirds, min_gap=1 / 3) == [(0, 1, 1.)]


@pytest.mark.parametrize("text", ["a boat on a fish .", "a fish on a boat .", "a fish behind a lamp ."])
def test_relations_with_absent_things_are_not_judged_again(text):
    v = judge(text, SCENE)
    assert v.false_objects and not v.false_relations and not v.true_relations


def test_chair_s_counts_answers_not_objects():
    s = summarise([judge("a fish and a lamp .", SCENE), judge("a cat .", SCENE)])
    assert s["chair_s"] == .5 and s["chair_i"] == pytest.approx(2 / 3)


def test_fit_by_hand(vlm, prompts, tmp_path):
    "Three steps against a plain loop: clipped gradients, the schedule's factors 1, 1, ½, nothing carried over."
    vlm.projector.requires_grad_(True)
    other = copy.deepcopy(vlm)
    fit(SFTTask(vlm), lambda step: prompts[step:], FitConfig(steps=3, lr=.01, batch=6, clip=.05, weight_decay=.1), tmp_path, "")
    task, params = SFTTask(other), list(other.projector.parameters())
    opt = torch.optim.AdamW(params, weight_decay=.1, betas=(.9, .98))
    for step, factor in enumerate((1., 1., .5)):
        b = task.collate(prompts[step:])
        opt.param_groups[0]["lr"] = .01 * factor
        opt.zero_grad(); (task(b)[0] / b.answer_mask.sum()).backward()
        assert nn.utils.clip_grad_norm_(params, .05) > .05
        opt.step()
    for a, b in zip(vlm.projector.parameters(), params): assert_close(a, b, rtol=1e-5, atol=1e-8)
