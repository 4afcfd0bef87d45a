"""Checkpoints in bfloat16 and float16: the trunk stays as it came, what learns is float32, and the
policy that samples is the policy that is trained."""

import pytest
import torch
from peft import PeftModel
from report_models import (
    ANSWERS,
    COPY,
    DEVICE,
    LORA,
    full,
    make,
    prompts,  # noqa: F401 (fixture)
    shake,
)
from small_models import experience_of, loss_of
from torch.testing import assert_close

from vlmrlhf_course.model.export import plain_model, save_adapter
from vlmrlhf_course.model.family import FAMILIES
from vlmrlhf_course.model.groups import make_optimizer
from vlmrlhf_course.model.roles import Role, merged
from vlmrlhf_course.model.vlm import VLM, answer, load_vlm, save_vlm, token_logprobs
from vlmrlhf_course.rl.grpo import GRPO, GRPOConfig
from vlmrlhf_course.rl.ppo import PPO, PPOConfig
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.train.dpo import DPOConfig, DPOTask
from vlmrlhf_course.train.fit import FitConfig, fit, learning
from vlmrlhf_course.train.reward import RewardConfig, RewardModel, RewardTask, score_texts
from vlmrlhf_course.train.sft import SFTConfig, SFTTask, learn_part, sft_groups

HALVES = [torch.bfloat16, torch.float16]
# How far a first ratio may be from 1. Log-probabilities between -8 and -4 come in steps of 4.8e-7
# in float32 and 8.9e-16 in float64. Sampling and training add the same numbers in another order:
# that costs a few such steps (2.2e-6 was the most of ten families), and anything else shows in
# float64.
A_FEW_STEPS_OF_FLOAT32, A_FEW_STEPS_OF_FLOAT64 = 3e-6, 1e-14
NEAR = {
    torch.float64: A_FEW_STEPS_OF_FLOAT64,
    torch.float32: A_FEW_STEPS_OF_FLOAT32,
    torch.bfloat16: 1e-3,
    torch.float16: 1e-3,
}


def types(module) -> set:
    return {p.dtype for p in module.parameters()}


def trunk_types(vlm) -> set:
    return {p.dtype for name, p in vlm.model.named_parameters() if ".lora_" not in name}


def ratio_error(vlm, roll, role) -> float:
    "How far the furthest ratio is from 1, before any update."
    with torch.no_grad():
        logits = vlm.rule_out(vlm.answer_logits(roll.batch, role))
    now = token_logprobs(logits, roll.batch.answers, roll.temperature)
    return float(((now - roll.logprobs).exp() - 1)[roll.batch.answer_mask].abs().max())


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_first_ratio_is_1(kind, dtype, prompts):
    "Trunk, a shaken adapter and a copy; alone, and in other company than when it was sampled."
    vlm = make(kind, dtype)
    for role, lora in (("actor", LORA), ("copied", COPY)):
        vlm.add_role(role, lora)
        shake(vlm, role, 0.1 if lora.r else 0.01)
    for role in (None, "actor", "copied"):
        roll = sample(vlm, prompts * 3, role, max_new_tokens=6, seed=3)
        assert ratio_error(vlm, roll, role) < NEAR[dtype]
        part = roll.batch.rows(torch.tensor([4, 1]))
        now = token_logprobs(vlm.rule_out(vlm.answer_logits(part, role)), part.answers)
        old = roll.logprobs[[4, 1]][:, : part.answers.shape[1]]
        assert ((now - old).exp() - 1)[part.answer_mask].abs().max() < NEAR[dtype]
    assert trunk_types(vlm) == {dtype}
    for role in vlm.roles.values():
        learns = torch.float64 if dtype == torch.float64 else torch.float32
        assert {w.dtype for w in role.trained()} == {learns}


