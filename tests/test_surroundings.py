"""What a command meets before it computes: terminals, the home folder, odd values and files."""

import io
import os
import sys
from pathlib import Path

import pytest
from commands import no_stage, plain_environment, refused

from vlmrlhf_course.cli import main
from vlmrlhf_course.pipeline import course_run
from vlmrlhf_course.report import page
from vlmrlhf_course.report import record as record_module
from vlmrlhf_course.world import pretrain as pretrain_module

SMOKE = ["--scale", "smoke"]


@pytest.fixture(autouse=True)
def outside_launchers(monkeypatch):
    "No test hangs, and none sees what launchers have set."
    with plain_environment(monkeypatch):
        yield


def terminal(monkeypatch, name, encoding):
    "A strict stream of an encoding in the place of stdout or stderr; returns what reads it."
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, name, stream)

    def read():
        stream.flush()
        return stream.buffer.getvalue().decode(encoding)

    return read


@pytest.mark.parametrize("encoding", ["ascii", "koi8-r", "iso8859-2", "utf-8"])
def test_terminals_without_a_sign(tmp_path, monkeypatch, encoding):
    "Are the table's ± and a message with half a sign, as file names may hold, printed everywhere?"
    row = dict.fromkeys(page.COLUMNS, 0.5) | dict(intervals=dict(chair_i=(0.5, 0.5)))
    monkeypatch.setattr(record_module, "finished_report", lambda *a: dict(sft=row, ppo_rm=row))
    out, err = (terminal(monkeypatch, name, encoding) for name in ("stdout", "stderr"))
    assert main(["run", *SMOKE, "--out", str(tmp_path / "out")]) == 0
    assert main(["sft", *SMOKE, "--set", "clip\udcff\u2026"]) == 2
    between, dots = ("±", "…") if encoding == "utf-8" else ("+-", "...")
    assert f"0.500 {between} 0.000" in out()
    assert f"--set clip?{dots}: write section" in err()


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    "A home folder; no stage is made."
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    no_stage(monkeypatch)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_the_home_folder(tmp_path, at_home, monkeypatch):
    "Does ~ mean the home folder in settings.ini, --out, --scale and the cache?"
    (at_home / "mine.yaml").write_text("sft: {pictures: 41}\n")
    settings = "[course]\nruns = ~/runs\nscale = ~/mine.yaml\ncache = ~/kept\n"
    (tmp_path / "settings.ini").write_text(settings)
    assert main(["sft"]) == main(["sft", "--out", "~/out"]) == 0
    for folder in ("runs/mine-seed-0", "out"):
        assert "pictures: 41" in (at_home / folder / "config.yaml").read_text()
    assert course_run("smoke").folder.parent == at_home / "kept"
    made_in = []
    monkeypatch.setattr(pretrain_module, "pretrain", lambda folder, seed: made_in.append(folder))
    assert main(["pretrain", "--out", "~/parts"]) == 0 and made_in == [at_home / "parts"]
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ("runs =", "runs is empty"),
        ("scale = ", "scale is empty"),
        ("seed =\t", "seed is empty"),
        ("cache =", "cache is empty"),
        ("runs = ~nobody-at-all/x", "runs='~nobody-at-all/x'"),
        ("seed = -1", "seed=-1"),
        ("seed = 1e3", "whole number"),
        ("runs = a\0b", "runs"),
    ],
)
def test_values_in_settings(capsys, tmp_path, at_home, text, words):
    "Is a value that says nothing, or nothing that can be used, named?"
    (tmp_path / "settings.ini").write_text(f"[course]\n{text}\n")
    assert words in refused(capsys, "sft", *([] if "scale" in text else SMOKE))


@pytest.mark.parametrize(
    "put",
    [
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to("/dev/zero"),
    ],
)
@pytest.mark.parametrize("name, scale", [("settings.ini", "smoke"), ("mine.yaml", "mine.yaml")])
def test_files_that_are_none(capsys, tmp_path, at_home, put, name, scale):
    "Is what is no file refused, without waiting for somebody who writes into it?"
    put(tmp_path / name)
    line = refused(capsys, "sft", "--scale", scale, "--out", tmp_path / "out")
    assert name in line and "cannot be read" in line and not (tmp_path / "out").exists()


LONG = "9" * 500
BEYOND = [
    "ppo.temperature=1e-45",
    "ppo.no_eos=-1e300",
    "ppo.actor_lr=1e10",
    "ppo.clip=nan",
    "ppo.beta=.inf",
    "oracle.kl_target=1e-300",
    "ppo.lora.alpha=1" + "0" * 41,
    "ppo.lora.r=1" + "0" * 20,
    f"ppo.lora.r={LONG}",
    "ppo.lora.dropout=1e-12",
    "ppo.iterations=1" + "0" * 20,
    f"sft.pictures={LONG}",
    "reward_small.fit.weight_decay=1e20",
    f"sft.language.steps={LONG}",
    "evaluate.scenes=2147483648",
    "sft.kinds.detail=1e308",
    "preferences.temperatures=[1e-45,1.0]",
    "preferences.temperatures=[1.0,.nan]",
    "preferences.temperatures=[1.0,1e300]",
    "sft.kinds.text=1e-20",
    "ppo.kinds.brief=.inf",
    f"ppo.beta={LONG}",
    f"sft.kinds.detail={LONG}",
    f"preferences.temperatures=[{LONG},1]",
]

MISSING = [
    "ppo.kl_target=???",
    "ppo.lora=???",
    "ppo.lora.r='???'",
    "sft.kinds.detail=???",
    "world.pair=???",
    "preferences.temperatures=['???',1]",
    "sft.kinds={detail: '???'}",
]


@pytest.mark.parametrize("change", [*BEYOND, *MISSING], ids=lambda c: c[:40])
def test_numbers_beyond_computing(capsys, tmp_path, at_home, change):
    "Is a value with which nothing can be computed named by section and key, and nothing written?"
    line = refused(capsys, "sft", *SMOKE, "--out", "out", "--set", change)
    section, key = change.split("=")[0].split(".", 1)
    said = line.replace(f"--set {change}", "")
    assert section in said and key in said and len(said) < 200, line
    assert not os.path.exists("out")


@pytest.mark.parametrize(
    "text, words",
    [
        ("ppo: {kl_target: '???'}", "ppo.kl_target=???"),
        ("ppo: {lora: {r: '???'}}", "ppo.lora.r=?"),
        ("preferences: {temperatures: [1.0, '???']}", "preferences.temperatures.1=???"),
        ("sft: ???", "sft must"),
        ("???", "must hold keys"),
        ("ppo: {beta: .nan}", "ppo: beta"),
        ("sft: {kinds: {text: 1.0e+308}}", "sft: kinds.text"),
        ("sft: {pictures: 1" + "0" * 99 + "}", "sft: p"),
    ],
)
def test_numbers_in_scale_files(capsys, tmp_path, at_home, text, words):
    "And in a scale file?"
    (tmp_path / "mine.yaml").write_text(text)
    assert words in refused(capsys, "sft", "--scale", "mine.yaml", "--out", "out")
    assert not os.path.exists("out")
