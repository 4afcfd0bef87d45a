"""A learner's code drives the run: the library's solutions give the very weights, a sabotaged one
stops the run or changes them, and the record says whose code it was."""

import json
import re
import sys

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file
from small_models import SMALL, small_ppo

from vlmrlhf_course.base import settings
from vlmrlhf_course.base.runs import Run
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.classroom.check import CheckFailed, check
from vlmrlhf_course.classroom.editions import STUB, stub
from vlmrlhf_course.classroom.register import asked_in, asks, check_file, definition
from vlmrlhf_course.classroom.using import Borrowed, Swapped, borrowed_from, using
from vlmrlhf_course.cli import calls_in, main
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.pipeline import with_source
from vlmrlhf_course.rl.loop import train
from vlmrlhf_course.world.llava import build_model, build_processor

SOLVED = REPO / "solutions"
# What PPO runs of the exercises, and the notebook that solves it.
DRIVES = {"gae": "07_advantages", "whiten": "07_advantages", "ppo_policy_loss": "10_ppo"}


def solution(name) -> str:
    asked = {one: sources for one, _, sources in asked_in(SOLVED / f"{DRIVES[name]}.ipynb")}
    return definition(name, asked[name])


def notebook(folder, name, source):
    path = folder / f"{name}.ipynb"
    cells = [dict(cell_type="code", source=s) for s in (source, f'check("{name}", {name})')]
    path.write_text(json.dumps(dict(cells=cells)))
    return path


def trained(folder, *notebooks):
    "Weights after two short iterations of PPO, with the functions of these notebooks."
    torch.manual_seed(0)
    vlm = VLM(build_model(SMALL), build_processor(SMALL))
    with using(*notebooks) as swapped:
        ppo, scores, pool = small_ppo(vlm)
        train(ppo, scores, pool, pool[:2], folder)
    return torch.cat([p.detach().flatten() for p in ppo.actor.trained()]), swapped


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain") / "ppo")[0]


@pytest.fixture(autouse=True)
def own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMRLHF_PROGRESS", str(tmp_path / "progress.json"))


@pytest.mark.parametrize("name", DRIVES)
def test_the_solution_gives_the_very_weights(name, plain, tmp_path):
    weights, swapped = trained(tmp_path / "ppo", notebook(tmp_path, name, solution(name)))
    assert torch.equal(weights, plain) and swapped.calls[name] > 0


@pytest.mark.parametrize("name", DRIVES)
def test_sabotage_is_noticed_by_the_check_and_by_the_run(name, plain, tmp_path):
    "A raise stops both; a value that is a little wrong fails the check, and trains something else."
    raising = stub(solution(name), [name]).replace(STUB, "raise ZeroDivisionError")
    raises = notebook(tmp_path, name, raising)
    with pytest.raises(ZeroDivisionError):
        trained(tmp_path / "a", raises)
    with pytest.raises(CheckFailed, match="ZeroDivisionError"):
        check(name, borrowed_from(raises)[0].function)
    source = solution(name).replace(f"def {name}(", f"def right_{name}(", 1)
    wrong = f"""def {name}(*args, **kwargs):
    found = right_{name}(*args, **kwargs)
    return tuple(1.1 * x + 0.01 for x in found) if isinstance(found, tuple) else 1.1 * found"""
    slightly = notebook(tmp_path, name, f"{source}\n\n\n{wrong}")
    with pytest.raises(CheckFailed):
        check(name, borrowed_from(slightly)[0].function)
    weights, swapped = trained(tmp_path / "b", slightly)
    assert not torch.equal(weights, plain) and swapped.calls[name] > 0


def test_a_whole_stage_by_the_command(smoke_run, tmp_path, capsys):
    "The same tensors as without, a record of whose code ran; and results of two codes do not mix."
    common = ["--arm", "ppo_rm", "--scale", "smoke", "--out", str(tmp_path / "run")]
    assert main(["ppo", *common, "--impl", str(SOLVED / "07_advantages.ipynb")]) == 0
    assert re.search(r"^gae +[1-9]", capsys.readouterr().out, re.M)
    own, other = (
        load_file(f / "ppo_rm" / "actor.safetensors") for f in (tmp_path / "run", smoke_run)
    )
    assert own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)
    record = json.loads((tmp_path / "run" / "ppo_rm" / "done.json").read_text())
    calls = {row["name"]: row["calls"] for row in record["impl"]}
    assert calls["gae"] > 0 and calls["whiten"] > 0 and calls.keys() >= {"token_rewards"}
    assert main(["ppo", *common]) == 2
    assert "VLMRLHF_IMPL_CODE" in capsys.readouterr().err


