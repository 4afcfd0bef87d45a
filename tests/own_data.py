"Small checkpoints and data of somebody's own: what plain libraries save, and pairs about squares."

import json
import random
from pathlib import Path

from PIL import Image

from vlmrlhf_course.model.family import tiny_model
from vlmrlhf_course.model.vlm import VLM, save_vlm

QUESTION = "what colour is the picture ?"
SECONDS = """
reward: {epochs: 4, lora: {r: 4, alpha: 8}, fit: {lr: 5.0e-3, batch: 8, micro_batch: 8}}
ppo: {iterations: 2, answers: 8, minibatch: 8, micro_batch: 8, max_new_tokens: 8, eval_every: 1}
grpo: {iterations: 2, answers: 8, answers_per_prompt: 2, minibatch: 8, micro_batch: 8,
       max_new_tokens: 8, eval_every: 1}
rloo: {iterations: 2, answers: 8, answers_per_prompt: 2, minibatch: 8, micro_batch: 8,
       max_new_tokens: 8, eval_every: 1}
dpo: {epochs: 1, fit: {lr: 1.0e-3, batch: 8, micro_batch: 8}}
evaluate: {scenes: 6, best_of: 2, samples: 2, max_new_tokens: 8}
"""


def checkpoint(kind: str, folder: Path) -> Path:
    "A tiny model of a family with its processor, in a folder."
    model, processor = tiny_model(kind)
    save_vlm(VLM(model, processor), folder)
    return folder


def squares(n: int, folder: Path) -> list[dict]:
    "Pairs about pictures of one colour; only who looks can tell which answer is right."
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        right, wrong = random.Random(i).sample(["red", "blue"], 2)
        Image.new("RGB", (32, 32), right).save(folder / f"{i}.png")
        said = dict(chosen=f"the picture is {right} .", rejected=f"the picture is {wrong} .")
        rows.append(dict(image=f"{folder.name}/{i}.png", prompt=QUESTION) | said)
    return rows


def lines(rows: list[dict], file: Path) -> Path:
    "Records as JSONL."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def recipe(folder: Path, text: str = SECONDS) -> Path:
    "A YAML file in which a run takes seconds."
    file = folder / "seconds.yaml"
    file.write_text(text, "utf-8")
    return file
