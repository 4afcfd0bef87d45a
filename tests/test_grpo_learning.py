"GRPO and RLOO on a small random model: what they make of a rollout, what an update changes."

import math

import pytest
import torch
from small_models import push
from test_grpo import loop_grpo
from torch.testing import assert_close

from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.rl import rewards
from vlmrlhf_course.rl.algorithm import Reading, read_answers
from vlmrlhf_course.rl.grpo import (
    GRPO,
    LENGTHS,
    RLOO,
    GRPOConfig,
    RLOOConfig,
    group_advantages,
    rloo_advantages,
    rloo_loss,
)
from vlmrlhf_course.rl.kl import kl_estimate
from vlmrlhf_course.rl.loop import Learner, collect, iteration, update
from vlmrlhf_course.rl.rewards import Judges, Scores
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.train.dpo import DPOConfig, DPOTask
from vlmrlhf_course.train.fit import backward_through
from vlmrlhf_course.train.reward import RewardConfig, RewardModel
from vlmrlhf_course.world.source import DrawnWorld

LORA = LoRAConfig(r=4, alpha=8)
KINDS = [(GRPO, GRPOConfig), (RLOO, RLOOConfig)]
SMALL = dict(
    lora=LORA,
    iterations=4,
    answers=8,
    minibatch=8,
    micro_batch=8,
    epochs=1,
    max_new_tokens=6,
    actor_lr=1e-3,
    no_eos=100.0,  # short answers do not end: without this they would all score alike
    warmup=0.0,
    finish=0.0,
)


@pytest.fixture
def odd_reward(monkeypatch):
    "A reward by which answers differ: points for their tokens, as if by lot."

    def points(judges, roll, texts, step):
        lot = roll.batch.answers * 37 % 11 * roll.batch.answer_mask
        return judges.points((lot.sum(1) / 11).tolist())

    monkeypatch.setitem(rewards.REWARDS, "odd", points)


def start(vlm, kind, config, **changes):
    "An algorithm in float64, its scores, and its configuration."
    torch.manual_seed(0)
    rm = RewardModel(vlm, RewardConfig(lora=LORA)).double().requires_grad_(False)
    cfg = config(**SMALL | dict(reward=dict(odd=1.0)) | changes)
    algorithm = kind(rm, cfg, "pupil").double()
    shake(algorithm, 0.05)  # so that it is not the reference
    algorithm.learn()
    return algorithm, Scores(Judges(rm, DrawnWorld(), cfg.penalty), cfg.reward, cfg.no_eos)


def shake(algorithm, std=0.3):
    "Move the actor away from where it sampled."
    with torch.no_grad():
        for w in algorithm.actor.trained():
            w.add_(torch.randn_like(w) * std)


def groups_of(prompts):
    "Two prompts, four times each."
    return [p for p in prompts[:2] for _ in range(4)]


def whole(algorithm, exp):
    "(B,) log-probabilities of whole answers under the actor."
    with torch.no_grad():
        logprobs, _ = algorithm.policy(exp.batch)
    return (logprobs * exp.batch.answer_mask).sum(1)


@pytest.mark.parametrize("kind, config", KINDS)
def test_an_update_raises_the_better_answers(vlm, prompts, odd_reward, kind, config):
    algorithm, scores = start(vlm, kind, config)
    learner = Learner.of(algorithm, scores, "test")
    exp, _ = collect(algorithm, scores, groups_of(prompts), beta=0.0, seed=1)
    advantages = exp.tokens["advantages"][:, 0]
    assert (advantages > 0.1).any() and (advantages < -0.1).any()
    before = whole(algorithm, exp)
    for group in learner.optimizer.param_groups:
        group["lr"] = 1e-4
    metrics = update(learner, exp, list(range(8)), 0)
    change = whole(algorithm, exp) - before
    assert float((advantages * change).sum()) > 0 and metrics["grad_norm"] > 0
    for rows in (slice(0, 4), slice(4, 8)):
        best, worst = int(advantages[rows].argmax()), int(advantages[rows].argmin())
        assert change[rows][best] > change[rows][worst]


@pytest.mark.parametrize("kind, config", KINDS)
def test_iteration(vlm, prompts, odd_reward, kind, config):
    "The loop of PPO serves both, and logs what it logs."
    algorithm, scores = start(vlm, kind, config, epochs=2, minibatch=4)
    learner = Learner.of(algorithm, scores, "test")
    before = algorithm.actor.snapshot()
    figures = iteration(learner, groups_of(prompts), 0)
    names = {"kl", "reward", "odd", "flat_groups", "policy_loss", "entropy", "clipped", "loss"}
    assert names <= figures.keys() and figures["skipped"] == 0
    numbers = [v for v in figures.values() if not isinstance(v, str)]
    assert all(math.isfinite(x) for x in numbers) and 0 <= figures["flat_groups"] <= 1
    after = algorithm.actor.state()
    assert any(not torch.equal(after[name], w) for name, w in before.items())


