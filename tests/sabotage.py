"""Sabotage each exercise in turn: does a run stop, and does it come out otherwise?

    python tests/sabotage.py               # all of them; writes what it found to proofs.json
    python tests/sabotage.py --only gae    # those whose name holds `gae`; writes nothing

One smoke run is made, and every call of an exercise's function in the library counted. Stages
before the first that calls it cannot change. So that one alone is made again, in a fork, from what
stands before it: with a function that raises, and with one that is subtly wrong, its exercise's
first known mistake. Where that makes no difference at this scale (padding that is masked again, a
temperature of 1), what the right function gives, times 1.1; then its other mistakes, and times -1,
until a file is another one. The record names these, and what only ever stopped the run. Files are
compared to the byte, but for logs and TensorBoard's."""

import argparse
import contextlib
import hashlib
import importlib
import inspect
import io
import json
import multiprocessing
import os
import pkgutil
import shutil
import symtable
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from pathlib import Path
from typing import Callable, NamedTuple

import quiet  # noqa: F401  (before PyTorch and its friends are imported)
import torch
from stage_table import LAST

from vlmrlhf_course.base.folders import RUN
from vlmrlhf_course.base.runs import Run
from vlmrlhf_course.base.stages import before
from vlmrlhf_course.classroom.editions import STUB, stub
from vlmrlhf_course.classroom.items import exercise_of, mistakes_of, with_mistake
from vlmrlhf_course.classroom.register import asked_in, definition, notebooks_at
from vlmrlhf_course.classroom.using import Borrowed, Swapped, replace_everywhere
from vlmrlhf_course.pipeline import obtain, with_source

TESTS = Path(__file__).resolve().parent
SOLVED = TESTS.parent / "solutions"
RAISE, TENTH, SIGN = "a raise", "a value times 1.1", "a value times -1"
FACTORS = {TENTH: 1.1, SIGN: -1}  # ways to be wrong; the others are a mistake's `what`
SAME, CHANGED = "the same files", "other files"  # what comes of it; else the name of an error
LATER = dict(pick="grpo")  # where the first stage cannot tell: it wants all rows, in their order
ROOMS = ("base", "data", "model", "train", "rl", "report", "world")  # where a run's code stands


class Sabotaged(Exception):
    "Nothing in the library expects it."


# --- in a notebook --------------------------------------------------------------------------------


class Asked(NamedTuple):
    "An exercise of a notebook."

    book: str
    name: str
    function: str
    cell: str  # the source of the cell that defines the function


def asked() -> list[Asked]:
    "Every exercise that is checked, as `solutions/` solves it."
    found = []
    for book in notebooks_at(SOLVED):
        for name, function, sources in asked_in(book):
            found.append(Asked(book.name, name, function, definition(function, sources)))
    return found


def raising(one: Asked) -> str:
    "Its cell, with a function that raises."
    return stub(one.cell, [one.function]).replace(STUB, "raise ZeroDivisionError")


def mistaken(one: Asked) -> str:
    "Its cell, with the first known mistake whose snippet occurs there once."
    mistake = next(m for m in mistakes_of(one.name) if one.cell.count(m.old) == 1)
    return one.cell.replace(mistake.old, mistake.new)


# --- in the library -------------------------------------------------------------------------------


def scaled(x, by: float | int):
    "A result times `by`, wherever it holds a number; counts stay as they are, or whole."
    if isinstance(x, torch.Tensor):
        whole = isinstance(by, int) and x.dtype != torch.bool
        return x * by if whole or x.is_floating_point() else x
    if isinstance(x, float) or (type(x) is int and isinstance(by, int)):
        return x * by
    if isinstance(x, dict):
        return {key: scaled(value, by) for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        parts = [scaled(value, by) for value in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x


def sabotaged(name: str, how: str) -> Callable:
    "The function of an exercise as it must not be."
    item = exercise_of(name)
    right = item.function
    if how in FACTORS:
        return lambda *args, **kwargs: scaled(right(*args, **kwargs), FACTORS[how])
    if how != RAISE:
        return with_mistake(item, next(m for m in mistakes_of(name) if m.what == how))

    def stop(*args, **kwargs):
        raise Sabotaged(name)

    return stop


def uses(scope: symtable.SymbolTable, names: set[str]) -> bool:
    "Does a function or a class load one of these globals?"
    own = [s for s in scope.get_symbols() if s.get_name() in names and s.is_referenced()]
    return any(s.is_global() for s in own) or any(uses(c, names) for c in scope.get_children())


def modules() -> list:
    "Of all rooms that a run's code stands in."
    found = []
    for room in ROOMS:
        package = importlib.import_module(f"vlmrlhf_course.{room}")
        walk = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        found += [importlib.import_module(module.name) for module in walk]
    return found


def callers(name: str) -> list[str]:
    "Functions and classes of the library that call an exercise's function."
    function, found = exercise_of(name).function, []
    for module in modules():
        names = {key for key, value in vars(module).items() if value is function}
        if names:
            top = symtable.symtable(inspect.getsource(module), module.__name__, "exec")
            place = module.__name__.removeprefix("vlmrlhf_course.")
            calling = [s.get_name() for s in top.get_children() if uses(s, names)]
            found += [f"{place}.{own}" for own in calling if own != function.__name__]
    return found


# --- in a run -------------------------------------------------------------------------------------


def in_fork(work: Callable, *args):
    "What `work` gives or raises in a process of its own, which has everything imported already."
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, mp_context=fork) as process:
        return process.submit(unheard, work, *args).result()


def unheard(work: Callable, *args):
    with contextlib.redirect_stderr(io.StringIO()):
        return work(*args)


def smoke_run(folder: Path) -> Run:
    return with_source(Run(folder, "smoke"))


def counted_run(folder: Path, names: list[str]) -> dict[str, str]:
    "Make all stages of a run. Exercise → the first of them that calls its function."
    library = [Borrowed(name, "", "", exercise_of(name).function) for name in names]
    swapped, run, first = Swapped(library), smoke_run(folder), {}
    for one in library:
        replace_everywhere(one.function, swapped.counted(one))
    for stage in (*before(run, LAST), LAST):
        obtain(run, stage)
        first = dict.fromkeys(+swapped.calls, stage) | first
    return first


def digests(run: Run, stages: list[str]) -> dict[str, str]:
    "Every file of these stages, but for logs and TensorBoard's; after the last one, of the run."
    root = run.folder
    places = [root] if LAST in stages else [root / stage for stage in stages]
    found = [f for place in places for f in place.rglob("*")]
    kept = [f for f in found if "tensorboard" not in f.parts and f.suffix != ".log" and f.is_file()]
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in kept}


