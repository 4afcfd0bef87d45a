"The model: files, padding, pictures, roles, values, sampling, gradients. Small models with random weights, in float64."
import copy
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, shake
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmrlhf_course.train import reward
from vlmrlhf_course.rl.kl import full_kl, grounded_mask
from vlmrlhf_course.rl.ppo import ActorCritic, PPOConfig, PPOState, PPOTask, make_experience, train_ppo
from vlmrlhf_course.data.preferences import sample_prompts
from vlmrlhf_course.train.reward import (EarlyStopping, RewardConfig, RewardModel, RewardTask, early_stop, group_pairs, pair_accuracy, score_texts,
                                   train_reward)
from vlmrlhf_course.rl.rollout import merged, sample, texts, with_answers
from vlmrlhf_course.base.runs import make_accelerator, read_jsonl
from vlmrlhf_course.train.sft import FitConfig, SFTTask, backward_through, grad_norms, pretrained_vlm, unfreeze_tower
from vlmrlhf_course.base.runs import UserError
from vlmrlhf_course.model.vlm import (VLM, Batch, LoRAConfig, answer, build_model, build_processor, load_vlm, pad_sides, save_vlm, token_logprobs)
from vlmrlhf_course.world.scenes import Prompt, open_image

SMALL_LORA = LoRAConfig(r=4, alpha=8)


def logprobs(vlm, batch, role=None): return token_logprobs(vlm.answer_logits(batch, role), batch.answers) * batch.answer_mask
def close(a, b): assert_close(a, b, atol=1e-9, rtol=1e-7)


# --- files ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(5)
    vlm, folder = VLM(build_model(SMALL), build_processor(SMALL)), tmp_path_factory.mktemp("saved")
    save_vlm(vlm, folder)
    return vlm, folder


def test_save_and_load(saved, prompts):
    vlm, folder = saved
    again = load_vlm(folder)
    said = [p.answer for p in prompts]
    for k, v in vlm.model.state_dict().items(): assert torch.equal(v, again.model.state_dict()[k]), k
    a, b = vlm.batch(prompts, said), again.batch(prompts, said)
    assert torch.equal(a.input_ids, b.input_ids) and torch.equal(vlm.answer_logits(a), again.answer_logits(b))
    assert again.banned_ids == vlm.banned_ids and again.eos_id == vlm.eos_id


def test_plain_transformers_can_use_it(saved, prompts):
    "Nothing of ours is needed: processor, chat template, pixels, forward pass, generate."
    vlm, folder = saved
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder, use_fast=False, backend="pil")
    p = prompts[0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": p.text}]}]
    inputs = processor(text=[processor.apply_chat_template(chat, add_generation_prompt=True)], images=[open_image(p.image)], return_tensors="pt")
    b = vlm.batch([p])
    assert torch.equal(inputs["input_ids"], b.input_ids)
    with torch.no_grad():
        assert_close(model(**inputs).logits[:, -1], vlm.model.lm_head(vlm.hidden(b))[:, -1], atol=1e-5, rtol=1e-4)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=8, suppress_tokens=vlm.banned_ids)[:, b.input_ids.shape[1]:]
    assert processor.tokenizer.batch_decode(ids, skip_special_tokens=True) == answer(vlm, [p], 0., max_new_tokens=8)


def test_no_model_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"): load_vlm(tmp_path)


def test_pretrained_parts():
    "The shipped tower and language model fit together, the tower is frozen, the projector is new."
    a, b, c = pretrained_vlm(0), pretrained_vlm(0), pretrained_vlm(1)
    assert not any(p.requires_grad for p in a.tower.parameters())
    for part, same in (("tower", True), ("language", True), ("projector", False)):
        x, y, z = (getattr(v, part).state_dict() for v in (a, b, c))
        assert all(torch.equal(x[k], y[k]) for k in x) and all(torch.equal(x[k], z[k]) for k in x) == same, part


# --- padding --------------------------------------------------------------------------------------------------------

def spread_out(b, left=0, middle=0, right=0, pad=0):
    "The same batch with more padding on the left, between prompt and answer, and on the right."
    def grow(x, y, n): return torch.cat([x, torch.full((len(x), n), y, dtype=x.dtype)], 1)
    def lay(x, y):
        p, a = x[:, :b.prompt_length], x[:, b.prompt_length:]
        return torch.cat([grow(x[:, :0], y, left), grow(p, y, middle), grow(a, y, right)], 1)
    return Batch(lay(b.input_ids, pad), lay(b.attention_mask, 0), grow(b.answer_mask, False, right), b.pictures, b.prompt_length + left + middle)


@pytest.mark.parametrize("left, right", [(3, 0), (0, 4), (5, 2)])
def test_logprobs_do_not_depend_on_the_amount_of_padding(vlm, full, left, right):
    want = logprobs(vlm, full)
    got = logprobs(vlm, spread_out(full, left, 0, right))
    close(got[:, :want.shape[1]], want)
    assert not got[:, want.shape[1]:].any() and want.abs().sum() > 1


def test_logprobs_do_not_depend_on_the_side_of_padding(vlm, full):
    "Each row alone, without padding; with all padding on the left; with all padding on the right: one and the same."
    want = logprobs(vlm, full)
    for i in range(len(full)):
        real = full.attention_mask[i].bool()
        ids, n, A = full.input_ids[i:i + 1, real], int(real.sum()), int(full.lengths[i])
        own = full.pictures.rows(torch.tensor([i]))
        for left, right in ((0, 0), (6, 0), (0, 6)):
            z = torch.zeros(1, 1, dtype=torch.long)
            b = Batch(torch.cat([z.expand(1, left), ids, z.expand(1, right)], 1), torch.cat([z.expand(1, left), torch.ones_like(ids), z.expand(1, right)], 1),
                      torch.ones(1, A + right).bool(), own, left + n - A)
            close(token_logprobs(vlm.answer_logits(b), b.answers)[0, :A], want[i, :A])


