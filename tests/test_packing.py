"Answers to one prompt in one row: the same states, gradients, losses and samples as in rows of their own."
import copy
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import base, logprobs, pictures, prompts, vlm  # noqa: F401 (fixtures)
from test_model import SMALL_LORA
from test_properties import small_ppo
from transformers import DynamicCache, LlavaConfig, MistralConfig

from vlmrlhf_course.train.dpo import DPOTask
from vlmrlhf_course.model.families import FAMILIES, Pictures
from vlmrlhf_course.model.packing import distinct, layout, pack, packing_size, same_prompts, who_sees
from vlmrlhf_course.rl.ppo import PPOConfig, PPOTask, make_experience, minibatches, shares, train_ppo
from vlmrlhf_course.train.reward import RewardConfig, RewardModel, RewardTask, group_pairs
from vlmrlhf_course.rl.rollout import length_groups, sample
from vlmrlhf_course.base.runs import UserError
from vlmrlhf_course.model.vlm import VLM, build_model, build_processor, pad_sides
from vlmrlhf_course.world.scenes import Prompt, make_prompt, sample_scenes

ANSWERS = ["a red cat .", "no .", "yes a small boat .", "a large blue cat . yes . no ."]
PACKING = {"llava", "llava_next", "qwen2_5_vl", "idefics3", "internvl"}


def close(a, b):
    "Norms are computed in float32 whatever the model's type, so that sums in another order differ by its rounding."
    scale = float(b.abs().max())
    assert scale > 0 and float((a - b).abs().max()) < 2e-5 * scale


def crowd(vlm, prompts, each=3, apart=False):
    "`each` answers to every prompt, the prompts in turn; `apart`: as if all prompts were different."
    said = [p for _ in range(each) for p in prompts]
    b = vlm.batch(said, [ANSWERS[i * 7 % 4] for i in range(len(said))])
    return replace(b, asked=None) if apart else b


# --- layout -------------------------------------------------------------------------------------------------------------

lists = st.lists(st.integers(2, 9), max_size=5)

@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), lists), min_size=1, max_size=12), st.integers(1, 5))
def test_every_token_stands_once_and_sees_its_prompt_and_its_answer(rows, size):
    "By definition, cell by cell: what a token sees in a packed row are the tokens that it sees in a row of its own."
    asked = [[10 + q] * (q + 1) for q, _ in rows]                    # prompts of one to four tokens
    b = replace(pad_sides(asked, [a for _, a in rows], 0), asked=same_prompts([q for q, _ in rows]))
    packed, home, where = pack(b, size)
    assert packed.input_ids.shape == packed.attention_mask.shape == packed.position_ids.shape and len(packed.input_ids) >= len({q for q, _ in rows})
    P, per_row = b.prompt_length, home[:, 0].bincount()
    assert int(per_row.max()) <= size
    assert int(packed.attention_mask.sum()) == sum(len(a) for _, a in rows) + sum(rows[int((home[:, 0] == r).nonzero()[0])][0] + 1 for r in range(len(per_row)))
    for i, (q, answer) in enumerate(rows):
        r, at = int(home[i]), where[i].tolist()
        assert at[0] == P - 1 and packed.input_ids[r, at[1:len(answer) + 1]].tolist() == answer
        own = [c for c in range(P) if packed.attention_mask[r, c]]
        assert packed.input_ids[r, own].tolist() == asked[i]
        for t, cell in enumerate(at[1:len(answer) + 1]):
            assert packed.sees[r, 0, cell].nonzero()[:, 0].tolist() == own + at[1:t + 2]
            assert int(packed.position_ids[r, cell]) == q + 1 + t
    assert packed.sees.any(-1).all(), "a cell that sees nothing is NaN"


def test_who_sees_ignores_padding():
    got = who_sees(torch.tensor([[-1, -1, 4, 4]]), torch.tensor([[0, 1, 1, 0]]))[0, 0]
    assert got.long().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


def test_rows_are_as_even_as_possible():
    b = replace(pad_sides([[5]] * 10, [[1]] * 10, 0), asked=torch.zeros(10, dtype=torch.long))
    assert pack(b)[1][:, 0].bincount().tolist() == [5, 5]


def test_distinct_takes_the_first_row_of_each_prompt():
    b = replace(pad_sides([[1], [2], [1], [3], [2]], [[]] * 5, 0), asked=torch.tensor([7, 2, 7, 5, 2]))
    first, which = distinct(b)
    assert sorted(first.tolist()) == [0, 1, 3] and first[which].tolist() == [0, 1, 0, 3, 1]
    assert [x.tolist() for x in distinct(replace(b, asked=None))] == [[0, 1, 2, 3, 4]] * 2


