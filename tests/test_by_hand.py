"By hand: what a step of learning is made of, put together again from its definition and compared."

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import SCENE
from small_models import (
    PAID,
    SMALL_LORA,
    close,
    experience,
    log_ratio,
    loss_of,
    push,
    rand,
    rescaled,
    right_mask,
    scores_of,
    shake,
    with_settings,
)
from torch import nn
from torch.testing import assert_close

from vlmrlhf_course.base.launch import make_accelerator
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.data.pairs import group_pairs
from vlmrlhf_course.data.preferences import ranking_pairs
from vlmrlhf_course.model.batch import pad_sides
from vlmrlhf_course.model.vlm import answer, token_logprobs
from vlmrlhf_course.rl.algorithm import Experience, read_answers
from vlmrlhf_course.rl.kl import full_kl, grounded_mask
from vlmrlhf_course.rl.loop import check_shares, minibatches
from vlmrlhf_course.rl.ppo import PPOConfig
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.rl.state import RECOVERY, State, validate, where_it_moved
from vlmrlhf_course.train.dpo import DPOConfig, DPOTask
from vlmrlhf_course.train.fit import FitConfig, backward_through, fit
from vlmrlhf_course.train.reward import RewardTask, ScoreHead, score_texts
from vlmrlhf_course.train.sft import SFTTask
from vlmrlhf_course.world.judge import judge, summarise


def reference(cast, roll):
    "Log-probabilities of these answers under the reference."
    with torch.no_grad():
        logits = cast.vlm.rule_out(cast.vlm.answer_logits(roll.batch))
        return token_logprobs(logits, roll.batch.answers, roll.temperature)


def k1(log_ratio):
    "The sum over each answer, in the mean; `log_ratio` is reference less policy, 0 at padding."
    return float(-log_ratio.sum(1).mean())


def test_token_scores_are_paid_once_and_scaled_like_the_reward(cast, roll):
    """λ = 1: a return is the score, less the token scores
    already paid, less the KL still to be charged."""
    rm, mask = rescaled(cast.rm, 2.0, 3.0), roll.batch.answer_mask
    exp, _ = experience(cast, roll, rm, reward=PAID["rm"], lam=1.0, no_eos=-200.0)
    score = torch.where(roll.ended, rm(roll.batch), -200.0)
    token_scores = torch.zeros_like(roll.logprobs)
    if rm.cfg.granularity == "token":
        token_scores = rm.token_scores(roll.batch) / 3.0
    paid = torch.cat([torch.zeros(6, 1), token_scores.cumsum(1)[:, :-1]], 1)
    cost = 0.1 * (roll.logprobs - reference(cast, roll)) * mask
    still_to_come = cost.flip(1).cumsum(1).flip(1)
    want = score.unsqueeze(1) - paid - still_to_come
    close(exp.tokens["returns"][mask], want[mask])


def test_one_temperature_for_sampling_reference_and_ratio(cast):
    hot = sample(cast.vlm, cast.prompts, "actor", 0.6, max_new_tokens=6, seed=5)
    exp, info = experience(cast, hot)
    log_r = (reference(cast, hot) - hot.logprobs) * hot.batch.answer_mask
    assert info["kl"] == pytest.approx(k1(log_r))
    _, metrics = loss_of(with_settings(cast.policy, temperature=0.6), exp, range(6))
    assert metrics["clipped"] == 0
    advantage = float(exp.tokens["advantages"][hot.batch.answer_mask].mean())
    assert metrics["policy_loss"] == pytest.approx(-advantage, abs=1e-6)


def test_ppo_loss_by_hand(cast, roll):
    "Each of its two parts with its own clip, the values of each state, and the coefficient."
    exp, mask = experience(cast, roll)[0], roll.batch.answer_mask
    old = exp.tokens["logprobs"] + 0.3 * rand(*mask.shape, seed=1)
    old_values = exp.tokens["values"] + rand(*mask.shape, seed=2)
    exp = replace(exp, tokens=exp.tokens | dict(logprobs=old, values=old_values))
    ppo = with_settings(cast.policy, clip=0.1, value_clip=0.4, value_coef=0.7)
    got, _ = loss_of(ppo, exp, range(6))
    with torch.no_grad():
        new, _ = cast.policy.policy(roll.batch)
        v = cast.policy.values(roll.batch, exp.states)[:, :-1]
    advantages, returns = exp.tokens["advantages"], exp.tokens["returns"]
    ratio = (new - old).exp()
    near = old_values + (v - old_values).clamp(-0.4, 0.4)
    policy_loss = -torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages)
    value_loss = 0.5 * torch.maximum((v - returns) ** 2, (near - returns) ** 2)
    close(got.detach(), ((policy_loss + 0.7 * value_loss) * mask).sum())