def test_padding_between_prompt_and_answer(vlm, full):
    "Position ids count real tokens, so that a gap in the middle changes nothing for tokens after the first."
    want, got = logprobs(vlm, full), logprobs(vlm, spread_out(full, middle=3))
    close(got[:, 1:], want[:, 1:])   # the first answer token is predicted at the position before it, which is padding here


def test_pad_sides():
    b = pad_sides([[5, 6], [7]], [[8], [9, 10, 11]], 0)
    assert b.input_ids.tolist() == [[5, 6, 8, 0, 0], [0, 7, 9, 10, 11]] and b.attention_mask.tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]
    assert b.answer_mask.tolist() == [[True, False, False], [True, True, True]] and b.prompt_length == 2 and b.lengths.tolist() == [1, 3]
    assert b.position_ids[1].tolist() == [0, 0, 1, 2, 3] and not b.has_image.any()


def test_every_answer_ends_with_eos_inside_the_mask(vlm, full):
    for row, mask in zip(full.answers, full.answer_mask): assert row[mask][-1] == vlm.eos_id and (row[~mask] == vlm.pad_id).all()


@pytest.mark.parametrize("order", [[5, 4, 3, 2, 1, 0], [2], [4, 0], [2, 5, 1], [0, 1, 2, 3, 4, 5], [3, 3]])
def test_rows(vlm, full, order):
    "Any rows, in any order, give what the full batch gives in these rows, and lose the padding that they do not need."
    index = torch.tensor(order)
    b = full.rows(index)
    A = b.answers.shape[1]
    assert A == int(full.lengths[index].max()) and b.attention_mask[:, 0].any() and len(b) == len(order)
    close(logprobs(vlm, b), logprobs(vlm, full)[index][:, :A])


def test_permuting_the_prompts_permutes_the_outputs(vlm, prompts, full):
    order = [3, 0, 5, 2, 4, 1]
    b = vlm.batch([prompts[i] for i in order], [prompts[i].answer for i in order])
    close(logprobs(vlm, b), logprobs(vlm, full)[order])


# --- pictures -------------------------------------------------------------------------------------------------------

def test_cached_features_give_the_logits_of_pixels(vlm, prompts, full):
    seen = [p for p in prompts if p.image]
    pixels = vlm.processor.image_processor([open_image(p.image) for p in seen], return_tensors="pt").pixel_values.double()
    rows = [i for i, p in enumerate(prompts) if p.image]
    for _ in range(2):   # the second time from the cache
        b = vlm.batch(seen, [p.answer for p in seen])
        whole = vlm.model(input_ids=b.input_ids, attention_mask=b.attention_mask, position_ids=b.position_ids, pixel_values=pixels).logits
        close(vlm.answer_logits(b)[b.answer_mask], whole[:, b.prompt_length - 1:-1][b.answer_mask])
    close(logprobs(vlm, b), logprobs(vlm, full)[rows])


def test_each_picture_is_encoded_once(vlm, prompts):
    vlm.encoded = 0
    vlm._features.clear()
    for _ in range(3): vlm.batch(prompts * 2)
    assert vlm.encoded == sum(p.image is not None for p in prompts)


def test_the_picture_matters_and_rows_get_their_own(vlm, prompts):
    said = [p.answer for p in prompts]
    real, blank = vlm.batch(prompts, said), vlm.batch(prompts, said, images=["blank"] * len(prompts))
    moved = (logprobs(vlm, real) - logprobs(vlm, blank)).abs().amax(1) > 1e-6
    assert moved.tolist() == [p.image is not None for p in prompts]
    assert (grounded_mask(vlm, real, blank, 1e-9).any(1) == moved).all()


def test_the_cache_is_not_used_while_the_tower_learns(vlm, prompts):
    refs = [p.image for p in prompts if p.image]
    def grow():
        for p in vlm.tower.parameters(): p.data.mul_(1.3)
    frozen = vlm.features(refs)
    vlm.tower.requires_grad_(True)
    grow()
    learning = vlm.features(refs)
    assert not torch.allclose(learning, frozen)
    grow()
    vlm.tower.requires_grad_(False)
    assert not torch.allclose(vlm.features(refs), learning), "features of an older tower were kept"


def test_gradients_reach_a_tower_that_trains(vlm, prompts):
    "SFT on a thawed tower: gradients as from pixels, nothing kept between calls, and a batch from before is refused."
    seen = [p for p in prompts if p.image]
    said = [p.answer for p in seen]
    old = vlm.batch(seen, said)
    vlm.tower.requires_grad_(True)
    with pytest.raises(ValueError, match="tower trains"): vlm.answer_logits(old)
    with torch.no_grad(): logprobs(vlm, old)                     # without gradients an older batch may be read
    for _ in range(2):                                           # each batch has a graph of its own
        b = vlm.batch(seen, said)
        logprobs(vlm, b).sum().backward()
    assert vlm.tower_trains and not vlm._features
    got = [p.grad / 2 for p in vlm.tower.parameters() if p.grad is not None]
    vlm.tower.zero_grad()
    pixels = vlm.processor.image_processor([open_image(p.image) for p in seen], return_tensors="pt").pixel_values.double()
    whole = vlm.model(input_ids=b.input_ids, attention_mask=b.attention_mask, position_ids=b.position_ids, pixel_values=pixels).logits
    (token_logprobs(whole[:, b.prompt_length - 1:-1], b.answers) * b.answer_mask).sum().backward()
    want = [p.grad for p in vlm.tower.parameters() if p.grad is not None]
    assert len(got) == len(want) > 4 and any(g.abs().max() > 1e-6 for g in want)
    for a, c in zip(got, want): close(a, c)
    vlm.tower.requires_grad_(False)
    vlm.batch(seen), vlm.batch(seen)
    assert len(vlm._features) == len(seen) and not any(f.requires_grad for f, _ in vlm._features.values()), "frozen again, it keeps features again"


