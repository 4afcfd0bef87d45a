"""What a run keeps: the policy that agrees best with people's pairs, what it could before and is
not asked any more, and the units of its first scores."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from commands import copy_stages, smoke
from small_models import SMALL, close, experience_of, loss_of, push, rand, scores_of
from small_models import shake, small_ppo, with_settings
from test_learning import same_for_every_split

from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.base.runs import Run
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.base.stages import config_of
from vlmrlhf_course.cli import main
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.vlm import VLM, token_logprobs
from vlmrlhf_course.rl import loop
from vlmrlhf_course.rl.advantages import ValueHead
from vlmrlhf_course.rl.grpo import GRPO, GRPOConfig
from vlmrlhf_course.rl.loop import kept_in_mind, pair_agreement, train, validate
from vlmrlhf_course.rl.ppo import mean_and_deviation
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.world.llava import build_model, build_processor
from vlmrlhf_course.world.source import DrawnWorld

# --- the best policy --------------------------------------------------------------------------


def log_ratio(vlm, image, text, said):
    "log π(y|x)/π_ref(y|x) of one answer, read alone."
    b = vlm.batch([Prompt("", text, "", image)], [said])
    both = []
    for role in ("actor", None):
        logits = vlm.rule_out(vlm.answer_logits(b, role))
        both.append(float(token_logprobs(logits, b.answers).sum()))
    return both[0] - both[1]


def test_pair_agreement_by_hand(policy, pairs):
    "The share of pairs whose chosen answer was raised more than the other, and its likelihood."
    gaps = []
    with torch.no_grad():
        for row in pairs:
            about = policy.vlm, row["image"], row["prompt"]
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


def test_validation_asks_the_pairs_that_it_is_given(policy, token_rm, prompts, pairs):
    short = with_settings(policy, max_new_tokens=4)
    scores = scores_of(token_rm, short.cfg)
    assert set(validate(short, scores, prompts)) == {"validation"}
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


# --- what is not asked any more ---------------------------------------------------------------


def forgotten_by_hand(vlm, prompts):
    "Σ over answer tokens, and over the vocabulary, of p_ref · (log p_ref − log p)."
    total = 0.0
    with torch.no_grad():
        for p in prompts:
            b = vlm.batch([p], [p.answer])
            now, ref = (
                vlm.rule_out(vlm.answer_logits(b, role)).log_softmax(-1)[0]
                for role in ("actor", None)
            )
            said = ref > -1e4  # what is ruled out has no share
            total += float(((ref.exp() * (ref - now))[said]).sum())
    return total


@pytest.fixture
def step(policy, token_rm, vlm, prompts):
    "PPO with an anchor, an experience of six answers, and demonstrations for three of them."
    push(vlm, [vlm.eos_id], 2.0)
    ppo = with_settings(policy, micro_batch=2, anchor=0.7)
    roll = sample(vlm, prompts, "actor", max_new_tokens=9, seed=2)
    exp, _ = experience_of(ppo, token_rm, roll)
    exp.remember = tuple(prompts[:3])
    return ppo, exp, prompts


def test_forgetting_by_hand(step):
    ppo, _, prompts = step
    want = forgotten_by_hand(ppo.vlm, prompts)
    got = ppo.forgotten(tuple(prompts)).detach()
    assert float(got) == pytest.approx(want, rel=1e-6) and want > 0.01


def test_the_anchor_is_added_to_the_loss(step):
    "Its weight times the sum; the figure is that for each of what the loss is a mean over."
    ppo, exp, prompts = step
    rows = [4, 0, 2]  # the first and the third of the demonstrations come along
    anchored, metrics = loss_of(ppo, exp, rows)
    free, plain = loss_of(with_settings(ppo, anchor=0.0), exp, rows)
    want = 0.7 * forgotten_by_hand(ppo.vlm, [prompts[0], prompts[2]])
    assert float(anchored.detach() - free.detach()) == pytest.approx(want, rel=1e-6)
    tokens = int(exp.batch.answer_mask[rows].sum())
    assert metrics["anchor"] == pytest.approx(want / tokens, rel=1e-6)
    assert "anchor" not in plain and metrics.keys() - plain.keys() == {"anchor"}


def test_for_grpo_the_figure_counts_answers(token_rm, vlm, prompts):
    grpo = GRPO(token_rm, GRPOConfig(anchor=0.5, answers_per_prompt=2), "actor").double()
    shake(vlm, "actor", std=0.05, seed=7)
    grpo.learn()
    roll = sample(vlm, [p for p in prompts[:2] for _ in range(2)], "actor", max_new_tokens=5)
    exp, _ = experience_of(grpo, token_rm, roll)
    exp.remember = (prompts[4],)
    _, metrics = loss_of(grpo, exp, range(4))
    want = 0.5 * forgotten_by_hand(vlm, [prompts[4]]) / 4
    assert metrics["anchor"] == pytest.approx(want, rel=1e-6)


def test_the_anchor_does_not_depend_on_micro_batches(step):
    "Also where some of them have no demonstration: each is remembered just once."
    ppo, exp, _ = step
    shake(ppo.vlm, "actor", std=0.02, seed=11)
    _, metrics = same_for_every_split(ppo, [(exp, i) for i in (3, 0, 5, 2, 1, 4)])
    assert metrics["anchor"] > 0


def test_an_anchored_update_without_a_demonstration_is_logged(tmp_path):
    "Of six answers one has a demonstration: some minibatches have none, and all have the figure."
    ppo, scores, pool = small(anchor=1.0, minibatch=2, epochs=2)
    one = [Prompt("brief", "what is this ?", "a cat .", pool[0].image)]
    train(ppo, scores, pool, pool[:2], tmp_path / "ppo", demonstrations=lambda step: one)
    first, second = (row["anchor"] for row in read_jsonl(tmp_path / "ppo" / "metrics.jsonl"))
    assert 0 < first < second or 0 < second  # nothing is forgotten before the first update


def task_of(tmp_path, *overrides):
    "What `kept_in_mind` reads of an arm's task."
    run = Run(tmp_path, "smoke", list(overrides))
    run.source = DrawnWorld()
    return SimpleNamespace(cfg=config_of(run, "ppo_rm"), run=run, name="ppo_rm")


def test_what_is_not_asked_is_kept_in_mind(tmp_path):
    "SFT's demonstrations of those kinds, one for every fourth answer; without an anchor none."
    assert kept_in_mind(task_of(tmp_path))(0) == []
    many = "ppo_rm.anchor=1", "ppo_rm.answers=80", "ppo_rm.pool=200"
    demonstrations = kept_in_mind(task_of(tmp_path, *many))
    several = [demonstrations(step) for step in range(3)]
    assert all(
        15 <= len(prompts) <= 20 for prompts in several
    )  # where no relation is, none is asked
    kinds = {p.kind for prompts in several for p in prompts}
    assert kinds == {"count", "colour", "relation", "text"}
    silent = task_of(tmp_path, *many, "ppo_rm.kinds.exists=0")
    assert "exists" in {p.kind for step in range(3) for p in kept_in_mind(silent)(step)}
    assert all(p.answer for prompts in several for p in prompts) and several[0] != several[1]
    asked = "ppo_rm.kinds={detail: 1, brief: 1, exists: 1, count: 1, colour: 1, relation: 1}"
    everything = task_of(tmp_path, "ppo_rm.anchor=1", asked, "sft.kinds.text=0")
    with pytest.raises(UserError, match="ppo_rm.anchor: every kind of SFT's is asked already"):
        kept_in_mind(everything)


def test_an_anchored_arm(smoke_run, tmp_path):
    "Through the command; what it has forgotten is in its log."
    copy_stages(smoke_run, tmp_path / "run", "sft", "preferences", "reward")
    sets = ["ppo_rm.anchor=2", "ppo_rm.minibatch=2"]
    assert main(smoke("ppo", tmp_path / "run", "--arm", "ppo_rm", "--set", *sets)) == 0
    rows = read_jsonl(tmp_path / "run" / "ppo_rm" / "metrics.jsonl")
    assert all(row["anchor"] >= 0 for row in rows) and rows[-1]["anchor"] > 0


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
