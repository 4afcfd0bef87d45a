"""Every family of VLMs goes through the same SFT step, log-probabilities, sampling, reward head and
PPO step. Tiny random models of the real classes with the real processors, in float64 so that
rounding hides nothing. What single families do differently stands in `test_single_families.py`."""

import copy
from dataclasses import replace

import pytest
import torch
from small_models import experience_of, loss_of, shake
from torch import nn
from torch.testing import assert_close

from vlmrlhf_course.base.launch import make_accelerator
from vlmrlhf_course.data.prompts import Prompt, open_image, references
from vlmrlhf_course.model.family import FAMILIES, tiny_model
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vlm import VLM, answer, token_logprobs
from vlmrlhf_course.rl.ppo import PPO, PPOConfig
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.train.fit import backward_through
from vlmrlhf_course.train.reward import RewardConfig, RewardModel, score_texts
from vlmrlhf_course.train.sft import SFTTask

SMALL_LORA = LoRAConfig(r=2, alpha=4)
TEXT_ONLY = [k for k in FAMILIES if k != "paligemma"]


def close(a, b):
    assert_close(a, b, atol=1e-9, rtol=1e-7)


def logprobs(vlm, batch, role=None):
    allowed = vlm.rule_out(vlm.answer_logits(batch, role))
    return token_logprobs(allowed, batch.answers) * batch.answer_mask


def answered(vlm, prompts):
    "The batch of prompts with their own answers."
    return vlm.batch(prompts, [p.answer for p in prompts])


def vlm_of(kind):
    "A family's tiny model, in float64."
    model, processor = tiny_model(kind)
    vlm = VLM(model.double().requires_grad_(False), processor)
    vlm.kind = kind
    return vlm


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=list(FAMILIES))
def base(request):
    return vlm_of(request.param)


@pytest.fixture
def vlm(base):
    return copy.deepcopy(base)


@pytest.fixture
def prompts(vlm, pictures):
    "One picture, two, none (where the family can do without), one again; of different lengths."
    a, b, c = pictures
    text = Prompt("text", "what colour is a boat ?", "blue .")
    if vlm.kind not in TEXT_ONLY:
        text = Prompt("text", "what ?", "blue .", b)
    return [
        Prompt("detail", "describe the picture .", "a red cat .", a),
        Prompt("detail", "which of the two pictures is the one ?", "yes .", (b, c)),
        text,
        Prompt("detail", "is there a boat ?", "no a small boat .", c),
    ]


@pytest.fixture
def full(vlm, prompts):
    return answered(vlm, prompts)


def from_pixels(vlm, prompt):
    "What the family's processor makes of a prompt: only the choice of the template is ours."
    refs = references(prompt.image)
    content = [{"type": "image"}] * len(refs) + [{"type": "text", "text": prompt.text}]
    said = "<image>" * len(refs) + prompt.text
    if vlm.processor.chat_template:
        said = vlm.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    images = [[open_image(r) for r in refs]] if refs else None
    return dict(
        vlm.processor(text=[said], images=images, add_special_tokens=False, return_tensors="pt")
    )


def plain(vlm, prompt, ids=()):
    "The same with an answer's tokens behind it: inputs of the family's own forward pass."
    x = from_pixels(vlm, prompt)
    x.pop("labels", None)
    new = torch.tensor([list(ids)], dtype=torch.long)
    suffix = int(vlm.kind == "paligemma")  # its types tell what was asked from what is answered
    fills = dict(attention_mask=1, mm_token_type_ids=0, token_type_ids=suffix)
    for key, fill in fills.items():
        if key in x:
            x[key] = torch.cat([x[key], torch.full_like(new, fill)], 1)
    x["input_ids"] = torch.cat([x["input_ids"], new], 1)
    floats = [k for k, v in x.items() if torch.is_tensor(v) and v.is_floating_point()]
    return x | {k: x[k].double() for k in floats}


@torch.no_grad()
def test_cached_features_give_the_logits_of_the_plain_model(vlm, prompts, full):
    "The padded batch with kept features, against the model's own pass, row by row, from pixels."
    ours = vlm.answer_logits(full)
    for _ in range(2):  # the second time from the cache
        for i, p in enumerate(prompts):
            ids = full.answers[i, full.answer_mask[i]].tolist()
            x = plain(vlm, p, ids)
            theirs = x["input_ids"][0, : -len(ids)].tolist()
            assert vlm.prompt_ids(p) == theirs, "another prompt than the processor's"
            want = vlm.model(**x).logits[0, -len(ids) - 1 : -1]
            assert want.std() > 0.05
            assert_close(ours[i, : len(ids)], want, atol=1e-5, rtol=1e-5)
        before = vlm.encoded
        ours = vlm.answer_logits(answered(vlm, prompts))
        assert vlm.encoded == before


