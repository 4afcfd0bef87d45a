"""SFT and DPO beside TRL 1.16's trainers, on the same checkpoint and from the same file: losses and
gradients, step by step. Optional: skipped where TRL is not installed."""

import os
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from own_data import checkpoint, lines, squares
from torch.testing import assert_close

try:
    TRL = version("trl")
except PackageNotFoundError:
    TRL = None
if TRL is None or not TRL.startswith("1.16."):
    pytest.skip(
        f"TRL {TRL or 'is not installed'}; these tests compare with 1.16: pip install trl==1.16.0",
        allow_module_level=True,
    )

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from datasets import Image, Sequence, load_dataset
from trl import DPOConfig as TheirDPO
from trl import DPOTrainer, SFTTrainer
from trl import SFTConfig as TheirSFT

from benchmarks.trl_side import settings, their_model
from vlmrlhf_course.data.own import DataConfig, rows_at
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vlm import load_vlm
from vlmrlhf_course.train.dpo import DPOConfig, DPOTask
from vlmrlhf_course.train.sft import SFTTask, learn_part

N, STEPS, RATE = 6, 3, 0.05


def said(role, text):
    return [dict(role=role, content=text)]


def file_of(folder, demonstrations=False):
    "Pairs (or demonstrations) as TRL writes them, in a file."
    rows = []
    for row in squares(N * STEPS, folder / "pictures"):
        images = [str(folder / row["image"])]
        asked = dict(images=images, prompt=said("user", row["prompt"]))
        chosen, rejected = (said("assistant", row[key]) for key in ("chosen", "rejected"))
        answer = dict(completion=chosen) if demonstrations else dict(chosen=chosen)
        rows.append(asked | answer | ({} if demonstrations else dict(rejected=rejected)))
    return lines(rows, folder / "trl.jsonl")


def their_rows(file):
    table = load_dataset("json", data_files=str(file), split="train", cache_dir=str(file.parent))
    return table.cast_column("images", Sequence(Image()))


def our_rows(file):
    return rows_at(str(file), DataConfig())[1]


def their_parts(model):
    "What both sides train: language model and output layer, by name."
    named = dict(model.model.language_model.named_parameters())
    return named | {f"head.{name}": p for name, p in model.lm_head.named_parameters()}


def step(loss, parts) -> dict[str, torch.Tensor]:
    "Backward, one step of plain gradient descent; the gradients."
    loss.backward()
    grads = {name: p.grad.clone() for name, p in parts.items()}
    with torch.no_grad():
        for p in parts.values():
            p.sub_(RATE * p.grad)
            p.grad = None
    return grads


def theirs(trainer, model, parts):
    "Loss and gradients of each step, on its rows in order."
    for start in range(0, N * STEPS, N):
        rows = [trainer.train_dataset[i] for i in range(start, start + N)]
        model.zero_grad()
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        loss = trainer.compute_loss(model, inputs)
        yield float(loss), step(loss, parts)


def ours(task, items, parts):
    for start in range(0, N * STEPS, N):
        batch = task.collate(items[start : start + N])
        loss = task(batch)[0] / task.count(batch)
        yield float(loss), step(loss, parts)


def agree(left, right):
    "Step by step, the same loss and the same gradients."
    seen = []
    for (loss, grads), (other, others) in zip(left, right, strict=True):
        assert abs(loss - other) < 1e-5 * max(1, abs(other))
        assert grads.keys() == others.keys()
        for name, grad in grads.items():
            assert_close(
                grad, others[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
        seen.append(loss)
    assert len(seen) == STEPS and len(set(seen)) == STEPS


def with_eos(processor):
    "TRL leaves it to the chat template to end an answer; we always do."
    turns, rest = processor.chat_template.rsplit("{% endfor %}", 1)
    end = "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    processor.chat_template = turns + end + rest
    return processor


def trainer_of(kind, config, folder, model, file, processor, **more):
    how = settings(folder / "out") | dict(per_device_train_batch_size=N, max_length=None)
    args = config(**how | more)
    table = their_rows(file)
    return kind(model=model, args=args, train_dataset=table, processing_class=processor)


def test_dpo(tmp_path):
    """But for tokens that no policy of ours may say, such as the picture's placeholder: these get
    no probability here, and TRL's policy keeps theirs. So they are left in for once."""
    folder, file = checkpoint("llava", tmp_path / "llava"), file_of(tmp_path)
    vlm, model = load_vlm(folder), their_model(folder)
    theirs_too = with_eos(load_vlm(folder).processor)
    vlm.model.requires_grad_(False)
    vlm.rule_out = lambda logits, given=None: logits
    trainer = trainer_of(DPOTrainer, TheirDPO, tmp_path, model, file, theirs_too, beta=0.3)
    task = DPOTask(vlm, DPOConfig(beta=0.3, lora=LoRAConfig(r=0)))
    language, head = vlm.roles["dpo"].copy
    parts = dict(language.named_parameters())
    parts |= {f"head.{name}": p for name, p in head.named_parameters()}
    items = [[row] for row in our_rows(file)]
    agree(ours(task, items, parts), theirs(trainer, model, their_parts(model)))


def test_sft(tmp_path):
    folder = checkpoint("llava", tmp_path / "llava")
    file = file_of(tmp_path, demonstrations=True)
    vlm, model = load_vlm(folder), their_model(folder)
    theirs_too = with_eos(load_vlm(folder).processor)
    more = dict(completion_only_loss=True, loss_type="nll")
    trainer = trainer_of(SFTTrainer, TheirSFT, tmp_path, model, file, theirs_too, **more)
    learn_part(vlm, "language")
    rows = our_rows(file)
    items = [Prompt("", row["prompt"], row["answer"], row["image"]) for row in rows]
    agree(
        ours(SFTTask(vlm), items, their_parts(vlm.model)),
        theirs(trainer, model, their_parts(model)),
    )