def asks(prompt, answer, k, of=4):
    "A batch of `of` prompts with k answers each, all of one length."
    return replace(pad_sides([[1] * prompt] * of * k, [[2] * answer] * of * k, 0), asked=torch.arange(of).repeat(k))


@pytest.mark.parametrize("batch, width, size", [
    (asks(17, 25, 1), 96, 1), (asks(17, 25, 2), 96, 2), (asks(17, 25, 8), 96, 4), (asks(17, 72, 8), 96, 1), (asks(17, 256, 8), 96, 1),
    (asks(600, 100, 8), 4096, 8), (asks(600, 100, 2), 4096, 2), (asks(600, 100, 16), 4096, 8), (replace(asks(600, 100, 8), asked=None), 4096, 1)])
def test_packing_pays_for_long_prompts_and_short_answers(batch, width, size):
    "Measured where it was slower: eight answers of 72 tokens to a prompt of 17 took 1.4 times as long."
    assert packing_size(batch, width) == size


def test_the_cost_is_that_of_the_rows_that_are_made():
    "Uneven prompts: all rows are as long as the longest, which may cost more than is saved."
    b = replace(pad_sides([[1] * 17] * 16, [[2] * 25] * 16, 0), asked=torch.tensor([0] * 9 + list(range(1, 8))))
    def cost(rows, L): return rows * L * (6 * 96 + L)
    packed = {size: cost(*pack(b, size)[0].input_ids.shape) for size in (2, 4, 8)} | {1: cost(*b.input_ids.shape)}
    assert packing_size(b, 96) == min(sorted(packed), key=packed.get) and packed[8] > packed[1]


def test_layout():
    assert [g.tolist() for g in layout([3, 5, 3, 3, 5], 2)] == [[0, 2], [3], [1, 4]]


def test_text_and_pictures_make_a_prompt():
    tiny = VLM(build_model(SMALL), build_processor(SMALL))
    a, b = (f"scene:{s}" for s in sample_scenes(2))
    said = [Prompt("detail", "describe the picture .", "", a), Prompt("detail", "describe the picture .", "", b), Prompt("brief", "describe the picture .", "x", a),
            Prompt("detail", "what is this ?", "", a), Prompt("text", "describe the picture .", "", None)]
    assert tiny.batch(said).asked.tolist() == [0, 1, 0, 2, 3]
    two = [Prompt("detail", "which one ?", "", x) for x in ((a, b), (a, a), (b, a), (a, b))]
    assert tiny.batch(two).asked.tolist() == [0, 1, 2, 0], "all pictures count, in their order"
    assert tiny.batch(said, images=[a] * 5).asked.tolist() == [0, 0, 0, 1, 2], "the pictures that are shown count"
    assert tiny.batch(said).rows(torch.tensor([4, 2])).asked.tolist() == [3, 0]


# --- the same states, in every family -----------------------------------------------------------------------------------

def test_states_and_gradients(vlm, prompts):
    "Several pictures a prompt, none, tiles, positions in rows and columns, padding on both sides."
    assert vlm.family.packs(vlm.model.config) == (vlm.kind in PACKING)
    shake_projector = next(vlm.projector.parameters()).requires_grad_()
    found = []
    for apart in (True, False):
        b = crowd(vlm, prompts, apart=apart)
        with torch.no_grad(): states = vlm.answer_states(b)
        assert states.shape[:2] == (len(b), b.answer_mask.shape[1] + 1)
        shake_projector.grad = None
        (logprobs(vlm, b) ** 2).sum().backward()
        found.append((states[:, 0], states[:, 1:][b.answer_mask], shake_projector.grad.clone()))
    for x, y in zip(*found): close(y, x)


def test_packed_rows_are_fewer_and_are_used(vlm, prompts, monkeypatch):
    shapes = []
    monkeypatch.setattr(VLM, "embed", lambda self, batch, role=None, own=VLM.embed: shapes.append(len(batch)) or own(self, batch, role))
    monkeypatch.setattr(VLM, "width", 4096)   # as in a model for which it always pays
    with torch.no_grad(): vlm.answer_states(crowd(vlm, prompts, each=4))
    assert shapes == ([4] if vlm.kind in PACKING else [16])


