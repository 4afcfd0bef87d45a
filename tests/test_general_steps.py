"""SFT, sampling in a role, reward model, values and a copy of the language model, as every family
goes through them (`test_families.py`): here with types that only the general family runs. One looks
across at pictures, the other cuts a picture that is alone into tiles."""

import pytest
import torch
from other_models import tiny_other
from other_specs import OTHERS
from small_models import loss_of
from test_families import (  # noqa: F401 (tests and fixtures)
    close,
    experience,
    full,
    prompts,
    reached,
    seed,
    test_a_full_copy_as_a_role,
    test_an_sft_step_lowers_the_loss,
    test_greedy_answers_are_those_of_generate,
    test_padding_and_company_do_not_matter,
    test_placeholders_are_never_sampled,
    test_reward_model,
    test_sampled_logprobs_are_those_of_the_forward_pass,
    test_values_alone_as_in_company,
    vlm,
)

from vlmrlhf_course.base.launch import make_accelerator
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.vlm import VLM, load_vlm, save_vlm, token_logprobs
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.train.fit import backward_through


@pytest.fixture(scope="module", params=["llava_onevision", "mllama"])
def base(request):
    model, processor = tiny_other(request.param, seed=1)
    vlm = VLM(model.double().requires_grad_(False), processor)
    vlm.kind = request.param
    return vlm


def test_a_ppo_step(experience):  # noqa: F811
    "Gradients reach the actor's adapter and the critic; what learns is what moves."
    policy, roll, exp = experience
    _, metrics = loss_of(policy, exp, range(8))
    mean = float(exp.tokens["advantages"][roll.batch.answer_mask].mean())
    assert metrics["clipped"] == 0 and abs(metrics["policy_loss"] + mean) < 1e-6
    items = [(exp, i) for i in (5, 0, 1, 2, 3, 4, 6, 7)]
    backward_through(policy, items, 3, make_accelerator(), shard=False)
    touched = {name for name, p in policy.named_parameters() if reached(p)}
    assert any(".lora_" in n and ".actor." in n for n in touched)
    assert any(n.startswith("critic.head.") for n in touched)
    assert all(".lora_" in n or n.startswith("critic.head.") for n in touched)


@torch.no_grad()
def test_saved_and_loaded(base, prompts, tmp_path):  # noqa: F811
    save_vlm(base, tmp_path / "model")
    again = load_vlm(tmp_path / "model")
    said = [p.answer for p in prompts]
    a, b = (v.answer_logits(v.batch(prompts, said)) for v in (base, again))
    close(a, b)


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_the_first_ratio_is_1_in_half_precision(kind, pictures):
    model, processor = tiny_other(kind)
    vlm = VLM(model.to(torch.bfloat16).requires_grad_(False), processor)  # noqa: F811
    roll = sample(vlm, [Prompt("x", "is there a boat ?", "", pictures[0])], max_new_tokens=3)
    now = vlm.rule_out(vlm.answer_logits(roll.batch))
    now = token_logprobs(now, roll.batch.answers)
    assert (now - roll.logprobs).abs().max() < 1e-4