def test_the_last_layer_alone_can_train(vlm, prompts):
    "Staged unfreezing: gradients reach the thawed layer and stop there."
    last = vlm.tower.encoder.layers[-1]
    last.requires_grad_(True)
    b = vlm.batch(prompts, [p.answer for p in prompts])
    logprobs(vlm, b).sum().backward()
    assert all(p.grad is not None for p in last.parameters())
    assert {id(p) for p in vlm.model.parameters() if p.grad is not None} == {id(p) for p in last.parameters()}


def two_pictures(prompts):
    "Rows with two pictures, none, one, and two of which one is known from another row."
    a, b, c = [p.image for p in prompts if p.image][:3]
    return [Prompt("x", "describe the picture .", "a cat .", (a, b)), prompts[2], replace(prompts[0], image=(c,)), Prompt("x", "is there a cat ?", "no .", (b, c))]


def test_several_pictures_a_prompt(vlm, prompts):
    asked = two_pictures(prompts)
    b = vlm.batch(asked, [p.answer for p in asked])
    assert b.pictures.counts.tolist() == [2, 0, 1, 2] and b.has_image.tolist() == [True, False, True, True] and len(b.features) == 5
    want = logprobs(vlm, b)
    refs = [r for p in asked for r in (p.image or ())]
    pixels = vlm.processor.image_processor([open_image(r) for r in refs], return_tensors="pt").pixel_values.double()
    whole = vlm.model(input_ids=b.input_ids, attention_mask=b.attention_mask, position_ids=b.position_ids, pixel_values=pixels).logits
    close((token_logprobs(whole[:, b.prompt_length - 1:-1], b.answers) * b.answer_mask), want)
    for order in ([3, 0], [1], [2, 1, 0, 3], [0, 0]):
        part = b.rows(torch.tensor(order))
        close(logprobs(vlm, part), want[order][:, :part.answers.shape[1]])
    swapped = vlm.batch([replace(asked[0], image=asked[0].image[::-1])], [asked[0].answer])
    assert not torch.allclose(logprobs(vlm, swapped), want[:1, :swapped.answers.shape[1]]), "the order of pictures must matter"
    blank = vlm.batch(asked, [p.answer for p in asked], images=["blank"] * 4)
    assert ((logprobs(vlm, blank) - want).abs().amax(1) > 1e-6).tolist() == [True, False, True, True] and torch.equal(blank.input_ids, b.input_ids)
    roll = sample(vlm, asked, max_new_tokens=6, seed=1)
    m = roll.batch.answer_mask
    close(token_logprobs(vlm.rule_out(vlm.answer_logits(roll.batch)), roll.batch.answers)[m], roll.logprobs[m])


def test_a_lost_placeholder_is_an_error(vlm, full):
    full.input_ids[0, (full.input_ids[0] == vlm.image_token_id).nonzero()[0]] = vlm.eos_id
    with pytest.raises(ValueError, match="placeholders"): vlm.answer_logits(full)


# --- roles ----------------------------------------------------------------------------------------------------------

def test_reference_is_the_frozen_trunk_bit_for_bit(vlm, full):
    before, trunk = vlm.answer_logits(full), {k: v.clone() for k, v in vlm.model.state_dict().items()}
    vlm.add_role("actor", SMALL_LORA), vlm.add_role("reward", SMALL_LORA)
    assert torch.equal(vlm.answer_logits(full, "actor"), before), "a new adapter changes nothing"
    opt = torch.optim.SGD([p for p in vlm.model.parameters() if p.requires_grad], .5)
    for _ in range(2): vlm.answer_logits(full, "actor").square().sum().backward(); opt.step(); opt.zero_grad()
    assert torch.equal(vlm.answer_logits(full), before), "the reference moved"
    assert not torch.allclose(vlm.answer_logits(full, "actor"), before), "the actor did not learn"
    assert torch.equal(vlm.answer_logits(full, "reward"), before), "one role learned from another's gradient"
    now = vlm.model.state_dict()
    for k, v in trunk.items():
        assert torch.equal(v, now.get(k, now.get(k.replace(".weight", ".base_layer.weight"), torch.zeros(0)))), k


@pytest.mark.parametrize("first, second", [(SMALL_LORA, LoRAConfig(r=0)), (LoRAConfig(r=0), SMALL_LORA)], ids=["copy of an adapter", "adapter of a copy"])
def test_a_role_starts_only_from_its_own_kind(first, second):
    vlm = VLM(build_model(SMALL), build_processor(SMALL))
    vlm.add_role("reward", first)
    with pytest.raises(UserError, match="'reward' is .* cannot start from it"): vlm.add_role("critic", second, like="reward")
    vlm.add_role("critic", first, like="reward")


def test_a_full_copy_has_no_adapters():
    "Not even the note of where the trunk had some."
    vlm = VLM(build_model(SMALL), build_processor(SMALL))
    for name, lora in (("actor", SMALL_LORA), ("copy", LoRAConfig(r=0))):
        vlm.add_role(name, lora)
        assert vlm.lora_layers()
    with vlm.speaking("copy"): assert not vlm.lora_layers()


def test_acting_is_undone_also_after_errors(vlm, full):
    vlm.add_role("a", SMALL_LORA), vlm.add_role("b", SMALL_LORA)
    shake(vlm, "a"), shake(vlm, "b", seed=2)
    want = {r: vlm.answer_logits(full, r) for r in ("a", "b", None)}
    assert not torch.allclose(want["a"], want["b"]) and not torch.allclose(want["a"], want[None])
    with pytest.raises(ZeroDivisionError):
        with vlm.acting("a"):
            with vlm.acting(None): assert torch.equal(vlm.answer_logits(full, "b"), want["b"])
            h = vlm.language(inputs_embeds=vlm.embed(full), attention_mask=full.attention_mask, position_ids=full.position_ids).last_hidden_state
            assert torch.equal(h, vlm.hidden(full, "a")), "the outer role speaks again after the inner block"
            1 / 0
    for r in want: assert torch.equal(vlm.answer_logits(full, r), want[r])


