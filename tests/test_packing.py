"""Answers to one prompt in one row: the same states, gradients, losses and samples as in rows of
their own."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SMALL, SMALL_LORA, experience_of, shake, small_ppo
from test_families import base, logprobs, prompts, vlm  # noqa: F401 (fixtures)
from transformers import LlavaConfig, MistralConfig

from vlmrlhf_course.data.pairs import group_pairs
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.batch import pad_sides
from vlmrlhf_course.model.family import FAMILIES
from vlmrlhf_course.model.packing import (
    distinct,
    layout,
    pack,
    packing_size,
    same_prompts,
    who_sees,
)
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.train.dpo import DPOConfig, DPOTask
from vlmrlhf_course.train.reward import RewardConfig, RewardModel, RewardTask
from vlmrlhf_course.world.llava import build_model, build_processor
from vlmrlhf_course.world.scenes import make_prompt, sample_scenes

ANSWERS = ["a red cat .", "no .", "yes a small boat .", "a large blue cat . yes . no ."]
PACKING = {*FAMILIES} - {"gemma3", "paligemma"}  # whose prompts are read in both directions


def close(a, b):
    "Up to float32's rounding: norms are computed in it whatever the model's type."
    scale = float(b.abs().max())
    assert scale > 0 and float((a - b).abs().max()) < 2e-5 * scale


def crowd(vlm, prompts, each=3, apart=False):
    "`each` answers to every prompt, in turn; `apart`: as if all prompts were different."
    said = [p for _ in range(each) for p in prompts]
    b = vlm.batch(said, [ANSWERS[i * 7 % 4] for i in range(len(said))])
    return replace(b, question_of=None) if apart else b


# --- layout ---------------------------------------------------------------------------------------

lists = st.lists(st.integers(2, 9), max_size=5)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), lists), min_size=1, max_size=12), st.integers(1, 5))
def test_every_token_stands_once_and_sees_its_prompt_and_its_answer(rows, size):
    "By definition, cell by cell: a token sees what it sees in a row of its own."
    asked = [[10 + q] * (q + 1) for q, _ in rows]  # prompts of one to four tokens
    b = replace(
        pad_sides(asked, [a for _, a in rows], 0), question_of=same_prompts([q for q, _ in rows])
    )
    packed, home, where = pack(b, size)
    home = home[:, 0]
    shapes = {packed.input_ids.shape, packed.attention_mask.shape, packed.position_ids.shape}
    assert len(shapes) == 1 and len(packed.input_ids) >= len({q for q, _ in rows})
    assert int(home.bincount().max()) <= size
    first = [int((home == r).nonzero()[0]) for r in range(len(packed.input_ids))]
    tokens = sum(len(a) for _, a in rows) + sum(len(asked[i]) for i in first)
    assert int(packed.attention_mask.sum()) == tokens
    P = b.prompt_length
    for i, (q, answer) in enumerate(rows):
        r, before, cells = int(home[i]), int(where[i, 0]), where[i, 1 : len(answer) + 1].tolist()
        assert before == P - 1 and packed.input_ids[r, cells].tolist() == answer
        own = [c for c in range(P) if packed.attention_mask[r, c]]
        assert packed.input_ids[r, own].tolist() == asked[i]
        for t, cell in enumerate(cells):
            assert packed.attends[r, 0, cell].nonzero()[:, 0].tolist() == own + cells[: t + 1]
            assert int(packed.position_ids[r, cell]) == q + 1 + t
    assert packed.attends.any(-1).all(), "a cell that sees nothing is NaN"


def test_who_sees_ignores_padding():
    got = who_sees(torch.tensor([[-1, -1, 4, 4]]), torch.tensor([[0, 1, 1, 0]]))[0, 0]
    assert got.long().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


def test_rows_are_as_even_as_possible():
    b = replace(pad_sides([[5]] * 10, [[1]] * 10, 0), question_of=torch.zeros(10, dtype=torch.long))
    assert pack(b)[1][:, 0].bincount().tolist() == [5, 5]


def test_distinct_takes_the_first_row_of_each_prompt():
    b = pad_sides([[1], [2], [1], [3], [2]], [[]] * 5, 0)
    b.question_of = torch.tensor([7, 2, 7, 5, 2])
    first, which = distinct(b)
    assert sorted(first.tolist()) == [0, 1, 3] and first[which].tolist() == [0, 1, 0, 3, 1]
    assert [x.tolist() for x in distinct(replace(b, question_of=None))] == [[0, 1, 2, 3, 4]] * 2


def asks(prompt, answer, k, of=4):
    "A batch of `of` prompts with k answers each, all of one length."
    b = pad_sides([[1] * prompt] * of * k, [[2] * answer] * of * k, 0)
    return replace(b, question_of=torch.arange(of).repeat(k))


@pytest.mark.parametrize(
    "batch, width, size",
    [
        (asks(17, 25, 1), 96, 1),
        (asks(17, 25, 2), 96, 2),
        (asks(17, 25, 8), 96, 4),
        (asks(17, 72, 8), 96, 1),
        (asks(17, 256, 8), 96, 1),
        (asks(600, 100, 8), 4096, 8),
        (asks(600, 100, 2), 4096, 2),
        (asks(600, 100, 16), 4096, 8),
        (replace(asks(600, 100, 8), question_of=None), 4096, 1),
    ],
)
def test_packing_pays_for_long_prompts_and_short_answers(batch, width, size):
    "It was slower where measured: eight answers of 72 tokens, a prompt of 17: 1.4 times as long."
    assert packing_size(batch, width) == size


def test_the_cost_is_that_of_the_rows_that_are_made():
    "Uneven prompts: all rows are as long as the longest, which may cost more than is saved."
    b = pad_sides([[1] * 17] * 16, [[2] * 25] * 16, 0)
    b.question_of = torch.tensor([0] * 9 + list(range(1, 8)))

    def cost(rows, L):
        return rows * L * (6 * 96 + L)

    packed = {size: cost(*pack(b, size)[0].input_ids.shape) for size in (2, 4, 8)}
    packed[1] = cost(*b.input_ids.shape)
    assert packing_size(b, 96) == min(sorted(packed), key=packed.get) and packed[8] > packed[1]


def test_layout():
    assert [g.tolist() for g in layout([3, 5, 3, 3, 5], 2)] == [[0, 2], [3], [1, 4]]


def test_text_and_pictures_make_a_prompt():
    tiny = VLM(build_model(SMALL), build_processor(SMALL))
    a, b = (f"scene:{s}" for s in sample_scenes(2))
    said = [
        Prompt("detail", "describe the picture .", "", a),
        Prompt("detail", "describe the picture .", "", b),
        Prompt("brief", "describe the picture .", "x", a),
        Prompt("detail", "what is this ?", "", a),
        Prompt("text", "describe the picture .", "", None),
    ]
    assert tiny.batch(said).question_of.tolist() == [0, 1, 0, 2, 3]
    two = [Prompt("detail", "which one ?", "", x) for x in ((a, b), (a, a), (b, a), (a, b))]
    assert tiny.batch(two).question_of.tolist() == [0, 1, 2, 0], (
        "all pictures count, in their order"
    )
    shown = tiny.batch(said, images=[a] * 5)
    assert shown.question_of.tolist() == [0, 0, 0, 1, 2], "the pictures that are shown count"
    assert tiny.batch(said).rows(torch.tensor([4, 2])).question_of.tolist() == [3, 0]


# --- the same states, in every family -------------------------------------------------------------


def test_states_and_gradients(vlm, prompts):
    "Several pictures a prompt, none, tiles, positions in rows and columns, padding on both sides."
    assert vlm.family.packs(vlm.model.config) == (vlm.kind in PACKING)
    shake_projector = next(vlm.projector.parameters()).requires_grad_()
    found = []
    for apart in (True, False):
        b = crowd(vlm, prompts, apart=apart)
        with torch.no_grad():
            states = vlm.answer_states(b)
        assert states.shape[:2] == (len(b), b.answer_mask.shape[1] + 1)
        shake_projector.grad = None
        (logprobs(vlm, b) ** 2).sum().backward()
        found.append((states[:, 0], states[:, 1:][b.answer_mask], shake_projector.grad.clone()))
    for x, y in zip(*found):
        close(y, x)


@pytest.fixture
def embedded(monkeypatch):
    "The number of rows of each batch that a model embeds."
    rows, embed = [], VLM.embed

    def watched(self, batch, role=None):
        rows.append(len(batch))
        return embed(self, batch, role)

    monkeypatch.setattr(VLM, "embed", watched)
    return rows


def test_packed_rows_are_fewer_and_are_used(vlm, prompts, embedded, monkeypatch):
    monkeypatch.setattr(VLM, "width", 4096)  # as in a model for which it always pays
    with torch.no_grad():
        vlm.answer_states(crowd(vlm, prompts, each=4))
    assert embedded == ([4] if vlm.kind in PACKING else [16])


def test_windows_and_other_attention_are_not_packed():
    "A window counts cells of the row, not positions; only SDPA takes our mask."
    mistral = LlavaConfig(text_config=MistralConfig(sliding_window=64))
    assert not FAMILIES["llava"].packs(mistral)
    eager = build_model(SMALL)
    assert FAMILIES["llava"].packs(eager.config)
    eager.set_attn_implementation("eager")
    assert not FAMILIES["llava"].packs(eager.config)


# --- the stages -----------------------------------------------------------------------------------


@pytest.fixture
def tiny():
    return VLM(build_model(SMALL).double().requires_grad_(False), build_processor(SMALL))


def described(n, each):
    rng = random.Random(0)
    scenes = [s for s in sample_scenes(n, seed="packing") for _ in range(each)]
    return [make_prompt(s, "detail", rng) for s in scenes]


def loss_and_gradients(task, batch, module):
    loss, metrics = task(batch)
    module.zero_grad()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return float(loss), metrics, grads


def both_ways(task, batch, module, apart):
    "Loss, metrics and gradients of a batch are those of one whose prompts all count as different."
    loss, metrics, grads = loss_and_gradients(task, batch, module)
    loss2, metrics2, grads2 = loss_and_gradients(task, apart, module)
    assert loss == pytest.approx(loss2, rel=1e-5)
    assert metrics == pytest.approx(metrics2, rel=1e-4, abs=1e-6)
    assert grads and grads.keys() == grads2.keys()
    for name in grads:
        close(grads[name], grads2[name])


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_pairs(tiny, kind):
    pairs = []
    for p in described(3, 1):
        pair = dict(image=p.image, prompt=p.text, chosen=p.answer)
        pairs += [pair | dict(rejected=rejected) for rejected in ("a cat .", "no cat .")]
    if kind == "reward":
        rm = RewardModel(tiny, RewardConfig(lora=SMALL_LORA)).double().train()
        shake(tiny, "reward")
        for n, p in rm.named_parameters():
            p.requires_grad_(".reward." in n or n.startswith("role.head."))
        task = RewardTask(rm)
    else:
        task = DPOTask(tiny, DPOConfig(beta=0.3, lora=SMALL_LORA))
        shake(tiny, "dpo")
    batch, *index = task.collate(group_pairs(pairs))
    assert packing_size(batch, tiny.width) > 1
    both_ways(task, (batch, *index), task, (replace(batch, question_of=None), *index))


def test_a_prompt_is_read_once_in_sampling(tiny, embedded, monkeypatch):
    "The same tokens and log-probabilities as without, and fewer rows in the first pass."
    said = described(2, 4)
    once = sample(tiny, said, max_new_tokens=12, seed=5)
    monkeypatch.setattr(
        "vlmrlhf_course.model.vlm.same_prompts", lambda keys: torch.arange(len(keys))
    )
    apart = sample(tiny, said, max_new_tokens=12, seed=5)
    assert embedded == [2, 8] and torch.equal(once.batch.input_ids, apart.batch.input_ids)
    assert len({tuple(r) for r in once.batch.answers.tolist()}) > 2
    close(once.logprobs, apart.logprobs)
    close(logprobs(tiny, once.batch), once.logprobs)


def test_ppo_with_several_answers_to_a_prompt(tiny):
    "Experience, loss and gradients as with rows of their own."
    answers = dict(answers=8, minibatch=8, answers_per_prompt=4, micro_batch=8)
    policy, scores, _ = small_ppo(tiny, **answers)
    rm = scores.judges.rm
    policy.double()
    rm.double()
    shake(tiny, "actor")
    for p in policy.critic.head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    roll = sample(tiny, described(2, 4), "actor", max_new_tokens=10, seed=2)
    apart = replace(roll, batch=replace(roll.batch, question_of=None))
    exp, info = experience_of(policy, rm, roll)
    exp2, info2 = experience_of(policy, rm, apart)
    assert info == pytest.approx(info2, rel=1e-4, abs=1e-6)
    for name in ("values", "advantages", "returns"):
        a, b = (e.tokens[name][roll.batch.answer_mask] for e in (exp, exp2))
        close(a, b)
    shake(tiny, "actor", seed=9)
    batch, rows_apart = (policy.collate([(e, i) for i in range(8)]) for e in (exp, exp2))
    both_ways(policy, batch, policy, rows_apart)
