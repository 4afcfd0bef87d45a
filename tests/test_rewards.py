"Rewards by name: who may have which name, and what a reward must give for each answer."

import pytest
import torch
from small_models import SMALL, small_ppo

from vlmrlhf_course import pipeline  # noqa: F401  (imports whatever brings rewards)
from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.rl.loop import train
from vlmrlhf_course.rl.rewards import FIGURES, REWARDS, Scores, learned_reward, reward
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.world.llava import build_model, build_processor


@pytest.fixture
def paid(monkeypatch):
    "A table of rewards that is put back afterwards."
    table = dict(REWARDS)
    monkeypatch.setattr("vlmrlhf_course.rl.rewards.REWARDS", table)
    return table


def mine(judges, roll, texts, step):
    return torch.ones(len(texts))


@pytest.mark.parametrize("name", ["rm", "penalty", "truth", "length"])
def test_a_reward_is_not_replaced_in_silence(paid, name):
    before = paid[name]
    with pytest.raises(UserError, match=f"reward.*'{name}'.*vlmrlhf_course.rl.rewards.*another"):
        reward(name)(mine)
    assert paid[name] is before


@pytest.mark.parametrize("name", ["reward", "true_score", "score", "step", "kl", "loss"])
def test_a_reward_does_not_write_over_a_figure(paid, name):
    with pytest.raises(UserError, match="a figure of the metrics; give the reward another name"):
        reward(name)(mine)
    assert name not in paid


def test_a_cell_may_run_again(paid):
    assert reward("mine")(mine) is mine and reward("mine")(mine) is mine
    assert reward("rm")(learned_reward) is learned_reward


def test_every_metric_is_kept_from_rewards(smoke_run):
    "A new figure of the log belongs in FIGURES, or a reward may take its name."
    for file in smoke_run.glob("*/metrics.jsonl"):
        if file.parent.name in ("ppo", "gold", "hacked"):
            logged = set().union(*read_jsonl(file))
            assert logged <= FIGURES | set(REWARDS), file


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


def test_whole_numbers_are_points(paid):
    paid["odd"] = lambda judges, roll, texts, step: torch.arange(len(texts))
    policy, scores, pool = small_ppo(VLM(build_model(SMALL), build_processor(SMALL)))
    roll = sample(policy.vlm, pool[:4], max_new_tokens=4)
    score, figures = Scores(scores.judges, dict(odd=0.5), no_eos=9.0)(roll)
    assert score.tolist() == [0.0, 0.5, 1.0, 1.5] and figures["odd"] == 1.5
    assert score.is_floating_point()
