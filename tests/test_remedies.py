"""The report is sealed, too, and every remedy that a message names works."""

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import edit_json, refused, same_files, smoke

from vlmrlhf_course.cli import main

# --- the report -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(smoke_run, tmp_path_factory):
    "A finished run, to be damaged and mended."
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(smoke_run, folder)
    return folder


@pytest.mark.parametrize("name", ["report.json", "report.html", "before_after.png"])
def test_a_lost_report_is_made_again(capsys, smoke_run, finished, name):
    (finished / name).unlink()
    assert main(smoke("run", finished)) == 0
    assert f"{finished / name} is gone: made again" in capsys.readouterr().err
    same_files(smoke_run, finished, {"report.html", "before_after.png"})
    reports = [json.loads((f / "report.json").read_text()) for f in (smoke_run, finished)]
    assert [r.pop("run")["seed"] for r in reports] == [0, 0] and reports[0] == reports[1]


def numbers_swapped(file):
    report = json.loads(file.read_text())
    report["sft"]["chair_i"] = 0.0
    file.write_text(json.dumps(report))


def write(text):
    return lambda file: file.write_text(text)


def half_a_page(file):
    file.write_text(file.read_text()[:100])


NO_REPORTS = ("3", "null", "[]", "{}", '{"run": 1}', '{"run": {}}', "", "[" * 99_999)
CHANGES = [("report.json", write(text)) for text in NO_REPORTS]
CHANGES += [
    ("report.json", numbers_swapped),
    ("report.html", half_a_page),
    ("before_after.png", write("x")),
]


@pytest.mark.parametrize("name, spoil", CHANGES)
def test_a_changed_report_is_not_shown(capsys, smoke_run, finished, name, spoil):
    spoil(finished / name)
    line = refused(capsys, *smoke("run", finished))
    assert name in line and "delete" in line
    shutil.copy(smoke_run / name, finished / name)


@pytest.mark.parametrize("what", [3, {}, dict(seconds="x"), dict(seconds=1)])
def test_what_a_run_has_cost_may_be_missing(capsys, finished, what):
    "It is the one thing in a report that is not sealed: two runs of one command differ in it."
    edit_json(finished / "report.json", run=what)
    assert main(smoke("run", finished)) == 0 and "CHAIR_i" in capsys.readouterr().out


# --- remedies ---------------------------------------------------------------------------------

SPOILT = {
    "sft/language/model.safetensors": lambda f: f.write_bytes(f.read_bytes()[:-1]),
    "sft/done.json": write("{"),
    "preferences/candidates-validation.jsonl": Path.unlink,
    "preferences/done.json": lambda f: edit_json(f, files=None),
    "reward/reward.safetensors": Path.unlink,
    "preferences/validation.jsonl": Path.unlink,
    "ppo_rm/metrics.jsonl": write(""),
    "hacked/done.json": lambda f: edit_json(f, uses=dict(seed=7)),
    "oracle/actor.safetensors": write("x"),
    "detector/detector.safetensors": write("x"),
    "evaluate/done.json": write("[]"),
    "report.json": write("3"),
    "report.html": write("3"),
    "config.yaml": write("a: 1"),
    "run.json": write("{}"),
}


def follow(line: str):
    "Do what a message says: remove the folder, or the files, that it wants moved away or deleted."
    found = re.search(r"(?:delete|move(?: the folder)?) (/.+?)(?: away|, and|, or|:)", line)
    assert "move" in line or "delete" in line, line
    if found:
        named = found[1].split(", ")
    else:
        named = [re.match(r"vlmrlhf: (/\S+?):", line)[1]]
    for path in map(Path, named):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@pytest.mark.parametrize("file", SPOILT)
def test_every_remedy_works(capsys, smoke_run, tmp_path, file):
    """What is spoilt is said, and following the advice, literally and as often as it is given,
    leads to the whole run again."""
    shutil.copytree(smoke_run, tmp_path / "run")
    SPOILT[file](tmp_path / "run" / file)
    for tries in range(3):
        capsys.readouterr()
        status = main(smoke("evaluate", tmp_path / "run"))
        if status == 0:
            break
        said = capsys.readouterr().err.splitlines()
        assert status == 2, said
        follow(said[-1])
    assert status == 0 and (tries or file in ("report.json", "report.html", "evaluate/done.json"))
    same_files(smoke_run, tmp_path / "run", ["report.html"])