def test_windows_and_other_attention_are_not_packed():
    "A window counts cells of the row, not positions; only SDPA takes our mask."
    mistral = LlavaConfig(text_config=MistralConfig(sliding_window=64))
    assert not FAMILIES["llava"].packs(mistral)
    eager = build_model(SMALL)
    assert FAMILIES["llava"].packs(eager.config)
    eager.set_attn_implementation("eager")
    assert not FAMILIES["llava"].packs(eager.config)


# --- the stages ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def tiny(): return VLM(build_model(SMALL).double().requires_grad_(False), build_processor(SMALL))


def described(n, each):
    rng = random.Random(0)
    return [make_prompt(s, "detail", rng) for s in sample_scenes(n, seed="packing") for _ in range(each)]


def loss_and_gradients(task, batch, module):
    loss, metrics = task(batch)
    module.zero_grad()
    loss.backward()
    return float(loss), metrics, {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def both_ways(task, batch, module, apart):
    "A task's loss, metrics and gradients on a batch, and on one whose prompts all count as different."
    (loss, metrics, grads), (loss2, metrics2, grads2) = (loss_and_gradients(task, b, module) for b in (batch, apart))
    assert loss == pytest.approx(loss2, rel=1e-5) and metrics == pytest.approx(metrics2, rel=1e-4, abs=1e-6) and grads.keys() == grads2.keys() and grads
    for name in grads: close(grads[name], grads2[name])


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_pairs(tiny, kind):
    pairs = [dict(image=p.image, prompt=p.text, chosen=p.answer, rejected=f"{w} cat .") for p in described(3, 1) for w in ("a", "no")]
    if kind == "reward":
        rm = RewardModel(tiny, RewardConfig(lora=SMALL_LORA)).double().train()
        shake(tiny, "reward")
        for n, p in rm.named_parameters(): p.requires_grad_(".reward." in n or n.startswith("head"))
        task = RewardTask(rm)
    else:
        tiny.add_role("dpo", SMALL_LORA)
        shake(tiny, "dpo")
        task = DPOTask(tiny, .3)
    batch, index = task.collate(group_pairs(pairs))
    assert packing_size(batch, tiny.width) > 1
    both_ways(task, (batch, index), task, (replace(batch, asked=None), index))


def test_a_prompt_is_read_once_in_sampling(tiny, monkeypatch):
    "The same tokens and log-probabilities as without, and fewer rows in the first pass."
    said, rows = described(2, 4), []
    monkeypatch.setattr(VLM, "embed", lambda self, batch, role=None, own=VLM.embed: rows.append(len(batch)) or own(self, batch, role))
    once = sample(tiny, said, max_new_tokens=12, seed=5)
    monkeypatch.setattr("vlmrlhf_course.model.vlm.same_prompts", lambda keys: torch.arange(len(keys)))
    apart = sample(tiny, said, max_new_tokens=12, seed=5)
    assert rows == [2, 8] and torch.equal(once.batch.input_ids, apart.batch.input_ids) and len({tuple(r) for r in once.batch.answers.tolist()}) > 2
    close(once.logprobs, apart.logprobs)
    close(logprobs(tiny, once.batch), once.logprobs)


def test_ppo_with_several_answers_to_a_prompt(tiny):
    "Experience, loss and gradients as with rows of their own."
    policy, rm, cfg, _ = small_ppo(tiny)
    cfg = replace(cfg, answers=8, minibatch=8, answers_per_prompt=4, micro_batch=8)
    policy.double(), rm.double(), shake(tiny, "actor")
    for p in policy.value.parameters(): torch.nn.init.normal_(p, std=.3)
    roll = sample(tiny, described(2, 4), "actor", max_new_tokens=10, seed=2)
    apart = replace(roll, batch=replace(roll.batch, asked=None))
    (exp, info), (exp2, info2) = (make_experience(policy, rm, r, cfg, .1) for r in (roll, apart))
    assert info == pytest.approx(info2, rel=1e-4, abs=1e-6)
    for name in ("values", "advantages", "returns"): close(*(getattr(e, name)[roll.batch.answer_mask] for e in (exp, exp2)))
    shake(tiny, "actor", seed=9)
    task = PPOTask(policy, cfg)
    both_ways(task, task.collate([(exp, i) for i in range(8)]), policy, task.collate([(exp2, i) for i in range(8)]))


# --- the loop -----------------------------------------------------------------------------------------------------------

def test_minibatches_hold_whole_prompts():
    lengths, asked = torch.tensor([9, 1, 2, 2, 3, 3, 7, 1]), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    cfg = PPOConfig(answers=8, answers_per_prompt=2, minibatch=4, epochs=4)
    found = list(minibatches(lengths, cfg, "0/0", asked=asked))
    assert [len(g) for g in found] == [4] * 8
    for epoch in range(4): assert sorted(found[2 * epoch] + found[2 * epoch + 1]) == list(range(8))
    for g in found:
        assert all(g[i] % 2 == 0 and g[i + 1] == g[i] + 1 for i in (0, 2)), "the answers to a prompt stay together"
        means = [float(lengths[g[i:i + 2]].float().mean()) for i in (0, 2)]
        assert means == sorted(means)
    assert len({frozenset(g) for g in found}) > 2
    with pytest.raises(UserError, match="minibatch=4.*3 × 2"): shares(cfg, SimpleNamespace(process_index=0, num_processes=3))


def test_a_batch_that_cannot_be_shared_out_is_refused_before_anything_is_sampled(tiny, tmp_path, monkeypatch):
    policy, rm, cfg, pool = small_ppo(tiny)
    monkeypatch.setattr("vlmrlhf_course.rl.ppo.make_accelerator", lambda: SimpleNamespace(process_index=0, num_processes=4))
    with pytest.raises(UserError, match="answers=6.*4 × 1"): train_ppo(policy, rm, pool, pool[:2], cfg, tmp_path)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=20), st.integers(1, 6))
