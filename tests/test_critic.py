"The critic: a value for each token, and which weights learn."

from dataclasses import replace

import pytest
import torch
from report_models import make, shake
from small_models import close, two_pictures, values

from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.rl.ppo import PPO, PPOConfig
from vlmrlhf_course.train.reward import RewardConfig, RewardModel


def test_there_is_a_value_for_each_token_and_it_does_not_see_the_future(
    policy, token_rm, vlm, full
):
    want = values(policy, token_rm, full)
    assert want.shape == (len(full), full.answers.shape[1] + 1)
    for t in (0, 1, 3):
        b = replace(full, input_ids=full.input_ids.clone())
        b.input_ids[:, b.prompt_length + t] = vlm.tokenizer.convert_tokens_to_ids("moon")
        got, real = values(policy, token_rm, b), full.lengths > t
        close(got[:, : t + 1], want[:, : t + 1])  # V(s_t) is known before token t is chosen
        felt = (got[real, t + 1] - want[real, t + 1]).abs() > 1e-9
        assert felt.all(), "the value after a token must see it"


def test_values_see_the_picture_and_not_the_company(policy, token_rm, vlm, prompts, full):
    want = values(policy, token_rm, full)
    blank = vlm.batch(prompts, [p.answer for p in prompts], images=["blank"] * len(prompts))
    felt = (values(policy, token_rm, blank) - want).abs().amax(1) > 1e-9
    assert felt.tolist() == [p.image is not None for p in prompts]
    for i in range(len(prompts)):
        row = values(policy, token_rm, full.rows(torch.tensor([i])))
        close(row[0], want[i, : row.shape[1]])


def test_values_with_several_pictures(policy, token_rm, vlm, prompts):
    asked = two_pictures(prompts)
    b = vlm.batch(asked, [p.answer for p in asked])
    want = values(policy, token_rm, b)
    for i in range(len(asked)):
        row = values(policy, token_rm, b.rows(torch.tensor([i])))
        close(row[0], want[i, : row.shape[1]])


def test_a_critic_of_its_own_starts_as_the_reward_model(policy, vlm, full):
    if policy.cfg.critic == "adapter":
        assert torch.equal(vlm.hidden(full, "actor_critic"), vlm.hidden(full, "reward"))
    else:
        assert "actor_critic" not in vlm.roles
        assert not any(".actor_critic." in n for n, _ in policy.named_parameters())


def test_what_learns(policy):
    groups = policy.groups()
    name = {id(p): n for n, p in policy.named_parameters()}
    of_actor, of_critic = ([name[id(p)] for p in group.params] for group in groups)
    assert [group.peak for group in groups] == [policy.cfg.actor_lr, policy.cfg.critic_lr]
    assert of_actor and all(".actor." in n for n in of_actor)
    head = [n for n in of_critic if n.startswith("critic.head.")]
    adapter = [n for n in of_critic if ".actor_critic." in n]
    assert {*head} == {n for n, _ in policy.named_parameters() if n.startswith("critic.head.")}
    assert head and {*of_critic} == {*head, *adapter}
    assert bool(adapter) == (policy.cfg.critic == "adapter")
    learning = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert learning == {*of_actor, *of_critic}


ACTOR = LoRAConfig(r=2, alpha=4)


@pytest.mark.parametrize(
    "reward",
    [
        LoRAConfig(r=2, alpha=4, targets=("q_proj", "v_proj")),
        LoRAConfig(r=4, alpha=4),
        LoRAConfig(r=2, alpha=16),  # fits in silence, and would say something else
        LoRAConfig(r=0),
    ],
    ids=["other layers", "other rank", "other scale", "copy"],
)
@pytest.mark.parametrize("swap", [False, True])
def test_a_critic_starts_as_a_reward_model_of_another_shape(reward, swap):
    "Not of the actor's: with `lora` of its own, it would be another model, or none."
    reward, actor = (ACTOR, reward) if swap else (reward, ACTOR)
    vlm = make("llava")
    rm = RewardModel(vlm, RewardConfig(lora=reward))
    shake(vlm, "reward", 0.1 if reward.r else 0.01)
    PPO(rm, PPOConfig(lora=actor, critic="adapter"))
    shake(vlm, "actor", 0.1 if actor.r else 0.01)
    prompts = [Prompt("", "is it red ?", "yes", None)] * 2
    batch = vlm.batch(prompts, ["yes .", "no , a boat ."])
    with torch.no_grad():
        want = vlm.hidden(batch, "reward")
        assert torch.equal(vlm.hidden(batch, "actor_critic"), want)
        assert not torch.allclose(vlm.hidden(batch, "actor"), want)
