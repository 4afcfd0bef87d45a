"""What a hostile reader found once: each was wrong, and is right."""

import json
import re
import shutil
import threading
import time

import kill
import matplotlib
import pytest
import torch
from commands import copy_stages, refused, same_files, smoke, stopped_sft

from vlmrlhf_course.base import launch
from vlmrlhf_course.base.checkpoints import load_tensors, reading
from vlmrlhf_course.base.metrics import MetricLog
from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.base.runs import made_with
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.base.terminal import prepare
from vlmrlhf_course.cli import main
from vlmrlhf_course.train import sft
from vlmrlhf_course.train.fit import FitConfig, fit

# --- processes --------------------------------------------------------------------------------


class Frozen:
    "A store whose host was stopped: it takes a question, and the answer never comes."

    def set(self, *a):
        time.sleep(100)

    check = get = set


def test_a_host_that_is_frozen(monkeypatch):
    "The thread that asks waits for ever; another one notices."
    monkeypatch.setattr(launch, "BEAT", 0.05)
    monkeypatch.setattr(launch, "SILENCE", 0.3)
    lost = []
    peers = launch.Peers(1, 2, Frozen(), lost.append)
    for task in (peers.watch, peers.guard):
        threading.Thread(target=task, daemon=True).start()
    end = time.time() + 20
    while not lost and time.time() < end:
        time.sleep(0.01)
    peers.left.set()
    assert lost and "hosts the meeting" in lost[0]


def test_two_evaluations_at_once(smoke_run, tmp_path):
    """They take turns; both end well, and what they leave is whole. With other settings the second
    is refused."""

    folder = tmp_path / "run"
    made = shutil.ignore_patterns("evaluate", "report.*", "before_after.png")
    shutil.copytree(smoke_run, folder, ignore=made)
    argv = smoke("evaluate", folder)
    both = [kill.Forked(argv, tmp_path / f"log{i}") for i in (0, 1)]
    assert [p.wait() for p in both] == [0, 0], (tmp_path / "log1").read_text()
    same_files(smoke_run, folder, ["report.html", "before_after.png"])
    assert not (folder / "evaluate" / "begun.json").exists() and main(smoke("run", folder)) == 0
    first = kill.Forked(argv, tmp_path / "log")
    assert kill.wait_until(lambda: (folder / "evaluate" / "begun.json").is_file(), first)
    start = time.time()
    second = kill.Forked([*argv, "--set", "evaluate.scenes=5"], tmp_path / "other")
    assert second.wait() == 2 and "evaluate.scenes" in (tmp_path / "other").read_text()
    assert first.wait() == 0 and time.time() - start < 60


@pytest.mark.parametrize("key, value", [("processes", 2), ("threads", 7)])
def test_a_stage_goes_on_as_it_was_begun(capsys, smoke_run, tmp_path, monkeypatch, key, value):
    """The number of processes and threads changes the last bits: begun with one, a stage does not
    go on with another."""
    argv = stopped_sft(tmp_path / "run", 0, capsys, monkeypatch)
    begun = tmp_path / "run" / "sft" / "begun.json"
    record = json.loads(begun.read_text())
    assert record["made_with"] == made_with()
    begun.write_text(json.dumps(record | dict(made_with=made_with() | {key: value})))
    line = refused(capsys, *argv)
    assert "begun with" in line and f"{value} {key}" in line and "go on as it was begun" in line
    begun.write_text(json.dumps(record))
    assert main(argv) == 0
    same_files(smoke_run / "sft", tmp_path / "run" / "sft", ["language/model.safetensors"])


# --- what was added, or changed in the middle -------------------------------------------------


def test_a_file_beside_a_model(capsys, smoke_run, tmp_path):
    """transformers reads an adapter that lies in a model folder: a file that the seal does not know
    is noticed."""
    copy_stages(smoke_run, tmp_path / "run", "sft", "preferences")
    more = tmp_path / "run" / "sft" / "language" / "adapter_config.json"
    more.write_text("{}")
    line = refused(capsys, *smoke("reward", tmp_path / "run"))
    assert "language: adapter_config.json was added" in line
    more.unlink()
    assert main(smoke("reward", tmp_path / "run")) == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: f.unlink(),
        lambda f: f.write_text(f.read_text().replace("loss", "lost")),
    ],
)
def test_metrics_of_a_part_that_is_done(capsys, smoke_run, tmp_path, monkeypatch, spoil):
    """The projector's, while the language model is trained: noticed at once, not after hours, and
    the advice works."""
    argv = stopped_sft(tmp_path / "run", 0, capsys, monkeypatch)
    spoil(tmp_path / "run" / "sft" / "fit-projector" / "metrics.jsonl")
    line = refused(capsys, *argv)
    assert "fit-projector: metrics.jsonl" in line
    shutil.move(re.search(r"(/\S+?):", line)[1], tmp_path / "away")
    assert main(argv) == 0
    names = ["language/model.safetensors", "fit-projector/metrics.jsonl"]
    same_files(smoke_run / "sft", tmp_path / "run" / "sft", names)


@pytest.mark.parametrize(
    "spoil",
    [lambda f: f.unlink(), lambda f: f.write_text("{}\n"), lambda f: f.write_bytes(b"\xff")],
)
def test_metrics_that_change_while_they_are_written(capsys, tmp_path, spoil):
    log = MetricLog(tmp_path)
    for step in range(4):
        log(step, loss=1.0)
        if step == 1:
            spoil(log.path)
    log.close()
    assert [r["step"] for r in read_jsonl(log.path)] == [0, 1, 2, 3]
    assert "something else has changed it" in capsys.readouterr().err


