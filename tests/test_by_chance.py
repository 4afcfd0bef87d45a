"Lines of which mutants that nobody chose have shown that no test noticed them."

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from test_processes import Counting
from torch import nn

from vlmrlhf_course.base.launch import make_accelerator
from vlmrlhf_course.base.metrics import of_all
from vlmrlhf_course.data.pairs import text_fault
from vlmrlhf_course.data.preferences import PreferencesConfig, sample_candidates
from vlmrlhf_course.data.prompts import Prompt, Turn, question_of
from vlmrlhf_course.model import vision
from vlmrlhf_course.model.groups import ParamGroup
from vlmrlhf_course.model.memory import FeatureCache, Seen
from vlmrlhf_course.rl.algorithm import Algorithm, RLConfig, phase
from vlmrlhf_course.rl.rollout import answer_figures
from vlmrlhf_course.train.fit import backward_through
from vlmrlhf_course.train.parts import conflicts
from vlmrlhf_course.train.reward import ScoreHead


def test_an_algorithms_actor_learns_at_the_rate_of_its_phase():
    "Not at the factor on β, which stands beside it."
    cfg = RLConfig(iterations=10, warmup=0.2, finish=0.3, actor_lr=3e-4)
    actor = SimpleNamespace(group=lambda lr, schedule: ParamGroup([], lr, schedule))
    vlm = SimpleNamespace(family=None, model=None)
    with mock.patch.object(vision, "parts_of", lambda vlm, params: {}):
        (group,) = Algorithm.groups(SimpleNamespace(actor=actor, cfg=cfg, vlm=vlm))
    schedule = group.schedule
    assert group.peak == 3e-4
    assert [schedule(step) for step in range(10)] == [phase(step, cfg)[1] for step in range(10)]
    assert schedule(0) == 0.1 and schedule(5) == 1.0 and schedule(9) == 0.25


def test_the_metrics_of_one_token_are_whole():
    "A batch that counts for one: its share of the metrics is all of them."

    class One(Counting):
        def forward(self, batch):
            return self.weight.sum() * 0, dict(accuracy=0.75)

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    _, metrics = backward_through(One(), ["an item"], 4, make_accelerator())
    assert metrics == dict(accuracy=0.75)
    _, metrics = backward_through(One(), ["a", "b", "c"], 1, make_accelerator())
    assert metrics["accuracy"] == pytest.approx(0.75)


def test_different_tokens_are_counted_by_hand():
    "The first token of the vocabulary counts like any other; padding does not."
    answers = torch.tensor([[0, 5, 0, 5], [7, 7, 9, 9], [3, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    zeros = torch.zeros(3, 4)
    roll = SimpleNamespace(batch=SimpleNamespace(answers=answers, answer_mask=mask), logprobs=zeros)
    figures = answer_figures(roll, zeros)
    assert figures["unique"] == pytest.approx((2 / 4 + 2 / 3 + 1) / 3)
    assert figures["length"] == pytest.approx(8 / 3)


def test_the_last_question_of_a_conversation():
    turns = (Turn("user", ("what is it ?",)), Turn("assistant", ("a cat .",)))
    turns += (Turn("user", (None, "what colour ?", "say it .")),)
    assert question_of(turns) == "what colour ? say it ."
    assert question_of("is it red ?") == "is it red ?"


def test_conflicts_by_hand():
    "Among the answers to one prompt, whatever the other's scores are."
    scores = torch.tensor([[1.0, 4.0, 0.0], [3.0, 2.0, 5.0], [10.0, 0.0, 1.0], [10.0, 0.0, 1.0]])
    found = conflicts(scores, torch.tensor([9, 9, 4, 4]))
    want = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]])
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("weight, good", [(1e9, True), (1.2e9, False), (-1.2e9, False)])
def test_how_heavy_a_pair_may_be(weight, good):
    pair = dict(chosen="a cat .", rejected="a dog .", weight=weight)
    fault = text_fault(pair)
    assert (fault is None) if good else fault == "weight is not a finite number"


def test_an_answer_without_tokens_has_a_state():
    "And no number that is none, which would spread through the batch."
    head = ScoreHead(4, pooling="mean")
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    pooled = head.pool(x, mask)
    torch.testing.assert_close(pooled[0], x[0, :2].mean(0))
    assert torch.equal(pooled[1], torch.zeros(4))


def test_a_cache_without_a_limit_holds_no_account():
    cache = FeatureCache()
    cache["a"] = cache["b"] = Seen(torch.ones(1, 2, 3))
    del cache["a"]
    assert cache.held == 0 and list(cache) == ["b"]


@pytest.mark.parametrize("keep, want", [(0, 3), (2, 2)])
def test_all_different_answers_are_kept_where_no_number_is_given(keep, want):
    said = ["a red cat .", "two boats on a lake .", "nothing to see here ."]
    cfg = PreferencesConfig(temperatures=(0.7, 1.0, 1.3), samples=1, keep=keep)
    prompts = [Prompt("text", "what ?", "", None)]

    def ask(prompts, temperature, seed):
        return [said[round((temperature - 0.7) / 0.3)]]

    (found,) = sample_candidates(ask, prompts, cfg, 0)
    assert len(found) == want and set(found) <= set(said)


class Two:
    "An accelerator of two processes; the other one has said 3 of everything."

    num_processes, device = 2, "cpu"

    def gather(self, mine):
        return torch.cat([mine, torch.full_like(mine, 3.0)])


def test_figures_of_all_processes():
    "Means, and of what is a largest one the largest; counts and words are agreed on already."
    said = dict(loss=1.0, kl_max=4.0, skipped=1, phase="main")
    assert of_all(Two(), said) == said | dict(loss=2.0, kl_max=4.0)
