"Shared fixtures: one thread, no network, one smoke run for the whole session, small models with random weights."
import copy
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", VLMRLHF_QUIET="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error",
                  TRANSFORMERS_NO_ADVISORY_WARNINGS="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

import pytest
import torch
from hypothesis import settings

from vlmrlhf_course.model.vlm import VLM, VLMConfig, build_model, build_processor
from vlmrlhf_course.world.scenes import make_prompt, parse_scene, sample_scenes

torch.set_num_threads(1)
settings.register_profile("course", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("course")

REPO = Path(__file__).parent.parent
SMALL = VLMConfig(vision_width=32, vision_layers=1, width=32, layers=2)
SCENE = parse_scene("beach: small red cat on large blue boat @4; large yellow kite @7")
FAULTY = "in this beach scene there is a small red cat on a large green boat and a small white fish . there are three things ."


@pytest.fixture(autouse=True)
def outside_the_repository(tmp_path, monkeypatch):
    "No test reads the repository's settings.ini or writes into the working tree."
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    "The folder of `vlmrlhf run --scale smoke`, made once, by a process of its own."
    folder = tmp_path_factory.mktemp("smoke")
    done = subprocess.run([sys.executable, "-m", "vlmrlhf_course.cli", "run", "--scale", "smoke", "--out", str(folder / "run")],
                          cwd=folder, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    (folder / "stdout").write_text(done.stdout), (folder / "stderr").write_text(done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


@pytest.fixture(scope="session")
def _base():
    "A small model with random weights, in float64 so that rounding hides nothing."
    torch.manual_seed(0)
    vlm = VLM(build_model(SMALL).double(), build_processor(SMALL))
    vlm.model.requires_grad_(False)
    return vlm


@pytest.fixture
def vlm(_base): return copy.deepcopy(_base)


@pytest.fixture(scope="session")
def prompts():
    "Six prompts about different pictures, of different lengths; the third has no picture."
    rng = random.Random(3)
    return [make_prompt(s, k, rng) for s, k in zip(sample_scenes(6, seed="tests"), ("detail", "exists", "text", "brief", "colour", "detail"))]


@pytest.fixture
def full(vlm, prompts):
    "The prompts with their answers."
    return vlm.batch(prompts, [p.answer for p in prompts])


def shake(vlm, role, std=.3, seed=1):
    "Random weights for a role, so that it differs from the trunk."
    torch.manual_seed(seed)
    for name, w in vlm.role_state(role).items():
        if "lora_A" not in name: w.add_(torch.randn_like(w) * std)