@pytest.mark.parametrize("cfg", [SMALL_LORA, LoRAConfig(r=0)], ids=["adapter", "copy"])
def test_role_state_round_trip(vlm, full, cfg):
    vlm.add_role("actor", cfg)
    other = copy.deepcopy(vlm)
    shake(vlm, "actor")
    assert vlm.role_state("actor") and not torch.allclose(other.answer_logits(full, "actor"), vlm.answer_logits(full, "actor"))
    other.load_role("actor", vlm.role_state("actor"))
    assert torch.equal(other.answer_logits(full, "actor"), vlm.answer_logits(full, "actor"))
    with pytest.raises(KeyError, match="actor"): other.load_role("actor", {})


def test_a_role_can_start_like_another(vlm, full):
    vlm.add_role("reward", SMALL_LORA)
    shake(vlm, "reward")
    vlm.add_role("critic", SMALL_LORA, like="reward")
    assert torch.equal(vlm.answer_logits(full, "critic"), vlm.answer_logits(full, "reward"))
    shake(vlm, "critic", seed=5)
    assert not torch.allclose(vlm.answer_logits(full, "critic"), vlm.answer_logits(full, "reward"))


class TestCopy:
    "Roles with weights of their own: LoRAConfig(r=0)."
    def test_learns_alone(self, vlm, full):
        before = vlm.answer_logits(full)
        vlm.add_role("actor", LoRAConfig(r=0)), vlm.add_role("critic", LoRAConfig(r=0), like="actor")
        assert torch.equal(vlm.answer_logits(full, "actor"), before)
        opt = torch.optim.SGD(vlm.roles["actor"].parameters(), 1e-3)
        vlm.answer_logits(full, "actor").square().sum().backward(); opt.step()
        assert not torch.allclose(vlm.answer_logits(full, "actor"), before)
        assert torch.equal(vlm.answer_logits(full), before) and torch.equal(vlm.answer_logits(full, "critic"), before)
        assert all(p.grad is None for p in vlm.model.parameters())

    def test_starts_from_the_trunk_also_where_adapters_are(self, vlm, full):
        "A reward model with an adapter, an actor with weights of its own: the actor must begin as the reference."
        before = vlm.answer_logits(full)
        vlm.add_role("reward", SMALL_LORA)
        shake(vlm, "reward")
        vlm.add_role("actor", LoRAConfig(r=0))
        close(vlm.answer_logits(full, "actor"), before)

    def test_sampling_speaks_with_the_copy(self, vlm, prompts):
        vlm.add_role("actor", LoRAConfig(r=0))
        shake(vlm, "actor")
        roll = sample(vlm, prompts, "actor", max_new_tokens=5, seed=2)
        z, mask = vlm.rule_out(vlm.answer_logits(roll.batch, "actor")), roll.batch.answer_mask
        close(token_logprobs(z, roll.batch.answers)[mask], roll.logprobs[mask])

    def test_generate_speaks_with_the_copy(self, vlm, prompts):
        "`answer` (generate) and `sample` must hear the same role."
        vlm.add_role("actor", LoRAConfig(r=0))
        shake(vlm, "actor")
        said, trunk = answer(vlm, prompts[:2], 0., role="actor", max_new_tokens=6), answer(vlm, prompts[:2], 0., max_new_tokens=6)
        assert said == texts(vlm, sample(vlm, prompts[:2], "actor", temperature=1e-6, max_new_tokens=6)) != trunk


def test_generate_speaks_with_the_adapter(vlm, prompts):
    vlm.add_role("actor", SMALL_LORA)
    shake(vlm, "actor")
    said, trunk = answer(vlm, prompts, 0., role="actor", max_new_tokens=6), answer(vlm, prompts, 0., max_new_tokens=6)
    assert said == texts(vlm, sample(vlm, prompts, "actor", temperature=1e-6, max_new_tokens=6))
    assert trunk == texts(vlm, sample(vlm, prompts, temperature=1e-6, max_new_tokens=6)) != said


# --- reward model ---------------------------------------------------------------------------------------------------

def reward_model(vlm, kind):
    torch.manual_seed(2)
    rm = RewardModel(vlm, RewardConfig(lora=SMALL_LORA, kind=kind)).double()
    rm.requires_grad_(False)
    shake(vlm, "reward")
    nn.init.normal_(rm.head.out.weight)
    return rm


@pytest.fixture
def token_rm(vlm): return reward_model(vlm, "token")


@pytest.fixture(params=["token", "scalar"])
def rm(request, vlm): return reward_model(vlm, request.param)


def test_reward_by_definition(rm, vlm, full):
    "The head on the states after each answer token, added up; or on the state after the last one, which is EOS."
    h = vlm.hidden(full, "reward")
    for i, n in enumerate(full.lengths.tolist()):
        states = h[i:i + 1, full.prompt_length:full.prompt_length + n]
        one = torch.ones(1, n).bool()
        want = rm.head(states, one).sum() if rm.cfg.kind == "token" else rm.head(states[:, -1:], one[:, :1])[0]
        close(rm(full)[i], want)
    raw = rm(full)
    rm.shift.fill_(2.), rm.scale.fill_(4.)
    close(rm(full), (raw - 2) / 4)
    close(rm(full, rm.states(full)), (raw - 2) / 4)


def test_rewards_do_not_depend_on_company(rm, prompts):
    said = [p.answer for p in prompts]
    together = score_texts(rm, prompts, said)
    close(together, torch.cat([score_texts(rm, [p], [a]) for p, a in zip(prompts, said)]))
    close(together, score_texts(rm, prompts, said, chunk=2))
    other = [p.image or "blank" for p in prompts[::-1]]
    close(score_texts(rm, prompts, said, other, chunk=2), score_texts(rm, prompts, said, other))
    blank = score_texts(rm, prompts, said, ["blank"] * len(prompts), chunk=4)
    assert ((blank - together).abs() > 1e-6).tolist() == [p.image is not None for p in prompts]
    cut = [a.rsplit(" ", 2)[0] for a in said]
    assert ((score_texts(rm, prompts, cut) - together).abs() > 1e-6).all(), "the end of the answer was not read"


