"The detector: what it is asked, what it sees, and whose opinion pays."

import json
import random
from dataclasses import replace

import pytest
import torch
from commands import copy_stages
from conftest import SCENE
from hypothesis import given
from hypothesis import strategies as st

from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.base.runs import Run
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.base.stages import before
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.pipeline import obtain, with_source
from vlmrlhf_course.world.detector import (
    CLASSES,
    UNASKED,
    Detector,
    DetectorTask,
    SeenBy,
    claims_of,
    detect,
    labelled,
    labels_of,
    precision_recall,
)
from vlmrlhf_course.world.pretrain import pretrained_vlm
from vlmrlhf_course.world.scenes import PLACES, sample_scene, sample_scenes, scene_of
from vlmrlhf_course.world.source import DrawnWorld, detail_prompts

ANSWERS = list(CLASSES.values())


class Told(Detector):
    "A detector to which somebody has told the labels."

    def __init__(self, scenes):
        super().__init__(4, 2)
        self.scenes = scenes

    def forward(self, features):
        labels = torch.stack([labels_of(s) for s in self.scenes]).clamp(min=0)
        places = torch.tensor([list(PLACES).index(s.place) for s in self.scenes])
        scores = [torch.eye(len(a))[labels[..., k]] for k, a in enumerate(ANSWERS)]
        return scores, torch.eye(len(PLACES))[places]


@given(st.integers(0, 10**6))
def test_labels_say_everything(seed):
    "A detector that answers every question rightly sees the scene itself."
    scenes = [sample_scene(random.Random(seed + i)) for i in range(3)]
    assert detect(Told(scenes), torch.zeros(3, 9, 4)) == scenes


def test_only_what_is_there_is_asked():
    labels = labels_of(SCENE)
    assert labels.shape == (9, len(CLASSES))
    asked = (labels != UNASKED).sum(1).tolist()
    full = {g.cell: 7 if g.other else 4 for g in SCENE.groups}
    assert asked == [full.get(cell, 1) for cell in range(9)]


def test_quality_by_counting():
    scenes = sample_scenes(20)
    perfect = precision_recall(scenes, scenes)
    for figure in ("precision", "recall"):
        assert perfect[figure] == dict(things=1.0, attributes=1.0, relations=1.0)
    others = precision_recall(scenes[1:] + scenes[:1], scenes)
    hits = sum(
        len(claims_of(a)["things"] & claims_of(b)["things"])
        for a, b in zip(scenes[1:] + scenes[:1], scenes)
    )
    there = sum(len(claims_of(s)["things"]) for s in scenes)
    assert others["recall"]["things"] == pytest.approx(hits / there)
    assert others["precision"]["things"] == pytest.approx(hits / there)  # as many were found


def test_quality_of_one_that_overlooks():
    "It sees the kite alone: what it says is right, and a third of the things is there."
    quality = precision_recall([replace(SCENE, groups=SCENE.groups[1:])], [SCENE])
    assert quality["precision"] == dict(things=1.0, attributes=1.0, relations=0.0)
    assert quality["recall"] == dict(things=1 / 3, attributes=2 / 6, relations=0.0)


@pytest.fixture(scope="module")
def vlm():
    return pretrained_vlm(0)


def test_it_learns_and_its_opinion_is_not_the_truth(vlm):
    "Some steps on few pictures: far better than chance on new ones, and not right."
    torch.manual_seed(0)
    detector = Detector(vlm.vision_width, 128)
    task, prompts = DetectorTask(vlm, detector), detail_prompts(sample_scenes(400))
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    for step in range(250):
        loss, _ = task(task.collate(random.Random(step).choices(prompts, k=32)))
        optimizer.zero_grad()
        (loss / 32).backward()
        optimizer.step()
    held_out = sample_scenes(100, "test")
    eyes = SeenBy(vlm, detector.eval())
    asked = detail_prompts(held_out)
    seen = eyes.scenes(asked)
    quality = precision_recall(seen, held_out)
    assert 0.5 < quality["recall"]["things"] < 1 and 0.5 < quality["precision"]["things"] < 1
    wrong = next(
        i for i, s in enumerate(seen) if claims_of(s)["things"] - claims_of(held_out[i])["things"]
    )
    noun = min(claims_of(seen[wrong])["things"] - claims_of(held_out[wrong])["things"])
    assert eyes.judge(asked[wrong], f"a {noun} .").true_objects == (noun,)  # as it sees it
    before = vlm.encoded
    eyes.scenes(asked)
    assert vlm.encoded == before  # no picture is looked at twice


