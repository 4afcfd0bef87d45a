"""What a run keeps: the policy that agrees best with people's pairs, and the units of its first
scores."""

import json
import math

import pytest
import torch
from small_models import SMALL, close, experience_of, log_ratio, rand, scores_of, small_ppo
from small_models import with_settings

from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.rl import loop
from vlmrlhf_course.rl.advantages import ValueHead
from vlmrlhf_course.rl.loop import train
from vlmrlhf_course.rl.ppo import mean_and_deviation
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.rl.state import pair_agreement, validate
from vlmrlhf_course.world.llava import build_model, build_processor

# --- the best policy --------------------------------------------------------------------------


@pytest.mark.parametrize("ruled_out", [True, False])
def test_pair_agreement_by_hand(policy, pairs, monkeypatch, ruled_out):
    """The share of pairs whose chosen answer was raised more than the other, and its likelihood.
    Also for a family in which padding is a token that can be said."""
    if not ruled_out:
        monkeypatch.setattr(VLM, "rule_out", lambda self, logits: logits)
    gaps = []
    for row in pairs:
        about = policy.vlm, "actor", Prompt("", row["prompt"], "", row["image"])
        gaps.append(log_ratio(*about, row["chosen"]) - log_ratio(*about, row["rejected"]))
    assert min(gaps) < 0 < max(gaps)
    want = dict(
        pair_agreement=sum(gap > 0 for gap in gaps) / len(gaps),
        pair_loglik=sum(-math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps),
    )
    for chunk in (64, 3):
        assert pair_agreement(policy, pairs, chunk) == pytest.approx(want, rel=1e-6)
    turned = [row | dict(chosen=row["rejected"], rejected=row["chosen"]) for row in pairs]
    other = pair_agreement(policy, turned)["pair_agreement"]
    assert other == pytest.approx(1 - want["pair_agreement"])


def test_the_reference_agrees_with_nobody_and_contradicts_nobody(token_rm, vlm, pairs):
    "Nothing has moved: half of the pairs, whoever is right."
    ppo = small_ppo(vlm)[0]
    assert pair_agreement(ppo, pairs) == dict(
        pair_agreement=0.5, pair_loglik=pytest.approx(-math.log(2))
    )


MOVED = ("kl_grounded", "kl_prior", "kl_grounded_share")


def test_validation_asks_the_pairs_that_it_is_given(policy, token_rm, prompts, pairs):
    short = with_settings(policy, max_new_tokens=4)
    scores = scores_of(token_rm, short.cfg)
    assert set(validate(short, scores, prompts)) == {"validation", *MOVED}
    figures = validate(short, scores, prompts, pairs)
    assert figures.items() >= pair_agreement(policy, pairs).items()


def small(**changes):
    return small_ppo(VLM(build_model(SMALL), build_processor(SMALL)), **changes)


VALIDATED = (dict(validation=9.0, pair_agreement=0.6), dict(validation=3.0, pair_agreement=0.8))
VALIDATED += (dict(validation=99.0, pair_agreement=0.7),)


@pytest.mark.parametrize(
    "judged, best", [(("validation", "pair_agreement"), 1), (["validation"], 2)]
)
def test_the_policy_that_agrees_most_is_kept(tmp_path, monkeypatch, judged, best):
    """However high a later one scores: the score is what it was trained on. Without pairs there is
    nothing but the score."""
    ppo, scores, pool = small(iterations=3, eval_every=1, keep="best")
    found, seen = list(VALIDATED), []

    def validated(algorithm, *args):
        seen.append([p.detach().clone() for p in algorithm.actor.trained()])
        return {key: found[len(seen) - 1][key] for key in judged}

    monkeypatch.setattr(loop, "validate", validated)
    state = train(ppo, scores, pool, pool[:2], tmp_path / "ppo")
    assert state.best == found[best][judged[-1]]
    for weights, kept in zip(seen[best], ppo.actor.trained()):
        assert torch.equal(weights, kept)
    assert any(not torch.equal(a, b) for a, b in zip(seen[best], seen[best - 1]))


