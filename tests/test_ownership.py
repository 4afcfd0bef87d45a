"""Nothing of somebody else is removed or written over: only what a run has made, known by its own
record."""

import ast
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import refused, smoke, tree
from conftest import REPO
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from vlmrlhf_course.base import files
from vlmrlhf_course.base.checkpoints import clear_checkpoints, save_folder, save_tensors
from vlmrlhf_course.base.folders import claim
from vlmrlhf_course.base.metrics import MetricLog
from vlmrlhf_course.base.runs import Run
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.cli import main

DELETING = {"rmtree", "unlink", "rmdir", "removedirs", "truncate", "ftruncate", "rename", "move"}


def names_called(path):
    "Names of everything that a module calls as a method or a function of another module."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            yield f"{owner}.{node.func.attr}"


def test_one_module_deletes():
    """What removes or cuts a file stands in `files`, in `remove` and its helpers, and nowhere else
    in the package."""
    where = {}
    for path in (REPO / "vlmrlhf_course").rglob("*.py"):
        for name in names_called(path):
            if name.split(".")[1] in DELETING or name == "os.remove":
                where.setdefault(path.stem, set()).add(name)
    assert set(where) == {"files"}, where


# --- random trees -----------------------------------------------------------------------------

TEMPTING = """
    checkpoints step-1 step-3 .part-1 .part-step-3-abc .report.json.123 .cache.2 fit-language
    language sft ppo notes done.txt model.bin manifest.json config.yaml metrics.jsonl report.html
    stderr.log tensorboard .half-written.txt run.json.bak
""".split()
PATHS = st.lists(st.sampled_from(TEMPTING), min_size=1, max_size=4).map("/".join)
TREES = st.dictionaries(PATHS, st.binary(max_size=20), min_size=1, max_size=8)


def plant(folder: Path, wanted: dict[str, bytes]) -> dict[str, bytes]:
    "Write foreign files, as far as no other file is in the way. Returns what stands there now."
    there = {}
    for name, data in wanted.items():
        file = folder / name
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                file.write_bytes(data)
                there[name] = data
        except OSError:
            pass
    return there


def unchanged(folder, foreign):
    return all((folder / n).read_bytes() == data for n, data in foreign.items())


@given(TREES)
def test_a_folder_with_other_things_is_not_taken(tmp_path_factory, wanted):
    "Whatever stands in it: it is refused as it is, or nothing of it changes."
    folder = tmp_path_factory.mktemp("foreign")
    foreign = plant(folder, wanted)
    try:
        claim(folder)
    except UserError as e:
        assert tree(folder) == foreign and "--out" in str(e)
    else:
        assert unchanged(folder, foreign)
        assert {n.rsplit("/", 1)[-1] for n in foreign} == {"stderr.log"}


@given(TREES)
def test_a_stage_removes_what_it_made(tmp_path_factory, wanted):
    """Checkpoints and half-written remains go when it is finished; foreign files around and between
    them stay."""
    run = Run(tmp_path_factory.mktemp("run"), "smoke")
    assert not run.done("stage", dict(seed=0))
    stage = run.path("stage")
    made = [stage / "checkpoints" / "step-3", stage / "fit-language" / "checkpoints" / "step-1"]
    for folder in made:
        folder.mkdir(parents=True)
        (folder / "weights").write_text("ours")
        files.seal(folder)
    part = stage / ".part-language-xyz"
    part.mkdir()
    (part / files.MARK).touch()
    (part / "weights").write_text("ours")
    foreign = plant(stage, wanted)
    run.finish("stage", dict(seed=0))
    assert unchanged(stage, foreign)
    left = set(tree(stage)) - set(foreign) - {"done.json"}
    assert not left, "what the stage made is gone"


@given(TREES)
def test_remove_takes_what_a_record_names(tmp_path_factory, wanted):
    "`remove` on a sealed folder in which somebody has put things of their own."
    folder = tmp_path_factory.mktemp("sealed")
    ours = {"weights": b"x", "deep/er/state": b"y"}
    for name, data in ours.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    files.seal(folder)
    foreign = plant(folder, {n: d for n, d in wanted.items() if n != "manifest.json"})
    files.remove(folder)
    assert unchanged(folder, foreign) and (not folder.exists() or set(tree(folder)) == set(foreign))


