"""Every family of VLMs goes through the same SFT step, log-probabilities, sampling, reward head and PPO step.

Tiny random models of the real classes with the real processors, in float64 so that rounding hides nothing."""
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import shake
from PIL import Image
from torch import nn
from torch.testing import assert_close

from vlmrlhf_course.model.families import FAMILIES, _text, family_of, tiny_model
from vlmrlhf_course.rl.ppo import ActorCritic, PPOConfig, PPOTask, make_experience
from vlmrlhf_course.train.reward import RewardConfig, RewardModel, score_texts
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.base.runs import UserError, make_accelerator
from vlmrlhf_course.train.sft import SFTTask, backward_through
from vlmrlhf_course.model.vlm import VLM, LoRAConfig, answer, load_vlm, save_vlm, token_logprobs
from vlmrlhf_course.world.scenes import Prompt, open_image

SMALL_LORA = LoRAConfig(r=2, alpha=4)
TEXT_ONLY = [k for k in FAMILIES if k != "paligemma"]


def close(a, b): assert_close(a, b, atol=1e-9, rtol=1e-7)
def logprobs(vlm, batch, role=None): return token_logprobs(vlm.rule_out(vlm.answer_logits(batch, role)), batch.answers) * batch.answer_mask


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    "Picture files of different shapes: wide, tall, square."
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    out = []
    for i, (w, h) in enumerate([(64, 30), (31, 60), (48, 48)]):
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        out.append(str(folder / f"{i}.png"))
    return out


@pytest.fixture(scope="module", params=list(FAMILIES))
def base(request):
    model, processor = tiny_model(request.param)
    vlm = VLM(model.double().requires_grad_(False), processor)
    vlm.kind = request.param
    return vlm


@pytest.fixture
def vlm(base): return copy.deepcopy(base)


@pytest.fixture
def prompts(vlm, pictures):
    "One picture, two pictures, none (where the family can do without), one again; questions of different lengths."
    a, b, c = pictures
    text = Prompt("text", "what colour is a boat ?", "blue .") if vlm.kind in TEXT_ONLY else Prompt("text", "what ?", "blue .", b)
    return [Prompt("detail", "describe the picture .", "a red cat .", a), Prompt("detail", "which of the two pictures is the one ?", "yes .", (b, c)), text,
            Prompt("detail", "is there a boat ?", "no a small boat .", c)]


@pytest.fixture
def full(vlm, prompts): return vlm.batch(prompts, [p.answer for p in prompts])


def plain(vlm, prompt, ids=()):
    "What the family's processor makes of a prompt and an answer: nothing of ours, but for the template that is chosen."
    refs = () if not prompt.image else (prompt.image,) if isinstance(prompt.image, str) else prompt.image
    content = [{"type": "image"}] * len(refs) + [{"type": "text", "text": prompt.text}]
    said = (vlm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True) if vlm.processor.chat_template
            else "<image>" * len(refs) + prompt.text)
    x = dict(vlm.processor(text=[said], images=[[open_image(r) for r in refs]] if refs else None, add_special_tokens=False, return_tensors="pt"))
    x.pop("labels", None)
    new = torch.tensor([list(ids)], dtype=torch.long)
    for key, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", int(vlm.kind == "paligemma"))):   # as `suffix` does for PaliGemma
        if key in x: x[key] = torch.cat([x[key], torch.full_like(new, fill)], 1)
    x["input_ids"] = torch.cat([x["input_ids"], new], 1)
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in x.items()}


@torch.no_grad()
def test_cached_features_give_the_logits_of_the_plain_model(vlm, prompts, full):
    "The batch, with padding and kept features, against the model's own forward pass, row by row, from pixels."
    ours = vlm.answer_logits(full)
    for _ in range(2):   # the second time from the cache
        for i, p in enumerate(prompts):
            ids = full.answers[i, full.answer_mask[i]].tolist()
            x = plain(vlm, p, ids)
            assert vlm.prompt_ids(p) == x["input_ids"][0, :-len(ids)].tolist(), "another prompt than the processor's"
            want = vlm.model(**x).logits[0, -len(ids) - 1:-1]
            assert want.std() > .05
            assert_close(ours[i, :len(ids)], want, atol=1e-5, rtol=1e-5)
        before = vlm.encoded
        ours = vlm.answer_logits(vlm.batch(prompts, [p.answer for p in prompts]))
        assert vlm.encoded == before