def test_nothing_written_is_said(tmp_path, capsys):
    stubs = REPO / "exercises" / "07_advantages.ipynb"
    out = ["--scale", "smoke", "--out", str(tmp_path / "run")]
    assert main(["sft", *out, "--impl", str(stubs)]) == 2
    assert "none of the exercises there is written yet" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="no notebook there"), using(tmp_path / "nothing"):
        pass


def members_of(cls) -> dict:
    "Without what `copy` notes down for itself."
    return {name: x for name, x in vars(cls).items() if name != "__slotnames__"}


@pytest.mark.parametrize(
    "path", sorted((REPO / "exercises").glob("[0-9]*.ipynb")), ids=lambda p: p.stem
)
def test_reading_a_notebook_changes_nothing_of_the_library(path):
    "Its cells hold methods, too: of the library's own classes, which must stay as they are."
    if not asks(path):
        return  # the index, and a chapter whose exercises are all written
    modules = [m for n, m in sys.modules.items() if n.split(".")[0] == "vlmrlhf_course" and m]
    members = [value for module in modules for value in vars(module).values()]
    classes = {value for value in members if isinstance(value, type)}
    before = {c: members_of(c) for c in classes}
    check_file(path)
    for cls, was in before.items():
        assert members_of(cls) == was, cls


def test_what_fails_its_check_is_used_and_said_in_one_line(tmp_path, capsys):
    "In the table and in the record, too; and the stubs beside it are one line more."
    source = solution("gae").replace("gamma * after", "after")
    folder = tmp_path / "mine"
    folder.mkdir()
    notebook(folder, "gae", source)
    notebook(folder, "whiten", solution("whiten"))
    for name in ("ppo_policy_loss", "value_loss"):
        notebook(folder, name, f"def {name}(*given):\n    {STUB}")
    settings._noticed.clear()  # each line is said once, and another test may have had it
    with using(folder) as swapped:
        table, record = swapped.table(), swapped.record()["impl"]
    said = [line for line in capsys.readouterr().err.splitlines() if "vlmrlhf" in line]
    assert len(said) == 2 and "used: 2 functions (ppo_policy_loss, value_loss)" in said[0]
    assert "used all the same: 1 function (gae); " in said[1]
    assert [line[:3] for line in table.splitlines() if "fails its check" in line] == ["gae"]
    assert {row["name"]: row["passes"] for row in record} == dict(gae=False, whiten=True)
    with using(folder, fails=["whiten"]) as swapped:  # another process has looked
        assert [one.fails for one in swapped.borrowed] == [False, True]
    assert capsys.readouterr().err == ""


def test_an_exercise_written_twice_is_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        notebook(tmp_path / folder, "gae", solution("gae"))
    with pytest.raises(UserError, match="gae is written in .*/a/gae.* and .*/b/gae"):
        with using(tmp_path / "a", tmp_path / "b"):
            pass


def test_a_record_counts_the_calls_since_the_last_one():
    swapped = Swapped([Borrowed("gae", "mine.ipynb", "abc", None)])
    found = []
    for calls in (3, 0, 2):
        swapped.calls["gae"] += calls
        found.append(swapped.record()["impl"])
    row = dict(name="gae", file="mine.ipynb", digest="abc", passes=True)
    assert found == [[row | dict(calls=calls)] for calls in (3, 0, 2)]
    assert swapped.calls["gae"] == 5


def test_calls_of_all_processes_are_counted_by_the_records(tmp_path, monkeypatch):
    "Arms are processes of their own: what this one has seen says nothing of them."
    run = Run(tmp_path / "run", "smoke")
    impl = {"ppo_rm": 6, "oracle": 4, "evaluate": 1}
    monkeypatch.setattr(
        Run, "info", lambda self, stage: dict(impl=[dict(name="gae", calls=impl.get(stage, 0))])
    )
    assert calls_in(with_source(run)) == dict(gae=11)