@torch.no_grad()
def test_every_picture_matters(vlm, prompts, full):
    "Each of a prompt's pictures, and their order, for the row they belong to and no other."
    want = logprobs(vlm, full)
    for row, p in enumerate(prompts):
        refs = references(p.image)
        for k in range(len(refs)):
            changed = list(prompts)
            changed[row] = replace(p, image=(*refs[:k], "blank", *refs[k + 1 :]))
            moved = (logprobs(vlm, answered(vlm, changed)) - want).abs().amax(1) > 1e-7
            assert moved.tolist() == [j == row for j in range(len(prompts))]


@torch.no_grad()
def test_padding_and_company_do_not_matter(vlm, prompts, full):
    want = logprobs(vlm, full)
    for i, p in enumerate(prompts):
        alone = logprobs(vlm, answered(vlm, [p]))
        close(alone[0], want[i, : alone.shape[1]])
    longer = Prompt("x", "describe the picture . " * 6, "a boat . " * 5, prompts[0].image)
    padded = answered(vlm, [longer, *prompts, longer])  # more padding on both sides
    close(logprobs(vlm, padded)[1:-1, : want.shape[1]], want)
    order = torch.tensor([3, 1, 1, 0])
    part = full.rows(order)
    close(logprobs(vlm, part), want[order][:, : part.answers.shape[1]])
    none = full.rows(torch.tensor([2]))
    close(logprobs(vlm, none), want[2:3, : none.answers.shape[1]])


def love(vlm, ids, by):
    "Raise the logits of some tokens."

    def raised(module, args, out):
        more = torch.full((*out.shape[:-1], len(ids)), by, dtype=out.dtype)
        return out.index_add(-1, torch.tensor(ids), more)

    vlm.model.get_output_embeddings().register_forward_hook(raised)


@torch.no_grad()
def test_sampled_logprobs_are_those_of_the_forward_pass(vlm, prompts):
    vlm.add_role("actor", SMALL_LORA)
    shake(vlm, "actor", std=0.1)
    love(vlm, [vlm.eos_id], 2.0 if vlm.kind != "paligemma" else 5.0)  # its vocabulary is large
    ended = []
    for role, temperature in ((None, 1.0), ("actor", 0.7)):
        roll = sample(
            vlm, prompts * 4, role, temperature, max_new_tokens=7, seed=2, drop=1 / 8, merge=True
        )
        b, m = roll.batch, roll.batch.answer_mask
        again = token_logprobs(vlm.rule_out(vlm.answer_logits(b, role)), b.answers, temperature)
        close(again[m], roll.logprobs[m])
        ended += roll.ended.tolist()
    assert 2 < sum(ended) < len(ended) - 2, "all rows end alike: this tests little"


@torch.no_grad()
def test_greedy_answers_are_those_of_generate(vlm, prompts):
    "Token by token: `sample` near temperature 0, `answer`, and the model's own `generate`."
    roll = sample(vlm, prompts, temperature=1e-6, max_new_tokens=8)
    ours = [row[m].tolist() for row, m in zip(roll.batch.answers, roll.batch.answer_mask)]
    assert len({tuple(o) for o in ours}) > 1
    for p, said in zip(prompts, ours):
        x = plain(vlm, p)
        out = vlm.model.generate(
            **x,
            max_new_tokens=8,
            do_sample=False,
            suppress_tokens=vlm.banned_ids,
            eos_token_id=vlm.eos_id,
            pad_token_id=vlm.pad_id,
        )
        assert out[0, x["input_ids"].shape[1] :].tolist() == said
    texts = vlm.tokenizer.batch_decode(roll.batch.answers, skip_special_tokens=True)
    assert answer(vlm, prompts, 0.0, max_new_tokens=8) == texts


@torch.no_grad()
def test_placeholders_are_never_sampled(vlm, prompts):
    assert vlm.image_token_id in vlm.banned_ids
    love(vlm, vlm.banned_ids, 30.0)
    roll = sample(vlm, prompts * 5, max_new_tokens=6, seed=1)
    said = roll.batch.answers[roll.batch.answer_mask]
    assert len(said) > 80 and not torch.isin(said, torch.tensor(vlm.banned_ids)).any()
    vlm.hidden(roll.batch)  # no mismatch


def test_an_sft_step_lowers_the_loss(vlm, prompts):
    for part in (vlm.projector, vlm.language, vlm.model.get_output_embeddings()):
        part.requires_grad_(True)
    task = SFTTask(vlm)
    params = [p for p in task.parameters() if p.requires_grad]
    opt, losses = torch.optim.SGD(params, 0.05), []
    for _ in range(3):
        losses.append(backward_through(task, prompts, 2, make_accelerator())[0])
        opt.step()
        opt.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    tower = vlm.family.tower_parameters(vlm.model)
    assert all(p.grad is None for p in tower), "the tower is frozen"


def reached(p):
    "Has a gradient that is not nothing come to a parameter?"
    return p.grad is not None and bool(p.grad.abs().sum() > 0)