def test_validation_is_the_score_less_the_cost_of_kl(cast):
    ppos = [with_settings(cast.policy, max_new_tokens=6, beta=beta) for beta in (0.0, 2.0)]
    scores = scores_of(cast.rm, ppos[0].cfg)
    free, dear = (validate(ppo, scores, cast.prompts)["validation"] for ppo in ppos)
    roll = sample(cast.vlm, cast.prompts, "actor", max_new_tokens=6, seed=1)
    log_r = (reference(cast, roll) - roll.logprobs) * roll.batch.answer_mask
    assert free == pytest.approx(float(scores(roll)[0].mean()))
    assert free - dear == pytest.approx(2 * k1(log_r))


@pytest.fixture
def looking(policy, token_rm, vlm, prompts):
    "A policy whose pictures matter, its reward model, and answers of different lengths."
    with torch.no_grad():
        vlm.model.lm_head.weight.mul_(3.0)
    push(vlm, [vlm.eos_id], 2.0)
    return policy, token_rm, sample(vlm, prompts, "actor", max_new_tokens=9, seed=2)


def moved_alone(vlm, prompt, tokens):
    "KL of each token of one answer, and whether the picture decides it: read alone."
    shown = vlm.batch([prompt], [tokens])
    logits = (vlm.rule_out(vlm.answer_logits(shown, who)) for who in ("actor", None))
    nothing = vlm.batch([prompt], [tokens], images=["blank"])
    return full_kl(*logits)[0], grounded_mask(vlm, shown, nothing)[0]


@torch.no_grad()
def test_where_it_moved_by_hand(looking):
    """Token by token; one of the prompts has no picture, so none of its tokens is grounded. It does
    not matter how many answers are read at once."""
    policy, rm, roll = looking
    said = [row[:n].tolist() for row, n in zip(roll.batch.answers, roll.batch.lengths)]
    alone = [moved_alone(rm.vlm, p, tokens) for p, tokens in zip(roll.prompts, said)]
    assert [p.image for p in roll.prompts].index(None) == 2 and not alone[2][1].any()
    kl, grounded = (torch.cat(columns) for columns in zip(*alone))
    assert 3 < grounded.sum() < len(grounded) - len(said[2])
    want = dict(
        kl_grounded=float(kl[grounded].mean()),
        kl_prior=float(kl[~grounded].mean()),
        kl_grounded_share=float(kl[grounded].sum() / kl.sum()),
    )
    for at_once in (6, 2):
        reading = read_answers(rm, roll, at_once)
        assert where_it_moved(policy, roll, reading) == pytest.approx(want, rel=1e-6)


def test_a_validation_says_where_it_moved(looking):
    "Of the answers that it has sampled itself."
    policy, rm, _ = looking
    ppo = with_settings(policy, max_new_tokens=6)
    roll = sample(rm.vlm, looking[2].prompts, "actor", max_new_tokens=6, seed=1)
    with torch.no_grad():
        want = where_it_moved(ppo, roll, read_answers(rm, roll, 6))
    assert want["kl_grounded"] > 0
    assert validate(ppo, scores_of(rm, ppo.cfg), roll.prompts).items() >= want.items()


def answers_of(lengths):
    "An experience of answers of these lengths."
    return Experience(pad_sides([[1]] * len(lengths), [[2] * n for n in lengths], 0), {})


def test_minibatches_are_random_and_sorted_inside():
    """Every row once an epoch, each process its share of a minibatch, like lengths side by side;
    another order in another epoch and step."""
    lengths = torch.tensor([5, 9, 1, 7, 3, 8, 2, 6])
    exp, cfg = answers_of(lengths.tolist()), PPOConfig(minibatch=4, epochs=3)
    found = list(minibatches(exp, cfg, "0/0"))
    assert [len(g) for g in found] == [4] * 6
    assert [len(g) for g in minibatches(exp, cfg, "0/0", processes=2)] == [2] * 12
    for epoch in range(3):
        assert sorted(found[2 * epoch] + found[2 * epoch + 1]) == list(range(8))
    assert all(lengths[g].tolist() == sorted(lengths[g].tolist()) for g in found)
    assert len({frozenset(g) for g in found[::2]}) > 1
    assert found == list(minibatches(exp, cfg, "0/0")) != list(minibatches(exp, cfg, "0/1"))
    # sorted over the whole batch, updates would see one kind of answer each
    assert any(max(lengths[g]) - min(lengths[g]) > 4 for g in found)
    with pytest.raises(UserError, match="minibatch=4.*answers_per_prompt, 3 × 1"):
        check_shares(cfg, 3)


