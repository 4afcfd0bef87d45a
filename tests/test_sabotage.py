"""A sabotaged exercise goes red, and no other: in every notebook that asks for checks; and that
runs notice, too, was measured for the exercises that there are now."""

import ast
import json
from pathlib import Path

import pytest
from conftest import REPO
from sabotage import LAST, asked, callers, mistaken, raising, smoke_run

from vlmrlhf_course.base.stages import before
from vlmrlhf_course.classroom.check import first_failure
from vlmrlhf_course.classroom.items import exercise_of, function_from, mistakes_of
from vlmrlhf_course.classroom.needs import names_needed

ASKED = asked()


@pytest.fixture(autouse=True)
def own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMRLHF_PROGRESS", str(tmp_path / "progress.json"))


def red(one) -> bool:
    item = exercise_of(one.name)
    return first_failure(item, function_from(one.cell, one.function, item.module)) is not None


def calling(one, others) -> set[str]:
    "Exercises of the same cell that call this one, by themselves or by way of another function."
    body = ast.parse(one.cell).body
    beside = [other for other in others if other.cell == one.cell and other != one]
    return {o.name for o in beside if one.function in names_needed(body, [o.function])}


@pytest.mark.parametrize("how", [raising, mistaken], ids=["a raise", "a mistake"])
@pytest.mark.parametrize("one", ASKED, ids=[one.name for one in ASKED])
def test_exactly_this_exercise_goes_red(one, how, tmp_path, capfd):
    "And those of its own cell that call it. Nothing is printed, nothing noted down."
    beside = [other for other in ASKED if other.book == one.book]
    broken = how(one)
    assert broken != one.cell
    now = [o._replace(cell=broken) if o.cell == one.cell else o for o in beside]
    assert {o.name for o in now if red(o)} == {one.name} | calling(one, beside)
    assert capfd.readouterr() == ("", "") and not list(Path(tmp_path).iterdir())


# --- what `python tests/sabotage.py` has found ----------------------------------------------------

RECORD = json.loads((REPO / "tests" / "proofs.json").read_text("utf-8"))["sabotage"]


def test_the_record_is_about_the_exercises_that_are_there():
    "Each is called by a stage of a smoke run, or it says who else calls it."
    called, never = RECORD["called"], RECORD["never_called"]
    assert sorted([*called, *never]) == sorted(one.name for one in ASKED), "tests/sabotage.py"
    run = smoke_run(Path("nowhere"))
    assert {*called.values()} <= {*before(run, LAST), LAST}
    assert never == {name: callers(name) or ["chapter only"] for name in never}


def test_runs_noticed_every_sabotage():
    "A raise stopped them; a wrong value gave other files, or at least stopped them, too."
    called, stops = RECORD["called"], RECORD["only_stopped"]
    assert RECORD["stopped_by_a_raise"] == len(called) and RECORD["unmoved"] == []
    factors = RECORD["changed_by_a_value_times_1_1"] + RECORD["changed_by_a_value_times_minus_1"]
    others = RECORD["changed_by_another_mistake"]
    changed = RECORD["changed_by_the_first_mistake"] + len(factors) + len(others)
    assert changed == RECORD["changed"] == len(called) - len(stops)
    for name, what in [*others.items(), *((name, what) for name, (what, _) in stops.items())]:
        assert what in [mistake.what for mistake in mistakes_of(name)]
