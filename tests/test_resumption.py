"""The same seed gives the same bits, also after a stop, a kill, a full disk or a lost process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import kill
import pytest
import torch
from commands import copy_stages, interrupted, no_stage, refused, rows, same_files, smoke, stop_at
from conftest import REPO
from safetensors.torch import load_file
from stage_table import STAGES, groups_of, run_of, short_training
from transformers import LlavaForConditionalGeneration

from vlmrlhf_course import cli
from vlmrlhf_course.arms import _start_arm
from vlmrlhf_course.base.runs import Run
from vlmrlhf_course.cli import build_parser, main
from vlmrlhf_course.data import preferences
from vlmrlhf_course.rl import loop
from vlmrlhf_course.train import fit as fit_module
from vlmrlhf_course.world import source as world

SFT_WEIGHTS = ["projector/model.safetensors", "language/model.safetensors"]


def test_same_seed_same_bits(smoke_run, tmp_path):
    "The chain up to PPO with a detector, again, in another process and another folder."
    assert main(smoke("ppo", tmp_path / "run", "--arm", "ppo_detector")) == 0
    names = [
        "preferences/train.jsonl",
        "preferences/candidates-validation.jsonl",
        "sft/projector/model.safetensors",
        "sft/language/model.safetensors",
        "reward/reward.safetensors",
        "detector/detector.safetensors",
        "detector/metrics.jsonl",
        "ppo_detector/actor.safetensors",
        "ppo_detector/metrics.jsonl",
    ]
    same_files(smoke_run, tmp_path / "run", names)


def test_sft_resumes_exactly(smoke_run, tmp_path, capsys, monkeypatch):
    """Stopped in the second stage after a checkpoint, continued: the weights of the uninterrupted
    run. (How often it saves changes nothing.)"""
    often = ["--set", "sft.projector.save_every=2", "sft.language.save_every=2"]
    argv = smoke("sft", tmp_path / "run", *often)
    # 3 steps of the projector; step 2 of the language model has a checkpoint behind it
    stop_at(monkeypatch, fit_module, "backward_through", 6)
    interrupted(capsys, *argv)
    folder = tmp_path / "run" / "sft"
    assert not (folder / "done.json").exists()
    assert (folder / "fit-language" / "checkpoints" / "step-2").is_dir()
    monkeypatch.undo()
    # one step is left: two would mean that it started again
    stop_at(monkeypatch, fit_module, "backward_through", 2)
    assert main(argv) == 0
    names = [*SFT_WEIGHTS, "fit-language/metrics.jsonl", "fit-projector/metrics.jsonl"]
    same_files(smoke_run / "sft", folder, names)


def test_ppo_resumes_exactly(smoke_run, tmp_path, capsys, monkeypatch):
    """Stopped in the third iteration, after the checkpoint of the second: weights, metrics and best
    score as without the stop."""
    copy_stages(smoke_run, tmp_path / "run", "sft", "preferences", "reward")
    argv = smoke("ppo", tmp_path / "run", "--arm", "ppo_rm")
    stop_at(monkeypatch, loop, "collect", 3)
    interrupted(capsys, *argv)
    folder, whole = tmp_path / "run" / "ppo_rm", smoke_run / "ppo_rm"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-2"]
    assert not (folder / "actor.safetensors").exists()
    monkeypatch.undo()
    stop_at(monkeypatch, loop, "collect", 2)
    assert main(argv) == 0
    same_files(whole, folder, ["actor.safetensors", "metrics.jsonl"])
    mine, theirs = (json.loads((f / "done.json").read_text()) for f in (folder, whole))
    assert mine == theirs


FITTED = ("dpo", "detector")  # `fit` trains them


def small_arm(kind, folder):
    "The verb of a kind of arm, or of the detector: few steps, a checkpoint after every second."
    sets = short_training(iterations=4, prompts=4, minibatch=2, epochs=1)
    own = [change for change in sets if change.startswith(f"{kind}.")]
    saved = f"{kind}.save_every=2"
    if kind in FITTED:
        own += ["detector.fit.steps=5"] * (kind == "detector")
        saved = f"{kind}.fit.save_every=2"
    return smoke(kind, folder, "--set", *own, saved)


@pytest.mark.parametrize("kind", ["dpo", "grpo", "rloo", "detector"])
def test_other_arms_resume_exactly(smoke_run, tmp_path, monkeypatch, kind):
    """Killed between two checkpoints, continued: weights, metrics and record of one that was left
    alone, and of what was done nothing is done twice."""
    for name in ("alone", "killed"):
        copy_stages(smoke_run, tmp_path / name, "sft", "preferences", "reward")
    assert main(small_arm(kind, tmp_path / "alone")) == 0
    argv = small_arm(kind, tmp_path / "killed")
    folder, log = tmp_path / "killed" / kind, tmp_path / "log"
    process = kill.Forked(argv, log)
    moment = kill.wait_until(lambda: rows(folder / "metrics.jsonl") >= 3, process)
    assert moment, log.read_text()
    assert kill.kill(process, "group") == "group"
    assert not (folder / "done.json").exists()
    saved = max(int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*"))
    files = STAGES[kind].files
    steps = rows(tmp_path / "alone" / kind / "metrics.jsonl")
    assert 2 <= saved < steps
    module, name = (fit_module, "backward_through") if kind in FITTED else (loop, "collect")
    stop_at(monkeypatch, module, name, steps - saved + 1)  # once more than there is left to do
    assert main(argv) == 0
    same_files(tmp_path / "alone" / kind, folder, [*files, "done.json"])
    weights = load_file(folder / files[0])
    assert any(w.any() for name, w in weights.items() if "lora_B" in name or kind == "detector")


def test_an_evaluation_loads_one_model(smoke_run, tmp_path, monkeypatch):
    "All arms of a run stand on one trunk, and each file of pairs is read once."
    shutil.copytree(smoke_run, tmp_path / "run")
    calls = []

    def count(module, name):
        original = getattr(module, name)

        def counted(*a, **k):
            calls.append(name)
            return original(*a, **k)

        monkeypatch.setattr(module, name, counted)

    count(world, "load_vlm")
    count(preferences, "load_pairs")
    assert main(smoke("evaluate", tmp_path / "run")) == 0
    assert Counter(calls) == dict(load_vlm=1, load_pairs=2)
    same_files(smoke_run, tmp_path / "run", ["report.html", "before_after.png"])


def test_a_stop_while_weights_are_written(smoke_run, tmp_path, capsys, monkeypatch):
    """Stopped while the final weights are written: the next run must not take half a folder for a
    whole one."""
    argv = smoke("sft", tmp_path / "run")
    original = LlavaForConditionalGeneration.save_pretrained

    def cut(model, path, **kwargs):
        original(model, path, **kwargs)
        # the configuration is written before the weights
        (Path(path) / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(LlavaForConditionalGeneration, "save_pretrained", cut)
    interrupted(capsys, *argv)
    monkeypatch.undo()
    assert main(argv) == 0
    same_files(smoke_run / "sft", tmp_path / "run" / "sft", ["language/model.safetensors"])


def test_another_seed_gives_other_weights(smoke_run, tmp_path):
    assert main(smoke("sft", tmp_path / "run", "--seed", "1")) == 0
    weights = "sft/language/model.safetensors"
    a, b = load_file(smoke_run / weights), load_file(tmp_path / "run" / weights)
    assert any(not torch.equal(a[k], b[k]) for k in a)


def test_killed_three_times(smoke_run, tmp_path):
    """SIGKILL in the middle of SFT, while a checkpoint is being written, and in the evaluation: the
    end is, file by file, that of the run that was left alone. (`python tests/kill.py` does this at
    random moments, many times.)"""
    folder, log, groups = tmp_path / "run", tmp_path / "log", groups_of(run_of("smoke", []))
    argv = smoke("run", folder)
    metrics = folder / "sft" / "fit-language" / "metrics.jsonl"
    for moment in (
        lambda: rows(metrics) >= 2,
        lambda: kill.half_written(folder),
        lambda: kill.begun(folder, groups, "evaluate"),
    ):
        process = kill.Forked(argv, log)
        assert kill.wait_until(moment, process), log.read_text()
        assert kill.kill(process, "group") == "group"
        if "--resume" not in argv:
            argv.append("--resume")
    assert kill.Forked(argv, log).wait() == 0, log.read_text()
    assert "CHAIR_i" in log.read_text() and not kill.differences(smoke_run, folder)
    report = (folder / "report.json").read_bytes()
    assert kill.Forked(argv, log).wait() == 0, "a finished run is only read"
    assert (folder / "report.json").read_bytes() == report, "a finished run is only read"


ARM = """
import time
from vlmrlhf_course.arms import end_with_parent
end_with_parent()
print("up", flush=True)
time.sleep(100)
"""
RUN = f"""
import subprocess, sys, time
arm = subprocess.Popen([sys.executable, "-c", {ARM!r}], stdin=subprocess.PIPE)
time.sleep(100)
"""


def test_arms_end_with_the_run(tmp_path):
    """A run that is killed takes its arms with it: each watches its standard input, which closes
    then."""
    with subprocess.Popen(
        [sys.executable, "-c", RUN],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "up\n"
        start = time.time()
        process.kill()
        assert process.stdout.read() == "", "it comes back when the arm, too, has closed it"
        assert time.time() - start < 60, "it comes back when the arm, too, has closed it"


def test_arms_are_started_so(tmp_path, monkeypatch):
    "What the arm needs to see its parent die; and every option of the run."
    started = []

    class Silent:
        stderr = ()

        def __init__(self, command, **how):
            started.append((command, how))

    monkeypatch.setattr(subprocess, "Popen", Silent)
    words = "run --scale smoke --skip-bad --threads 3 --set ppo.clip=.1 ppo.beta=.2"
    args = build_parser().parse_args(words.split())
    args.own = None
    no_stage(monkeypatch)
    asked = []
    monkeypatch.setattr(cli.Arms, "finish", lambda arms, jobs, _: asked.append((arms, jobs)))
    monkeypatch.setattr(cli.Arms, "start", lambda arms, jobs: None)
    cli.make_arms(Run(tmp_path, "smoke", args.set, seed=4), args, 2)
    ((arms, jobs),) = asked
    run, verbs, options = arms.run, arms.verbs, arms.options
    ppos = dict.fromkeys(("ppo_rm", "ppo_detector", "oracle", "hacked"), "ppo")
    others = dict(dpo="dpo", grpo="grpo", reward_second="reward", detector="detector")
    assert {name: verbs[name] for name in (*ppos, *others)} == ppos | others and jobs == 2
    # This process took the first stage that others wait for; nothing else was ready.
    assert "sft" not in arms.waiting and {*ppos, *others, "preferences"} <= set(arms.waiting)
    _start_arm(run, verbs["oracle"], "oracle", options)
    ((command, how),) = started
    assert how["stdin"] == subprocess.PIPE and how["env"]["VLMRLHF_ARM"] == "1"
    again = build_parser().parse_args(command[command.index("ppo") :])
    assert again.arm == "oracle"
    assert again.seed == 4
    assert again.skip_bad
    assert again.threads == 3
    assert again.set == args.set
    assert json.loads(how["env"]["VLMRLHF_LAYERS"]) == run.layers
    assert again.out == str(tmp_path)


def mount(folder, megabytes, *more):
    "Mount a small file system on a folder; False where that is not allowed."
    options = ",".join([f"size={megabytes}m", *more])
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "size, save_every, words",
    [
        # in the middle of training …
        (16, 1, ["checkpoint after step 3", "the one after step 2 is whole", "make room"]),
        # … and at its end
        (6, 100, ["cannot write", "No space left", "make room"]),
    ],
    ids=["checkpoint", "weights"],
)
def test_full_disk(smoke_run, tmp_path, capsys, size, save_every, words):
    """One line, status 2, what was saved before is whole; with room on the disk the same command
    goes on, to the same end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount(disk, size):
        pytest.skip("needs root, to mount a small file system")
    try:
        often = [f"sft.{part}.save_every={save_every}" for part in ("projector", "language")]
        argv = smoke("sft", disk / "run", "--set", *often)
        line = refused(capsys, *argv)
        assert all(w in line for w in words), line
        assert not list(disk.rglob(".part-2")), "half a checkpoint takes room for nothing"
        assert mount(disk, 64, "remount")
        assert main(argv) == 0
        names = ["language/model.safetensors", "fit-language/metrics.jsonl"]
        same_files(smoke_run / "sft", disk / "run" / "sft", names)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# --- two processes ----------------------------------------------------------------------------


