"The command line: errors, a whole run, resumption, repeatability."
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import kill
import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from vlmrlhf_course import cli
from vlmrlhf_course.base import runs
from vlmrlhf_course.rl import ppo
from vlmrlhf_course.train import sft
from vlmrlhf_course.cli import build_parser, main, spread

POLICIES = ("sft", "sft_blank", "ppo_rm", "ppo", "best_of_n", "gold")
FIGURES = ("chair_i", "recall", "attribute_error", "relation_error", "length", "reward", "true_score", "kl")


def fails(capsys, *argv):
    "Run a command that must fail as bad input does: status 2, one line on stderr, nothing else. Returns the line."
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("vlmrlhf: ") and "Traceback" not in lines[0], lines
    return lines[0]


# --- bad input ------------------------------------------------------------------------------------------------------

class TestBadInput:
    def test_unknown_scale(self, capsys): assert "did you mean 'smoke'" in fails(capsys, "run", "--scale", "smok")

    @pytest.mark.parametrize("change, words", [
        ("pppo.clip=0.1", ["'pppo'", "did you mean 'ppo'"]),
        ("ppo.clpi=0.1", ["ppo.clpi", "did you mean 'clip'"]),
        ("sft.language.stesp=3", ["sft", "stesp", "steps"]),
        ("gold.beat=0.1", ["gold.beat", "did you mean 'beta'"]),
        ("ppo.clip=wide", ["ppo", "wide", "Float"]),
        ("ppo.iterations=2.5", ["ppo", "2.5", "Integer"]),
        ("ppo.lora=3", ["ppo", "LoRA"]),
        ("ppo.clip", ["--set ppo.clip", "section.key=value"]),
        ("clip=0.1", ["--set clip=0.1", "section.key=value"]),
        ("ppo.clip=[0.1", ["--set", "ppo.clip=[0.1"])])
    def test_overrides(self, capsys, tmp_path, change, words):
        line = fails(capsys, "run", "--scale", "smoke", "--out", tmp_path / "out", "--set", change)
        assert all(w in line for w in words), line
        assert not (tmp_path / "out" / "sft").exists(), "something was computed before the settings were checked"

    @pytest.mark.parametrize("change", ["ppo.reward=rn", "ppo.controller=adaptve", "ppo.critic=haed", "ppo.keep=bset", "reward.pooling=lst",
                                        "reward.norm=layr", "ppo.reward_model=rewrad", "ppo.answers=5000"])
    def test_values_that_no_stage_can_use(self, capsys, tmp_path, change, monkeypatch):
        "A choice that does not exist is found before hours of computing, not by a KeyError after them (or never)."
        for module, name in ((sft, "sft_stage"), (ppo, "ppo_stage")): monkeypatch.setattr(module, name, lambda *a: None)
        assert change.split("=")[1] in fails(capsys, "sft", "--scale", "smoke", "--out", tmp_path / "out", "--set", change)

    @pytest.mark.parametrize("text", ["ppo: {clip: [\n", "- ppo\n", "ppo: 3\n"])
    def test_broken_scale_file(self, capsys, tmp_path, text):
        (tmp_path / "mine.yaml").write_text(text)
        fails(capsys, "run", "--scale", tmp_path / "mine.yaml", "--out", tmp_path / "out")

    @pytest.mark.parametrize("text, word", [("[course\n", "settings.ini"), ("[course]\nsacle = tiny\n", "did you mean 'scale'"), ("[course]\nseed = x\n", "whole number"),
                                            ("[course]\nscale = smok\n", "did you mean 'smoke'")])
    def test_broken_settings(self, capsys, tmp_path, text, word):
        (tmp_path / "settings.ini").write_text(text)
        assert word in fails(capsys, "run")

    def test_out_below_a_file(self, capsys, tmp_path):
        (tmp_path / "file").write_text("")
        assert str(tmp_path / "file") in fails(capsys, "run", "--scale", "smoke", "--out", tmp_path / "file" / "out")

    def test_other_settings_in_an_existing_folder(self, capsys, smoke_run, tmp_path):
        shutil.copytree(smoke_run, tmp_path / "run")
        before = (tmp_path / "run" / "config.yaml").read_text()
        for verb, change, word in (("sft", ["--set", "sft.language.steps=4"], "sft.language"), ("reward", ["--set", "reward.margin=0.6"], "reward.margin"),
                                   ("ppo", ["--set", "ppo.clip=0.1"], "ppo.clip"), ("run", ["--seed", "1"], "seed")):
            line = fails(capsys, verb, "--scale", "smoke", "--out", tmp_path / "run", *change)
            assert word in line and "--out" in line, line
        assert (tmp_path / "run" / "config.yaml").read_text() == before, "a refused command rewrote the record of the run's settings"

    def test_damaged_data_names_file_and_line(self, capsys, smoke_run, tmp_path):
        shutil.copytree(smoke_run, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "reward"), (tmp_path / "run" / "report.json").unlink()
        file = tmp_path / "run" / "preferences" / "train.jsonl"
        rows = file.read_text().splitlines()
        file.write_text("\n".join([*rows[:2], rows[2][:-9], *rows[3:]]))
        line = fails(capsys, "reward", "--scale", "smoke", "--out", tmp_path / "run")
        assert str(file) in line and "line 3" in line
        rows[4] = json.dumps(json.loads(rows[4]) | dict(rejected=""))
        file.write_text("\n".join(rows))
        line = fails(capsys, "reward", "--scale", "smoke", "--out", tmp_path / "run")
        assert "line 5" in line and "empty answer" in line

    def test_in_a_process_of_its_own(self, tmp_path):
        done = subprocess.run([sys.executable, "-m", "vlmrlhf_course.cli", "run", "--scale", "smoke", "--set", "ppo.clpi=1", "--out", str(tmp_path / "o")],
                              cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "did you mean 'clip'" in done.stderr.splitlines()[-1]
        assert sum(line.startswith("vlmrlhf:") for line in done.stderr.splitlines()) == 1 and done.stdout == ""


class TestHelp:
    @pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["ppo", "--help"]])
    def test_help(self, capsys, argv):
        with pytest.raises(SystemExit) as e: main(argv)
        assert e.value.code == 0 and "vlmrlhf" in capsys.readouterr().out

    def test_names_every_verb(self): assert all(v in build_parser().format_help() for v in ("run", "sft", "preferences", "reward", "ppo", "evaluate", "pretrain"))

    def test_settings_are_the_defaults(self, tmp_path):
        (tmp_path / "settings.ini").write_text("[course]\nscale = smoke\nseed = 7\n")
        args = build_parser().parse_args(["run"])
        assert args.scale == "smoke" and args.seed == 7 and build_parser().parse_args(["run", "--seed", "3"]).seed == 3


