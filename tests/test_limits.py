"""What a model may hold at once: answers in parts, and settings that a run may change halfway."""

import pytest
import torch
from own_data import checkpoint, lines, recipe, squares
from report_models import ANSWERS, LORA, make, prompts, shake  # noqa: F401 (fixture)
from small_models import push, scores_of
from torch.testing import assert_close

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.cli import main
from vlmrlhf_course.model.memory import Limits
from vlmrlhf_course.model.vlm import VLM, answer, token_logprobs
from vlmrlhf_course.pipeline import made, own_run
from vlmrlhf_course.report.evaluate import best_of_n, likelihood, quiz, speak, speak_greedily
from vlmrlhf_course.rl.algorithm import read_answers
from vlmrlhf_course.rl.ppo import PPO, PPOConfig
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.rl.state import validate
from vlmrlhf_course.train.reward import RewardConfig, RewardModel, pair_accuracy, score_texts

SOME = ["llava", "qwen2_5_vl", "gemma3"]
FEW = Limits(batch=2)


@pytest.fixture
def rows(monkeypatch) -> list[int]:
    "Of each pass over whole texts, how many there were."
    found, plain = [], VLM.hidden

    def counted(self, batch, *args):
        found.append(len(batch))
        return plain(self, batch, *args)

    monkeypatch.setattr(VLM, "hidden", counted)
    return found


@pytest.fixture
def rm() -> RewardModel:
    rm = RewardModel(make(), RewardConfig(lora=LORA)).requires_grad_(False)
    shake(rm.vlm, "reward")
    return rm


# --- answers in parts -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SOME)
def test_a_part_after_another(kind, dtype, prompts, rows):
    "Each log-probability is what the whole batch gives, and no part is larger than it may be."
    vlm = make(kind, dtype)
    vlm.add_role("actor", LORA)
    shake(vlm, "actor", 0.1)
    vlm.limits = Limits(batch=4)
    push(vlm, [vlm.eos_id], 3.5)
    roll = sample(vlm, prompts * 5, "actor", max_new_tokens=40, seed=2)
    assert rows and max(rows) <= 4
    with torch.no_grad():
        logits = vlm.rule_out(vlm.answer_logits(roll.batch, "actor"))
    mask = roll.batch.answer_mask
    now = token_logprobs(logits, roll.batch.answers)
    assert_close(now[mask], roll.logprobs[mask], atol=1e-3, rtol=1e-3)
    assert not roll.logprobs[~mask].any() and mask.any(1).all()
    assert (roll.batch.answers[~mask] == vlm.pad_id).all()
    assert torch.equal(roll.ended, (roll.batch.answers == vlm.eos_id).any(1))
    longest = [int(roll.batch.lengths[i : i + 4].max()) for i in (0, 4, 8)]
    assert len({*longest}) > 1, "of different lengths"
    said = roll.batch.answers
    assert not torch.equal(said[:4], said[4:8]), "parts must not draw the same again"


def test_without_a_limit_nothing_changes(prompts):
    vlm, found = make(), []
    for vlm.limits in (Limits(), Limits(batch=8), Limits(batch=99), Limits(batch=3)):
        found.append(sample(vlm, prompts * 4, max_new_tokens=8, seed=1))
    for roll in found[1:3]:
        assert torch.equal(roll.batch.input_ids, found[0].batch.input_ids)
        assert torch.equal(roll.logprobs, found[0].logprobs)
    assert found[3].logprobs.shape != found[0].logprobs.shape or not torch.equal(
        found[3].logprobs, found[0].logprobs
    )