CASES = [(GRPO, GRPOConfig, dict(length=length)) for length in LENGTHS]
CASES.append((RLOO, RLOOConfig, {}))


@pytest.mark.parametrize("kind, config, changes", CASES)
def test_micro_batches_make_no_difference(vlm, prompts, odd_reward, kind, config, changes):
    "The same gradient in one piece and in two of unequal length; what `count` counts adds up."
    algorithm, scores = start(vlm, kind, config, **changes)
    learner = Learner.of(algorithm, scores, "test")
    exp, _ = collect(algorithm, scores, groups_of(prompts), beta=0.2, seed=1)
    items, found = [(exp, row) for row in range(8)], []
    for at_once in (8, 4):
        loss, _ = backward_through(learner.task, items, at_once, learner.accelerator, shard=False)
        found.append((loss, [p.grad.clone() for p in learner.state.params]))
        learner.optimizer.zero_grad()
    assert found[0][0] == pytest.approx(found[1][0])
    assert_close(found[0][1], found[1][1], atol=1e-9, rtol=1e-6)
    summed, _ = algorithm.loss(exp)
    per_token = changes.get("length") == "tokens"
    count = int(exp.batch.answer_mask.sum()) if per_token else 8
    assert algorithm.count(exp) == count
    assert found[0][0] == pytest.approx(float(summed.detach()) / count)


@pytest.fixture
def spoken(vlm, prompts, odd_reward):
    "A function: kind, settings → algorithm, rollout with short answers, reading and scores."
    push(vlm, [vlm.eos_id], 2.0)

    def make(kind, config, **changes):
        algorithm, scores = start(vlm, kind, config, **changes)
        roll = sample(vlm, groups_of(prompts), "pupil", 1.0, 6, seed=1)
        assert not roll.batch.answer_mask.all() and not roll.ended.all()
        reading = read_answers(scores.judges.rm, roll, 8)
        return algorithm, roll, reading, scores(roll, states=reading.states)[0].double()

    return make


def whole_k1(roll, reading):
    "k1 of whole answers, with loops."
    out = []
    for row, n in enumerate(roll.batch.lengths.tolist()):
        out.append(float((roll.logprobs[row, :n] - reading.ref[row, :n]).sum()))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("where, scale", [("loss", True), ("loss", False), ("reward", True)])
def test_grpo_experience(spoken, where, scale):
    "β is charged in one place: in the loss, or in the reward."
    algorithm, roll, reading, score = spoken(GRPO, GRPOConfig, kl=where, scale=scale)
    exp, figures = algorithm.experience(roll, reading, score, None, 0.5, None)
    paid = score if where == "loss" else score - 0.5 * whole_k1(roll, reading)
    want = group_advantages(paid, 4, scale).unsqueeze(1) * roll.batch.answer_mask
    assert_close(exp.tokens["advantages"], want)
    assert exp.beta == (0.5 if where == "loss" else 0.0)
    assert torch.equal(exp.tokens["logprobs"], roll.logprobs)
    assert torch.equal(exp.tokens["ref"], reading.ref)
    assert figures == dict(flat_groups=0.0)


def test_rloo_experience(spoken):
    algorithm, roll, reading, score = spoken(RLOO, RLOOConfig)
    exp, _ = algorithm.experience(roll, reading, score, None, 0.5, None)
    paid = score - 0.5 * whole_k1(roll, reading)
    want = rloo_advantages(paid, 4).unsqueeze(1) * roll.batch.answer_mask
    assert_close(exp.tokens["advantages"], want)
    assert exp.beta == 0.0


def test_grpo_loss_of_an_experience(spoken):
    "The settings reach the loss: clip, β, length, and the longest possible answer."
    algorithm, roll, reading, score = spoken(GRPO, GRPOConfig, length="constant", clip=0.1)
    exp, _ = algorithm.experience(roll, reading, score, None, 0.5, None)
    with torch.no_grad():
        shake(algorithm)
        found, metrics = algorithm.loss(exp)
        logprobs, entropy = algorithm.policy(exp.batch)
    real, advantages = roll.batch.answer_mask, exp.tokens["advantages"]
    rest = (roll.logprobs, reading.ref, advantages, real, 0.1, 0.5, "constant", 6)
    assert float(found) == pytest.approx(loop_grpo(logprobs, *rest), rel=1e-6)
    moved = ((logprobs - roll.logprobs).exp() - 1).abs()[real] > 0.1
    assert metrics["clipped"] == pytest.approx(float(moved.double().mean())) and moved.any()
    assert metrics["entropy"] == pytest.approx(float(entropy[real].mean()))
    assert metrics["policy_loss"] == pytest.approx(float(found) / 8)


