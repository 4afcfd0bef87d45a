"""What a model may hold at once: answers in parts, and settings that a run may change halfway."""

from pathlib import Path

import pytest
import torch
from own_data import checkpoint, lines, recipe, squares
from report_models import ANSWERS, LORA, make, picture, prompts, shake  # noqa: F401 (fixture)
from small_models import push, scores_of
from torch.testing import assert_close

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.base.stages import uses_of
from vlmrlhf_course.cli import main
from vlmrlhf_course.model.memory import FeatureCache, FeaturesConfig, Limits, Seen
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


# --- features within a limit ----------------------------------------------------------------------


def counted(vlm, refs) -> int:
    "How many pictures pass the tower."
    before = vlm.encoded
    vlm.picture_features(refs)
    return vlm.encoded - before


@pytest.mark.parametrize("cache", ["memory", "disk"])
@pytest.mark.parametrize("kind", ["llava", "llava_next", "qwen2_5_vl"])
def test_who_was_not_asked_for_longest_leaves_first(kind, cache, tmp_path):
    vlm, plain = make(kind), make(kind)
    a, b, c, d = (picture(tmp_path, 40, 40 + i, name="abcd"[i]) for i in range(4))
    want = plain.picture_features([a, b, c, d])
    largest = max(Seen.bytes(x) for x in want)
    vlm._features = FeatureCache(FeaturesConfig(cache, 3.2 * largest / 2**30))
    assert counted(vlm, [a, b, c, a]) == 3 and counted(vlm, [c, b, a]) == 0
    assert counted(vlm, [d]) == 1, "d takes the place of c, the longest unasked"
    assert counted(vlm, [a, b, d]) == 0 and counted(vlm, [c]) == 1 and counted(vlm, [b, d]) == 0
    assert vlm._features.held == sum(Seen.bytes(x) for x in vlm._features.values())
    assert vlm._features.held <= 3.2 * largest
    if cache == "disk":
        assert len(list(Path(vlm._features.folder.name).iterdir())) == len(vlm._features)
    for found, x in zip(vlm.picture_features([a, b, c, d]), want):
        assert_close(found.features, x.features, atol=1e-6, rtol=1e-5)
        assert (found.size is None) == (x.size is None)
        assert x.size is None or torch.equal(found.size, x.size)


def test_what_is_kept_is_what_was_seen(prompts):
    "Bit by bit, from the host and from its disk; and no batch waits behind one of its pictures."
    refs, found = [p.image for p in prompts], []
    for cache in ("memory", "disk", "off"):
        vlm = make(dtype=torch.bfloat16)
        vlm._features = FeatureCache(FeaturesConfig(cache))
        first, again = vlm.features(refs), vlm.features(refs)
        assert torch.equal(first, again) and vlm.encoded == (4 if cache == "off" else 2)
        found.append(first)
        for x, _ in vlm._features.values():
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
    assert all(torch.equal(x, found[0]) for x in found)


def test_a_picture_that_is_written_anew(tmp_path):
    vlm = make()
    vlm._features = FeatureCache(FeaturesConfig())
    file = picture(tmp_path, 40, 40, name="a")
    before = vlm.features([file])
    picture(tmp_path, 44, 40, name="a")
    assert not torch.equal(vlm.features([file]), before) and vlm.encoded == 2


def test_a_changed_tower_empties_the_cache(prompts):
    vlm = make()
    vlm._features = FeatureCache(FeaturesConfig("disk"))
    refs = [p.image for p in prompts]
    before = vlm.features(refs)
    for p in vlm.tower.parameters():
        p.data.mul_(1.3)
    assert not torch.allclose(vlm.features(refs), before) and vlm.encoded == 4
    assert len(list(Path(vlm._features.folder.name).iterdir())) == 2


# --- settings -------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path) -> dict:
    "A checkpoint, pairs and a recipe, for `own_run`."
    data = lines(squares(20, tmp_path / "pictures"), tmp_path / "pairs.jsonl")
    model = checkpoint("llava", tmp_path / "llava")
    return dict(model=str(model), data=str(data), recipe=str(recipe(tmp_path)))


def test_memory_may_be_changed_between_two_stages(own, tmp_path, capsys):
    "What a run holds in memory may change; what is done is not made again."
    given = ["--model", own["model"], "--data", own["data"], "--config", own["recipe"]]
    given += ["--out", str(tmp_path / "run")]
    assert main(["reward", *given]) == 0
    done = (tmp_path / "run" / "reward" / "done.json").read_bytes()
    less = ["--set", "model.gradient_checkpointing=false", "rollout.batch=3", "ppo.iterations=1"]
    assert main(["ppo", *given, *less]) == 0
    assert (tmp_path / "run" / "reward" / "done.json").read_bytes() == done
    assert made(tmp_path / "run" / "ppo").vlm.limits == Limits(False, 3, FeaturesConfig()), (
        "as the run's config says"
    )
    assert main(["ppo", *given, "--set", "ppo.iterations=1"]) == 0, "and back again"
    assert main(["ppo", *given, "--set", "ppo.iterations=1", "model.dtype=bfloat16"]) == 2
    assert "made with other settings (model.dtype)" in capsys.readouterr().err


def test_a_model_knows_its_limits(own, tmp_path):
    given = dict(rollout=dict(batch=5), features=dict(cache="disk", limit_gb=1.5))
    run = own_run(tmp_path / "run", **own, **given)
    kept = FeaturesConfig("disk", 1.5)
    vlm = run.source.model(0)
    assert vlm.limits == Limits(True, 5, kept) and vlm._features.cfg == kept
    assert {"rollout", "features"} <= run.used.keys()
    assert not {"rollout", "features"} & uses_of(run, "ppo").keys()


@pytest.mark.parametrize(
    "section, given",
    [
        ("rollout", dict(batch=-1)),
        ("rollout", dict(bach=2)),
        ("features", dict(limit_gb=0)),
        ("features", dict(cache="dsk")),
    ],
)
def test_bad_limits(section, given, own, tmp_path):
    with pytest.raises(UserError, match=section):
        own_run(tmp_path / "run", **own, **{section: given})


def test_the_drawn_world_has_no_such_section(tmp_path, capsys):
    assert main(["sft", "--out", str(tmp_path), "--set", "rollout.batch=2"]) == 2
    assert "unknown section 'rollout'" in capsys.readouterr().err
