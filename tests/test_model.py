"The model's files and its pictures: small models with random weights, in float64."

from dataclasses import replace

import pytest
import torch
from small_models import SMALL, answer_logits_from_pixels, close, logprobs, two_pictures
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmrlhf_course.data.prompts import open_image
from vlmrlhf_course.model.vlm import VLM, answer, load_vlm, save_vlm, token_logprobs
from vlmrlhf_course.rl.kl import grounded_mask
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.world.llava import build_model, build_processor
from vlmrlhf_course.world.pretrain import pretrained_vlm


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(5)
    vlm = VLM(build_model(SMALL), build_processor(SMALL))
    folder = tmp_path_factory.mktemp("saved")
    save_vlm(vlm, folder)
    return vlm, folder


def test_save_and_load(saved, prompts):
    vlm, folder = saved
    again = load_vlm(folder)
    said = [p.answer for p in prompts]
    for k, v in vlm.model.state_dict().items():
        assert torch.equal(v, again.model.state_dict()[k]), k
    a, b = vlm.batch(prompts, said), again.batch(prompts, said)
    assert torch.equal(a.input_ids, b.input_ids)
    assert torch.equal(vlm.answer_logits(a), again.answer_logits(b))
    assert again.banned_ids == vlm.banned_ids and again.eos_id == vlm.eos_id


