"Sampling: the distribution, what is never said, finished rows, and prompts by plan and length."

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import SMALL_LORA, close, push, seeds, shake

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.vlm import answer, token_logprobs
from vlmrlhf_course.rl.rollout import (
    length_groups,
    padding_share,
    plan_prompts,
    sample,
    texts,
    with_answers,
)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 6))
def test_length_groups(lengths, size):
    groups = length_groups(torch.tensor(lengths), size)
    assert sorted(torch.cat(groups).tolist()) == list(range(len(lengths)))
    assert max(map(len, groups)) <= size
    assert len(groups) == math.ceil(len(lengths) / size)
    in_order = [lengths[i] for g in groups for i in g.tolist()]
    assert in_order == sorted(lengths)
    assert 0 <= padding_share(torch.tensor(lengths), groups) < 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 6))
def test_length_groups_never_pad_more(lengths, size):
    """Where all groups are full. A last group that is short holds the longest answers,
    and then [1, 1, 1, 2, 2, 1] in fives has more padding sorted than as it comes."""
    lengths = torch.tensor(lengths * size)
    as_they_come = list(torch.arange(len(lengths)).split(size))
    sorted_share = padding_share(lengths, length_groups(lengths, size))
    assert sorted_share <= padding_share(lengths, as_they_come) + 1e-12


def test_padding_share():
    groups = [torch.tensor([0, 1]), torch.tensor([2])]
    assert padding_share(torch.tensor([2, 4, 4]), groups) == pytest.approx(2 / 12)


class TestPlan:
    about_pictures = [Prompt("detail", "q", "", f"img{i % 8}") for i in range(24)]
    pool = about_pictures + [Prompt("text", f"t{i}", "") for i in range(3)]

    def plan(self, n, share=0.0, seed=0, pool=None):
        return plan_prompts(pool or self.pool, n, random.Random(seed), share)

    @given(st.integers(0, 8), st.floats(0, 1), seeds)
    def test_no_picture_twice_and_the_share_of_text(self, n, share, seed):
        out = self.plan(n, share, seed)
        images = [p.image for p in out if p.image]
        assert len(out) == n
        assert len(set(images)) == len(images) == n - round(n * share)

    def test_too_few_pictures(self):
        with pytest.raises(UserError, match="9 different questions about pictures wanted, 8 there"):
            self.plan(9)

    def test_several_questions_about_a_picture(self):
        "Each once where there are fewer pictures than questions are asked; else no picture twice."
        asked = [Prompt("exists", f"q{i} ?", "", f"img{i % 5}") for i in range(40)]
        out = self.plan(33, pool=asked * 2)
        assert len(set(out)) == 33
        assert len({p.image for p in self.plan(5, pool=asked)}) == 5
        with pytest.raises(UserError, match="41 different questions about pictures wanted, 40"):
            self.plan(41, pool=asked)

    def test_no_text_there(self):
        assert all(p.image for p in self.plan(4, 0.5, pool=self.about_pictures))
        assert len(self.plan(4, 0.5, pool=self.about_pictures)) == 4

    def test_repeats_with_its_seed(self):
        assert self.plan(6, 0.3) == self.plan(6, 0.3) != self.plan(6, 0.3, seed=1)
        assert len({p.image for s in range(40) for p in self.plan(2, seed=s)}) == 8


def test_banned_tokens_are_never_sampled(vlm, prompts):
    push(vlm, vlm.banned_ids)
    roll = sample(vlm, prompts * 4, max_new_tokens=12, seed=1)
    said = roll.batch.answers[roll.batch.answer_mask]
    assert len(said) > 100
    assert not torch.isin(said, torch.tensor(vlm.banned_ids)).any()
    assert roll.logprobs[roll.batch.answer_mask].isfinite().all()
    for text in answer(vlm, prompts, max_new_tokens=5):
        assert len(vlm.tokenizer(text).input_ids) == 5


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
@pytest.mark.parametrize("role", [None, "actor"])
def test_sampled_logprobs_are_those_of_the_forward_pass(vlm, prompts, role, temperature):
    vlm.add_role("actor", SMALL_LORA)
    shake(vlm, "actor")
    push(vlm, [vlm.eos_id], 2.0 * temperature)  # so that some answers end early
    roll = sample(vlm, prompts * 5, role, temperature, max_new_tokens=10, seed=4)
    b = roll.batch
    again = token_logprobs(vlm.rule_out(vlm.answer_logits(b, role)), b.answers, temperature)
    close(again[b.answer_mask], roll.logprobs[b.answer_mask])
    other_role = "actor" if role is None else None
    logits = vlm.rule_out(vlm.answer_logits(b, other_role))
    other = token_logprobs(logits, b.answers, temperature)
    assert not torch.allclose(other[b.answer_mask], roll.logprobs[b.answer_mask])
    assert 0 < roll.ended.sum() < len(roll.ended)
    for row, mask, ended in zip(b.answers, b.answer_mask, roll.ended):
        n = int(mask.sum())
        assert mask[:n].all()
        assert (row[n:] == vlm.pad_id).all()
        assert (row[: n - 1] != vlm.eos_id).all()
        assert (row[n - 1] == vlm.eos_id) == ended and (ended or n == 10)


