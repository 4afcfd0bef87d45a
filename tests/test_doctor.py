"`vlmrlhf doctor`, on one CPU process and on two; GPUs are a stand-in for nvidia-smi."

import os
import socket
import tempfile
from importlib import metadata
from pathlib import Path

import kill
import pytest
import torch
from commands import refused

from vlmrlhf_course.cli import main
from vlmrlhf_course.scale import doctor as doctor_module
from vlmrlhf_course.scale import machine
from vlmrlhf_course.scale.doctor import CHECKS, judge_disk, judge_link, locks_hold
from vlmrlhf_course.scale.machine import Finding, check_gpus, judge_gpus, judge_memory


def rows(text):
    "The table as the command prints it: check → (status, found)."
    found = {}
    for line in text.splitlines():
        status, _, rest = line.partition(" ")
        if status in machine.ORDER and rest.strip():
            name, _, said = rest.strip().partition(" ")
            found[name] = status, said.strip()
    return found


# --- one process ----------------------------------------------------------------------------------


def test_all_checks_on_one_process(capsys, tmp_path):
    assert main(["doctor", "--out", str(tmp_path / "runs" / "mine")]) == 0
    out = capsys.readouterr().out
    found = rows(out)
    assert list(found) == list(CHECKS)
    assert {name for name, (status, _) in found.items() if status == "fault"} == set()
    assert found["link"] == ("ok", "one process") and "MB/s" in found["disk"][1]
    assert found["steps"][0] == "ok" and "SFT's loss" in found["steps"][1]
    assert found["GPUs"][0] == "warning" and "→ fine for a small model" in out
    assert list(tmp_path.iterdir()) == [], "what is examined is left as it was"


def test_a_fault_is_a_status_and_a_remedy(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=99", "nothing-like-it>=1"])
    assert main(["doctor", "--quick", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"torch {torch.__version__} is not >=99; nothing-like-it is not installed" in out
    assert "→ pip install -U vlmrlhf_course" in out and rows(out)["steps"][0] == "warning"


def test_only_an_extra_is_missing(monkeypatch, capsys, tmp_path):
    asked = ["deepspeed>=99 ; extra == 'deepspeed'", "nowhere>=1 ; extra == 'test'"]
    monkeypatch.setattr(metadata, "requires", lambda name: asked)
    assert main(["doctor", "--quick", "--out", str(tmp_path)]) == 0
    status, said = rows(capsys.readouterr().out)["packages"]
    assert status == "warning" and "deepspeed" in said and "nowhere" not in said


def test_two_steps_that_fail(monkeypatch, capsys, tmp_path):
    from vlmrlhf_course.train import sft

    monkeypatch.setattr(sft, "train_sft", lambda *a: 1 / 0)
    assert main(["doctor", "--out", str(tmp_path)]) == 1
    assert rows(capsys.readouterr().out)["steps"] == (
        "fault",
        "ZeroDivisionError: division by zero",
    )
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full(monkeypatch, capsys, tmp_path):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    line = refused(capsys, "doctor", "--out", tmp_path)
    assert "--out" in line and "No space left" in line


def test_a_file_system_without_locks(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor_module.fcntl, "flock", lambda *a: None)
    (tmp_path / "file").touch()
    assert not locks_hold(tmp_path / "file")
    assert main(["doctor", "--quick", "--out", str(tmp_path)]) == 0
    assert rows(capsys.readouterr().out)["shared"][0] == "warning"


# --- GPUs, as nvidia-smi would print them ---------------------------------------------------------

CARD = "NVIDIA A100-SXM4-80GB, 550.54.15, 81920, 4, 0"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    "A stand-in that prints lines and ends with a status; PyTorch sees `usable` GPUs."

    def install(*lines, status=0, usable=0):
        text = "\n".join(lines)
        file = tmp_path / "nvidia-smi"
        file.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: usable)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(max(1, len(lines))))

    return install


def test_a_node_of_eight(nvidia_smi):
    nvidia_smi(*[CARD] * 8, usable=8)
    assert check_gpus(None) == Finding("ok", "8 × NVIDIA A100-SXM4-80GB, driver 550.54.15")


@pytest.mark.parametrize(
    "lines, usable, status, word",
    [
        ([CARD] * 8, 0, "fault", "8 that PyTorch cannot use"),
        ([CARD] * 8, 7, "fault", "7 GPUs for 8 processes"),
        ([CARD, CARD[:-1] + "3"], 2, "fault", "memory errors on GPU [1]"),
        ([CARD, CARD[:-1] + "[N/A]"], 2, "ok", "2 ×"),
        ([CARD, CARD.replace("81920, 4", "81920, 70000")], 2, "warning", "GPU [1] in use"),
        ([CARD, CARD.replace("A100-SXM4-80GB", "T4")], 2, "warning", "and others"),
    ],
)
def test_what_is_wrong_with_gpus(nvidia_smi, lines, usable, status, word):
    nvidia_smi(*lines, usable=usable)
    found = check_gpus(None)
    assert found.status == status and word in found.found and (found.remedy or status == "ok")


def test_a_driver_that_does_not_fit_its_library(nvidia_smi, capsys, tmp_path):
    nvidia_smi("Failed to initialize NVML: Driver/library version mismatch", status=18)
    assert main(["doctor", "--quick", "--out", str(tmp_path)]) == 1
    assert "version mismatch" in rows(capsys.readouterr().out)["GPUs"][1]


def test_a_machine_that_has_the_program_and_no_gpu(nvidia_smi):
    nvidia_smi("No devices were found", status=6)
    assert check_gpus(None).status == "warning"
    assert judge_gpus([], 2, 2) == Finding("ok", "2 GPUs"), "of another maker"


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found, status",
    [
        (judge_memory(63, 9, 8, (80, 80)), "fault"),
        (judge_memory(64, 9, 8, (80, 80)), "ok"),
        (judge_memory(64, 0.5, 8, (80, 80)), "warning"),
        (judge_memory(64, 0.5, 1, (80, 80)), "ok"),
        (judge_memory(64, 9, 8, (71, 80)), "warning"),
        (judge_memory(0.9, 9, 1, None), "fault"),
        (judge_memory(2, 9, 2, None), "ok"),
        (judge_disk(100, 100, 50), "ok"),
        (judge_disk(99, 100, 50), "warning"),
        (judge_disk(100, 99, 50), "warning"),
        (judge_disk(100, 100, 49), "warning"),
        (judge_disk(100, 100, 1.9), "fault"),
        (judge_link(50, 1, True), "ok"),
        (judge_link(49, 1, True), "warning"),
        (judge_link(5, 2, True), "ok"),
        (judge_link(4, 2, True), "warning"),
        (judge_link(0.1, 2, False), "ok"),
    ],
)
def test_where_a_figure_becomes_a_warning(found, status):
    assert found.status == status and bool(found.remedy) == (status != "ok")


