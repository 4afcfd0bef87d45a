"Micro-batches, the experience of PPO, and emergencies."

import copy

import pytest
import torch
from small_models import (
    SMALL,
    SMALL_LORA,
    experience_of,
    logprobs,
    loss_of,
    push,
    reward_model,
    scores_of,
    shake,
    values,
    with_settings,
)
from torch.testing import assert_close

from vlmrlhf_course.base.launch import make_accelerator
from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.data.pairs import group_pairs
from vlmrlhf_course.model.groups import ParamGroup, clip_groups
from vlmrlhf_course.model.vlm import VLM, token_logprobs
from vlmrlhf_course.rl.kl import full_kl
from vlmrlhf_course.rl.loop import Learner, train
from vlmrlhf_course.rl.ppo import PPO, PPOConfig
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.rl.state import State
from vlmrlhf_course.train.fit import FitConfig, backward_through, grad_norms
from vlmrlhf_course.train.reward import RewardConfig, RewardModel, RewardTask
from vlmrlhf_course.train.sft import SFTConfig, SFTTask, learn_part, sft_groups, thawing
from vlmrlhf_course.world.llava import build_model, build_processor
from vlmrlhf_course.world.source import sample_prompts


def gradients(task, items, micro_batch):
    "Loss, figures and gradients of a step in parts of at most `micro_batch` items."
    task.zero_grad()
    loss, metrics = backward_through(task, items, micro_batch, make_accelerator())
    grads = {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}
    assert grads and any(g.any() for g in grads.values())
    return loss, metrics, grads


def same_for_every_split(task, items, tolerance=1e-6):
    "Checks parts of several sizes against the whole; returns loss and figures of the whole."
    want_loss, want_metrics, want_grads = gradients(task, items, len(items))
    for size in (1, 2, len(items) - 1):
        loss, metrics, grads = gradients(task, items, size)
        assert loss == pytest.approx(want_loss, rel=tolerance)
        for name in metrics.keys() - {"spread"}:  # a spread is no mean
            assert metrics[name] == pytest.approx(want_metrics[name], rel=1e-5, abs=1e-7), name
        assert grads.keys() == want_grads.keys()
        for name, want in want_grads.items():
            largest = float(want.abs().max() + 1e-3)
            assert_close(grads[name], want, rtol=1e-5, atol=1e-7 * largest)
    return want_loss, want_metrics


def test_sft_does_not_depend_on_micro_batches(vlm, prompts, full):
    for part in (vlm.projector, vlm.language, vlm.model.lm_head):
        part.requires_grad_(True)
    loss, _ = same_for_every_split(SFTTask(vlm), prompts)
    with torch.no_grad():
        mean = -logprobs(vlm, full).sum() / full.answer_mask.sum()
    assert loss == pytest.approx(float(mean), rel=1e-6)


@pytest.mark.parametrize("layer", [-1, -2])
def test_staged_unfreezing(vlm, layer):
    """The layer that learns first is the last one that is read; before the first layer comes what
    is before it; what nobody reads is in no group."""
    tower_layers = vlm.tower.encoder.layers
    for _ in range(2):  # three in all
        tower_layers.append(copy.deepcopy(tower_layers[0]))
    vlm.model.config.vision_feature_layer = layer
    read, stage = 4 + layer, FitConfig(steps=100)
    groups = thawing(vlm, 0.5, stage)
    assert len(groups) == read
    for part, group in zip(tower_layers, groups):
        assert {id(p) for p in part.parameters()} <= {id(p) for p in group.params}
    assert {id(p) for p in vlm.tower.embeddings.parameters()} <= {id(p) for p in groups[0].params}
    for step in (0, 29, 30, 69, 70, 99):
        rates = [g.peak * g.schedule(step) for g in groups]
        whole, last = 0.5 * stage.factor(step), read - 1
        want = [whole * (step >= 70 or (i == last and step >= 30)) for i in range(read)]
        assert rates == pytest.approx(want)