def test_spread():
    out = spread([dict(a=1., b=dict(c=2), d="x", only=1), dict(a=3., b=dict(c=2), d="y")])
    assert out["a"] == dict(mean=2., std=pytest.approx(2 ** .5)) and out["b"]["c"] == dict(mean=2, std=0) and "only" not in out


# --- a run ----------------------------------------------------------------------------------------------------------

class TestRun:
    @pytest.fixture
    def report(self, smoke_run): return json.loads((smoke_run / "report.json").read_text())

    def test_output(self, smoke_run):
        out = (smoke_run.parent / "stdout").read_text()
        assert "chair_i" in out and str(smoke_run / "report.html") in out
        assert "Traceback" not in (smoke_run.parent / "stderr").read_text()

    def test_report_has_every_figure(self, report):
        for policy in POLICIES:
            assert set(FIGURES) <= report[policy].keys(), policy
            assert all(isinstance(report[policy][f], (int, float)) and report[policy][f] == report[policy][f] for f in FIGURES), policy
            for share in ("chair_i", "recall", "attribute_error", "relation_error"): assert 0 <= report[policy][share] <= 1
            assert 0 <= report[policy]["true_score"] <= 10 and report[policy]["length"] > 0 and report[policy]["kl"] >= 0
        assert report["sft"]["kl"] == report["sft_blank"]["kl"] == 0 < report["ppo"]["kl"]

    def test_report_on_the_reward_model_and_the_run(self, report):
        rm, run = report["reward_model"], report["run"]
        assert {"pair_accuracy", "pair_accuracy_gold", "image_ablated", "kappa"} <= rm.keys()
        assert all(0 <= rm[k] <= 1 for k in ("pair_accuracy", "pair_accuracy_gold", "image_ablated")) and -1 <= rm["kappa"] <= 1
        assert run["seed"] == 0 and run["seconds"] > 1 and .1 < run["peak_memory_gb"] < 64

    def test_page_is_self_contained(self, smoke_run):
        page = (smoke_run / "report.html").read_text()
        assert page.startswith("<!doctype html>") and not re.search(r"https?:|//\w|<script|<link|@import|url\(", re.sub(r"data:image/png;base64,[\w+/=]+", "", page))
        sources = re.findall(r"src=['\"]?([^'\" >]{5})", page)
        assert len(sources) >= 3 and set(sources) == {"data:"} and "<mark>" in page

    def test_every_stage_left_its_record(self, smoke_run):
        for stage in ("sft", "preferences", "reward", "reward_small", "ppo", "ppo_rm", "gold", "hacked", "evaluate"):
            assert json.loads((smoke_run / stage / "done.json").read_text())["uses"]["seed"] == 0, stage
        for arm in ("ppo", "ppo_rm", "gold", "hacked"):
            rows = runs.read_jsonl(smoke_run / arm / "metrics.jsonl", ("step", "kl", "reward", "true_score", "beta", "grad_norm", "length", "entropy"))
            assert [r["step"] for r in rows] == [0, 1, 2] and abs(rows[0]["kl"]) < 1e-6, "the policy starts at the reference"
            assert not (smoke_run / arm / "checkpoints").exists()
        assert not list(smoke_run.rglob(".*")), "half-written files were left"

    def test_arms_differ(self, smoke_run):
        weights = {arm: load_file(smoke_run / arm / "actor.safetensors") for arm in ("ppo", "ppo_rm", "gold", "hacked")}
        for a in weights:
            assert all(".actor." in k for k in weights[a]) and any(v.any() for k, v in weights[a].items() if "lora_B" in k), f"{a} learned nothing"
            for b in weights: assert a == b or any(not torch.equal(v, weights[b][k]) for k, v in weights[a].items())

    def test_pairs_can_be_read(self, smoke_run):
        from vlmrlhf_course.data.preferences import load_pairs
        from vlmrlhf_course.world.scenes import parse_scene, split_of
        for split in ("train", "validation"):
            pairs = load_pairs(smoke_run / "preferences" / f"{split}.jsonl")
            assert pairs and {split_of(parse_scene(r["image"][6:])) for r in pairs} == {split}

    def test_the_same_command_again_does_nothing(self, smoke_run, tmp_path, capsys, monkeypatch):
        shutil.copytree(smoke_run, tmp_path / "run")
        def never(*a, **k): raise AssertionError("computed again")
        for module, name in ((sft, "fit"), (ppo, "train_ppo"), (ppo, "try_sample")): monkeypatch.setattr(module, name, never)
        assert main(["run", "--scale", "smoke", "--out", str(tmp_path / "run")]) == 0
        assert "chair_i" in capsys.readouterr().out
        assert (tmp_path / "run" / "report.json").read_bytes() == (smoke_run / "report.json").read_bytes()

    def test_run_after_evaluate(self, smoke_run, tmp_path, monkeypatch):
        "`vlmrlhf evaluate` writes the report without what the run has cost; `vlmrlhf run` reads it, and computes nothing again."
        from vlmrlhf_course.report import evaluate
        shutil.copytree(smoke_run, tmp_path / "run")
        report = json.loads((smoke_run / "report.json").read_text())
        argv = ["--scale", "smoke", "--out", str(tmp_path / "run")]
        assert main(["evaluate", *argv]) == 0
        without = json.loads((tmp_path / "run" / "report.json").read_text())
        assert without == {k: v for k, v in report.items() if k != "run"}
        monkeypatch.setattr(evaluate, "evaluate_stage", lambda *a: pytest.fail("evaluated again"))
        assert main(["run", *argv]) == 0