def test_sampling_repeats_with_its_seed(vlm, prompts):
    torch.manual_seed(0)
    a = sample(vlm, prompts, max_new_tokens=8, seed=3)
    torch.manual_seed(1)  # the global generator plays no part
    b = sample(vlm, prompts, max_new_tokens=8, seed=3)
    c = sample(vlm, prompts, max_new_tokens=8, seed=4)
    assert torch.equal(a.batch.input_ids, b.batch.input_ids)
    assert torch.equal(a.logprobs, b.logprobs)
    assert texts(vlm, a) == texts(vlm, b)
    assert not torch.equal(a.batch.answers, c.batch.answers)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_sampled_tokens_follow_the_distribution(vlm, prompts, temperature):
    "4000 first tokens against the probabilities at this temperature: chi-square."
    n, p = 4000, prompts[1]
    got = []
    for i in range(n // 500):
        roll = sample(vlm, [p] * 500, temperature=temperature, max_new_tokens=1, seed=i)
        got.append(roll.batch.answers[:, 0])
    b = vlm.batch([p], [[vlm.eos_id]])
    want = (vlm.rule_out(vlm.answer_logits(b))[0, 0] / temperature).softmax(-1) * n
    count = torch.bincount(torch.cat(got), minlength=len(want)).double()
    often = want > 10
    chi = ((count - want)[often] ** 2 / want[often]).sum()
    dof = int(often.sum()) - 1
    assert dof > 5 and chi < dof + 5 * (2 * dof) ** 0.5


def test_dropping_finished_rows_changes_no_answer(vlm, prompts):
    """Never dropped, dropped at once, dropped in bunches: the same greedy answers and
    log-probabilities, fewer rows computed."""
    torch.manual_seed(1)
    vlm.add_role("actor", SMALL_LORA)
    shake(vlm, "actor")
    push(vlm, [vlm.eos_id], 0.5)
    seen = []
    vlm.language.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    rolls, rows = [], []
    for drop in (2.0, 0.0, 1 / 8):
        seen.clear()
        roll = sample(vlm, prompts * 2, "actor", temperature=1e-4, max_new_tokens=12, drop=drop)
        rolls.append(roll)
        rows.append(sum(seen))
    assert len({*rolls[0].batch.lengths.tolist()}) > 2, "rows must end at different times"
    for r in rolls[1:]:
        assert torch.equal(r.batch.input_ids, rolls[0].batch.input_ids)
        assert torch.equal(r.ended, rolls[0].ended)
        close(r.logprobs, rolls[0].logprobs)
    assert rows[1] <= rows[2] < rows[0]


def test_there_is_no_sampling_at_temperature_zero(vlm, prompts):
    with pytest.raises(ValueError, match="temperature"):
        sample(vlm, prompts[:1], temperature=0.0)


def test_a_pad_that_is_also_eos(vlm, prompts):
    """Many tokenizers pad with EOS. The EOS that ends an answer
    is an action: it is in the mask, what follows is not."""
    vlm.pad_id = vlm.eos_id
    push(vlm, [vlm.eos_id], 2.0)
    roll = sample(vlm, prompts * 3, max_new_tokens=8, seed=1)
    b = roll.batch
    for row, mask, ended in zip(b.answers, b.answer_mask, roll.ended):
        n = int(mask.sum())
        assert mask[:n].all()
        assert (row[: n - 1] != vlm.eos_id).all()
        assert (row[n - 1] == vlm.eos_id) == ended
    assert roll.ended.any() and not roll.logprobs[~b.answer_mask].any()


def test_a_text_only_batch(vlm, prompts):
    text = [p for p in prompts if not p.image] * 2
    roll = sample(vlm, text, max_new_tokens=4)
    b, mask = roll.batch, roll.batch.answer_mask
    again = token_logprobs(vlm.rule_out(vlm.answer_logits(b)), b.answers)
    close(again[mask], roll.logprobs[mask])


def test_with_answers(vlm, prompts):
    b, said = vlm.batch(prompts), [p.answer for p in prompts]
    whole = vlm.batch(prompts, said)
    again = with_answers(b, whole.answers, whole.answer_mask)
    names = "input_ids attention_mask answer_mask features has_image position_ids"
    for name in names.split():
        assert torch.equal(getattr(again, name), getattr(whole, name))