def test_a_stage_of_sft_thaws_the_tower_where_it_is_told_to(vlm):
    "And nothing else that was frozen: what trains is what is in a group."
    for name, rate, more in (("language", 0.1, 2), ("language", 0.0, 0), ("projector", 0.1, 0)):
        learn_part(vlm, name)
        groups = sft_groups(vlm, SFTConfig(tower_lr=rate), name)
        trained = {id(p) for p in vlm.model.parameters() if p.requires_grad}
        grouped = [id(p) for group in groups for p in group.params]
        assert set(grouped) == trained and len(grouped) == len(trained)
        assert len(groups) == 1 + (len(vlm.tower.encoder.layers) if more else 0)


def test_each_group_is_clipped_by_itself():
    "Otherwise one that is far off slows the others down. The norm is that of all, before."
    far, near = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    far.grad, near.grad = torch.tensor([300.0, 400.0]), torch.tensor([0.3, 0.4])
    groups = [ParamGroup([p], 1.0, lambda step: 1.0) for p in (far, near)]
    norm = clip_groups(make_accelerator(), groups, 1.0)
    assert norm == pytest.approx((500**2 + 0.5**2) ** 0.5)
    assert_close(far.grad, torch.tensor([0.6, 0.8]))
    assert_close(near.grad, torch.tensor([0.3, 0.4]))


def test_grad_norms(vlm, full):
    vlm.projector.requires_grad_(True)
    vlm.answer_logits(full).sum().backward()
    got = grad_norms(dict(projector=vlm.projector, language=vlm.language))
    assert got["language"] == 0.0
    squares = sum(float((p.grad**2).sum()) for p in vlm.projector.parameters())
    assert got["projector"] == pytest.approx(squares**0.5)


def test_reward_does_not_depend_on_micro_batches(rm, pairs):
    rm.head.requires_grad_(True)
    task = RewardTask(rm)
    task.requires_grad_(False)
    rm.head.requires_grad_(True)
    loss, metrics = same_for_every_split(task, group_pairs(pairs))
    assert 0 <= metrics["accuracy"] <= 1 and loss > 0


@pytest.fixture
def experience(policy, token_rm, vlm, prompts):
    "PPO, answers of which some end, the experience that they give, and its figures."
    push(vlm, [vlm.eos_id], 2.0)
    ppo = with_settings(policy, micro_batch=2)
    roll = sample(vlm, prompts, "actor", max_new_tokens=9, seed=2)
    return ppo, roll, *experience_of(ppo, token_rm, roll)


def test_ppo_does_not_depend_on_micro_batches(experience, vlm):
    ppo, _, exp, _ = experience
    shake(vlm, "actor", std=0.02, seed=11)  # the policy has moved since it sampled
    same_for_every_split(ppo, [(exp, i) for i in (3, 0, 5, 2, 1, 4)])


def test_the_first_update_starts_at_ratio_one(experience):
    """Before any step the policy is the one that sampled: the
    loss is minus the mean advantage, nothing is clipped."""
    ppo, roll, exp, _ = experience
    _, metrics = loss_of(ppo, exp, range(len(roll.prompts)))
    mask = exp.batch.answer_mask
    mean = float(exp.tokens["advantages"][mask].mean())
    assert metrics["clipped"] == 0
    assert metrics["policy_loss"] == pytest.approx(-mean, abs=1e-6)
    assert metrics["entropy"] > 0
    errors = (exp.tokens["values"] - exp.tokens["returns"])[mask]
    assert metrics["value_loss"] == pytest.approx(float(0.5 * (errors**2).mean()), rel=1e-6)


def test_experience(experience, token_rm, vlm):
    """KL against the enumerated one in the mean; returns
    are rewards and values put together by hand."""
    ppo, roll, exp, info = experience
    b, cfg = roll.batch, ppo.cfg
    with torch.no_grad():
        ref = token_logprobs(vlm.rule_out(vlm.answer_logits(b)), b.answers)
    cost = 0.1 * (roll.logprobs - ref)
    score = torch.where(roll.ended, token_rm(b), token_rm(b).clamp(max=cfg.no_eos))
    v = values(ppo, token_rm, b)
    early = torch.zeros_like(cost)
    if cfg.dense and token_rm.cfg.granularity == "token":
        early = token_rm.token_scores(b) / token_rm.scale
    assert not roll.ended.all()
    for i, n in enumerate(b.lengths.tolist()):
        running = 0.0
        for t in reversed(range(n)):
            # an answer without EOS was scored, too: it ended there
            after = v[i, t + 1] if t + 1 < n else 0.0
            rest = score[i] - early[i].sum() if t == n - 1 else 0.0
            reward = early[i, t] + rest - cost[i, t]
            running = reward + after - v[i, t] + 0.95 * running
            want = running + v[i, t]
            assert_close(exp.tokens["returns"][i, t], want, atol=1e-6, rtol=1e-6)
    mean = sum(float(v[i, :n].sum()) for i, n in enumerate(b.lengths.tolist()))
    assert info["value"] == pytest.approx(mean / int(b.answer_mask.sum()), rel=1e-6)
    assert info["kl"] > 0
    assert info["ended"] == pytest.approx(float(roll.ended.float().mean()))
    assert info["length"] == pytest.approx(float(b.lengths.float().mean()))