# --- from outside -----------------------------------------------------------------------------


def test_a_matplotlibrc_here_changes_nothing(smoke_run, tmp_path, monkeypatch, capsys):
    "Neither the picture of the report, nor what is run for it."
    copy = tmp_path / "run"
    shutil.copytree(smoke_run, copy)
    (copy / "before_after.png").unlink()
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "text.usetex": True}):
        assert main(smoke("run", copy)) == 0
    same_files(smoke_run, copy, ["before_after.png", "report.html"])


@pytest.mark.parametrize(
    "name, value, counts",
    [("NVIDIA_TF32_OVERRIDE", "0", True), ("ACCELERATE_USE_FSDP", "0", False)],
)
def test_variables_for_which_zero_counts(monkeypatch, name, value, counts):
    monkeypatch.setenv(name, value)
    assert (name in launch.environment()) == counts


@pytest.mark.parametrize("layers", ["{", "[1"])
def test_what_an_arm_inherits_is_checked(capsys, tmp_path, monkeypatch, layers):
    monkeypatch.setenv("VLMRLHF_LAYERS", layers)
    monkeypatch.setenv("VLMRLHF_ARM", "1")
    monkeypatch.setattr("vlmrlhf_course.cli.end_with_parent", lambda: None)
    assert "VLMRLHF_LAYERS" in refused(capsys, *smoke("ppo", tmp_path / "run"))


def test_weights_that_left_the_numbers(tmp_path):
    "A fit whose weights are not finite in the end says so before anything is made of them."

    class Task(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(1))

        def collate(self, items):
            return items

        def count(self, batch):
            return 1

        def forward(self, batch):
            return self.w.sum(), {}

    cfg = FitConfig(steps=1, lr=1e38, weight_decay=1e9)
    said = "demo: w is not finite in the end; lower the learning rate"
    with pytest.raises(UserError, match=said):
        fit(Task(), lambda step: [0], cfg, tmp_path, "demo")


def test_a_thread_that_the_disk_stops(capfd, monkeypatch):
    """TensorBoard writes in a thread of its own: what stops it is a line, and a bug keeps its
    traceback."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    prepare()

    def fail(error):
        raise error

    denied = PermissionError(13, "Permission denied", "events")
    for error, words in (
        (denied, "vlmrlhf: events: Permission denied"),
        (KeyError("x"), "Traceback"),
    ):
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()
        said = capfd.readouterr().err
        assert words in said and ("Traceback" in said) == (words == "Traceback")


@pytest.mark.parametrize(
    "stage, verb", [("preferences", "preferences"), ("sft", "sft"), ("evaluate", "run")]
)
def test_a_crash_before_a_record_has_its_name(smoke_run, tmp_path, monkeypatch, stage, verb):
    """The record of a finished stage is written, and the crash comes before it is renamed: nothing
    is made again."""
    shutil.copytree(smoke_run, tmp_path / "run")
    folder = tmp_path / "run" / stage
    (folder / "done.json").rename(folder / "begun.json")
    monkeypatch.setattr(sft, "train_sft", lambda *a: pytest.fail("trained again"))
    assert main(smoke(verb, tmp_path / "run")) == 0
    assert (folder / "done.json").is_file() and not (folder / "begun.json").exists()
    same_files(smoke_run, tmp_path / "run", ["report.html", "preferences/train.jsonl"])


@pytest.mark.parametrize(
    "env",
    [
        dict(LOCAL_RANK="0"),
        dict(LOCAL_RANK="99999999"),
        dict(LOCAL_RANK="0", WORLD_SIZE="1", RANK="0"),
    ],
)
def test_a_local_rank_left_over(capsys, tmp_path, monkeypatch, env):
    "accelerate takes it for a launcher's, and looks for an address to meet at."
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert "LOCAL_RANK" in refused(capsys, *smoke("sft", tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_memory_is_not_the_fault_of_a_file(tmp_path):
    """PyTorch's word for a full memory passes; a file in a folder that is called so is still named
    in a line."""
    with pytest.raises(RuntimeError, match="out of memory"), reading("x", "take another"):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    (tmp_path / "out of memory").mkdir()
    (tmp_path / "out of memory" / "w.safetensors").write_text("x")
    with pytest.raises(UserError, match="cannot be read"):
        load_tensors(tmp_path / "out of memory" / "w.safetensors")


@pytest.mark.parametrize("stage", ["ppo_rm", "detector", "reward_small", "preferences"])
def test_a_finished_run_that_lost_a_stage_makes_it_again(capsys, smoke_run, tmp_path, stage):
    """The report alone is not the run: a stage that is gone is named and made again, to the same
    digit."""
    folder = tmp_path / "run"
    shutil.copytree(smoke_run, folder)
    shutil.rmtree(folder / stage)
    assert main(smoke("run", folder)) == 0
    assert f"{folder / stage}" in capsys.readouterr().err
    assert (folder / stage / "done.json").is_file()
    before, after = (json.loads((f / "report.json").read_text()) for f in (smoke_run, folder))
    assert after | dict(run=0) == before | dict(run=0)


def test_a_finished_run_with_a_damaged_stage_is_refused(capsys, smoke_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(smoke_run, folder)
    (folder / "ppo_rm" / "actor.safetensors").write_bytes(b"cut")
    assert "actor.safetensors" in refused(capsys, *smoke("run", folder))