def made_again(plain: Path, stage: str, name: str = "", how: str = "") -> list[str]:
    """A stage, made from what stands before it in a run, perhaps with a sabotaged exercise: names
    of the files that differ, or that only one of the two has."""
    with tempfile.TemporaryDirectory(dir=plain.parent) as folder:
        run = smoke_run(Path(folder))
        stages = [*before(run, stage), stage]
        for earlier in stages[:-1]:
            shutil.copytree(plain / earlier, run.path(earlier))
        shutil.copy(plain / RUN, run.folder)
        if name:
            replace_everywhere(exercise_of(name).function, sabotaged(name, how))
        obtain(run, stage)
        was, now = digests(smoke_run(plain), stages), digests(run, stages)
    return sorted(file for file in {*was, *now} if was.get(file) != now.get(file))


# --- the proof ------------------------------------------------------------------------------------


def outcome(plain: Path, stage: str, name: str, how: str) -> str:
    "What comes of a sabotage: the name of the error that stops the run, or which files it gives."
    sabotaged(name, how)  # a mistake that cannot be made must not look like a run that stops
    try:
        other = in_fork(made_again, plain, stage, name, how)
    except (OSError, BrokenProcessPool):
        raise  # the proof's own, not the run's
    except Exception as e:
        return type(e).__name__
    return CHANGED if other else SAME


def noticed(plain: Path, stage: str, name: str) -> tuple[str, str]:
    "The first way to be wrong that gives other files, or else one that stops the run."
    first, *others = [mistake.what for mistake in mistakes_of(name)]
    found = {}
    for how in (first, TENTH, *others, SIGN):
        found[how] = outcome(plain, stage, name, how)
        if found[how] == CHANGED:
            return how, CHANGED
    return next(((how, x) for how, x in found.items() if x != SAME), ("", SAME))


def sabotage_of(plain: Path, stage: str, name: str) -> dict:
    "A row of the record."
    raised = outcome(plain, stage, name, RAISE)
    how, then = noticed(plain, LATER.get(name, stage), name)
    row = dict(stage=stage, stopped=raised == Sabotaged.__name__, how=how, then=then)
    print(f"{name}: {row}", flush=True)
    return row


def proof(base: Path, names: list[str], only: str) -> dict[str, dict]:
    "A run, each of its stages once more, and then each exercise that it calls. Exercise → row."
    plain = base / "plain"
    first = in_fork(counted_run, plain, names)
    for stage in dict.fromkeys(first.values()):
        other = in_fork(made_again, plain, stage)
        if other:
            raise SystemExit(f"{stage}, made again without sabotage, differs: {other}")
    chosen = [name for name in names if name in first and only in name]
    return {name: sabotage_of(plain, first[name], name) for name in chosen}


def record_of(names: list[str], rows: dict[str, dict]) -> dict:
    "What proofs.json keeps."
    firsts = {name: mistakes_of(name)[0].what for name in rows}
    changed = {name: row["how"] for name, row in rows.items() if row["then"] == CHANGED}
    others = {n: how for n, how in changed.items() if how not in (firsts[n], *FACTORS)}
    stops = {n: [r["how"], r["then"]] for n, r in rows.items() if r["then"] not in (CHANGED, SAME)}
    return dict(
        date=str(date.today()),
        command="python tests/sabotage.py",
        exercises=len(names),
        called={name: row["stage"] for name, row in rows.items()},
        stopped_by_a_raise=sum(row["stopped"] for row in rows.values()),
        changed=len(changed),
        changed_by_the_first_mistake=sum(how == firsts[n] for n, how in changed.items()),
        changed_by_a_value_times_1_1=[n for n, how in changed.items() if how == TENTH],
        changed_by_a_value_times_minus_1=[n for n, how in changed.items() if how == SIGN],
        changed_by_another_mistake=others,
        changed_in_a_later_stage={n: stage for n, stage in LATER.items() if n in changed},
        only_stopped=stops,
        unmoved=[name for name, row in rows.items() if row["then"] == SAME],
        never_called={
            name: callers(name) or ["chapter only"] for name in names if name not in rows
        },
        cpu_seconds=round(sum(os.times()[:4])),  # of this process and its forks
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="exercises whose name holds this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [one.name for one in asked()]
    with tempfile.TemporaryDirectory() as d:
        os.chdir(d)  # away from the repository's settings.ini
        rows = proof(Path(d), names, args.only)
    os.chdir(TESTS)
    if not args.only:
        record = record_of(names, rows)
        file = TESTS / "proofs.json"
        proofs = json.loads(file.read_text("utf-8")) | dict(sabotage=record)
        file.write_text(json.dumps(proofs, indent=1) + "\n", "utf-8")
        print(json.dumps(record, indent=1))
    missed = [n for n, row in rows.items() if not row["stopped"] or row["then"] == SAME]
    raise SystemExit(f"not noticed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