@pytest.mark.parametrize("critic", ["head", "adapter"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_reward_model_and_ppo(kind, critic, prompts):
    rm = RewardModel(make(kind, torch.bfloat16), RewardConfig(lora=LORA)).requires_grad_(False)
    assert score_texts(rm, prompts, ANSWERS).isfinite().all()
    policy = PPO(rm, PPOConfig(lora=LORA, max_new_tokens=8, critic=critic))
    policy.learn()
    roll = sample(rm.vlm, prompts * 4, "actor", max_new_tokens=8)
    exp, info = experience_of(policy, rm, roll)
    assert abs(info["kl"]) < 1e-2
    optimizer = make_optimizer(policy.groups(), (0.9, 0.95))
    before = [p.clone() for p in policy.actor.trained()]
    loss, metrics = loss_of(policy, exp, range(8))
    loss.backward()
    assert loss.isfinite() and metrics["clipped"] == 0
    assert all(p.grad.dtype == torch.float32 for p in policy.actor.trained())
    optimizer.step()
    assert any((p != old).any() for p, old in zip(policy.actor.trained(), before))
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert moments and {m.dtype for m in moments} == {torch.float32}
    assert trunk_types(rm.vlm) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("lora", [LORA, COPY], ids=["adapter", "copy"])
def test_every_task_trains(dtype, lora, prompts):
    "Reward models of all kinds, DPO, GRPO: finite losses, and a gradient for what learns."
    pair = dict(image=prompts[0].image, prompt=prompts[0].text)
    group = [pair | dict(chosen="a red cat .", rejected="no .")]
    for norm in ("layer", "tanh", "none"):
        for kind, pooling in (("token", "last"), ("scalar", "mean"), ("scalar", "attention")):
            how = dict(lora=lora, granularity=kind, pooling=pooling, norm=norm)
            rm = RewardModel(make(dtype=dtype), RewardConfig(**how))
            learns(RewardTask(rm), [group], rm.role)
    task = DPOTask(make(dtype=dtype), DPOConfig(lora=lora))
    learns(task, [group], task.role)
    rm = RewardModel(make(dtype=dtype), RewardConfig(lora=LORA)).requires_grad_(False)
    cfg = GRPOConfig(lora=lora, answers_per_prompt=4, answers=8, minibatch=8, max_new_tokens=6)
    grpo = GRPO(rm, cfg, "actor")
    grpo.learn()
    roll = sample(rm.vlm, [p for p in prompts for _ in range(4)], "actor", max_new_tokens=6)
    exp, _ = experience_of(grpo, rm, roll)
    learns(grpo, [(exp, row) for row in range(8)], grpo.actor)


def learns(task, items, role):
    loss, _ = task(task.collate(items))
    loss.backward()
    grads = [p.grad for p in role.trained() if p.grad is not None]
    assert loss.isfinite() and grads
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("part", ["projector", "language"])
def test_sft_learns_in_single_precision(kind, part, prompts):
    vlm = make(kind, torch.bfloat16)
    learn_part(vlm, part)
    groups = sft_groups(vlm, SFTConfig(), part)
    loss, _ = SFTTask(vlm)(vlm.batch(prompts, ANSWERS))
    loss.backward()
    assert loss.isfinite() and types(vlm.projector) == {torch.float32}
    learned = [p for p in sum((g.params for g in groups), []) if p.grad is not None]
    assert learned and all(p.grad.isfinite().all() for p in learned)
    if part == "projector":
        assert types(vlm.language) == {torch.bfloat16}


def test_a_thawing_tower(prompts, tmp_path):
    vlm = make(dtype=torch.bfloat16)
    learn_part(vlm, "language")
    groups = sft_groups(vlm, SFTConfig(tower_lr=1e-3), "language")
    how = FitConfig(steps=2, batch=2, micro_batch=2)
    fit(SFTTask(vlm), lambda step: prompts, how, tmp_path / "fit", "half", groups=groups)
    assert all(p.isfinite().all() for p in vlm.model.parameters())
    assert learning(vlm.model, how).params


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_trunk_says_what_the_plain_model_says(kind, dtype, prompts):
    "Within the rounding of the plain model, which adds up in half precision; greedy answers, too."
    vlm, exact = make(kind, dtype), make(kind, dtype)
    exact.model.float()
    with torch.no_grad():
        ours, theirs = (v.answer_logits(full(v, prompts)) for v in (vlm, exact))
    assert_close(ours, theirs, atol=0.05, rtol=0.05)
    assert answer(vlm, prompts, 0.0, max_new_tokens=5) == answer(
        exact, prompts, 0.0, max_new_tokens=5
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_role_comes_and_goes(kind, dtype, prompts, tmp_path):
    "State, exported adapter, exported model: loaded again, on a trunk in half precision."
    vlm = make(kind, dtype)
    vlm.model.save_pretrained(tmp_path / "trunk")
    vlm.add_role("actor", LORA)
    shake(vlm, "actor")
    batch = full(vlm, prompts)
    with torch.no_grad():
        want, trunk = vlm.answer_logits(batch, "actor"), vlm.answer_logits(batch)
    other = make(kind, dtype)
    other.add_role("actor", LORA).load(vlm.roles["actor"].state())
    assert torch.equal(other.answer_logits(batch, "actor"), want)
    with merged(vlm, "actor") as role, torch.no_grad():
        assert role == "actor" and torch.equal(vlm.answer_logits(batch, role), want)

    save_adapter(vlm, "actor", tmp_path / "adapter", tmp_path / "trunk")
    model = type(vlm.model).from_pretrained(tmp_path / "trunk")
    model = PeftModel.from_pretrained(model, tmp_path / "adapter").get_base_model().to(DEVICE)
    loaded = VLM(model.requires_grad_(False), vlm.processor)
    loaded.roles["default"] = Role("default", loaded.language)
    # peft rounds an adapter to its trunk's type while it loads it
    near = 1e-2 if DEVICE == "cpu" else 3e-2
    assert_close(loaded.answer_logits(batch, "default"), want, atol=near, rtol=near)

    whole = plain_model(vlm, "actor")
    assert types(whole) == {dtype}
    with torch.no_grad():
        folded = VLM(whole, vlm.processor).answer_logits(batch)
    off, moved = (folded - want).abs().mean(), (trunk - want).abs().mean()
    assert off < 0.1 * moved, "rounded once, and no more"


@pytest.mark.parametrize("role", ["copied", None])
def test_a_model_in_half_precision_is_saved_as_such(role, prompts, tmp_path):
    vlm = make(dtype=torch.bfloat16)
    vlm.add_role("copied", COPY)
    batch = full(vlm, prompts)
    plain = VLM(plain_model(vlm, role), vlm.processor)
    save_vlm(plain, tmp_path / "saved")
    again = load_vlm(tmp_path / "saved")
    assert types(again.model) == {torch.bfloat16}
    with torch.no_grad():
        # `to` has rounded the frequencies of positions, too; loading does not
        want = vlm.answer_logits(batch, role)
        assert_close(again.answer_logits(batch), want, atol=1e-2, rtol=1e-2)
