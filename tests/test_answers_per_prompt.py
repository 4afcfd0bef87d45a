"PPO with several answers to a prompt: they are drawn, scored and learned from together."

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import SMALL, small_ppo

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.model.batch import pad_sides
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.rl.algorithm import Experience
from vlmrlhf_course.rl.loop import check_shares, minibatches, train
from vlmrlhf_course.rl.ppo import PPOConfig
from vlmrlhf_course.rl.rollout import length_groups, sample
from vlmrlhf_course.world.llava import build_model, build_processor


@pytest.fixture
def tiny():
    return VLM(build_model(SMALL), build_processor(SMALL))


def test_minibatches_hold_whole_prompts():
    lengths, asked = torch.tensor([9, 1, 2, 2, 3, 3, 7, 1]), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    batch = pad_sides([[1]] * 8, [[2] * n for n in lengths.tolist()], 0)
    cfg = PPOConfig(answers=8, answers_per_prompt=2, minibatch=4, epochs=4)
    found = list(minibatches(Experience(replace(batch, question_of=asked), {}), cfg, "0/0"))
    assert [len(g) for g in found] == [4] * 8
    for epoch in range(4):
        assert sorted(found[2 * epoch] + found[2 * epoch + 1]) == list(range(8))
    for g in found:
        together = [g[i] % 2 == 0 and g[i + 1] == g[i] + 1 for i in (0, 2)]
        assert all(together), "the answers to a prompt stay together"
        means = [float(lengths[g[i : i + 2]].float().mean()) for i in (0, 2)]
        assert means == sorted(means)
    assert len({frozenset(g) for g in found}) > 2
    with pytest.raises(UserError, match="minibatch=4.*3 × 2"):
        check_shares(cfg, 3)


def test_a_batch_that_cannot_be_shared_out_is_refused_before_anything_is_sampled(
    tiny, tmp_path, monkeypatch
):
    policy, scores, pool = small_ppo(tiny)
    four = SimpleNamespace(process_index=0, num_processes=4)
    monkeypatch.setattr("vlmrlhf_course.rl.loop.make_accelerator", lambda: four)
    with pytest.raises(UserError, match="answers=6.*4 × 1"):
        train(policy, scores, pool, pool[:2], tmp_path)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=20),
    st.integers(1, 6),
)
def test_length_groups_keep_prompts_together(rows, size):
    asked, lengths = (torch.tensor(x) for x in zip(*rows))
    order = torch.cat(length_groups(lengths, size, asked))
    assert sorted(order.tolist()) == list(range(len(rows)))
    means = [float(lengths[asked == asked[i]].float().mean()) for i in order.tolist()]
    assert means == sorted(means)
    runs = [a for i, a in enumerate(asked[order].tolist()) if i == 0 or a != asked[order][i - 1]]
    assert len(runs) == len(set(runs))


@pytest.mark.parametrize(
    "bad",
    [
        dict(answers=9),
        dict(minibatch=3),
        dict(answers_per_prompt=0),
        dict(answers_per_prompt=-1),
        dict(pool=3),
    ],
)
def test_settings_that_cannot_work(bad):
    with pytest.raises(ValueError, match="answers"):
        PPOConfig(**dict(answers=8, minibatch=4, answers_per_prompt=2, pool=40) | bad)


@pytest.fixture
def drawn(monkeypatch):
    "The pictures of each call of `sample`."
    seen = []

    def watched(vlm, prompts, *args, **kwargs):
        seen.append([p.image for p in prompts])
        return sample(vlm, prompts, *args, **kwargs)

    monkeypatch.setattr("vlmrlhf_course.rl.rollout.sample", watched)
    return seen


@pytest.fixture
def read(monkeypatch):
    "The prompts' numbers of each batch whose states are computed."
    seen, answer_states = [], VLM.answer_states

    def watched(self, batch, role=None):
        seen.append(batch.question_of.tolist())
        return answer_states(self, batch, role)

    monkeypatch.setattr(VLM, "answer_states", watched)
    return seen


def test_a_run_samples_each_prompt_as_often_as_asked(tiny, tmp_path, drawn, read):
    "Two pictures, two answers each, twice: prompts stay whole in every pass; something is learned."
    answers = dict(answers=4, answers_per_prompt=2, minibatch=2, micro_batch=3)
    policy, scores, pool = small_ppo(tiny, **answers, iterations=2, epochs=1)
    before = copy.deepcopy({n: p.detach() for n, p in policy.named_parameters() if p.requires_grad})
    train(policy, scores, pool, pool[:2], tmp_path)
    training = [images for images in drawn if len(images) == 4]
    assert len(training) == 2 and all(a == b != c == d for a, b, c, d in training)
    assert sum(images not in training for images in drawn) == 1, "validation, once"
    whole = [asked for asked in read if len(asked) == 2 and asked[0] == asked[1]]
    # in each iteration two prompts pass through reference, reward model and updates; the two that
    # are validated are one prompt where their pictures are blank
    assert len(whole) == 2 * (2 + 2 + 2) + 1, "a prompt was torn apart"
    assert any(not torch.equal(p, before[n]) for n, p in policy.named_parameters() if n in before)


@pytest.mark.parametrize(
    "k, micro, at_once", [(1, 20, 20), (8, 20, 16), (8, 8, 8), (8, 4, 4), (3, 20, 18)]
)
def test_whole_prompts_are_computed_at_once(k, micro, at_once):
    "… where they fit into a micro-batch."
    cfg = PPOConfig(answers=24, minibatch=24, answers_per_prompt=k, micro_batch=micro)
    assert cfg.at_once == at_once


def test_five_pictures_with_eight_questions(tiny, tmp_path):
    policy, scores, pool = small_ppo(tiny)
    about = [replace(p, text=f"is there a {noun} ?") for p in pool[:2] for noun in ("cat", "cup")]
    policy.cfg = replace(policy.cfg, answers=4)
    assert train(policy, scores, about, about[:2], tmp_path / "four").emergencies == 0


def test_more_answers_than_questions_are_refused_before_training(tiny, tmp_path):
    policy, scores, pool = small_ppo(tiny)
    line = r"answers .6. / answers_per_prompt .1.: 6 different questions .* wanted, 5 there; lower"
    with pytest.raises(UserError, match=line):
        train(policy, scores, pool[:5], pool[:2], tmp_path / "ppo")
    assert not (tmp_path / "ppo").exists()