def test_gradients_reach_projector_and_thawed_tower(vlm, prompts):
    vlm.projector.requires_grad_(True)
    logprobs(vlm, answered(vlm, prompts)).sum().backward()
    assert all(reached(p) for p in vlm.projector.parameters() if p.dim() > 1)
    assert len(vlm._features), "a projector that trains is no reason to forget what the tower saw"
    tower = vlm.family.tower_parameters(vlm.model)
    for p in tower:
        p.requires_grad_(True)
    logprobs(vlm, answered(vlm, prompts)).sum().backward()
    assert sum(reached(p) for p in tower) > 10 and vlm.tower_trains and not vlm._features


@pytest.mark.parametrize("kind", ["token", "scalar"])
def test_reward_model(vlm, prompts, kind):
    torch.manual_seed(0)
    rm = RewardModel(vlm, RewardConfig(lora=SMALL_LORA, granularity=kind)).double()
    rm.requires_grad_(False)
    nn.init.normal_(rm.head.out.weight)
    said = [p.answer for p in prompts]
    rewards = score_texts(rm, prompts, said)
    assert rewards.shape == (4,) and rewards.isfinite().all()
    close(rewards, torch.cat([score_texts(rm, [p], [a]) for p, a in zip(prompts, said)]))
    blank = score_texts(rm, prompts, said, ["blank"] * len(prompts))
    assert ((blank - rewards).abs() > 1e-9).tolist() == [p.image is not None for p in prompts]


@pytest.fixture(params=["head", "adapter"])
def experience(request, vlm, prompts):
    "PPO (its critic a head or an adapter), a rollout of eight answers, what it makes of them."
    torch.manual_seed(0)
    cfg = PPOConfig(lora=SMALL_LORA, max_new_tokens=5, critic=request.param)
    rm = RewardModel(vlm, RewardConfig(lora=SMALL_LORA)).double().requires_grad_(False)
    policy = PPO(rm, cfg).double()
    nn.init.normal_(policy.critic.head.out.weight, std=0.1)
    shake(vlm, "actor", std=0.02)
    policy.learn()
    roll = sample(vlm, prompts * 2, "actor", max_new_tokens=5, seed=3)
    exp, info = experience_of(policy, rm, roll)
    assert info["kl"] != 0 and exp.tokens["advantages"][roll.batch.answer_mask].isfinite().all()
    return policy, roll, exp


def test_values_alone_as_in_company(experience):
    "Rows with one picture, two and none."
    policy, roll, exp = experience
    for i in range(4):
        states = exp.states
        if states is not None:
            states = states[i : i + 1, : int(roll.batch.lengths[i]) + 1]
        row = policy.values(roll.batch.rows(torch.tensor([i])), states)
        close(row[0, :-1].detach(), exp.tokens["values"][i, : row.shape[1] - 1])


def test_a_ppo_step(experience):
    "Gradients reach adapters and value head alone; the policy moves, the reference does not."
    policy, roll, exp = experience
    vlm = policy.vlm
    reference = logprobs(vlm, roll.batch).detach()
    _, metrics = loss_of(policy, exp, range(8))
    mean = float(exp.tokens["advantages"][roll.batch.answer_mask].mean())
    assert metrics["clipped"] == 0, "the first ratio is 1"
    assert abs(metrics["policy_loss"] + mean) < 1e-6, "the first ratio is 1"
    items = [(exp, i) for i in (5, 0, 1, 2, 3, 4, 6, 7)]
    backward_through(policy, items, 3, make_accelerator(), shard=False)
    touched = {name for name, p in policy.named_parameters() if reached(p)}
    actor = {n for n in touched if ".lora_" in n and ".actor." in n}
    critic = {n for n in touched if ".lora_" in n and ".actor_critic." in n}
    value = {n for n in touched if n.startswith("critic.head.")}
    assert touched == actor | critic | value
    assert actor and any(n.startswith("critic.head.attend") for n in value)
    assert bool(critic) == (policy.cfg.critic == "adapter")
    torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], 1e-2).step()
    assert torch.equal(logprobs(vlm, roll.batch), reference)
    assert not torch.allclose(logprobs(vlm, roll.batch, "actor"), roll.logprobs, atol=1e-6)


def test_a_full_copy_as_a_role(vlm, prompts, full):
    "Language-model-only RLHF without adapters: sampling and `generate` speak with the copy."
    want = logprobs(vlm, full).detach()
    vlm.add_role("actor", LoRAConfig(r=0))
    close(logprobs(vlm, full, "actor").detach(), want)
    with torch.no_grad():
        vlm.roles["actor"].copy[1].weight.mul_(-1)
    roll = sample(vlm, prompts[:2], "actor", temperature=1e-6, max_new_tokens=4)
    texts = vlm.tokenizer.batch_decode(roll.batch.answers, skip_special_tokens=True)
    assert answer(vlm, prompts[:2], 0.0, role="actor", max_new_tokens=4) == texts
    close(logprobs(vlm, full).detach(), want)