def test_a_reward_model_is_in_eval_mode(vlm, prompts):
    "Dropout and batch statistics are for training only: the same answer gets the same reward."
    rm = RewardModel(vlm, RewardConfig(lora=LoRAConfig(r=4, alpha=8, dropout=.5), norm="batch")).double()
    shake(vlm, "reward")
    said = [p.answer for p in prompts]
    assert torch.equal(score_texts(rm, prompts, said), score_texts(rm, prompts, said)) and not any(m.training for m in rm.modules())
    rm.train()
    assert not torch.equal(score_texts(rm, prompts, said), score_texts(rm, prompts, said))


def test_early_stopping_brings_back_the_best(vlm, pairs, tmp_path):
    "It stops by its verdict; the weights that count are those of its best look; the scale belongs to them."
    rm = RewardModel(vlm, cfg := RewardConfig(lora=SMALL_LORA, epochs=40, fit=FitConfig(lr=.1, batch=1, micro_batch=8)))
    watch = EarlyStopping(rm.double(), pairs, every=2, patience=2)
    train_reward(rm, pairs, cfg, tmp_path, watch=watch)
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2 * len(watch.history) < 40 * len(group_pairs(pairs))
    assert early_stop(watch.history, 2) and not early_stop(watch.history[:-1], 2)
    assert pair_accuracy(rm, pairs)["labels"] == max(watch.history) and not rm.training
    for name, w in rm.state().items():
        if not name.startswith("norm."): assert torch.equal(w, watch.best[name])


def test_early_stopping_survives_a_resume(vlm, pairs, tmp_path, monkeypatch):
    "Interrupted after the best look and continued: looks, best weights, the step at which it stops, and the result, as without the stop."
    cfg = RewardConfig(lora=SMALL_LORA, epochs=40, fit=FitConfig(lr=.1, batch=1, micro_batch=8, save_every=3))
    def train(folder, break_at=None):
        torch.manual_seed(3)
        rm = RewardModel(copy.deepcopy(vlm), cfg).double()
        watch = EarlyStopping(rm, pairs, every=2, patience=3)
        def accuracy(*a):   # made up, so that the best look lies before the break
            if len(watch.history) == break_at: raise KeyboardInterrupt
            return pair_accuracy(*a) | dict(labels=[.5, .9, .6, .7, .8, .95][len(watch.history)])
        monkeypatch.setattr(reward, "pair_accuracy", accuracy)
        return train_reward(rm, pairs, cfg, folder, watch=watch), watch
    rm, watch = train(tmp_path / "straight")
    assert watch.history == [.5, .9, .6, .7, .8]
    with pytest.raises(KeyboardInterrupt): train(tmp_path / "stopped", break_at=3)
    resumed, again = train(tmp_path / "stopped")
    assert again.history == watch.history and read_jsonl(tmp_path / "stopped" / "metrics.jsonl") == read_jsonl(tmp_path / "straight" / "metrics.jsonl")
    for name, w in rm.state().items(): assert torch.equal(w, resumed.state()[name]), name


def test_reward_state_round_trip(rm, prompts):
    other = copy.deepcopy(rm)
    shake(rm.vlm, "reward", seed=9), rm.shift.fill_(.5), rm.scale.fill_(3.)
    said = [p.answer for p in prompts]
    want = score_texts(rm, prompts, said)
    assert not torch.allclose(want, score_texts(other, prompts, said))
    other.load({k: v.clone() for k, v in rm.state().items()})
    assert torch.equal(want, score_texts(other, prompts, said))


@pytest.fixture
def pairs(prompts):
    seen = [p for p in prompts if p.image]
    return [dict(image=p.image, prompt=p.text, chosen=p.answer, rejected=r, weight=w, gold=g)
            for p in seen for r, w, g in (("a cat .", .5, True), ("nothing .", 1.5, False))]


def test_pair_accuracy_counts(rm, pairs):
    "Against the scores themselves, and with chosen and rejected swapped."
    def score(r, key): return float(score_texts(rm, [Prompt("", r["prompt"], "", r["image"])], [r[key]]))
    hits = [score(r, "chosen") > score(r, "rejected") for r in pairs]
    assert pair_accuracy(rm, pairs) == pytest.approx(dict(labels=sum(hits) / len(hits), gold=sum(h == r["gold"] for h, r in zip(hits, pairs)) / len(hits)))
    swapped = [r | dict(chosen=r["rejected"], rejected=r["chosen"]) for r in pairs]
    assert pair_accuracy(rm, swapped)["labels"] == pytest.approx(1 - sum(hits) / len(hits))


# --- critic ---------------------------------------------------------------------------------------------------------

@pytest.fixture(params=["head", "adapter"])
def policy(request, token_rm):
    torch.manual_seed(3)
    policy = ActorCritic(token_rm, PPOConfig(critic=request.param, lora=SMALL_LORA)).double()
    for p in policy.value.parameters(): nn.init.normal_(p, std=.3)
    shake(policy.vlm, "actor", std=.05, seed=7)
    policy.train_roles()
    return policy


def values(policy, rm, batch):
    states = rm.states(batch) if policy.kind == "head" else None
    return policy.values(batch, states).detach()


def test_there_is_a_value_for_each_token_and_it_does_not_see_the_future(policy, token_rm, vlm, full):
    want = values(policy, token_rm, full)
    assert want.shape == (len(full), full.answers.shape[1] + 1)
    for t in (0, 1, 3):
        b = replace(full, input_ids=full.input_ids.clone())
        b.input_ids[:, b.prompt_length + t] = vlm.tokenizer.convert_tokens_to_ids("moon")
        got, real = values(policy, token_rm, b), full.lengths > t
        close(got[:, :t + 1], want[:, :t + 1])                        # V(s_t) is known before token t is chosen
        assert ((got[real, t + 1] - want[real, t + 1]).abs() > 1e-9).all(), "the value after a token must see it"


