"""Shared fixtures: one thread, no network, one smoke run
for the whole session, small models with random weights."""

import copy
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import quiet  # noqa: F401  (before PyTorch and its friends are imported)
import torch
from filelock import FileLock
from hypothesis import settings
from PIL import Image
from small_models import SMALL, push, random_policy, reward_model

import vlmrlhf_course
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.train.reward import RewardConfig, RewardModel
from vlmrlhf_course.world.llava import build_model, build_processor
from vlmrlhf_course.world.scenes import make_prompt, parse_scene, sample_scenes

torch.set_num_threads(1)
settings.register_profile("course", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("course")

REPO = Path(__file__).parent.parent
SCENE = parse_scene("beach: small red cat on large blue boat @4; large yellow kite @7")
FAULTY = (
    "in this beach scene there is a small red cat on a large green boat and a small white fish . "
    "there are three things ."
)


@pytest.fixture(autouse=True)
def outside_the_repository(tmp_path, monkeypatch):
    "No test reads the repository's settings.ini or writes into the working tree."
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    "Picture files of different shapes: wide, tall, square."
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = []
    for i, (w, h) in enumerate([(64, 30), (31, 60), (48, 48)]):
        files.append(str(folder / f"{i}.png"))
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(files[-1])
    return files


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """The folder of `vlmrlhf run --scale smoke`, made once, by a process of its own, also where
    pytest has several workers; or the one that `mutants.py` has made before."""
    made = os.environ.get("VLMRLHF_SMOKE_RUN")
    if made:
        return Path(made)
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own) / "smoke"
    with FileLock(f"{folder}.lock"):
        if not (folder / "stdout").exists():
            folder.mkdir()
            make_smoke_run(folder)
    return folder / "run"


def make_smoke_run(folder: Path) -> Path:
    "Run the command; what it said stands beside the run's folder."
    command = [sys.executable, "-m", "vlmrlhf_course.cli", "run", "--scale", "smoke"]
    done = subprocess.run(
        [*command, "--out", str(folder / "run")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(vlmrlhf_course.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


# --- a small model, prompts and their answers -----------------------------------------------------


@pytest.fixture(scope="module")
def small():
    "A model and a reward model with opinions, to be asked and not trained."
    torch.manual_seed(0)
    vlm = VLM(build_model(SMALL).requires_grad_(False), build_processor(SMALL))
    with torch.no_grad():
        vlm.model.lm_head.weight.mul_(4)  # random weights with an opinion
    return vlm, RewardModel(vlm, RewardConfig(lora=LoRAConfig(r=4, alpha=8))).requires_grad_(False)


@pytest.fixture(scope="session")
def _base():
    "A small model with random weights, in float64 so that rounding hides nothing."
    torch.manual_seed(0)
    vlm = VLM(build_model(SMALL).double(), build_processor(SMALL))
    vlm.model.requires_grad_(False)
    return vlm


@pytest.fixture
def vlm(_base):
    return copy.deepcopy(_base)


@pytest.fixture(scope="session")
def prompts():
    "Six prompts about different pictures, of different lengths; the third has no picture."
    rng = random.Random(3)
    kinds = ("detail", "exists", "text", "brief", "colour", "detail")
    return [make_prompt(s, k, rng) for s, k in zip(sample_scenes(6, seed="tests"), kinds)]


@pytest.fixture
def full(vlm, prompts):
    "The prompts with their answers."
    return vlm.batch(prompts, [p.answer for p in prompts])


# --- its roles ------------------------------------------------------------------------------------


@pytest.fixture
def token_rm(vlm):
    return reward_model(vlm, "token")


@pytest.fixture(params=["token", "scalar"])
def rm(request, vlm):
    return reward_model(vlm, request.param)


@pytest.fixture
def pairs(prompts):
    "Two pairs for each picture, one of them with a label that is right."
    rows = []
    for p in prompts:
        if not p.image:
            continue
        row = dict(image=p.image, prompt=p.text, chosen=p.answer)
        rows.append(row | dict(rejected="a cat .", weight=0.5, gold=True))
        rows.append(row | dict(rejected="nothing .", weight=1.5, gold=False))
    return rows


@pytest.fixture(params=["head", "adapter"])
def policy(request, token_rm):
    torch.manual_seed(3)
    policy = random_policy(token_rm, request.param)
    policy.learn()
    return policy


@pytest.fixture(scope="module", params=["token-head", "scalar-adapter"])
def cast(request, _base, prompts):
    "A reward model and a policy with random roles, and a batch: `prompts` with their answers."
    kind, critic = request.param.split("-")
    vlm = copy.deepcopy(_base)
    rm = reward_model(vlm, kind)
    return SimpleNamespace(
        vlm=vlm,
        rm=rm,
        policy=random_policy(rm, critic),
        prompts=prompts,
        full=vlm.batch(prompts, [p.answer for p in prompts]),
    )


@pytest.fixture(scope="module")
def roll(cast):
    "Answers of which some end, some are cut."
    hook = push(cast.vlm, [cast.vlm.eos_id], 2.0)
    roll = sample(cast.vlm, cast.prompts, "actor", max_new_tokens=9, seed=2)
    hook.remove()
    assert 0 < roll.ended.sum() < len(roll.ended)
    return roll