@torch.no_grad()
def test_every_picture_matters(vlm, prompts, full):
    "Each of a prompt's pictures, and their order, for the row they belong to and no other."
    want = logprobs(vlm, full)
    for row, p in enumerate(prompts):
        refs = () if not p.image else (p.image,) if isinstance(p.image, str) else p.image
        for k in range(len(refs)):
            changed = [(*refs[:k], "blank", *refs[k + 1:]) if j == row else q.image for j, q in enumerate(prompts)]
            b = vlm.batch([replace(q, image=i) for q, i in zip(prompts, changed)], [q.answer for q in prompts])
            moved = (logprobs(vlm, b) - want).abs().amax(1) > 1e-7
            assert moved.tolist() == [j == row for j in range(len(prompts))]


@torch.no_grad()
def test_padding_and_company_do_not_matter(vlm, prompts, full):
    want = logprobs(vlm, full)
    for i, p in enumerate(prompts):
        alone = logprobs(vlm, vlm.batch([p], [p.answer]))
        close(alone[0], want[i, :alone.shape[1]])
    longer = Prompt("x", "describe the picture . " * 6, "a boat . " * 5, prompts[0].image)
    padded = vlm.batch([longer, *prompts, longer], [longer.answer, *[p.answer for p in prompts], longer.answer])   # more padding on both sides
    close(logprobs(vlm, padded)[1:-1, :want.shape[1]], want)
    order = torch.tensor([3, 1, 1, 0])
    part = full.rows(order)
    close(logprobs(vlm, part), want[order][:, :part.answers.shape[1]])
    none = full.rows(torch.tensor([2]))
    close(logprobs(vlm, none), want[2:3, :none.answers.shape[1]])


def love(vlm, ids, by): vlm.model.get_output_embeddings().register_forward_hook(
    lambda m, i, out: out.index_add(-1, torch.tensor(ids), torch.full((*out.shape[:-1], len(ids)), by, dtype=out.dtype)))


@torch.no_grad()
def test_sampled_logprobs_are_those_of_the_forward_pass(vlm, prompts):
    vlm.add_role("actor", SMALL_LORA)
    shake(vlm, "actor", std=.1)
    love(vlm, [vlm.eos_id], 2. if vlm.kind != "paligemma" else 5.)   # its vocabulary is large
    ended = []
    for role, temperature in ((None, 1.), ("actor", .7)):
        roll = sample(vlm, prompts * 4, role, temperature, max_new_tokens=7, seed=2, drop=1 / 8, merge=True)
        b, m = roll.batch, roll.batch.answer_mask
        again = token_logprobs(vlm.rule_out(vlm.answer_logits(b, role)), b.answers, temperature)
        close(again[m], roll.logprobs[m])
        ended += roll.ended.tolist()
    assert 2 < sum(ended) < len(ended) - 2, "rows must end at different times, else this tests little"


@torch.no_grad()
def test_greedy_answers_are_those_of_generate(vlm, prompts):
    "Token by token: `sample` at a temperature near 0, `answer`, and the model's own `generate` from pixels."
    roll = sample(vlm, prompts, temperature=1e-6, max_new_tokens=8)
    ours = [row[m].tolist() for row, m in zip(roll.batch.answers, roll.batch.answer_mask)]
    assert len({tuple(o) for o in ours}) > 1
    for p, said in zip(prompts, ours):
        x = plain(vlm, p)
        out = vlm.model.generate(**x, max_new_tokens=8, do_sample=False, suppress_tokens=vlm.banned_ids, eos_token_id=vlm.eos_id, pad_token_id=vlm.pad_id)
        assert out[0, x["input_ids"].shape[1]:].tolist() == said
    texts = vlm.tokenizer.batch_decode(roll.batch.answers, skip_special_tokens=True)
    assert answer(vlm, prompts, 0., max_new_tokens=8) == texts


@torch.no_grad()
def test_placeholders_are_never_sampled(vlm, prompts):
    assert vlm.image_token_id in vlm.banned_ids
    love(vlm, vlm.banned_ids, 30.)
    roll = sample(vlm, prompts * 5, max_new_tokens=6, seed=1)
    said = roll.batch.answers[roll.batch.answer_mask]
    assert len(said) > 80 and not torch.isin(said, torch.tensor(vlm.banned_ids)).any()
    vlm.hidden(roll.batch)   # no mismatch


def test_an_sft_step_lowers_the_loss(vlm, prompts):
    for part in (vlm.projector, vlm.language, vlm.model.get_output_embeddings()): part.requires_grad_(True)
    task = SFTTask(vlm)
    params = [p for p in task.parameters() if p.requires_grad]
    opt, losses = torch.optim.SGD(params, .05), []
    for _ in range(3):
        losses.append(backward_through(task, prompts, 2, make_accelerator())[0])
        opt.step(), opt.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    assert all(p.grad is None for p in vlm.family.tower_parameters(vlm.model)), "the tower is frozen"