def test_everything_that_asks_for_answers(prompts, rm, rows):
    "Evaluation, best of n, quiz, validation, and what scores: never more than two at once."
    asked, said, vlm = prompts * 4, ANSWERS * 4, rm.vlm
    pairs = [
        dict(image=p.image, prompt=p.text, chosen="a red cat .", rejected="no .") for p in asked
    ]
    want = score_texts(rm, asked, said), likelihood(vlm, asked, said), pair_accuracy(rm, pairs)
    policy = PPO(rm, PPOConfig(lora=LORA, max_new_tokens=5, micro_batch=8))
    roll = sample(vlm, asked, max_new_tokens=5)
    reading = read_answers(rm, roll, 8)
    greedy = answer(vlm, asked, 0.0, max_new_tokens=5)
    vlm.limits = FEW
    rows.clear()
    assert_close(score_texts(rm, asked, said), want[0])
    assert_close(likelihood(vlm, asked, said), want[1])
    assert pair_accuracy(rm, pairs) == want[2]
    few = read_answers(rm, roll, 8)
    assert_close((few.ref, few.states), (reading.ref, reading.states), atol=1e-5, rtol=1e-5)
    assert answer(vlm, asked, 0.0, max_new_tokens=5) == greedy
    best, _ = best_of_n(vlm, rm, asked, n=2)
    assert len(best) == len(asked)
    speak(vlm, asked, "actor")
    speak_greedily(vlm, asked)
    quiz(vlm, asked)
    validate(policy, scores_of(rm, policy.cfg), asked)
    assert len(rows) > 20 and max(rows) <= 2


def test_pictures_pass_the_tower_in_parts(prompts, monkeypatch):
    vlm, found = make(), []
    plain = type(vlm.family).read_pictures

    def counted(self, model, processor, pictures):
        found.append(len(pictures))
        return plain(self, model, processor, pictures)

    monkeypatch.setattr(type(vlm.family), "read_pictures", counted)
    vlm.limits = Limits(batch=1)
    vlm.batch(prompts)
    assert found == [1, 1]


# --- settings -------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path) -> dict:
    "A checkpoint, pairs and a recipe, for `own_run`."
    data = lines(squares(20, tmp_path / "pictures"), tmp_path / "pairs.jsonl")
    model = checkpoint("llava", tmp_path / "llava")
    return dict(model=str(model), data=str(data), recipe=str(recipe(tmp_path)))


def test_memory_may_be_changed_between_two_stages(own, tmp_path, capsys):
    "A run that was out of memory goes on with less; what is done is not made again."
    given = ["--model", own["model"], "--data", own["data"], "--config", own["recipe"]]
    given += ["--out", str(tmp_path / "run")]
    assert main(["reward", *given]) == 0
    done = (tmp_path / "run" / "reward" / "done.json").read_bytes()
    less = ["--set", "model.gradient_checkpointing=true", "rollout.batch=3", "ppo.iterations=1"]
    assert main(["ppo", *given, *less]) == 0
    assert (tmp_path / "run" / "reward" / "done.json").read_bytes() == done
    assert made(tmp_path / "run" / "ppo").vlm.limits == Limits(True, 3), "as the run's config says"
    assert main(["ppo", *given, "--set", "ppo.iterations=1"]) == 0, "and back again"
    assert main(["ppo", *given, "--set", "ppo.iterations=1", "model.dtype=bfloat16"]) == 2
    assert "made with other settings (model.dtype)" in capsys.readouterr().err


def test_a_model_knows_its_limits(own, tmp_path):
    run = own_run(tmp_path / "run", **own, rollout=dict(batch=5))
    assert run.source.model(0).limits == Limits(batch=5)
    assert "rollout" in run.used and "rollout" not in run.uses(*run.used.keys() - {"rollout"})


@pytest.mark.parametrize("given", [dict(batch=-1), dict(bach=2)])
def test_bad_limits(given, own, tmp_path):
    with pytest.raises(UserError, match="rollout"):
        own_run(tmp_path / "run", **own, rollout=given)


def test_the_drawn_world_has_no_such_section(tmp_path, capsys):
    assert main(["sft", "--out", str(tmp_path), "--set", "rollout.batch=2"]) == 2
    assert "unknown section 'rollout'" in capsys.readouterr().err