def test_emergency_and_controller():
    """Rolls back to the newest good weights; the learning rate
    falls, β rises, up to 10; the controller rests on demand."""
    net, cfg = nn.Linear(2, 1), PPOConfig(beta=4.0, kl_target=6.0, kl_emergency=10.0)
    state = State(net, cfg)

    def move():
        with torch.no_grad():
            net.weight.add_(1.0)
        return net.weight.detach().clone()

    good = move()
    assert not state.after(9.5, cfg, control=False) and state.control.beta == 4.0
    assert not state.reached
    assert not state.after(1.0, cfg) and state.control.beta == 4.0  # it has never been at 6 nats
    assert not state.after(6.5, cfg) and state.control.beta == 4.0
    assert not state.after(1.0, cfg) and state.control.beta == 3.0
    for lr, beta in ((0.1, 9.0), (0.01, 10.0)):
        move()
        assert state.after(10.1, cfg) and torch.equal(net.weight, good)
        assert (state.lr_scale, state.control.beta) == (pytest.approx(lr), pytest.approx(beta))
    state.control.beta = 20.0  # somebody's own, above the ceiling: it does not fall
    assert state.after(10.1, cfg) and state.control.beta == 20.0


def test_after_a_rollback_the_rate_comes_back_and_the_pull_stays():
    "Over RECOVERY good iterations; in these β may rise and not fall, however low KL is."
    cfg = PPOConfig(beta=0.2, kl_target=6.0, kl_emergency=10.0)
    state = State(nn.Linear(2, 1), cfg)
    state.after(7.0, cfg)
    assert state.after(99.0, cfg) and state.lr_scale == pytest.approx(0.1)
    pulled = state.control.beta
    assert pulled == pytest.approx(0.6)
    for done in range(1, RECOVERY + 1):
        state.after(0.5, cfg)
        assert state.control.beta == pulled
        assert state.lr_scale == pytest.approx(0.1 * 10 ** (done / RECOVERY))
    state.after(0.5, cfg)
    assert state.control.beta == pytest.approx(0.75 * pulled) and state.lr_scale == 1.0
    state.after(99.0, cfg)
    state.after(9.5, cfg)
    assert state.control.beta == pytest.approx(1.5 * 3 * 0.75 * pulled)  # too far still: it rises


@pytest.mark.parametrize("pooling", ["last", "mean", "attention"])
def test_pooling_by_definition(pooling):
    torch.manual_seed(0)
    head = ScoreHead(8, pooling=pooling).double()
    x = rand(2, 5, 8)
    mask = right_mask([3, 5], 5)
    for row, m, got in zip(x, mask, head.pool(x, mask)):
        real = row[m]
        if pooling == "last":
            want = real[-1]
        elif pooling == "mean":
            want = real.mean(0)
        else:
            want = (head.attend(real).softmax(0) * real).sum(0)
        close(got, want)


def test_reward_task_by_hand(cast):
    """The sum over pairs of -log σ(gap), margin and pull; the chosen answer is the one that is to
    win. A prompt's pairs share the weight 1, and the mean is one over prompts."""

    def score(p, text):
        return float(score_texts(cast.rm, [p], [text]))

    rows, want, worse = [], 0.0, ("a cat .", "nothing .", "a fish and a fish .")
    for n, p in enumerate([p for p in cast.prompts if p.image][:3], 1):  # n pairs of the n-th
        for rejected, w in zip(worse[:n], (0.5, 1.0, 1.5)):
            row = dict(image=p.image, prompt=p.text, chosen=p.answer, rejected=rejected, weight=w)
            rows.append(row)
            c, r = score(p, p.answer), score(p, rejected)
            margin, pull = max(0.0, 0.5 - (c - r)), (c * c + r * r) / 2
            want += w / n * (math.log1p(math.exp(r - c)) + 0.1 * margin + 0.01 * pull)
    task, groups = RewardTask(cast.rm), group_pairs(rows)
    assert [len(group) for group in groups] == [1, 2, 3]
    batch = task.collate(groups)
    loss, metrics = task(batch)
    assert float(loss) == pytest.approx(want, rel=1e-6) and task.count(batch) == 3