# --- two processes --------------------------------------------------------------------------------


def on_two(tmp_path, *more):
    "The command on two CPU processes: their statuses, and what each has said."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    meeting = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    started = []
    for rank in ("0", "1"):
        env = meeting | dict(RANK=rank, LOCAL_RANK=rank)
        words = ["doctor", "--out", tmp_path / "runs", *more]
        started.append(kill.Forked(words, tmp_path / f"log-{rank}", **env))
    status = [process.wait() for process in started]
    return status, [(tmp_path / f"log-{rank}").read_text() for rank in (0, 1)]


def test_all_checks_on_two_processes(tmp_path):
    status, (first, second) = on_two(tmp_path)
    assert status == [0, 0], first
    found = rows(first)
    assert "all-reduce at" in found["link"][1] and "seen by all 2, with locks" in found["shared"][1]
    assert "SFT's loss" in found["steps"][1] and rows(second) == {}, "the main process speaks"
    assert {file.name for file in tmp_path.iterdir()} == {"log-0", "log-1"}


def test_a_fault_of_one_process_ends_with_a_line_for_all(tmp_path, monkeypatch):
    def fails(place):
        if place.rank == 1:
            raise ValueError("no such thing here")
        return Finding("ok", "well")

    monkeypatch.setitem(CHECKS, "variables", fails)
    status, (first, _) = on_two(tmp_path, "--quick")
    assert status == [1, 1], "torchrun hears of it, whichever it asks"
    found = rows(first)
    assert found["variables"] == ("fault", "ValueError: no such thing here (process 1)")
    assert found["link"][0] == "ok", "and the checks behind it go on"


def test_a_disk_of_its_own_on_each_node(tmp_path, monkeypatch):
    own, share = tmp_path / "own", doctor_module.share

    def each_its_own(make):
        folder = share(make)
        if os.environ["RANK"] == "0":
            return folder
        own.mkdir()
        return str(own)

    monkeypatch.setattr(doctor_module, "share", each_its_own)
    status, (first, _) = on_two(tmp_path)
    found = rows(first)
    assert status == [1, 1] and found["shared"][0] == "fault", first
    assert "nothing there of process 1" in found["shared"][1]
    assert Path(own, "seen-1").is_file()
    assert found["steps"] == ("warning", "not tried: not all processes see one disk")


def test_two_versions_of_a_library(tmp_path, monkeypatch):
    real = machine.versions
    other = lambda: real() | dict(peft="0.1" if os.environ["RANK"] == "1" else "0.21")  # noqa: E731
    monkeypatch.setattr(machine, "versions", other)
    status, (first, _) = on_two(tmp_path, "--quick")
    assert status == [1, 1] and "peft: 0.21, 0.1" in rows(first)["versions"][1]