def two_processes(folder, steps=8, **env):
    "Two processes that do SFT together, as torchrun would start them."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings = ["--set", f"sft.language.steps={steps}", "sft.language.save_every=2"]
    argv = smoke("sft", folder, *settings)
    env |= dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    pair = []
    for rank in ("0", "1"):
        log = folder.with_suffix(f".{rank}")
        pair.append(kill.Forked(argv, log, RANK=rank, LOCAL_RANK=rank, **env))
    return pair


def test_one_of_two_processes_is_lost(tmp_path):
    """Killed, or stopped for ever: the other one says so and ends; the run then continues to the
    same bits."""
    alone, folder = tmp_path / "alone", tmp_path / "run"
    assert [p.wait() for p in two_processes(alone)] == [0, 0], alone.with_suffix(".0").read_text()
    metrics = folder / "sft" / "fit-language" / "metrics.jsonl"
    for lost, sign, after in (
        (1, signal.SIGKILL, 3),
        (1, signal.SIGSTOP, 5),
        (0, signal.SIGKILL, 7),
    ):
        pair = two_processes(folder, VLMRLHF_TIMEOUT="5")
        assert kill.wait_until(lambda: rows(metrics) >= after, pair[1 - lost])
        os.kill(pair[lost].pid, sign)
        start = time.time()
        assert pair[1 - lost].wait() == 3 and time.time() - start < 60
        os.kill(pair[lost].pid, signal.SIGKILL)
        pair[lost].wait()
        log = folder.with_suffix(f".{1 - lost}").read_text()
        said = [line for line in log.splitlines() if line.startswith("vlmrlhf: ")]
        assert "another process of this run is gone or stuck" in said[-1]
        assert "continues" in said[-1]
        assert "Traceback" not in log
    assert [p.wait() for p in two_processes(folder)] == [0, 0], folder.with_suffix(".0").read_text()
    same_files(alone / "sft", folder / "sft", [*SFT_WEIGHTS, "fit-language/metrics.jsonl"])