def test_plain_transformers_can_use_it(saved, prompts):
    "Nothing of ours is needed: processor, chat template, pixels, forward pass, generate."
    vlm, folder = saved
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder, use_fast=False, backend="pil")
    p = prompts[0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": p.text}]}]
    inputs = processor(
        text=[processor.apply_chat_template(chat, add_generation_prompt=True)],
        images=[open_image(p.image)],
        return_tensors="pt",
    )
    b = vlm.batch([p])
    assert torch.equal(inputs["input_ids"], b.input_ids)
    with torch.no_grad():
        theirs, ours = model(**inputs).logits[:, -1], vlm.model.lm_head(vlm.hidden(b))[:, -1]
        assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
        ids = model.generate(
            **inputs, do_sample=False, max_new_tokens=8, suppress_tokens=vlm.banned_ids
        )
    new_ids = ids[:, b.input_ids.shape[1] :]
    said = processor.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    assert said == answer(vlm, [p], 0.0, max_new_tokens=8)


def test_no_model_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_vlm(tmp_path)


def test_pretrained_parts():
    "The shipped tower and language model fit together, the tower is frozen, the projector is new."
    a, b, c = pretrained_vlm(0), pretrained_vlm(0), pretrained_vlm(1)
    assert not any(p.requires_grad for p in a.tower.parameters())
    for part, same in (("tower", True), ("language", True), ("projector", False)):
        x, y, z = (getattr(v, part).state_dict() for v in (a, b, c))
        assert all(torch.equal(x[k], y[k]) for k in x), part
        assert all(torch.equal(x[k], z[k]) for k in x) == same, part


def test_cached_features_give_the_logits_of_pixels(vlm, prompts, full):
    seen = [p for p in prompts if p.image]
    rows = [i for i, p in enumerate(prompts) if p.image]
    for _ in range(2):  # the second time from the cache
        b = vlm.batch(seen, [p.answer for p in seen])
        want = answer_logits_from_pixels(vlm, b, [p.image for p in seen])
        close(vlm.answer_logits(b)[b.answer_mask], want[b.answer_mask])
    close(logprobs(vlm, b), logprobs(vlm, full)[rows])


def test_each_picture_is_encoded_once(vlm, prompts):
    vlm.encoded = 0
    vlm._features.clear()
    for _ in range(3):
        vlm.batch(prompts * 2)
    assert vlm.encoded == sum(p.image is not None for p in prompts)


def test_the_picture_matters_and_rows_get_their_own(vlm, prompts):
    said = [p.answer for p in prompts]
    real = vlm.batch(prompts, said)
    blank = vlm.batch(prompts, said, images=["blank"] * len(prompts))
    moved = (logprobs(vlm, real) - logprobs(vlm, blank)).abs().amax(1) > 1e-6
    assert moved.tolist() == [p.image is not None for p in prompts]
    assert (grounded_mask(vlm, real, blank, 1e-9).any(1) == moved).all()


def test_the_cache_is_not_used_while_the_tower_learns(vlm, prompts):
    refs = [p.image for p in prompts if p.image]

    def grow():
        for p in vlm.tower.parameters():
            p.data.mul_(1.3)

    frozen = vlm.features(refs)
    vlm.tower.requires_grad_(True)
    grow()
    learning = vlm.features(refs)
    assert not torch.allclose(learning, frozen)
    grow()
    vlm.tower.requires_grad_(False)
    assert not torch.allclose(vlm.features(refs), learning), "features of an older tower were kept"


def test_gradients_reach_a_tower_that_trains(vlm, prompts):
    """SFT on a thawed tower: gradients as from pixels, nothing
    kept between calls, and a batch from before is refused."""
    seen = [p for p in prompts if p.image]
    said = [p.answer for p in seen]
    old = vlm.batch(seen, said)
    vlm.tower.requires_grad_(True)
    with pytest.raises(ValueError, match="tower trains"):
        vlm.answer_logits(old)
    with torch.no_grad():
        logprobs(vlm, old)  # without gradients an older batch may be read
    for _ in range(2):  # each batch has a graph of its own
        b = vlm.batch(seen, said)
        logprobs(vlm, b).sum().backward()
    assert vlm.tower_trains and not vlm._features
    got = [p.grad / 2 for p in vlm.tower.parameters() if p.grad is not None]
    vlm.tower.zero_grad()
    logits = answer_logits_from_pixels(vlm, b, [p.image for p in seen])
    (token_logprobs(logits, b.answers) * b.answer_mask).sum().backward()
    want = [p.grad for p in vlm.tower.parameters() if p.grad is not None]
    assert len(got) == len(want) > 4 and any(g.abs().max() > 1e-6 for g in want)
    for a, c in zip(got, want):
        close(a, c)
    vlm.tower.requires_grad_(False)
    vlm.batch(seen)
    vlm.batch(seen)
    assert len(vlm._features) == len(seen), "frozen again, it keeps features again"
    assert not any(f.requires_grad for f, _ in vlm._features.values())


def test_the_last_layer_alone_can_train(vlm, prompts):
    "Staged unfreezing: gradients reach the thawed layer and stop there."
    last = vlm.tower.encoder.layers[-1]
    last.requires_grad_(True)
    b = vlm.batch(prompts, [p.answer for p in prompts])
    logprobs(vlm, b).sum().backward()
    assert all(p.grad is not None for p in last.parameters())
    reached = {id(p) for p in vlm.model.parameters() if p.grad is not None}
    assert reached == {id(p) for p in last.parameters()}


def test_several_pictures_a_prompt(vlm, prompts):
    asked = two_pictures(prompts)
    b = vlm.batch(asked, [p.answer for p in asked])
    assert b.pictures.counts.tolist() == [2, 0, 1, 2]
    assert b.has_image.tolist() == [True, False, True, True]
    assert len(b.features) == 5
    want = logprobs(vlm, b)
    logits = answer_logits_from_pixels(vlm, b, [r for p in asked for r in (p.image or ())])
    close(token_logprobs(logits, b.answers) * b.answer_mask, want)
    for order in ([3, 0], [1], [2, 1, 0, 3], [0, 0]):
        part = b.rows(torch.tensor(order))
        close(logprobs(vlm, part), want[order][:, : part.answers.shape[1]])
    swapped = vlm.batch([replace(asked[0], image=asked[0].image[::-1])], [asked[0].answer])
    same_order = want[:1, : swapped.answers.shape[1]]
    assert not torch.allclose(logprobs(vlm, swapped), same_order), "the order must matter"
    blank = vlm.batch(asked, [p.answer for p in asked], images=["blank"] * 4)
    moved = (logprobs(vlm, blank) - want).abs().amax(1) > 1e-6
    assert moved.tolist() == [True, False, True, True]
    assert torch.equal(blank.input_ids, b.input_ids)
    roll = sample(vlm, asked, max_new_tokens=6, seed=1)
    m = roll.batch.answer_mask
    again = token_logprobs(vlm.rule_out(vlm.answer_logits(roll.batch)), roll.batch.answers)
    close(again[m], roll.logprobs[m])


def test_a_lost_placeholder_is_an_error(vlm, full):
    first = (full.input_ids[0] == vlm.image_token_id).nonzero()[0]
    full.input_ids[0, first] = vlm.eos_id
    with pytest.raises(ValueError, match="placeholders"):
        vlm.answer_logits(full)