def test_kl_estimates_agree_with_the_full_divergence(vlm, prompts):
    vlm.add_role("actor", SMALL_LORA)
    shake(vlm, "actor", std=0.1)
    roll = sample(vlm, prompts * 100, "actor", max_new_tokens=4, seed=6)
    b = roll.batch
    with torch.no_grad():
        z, ref = (vlm.rule_out(vlm.answer_logits(b, r)) for r in ("actor", None))
    exact = (full_kl(z, ref) * b.answer_mask).sum() / len(b)
    k1 = ((roll.logprobs - token_logprobs(ref, b.answers)) * b.answer_mask).sum(1)
    assert exact.isfinite() and abs(k1.mean() - exact) < 4 * k1.std() / len(b) ** 0.5


def test_emergency_rolls_back(policy):
    cfg = PPOConfig(kl_emergency=10.0, beta=0.1, kl_target=6.0)
    state = State(policy, cfg)
    good = state.snapshot()
    assert state.after(3.1, cfg) is False and state.control.beta == 0.1
    with torch.no_grad():
        state.params[0].add_(1.0)
    assert state.after(10.1, cfg) is True
    assert all(torch.equal(a, b) for a, b in zip(state.snapshot(), good))
    assert state.lr_scale == pytest.approx(0.1)
    assert state.control.beta == pytest.approx(0.3)
    assert state.emergencies == 1
    other = State(policy, cfg)
    other.load_state_dict(state.state_dict())
    assert other.lr_scale == state.lr_scale
    assert other.control.beta == state.control.beta
    assert other.emergencies == 1


def test_a_run_recovers_from_an_explosion(tmp_path):
    """One far too large step makes the KL explode:
    the emergency must bring back weights from before that step."""
    torch.manual_seed(0)
    vlm = VLM(build_model(SMALL), build_processor(SMALL))
    vlm.model.requires_grad_(False)
    rm = RewardModel(vlm, RewardConfig(lora=SMALL_LORA)).requires_grad_(False)
    cfg = PPOConfig(
        lora=SMALL_LORA,
        iterations=3,
        answers=24,
        minibatch=12,
        epochs=2,
        actor_lr=0.5,
        warmup=0.0,
        finish=0.0,
        beta=1e-3,
        kl_emergency=0.5,
        max_new_tokens=8,
        eval_every=9,
        save_every=9,
        keep="last",
    )
    ppo = PPO(rm, cfg)
    ppo.learn()
    prompts = sample_prompts(30, "train", dict(detail=1.0))
    state = train(ppo, scores_of(rm, cfg), prompts, prompts[:2], tmp_path)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert rows[0]["kl"] < 1e-6
    assert not rows[0]["emergency"]
    assert rows[1]["kl"] > 0.5
    assert rows[1]["emergency"]
    # else the weights that were brought back are those that exploded
    assert rows[2]["kl"] < 0.2 * rows[1]["kl"]
    assert state.lr_scale < 1


def test_a_learner_trains_its_roles_and_nothing_else(vlm):
    "Also on a trunk that was just loaded, and still wants gradients everywhere."
    rm = reward_model(vlm, "token")
    ppo = PPO(rm, PPOConfig(lora=SMALL_LORA)).double()
    vlm.model.requires_grad_(True)
    learner = Learner.of(ppo, scores_of(rm, ppo.cfg), "ppo")
    own = {id(p) for group in ppo.groups() for p in group.params}
    assert {id(p) for p in learner.state.params} == own
    assert {id(p) for p in [*ppo.parameters(), *rm.parameters()] if p.requires_grad} == own