def test_values_see_the_picture_and_not_the_company(policy, token_rm, vlm, prompts, full):
    want = values(policy, token_rm, full)
    blank = vlm.batch(prompts, [p.answer for p in prompts], images=["blank"] * len(prompts))
    assert ((values(policy, token_rm, blank) - want).abs().amax(1) > 1e-9).tolist() == [p.image is not None for p in prompts]
    for i in range(len(prompts)):
        row = values(policy, token_rm, full.rows(torch.tensor([i])))
        close(row[0], want[i, :row.shape[1]])


def test_values_with_several_pictures(policy, token_rm, vlm, prompts):
    asked = two_pictures(prompts)
    b = vlm.batch(asked, [p.answer for p in asked])
    want = values(policy, token_rm, b)
    for i in range(len(asked)):
        row = values(policy, token_rm, b.rows(torch.tensor([i])))
        close(row[0], want[i, :row.shape[1]])


def test_a_critic_of_its_own_starts_as_the_reward_model(policy, vlm, full):
    if policy.kind == "adapter": assert torch.equal(vlm.hidden(full, "critic"), vlm.hidden(full, "reward"))
    else: assert "critic" not in vlm.roles and not any(".critic." in n for n, _ in policy.named_parameters())


def test_what_learns(policy):
    actor, critic = policy.role_groups()
    names = {id(p): n for n, p in policy.named_parameters()}
    assert actor and all(".actor." in names[id(p)] for p in actor)
    assert critic and all(names[id(p)].startswith("value.") or ".critic." in names[id(p)] for p in critic)
    assert any(".critic." in names[id(p)] for p in critic) == (policy.kind == "adapter")
    assert {id(p) for p in policy.parameters() if p.requires_grad} == {id(p) for p in [*actor, *critic]}


# --- sampling -------------------------------------------------------------------------------------------------------

def push(vlm, ids, by=30.):
    "Make the output layer love these tokens."
    return vlm.model.get_output_embeddings().register_forward_hook(lambda m, i, out: out.index_add(-1, torch.tensor(ids), torch.full((*out.shape[:-1], len(ids)), by, dtype=out.dtype)))


def test_banned_tokens_are_never_sampled(vlm, prompts):
    push(vlm, vlm.banned_ids)
    roll = sample(vlm, prompts * 4, max_new_tokens=12, seed=1)
    said = roll.batch.answers[roll.batch.answer_mask]
    assert len(said) > 100 and not torch.isin(said, torch.tensor(vlm.banned_ids)).any() and roll.logprobs[roll.batch.answer_mask].isfinite().all()
    for text in answer(vlm, prompts, max_new_tokens=5): assert len(vlm.tokenizer(text).input_ids) == 5


@pytest.mark.parametrize("temperature", [1., .6, 1.5])
@pytest.mark.parametrize("role", [None, "actor"])
def test_sampled_logprobs_are_those_of_the_forward_pass(vlm, prompts, role, temperature):
    vlm.add_role("actor", SMALL_LORA)
    shake(vlm, "actor")
    push(vlm, [vlm.eos_id], 2. * temperature)   # so that some answers end early
    roll = sample(vlm, prompts * 5, role, temperature, max_new_tokens=10, seed=4)
    b = roll.batch
    again = token_logprobs(vlm.rule_out(vlm.answer_logits(b, role)), b.answers, temperature)
    close(again[b.answer_mask], roll.logprobs[b.answer_mask])
    other = token_logprobs(vlm.rule_out(vlm.answer_logits(b, "actor" if role is None else None)), b.answers, temperature)
    assert not torch.allclose(other[b.answer_mask], roll.logprobs[b.answer_mask])
    assert 0 < roll.ended.sum() < len(roll.ended)
    for row, mask, ended in zip(b.answers, b.answer_mask, roll.ended):
        n = int(mask.sum())
        assert mask[:n].all() and (row[n:] == vlm.pad_id).all() and (row[:n - 1] != vlm.eos_id).all()
        assert (row[n - 1] == vlm.eos_id) == ended and (ended or n == 10)


def test_sampling_repeats_with_its_seed(vlm, prompts):
    torch.manual_seed(0)
    a = sample(vlm, prompts, max_new_tokens=8, seed=3)
    torch.manual_seed(1)   # the global generator plays no part
    b, c = sample(vlm, prompts, max_new_tokens=8, seed=3), sample(vlm, prompts, max_new_tokens=8, seed=4)
    assert torch.equal(a.batch.input_ids, b.batch.input_ids) and torch.equal(a.logprobs, b.logprobs) and texts(vlm, a) == texts(vlm, b)
    assert not torch.equal(a.batch.answers, c.batch.answers)


