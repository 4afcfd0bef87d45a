"""What many tests do: run a command, refuse one, stop one, compare and edit what it wrote."""

import dataclasses
import json
import shutil
import signal
from contextlib import contextmanager

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlmrlhf_course import pipeline
from vlmrlhf_course.base import launch
from vlmrlhf_course.base.records import sum_of
from vlmrlhf_course.base.stages import STAGES
from vlmrlhf_course.cli import main
from vlmrlhf_course.train import fit as fit_module


def smoke(verb, folder, *more):
    "The words of a command at the smallest scale."
    return list(map(str, [verb, "--scale", "smoke", "--out", folder, *more]))


def refused(capsys, *argv):
    """Run a command that must be refused: status 2, one line on stderr, nothing on stdout. Returns
    the line."""
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("vlmrlhf: ") and out == "", (lines, out)
    return lines[0]


def tree(folder):
    "Every file below a folder: its path from there, and its bytes."
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# --- changing what a run wrote ----------------------------------------------------------------


def edit_json(file, **values):
    "Change values of a JSON file."
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_record(file, **values):
    "Change a stage's record, and renew the sum in it."
    record = json.loads(file.read_text()) | values
    file.write_text(json.dumps(record | dict(sum=sum_of(record))))


def edit_weights(file, edit):
    "Replace a safetensors file's tensors by `edit(tensors)`; the header stays."
    with safe_open(file, "pt") as f:
        header = f.metadata()
    save_file(edit(load_file(file)), file, metadata=header)


# --- stopping a run, and comparing runs -------------------------------------------------------


def same_files(a, b, names):
    "Two folders hold the same bytes under these names."
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def interrupted(capsys, *argv):
    "Run a command that is interrupted, says so, and says that it continues."
    assert main(list(map(str, argv))) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert "interrupted" in last and "continues" in last, last


def stop_at(monkeypatch, module, name, call):
    "Let `module.name` be interrupted at its `call`-th call."
    original, calls = getattr(module, name), []

    def wrapped(*a, **k):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*a, **k)

    monkeypatch.setattr(module, name, wrapped)


def change_stage(monkeypatch, kind, **changes):
    "Let a kind of stage be made, or loaded, by other functions: the table holds them, no module."
    assert pipeline.ROOMS, "every stage is in the table"
    monkeypatch.setitem(STAGES, kind, dataclasses.replace(STAGES[kind], **changes))


def no_stage(monkeypatch):
    "Commands check everything, and then make no stage."
    monkeypatch.setattr(pipeline, "obtain", lambda run, name: None)


def rows(file):
    "How many lines a file has by now."
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def copy_stages(source, target, *stages):
    "Copy stages of one run into another."
    for stage in stages:
        shutil.copytree(source / stage, target / stage)


def stopped_sft(folder, seed, capsys, monkeypatch):
    """SFT, stopped behind its fourth step: the projector is done, the language model has a
    checkpoint."""
    often = ["--set", "sft.projector.save_every=2", "sft.language.save_every=1"]
    argv = smoke("sft", folder, "--seed", seed, *often)
    stop_at(monkeypatch, fit_module, "backward_through", 6)
    interrupted(capsys, *argv)
    monkeypatch.undo()
    return argv


@contextmanager
def plain_environment(monkeypatch, *names):
    "No test hangs, and none sees what launchers have set."
    for name in [*names, *launch.environment()]:
        monkeypatch.delenv(name, raising=False)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("still waiting after two minutes"))
    signal.alarm(120)
    yield
    signal.alarm(0)
