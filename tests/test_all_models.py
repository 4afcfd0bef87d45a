"""Every type of models that has been run, with a family of its own or by the general one, against
plain transformers: `model(**processor(pictures, question and answer))`, a row at a time, in single
precision. The rows have one picture, two of different sizes, none, and one again; their prompts and
answers differ in length, so that there is padding on both sides."""

import pytest
import torch
from other_models import OTHERS, tiny_other
from torch.testing import assert_close

from vlmrlhf_course.data.prompts import Prompt, open_image, references
from vlmrlhf_course.model.family import FAMILIES, tiny_model
from vlmrlhf_course.model.vlm import VLM, answer, token_logprobs
from vlmrlhf_course.rl.rollout import sample

KINDS = sorted({*FAMILIES, *OTHERS})
NEAR = 2e-6
# sums over a prompt in blocks, and token by token while sampling: rounded otherwise
RECURRENT = dict(qwen3_5=2e-5, qwen3_5_moe=2e-5)


@pytest.fixture(scope="module", params=KINDS)
def vlm(request):
    torch.manual_seed(0)
    tiny = tiny_model if request.param in FAMILIES else tiny_other
    vlm = VLM(*tiny(request.param))
    vlm.model.requires_grad_(False)
    return vlm


@pytest.fixture
def prompts(vlm, pictures):
    a, b, c = pictures
    text = Prompt("x", "what colour is a boat ?", "blue .")
    if vlm.model.config.model_type == "paligemma":
        text = Prompt("x", "what ?", "blue .", b)
    return [
        Prompt("x", "describe the picture .", "a red cat .", a),
        Prompt("x", "which of the two pictures is the one ?", "yes .", (b, c)),
        text,
        Prompt("x", "is there a boat ?", "no a small boat .", c),
    ]


def asked(vlm, prompt):
    "A question in the words of the model's own template, and its pictures."
    refs, processor = references(prompt.image), vlm.processor
    content = [{"type": "image"}] * len(refs) + [{"type": "text", "text": prompt.text}]
    said = "<image>" * len(refs) + prompt.text
    if processor.chat_template:
        turns = [{"role": "user", "content": content}]
        said = processor.apply_chat_template(turns, add_generation_prompt=True)
    return said, [[open_image(r) for r in refs]] if refs else None


def plain_logits(vlm, prompt):
    "Logits of an answer and of its end, (A, V): question and answer as one text, by transformers."
    said, images = asked(vlm, prompt)
    end = vlm.tokenizer.convert_ids_to_tokens(vlm.eos_id)
    how = dict(images=images, add_special_tokens=False, return_tensors="pt")
    if vlm.model.config.model_type == "paligemma":  # its processor must know where answers begin
        x = vlm.processor(text=[said], suffix=[f"{prompt.answer} "], **how)
    else:
        x = vlm.processor(text=[f"{said} {prompt.answer} {end}"], **how)
    ids = vlm.answer_ids(prompt.answer)
    assert x["input_ids"][0, -len(ids) :].tolist() == ids
    inputs = {name: value for name, value in x.items() if name != "labels"}
    floats = {name: value for name, value in inputs.items() if value.is_floating_point()}
    inputs |= {name: value.float() for name, value in floats.items()}  # some come in half precision
    return vlm.model(**inputs).logits[0, -len(ids) - 1 : -1], torch.tensor(ids)


def plain_logprobs(vlm, prompt):
    logits, ids = plain_logits(vlm, prompt)
    return token_logprobs(vlm.rule_out(logits), ids)


def our_logprobs(vlm, prompts):
    b = vlm.batch(prompts, [p.answer for p in prompts])
    return token_logprobs(vlm.rule_out(vlm.answer_logits(b)), b.answers), b.answer_mask


@torch.no_grad()
def test_logprobs_are_those_of_plain_transformers(vlm, prompts):
    ours, mask = our_logprobs(vlm, prompts)
    for row, p in enumerate(prompts):
        want = plain_logprobs(vlm, p)
        assert want.std() > 0.02, "all tokens alike: this tests little"
        assert_close(ours[row, mask[row]], want, atol=NEAR, rtol=0)


@torch.no_grad()
def test_every_picture_matters(vlm, prompts):
    want, _ = our_logprobs(vlm, prompts)
    for row, p in enumerate(prompts):
        for k in range(len(refs := references(p.image))):
            changed = list(prompts)
            shown = (*refs[:k], "blank", *refs[k + 1 :])
            changed[row] = Prompt(p.kind, p.text, p.answer, shown)
            moved = (our_logprobs(vlm, changed)[0] - want).abs().amax(1)
            assert (moved > 1e-4).tolist() == [j == row for j in range(len(prompts))]


@torch.no_grad()
def test_sampled_logprobs_are_those_of_the_forward_pass(vlm, prompts):
    roll = sample(vlm, prompts, None, 0.7, max_new_tokens=6, seed=2)
    mask = roll.batch.answer_mask
    again = vlm.rule_out(vlm.answer_logits(roll.batch))
    again = token_logprobs(again, roll.batch.answers, 0.7)
    near = RECURRENT.get(vlm.model.config.model_type, 2 * NEAR)
    assert_close(roll.logprobs[mask], again[mask], atol=near, rtol=0)
    assert not torch.isin(roll.batch.answers[mask], torch.tensor(vlm.banned_ids)).any()
    greedy = sample(vlm, prompts, None, 1e-6, max_new_tokens=3)
    texts = vlm.tokenizer.batch_decode(greedy.batch.answers, skip_special_tokens=True)
    assert answer(vlm, prompts, 0.0, max_new_tokens=3) == texts


def test_gradients_are_those_of_plain_transformers(vlm, prompts):
    "Of all weights, the tower's too."
    vlm.model.requires_grad_(True)
    named = dict(vlm.model.named_parameters())
    ours, mask = our_logprobs(vlm, prompts)
    got = torch.autograd.grad((ours * mask).sum(), named.values(), allow_unused=True)
    plain = sum(plain_logprobs(vlm, p).sum() for p in prompts)
    want = torch.autograd.grad(plain, named.values(), allow_unused=True)
    vlm.model.requires_grad_(False)
    tower = {*vlm.tower.parameters()}
    seen = [g for p, g in zip(named.values(), want) if p in tower and g is not None]
    assert sum(bool(g.any()) for g in seen) > 4, "no gradient reaches the tower"
    for name, a, b in zip(named, got, want):
        a, b = (torch.zeros_like(named[name]) if g is None else g for g in (a, b))
        near = 1e-4 * max(1.0, float(b.abs().max()))
        assert_close(a, b, atol=near, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
