"Rewards by name: who may have which name, and what a reward must give for each answer."

import pytest
import torch
from conftest import FAULTY, SCENE
from small_models import PAID, SMALL, scores_of, small_ppo

from vlmrlhf_course import pipeline  # noqa: F401  (imports whatever brings rewards)
from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.rl.loop import train
from vlmrlhf_course.rl.penalty import PenaltyConfig, penalty
from vlmrlhf_course.rl.ppo import PPOConfig
from vlmrlhf_course.rl.rewards import FIGURES, REWARDS, Scores, learned_reward, reward
from vlmrlhf_course.rl.rollout import Rollout, sample
from vlmrlhf_course.world.judge import judge
from vlmrlhf_course.world.llava import build_model, build_processor
from vlmrlhf_course.world.scenes import describe


@pytest.fixture
def paid(monkeypatch):
    "A table of rewards that is put back afterwards."
    table = dict(REWARDS)
    monkeypatch.setattr("vlmrlhf_course.rl.rewards.REWARDS", table)
    return table


def mine(judges, roll, texts, step):
    return torch.ones(len(texts))


@pytest.mark.parametrize("name", ["rm", "penalty", "oracle", "truth", "length"])
def test_a_reward_is_not_replaced_in_silence(paid, name):
    before = paid[name]
    with pytest.raises(UserError, match=f"reward.*'{name}'.*vlmrlhf_course.rl.rewards.*another"):
        reward(name)(mine)
    assert paid[name] is before


@pytest.mark.parametrize(
    "name",
    "reward true_score score step kl loss second_opinion anchor value kl_grounded kl_prior "
    "kl_grounded_share penalty_raw mine_raw _raw".split(),
)
def test_a_reward_does_not_write_over_a_figure(paid, name):
    with pytest.raises(UserError, match="a figure of the metrics; give the reward another name"):
        reward(name)(mine)
    assert name not in paid


def test_a_cell_may_run_again(paid):
    assert reward("mine")(mine) is mine and reward("mine")(mine) is mine
    assert reward("rm")(learned_reward) is learned_reward


def test_every_metric_is_kept_from_rewards(smoke_run):
    "A new figure of the log belongs in FIGURES, or a reward may take its name."
    for arm in ("ppo_rm", "ppo_detector", "oracle", "grpo", "hacked"):
        file = smoke_run / arm / "metrics.jsonl"
        logged = set().union(*read_jsonl(file))
        assert logged <= FIGURES | set(REWARDS), file
        assert "second_opinion" in logged and "kl_std" in logged, file


@pytest.mark.parametrize(
    "gives, words",
    [
        (lambda n: torch.zeros(n, 1), "shape .6, 1."),
        (lambda n: torch.zeros(1), "shape .1,."),
        (lambda n: torch.zeros(()), "of shape ..;"),
        (lambda n: torch.zeros(n, dtype=torch.complex64), "complex64"),
        (lambda n: [0.0] * n, "gave a list"),
        (lambda n: 1.0, "gave a float"),
        (lambda n: torch.tensor([0.0] * (n - 1) + [float("nan")]), "nan for the answer.*scene:"),
        (lambda n: torch.full((n,), float("-inf")), "-inf for the answer"),
    ],
)
def test_what_is_no_number_for_each_answer_is_refused(paid, tmp_path, gives, words):
    paid["odd"] = lambda judges, roll, texts, step: gives(len(texts))
    policy, scores, pool = small_ppo(VLM(build_model(SMALL), build_processor(SMALL)))
    odd = Scores(scores.judges, dict(odd=1.0))
    with pytest.raises(UserError, match=f"reward odd: .*{words}") as e:
        train(policy, odd, pool, pool[:2], tmp_path / "ppo")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("ramp", [0, 4])
def test_whole_numbers_are_points(paid, ramp):
    paid["odd"] = lambda judges, roll, texts, step: torch.arange(len(texts))
    policy, scores, pool = small_ppo(
        VLM(build_model(SMALL), build_processor(SMALL)), penalty=PenaltyConfig(ramp=ramp)
    )
    roll = sample(policy.vlm, pool[:4], max_new_tokens=4)
    score, figures = Scores(scores.judges, dict(odd=0.5), no_eos=9.0)(roll)
    assert score.tolist() == [0.0, 0.5, 1.0, 1.5] and figures["odd"] == 1.5
    assert score.is_floating_point()


# --- what a schedule leaves out -------------------------------------------------------------------


def scored(rm, said, step, weights=PAID["rm+penalty"], **schedule):
    "Figures of these answers about one picture, under a schedule of the penalty."
    prompts = [Prompt("detail", "describe the picture .", "", f"scene:{SCENE}")] * len(said)
    ended = torch.ones(len(said)).bool()
    roll = Rollout(prompts, rm.vlm.batch(prompts, said), None, ended, 1.0)
    cfg = PPOConfig(reward=weights, penalty=PenaltyConfig(**schedule))
    return scores_of(rm, cfg)(roll, step)[1]


def points(said, step, **schedule):
    "The mean penalty at a step."
    cfg = PenaltyConfig(**schedule)
    return sum(penalty(judge(text, SCENE), cfg, step) for text in said) / len(said)


def test_a_penalty_that_grows_is_logged_raw_too(token_rm):
    "As it was at step 0: else a policy that stays as it is would seem to lie more and more."
    said, found = [describe(SCENE), FAULTY], []
    for step in (0, 5, 10, 99):
        figures = scored(token_rm, said, step, ramp=10)
        assert figures["penalty"] == pytest.approx(points(said, step, ramp=10), rel=1e-6)
        assert figures["penalty_raw"] == pytest.approx(points(said, 0), rel=1e-6)
        found.append(figures["penalty"])
    assert found[0] == figures["penalty_raw"] and found[0] > found[1] > found[2] == found[3]


def test_every_reward_but_the_learned_one_is_logged_raw(token_rm):
    "With the same name; one that does not look at the step has the same mean."
    paid = dict(rm=1.0, oracle=0.5, length=-0.1)
    figures = scored(token_rm, [FAULTY], 5, paid, ramp=10)
    assert {name for name in figures if name.endswith("_raw")} == {"oracle_raw", "length_raw"}
    assert figures["oracle_raw"] > figures["oracle"]
    assert figures["length_raw"] == figures["length"]


def test_nothing_is_logged_raw_without_a_schedule(token_rm):
    figures = scored(token_rm, [FAULTY], 5, dict(rm=1.0, penalty=1.0, oracle=0.5))
    assert {"penalty", "oracle"} <= figures.keys()
    assert not any(name.endswith("_raw") for name in figures)


def test_what_is_logged_raw_is_kept_from_rewards(tmp_path):
    "Through a run: a log's figures are known ones, rewards, and these without their schedule."
    model = VLM(build_model(SMALL), build_processor(SMALL))
    more = dict(reward=PAID["rm+penalty"], penalty=PenaltyConfig(ramp=4), eval_every=1)
    policy, scores, pool = small_ppo(model, **more)
    train(policy, scores, pool, pool[:2], tmp_path / "ppo")
    logged = set().union(*read_jsonl(tmp_path / "ppo" / "metrics.jsonl"))
    assert {"penalty", "penalty_raw", "value", "kl_grounded", "kl_prior"} <= logged
    assert logged <= FIGURES | set(REWARDS) | {"penalty_raw"}