def test_rloo_loss_of_an_experience(spoken):
    algorithm, roll, reading, score = spoken(RLOO, RLOOConfig, clip=0.1)
    exp, _ = algorithm.experience(roll, reading, score, None, 0.5, None)
    with torch.no_grad():
        shake(algorithm)
        found, metrics = algorithm.loss(exp)
        logprobs, _ = algorithm.policy(exp.batch)
    want = rloo_loss(logprobs, roll.logprobs, exp.tokens["advantages"], roll.batch.answer_mask, 0.1)
    assert_close(found, want)
    assert metrics["policy_loss"] == pytest.approx(float(found) / 8)
    # what is clipped is whole answers
    moved = ((logprobs - roll.logprobs) * roll.batch.answer_mask).sum(1).exp() - 1
    share = float((moved.abs() > 0.1).double().mean())
    assert metrics["clipped"] == pytest.approx(share) and share > 0


@pytest.mark.parametrize("kind, config", KINDS)
def test_garbage_at_padding_of_a_rollout(spoken, kind, config):
    algorithm, roll, reading, score = spoken(kind, config)
    padding = ~roll.batch.answer_mask
    found = []
    for filler in (0.0, -1e30):
        roll.logprobs = roll.logprobs.masked_fill(padding, filler)
        ref = reading.ref.masked_fill(padding, -filler)
        exp, _ = algorithm.experience(
            roll, Reading(ref, reading.states, reading.groups), score, None, 0.5, None
        )
        loss, _ = algorithm.loss(exp)
        loss.backward()
        grads = [w.grad.clone() for w in algorithm.actor.trained()]
        algorithm.zero_grad()
        found.append((exp.tokens["advantages"], loss.detach(), grads))
    assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("kind, config", KINDS)
def test_a_flat_group_teaches_nothing(spoken, kind, config):
    "All alike, and no leash: the loss has no slope at all."
    algorithm, roll, reading, score = spoken(kind, config)
    alike = torch.full_like(score, 3.0)
    exp, figures = algorithm.experience(roll, reading, alike, None, 0.0, None)
    loss, _ = algorithm.loss(exp)
    loss.backward()
    assert not any(w.grad.any() for w in algorithm.actor.trained())
    assert figures == dict(flat_groups=1.0)
    alike[0] = 4.0
    _, figures = algorithm.experience(roll, reading, alike, None, 0.0, None)
    assert figures == dict(flat_groups=0.5)


def test_k3_pulls_towards_the_reference(spoken):
    "With all scores alike, a step along the gradient lowers KL."
    algorithm, roll, reading, score = spoken(GRPO, GRPOConfig)
    exp, _ = algorithm.experience(roll, reading, torch.zeros_like(score), None, 1.0, None)

    def k3():
        logprobs, _ = algorithm.policy(exp.batch)
        return float((kl_estimate(logprobs, reading.ref, "k3") * exp.batch.answer_mask).sum())

    loss, _ = algorithm.loss(exp)
    loss.backward()
    with torch.no_grad():
        before = k3()
        for w in algorithm.actor.trained():
            w.sub_(1e-3 * w.grad)
        assert before > 0 and k3() < before


# --- roles on one trunk ---------------------------------------------------------------------------


def all_weights(vlm, without):
    "Every weight of the model but those of one role."
    own = {w.data_ptr() for w in vlm.roles[without].state().values()}
    return {n: p.clone() for n, p in vlm.model.named_parameters() if p.data_ptr() not in own}


def same(before, vlm):
    now = dict(vlm.model.named_parameters())
    return all(torch.equal(now[name], w) for name, w in before.items())


def test_dpo_and_grpo_share_a_trunk_without_touching(vlm, prompts, odd_reward):
    dpo = DPOTask(vlm, DPOConfig(lora=LORA), "dpo")
    algorithm, scores = start(vlm, GRPO, GRPOConfig)
    learner = Learner.of(algorithm, scores, "test")
    before = all_weights(vlm, without="pupil")
    assert any(".dpo." in name for name in before)
    old = algorithm.actor.snapshot()
    iteration(learner, groups_of(prompts), 0)
    assert same(before, vlm), "GRPO changed a weight that is not its own"
    assert any(not torch.equal(w, old[name]) for name, w in algorithm.actor.state().items())

    algorithm.requires_grad_(False)
    for w in dpo.role.trained():
        w.requires_grad_(True)
    p = prompts[0]
    row = dict(image=p.image, prompt=p.text, chosen=p.answer, rejected="a fish .")
    before = all_weights(vlm, without="dpo")
    optimizer = torch.optim.SGD(dpo.role.trained(), lr=1.0)
    loss, _ = dpo(dpo.collate([[row]]))
    loss.backward()
    optimizer.step()
    assert same(before, vlm), "DPO changed a weight that is not its own"
    after, _ = dpo(dpo.collate([[row]]))
    assert after.item() < loss.item()