def test_a_run_keeps_the_policy_that_agrees_most(smoke_run):
    for arm in ("ppo_rm", "ppo_detector", "oracle", "grpo"):
        rows = read_jsonl(smoke_run / arm / "metrics.jsonl")
        agreed = [row["pair_agreement"] for row in rows if "pair_agreement" in row]
        assert len(agreed) == 2 and all(0 <= share <= 1 for share in agreed)  # after steps 2 and 3
        assert json.loads((smoke_run / arm / "done.json").read_text())["best"] == max(agreed)


# --- the critic's units -----------------------------------------------------------------------


def test_a_value_head_is_fitted_once():
    "Mean and deviation of the first scores: what follows does not move them, however different."
    torch.manual_seed(0)
    head, has = ValueHead(8, 6, heads=2).double(), torch.zeros(3).bool()
    h = rand(3, 4, 8)
    head.fit(torch.tensor(3.0), torch.tensor(2.0))
    close(head(h, None, has), torch.full((3, 4), 3.0).double())
    torch.nn.init.normal_(head.out.weight)
    v = head(h, None, has)
    head.fit(torch.tensor(-50.0), torch.tensor(9.0))
    assert torch.equal(head(h, None, has), v)
    head.shift.zero_()
    head.scale.fill_(1.0)
    close(v, 3.0 + 2.0 * head(h, None, has))


def test_scores_that_are_all_alike_give_no_unit():
    head = ValueHead(8, 6, heads=2)
    head.fit(torch.tensor(3.0), torch.tensor(0.0))
    assert (head.shift, head.scale) == (3.0, 1.0)


def test_the_units_are_those_of_the_first_scores(policy, token_rm, vlm, prompts):
    head = policy.critic.head
    roll = sample(vlm, prompts, "actor", max_new_tokens=5, seed=2)
    score = scores_of(token_rm, policy.cfg)(roll)[0]
    mean = sum(score.tolist()) / 6
    experience_of(policy, token_rm, roll)
    assert float(head.shift) == pytest.approx(mean)
    squares = [(x - mean) ** 2 for x in score.tolist()]
    assert float(head.scale) == pytest.approx(math.sqrt(sum(squares) / 6))
    experience_of(policy, token_rm, sample(vlm, prompts, "actor", max_new_tokens=9, seed=3))
    assert float(head.shift) == pytest.approx(mean)


def test_mean_and_deviation_are_those_of_all_processes():
    "Of two with the same scores they are those of one; sums that are not reduced would double."
    x = rand(7, seed=3)
    for reduce in (lambda t: t, lambda t: 2 * t):
        mean, deviation = mean_and_deviation(x, reduce)
        assert float(mean) == pytest.approx(float(x.mean()))
        assert float(deviation) == pytest.approx(float(x.std(correction=0)))


def test_the_units_survive_a_stop(tmp_path, monkeypatch):
    "They are in the checkpoint: a run that goes on does not take those of the scores it sees then."
    once = loop.collect

    def stopped(algorithm, scores, prompts, beta, step=0, seed=0, **more):
        if step == 2 and not met:
            met.append(step)
            raise KeyboardInterrupt
        return once(algorithm, scores, prompts, beta, step, seed, **more)

    met = []
    monkeypatch.setattr(loop, "collect", stopped)
    ends = []
    for _ in range(2):
        ppo, scores, pool = small(iterations=3, save_every=1, no_eos=99.0)
        assert not ppo.critic.head.fitted
        try:
            train(ppo, scores, pool, pool[:2], tmp_path / "ppo")
        except KeyboardInterrupt:
            pass
        head = ppo.critic.head
        ends.append((float(head.shift), float(head.scale), bool(head.fitted)))
    assert met and ends[0] == ends[1] and ends[0][2] and ends[0][1] != 1.0