# --- resumption and repeatability -----------------------------------------------------------------------------------

def same_files(a, b, names):
    for name in names: assert (a / name).read_bytes() == (b / name).read_bytes(), name


def interrupted(capsys, *argv):
    assert main(list(map(str, argv))) == 130
    assert "interrupted" in (last := capsys.readouterr().err.splitlines()[-1]) and "continues" in last


def stop_at(monkeypatch, module, name, call):
    "Let `module.name` be interrupted at its `call`-th call."
    original, calls = getattr(module, name), []
    def wrapped(*a, **k):
        calls.append(1)
        if len(calls) == call: raise KeyboardInterrupt
        return original(*a, **k)
    monkeypatch.setattr(module, name, wrapped)


def test_same_seed_same_bits(smoke_run, tmp_path):
    "The chain up to PPO, again, in another process and another folder."
    assert main(["ppo", "--scale", "smoke", "--out", str(tmp_path / "run")]) == 0
    same_files(smoke_run, tmp_path / "run", ["preferences/train.jsonl", "preferences/candidates-validation.jsonl", "sft/projector/model.safetensors",
                                             "sft/language/model.safetensors", "reward/reward.safetensors", "ppo/actor.safetensors", "ppo/metrics.jsonl"])


def test_sft_resumes_exactly(smoke_run, tmp_path, capsys, monkeypatch):
    "Stopped in the second stage after a checkpoint, continued: the weights of the uninterrupted run. (How often it saves changes nothing.)"
    argv = ["sft", "--scale", "smoke", "--out", tmp_path / "run", "--set", "sft.projector.save_every=2", "sft.language.save_every=2"]
    stop_at(monkeypatch, sft, "backward_through", 6)   # 3 steps of the projector; step 2 of the language model has a checkpoint behind it
    interrupted(capsys, *argv)
    folder = tmp_path / "run" / "sft"
    assert not (folder / "done.json").exists() and (folder / "fit-language" / "checkpoints" / "step-2").is_dir()
    monkeypatch.undo()
    stop_at(monkeypatch, sft, "backward_through", 2)   # one step is left: two would mean that it started again
    assert main(list(map(str, argv))) == 0
    same_files(smoke_run / "sft", folder, ["projector/model.safetensors", "language/model.safetensors", "fit-language/metrics.jsonl", "fit-projector/metrics.jsonl"])


