"""Layers that are computed again on the way back, and logits in slices: the same gradients, in less
memory."""

import pytest
import torch
from report_models import COPY, DEVICE, LORA, full, make, prompts, shake  # noqa: F401 (fixture)
from small_models import experience_of, loss_of
from torch import nn
from torch.testing import assert_close
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.model.family import FAMILIES, WORDS, tiny_model
from vlmrlhf_course.model.memory import MOST_LOGITS, Limits, of_tokens, recomputing
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vlm import VLM, token_logprobs
from vlmrlhf_course.report.evaluate import EvaluateConfig, likelihood, speak
from vlmrlhf_course.rl.algorithm import read_answers
from vlmrlhf_course.rl.grpo import GRPO, GRPOConfig
from vlmrlhf_course.rl.ppo import PPO, PPOConfig
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.rl.state import where_it_moved
from vlmrlhf_course.train.dpo import DPOConfig, DPOTask
from vlmrlhf_course.train.reward import RewardConfig, RewardModel, RewardTask
from vlmrlhf_course.train.sft import SFTConfig, SFTTask, learn_part, sft_groups
from vlmrlhf_course.world.pretrain import pretrained_vlm

AGAIN = Limits(gradient_checkpointing=True)
SOME = ["llava", "qwen2_5_vl", "gemma3"]
CASES = [(kind, torch.float32) for kind in FAMILIES] + [(kind, torch.bfloat16) for kind in SOME]


def both_ways(vlm, loss):
    "Gradients by name: as they are, and with layers that are computed again."
    found = []
    for limits in (Limits(), AGAIN):
        vlm.limits = limits
        vlm.model.zero_grad()
        for role in vlm.roles.values():
            role.zero_grad()
        loss().backward()
        owned = [(f"{name}.{k}", w) for name, r in vlm.roles.items() for k, w in r.own().items()]
        learned = [*vlm.model.named_parameters(), *owned]
        found.append({k: w.grad.clone() for k, w in learned if w.grad is not None})
    vlm.limits = Limits()
    assert found[0] and found[0].keys() == found[1].keys()
    return found


def check(vlm, loss, error=1e-6):
    "Raise where gradients differ, or are all 0; says by how much."
    plain, again = both_ways(vlm, loss)
    size = sum(float(g.norm()) ** 2 for g in plain.values()) ** 0.5
    off = sum(float((again[k] - g).norm()) ** 2 for k, g in plain.items()) ** 0.5
    assert size > 0 and off < error * size, f"{off / size:.1e}"


def pairs_about(prompts):
    said = dict(chosen="a red cat .", rejected="no .")
    return [[dict(image=p.image, prompt=p.text) | said] for p in prompts]


def judged(kind, dtype, **more) -> RewardModel:
    rm = RewardModel(make(kind, dtype), RewardConfig(lora=LORA, **more))
    shake(rm.vlm, "reward", 0.1)
    return rm


# --- the same gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind, dtype", CASES)
def test_a_step_of_the_reward_model(kind, dtype, prompts):
    rm = judged(kind, dtype)
    rm.vlm.add_role("actor", LORA)
    shake(rm.vlm, "actor")  # who stands by must not be heard
    task = RewardTask(rm)
    batch = task.collate(pairs_about(prompts))
    check(rm.vlm, lambda: task(batch)[0])


@pytest.mark.parametrize("critic", ["head", "adapter"])
@pytest.mark.parametrize("kind, dtype", CASES)
def test_a_step_of_ppo(kind, critic, dtype, prompts):
    rm = judged(kind, dtype).requires_grad_(False)
    policy = PPO(rm, PPOConfig(lora=LORA, max_new_tokens=6, critic=critic, anchor=0.5))
    policy.learn()
    shake(rm.vlm, "actor", 0.05)
    for p in policy.critic.head.parameters():
        nn.init.normal_(p, std=0.3)
    roll = sample(rm.vlm, prompts * 3, "actor", max_new_tokens=6)
    exp, _ = experience_of(policy, rm, roll)
    exp.remember = tuple(prompts)
    part = policy.collate([(exp, row) for row in range(6)])
    check(rm.vlm, lambda: policy(part)[0])


@pytest.mark.parametrize("lora", [LORA, COPY], ids=["adapter", "copy"])
@pytest.mark.parametrize("kind, dtype", CASES)
def test_a_step_of_dpo(kind, lora, dtype, prompts):
    vlm = make(kind, dtype)
    task = DPOTask(vlm, DPOConfig(lora=lora))
    shake(vlm, "dpo", 0.1 if lora.r else 0.01)
    batch = task.collate(pairs_about(prompts))
    check(vlm, lambda: task(batch)[0])