# --- ways out ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../thesis.txt", "a/../../../thesis.txt", "/{outside}", "link/thesis.txt"]
)
def test_a_record_leads_nowhere_else(tmp_path, name):
    "A manifest whose names lead out of its folder, or through a link, removes nothing there."
    (tmp_path / "thesis.txt").write_text("weeks of work")
    step = tmp_path / "checkpoints" / "step-1"
    step.mkdir(parents=True)
    (step / "a").mkdir()
    (step / "link").symlink_to(tmp_path)
    sums = {name.format(outside=tmp_path / "thesis.txt"): files.digest(tmp_path / "thesis.txt")}
    record = dict(made_by=files.SIGNATURE, of="", files=sums)
    (step / files.MANIFEST).write_text(json.dumps(record))
    clear_checkpoints(tmp_path)
    files.remove(step)
    assert (tmp_path / "thesis.txt").read_text() == "weeks of work"


def test_manifests_of_others(tmp_path):
    "Many tools write a manifest.json; without our signature it tells us nothing."
    step = tmp_path / "checkpoints" / "step-1"
    step.mkdir(parents=True)
    (step / "model.bin").write_text("weeks of work")
    files.seal(step)
    record = json.loads((step / files.MANIFEST).read_text())
    (step / files.MANIFEST).write_text(json.dumps(record | dict(made_by="another tool")))
    before = tree(tmp_path)
    clear_checkpoints(tmp_path)
    assert tree(tmp_path) == before and files.damage(step)


@pytest.mark.parametrize("link", ["checkpoints", "checkpoints/step-1", "fit-a"])
def test_links_are_not_followed(tmp_path, link):
    "A run folder whose folders are links into somebody's own checkpoints, even sealed ones."
    theirs, stage = tmp_path / "theirs", tmp_path / "stage"
    for name in ("step-1", "checkpoints/step-1"):
        (theirs / name).mkdir(parents=True)
        (theirs / name / "w").write_text("x")
        files.seal(theirs / name)
    (stage / link).parent.mkdir(parents=True)
    (stage / link).symlink_to(theirs / "step-1" if "step" in link else theirs)
    before = tree(theirs)
    clear_checkpoints(stage)
    files.sweep(stage)
    assert tree(theirs) == before


def test_remains_of_a_crash(tmp_path):
    "A half-written folder is left alone while its writer lives, and removed when it was killed."
    child = os.fork()
    if not child:
        with files.aside(tmp_path / "result") as new:
            new.write_text("half")
            (tmp_path / "writing").touch()
            time.sleep(100)
    while not (tmp_path / "writing").exists():
        time.sleep(0.01)
    files.sweep(tmp_path)
    assert len(list(tmp_path.glob(".part-result-*/result"))) == 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    files.sweep(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["writing"]


# --- writing ----------------------------------------------------------------------------------


def test_a_foreign_folder_is_not_replaced(tmp_path):
    """`save_vlm` and its like on a folder that holds other things; their own, and an empty one,
    they replace."""

    def write(text):
        def into(new):
            new.mkdir(exist_ok=True)
            (new / "w").write_text(text)

        return into

    (tmp_path / "model").mkdir()
    save_folder(tmp_path / "model", write("one"))
    save_folder(tmp_path / "model", write("two"))
    assert (tmp_path / "model" / "w").read_text() == "two"
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="model.*has not made.*move it away"):
        save_folder(tmp_path / "model", write("three"))
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".part*"))