@pytest.mark.parametrize("temperature", [.5, 2.])
def test_sampled_tokens_follow_the_distribution(vlm, prompts, temperature):
    "4000 first tokens against the probabilities at this temperature: chi-square."
    n, p = 4000, prompts[1]
    got = torch.cat([sample(vlm, [p] * 500, temperature=temperature, max_new_tokens=1, seed=i).batch.answers[:, 0] for i in range(n // 500)])
    b = vlm.batch([p], [[vlm.eos_id]])
    want = (vlm.rule_out(vlm.answer_logits(b))[0, 0] / temperature).softmax(-1) * n
    count, often = torch.bincount(got, minlength=len(want)).double(), want > 10
    chi = ((count - want)[often] ** 2 / want[often]).sum()
    dof = int(often.sum()) - 1
    assert dof > 5 and chi < dof + 5 * (2 * dof) ** .5


def test_dropping_finished_rows_changes_no_answer(vlm, prompts):
    "Never dropped, dropped at once, dropped in bunches: the same greedy answers and log-probabilities, fewer rows computed."
    torch.manual_seed(1)
    vlm.add_role("actor", SMALL_LORA)
    shake(vlm, "actor")
    push(vlm, [vlm.eos_id], .5)
    seen = []
    vlm.language.register_forward_pre_hook(lambda m, args, kwargs: seen.append(len(kwargs["inputs_embeds"])), with_kwargs=True)
    rolls, rows = [], []
    for drop in (2., 0., 1 / 8):
        seen.clear()
        rolls.append(sample(vlm, prompts * 2, "actor", temperature=1e-4, max_new_tokens=12, drop=drop))
        rows.append(sum(seen))
    assert len({*rolls[0].batch.lengths.tolist()}) > 2, "rows must end at different times"
    for r in rolls[1:]:
        assert torch.equal(r.batch.input_ids, rolls[0].batch.input_ids) and torch.equal(r.ended, rolls[0].ended)
        close(r.logprobs, rolls[0].logprobs)
    assert rows[1] <= rows[2] < rows[0]


def test_merged_weights(vlm, full):
    "Inside the block the trunk speaks as the role, also after an error every weight is back to the bit."
    vlm.add_role("actor", SMALL_LORA), vlm.add_role("copy", LoRAConfig(r=0)), vlm.add_role("other", SMALL_LORA)
    shake(vlm, "actor"), shake(vlm, "other", seed=3)
    before, want = {k: w.clone() for k, w in vlm.model.state_dict().items()}, vlm.answer_logits(full, "actor").detach()
    with pytest.raises(ZeroDivisionError):
        with merged(vlm, "actor") as role:
            assert role is None and not torch.allclose(want, vlm.answer_logits(full, "other"))
            close(vlm.answer_logits(full, role).detach(), want)
            1 / 0
    assert all(torch.equal(w, before[k]) for k, w in vlm.model.state_dict().items())
    for other in (None, "copy"):
        with merged(vlm, other) as role: assert role == other and all(torch.equal(w, before[k]) for k, w in vlm.model.state_dict().items())
    vlm.model.bfloat16()
    with merged(vlm, "actor") as role: assert role == "actor", "the sum would be rounded"


def test_there_is_no_sampling_at_temperature_zero(vlm, prompts):
    with pytest.raises(ValueError, match="temperature"): sample(vlm, prompts[:1], temperature=0.)


def test_a_pad_that_is_also_eos(vlm, prompts):
    "Many tokenizers pad with EOS. The EOS that ends an answer is an action: it is in the mask, what follows is not."
    vlm.pad_id = vlm.eos_id
    push(vlm, [vlm.eos_id], 2.)
    b = (roll := sample(vlm, prompts * 3, max_new_tokens=8, seed=1)).batch
    for row, mask, ended in zip(b.answers, b.answer_mask, roll.ended):
        n = int(mask.sum())
        assert mask[:n].all() and (row[:n - 1] != vlm.eos_id).all() and (row[n - 1] == vlm.eos_id) == ended
    assert roll.ended.any() and not roll.logprobs[~b.answer_mask].any()


def test_a_text_only_batch(vlm, prompts):
    text = [p for p in prompts if not p.image] * 2
    roll = sample(vlm, text, max_new_tokens=4)
    close(token_logprobs(vlm.rule_out(vlm.answer_logits(roll.batch)), roll.batch.answers)[roll.batch.answer_mask], roll.logprobs[roll.batch.answer_mask])


def test_with_answers(vlm, prompts):
    b, said = vlm.batch(prompts), [p.answer for p in prompts]
    whole = vlm.batch(prompts, said)
    again = with_answers(b, whole.answers, whole.answer_mask)
    for name in ("input_ids", "attention_mask", "answer_mask", "features", "has_image", "position_ids"): assert torch.equal(getattr(again, name), getattr(whole, name))


# --- learning -------------------------------------------------------------------------------------------------------

def gradients(task, items, micro_batch):
    task.zero_grad()
    loss, metrics = backward_through(task, items, micro_batch, make_accelerator())
    grads = {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}
    assert grads and any(g.any() for g in grads.values())
    return loss, metrics, grads


def same_for_every_split(task, items, tolerance=1e-6):
    whole = gradients(task, items, len(items))
    for size in (1, 2, len(items) - 1):
        loss, more, grads = gradients(task, items, size)
        assert loss == pytest.approx(whole[0], rel=tolerance) and grads.keys() == whole[2].keys()
        for name in more.keys() - {"spread"}: assert more[name] == pytest.approx(whole[1][name], rel=1e-5, abs=1e-7), name   # a spread is no mean
        for name, g in grads.items(): assert_close(g, whole[2][name], rtol=1e-5, atol=1e-7 * float(whole[2][name].abs().max() + 1e-3))
    return whole


def test_sft_does_not_depend_on_micro_batches(vlm, prompts, full):
    for part in (vlm.projector, vlm.language, vlm.model.lm_head): part.requires_grad_(True)
    loss, _, _ = same_for_every_split(SFTTask(vlm), prompts)
    with torch.no_grad(): assert loss == pytest.approx(float(-logprobs(vlm, full).sum() / full.answer_mask.sum()), rel=1e-6)


@pytest.mark.parametrize("layer", [-1, -2])
def test_staged_unfreezing(vlm, layer):
    "The layer that trains first is the last one that is read; the projector always trains; going back freezes again."
    vlm.tower.encoder.layers.append(copy.deepcopy(vlm.tower.encoder.layers[0]))      # three layers in all
    vlm.tower.encoder.layers.append(copy.deepcopy(vlm.tower.encoder.layers[0]))
    vlm.model.config.vision_feature_layer = layer
    last = 3 + layer
    for progress, want in ((0., []), (.3, [last]), (.69, [last]), (.7, [0, 1, 2]), (.1, [])):
        unfreeze_tower(vlm, progress)
        layers = [i for i, part in enumerate(vlm.tower.encoder.layers) if all(p.requires_grad for p in part.parameters())]
        assert layers == want and all(p.requires_grad for p in vlm.projector.parameters())
        assert all(p.requires_grad for p in vlm.tower.embeddings.parameters()) == (progress == .7)


def test_grad_norms(vlm, full):
    vlm.projector.requires_grad_(True)
    vlm.answer_logits(full).sum().backward()
    got = grad_norms(dict(projector=vlm.projector, language=vlm.language))
    assert got["language"] == 0. and got["projector"] == pytest.approx(sum(float((p.grad ** 2).sum()) for p in vlm.projector.parameters()) ** .5)


def test_reward_does_not_depend_on_micro_batches(rm, pairs):
    rm.head.requires_grad_(True)
    task = RewardTask(rm)
    task.requires_grad_(False)
    rm.head.requires_grad_(True)
    loss, metrics, _ = same_for_every_split(task, group_pairs(pairs))
    assert 0 <= metrics["accuracy"] <= 1 and loss > 0


@pytest.fixture
def experience(policy, token_rm, vlm, prompts):
    push(vlm, [vlm.eos_id], 2.)
    cfg = PPOConfig(critic=policy.kind, reward="rm", micro_batch=2, lora=SMALL_LORA)
    roll = sample(vlm, prompts, "actor", max_new_tokens=9, seed=2)
    return cfg, roll, *make_experience(policy, token_rm, roll, cfg, beta=.1)


def test_ppo_does_not_depend_on_micro_batches(policy, experience, vlm):
    cfg, roll, exp, _ = experience
    shake(vlm, "actor", std=.02, seed=11)   # the policy has moved since it sampled
    same_for_every_split(PPOTask(policy, cfg), [(exp, i) for i in (3, 0, 5, 2, 1, 4)])


def test_the_first_update_starts_at_ratio_one(policy, experience):
    "Before any step the policy is the one that sampled: the loss is minus the mean advantage, nothing is clipped."
    cfg, roll, exp, _ = experience
    task = PPOTask(policy, cfg)
    batch = task.collate([(exp, i) for i in range(len(roll.prompts))])
    _, metrics = task(batch)
    mask = exp.batch.answer_mask
    assert metrics["clipped"] == 0 and metrics["policy_loss"] == pytest.approx(float(-exp.advantages[mask].mean()), abs=1e-6)
    assert metrics["entropy"] > 0
    assert metrics["value_loss"] == pytest.approx(float(.5 * ((exp.values - exp.returns)[mask] ** 2).mean()), rel=1e-6)


def test_experience(policy, experience, token_rm, vlm):
    "KL against the enumerated one in the mean; returns are rewards and values put together by hand."
    cfg, roll, exp, info = experience
    b = roll.batch
    with torch.no_grad(): ref = token_logprobs(vlm.rule_out(vlm.answer_logits(b)), b.answers)
    cost = .1 * (roll.logprobs - ref)
    score = torch.where(roll.ended, token_rm(b), token_rm(b).clamp(max=cfg.no_eos))
    v = values(policy, token_rm, b)
    early = token_rm.token_scores(b) / token_rm.scale if cfg.dense and token_rm.cfg.kind == "token" else torch.zeros_like(cost)
    assert not roll.ended.all()
    for i, n in enumerate(b.lengths.tolist()):
        running = 0.
        for t in reversed(range(n)):
            after = v[i, t + 1] if t + 1 < n else 0.   # an answer without EOS was scored, too: it ended there
            reward = early[i, t] + (score[i] - early[i].sum() if t == n - 1 else 0.) - cost[i, t]
            running = reward + after - v[i, t] + .95 * running
            assert_close(exp.returns[i, t], running + v[i, t], atol=1e-6, rtol=1e-6)
    assert info["kl"] > 0 and info["ended"] == pytest.approx(float(roll.ended.float().mean())) and info["length"] == pytest.approx(float(b.lengths.float().mean()))


def test_kl_estimates_agree_with_the_full_divergence(vlm, prompts):
    vlm.add_role("actor", SMALL_LORA)
    shake(vlm, "actor", std=.1)
    roll = sample(vlm, prompts * 100, "actor", max_new_tokens=4, seed=6)
    b = roll.batch
    with torch.no_grad(): z, ref = (vlm.rule_out(vlm.answer_logits(b, r)) for r in ("actor", None))
    exact = (full_kl(z, ref) * b.answer_mask).sum() / len(b)
    k1 = ((roll.logprobs - token_logprobs(ref, b.answers)) * b.answer_mask).sum(1)
    assert exact.isfinite() and abs(k1.mean() - exact) < 4 * k1.std() / len(b) ** .5


# --- emergencies ----------------------------------------------------------------------------------------------------

def test_emergency_rolls_back(policy):
    cfg = PPOConfig(kl_emergency=10., beta=.1, kl_target=6.)
    state = PPOState(policy, cfg)
    good = state.snapshot()
    assert state.after(3.1, cfg) is False and state.control.beta == .1
    with torch.no_grad(): state.params[0].add_(1.)
    assert state.after(10.1, cfg) is True
    assert all(torch.equal(a, b) for a, b in zip(state.snapshot(), good))
    assert state.lr_scale == pytest.approx(.1) and state.control.beta == pytest.approx(.3) and state.emergencies == 1
    other = PPOState(policy, cfg)
    other.load_state_dict(state.state_dict())
    assert (other.lr_scale, other.control.beta, other.emergencies) == (state.lr_scale, state.control.beta, 1)


def test_a_run_recovers_from_an_explosion(tmp_path):
    "One far too large step makes the KL explode: the emergency must bring back weights from before that step."
    torch.manual_seed(0)
    vlm = VLM(build_model(SMALL), build_processor(SMALL))
    vlm.model.requires_grad_(False)
    rm = RewardModel(vlm, RewardConfig(lora=SMALL_LORA)).requires_grad_(False)
    cfg = PPOConfig(reward="rm", lora=SMALL_LORA, iterations=3, answers=24, minibatch=12, epochs=2, actor_lr=.5, warmup=0., finish=0., beta=1e-3,
                    kl_emergency=.5, max_new_tokens=8, eval_every=9, save_every=9, keep="last")
    policy = ActorCritic(rm, cfg)
    policy.train_roles()
    prompts = sample_prompts(30, "train", dict(detail=1.))
    state = train_ppo(policy, rm, prompts, prompts[:2], cfg, tmp_path)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert rows[0]["kl"] < 1e-6 and not rows[0]["emergency"] and rows[1]["kl"] > .5 and rows[1]["emergency"]
    assert rows[2]["kl"] < .2 * rows[1]["kl"], "the weights that were brought back are those that exploded"
    assert state.lr_scale < 1