def test_a_step_of_grpo_with_packed_answers(prompts):
    rm = judged("llava", torch.float32).requires_grad_(False)
    cfg = GRPOConfig(lora=LORA, answers_per_prompt=4, answers=8, minibatch=8, max_new_tokens=6)
    grpo = GRPO(rm, cfg, "actor")
    grpo.learn()
    shake(rm.vlm, "actor", 0.05)
    roll = sample(rm.vlm, [p for p in prompts for _ in range(4)], "actor", max_new_tokens=6)
    exp, _ = experience_of(grpo, rm, roll)
    check(rm.vlm, lambda: loss_of(grpo, exp, range(8))[0])


@pytest.mark.parametrize("kind, dtype", CASES)
def test_sft_with_a_thawing_tower(kind, dtype, prompts):
    "Language model, projector, and a tower whose layers are computed again, too."
    vlm = make(kind, dtype)
    learn_part(vlm, "language")
    sft_groups(vlm, SFTConfig(tower_lr=1e-3), "language")
    task = SFTTask(vlm)
    check(vlm, lambda: task(task.collate(prompts))[0], 3e-6)


def test_dropout_draws_the_same_again(prompts):
    rm = RewardModel(make(), RewardConfig(lora=LoRAConfig(r=2, alpha=4, dropout=0.5)))
    shake(rm.vlm, "reward", 0.3)
    task = RewardTask(rm.train())
    batch = task.collate(pairs_about(prompts))

    def loss():
        torch.manual_seed(5)
        return task(batch)[0]

    check(rm.vlm, loss)


# --- less memory ----------------------------------------------------------------------------------


def saved_bytes(vlm, loss) -> int:
    "Of what waits for the way back: tensors that autograd has saved, and inputs of the layers."
    found = {}

    def note(x):
        if torch.is_tensor(x):
            found[x.untyped_storage().data_ptr()] = x  # kept, or its place would be given away
        return x

    def inputs(module, args, kwargs):
        for x in (*args, *kwargs.values()):
            note(x)

    layers = [m for m in vlm.language.modules() if isinstance(m, GradientCheckpointingLayer)]
    hooks = [m.register_forward_pre_hook(inputs, with_kwargs=True) for m in layers]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss()
    for hook in hooks:
        hook.remove()
    weights = {p.untyped_storage().data_ptr() for p in vlm.model.parameters()}
    return sum(x.untyped_storage().nbytes() for at, x in found.items() if at not in weights)


@pytest.mark.parametrize("kind, dtype", [*CASES[-3:], ("llava", torch.float32)])
def test_less_waits_for_the_way_back(kind, dtype, prompts):
    vlm = make(kind, dtype)
    vlm.add_role("actor", LORA)
    batch = full(vlm, prompts * 4)
    found = []
    for vlm.limits in (Limits(), AGAIN):
        found.append(saved_bytes(vlm, lambda: vlm.hidden(batch, "actor")))
    assert found[1] < found[0] / 5, found


# --- nothing else ---------------------------------------------------------------------------------


def test_sampling_is_left_as_it_is(prompts, monkeypatch):
    "No layer is wrapped without gradients, nor where a cache is filled."
    vlm = make()
    vlm.add_role("actor", LORA)
    shake(vlm, "actor")
    want = sample(vlm, prompts, "actor", max_new_tokens=6)
    vlm.limits = AGAIN

    def never(*args):
        raise AssertionError("a layer would be computed again")

    monkeypatch.setattr("vlmrlhf_course.model.memory.recomputing", never)
    roll = sample(vlm, prompts, "actor", max_new_tokens=6)
    assert torch.equal(roll.logprobs, want.logprobs)
    with torch.no_grad():
        vlm.hidden(full(vlm, prompts), "actor")
    with pytest.raises(AssertionError):
        vlm.hidden(full(vlm, prompts), "actor")


def test_layers_are_given_back(prompts):
    "Also where a pass fails, and where a library has put its own forward in."
    vlm = make()
    vlm.add_role("actor", LORA)
    layers = [m for m in vlm.language.modules() if isinstance(m, GradientCheckpointingLayer)]
    own = layers[0].forward
    vars(layers[0])["forward"] = own
    with pytest.raises(ZeroDivisionError), recomputing(vlm.language, lambda: vlm.acting("actor")):
        assert all("forward" in vars(m) for m in layers)
        1 / 0
    assert vars(layers[0]).pop("forward") is own
    assert not any("forward" in vars(m) for m in layers)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(UserError, match="Linear has no layers for it; set it to false"):
        with recomputing(nn.Linear(2, 2), lambda: None):
            pass


