"""The command line: errors, help, a whole run."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from commands import change_stage, no_stage, refused, same_files, smoke
from conftest import REPO
from safetensors.torch import load_file

from vlmrlhf_course.base.records import read_jsonl, spread
from vlmrlhf_course.base.stages import STAGES
from vlmrlhf_course.cli import build_parser, main
from vlmrlhf_course.data.pairs import load_pairs
from vlmrlhf_course.rl import loop
from vlmrlhf_course.train import sft
from vlmrlhf_course.world.scenes import parse_scene, split_of

COMPARED = ("dpo", "grpo", "ppo_rm", "ppo_detector", "oracle")
GREEDY = tuple(f"{name}_greedy" for name in ("sft", *COMPARED))
POLICIES = ("sft", "sft_blank", "sft_cooled", "best_of_n", *COMPARED, *GREEDY)
ARMS = ("grpo", "ppo_rm", "ppo_detector", "oracle", "hacked")  # which sample what they learn from
RECORDED = ("sft", "preferences", "reward", "reward_small", "detector", "dpo", *ARMS, "evaluate")
SHARES = (
    *("chair_i", "repeats", "recall", "attribute_error", "relation_error"),
    *("pope_accuracy", "pope_yes_rate", "novel_chair_i", "novel_recall"),
)
FIGURES = (*SHARES, "facts", "length", "reward", "true_score", "kl")
VERBS = ("", "run", "export", "check", "exercises", "pretrain", *STAGES)
METRICS = ("step", "kl", "reward", "true_score", "beta", "grad_norm", "length", "entropy")


# --- bad input --------------------------------------------------------------------------------


class TestBadInput:
    def test_unknown_scale(self, capsys):
        assert "did you mean 'smoke'" in refused(capsys, "run", "--scale", "smok")

    @pytest.mark.parametrize(
        "change, words",
        [
            ("pppo.clip=0.1", ["'pppo'", "did you mean 'ppo'"]),
            ("ppo.clpi=0.1", ["ppo.clpi", "did you mean 'clip'"]),
            ("sft.language.stesp=3", ["sft", "stesp", "steps"]),
            ("oracle.beat=0.1", ["oracle.beat", "did you mean 'beta'"]),
            ("ppo.clip=wide", ["ppo", "wide", "Float"]),
            ("ppo.iterations=2.5", ["ppo", "2.5", "Integer"]),
            ("ppo.lora=3", ["ppo", "LoRA"]),
            ("ppo.clip", ["--set ppo.clip", "section.key=value"]),
            ("clip=0.1", ["--set clip=0.1", "section.key=value"]),
            ("ppo.clip=[0.1", ["--set", "ppo.clip=[0.1"]),
        ],
    )
    def test_overrides(self, capsys, tmp_path, change, words):
        line = refused(capsys, *smoke("run", tmp_path / "out", "--set", change))
        assert all(w in line for w in words), line
        assert not (tmp_path / "out" / "sft").exists(), "computed before the settings were checked"

    @pytest.mark.parametrize(
        "change, word",
        [
            ("ppo.reward.rn=1", "reward.rn"),
            ("ppo.reward=rm", "Dict[str, float]"),
            ("ppo.controller=adaptve", "adaptve"),
            ("ppo.critic=haed", "haed"),
            ("ppo.keep=bset", "bset"),
            ("reward.pooling=lst", "lst"),
            ("reward.norm=layr", "layr"),
            ("ppo.reward_model=rewrad", "rewrad"),
            ("ppo.answers=5000", "5000"),
            ("grpo.length=tokns", "tokns"),
            ("evaluate.arms=[ppo_rm,orcale]", "orcale"),
            ("evaluate.headline=oracle_", "oracle_"),
            ("evaluate.curve=hakced", "hakced"),
        ],
    )
    def test_values_that_no_stage_can_use(self, capsys, tmp_path, change, word, monkeypatch):
        """A choice that does not exist is found before hours of computing, not by a KeyError after
        them (or never)."""
        no_stage(monkeypatch)
        line = refused(capsys, *smoke("sft", tmp_path / "out", "--set", change))
        assert word in line.replace(f"--set {change}", "")

    @pytest.mark.parametrize("text", ["ppo: {clip: [\n", "- ppo\n", "ppo: 3\n"])
    def test_broken_scale_file(self, capsys, tmp_path, text):
        (tmp_path / "mine.yaml").write_text(text)
        refused(capsys, "run", "--scale", tmp_path / "mine.yaml", "--out", tmp_path / "out")

    @pytest.mark.parametrize(
        "text, word",
        [
            ("[course\n", "settings.ini"),
            ("[course]\nsacle = tiny\n", "did you mean 'scale'"),
            ("[course]\nseed = x\n", "whole number"),
            ("[course]\nscale = smok\n", "did you mean 'smoke'"),
        ],
    )
    def test_broken_settings(self, capsys, tmp_path, text, word):
        (tmp_path / "settings.ini").write_text(text)
        assert word in refused(capsys, "run")

    def test_out_below_a_file(self, capsys, tmp_path):
        (tmp_path / "file").write_text("")
        line = refused(capsys, *smoke("run", tmp_path / "file" / "out"))
        assert str(tmp_path / "file") in line

    def test_other_settings_in_an_existing_folder(self, capsys, smoke_run, tmp_path):
        shutil.copytree(smoke_run, tmp_path / "run")
        before = (tmp_path / "run" / "config.yaml").read_text()
        for verb, change, word in (
            ("sft", ["--set", "sft.language.steps=4"], "sft.language"),
            ("reward", ["--set", "reward.margin=0.6"], "reward.margin"),
            ("ppo", ["--arm", "ppo_rm", "--set", "ppo_rm.clip=0.1"], "ppo_rm.clip"),
            ("ppo", ["--arm", "ppo_rm", "--set", "ppo.clip=0.1"], "ppo_rm.clip"),
            ("detector", ["--set", "detector.width=9"], "detector.width"),
            ("run", ["--seed", "1"], "seed"),
        ):
            line = refused(capsys, *smoke(verb, tmp_path / "run", *change))
            assert word in line and "--out" in line, line
        after = (tmp_path / "run" / "config.yaml").read_text()
        assert after == before, "a refused command rewrote the record of the run's settings"

    def test_damaged_data_names_file_and_line(self, capsys, smoke_run, tmp_path):
        shutil.copytree(smoke_run, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "reward")
        (tmp_path / "run" / "report.json").unlink()
        file = tmp_path / "run" / "preferences" / "train.jsonl"
        rows = file.read_text().splitlines()
        file.write_text("\n".join([*rows[:2], rows[2][:-9], *rows[3:]]))
        line = refused(capsys, *smoke("reward", tmp_path / "run"))
        assert str(file) in line and "line 3" in line
        rows[4] = json.dumps(json.loads(rows[4]) | dict(rejected=""))
        file.write_text("\n".join(rows))
        line = refused(capsys, *smoke("reward", tmp_path / "run"))
        assert "line 5" in line and "empty answer" in line

    def test_in_a_process_of_its_own(self, tmp_path):
        words = smoke("run", tmp_path / "o", "--set", "ppo.clpi=1")
        done = subprocess.run(
            [sys.executable, "-m", "vlmrlhf_course.cli", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "did you mean 'clip'" in done.stderr.splitlines()[-1]
        assert sum(line.startswith("vlmrlhf:") for line in done.stderr.splitlines()) == 1
        assert done.stdout == ""


class TestHelp:
    @pytest.mark.parametrize("verb", VERBS)
    def test_help(self, capsys, verb):
        with pytest.raises(SystemExit) as e:
            main([*verb.split(), "--help"])
        assert e.value.code == 0 and "vlmrlhf" in capsys.readouterr().out

    def test_names_every_verb(self):
        said = build_parser().format_help()
        for verb in [*VERBS][1:]:
            assert re.search(rf"^    {verb}\s+\w", said, re.MULTILINE), verb

    def test_settings_are_the_defaults(self, tmp_path):
        (tmp_path / "settings.ini").write_text("[course]\nscale = smoke\nseed = 7\n")
        args = build_parser().parse_args(["run"])
        assert args.scale == "smoke"
        assert args.seed == 7
        assert build_parser().parse_args(["run", "--seed", "3"]).seed == 3


def test_spread():
    out = spread([dict(a=1.0, b=dict(c=2), d="x", only=1), dict(a=3.0, b=dict(c=2), d="y")])
    assert out["a"] == dict(mean=2.0, std=pytest.approx(2**0.5))
    assert out["b"]["c"] == dict(mean=2, std=0)
    assert "only" not in out


# --- a run ------------------------------------------------------------------------------------


class TestRun:
    @pytest.fixture
    def report(self, smoke_run):
        return json.loads((smoke_run / "report.json").read_text())

    def test_output(self, smoke_run):
        out = (smoke_run.parent / "stdout").read_text()
        assert "CHAIR_i" in out and str(smoke_run / "report.html") in out
        assert "Traceback" not in (smoke_run.parent / "stderr").read_text()

    def test_report_has_every_figure(self, report):
        for policy in POLICIES:
            row = report[policy]
            assert set(FIGURES) <= row.keys(), policy
            for figure in FIGURES:
                assert isinstance(row[figure], (int, float)), policy
                assert not math.isnan(row[figure]), policy
            for share in SHARES:
                assert 0 <= row[share] <= 1
            assert 0 <= row["true_score"] <= 10
            assert row["length"] > 0
            assert row["kl"] >= 0
        assert report["sft"]["kl"] == 0 < min(report[row]["kl"] for row in ("ppo_rm", "sft_blank"))

    def test_report_on_the_reward_model_and_the_run(self, report):
        rm, run = report["reward_model"], report["run"]
        assert {"pair_accuracy", "pair_accuracy_gold", "image_ablated", "kappa"} <= rm.keys()
        for share in ("pair_accuracy", "pair_accuracy_gold", "image_ablated"):
            assert 0 <= rm[share] <= 1
        assert -1 <= rm["kappa"] <= 1
        assert run["seed"] == 0 and run["seconds"] > 1 and 0.1 < run["peak_memory_gb"] < 64

    def test_page_is_self_contained(self, smoke_run):
        text = (smoke_run / "report.html").read_text()
        assert text.startswith("<!doctype html>")
        without_pictures = re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
        assert not re.search(r"https?:|//\w|<script|<link|@import|url\(", without_pictures)
        sources = re.findall(r"src=['\"]?([^'\" >]{5})", text)
        assert len(sources) >= 3 and set(sources) == {"data:"} and "<mark>" in text

    def test_every_stage_left_its_record(self, smoke_run):
        for stage in RECORDED:
            record = json.loads((smoke_run / stage / "done.json").read_text())
            assert record["uses"]["seed"] == 0, stage
        for arm in ARMS:
            rows = read_jsonl(smoke_run / arm / "metrics.jsonl", METRICS)
            assert [r["step"] for r in rows] == [0, 1, 2]
            assert abs(rows[0]["kl"]) < 1e-6, "the policy starts at the reference"
            assert not (smoke_run / arm / "checkpoints").exists()
        assert not list(smoke_run.rglob(".*")), "half-written files were left"

    def test_arms_differ(self, smoke_run):
        weights = {arm: load_file(smoke_run / arm / "actor.safetensors") for arm in ARMS}
        for arm, own in weights.items():
            assert all(".lora_" in name for name in own), arm
            learned = [tensor.any() for name, tensor in own.items() if "lora_B" in name]
            assert any(learned), f"{arm} learned nothing"
        for a, b in itertools.combinations(weights.values(), 2):
            assert any(not torch.equal(tensor, b[name]) for name, tensor in a.items())

    def test_pairs_can_be_read(self, smoke_run):
        for split in ("train", "validation"):
            pairs = load_pairs(smoke_run / "preferences" / f"{split}.jsonl")
            assert pairs and {split_of(parse_scene(r["image"][6:])) for r in pairs} == {split}

    def test_the_same_command_again_does_nothing(self, smoke_run, tmp_path, capsys, monkeypatch):
        shutil.copytree(smoke_run, tmp_path / "run")

        def never(*a, **k):
            raise AssertionError("computed again")

        for module, name in ((sft, "fit"), (loop, "train"), (loop, "try_sample")):
            monkeypatch.setattr(module, name, never)
        assert main(smoke("run", tmp_path / "run")) == 0
        assert "CHAIR_i" in capsys.readouterr().out
        same_files(smoke_run, tmp_path / "run", ["report.json"])

    def test_run_after_evaluate(self, smoke_run, tmp_path, monkeypatch):
        """`vlmrlhf evaluate` writes the report without what the run has cost; `vlmrlhf run` reads
        it, and computes nothing again."""
        shutil.copytree(smoke_run, tmp_path / "run")
        report = json.loads((smoke_run / "report.json").read_text())
        assert main(smoke("evaluate", tmp_path / "run")) == 0
        without = json.loads((tmp_path / "run" / "report.json").read_text())
        assert without == {k: v for k, v in report.items() if k != "run"}
        change_stage(monkeypatch, "evaluate", whole=lambda task: pytest.fail("evaluated again"))
        assert main(smoke("run", tmp_path / "run")) == 0