def test_ppo_resumes_exactly(smoke_run, tmp_path, capsys, monkeypatch):
    "Stopped in the third iteration, after the checkpoint of the second: weights, metrics and best score as without the stop."
    for stage in ("sft", "preferences", "reward"): shutil.copytree(smoke_run / stage, tmp_path / "run" / stage)
    argv = ["ppo", "--scale", "smoke", "--out", tmp_path / "run"]
    stop_at(monkeypatch, ppo, "make_experience", 3)
    interrupted(capsys, *argv)
    folder = tmp_path / "run" / "ppo"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-2"] and not (folder / "actor.safetensors").exists()
    monkeypatch.undo()
    stop_at(monkeypatch, ppo, "make_experience", 2)
    assert main(list(map(str, argv))) == 0
    same_files(smoke_run / "ppo", folder, ["actor.safetensors", "metrics.jsonl"])
    assert json.loads((folder / "done.json").read_text()) == json.loads((smoke_run / "ppo" / "done.json").read_text())


def test_a_stop_while_weights_are_written(smoke_run, tmp_path, capsys, monkeypatch):
    "Stopped while the final weights are written: the next run must not take half a folder for a whole one."
    argv = ["sft", "--scale", "smoke", "--out", tmp_path / "run"]
    original = LlavaForConditionalGeneration.save_pretrained
    def cut(model, path, **kwargs):
        original(model, path, **kwargs)
        (Path(path) / "model.safetensors").unlink()   # the configuration is written before the weights
        raise KeyboardInterrupt
    monkeypatch.setattr(LlavaForConditionalGeneration, "save_pretrained", cut)
    interrupted(capsys, *argv)
    monkeypatch.undo()
    assert main(list(map(str, argv))) == 0
    same_files(smoke_run / "sft", tmp_path / "run" / "sft", ["language/model.safetensors"])


def test_another_seed_gives_other_weights(smoke_run, tmp_path):
    assert main(["sft", "--scale", "smoke", "--seed", "1", "--out", str(tmp_path / "run")]) == 0
    a, b = (load_file(f / "sft" / "language" / "model.safetensors") for f in (smoke_run, tmp_path / "run"))
    assert any(not torch.equal(a[k], b[k]) for k in a)


# --- killed, full, alone --------------------------------------------------------------------------------------------

def rows(file): return file.read_bytes().count(b"\n") if file.is_file() else 0


def test_killed_three_times(smoke_run, tmp_path):
    """SIGKILL in the middle of SFT, while a checkpoint is being written, and in the evaluation: the end is, file by file, that of the run
    that was left alone. (`python tests/kill.py` does this at random moments, many times.)"""
    folder, log = tmp_path / "run", tmp_path / "log"
    argv = ["run", "--scale", "smoke", "--out", folder]
    for moment in (lambda: rows(folder / "sft" / "fit-language" / "metrics.jsonl") >= 2, lambda: kill.half_written(folder),
                   lambda: kill.begun(folder, "evaluate")):
        process = kill.Forked(argv, log)
        assert kill.wait_until(moment, process), log.read_text()
        assert kill.kill(process, "group") == "group"
        argv = [*argv, "--resume"] if "--resume" not in argv else argv
    assert kill.Forked(argv, log).wait() == 0, log.read_text()
    assert "chair_i" in log.read_text() and not kill.differences(smoke_run, folder)
    report = (folder / "report.json").read_bytes()
    assert kill.Forked(argv, log).wait() == 0 and (folder / "report.json").read_bytes() == report, "a finished run is only read"


