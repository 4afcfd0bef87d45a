"What the tests of public reports share: tiny models, pictures, records."

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.data.pairs import load_pairs
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.family import tiny_model
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vlm import VLM

LORA = LoRAConfig(r=2, alpha=4)
COPY = LoRAConfig(r=0)
ANSWERS = ["a red cat .", "no ."]
DEVICE = os.environ.get("VLMRLHF_TEST_DEVICE", "cpu")  # "cuda" on a machine that has one


def make(kind="llava", dtype=torch.float32) -> VLM:
    "A family's tiny model in a precision."
    model, processor = tiny_model(kind)
    return VLM(model.to(DEVICE, dtype).requires_grad_(False), processor)


def picture(folder, width=40, height=40, name=None) -> str:
    "A file with random colours."
    path = folder / f"{name or f'{width}x{height}'}.png"
    rng = np.random.default_rng(width * height)
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> list[Prompt]:
    "Two questions about a wide and a tall picture."
    folder = tmp_path_factory.mktemp("pictures")
    wide, tall = picture(folder, 64, 30), picture(folder, 31, 60)
    return [
        Prompt("x", "describe the picture .", ANSWERS[0], wide),
        Prompt("x", "is there a boat ?", ANSWERS[1], tall),
    ]


@pytest.fixture
def pair(prompts) -> dict:
    "A good record."
    about = dict(image=prompts[0].image, prompt=prompts[0].text)
    return about | dict(chosen="a red cat .", rejected="a blue boat .")


def read(folder, vlm, *rows, skipped=None) -> list[dict]:
    "Records that were written to a file, read as a run does."
    text = "\n".join(map(json.dumps, rows))
    (folder / "pairs.jsonl").write_text(text, "utf-8")
    return load_pairs(folder / "pairs.jsonl", vlm, skipped)


def refused(folder, vlm, good, bad) -> str:
    "What is said of a bad record: by file and line, and --skip-bad leaves it out."
    with pytest.raises(UserError, match="line 2") as e:
        read(folder, vlm, good, bad)
    assert len(read(folder, vlm, good, bad, skipped={})) == 1
    assert len(str(e.value)) < 600 and "\n" not in str(e.value)
    return str(e.value)


def shake(vlm, role, std=0.3):
    "Random weights for a role, so that it differs from the trunk."
    generator = torch.Generator().manual_seed(1)
    for name, w in vlm.roles[role].weights().items():
        if "lora_A" not in name:
            w.data.add_((torch.randn(w.shape, generator=generator) * std).to(w))


def full(vlm, prompts):
    "The prompts with their own answers."
    return vlm.batch(prompts, [p.answer for p in prompts])
