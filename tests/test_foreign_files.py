"""What a hostile reader found once: files that are not ours stay, whatever they are called."""

import json
import os
import sys

import pytest
import torch
from commands import tree

from vlmrlhf_course.arms import Arm, new_process
from vlmrlhf_course.base import files
from vlmrlhf_course.base.checkpoints import (
    Checkpoints,
    clear_checkpoints,
    save_folder,
    save_tensors,
)
from vlmrlhf_course.base.folders import claim
from vlmrlhf_course.base.launch import make_accelerator
from vlmrlhf_course.base.metrics import MetricLog
from vlmrlhf_course.base.settings import UserError


def test_a_log_of_another_trainer(tmp_path):
    "Rows with a step, as every trainer writes them: without our record of it, it is not ours."
    text = '{"step": 0, "loss": 3.0}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match="something else has written; move it away"):
        MetricLog(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == text
    (tmp_path / "metrics.jsonl").unlink()
    for _ in range(2):
        MetricLog(tmp_path).close()  # its own it may begin again


def test_weights_of_another_run_are_not_written_over(tmp_path):
    save_tensors({"x": torch.ones(1)}, tmp_path / "w.safetensors", of="seed 1")
    before = (tmp_path / "w.safetensors").read_bytes()
    with pytest.raises(UserError, match="move it away"):
        save_tensors({"x": torch.ones(1)}, tmp_path / "w.safetensors", of="seed 0")
    assert (tmp_path / "w.safetensors").read_bytes() == before


def test_a_sealed_file_that_somebody_replaced(tmp_path):
    "It has our name and their content: it stays, whoever wants the room."
    step = tmp_path / "checkpoints" / "step-1"
    step.mkdir(parents=True)
    for name in ("a", "b"):
        (step / name).write_text("ours")
    files.seal(step)
    (step / "a").write_text("mine")
    clear_checkpoints(tmp_path)
    assert tree(step) == {"a": b"mine"}

    def write(new):
        new.mkdir()
        (new / "w").write_text("ours")

    save_folder(tmp_path / "model", write)
    (tmp_path / "model" / "w").write_text("mine")
    with pytest.raises(UserError, match="move it away"):
        save_folder(tmp_path / "model", write)
    assert (tmp_path / "model" / "w").read_text() == "mine"


@pytest.mark.parametrize("name", ["folder", "nul\0"])
def test_a_manifest_that_does_not_fit(tmp_path, name):
    """A folder where a file was, a name that no file can have: nothing is removed, and nothing
    breaks."""
    step = tmp_path / "checkpoints" / "step-1"
    (step / "folder").mkdir(parents=True)
    record = dict(made_by=files.SIGNATURE, of="", files={name: [1, "x"]})
    (step / files.MANIFEST).write_text(json.dumps(record))
    clear_checkpoints(tmp_path)
    assert (step / "folder").is_dir()


def test_a_log_behind_a_link(tmp_path):
    "What an arm says does not go through a link into somebody's file."
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "stderr.log").symlink_to(tmp_path / "thesis.txt")
    command = [sys.executable, "-c", "import sys; print('vlmrlhf: x', file=sys.stderr)"]
    arm = Arm(new_process(command, dict(os.environ)), tmp_path / "stderr.log")
    assert arm.wait() == 0
    assert arm.said() == ["vlmrlhf: x"]
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", [".part-download/movie", "a/b/c", "photos/.hidden"])
def test_folders_that_are_taken_for_nothing(tmp_path, name):
    (tmp_path / "mine" / name).parent.mkdir(parents=True)
    (tmp_path / "mine" / name).write_text("x")
    with pytest.raises(UserError, match="holds other things"):
        claim(tmp_path / "mine")


def test_remains_in_the_run_itself(tmp_path):
    """A crash while the report was written leaves its half in the run's own folder: the next
    command removes it."""
    claim(tmp_path)
    for name, marked in ((".part-report.html-abc", True), (".part-mine", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
        if marked:
            (tmp_path / name / files.MARK).touch()
    claim(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [".part-mine", "run.json"]


def test_checkpoints_do_not_remove_themselves(tmp_path):
    "Folders of others with higher numbers are neither counted nor removed."
    for n in (900, 901):
        (tmp_path / "checkpoints" / f"step-{n}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{n}" / "model.bin").write_text("mine")
    accelerator = make_accelerator()
    accelerator.prepare(torch.nn.Linear(2, 2))
    saved = Checkpoints(tmp_path / "checkpoints", accelerator)
    for step in (1, 2, 3):
        saved.save(step)
    assert saved.own_steps() == [2, 3] and saved.load() == 3
    assert (tmp_path / "checkpoints" / "step-900" / "model.bin").read_text() == "mine"


def test_only_names_that_we_give_are_swept(tmp_path):
    """An empty folder that somebody calls `.part-a` is not ours; one with our kind of name, left by
    a crash, is."""
    for name in (".part-a", ".part-language", ".part-x-12"):
        (tmp_path / name).mkdir()
    ours = tmp_path / ".part-language-ab_12xyz"
    ours.mkdir()
    files.sweep(tmp_path)
    assert not ours.exists() and len(list(tmp_path.iterdir())) == 3
