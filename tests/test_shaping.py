"Rewards paid early leave the order of answers as it is; what was cut off may be estimated."

from dataclasses import replace

import pytest
import torch
from small_models import close, experience, values


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


def test_a_cut_off_answer_is_worth_what_the_critic_expects(cast, roll):
    "With `bootstrap`; an answer that ended is worth nothing more."
    cut = replace(roll, ended=torch.tensor([True, False] * 3))
    common = dict(lam=1.0, beta=0.0, reward=dict(length=1.0), no_eos=1e6, dense=False)
    plain, more = (experience(cast, cut, bootstrap=b, **common)[0] for b in (False, True))
    gained = (more.tokens["returns"] - plain.tokens["returns"])[:, 0]
    after = values(cast.policy, cast.rm, cut.batch)
    last = after.gather(1, cut.batch.lengths.unsqueeze(1)).squeeze(1)
    close(gained, torch.where(cut.ended, 0.0, last))
    assert (last[~cut.ended].abs() > 1e-6).all()