def test_gradients_reach_projector_and_thawed_tower(vlm, prompts):
    vlm.projector.requires_grad_(True)
    logprobs(vlm, vlm.batch(prompts, [p.answer for p in prompts])).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vlm.projector.parameters() if p.dim() > 1)
    assert len(vlm._features), "a projector that trains is no reason to forget what the tower saw"
    for p in vlm.family.tower_parameters(vlm.model): p.requires_grad_(True)
    logprobs(vlm, vlm.batch(prompts, [p.answer for p in prompts])).sum().backward()
    reached = [p for p in vlm.family.tower_parameters(vlm.model) if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(reached) > 10 and vlm.tower_trains and not vlm._features


@pytest.mark.parametrize("kind", ["token", "scalar"])
def test_reward_model(vlm, prompts, kind):
    torch.manual_seed(0)
    rm = RewardModel(vlm, RewardConfig(lora=SMALL_LORA, kind=kind)).double().requires_grad_(False)
    nn.init.normal_(rm.head.out.weight)
    said = [p.answer for p in prompts]
    rewards = score_texts(rm, prompts, said)
    assert rewards.shape == (4,) and rewards.isfinite().all()
    close(rewards, torch.cat([score_texts(rm, [p], [a]) for p, a in zip(prompts, said)]))
    blank = score_texts(rm, prompts, said, ["blank"] * len(prompts))
    assert ((blank - rewards).abs() > 1e-9).tolist() == [p.image is not None for p in prompts]


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_a_ppo_step(vlm, prompts, critic):
    "Sample, score, estimate advantages, step: gradients reach adapters and value head alone, and the policy moves while the reference does not."
    torch.manual_seed(0)
    cfg = PPOConfig(reward="rm", lora=SMALL_LORA, max_new_tokens=5, critic=critic)
    rm = RewardModel(vlm, RewardConfig(lora=SMALL_LORA)).double().requires_grad_(False)
    policy = ActorCritic(rm, cfg).double()
    nn.init.normal_(policy.value.out.weight, std=.1)
    shake(vlm, "actor", std=.02)
    policy.train_roles()
    roll = sample(vlm, prompts * 2, "actor", max_new_tokens=5, seed=3)
    exp, info = make_experience(policy, rm, roll, cfg, beta=.1)
    assert info["kl"] > 0 and exp.advantages[roll.batch.answer_mask].isfinite().all()
    for i in range(4):   # rows with one picture, two and none: alone as in company
        row = policy.values(roll.batch.rows(torch.tensor([i])), None if exp.states is None else exp.states[i:i + 1, :int(roll.batch.lengths[i]) + 1])
        close(row[0, :-1].detach(), exp.values[i, :row.shape[1] - 1])
    task = PPOTask(policy, cfg)
    reference = logprobs(vlm, roll.batch).detach()
    _, metrics = task(task.collate([(exp, i) for i in range(8)]))
    assert metrics["clipped"] == 0 and abs(metrics["policy_loss"] + float(exp.advantages[roll.batch.answer_mask].mean())) < 1e-6, "the first ratio is 1"
    backward_through(task, [(exp, i) for i in (5, 0, 1, 2, 3, 4, 6, 7)], 3, make_accelerator(), shard=False)
    touched = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched and all(".lora_" in n and (".actor." in n or ".critic." in n) or n.startswith("value.") for n in touched)
    assert any(".actor." in n for n in touched) and any(n.startswith("value.look") for n in touched) and (critic == "head") == (not any(".critic." in n for n in touched))
    torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], 1e-2).step()
    assert torch.equal(logprobs(vlm, roll.batch), reference) and not torch.allclose(logprobs(vlm, roll.batch, "actor"), roll.logprobs, atol=1e-6)


def test_a_full_copy_as_a_role(vlm, prompts, full):
    "Language-model-only RLHF without adapters: sampling and `generate` speak with the copy."
    want = logprobs(vlm, full).detach()
    vlm.add_role("actor", LoRAConfig(r=0))
    close(logprobs(vlm, full, "actor").detach(), want)
    with torch.no_grad(): vlm.roles["actor"][1].weight.mul_(-1)
    roll = sample(vlm, prompts[:2], "actor", temperature=1e-6, max_new_tokens=4)
    assert answer(vlm, prompts[:2], 0., role="actor", max_new_tokens=4) == vlm.tokenizer.batch_decode(roll.batch.answers, skip_special_tokens=True)
    close(logprobs(vlm, full).detach(), want)


