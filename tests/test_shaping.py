"Rewards paid early leave the order of answers as it is; what was cut off may be estimated."

from dataclasses import replace

import pytest
import torch
from small_models import close, experience, experience_of, values, with_settings

from vlmrlhf_course.rl.algorithm import read_answers
from vlmrlhf_course.rl.loop import token_parts


def first_returns(cast, roll, **changes):
    "What each answer is worth at its first token, without KL and without the critic's opinion."
    exp, _ = experience(cast, roll, lam=1.0, beta=0.0, reward=dict(rm=1.0), **changes)
    return exp.tokens["returns"][:, 0]


@pytest.mark.parametrize("gamma", [1.0, 0.95, 0.7])
def test_early_pay_changes_no_answers_worth(cast, roll, gamma):
    """Ng et al. 1999: shaping by a potential that is 0 at the start and after the end adds nothing.

    A plain sum of token scores does, for γ < 1: what is paid early is discounted less."""
    late, early = (first_returns(cast, roll, gamma=gamma, dense=dense) for dense in (False, True))
    close(early, late)


def test_what_is_paid_early_is_that_part_of_the_score(cast, roll):
    "With the weight that the configuration gives the learned reward; nothing where it has none."

    def returns(**reward):
        exp, _ = experience(cast, roll, lam=1.0, reward=reward, no_eos=-1e6)
        return exp.tokens["returns"] * roll.batch.answer_mask

    def at_the_end(**reward):
        exp, _ = experience(cast, roll, lam=1.0, reward=reward, no_eos=-1e6, dense=False)
        return exp.tokens["returns"] * roll.batch.answer_mask

    paid = at_the_end(rm=1.0) - returns(rm=1.0)
    for weight in (-1.0, 0.25):
        close(at_the_end(rm=weight) - returns(rm=weight), weight * paid)
    close(at_the_end(length=-0.1), returns(length=-0.1))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("dense", [False, True])
def test_a_cut_off_answer_is_worth_what_the_critic_expects(cast, roll, dense, gamma):
    """With `bootstrap`, and no score besides: neither that of a piece, nor `no_eos`. What its
    tokens have earned is kept where that is paid early, since the critic counts from there on."""
    cut = replace(roll, ended=torch.tensor([True, False] * 3))
    common = dict(lam=1.0, reward=dict(rm=1.0), no_eos=-7.0, dense=dense, gamma=gamma)

    def returns(bootstrap):
        policy = with_settings(cast.policy, bootstrap=bootstrap, **common)
        exp, _ = experience_of(policy, cast.rm, cut, beta=0.0)
        return exp.tokens["returns"][:, 0]

    found = returns(True)
    close(found[cut.ended], returns(False)[cut.ended])
    after = values(cast.policy, cast.rm, cut.batch)
    lengths = cut.batch.lengths
    last = after.gather(1, lengths.unsqueeze(1)).squeeze(1)
    earned = token_parts(cast.rm, cut, read_answers(cast.rm, cut, 99)).sum(1) * dense
    discount = gamma ** lengths.to(last)
    close(found[~cut.ended], (discount * (last + earned))[~cut.ended])
    assert (last[~cut.ended].abs() > 1e-6).all()


def test_nothing_is_said_at_padding(cast, roll):
    "Zeros, so that sums over a row are sums over its answer: of reference and policy."
    batch = roll.batch
    assert not batch.answer_mask.all()
    reading = read_answers(cast.rm, roll, 99)
    logprobs, _ = cast.policy.policy(batch)
    for x in (reading.ref, logprobs):
        assert not x[~batch.answer_mask].any() and x[batch.answer_mask].all()
