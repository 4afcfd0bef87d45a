"""Does an exercise's check notice a mistake that nobody thought of? All generic changes of each
reference (`generic_rules.py`: an operator, a constant, a condition, an argument, a statement …)
are tried on its check, which must refuse each of them, for every seed.

    python tests/generic_mutants.py                # all exercises, twenty seeds
    python tests/generic_mutants.py --only whiten  # those whose name holds this
    python tests/generic_mutants.py --seeds 1      # a learner's own seed alone

Printed is, for each exercise, how many changes there are and how many are refused; then those
that pass, line before → line after, and for how many seeds they do; it exits 1 if there is one.
A change that no input can show is equivalent: it stands in `equivalent_exercise_mutants.yaml`
with its reason. Seed 0 is what a learner gets; a grader draws another one, so a change must be
refused for all.

Changes run in a forked child with a limit on its computing time: one that does not end is
refused, for a learner would notice."""

import argparse
import ast
import inspect
import json
import os
import resource
import signal
import sys
import warnings
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
import yaml
from generic_rules import texts

from vlmrlhf_course.classroom import check
from vlmrlhf_course.classroom.items import EXERCISES, Exercise, fill_register, function_from

TESTS = Path(__file__).resolve().parent
REVIEWED = TESTS / "equivalent_exercise_mutants.yaml"
SECONDS = 3  # of computing, for one change and one seed
MEMORY = 4 << 30  # bytes that a child may take beyond what it was born with


class Change(NamedTuple):
    name: str  # line before → line after
    text: str  # the whole function


def changes_of(function: Callable) -> list[Change]:
    "Every generic change of a function."
    tree = ast.parse(inspect.getsource(function)).body[0]
    before, known, found = ast.unparse(tree), {}, []
    for text in texts(tree):
        name = difference(before, text)
        known[name] = known.get(name, 0) + 1
        again = f" ({known[name]})" if known[name] > 1 else ""  # an equal line further below
        found.append(Change(name + again, text))
    return found


def difference(before: str, after: str) -> str:
    "The lines that differ, on one line; of a long one what differs and a few words around it."
    old, new = apart(before.splitlines(), after.splitlines())
    if len(old) == len(new) == 1 and len(old[0]) > 60:
        old, new = apart(old[0].split(), new[0].split(), 3)
    gone, come = (" ".join(part.strip() for part in parts) for parts in (old, new))
    return f"{gone} → {come}"


def apart(old: list[str], new: list[str], around: int = 0) -> tuple[list[str], list[str]]:
    "Two lists without what they begin and end with alike, but for so many `around` it."
    pairs = list(zip(old, new))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    back = list(zip(old[:first:-1], new[:first:-1]))
    last = next((i for i, (a, b) in enumerate(back) if a != b), len(back))
    start, end = max(0, first - around), max(0, last - around)
    return old[start : len(old) - end], new[start : len(new) - end]


def refused(item: Exercise, change: Change, seed: int) -> bool:
    "Does the check notice?"
    try:
        function = function_from(change.text, item.function.__name__, item.module)
    except Exception:
        return True  # it cannot even be defined
    return check.first_failure(item, function, seed) is not None


def tried(item: Exercise, changes: list[Change], seeds: list[int]) -> list[list[int]]:
    "For each change the seeds for which it passes."
    passed = []
    while len(passed) < len(
        changes
    ):  # a child goes on behind the change that its forerunner died of
        answers = list(child(item, changes[len(passed) :], seeds))
        passed += answers
        if len(passed) < len(changes):
            passed.append([])
    return passed


def child(item: Exercise, changes: list[Change], seeds: list[int]) -> Iterator[list[int]]:
    "Fork, and give the answers of the child as they come."
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        try:
            answer(item, changes, seeds, os.fdopen(write, "w"))
        finally:
            os._exit(0)
    os.close(write)
    try:
        with os.fdopen(read) as lines:
            yield from map(json.loads, lines)
    finally:
        os.waitpid(pid, 0)


def answer(item: Exercise, changes: list[Change], seeds: list[int], out):
    "In the child: a line for each change."
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    limit_memory()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the child
    for change in changes:
        passing = []
        for seed in seeds:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            if not refused(item, change, seed):
                passing.append(seed)
        print(json.dumps(passing), file=out, flush=True)


def limit_memory():
    "Of this process, where it can be told how much it has."
    own = Path("/proc/self/statm")
    if own.is_file():
        most = int(own.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def reviewed() -> dict[str, dict[str, str]]:
    "Exercise → change that no input can show → why."
    rows = yaml.safe_load(REVIEWED.read_text("utf-8")) if REVIEWED.is_file() else None
    return {
        name: {change: group["why"] for group in groups for change in group["changes"]}
        for name, groups in (rows or {}).items()
    }


class Found(NamedTuple):
    "What came of an exercise."

    name: str
    changes: int
    refused: int
    equivalent: int
    survivors: dict[str, list[int]]  # change → seeds for which it passes, though it is not listed
    stale: list[str]  # listed, but refused, or no change at all


def review(item: Exercise, seeds: list[int]) -> Found:
    "Try all changes of an exercise, and compare with what is known to be equivalent."
    changes = changes_of(item.function)
    passing = {c.name: s for c, s in zip(changes, tried(item, changes, seeds)) if s}
    known = reviewed().get(item.name, {})
    survivors = {name: s for name, s in passing.items() if name not in known}
    stale = [name for name in known if len(passing.get(name, [])) < len(seeds)]
    count = len(changes) - len(passing)
    return Found(item.name, len(changes), count, len(passing) - len(survivors), survivors, stale)


def report(found: Found, seeds: list[int]):
    print(
        f"{found.name:22} {found.changes:4} changes, {found.refused:4} refused, "
        f"{found.equivalent:3} equivalent, {len(found.survivors):3} pass",
        flush=True,
    )
    for name, passing in found.survivors.items():
        print(f"    passes {len(passing):2} of {len(seeds)} seeds: {name}")
    for name in found.stale:
        print(f"    listed as equivalent, and is not: {name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", metavar="NAME", help="exercises whose name holds this"
    )
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    fill_register()
    seeds, every = list(range(args.seeds)), []
    for name in sorted(n for n in EXERCISES if args.only in n):
        every.append(review(EXERCISES[name], seeds))
        report(every[-1], seeds)
    sums = [sum(getattr(x, key) for x in every) for key in ("changes", "refused", "equivalent")]
    left = sum(len(x.survivors) + len(x.stale) for x in every)
    print("{} changes: {} refused, {} equivalent; {} to look at".format(*sums, left))
    sys.exit(bool(left))


if __name__ == "__main__":
    main()