# --- logits in slices -----------------------------------------------------------------------------


@pytest.fixture
def sliced(monkeypatch):
    "Call it, and logits come in slices of seven tokens. Gives how many numbers each slice has."
    made, plain = [], VLM.logits

    def counted(self, hidden, role=None):
        out = plain(self, hidden, role)
        made.append(out.numel())
        return out

    monkeypatch.setattr(VLM, "logits", counted)

    def few(vlm):
        made.clear()
        monkeypatch.setattr("vlmrlhf_course.model.memory.MOST_LOGITS", 7 * vlm.words + 3)
        return made

    return few


def slopes(loss, weights):
    return torch.autograd.grad(loss, weights, allow_unused=True)


def near(few, whole):
    for a, b in zip(few, whole, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind, dtype", CASES)
def test_tasks_in_slices(kind, dtype, prompts, sliced):
    "Losses and gradients of PPO with an anchor, of DPO with a copy, and of SFT."
    rm = judged(kind, dtype).requires_grad_(False)
    vlm = rm.vlm
    policy = PPO(rm, PPOConfig(lora=LORA, max_new_tokens=6, anchor=0.5))
    policy.learn()
    shake(vlm, "actor", 0.1)
    exp, _ = experience_of(policy, rm, sample(vlm, prompts * 3, "actor", max_new_tokens=6))
    exp.remember = tuple(prompts)
    part = policy.collate([(exp, row) for row in range(6)])
    dpo = DPOTask(vlm, DPOConfig(lora=COPY))
    batch = dpo.collate(pairs_about(prompts))
    sft = SFTTask(vlm, "actor")
    told = sft.collate(prompts * 3)

    def everything():
        (paid, figures), wanted = policy(part), dpo(batch)[0]
        losses = [paid, wanted, sft(told)[0]]
        found = [slopes(losses[i], r.trained()) for i, r in ((0, policy.actor), (1, dpo.role))]
        return [*losses, torch.tensor(figures["entropy"])], *found

    whole = everything()
    made = sliced(vlm)
    few = everything()
    assert made and max(made) <= 7 * vlm.words
    for a, b in zip(few, whole):
        near(a, b)


def test_scores_in_slices(prompts, sliced):
    "What is read without gradients: the reference, KL of several kinds, likelihoods."
    rm = judged("llava", torch.float32).requires_grad_(False)
    vlm, said = rm.vlm, [p.answer for p in prompts * 3]
    policy = PPO(rm, PPOConfig(lora=LORA, max_new_tokens=6))
    shake(vlm, "actor", 0.1)
    roll = sample(vlm, prompts * 3, "actor", max_new_tokens=6)

    def everything():
        reading = read_answers(rm, roll, 8)
        moved = where_it_moved(policy, roll, reading)
        _, kl = speak(vlm, prompts * 3, "actor", temperature=0.8)
        return (
            reading.ref,
            likelihood(vlm, prompts * 3, said),
            *map(torch.tensor, moved.values()),
            kl,
        )

    with torch.no_grad():
        *whole, kl = everything()
        made = sliced(vlm)
        *few, again = everything()
    assert made and max(made) <= 7 * vlm.words
    near(few, whole)
    assert abs(again - kl) < 1e-4 and kl > 0.01


def test_little_is_alive_on_the_way_back(prompts, sliced):
    "Of all logits nothing waits: a slice is made again when its turn comes."
    model, processor = tiny_model("llava", [*WORDS, *(f"word{i}" for i in range(3000))])
    vlm = VLM(model.requires_grad_(False).to(DEVICE), processor)
    vlm.add_role("actor", LORA)
    batch, found = full(vlm, prompts * 8), []

    def loss():
        def said(tokens, logits):
            return token_logprobs(vlm.rule_out(logits), tokens)

        return of_tokens(vlm, batch, said, "actor").sum()

    states = saved_bytes(vlm, lambda: vlm.answer_states(batch, "actor"))
    found.append(saved_bytes(vlm, loss) - states)
    sliced(vlm)
    found.append(saved_bytes(vlm, loss) - states)
    assert found[1] < found[0] / 10, found


def test_the_drawn_world_never_reaches_the_bound():
    "Of everything that is computed at once there: pictures of a report, and the longest answers."
    vlm = pretrained_vlm(0)
    assert EvaluateConfig().scenes * (PPOConfig().max_new_tokens + 1) * vlm.words < MOST_LOGITS
