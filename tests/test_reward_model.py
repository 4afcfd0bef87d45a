"The reward model: its definition, its training and its files."

import copy
from functools import partial

import pytest
import torch
from small_models import SMALL_LORA, close, shake

from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.data.pairs import group_pairs
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.train import reward
from vlmrlhf_course.train.fit import EarlyStopping, FitConfig, early_stop
from vlmrlhf_course.train.reward import (
    RewardConfig,
    RewardModel,
    agreement,
    pair_accuracy,
    score_texts,
    train_reward,
)


def test_reward_by_definition(rm, vlm, full):
    """The head on the states before and after each answer token,
    added up; or on the state after the last one, which is EOS."""
    h = vlm.hidden(full, "reward")
    for i, n in enumerate(full.lengths.tolist()):
        states = h[i : i + 1, full.prompt_length : full.prompt_length + n]
        before = h[i : i + 1, full.prompt_length - 1 : full.prompt_length + n - 1]
        one = torch.ones(1, n).bool()
        if rm.cfg.granularity == "token":
            want = rm.head(torch.cat([before, states], -1), one).sum()
        else:
            want = rm.head(states[:, -1:], one[:, :1])[0]
        close(rm(full)[i], want)
    raw = rm(full)
    rm.shift.fill_(2.0)
    rm.scale.fill_(4.0)
    close(rm(full), (raw - 2) / 4)
    close(rm(full, rm.states(full)), (raw - 2) / 4)


def test_rewards_do_not_depend_on_company(rm, prompts):
    said = [p.answer for p in prompts]
    together = score_texts(rm, prompts, said)
    close(together, torch.cat([score_texts(rm, [p], [a]) for p, a in zip(prompts, said)]))
    close(together, score_texts(rm, prompts, said, chunk=2))
    other = [p.image or "blank" for p in prompts[::-1]]
    close(score_texts(rm, prompts, said, other, chunk=2), score_texts(rm, prompts, said, other))
    blank = score_texts(rm, prompts, said, ["blank"] * len(prompts), chunk=4)
    assert ((blank - together).abs() > 1e-6).tolist() == [p.image is not None for p in prompts]
    cut = [a.rsplit(" ", 2)[0] for a in said]
    felt = (score_texts(rm, prompts, cut) - together).abs() > 1e-6
    assert felt.all(), "the end of the answer was not read"


def test_a_reward_model_is_in_eval_mode(vlm, prompts):
    "Dropout and batch statistics are for training only: the same answer gets the same reward."
    cfg = RewardConfig(lora=LoRAConfig(r=4, alpha=8, dropout=0.5), norm="batch")
    rm = RewardModel(vlm, cfg).double()
    shake(vlm, "reward")
    said = [p.answer for p in prompts]
    assert torch.equal(score_texts(rm, prompts, said), score_texts(rm, prompts, said))
    assert not any(m.training for m in rm.modules())
    rm.train()
    assert not torch.equal(score_texts(rm, prompts, said), score_texts(rm, prompts, said))


def watching(rm, rows, patience):
    "Looks at these pairs after every second step."
    return EarlyStopping(rm, rm.state, partial(agreement, rm, rows), every=2, patience=patience)


def test_early_stopping_brings_back_the_best(vlm, pairs, tmp_path):
    """It stops by its verdict; the weights that count are
    those of its best look; the scale belongs to them."""
    fit = FitConfig(lr=0.1, batch=1, micro_batch=8)
    cfg = RewardConfig(lora=SMALL_LORA, epochs=40, fit=fit)
    rm = RewardModel(vlm, cfg).double()
    watch = watching(rm, pairs, patience=2)
    train_reward(rm, pairs, cfg, tmp_path, watch=watch)
    steps = len(read_jsonl(tmp_path / "metrics.jsonl"))
    assert steps == 2 * len(watch.history) < 40 * len(group_pairs(pairs))
    assert early_stop(watch.history, 2) and not early_stop(watch.history[:-1], 2)
    assert pair_accuracy(rm, pairs)["labels"] == max(watch.history) and not rm.training
    for name, w in rm.state().items():
        if not name.startswith("norm."):
            assert torch.equal(w, watch.best[name])


def test_early_stopping_survives_a_resume(vlm, pairs, tmp_path, monkeypatch):
    """Interrupted after the best look and continued: looks, best weights, the step at which it
    stops, and the result, as without the stop."""
    fit = FitConfig(lr=0.1, batch=1, micro_batch=8, save_every=3)
    cfg = RewardConfig(lora=SMALL_LORA, epochs=40, fit=fit)
    made_up = [0.5, 0.9, 0.6, 0.7, 0.8, 0.95]  # so that the best look lies before the break

    def train(folder, break_at=None):
        torch.manual_seed(3)
        rm = RewardModel(copy.deepcopy(vlm), cfg).double()
        watch = watching(rm, pairs, patience=3)

        def accuracy(*args):
            if len(watch.history) == break_at:
                raise KeyboardInterrupt
            return pair_accuracy(*args) | dict(labels=made_up[len(watch.history)])

        monkeypatch.setattr(reward, "pair_accuracy", accuracy)
        return train_reward(rm, pairs, cfg, folder, watch=watch), watch

    rm, watch = train(tmp_path / "straight")
    assert watch.history == [0.5, 0.9, 0.6, 0.7, 0.8]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", break_at=3)
    resumed, again = train(tmp_path / "stopped")
    assert again.history == watch.history
    rows, straight = (read_jsonl(tmp_path / f / "metrics.jsonl") for f in ("stopped", "straight"))
    assert rows == straight
    for name, w in rm.state().items():
        assert torch.equal(w, resumed.state()[name]), name


def test_reward_state_round_trip(rm, prompts):
    other = copy.deepcopy(rm)
    shake(rm.vlm, "reward", seed=9)
    rm.shift.fill_(0.5)
    rm.scale.fill_(3.0)
    said = [p.answer for p in prompts]
    want = score_texts(rm, prompts, said)
    assert not torch.allclose(want, score_texts(other, prompts, said))
    other.load({k: v.clone() for k, v in rm.state().items()})
    assert torch.equal(want, score_texts(other, prompts, said))


def test_pair_accuracy_counts(rm, pairs):
    "Against the scores themselves, and with chosen and rejected swapped."

    def score(r, key):
        return float(score_texts(rm, [Prompt("", r["prompt"], "", r["image"])], [r[key]]))

    hits = [score(r, "chosen") > score(r, "rejected") for r in pairs]
    gold = [hit == r["gold"] for hit, r in zip(hits, pairs)]
    want = dict(labels=sum(hits) / len(hits), gold=sum(gold) / len(gold))
    assert pair_accuracy(rm, pairs) == pytest.approx(want)
    swapped = [r | dict(chosen=r["rejected"], rejected=r["chosen"]) for r in pairs]
    assert pair_accuracy(rm, swapped)["labels"] == pytest.approx(1 - sum(hits) / len(hits))