def test_length_groups_keep_prompts_together(rows, size):
    asked, lengths = (torch.tensor(x) for x in zip(*rows))
    order = torch.cat(length_groups(lengths, size, asked))
    assert sorted(order.tolist()) == list(range(len(rows)))
    means = [float(lengths[asked == asked[i]].float().mean()) for i in order.tolist()]
    assert means == sorted(means)
    runs = [a for i, a in enumerate(asked[order].tolist()) if i == 0 or a != asked[order][i - 1]]
    assert len(runs) == len(set(runs))


@pytest.mark.parametrize("bad", [dict(answers=9), dict(minibatch=3), dict(answers_per_prompt=0), dict(answers_per_prompt=-1), dict(pool=3)])
def test_settings_that_cannot_work(bad):
    with pytest.raises(ValueError, match="answers"): PPOConfig(**dict(answers=8, minibatch=4, answers_per_prompt=2, pool=40) | bad)


def test_a_run_samples_each_prompt_as_often_as_asked(tmp_path, monkeypatch):
    "Two iterations: two pictures with two answers each, whole prompts in scoring and in every update, and something is learned."
    policy, rm, cfg, pool = small_ppo(VLM(build_model(SMALL), build_processor(SMALL)))
    cfg = replace(cfg, answers=4, answers_per_prompt=2, minibatch=2, micro_batch=3, iterations=2, epochs=1, eval_every=9, keep="last")
    drawn, read = [], []
    def watched(vlm, prompts, *args, own=sample, **kwargs):
        drawn.append([p.image for p in prompts])
        return own(vlm, prompts, *args, **kwargs)
    monkeypatch.setattr("vlmrlhf_course.rl.rollout.sample", watched)
    monkeypatch.setattr(VLM, "answer_states", lambda self, batch, role=None, own=VLM.answer_states: read.append(batch.asked.tolist()) or own(self, batch, role))
    before = copy.deepcopy({n: p.detach() for n, p in policy.named_parameters() if p.requires_grad})
    train_ppo(policy, rm, pool, pool[:2], cfg, tmp_path)
    training = [images for images in drawn if len(images) == 4]
    assert len(training) == 2 and all(a == b != c == d for a, b, c, d in training)
    assert sum(images not in training for images in drawn) == 1, "validation, once"
    in_training = [asked for asked in read if len(asked) == 2 and asked[0] == asked[1]]
    assert len(in_training) == 2 * (2 + 2 + 2), "reference, reward model and updates: two prompts each, never torn apart"
    assert any(not torch.equal(p, before[n]) for n, p in policy.named_parameters() if n in before)


@pytest.mark.parametrize("k, micro, at_once", [(1, 20, 20), (8, 20, 16), (8, 8, 8), (8, 4, 4), (3, 20, 18)])
def test_whole_prompts_are_computed_at_once(k, micro, at_once):
    "… where they fit into a micro-batch."
    assert PPOConfig(answers=24, minibatch=24, answers_per_prompt=k, micro_batch=micro).at_once == at_once