def test_a_prompt_without_a_picture_is_not_judged(vlm):
    eyes = SeenBy(vlm, Detector(vlm.vision_width, 4))
    assert eyes.judge(Prompt("text", "what belongs in a room ?", ""), "a cup .") is None


def test_it_needs_labels():
    "A source of the user's own pictures has none, and says so before anything is trained."

    class Own:
        def prompts(self, split, n, kinds, seed):
            return [Prompt("detail", "what is this ?", "", "photo.png")] * n

    class Run:
        source, seed = Own(), 0

    class Task:
        run, name = Run(), "detector"

    with pytest.raises(UserError, match="labelled.*leave the reward `penalty` out"):
        labelled(Task(), "train", 3)


# --- as a stage of a run --------------------------------------------------------------------------


def test_a_run_trains_one_and_measures_it(smoke_run):
    record = json.loads((smoke_run / "detector" / "done.json").read_text())
    assert {"validation", "novel"} <= record.keys()
    assert {"sft", "detector", "world"} <= record["uses"].keys()
    assert not {"preferences", "reward"} & record["uses"].keys()
    assert {"detector.safetensors", "metrics.jsonl"} <= record["files"].keys()
    assert len(read_jsonl(smoke_run / "detector" / "metrics.jsonl", ("loss",))) == 3
    assert not (smoke_run / "detector" / "checkpoints").exists()


def test_only_who_pays_the_penalty_needs_one(smoke_run, tmp_path):
    for arm in ("ppo_rm", "ppo_detector", "oracle", "grpo", "hacked"):
        uses = json.loads((smoke_run / arm / "done.json").read_text())["uses"]
        assert ("detector" in uses) == (arm == "ppo_detector"), arm
    paid = Run(tmp_path, "smoke", ["grpo.reward.penalty=0.5", "ppo_detector.reward.penalty=0"])
    assert "detector" in before(paid, "grpo") and "detector" not in before(paid, "ppo_detector")
    named = Run(tmp_path, "smoke", ["mine.kind=detector", "ppo_detector.detector=mine"])
    assert "mine" in before(named, "ppo_detector") and "detector" not in before(named, "dpo")


def test_what_is_loaded_is_what_was_measured(smoke_run, tmp_path):
    "The detector that arms ask has the precision and recall of its record."
    copy_stages(smoke_run, tmp_path / "run", "sft", "detector")
    run = with_source(Run(tmp_path / "run", "smoke"))
    eyes = obtain(run, "detector")
    assert not any(p.requires_grad for p in eyes.detector.parameters())
    for split in ("validation", "novel"):
        asked = run.source.prompts(split, 300, dict(detail=1.0), "detector/0")
        quality = precision_recall(eyes.scenes(asked), [scene_of(p) for p in asked])
        assert quality == run.info("detector")[split]


class Photos(DrawnWorld):
    "Pictures of which nobody has said what they show."

    def prompts(self, split, n, kinds, seed):
        return [Prompt("detail", "what is this ?", "", "blank")] * n


def test_a_penalty_where_no_picture_is_labelled(smoke_run, tmp_path):
    "Said in a line before anything is trained; without the penalty the data are no trouble."
    copy_stages(smoke_run, tmp_path / "run", "sft", "preferences", "reward")
    run = with_source(Run(tmp_path / "run", "smoke"))
    run.source = Photos()
    with pytest.raises(
        UserError, match="detector: .*labelled.*leave the reward `penalty` out"
    ) as e:
        obtain(run, "ppo_detector")
    assert "\n" not in str(e.value)
    for stage in ("detector", "ppo_detector"):
        assert not list(run.path(stage).glob("*.safetensors"))
        assert not (run.path(stage) / "metrics.jsonl").exists()
    assert obtain(run, "reward") is not None