# --- what single families do differently ----------------------------------------------------------------------------

def vlm_of(kind):
    model, processor = tiny_model(kind)
    vlm = VLM(model.double().requires_grad_(False), processor)
    vlm.kind = kind
    return vlm


@torch.no_grad()
@pytest.mark.parametrize("kind", [k for k in FAMILIES if k not in ("qwen2_5_vl", "internvl")])   # these processors cannot be loaded without torchvision
def test_save_and_load(kind, pictures, tmp_path):
    model, processor = tiny_model(kind)
    vlm, prompt = VLM(model.requires_grad_(False), processor), Prompt("x", "is there a boat ?", "no .", (pictures[0], pictures[2]))
    save_vlm(vlm, tmp_path / "model")
    again = load_vlm(tmp_path / "model")
    a, b = vlm.batch([prompt], ["no ."]), again.batch([prompt], ["no ."])
    assert torch.equal(a.input_ids, b.input_ids) and torch.equal(vlm.answer_logits(a), again.answer_logits(b)) and again.banned_ids == vlm.banned_ids


@torch.no_grad()
def test_the_first_paligemma(pictures, monkeypatch):
    "Gemma 1 reads: one mask in place of two, no cap on logits."
    tiny = type(FAMILIES["paligemma"]).tiny
    def older(self, words):
        config, processor = tiny(self, words)
        text = {k: getattr(config.text_config, k) for k in _text(processor.tokenizer)}
        return type(config)(vision_config=config.vision_config, text_config=dict(model_type="gemma", head_dim=8, **text), projection_dim=32,
                            image_token_id=config.image_token_id), processor
    monkeypatch.setattr(type(FAMILIES["paligemma"]), "tiny", older)
    vlm = vlm_of("paligemma")
    assert vlm.language.config.model_type == "gemma"
    p = Prompt("x", "describe the picture .", "a red cat .", pictures[0])
    longer = replace(p, text="describe the picture . is there a boat ?")
    b = vlm.batch([p, longer], ["a red cat .", "no ."])
    ids = b.answers[0, b.answer_mask[0]].tolist()
    assert_close(vlm.answer_logits(b)[0, :len(ids)], vlm.model(**plain(vlm, p, ids)).logits[0, -len(ids) - 1:-1], atol=1e-5, rtol=1e-5)
    roll = sample(vlm, [p, longer] * 3, max_new_tokens=4)
    close(logprobs(vlm, roll.batch), roll.logprobs)


def test_pictures_of_another_size_are_another_prompt(pictures, tmp_path):
    "Tokens are kept by text and size: the same question about a larger picture needs more placeholders, where size matters."
    Image.open(pictures[0]).resize((24, 24)).save(tmp_path / "small.png")
    for kind in ("llava_next", "qwen2_5_vl", "idefics3", "internvl"):
        vlm = vlm_of(kind)
        n = [vlm.prompt_ids(Prompt("x", "what ?", "", ref)).count(vlm.image_token_id) for ref in (pictures[0], str(tmp_path / "small.png"), pictures[0])]
        assert n[0] == n[2] != n[1], (kind, n)
        swapped = vlm.batch([Prompt("x", "what ?", "", pictures[0])], images=[str(tmp_path / "small.png")])   # the prompt follows the picture that is shown
        assert (swapped.input_ids == vlm.image_token_id).sum() == n[1]
        vlm.hidden(swapped)


def test_one_beginning_and_none_inside(pictures):
    "Gemma's tokenizer and its template both write <bos>."
    vlm = vlm_of("gemma3")
    ids = vlm.batch([Prompt("x", "what ?", "", pictures[0])], ["no ."]).input_ids[0].tolist()
    assert ids.count(vlm.tokenizer.bos_token_id) == 1 == ids[0:1].count(vlm.tokenizer.bos_token_id) and ids[-1] == vlm.tokenizer.convert_tokens_to_ids("<end_of_turn>")


def test_paligemma_needs_a_picture():
    with pytest.raises(ValueError, match="images"): vlm_of("paligemma").batch([Prompt("x", "what ?", "")])


def test_an_unknown_family_is_an_error():
    config = FAMILIES["llava"].tiny(["a"])[0]
    config.model_type = "llava_nextt"
    with pytest.raises(UserError, match="llava_next.*93_families"): family_of(config)
