"""What a run keeps: the policy that a second reward model likes, and the units of its first
scores."""

import json
import math
import shutil

import pytest
import torch
from small_models import SMALL, close, experience_of, rand, scores_of, small_ppo, with_settings

from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.base.runs import Run
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.base.stages import before, config_of
from vlmrlhf_course.data.pairs import group_pairs
from vlmrlhf_course.model.vlm import VLM, token_logprobs
from vlmrlhf_course.pipeline import obtain, reopen, with_source
from vlmrlhf_course.rl import loop
from vlmrlhf_course.rl.advantages import ValueHead
from vlmrlhf_course.rl.loop import train
from vlmrlhf_course.rl.ppo import PPOConfig, mean_and_deviation
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.rl.state import PRICE, State, validate
from vlmrlhf_course.train.reward import RewardConfig, learned_from
from vlmrlhf_course.world.llava import build_model, build_processor

# --- the best policy --------------------------------------------------------------------------


MOVED = ("kl_grounded", "kl_prior", "kl_grounded_share")


def test_a_second_reward_model_gives_its_opinion(policy, token_rm, prompts):
    "Of the very answers that are validated, with the error of its mean; without one there is none."
    short = with_settings(policy, max_new_tokens=4, micro_batch=4)
    scores = scores_of(token_rm, short.cfg)
    assert set(validate(short, scores, prompts)) == {"validation", "validation_kl", *MOVED}
    figures = validate(short, scores, prompts, token_rm)
    said = sample(short.vlm, prompts, "actor", max_new_tokens=4, seed=1)
    paid = scores_of(token_rm, short.cfg)(said)[1]
    with torch.no_grad():
        before = short.vlm.rule_out(short.vlm.answer_logits(said.batch))
        moved = said.logprobs - token_logprobs(before, said.batch.answers)
    kl = float((moved * said.batch.answer_mask).sum(1).mean())
    assert figures["validation_kl"] == pytest.approx(kl, abs=1e-5)
    n = len(prompts)
    assert figures["second_opinion"] == pytest.approx(paid["reward"], rel=1e-5)
    assert figures["second_opinion_error"] == pytest.approx(paid["reward_std"] / n**0.5, rel=1e-5)


def small(**changes):
    return small_ppo(VLM(build_model(SMALL), build_processor(SMALL)), **changes)


def opinion(value, kl=0.0, error=0.0, validation=0.0):
    figures = dict(second_opinion=value, second_opinion_error=error)
    return figures | dict(validation=validation, validation_kl=kl)


def alone(value):
    "A validation without a second opinion."
    return dict(validation=value, validation_kl=99.0)


KEPT = {
    "the second decides, not who pays": ([opinion(0.6), opinion(0.8), opinion(0.7, 0, 0, 99)], 1),
    "what went far costs": ([opinion(0.6, 1.0), opinion(1.5, 30.0), opinion(0.59, 1.0)], 0),
    "a nat costs 0.05": ([opinion(0.6), opinion(0.64, 1.0), opinion(0.66, 1.0)], 2),
    "as good as the best, and later": ([opinion(0.8), opinion(0.72, 0, 0.1)], 1),
    "worse by more than the error": ([opinion(0.8), opinion(0.72, 0, 0.07)], 0),
    "the best stays the measure": ([opinion(v, 0, 0.1) for v in (0.8, 0.72, 0.64)], 1),
    "as good, and nobody knows the error": ([opinion(0.8), opinion(0.8)], 0),
    "nobody else is there": ([alone(9.0), alone(3.0), alone(99.0), alone(98.0)], 2),
    "not a number": ([opinion(0.6), opinion(float("nan")), alone(float("nan"))], 0),
}


@pytest.mark.parametrize("found, kept", KEPT.values(), ids=KEPT)
def test_which_policy_is_kept(found, kept):
    ppo, _, _ = small()
    ppo.learn()
    state, seen = State(ppo, ppo.cfg), []
    for figures in found:
        with torch.no_grad():
            state.params[0].add_(1.0)
        seen.append(state.snapshot())
        state.keep_best(figures)
    for weights, best in zip(seen[kept], state.best_weights):
        assert torch.equal(weights, best)