def test_arms_end_with_the_run(tmp_path):
    "A run that is killed takes its arms with it: each watches its standard input, which closes then."
    arm = "import time; from vlmrlhf_course.cli import end_with_parent; end_with_parent(); print('up', flush=True); time.sleep(100)"
    run = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {arm!r}], stdin=subprocess.PIPE); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", run], env={**os.environ, "PYTHONPATH": str(REPO)}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        start = time.time()
        process.kill()
        assert process.stdout.read() == "" and time.time() - start < 60, "it comes back when the arm, too, has closed it"


def test_arms_are_started_so(tmp_path, monkeypatch):
    "What the arm needs to see its parent die; and every option of the run."
    started = []
    class Silent:
        stderr = ()
        def __init__(self, command, **how): started.append((command, how))
    monkeypatch.setattr(subprocess, "Popen", Silent)
    args = build_parser().parse_args(["run", "--scale", "smoke", "--skip-bad", "--threads", "3", "--set", "ppo.clip=.1", "ppo.beta=.2"])
    cli._start_arm(runs.Run(tmp_path, "smoke", seed=4), args, "gold")
    (command, how), = started
    assert how["stdin"] == subprocess.PIPE and how["env"]["VLMRLHF_ARM"] == "1"
    again = build_parser().parse_args(command[command.index("ppo"):])
    assert again.arm == "gold" and again.seed == 4 and again.skip_bad and again.threads == 3 and again.set == args.set and again.out == str(tmp_path)


def mount(folder, megabytes, *more):
    return not subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join([f"size={megabytes}m", *more]), "tmpfs", str(folder)], capture_output=True).returncode


@pytest.mark.parametrize("size, save_every, words", [
    (16, 1, ["checkpoint after step 2", "the one after step 1 is whole", "make room"]),   # in the middle of training …
    (6, 100, ["cannot write", "No space left", "make room"])], ids=["checkpoint", "weights"])   # … and at its end
def test_full_disk(smoke_run, tmp_path, capsys, size, save_every, words):
    "One line, status 2, what was saved before is whole; with room on the disk the same command goes on, to the same end."
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount(disk, size): pytest.skip("needs root, to mount a small file system")
    try:
        argv = ["sft", "--scale", "smoke", "--out", disk / "run", "--set", f"sft.projector.save_every={save_every}", f"sft.language.save_every={save_every}"]
        line = fails(capsys, *argv)
        assert all(w in line for w in words), line
        assert not list(disk.rglob(".part-2")), "half a checkpoint takes room for nothing"
        assert mount(disk, 64, "remount")
        assert main(list(map(str, argv))) == 0
        same_files(smoke_run / "sft", disk / "run" / "sft", ["language/model.safetensors", "fit-language/metrics.jsonl"])
    finally: subprocess.run(["umount", "-l", str(disk)], check=True)


# --- two processes --------------------------------------------------------------------------------------------------

def two_processes(folder, steps=8, **env):
    "Two processes that do SFT together, as torchrun would start them."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    argv = ["sft", "--scale", "smoke", "--out", folder, "--set", f"sft.language.steps={steps}", "sft.language.save_every=2"]
    where = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return [kill.Forked(argv, folder.with_suffix(f".{rank}"), RANK=str(rank), LOCAL_RANK=str(rank), **where, **env) for rank in (0, 1)]


def test_one_of_two_processes_is_lost(tmp_path):
    "Killed, or stopped for ever: the other one says so and ends; the run then continues to the same bits."
    alone, folder = tmp_path / "alone", tmp_path / "run"
    assert [p.wait() for p in two_processes(alone)] == [0, 0], alone.with_suffix(".0").read_text()
    metrics = folder / "sft" / "fit-language" / "metrics.jsonl"
    for lost, sign, after in ((1, signal.SIGKILL, 3), (1, signal.SIGSTOP, 5), (0, signal.SIGKILL, 7)):
        pair = two_processes(folder, VLMRLHF_TIMEOUT="5")
        assert kill.wait_until(lambda: rows(metrics) >= after, pair[1 - lost])
        os.kill(pair[lost].pid, sign)
        start = time.time()
        assert pair[1 - lost].wait() == 3 and time.time() - start < 60
        os.kill(pair[lost].pid, signal.SIGKILL), pair[lost].wait()
        said = [line for line in folder.with_suffix(f".{1 - lost}").read_text().splitlines() if line.startswith("vlmrlhf: ")]
        assert "another process of this run is gone or stuck" in said[-1] and "continues" in said[-1]
        assert "Traceback" not in folder.with_suffix(f".{1 - lost}").read_text()
    assert [p.wait() for p in two_processes(folder)] == [0, 0], folder.with_suffix(".0").read_text()
    same_files(alone / "sft", folder / "sft", ["projector/model.safetensors", "language/model.safetensors", "fit-language/metrics.jsonl"])