def test_dpo_task_by_hand(vlm, prompts):
    """One pair about a picture, and three about another: each prompt has the weight 1, which its
    pairs share, and the mean is one over prompts."""
    task, asked = DPOTask(vlm, DPOConfig(beta=0.3, lora=SMALL_LORA)), (prompts[0], prompts[3])
    shake(vlm, "dpo")

    groups, want = [], 0.0
    for p, worse in zip(asked, (["a cat ."], ["a cat .", "nothing .", "a fish and a fish ."])):
        row = dict(image=p.image, prompt=p.text, chosen=p.answer)
        groups.append([row | dict(rejected=text, weight=0.5 + len(text)) for text in worse])
        for text in worse:
            gap = log_ratio(vlm, "dpo", p, p.answer) - log_ratio(vlm, "dpo", p, text)
            want += (0.5 + len(text)) / len(worse) * math.log1p(math.exp(-0.3 * gap))
    batch = task.collate(groups)
    assert float(task(batch)[0].detach()) == pytest.approx(want, rel=1e-6)
    assert task.count(batch) == 2
    whole, _ = backward_through(task, groups, 2, make_accelerator())
    apart, _ = backward_through(task, groups, 1, make_accelerator())
    assert whole == pytest.approx(want / 2, rel=1e-6) and apart == pytest.approx(whole, rel=1e-6)


def test_grounded_tokens_are_answer_tokens(cast):
    "Padding after an answer sees the picture, too, but nobody says it."
    blank = cast.vlm.batch(cast.prompts, [p.answer for p in cast.prompts], images=["blank"] * 6)
    got = grounded_mask(cast.vlm, cast.full, blank, threshold=-1.0)
    assert torch.equal(got, cast.full.answer_mask) and not got.all()


def test_neither_placeholder_nor_padding_is_ever_sampled(vlm, prompts):
    "Named here one by one: a list that lost an entry must not decide what it forbids."
    banned = [vlm.tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "<pad>", "<unk>")]
    push(vlm, banned, 40.0)
    said = sample(vlm, prompts, max_new_tokens=4, seed=0).batch
    assert not torch.isin(said.answers[said.answer_mask], torch.tensor(banned)).any()
    for text in answer(vlm, prompts, max_new_tokens=4):
        assert len(vlm.tokenizer(text).input_ids) == 4, "decoding drops special tokens"


def test_a_gap_of_just_the_limit_gives_a_pair():
    assert ranking_pairs([[0, 1]], min_gap=1.0) == [(0, 1, 1.0)]
    assert ranking_pairs([[0, 1]], min_gap=1.01) == []
    thirds = [[0, 1], [0, 1], [1, 0]]  # mean ranks 1/3 and 2/3, which floats do not hold exactly
    assert ranking_pairs(thirds, min_gap=1 / 3) == [(0, 1, 1.0)]


@pytest.mark.parametrize(
    "text", ["a boat on a fish .", "a fish on a boat .", "a fish behind a lamp ."]
)
def test_relations_with_absent_things_are_not_judged_again(text):
    v = judge(text, SCENE)
    assert v.false_objects and not v.false_relations and not v.true_relations


def test_chair_s_counts_answers_not_objects():
    s = summarise([judge("a fish and a lamp .", SCENE), judge("a cat .", SCENE)])
    assert s["chair_s"] == 0.5 and s["chair_i"] == pytest.approx(2 / 3)


def test_fit_by_hand(vlm, prompts, tmp_path):
    """Three steps against a plain loop: clipped gradients,
    the schedule's factors 1, 1, ½, nothing carried over."""
    vlm.projector.requires_grad_(True)
    other = copy.deepcopy(vlm)
    cfg = FitConfig(steps=3, lr=0.01, batch=6, clip=0.05, weight_decay=0.1)
    fit(SFTTask(vlm), lambda step: prompts[step:], cfg, tmp_path, "")
    task, params = SFTTask(other), list(other.projector.parameters())
    opt = torch.optim.AdamW(params, weight_decay=0.1, betas=(0.9, 0.98))
    for step, factor in enumerate((1.0, 1.0, 0.5)):
        b = task.collate(prompts[step:])
        opt.param_groups[0]["lr"] = 0.01 * factor
        opt.zero_grad()
        (task(b)[0] / b.answer_mask.sum()).backward()
        assert nn.utils.clip_grad_norm_(params, 0.05) > 0.05
        opt.step()
    for a, b in zip(vlm.projector.parameters(), params):
        assert_close(a, b, rtol=1e-5, atol=1e-8)