def test_a_run_ends_with_the_policy_that_is_kept(tmp_path, monkeypatch):
    ppo, scores, pool = small(iterations=3, eval_every=1, keep="best")
    found, seen = [opinion(0.6), opinion(0.8), opinion(0.7)], []

    def validated(algorithm, *args):
        seen.append([p.detach().clone() for p in algorithm.actor.trained()])
        return found[len(seen) - 1] | dict(validation_kl=0.0)

    monkeypatch.setattr(loop, "validate", validated)
    train(ppo, scores, pool, pool[:2], tmp_path / "ppo")
    for weights, kept in zip(seen[1], ppo.actor.trained()):
        assert torch.equal(weights, kept)
    assert any(not torch.equal(a, b) for a, b in zip(seen[1], seen[0]))


def test_an_arm_asks_its_second_reward_model(smoke_run):
    "`chosen_by` of the configuration; what it thinks is in the log, and decides."
    for arm in ("ppo_rm", "ppo_detector", "oracle", "grpo"):
        rows = read_jsonl(smoke_run / arm / "metrics.jsonl")
        asked = [row for row in rows if "second_opinion" in row]
        values = [row["second_opinion"] - PRICE * row["validation_kl"] for row in asked]
        assert len(values) == 2  # after steps 2 and 3
        best = json.loads((smoke_run / arm / "done.json").read_text())["best"]
        assert best == pytest.approx(max(values))


def test_the_one_that_pays_may_not_choose(tmp_path):
    with pytest.raises(ValueError, match="chosen_by=reward: that is the model that pays"):
        PPOConfig(chosen_by="reward")
    run = with_source(Run(tmp_path, "smoke", ["ppo_rm.chosen_by=''"]))
    assert "reward_second" in before(Run(tmp_path, "smoke"), "ppo_rm")
    assert "reward_second" not in before(run, "ppo_rm")


# --- what a reward model learns from ----------------------------------------------------------


def test_two_reward_models_learn_from_different_prompts(pairs):
    every = group_pairs(pairs)
    first = learned_from(pairs, RewardConfig(prompts=2))
    second = learned_from(pairs, RewardConfig(skip=2))
    assert first == every[:2] and second == every[2:] and second
    assert learned_from(pairs, RewardConfig(skip=1, prompts=1)) == every[1:2]
    with pytest.raises(UserError, match=f"skip=99: there are {len(every)} prompts; leave out"):
        learned_from(pairs, RewardConfig(skip=99))


@pytest.mark.parametrize("scale", ["smoke", "lesson", "tiny"])
def test_the_second_reward_model_sees_nothing_of_the_first(tmp_path, scale):
    run = Run(tmp_path, scale)
    first, second = config_of(run, "reward"), config_of(run, "reward_second")
    assert 0 < first.prompts <= second.skip < config_of(run, "preferences").prompts
    assert second.prompts == 0 and first.skip == 0


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


def test_whoever_watches_a_run_is_told_what_the_log_says(smoke_run, tmp_path):
    "An observer of a `Run` sees each iteration of an arm, by the arm's name; it changes nothing."
    shutil.copytree(smoke_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "ppo_rm")
    run, told = reopen(tmp_path / "run"), []
    run.observers = (lambda arm, step, **figures: told.append((arm, dict(step=step, **figures))),)
    obtain(run, "ppo_rm")
    log = read_jsonl(tmp_path / "run" / "ppo_rm" / "metrics.jsonl")
    assert told == [("ppo_rm", row) for row in log] and len(log) == 3
    own, other = (folder / "ppo_rm" / "actor.safetensors" for folder in (run.folder, smoke_run))
    assert own.read_bytes() == other.read_bytes()


def test_a_stage_that_is_asked_for_without_gradients_is_trained_all_the_same(smoke_run, tmp_path):
    "Whoever only reads an arm may be the first who wants it."
    shutil.copytree(smoke_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "ppo_rm")
    with torch.no_grad():
        obtain(reopen(tmp_path / "run"), "ppo_rm")
        assert not torch.is_grad_enabled()
    own, other = (place / "ppo_rm" / "actor.safetensors" for place in (tmp_path / "run", smoke_run))
    assert own.read_bytes() == other.read_bytes()
