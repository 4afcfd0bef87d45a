"""Do our tests notice? Each mutant breaks one line of the library the way people do, and the tests
named beside it must fail.

    python tests/mutants.py               # all of them; exits 1 if any survives; see proofs.json
    python tests/mutants.py --only gae    # those whose name holds `gae`
    python tests/mutants.py --jobs 2
    python tests/mutants.py --random 100 --seed 0   # such as nobody chose: see random_mutants.py

The mutants stand in `mutations/`, a file for each room of the package: where, what it does, the
old snippet and the new one. The snippet must occur once in that function or class, in whatever
module it stands. Each mutant runs in a fork of one warm process, on a copy of the package in a
temporary folder; the sources are never touched."""

import argparse
import ast
import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import NamedTuple

import yaml
from forks import PACKAGE, TESTS, Job, file_and_choice, run_all, warm_up
from random_mutants import run_random

TABLES = TESTS / "mutations"


class Mutant(NamedTuple):
    where: str  # function, class or class.method
    what: str
    old: str
    new: str
    tests: str  # arguments of pytest

    @property
    def name(self):
        return f"{self.where}: {self.what}"


def table() -> list[Mutant]:
    "The mutants of every room, from `mutations/`."
    found = []
    for room in sorted(TABLES.glob("*.yaml")):
        for row in yaml.safe_load(room.read_text("utf-8")):
            found += [Mutant(row["where"], **m, tests=row["tests"]) for m in row["mutants"]]
    return found


MUTANTS = table()


@functools.cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def segment(text: str, where: str) -> tuple[int, int]:
    "First and last line (from 0, exclusive) of `name` or `class.name` in a module's text."
    node = parsed(text)
    for name in where.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == name)
    return node.lineno - 1, node.end_lineno


@functools.cache
def modules() -> dict[Path, str]:
    "The texts of the package's modules."
    return {f: f.read_text("utf-8") for f in PACKAGE.rglob("*.py") if f.name[0] != "_"}


def found(m: Mutant) -> tuple[Path, int, int]:
    "Module and lines of what a mutant is about, wherever it has moved."
    places = []
    for file, text in modules().items():
        try:
            places.append((file, *segment(text, m.where)))
        except StopIteration:
            continue
    if len(places) != 1:
        raise LookupError(f"{m.where}: in {len(places)} modules, not in one")
    return places[0]


def mutate(m: Mutant) -> str:
    "The module with the mutant in it. Raises LookupError unless the snippet occurs exactly once."
    file, start, end = found(m)
    lines = modules()[file].splitlines(keepends=True)
    code = "".join(lines[start:end])
    if code.count(m.old) != 1:
        raise LookupError(f"{m.name}: {m.old!r} occurs {code.count(m.old)} times there, not once")
    return "".join(lines[:start]) + code.replace(m.old, m.new) + "".join(lines[end:])


def job(m: Mutant) -> Job:
    module, _, _ = found(m)
    return Job(m.tests, m.name, module.relative_to(PACKAGE), mutate(m))


def check_snippets(chosen: list[Mutant], only: str):
    "Exit unless there are mutants and each fits its source."
    bad = []
    for m in chosen:
        try:
            mutate(m)
        except LookupError as e:
            print(e)
            bad.append(m)
    if bad:
        sys.exit(f"{len(bad)} snippets do not match: renew them")
    if not chosen:
        sys.exit(f"no mutant {only!r}")


def check_health(chosen: list[Mutant], jobs: int):
    "Exit unless everything that is used passes without any mutant."
    used = {}
    for m in chosen:
        file, expression = file_and_choice(m.tests)
        used.setdefault(file, {})[f"({expression})"] = None

    def healthy(job, what, by, seconds, log):
        if what != "SURVIVED":
            sys.exit(f"{job.tests}: fails without any mutant\n{log[-3000:]}")

    work = [Job(f"{file} -k {' or '.join(ks)}") for file, ks in used.items()]
    run_all(work, jobs, healthy)


def share_smoke_run(chosen: list[Mutant]):
    """Make the smoke run that tests look at once, by the library as it is, for all mutants: each
    would make its own, a minute long. (Random mutants do: theirs is the mutant's.)"""
    files = {file_and_choice(m.tests)[0] for m in chosen}
    texts = [(TESTS / name).read_text("utf-8") for file in files for name in file.split()]
    if not any("smoke_run" in text for text in texts):
        return
    folder = tempfile.mkdtemp(prefix="smoke-")
    atexit.register(shutil.rmtree, folder, True)
    # In a process of its own: what is imported here would be there in every fork.
    code = "import sys, pathlib, conftest; conftest.make_smoke_run(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, folder], cwd=TESTS, check=True)
    os.environ["VLMRLHF_SMOKE_RUN"] = f"{folder}/run"


def record(counts: dict, key: str = "mutants"):
    "Write what was found to tests/proofs.json."
    file = TESTS / "proofs.json"
    proofs = json.loads(file.read_text()) if file.is_file() else {}
    proofs[key] = counts | dict(date=str(date.today()))
    file.write_text(json.dumps(proofs, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="NAME", help="mutants whose name holds this")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N that nobody chose")
    parser.add_argument("--seed", type=int, default=0, help="of --random")
    args = parser.parse_args()
    if args.random:
        found = run_random(args.random, args.seed, args.jobs)
        record(found, "random_mutants")
        sys.exit(found["noticed"] < 0.95 * args.random)
    chosen = [m for m in MUTANTS if args.only in m.name]
    check_snippets(chosen, args.only)
    share_smoke_run(chosen)
    warm_up()
    check_health(chosen, args.jobs)
    counts = dict(killed=0, SURVIVED=0, ERROR=0)

    def report(job, what, by, seconds, log):
        counts[what] += 1
        print(f"{what:8} {seconds:5.1f} s  {job.name:70.70} {by[:80]}", flush=True)
        if what == "ERROR":
            print(log[-1500:])

    run_all([job(m) for m in chosen], args.jobs, report)
    print(", ".join(f"{n} {what}" for what, n in counts.items()))
    if not args.only:
        record(counts)
    sys.exit(counts["killed"] < len(chosen))


if __name__ == "__main__":
    main()
