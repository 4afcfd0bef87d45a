"The detector: what it is asked, what it sees, and whose opinion pays."

import random

import pytest
import torch
from conftest import SCENE
from hypothesis import given
from hypothesis import strategies as st

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.world.detector import CLASSES, Detector, DetectorTask, SeenBy, UNASKED
from vlmrlhf_course.world.detector import claims_of, detect, labelled, labels_of
from vlmrlhf_course.world.detector import precision_recall
from vlmrlhf_course.world.pretrain import pretrained_vlm
from vlmrlhf_course.world.scenes import PLACES, sample_scene, sample_scenes
from vlmrlhf_course.world.source import detail_prompts

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