def test_foreign_weights_are_not_written_over(tmp_path):
    for name, write in (
        ("a.safetensors", lambda f: save_file({"x": torch.ones(1)}, f)),
        ("b.safetensors", lambda f: f.write_text("mine")),
    ):
        write(tmp_path / name)
        before = (tmp_path / name).read_bytes()
        with pytest.raises(UserError, match=f"{name}.*move it away"):
            save_tensors({"x": torch.zeros(1)}, tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    for value in (1.0, 2.0):
        save_tensors({"x": torch.tensor(value)}, tmp_path / "ours.safetensors")


@pytest.mark.parametrize(
    "text", ["epoch,loss\n1,2\n", '{"loss": 1}\n', '{"step": "a"}\n', "half a line"]
)
def test_a_foreign_metric_log(tmp_path, text):
    "A file called metrics.jsonl that is none of ours stays as it is."
    (tmp_path / "metrics.jsonl").write_text(text)
    if text.endswith("\n"):
        with pytest.raises(UserError, match="metrics.jsonl, line 1.*move the file away"):
            MetricLog(tmp_path)
        assert (tmp_path / "metrics.jsonl").read_text() == text


def test_a_file_that_the_record_knows(tmp_path):
    """`write_known` replaces what it wrote, also after a crash between record and file, and nothing
    else."""
    record, file = tmp_path / "run.json", tmp_path / "report.html"
    record.write_text('{"files": {}}')
    for data in (b"one", b"two"):
        files.write_known(record, file, data)
    known = json.loads(record.read_text())
    known["files"]["report.html"].append([5, "the next one, which never came"])
    record.write_text(json.dumps(known))
    files.write_known(record, file, b"three")
    assert len(json.loads(record.read_text())["files"]["report.html"]) == 1
    file.write_bytes(b"mine")
    with pytest.raises(UserError, match="report.html: was not written by this run; move it away"):
        files.write_known(record, file, b"four")
    assert file.read_bytes() == b"mine"


def test_a_crash_between_file_and_record(tmp_path, monkeypatch):
    "The record learns first: after a crash the new file is known, and so is the old one."
    record, file = tmp_path / "run.json", tmp_path / "report.html"
    record.write_text('{"files": {}}')
    original = files.write_bytes
    for when in ("before", "after"):
        files.write_known(record, file, b"old")

        def cut(path, data):
            if path == file and when == "before":
                raise KeyboardInterrupt
            original(path, data)
            if path == file:
                raise KeyboardInterrupt

        monkeypatch.setattr(files, "write_bytes", cut)
        with pytest.raises(KeyboardInterrupt):
            files.write_known(record, file, b"new")
        monkeypatch.undo()
        files.write_known(record, file, b"newer")
        assert file.read_bytes() == b"newer"


# --- commands ---------------------------------------------------------------------------------

THEIRS = {
    "thesis/checkpoints/model.bin": b"weeks",
    "sft/model.bin": b"mine",
    "config.yaml": b"hydra: mine\n",
    ".zsh_history.1": b"ls",
    "data/.part-1/x": b"half a download",
    "tower/config.json": b"{}",
    "record.json": b"[]",
}


@pytest.mark.parametrize(
    "argv",
    [
        ["run"],
        ["run", "--seeds", "2"],
        ["sft"],
        ["ppo", "--arm", "oracle"],
        ["evaluate"],
        ["pretrain"],
    ],
)
def test_commands_refuse_a_folder_that_is_no_run(capsys, tmp_path, argv):
    foreign = plant(tmp_path / "mine", THEIRS)
    line = refused(capsys, *argv, "--scale", "smoke", "--out", tmp_path / "mine")
    assert "mine" in line and "give a new" in line and tree(tmp_path / "mine") == foreign


@pytest.mark.parametrize("argv", [["run"], ["sft"]])
def test_here_is_no_exception(capsys, tmp_path, monkeypatch, argv):
    "`--out .` in a project."
    foreign = plant(tmp_path / "project", THEIRS)
    monkeypatch.chdir(tmp_path / "project")
    refused(capsys, *argv, "--scale", "smoke", "--out", ".")
    assert tree(tmp_path / "project") == foreign


@pytest.mark.parametrize("name", ["report.html", "report.json", "before_after.png"])
def test_a_foreign_report_is_not_written_over(capsys, smoke_run, tmp_path, name):
    "It was put into a run's folder before the run came to its end."
    folder = tmp_path / "run"
    made = shutil.ignore_patterns("evaluate", "report.*", "before_after.png")
    shutil.copytree(smoke_run, folder, ignore=made)
    (folder / name).write_text("mine")
    assert main(smoke("evaluate", folder)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"move {folder / name} away: this run has not written that" in last
    assert (folder / name).read_text() == "mine"
    (folder / name).rename(tmp_path / "elsewhere")
    assert main(smoke("evaluate", folder)) == 0, "the advice works"


def test_an_edited_configuration_is_not_written_over(capsys, smoke_run, tmp_path):
    """Settings are given by --scale and --set; who edits config.yaml learns that it is only a
    record."""
    shutil.copytree(smoke_run, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text() + "# mine\n")
    before = tree(tmp_path / "run")
    assert str(file) in refused(capsys, *smoke("sft", tmp_path / "run"))
    assert tree(tmp_path / "run") == before
