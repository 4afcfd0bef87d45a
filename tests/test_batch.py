"Padding, rows and token log-probabilities: what a batch adds must change nothing."

import itertools
import math

import pytest
import torch
from small_models import close, logprobs, rand, spread_out
from torch.testing import assert_close

from vlmrlhf_course.model.batch import Batch, pad_sides
from vlmrlhf_course.model.vlm import masked_mean, token_logprobs


def test_token_logprobs():
    z = rand(2, 3, 7, scale=3.0)
    tokens = torch.randint(7, (2, 3), generator=torch.Generator().manual_seed(0))
    for T in (1.0, 0.5, 2.0):
        got = token_logprobs(z, tokens, T)
        assert got.shape == (2, 3) and got.dtype == torch.float64
        for i, t in itertools.product(range(2), range(3)):
            total = sum(math.exp(v / T) for v in z[i, t].tolist())
            want = math.log(math.exp(z[i, t, tokens[i, t]] / T) / total)
            assert_close(float(got[i, t]), want)
    half = token_logprobs(z.bfloat16(), tokens)
    assert half.dtype == torch.float32


def test_masked_mean():
    x, mask = torch.tensor([[1.0, 9.0], [2.0, 3.0]]), torch.tensor([[True, False], [True, True]])
    assert float(masked_mean(x, mask)) == 2.0
    assert float(masked_mean(torch.ones(1, 2), torch.zeros(1, 2).bool())) == 0.0


@pytest.mark.parametrize("left, right", [(3, 0), (0, 4), (5, 2)])
def test_logprobs_do_not_depend_on_the_amount_of_padding(vlm, full, left, right):
    want = logprobs(vlm, full)
    got = logprobs(vlm, spread_out(full, left, 0, right))
    close(got[:, : want.shape[1]], want)
    assert not got[:, want.shape[1] :].any() and want.abs().sum() > 1


def test_logprobs_do_not_depend_on_the_side_of_padding(vlm, full):
    """Each row alone, without padding; with all padding on the
    left; with all padding on the right: one and the same."""
    want = logprobs(vlm, full)
    for i in range(len(full)):
        real = full.attention_mask[i].bool()
        ids, n, A = full.input_ids[i : i + 1, real], int(real.sum()), int(full.lengths[i])
        own = full.pictures.rows(torch.tensor([i]))
        for left, right in ((0, 0), (6, 0), (0, 6)):
            z = torch.zeros(1, 1, dtype=torch.long)
            b = Batch(
                torch.cat([z.expand(1, left), ids, z.expand(1, right)], 1),
                torch.cat([z.expand(1, left), torch.ones_like(ids), z.expand(1, right)], 1),
                torch.ones(1, A + right).bool(),
                own,
                left + n - A,
            )
            close(token_logprobs(vlm.answer_logits(b), b.answers)[0, :A], want[i, :A])


def test_padding_between_prompt_and_answer(vlm, full):
    """Position ids count real tokens, so that a gap in the
    middle changes nothing for tokens after the first."""
    want, got = logprobs(vlm, full), logprobs(vlm, spread_out(full, middle=3))
    # the first answer token is predicted at the position before it, which is padding here
    close(got[:, 1:], want[:, 1:])


def test_pad_sides():
    b = pad_sides([[5, 6], [7]], [[8], [9, 10, 11]], 0)
    assert b.input_ids.tolist() == [[5, 6, 8, 0, 0], [0, 7, 9, 10, 11]]
    assert b.attention_mask.tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]
    assert b.answer_mask.tolist() == [[True, False, False], [True, True, True]]
    assert b.prompt_length == 2
    assert b.lengths.tolist() == [1, 3]
    assert b.position_ids[1].tolist() == [0, 0, 1, 2, 3] and not b.has_image.any()


def test_every_answer_ends_with_eos_inside_the_mask(vlm, full):
    for row, mask in zip(full.answers, full.answer_mask):
        assert row[mask][-1] == vlm.eos_id and (row[~mask] == vlm.pad_id).all()


@pytest.mark.parametrize(
    "order", [[5, 4, 3, 2, 1, 0], [2], [4, 0], [2, 5, 1], [0, 1, 2, 3, 4, 5], [3, 3]]
)
def test_rows(vlm, full, order):
    """Any rows, in any order, give what the full batch gives in
    these rows, and lose the padding that they do not need."""
    index = torch.tensor(order)
    b = full.rows(index)
    A = b.answers.shape[1]
    assert A == int(full.lengths[index].max())
    assert b.attention_mask[:, 0].any()
    assert len(b) == len(order)
    close(logprobs(vlm, b), logprobs(vlm, full)[index][:, :A])


def test_permuting_the_prompts_permutes_the_outputs(vlm, prompts, full):
    order = [3, 0, 5, 2, 4, 1]
    b = vlm.batch([prompts[i] for i in order], [prompts[i].answer for i in order])
    close(logprobs(vlm, b), logprobs(vlm, full)[order])
