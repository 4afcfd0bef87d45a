"""Random configurations, command lines, environments, records, pictures, foreign files and damage:
whatever `vlmrlhf` is given, it ends with a whole result, or with one line that says what is wrong.

    python tests/fuzz.py --minutes 60 --seed 0            # all kinds
    python tests/fuzz.py --seed 0 --case 17               # exactly one case again
    python tests/fuzz.py --seed 0 --case 17 --real        # the same in processes of its own
    python tests/fuzz.py --minutes 60 --seed 0 --record   # writes what it found to proofs.json

The kinds of cases stand in `fuzz_cases.py`, odd values in `fuzz_values.yaml`. What is checked of
each command:

- status 0 with every file of the result there and readable, or status 2 or 3 with a last line
  on stderr that begins `vlmrlhf: `; no traceback, no other status, no waiting without end;
- no code of data is executed, no foreign file is changed or removed, nothing is written
  outside `--out`, no process is left behind.

Processes are forked from one that has imported PyTorch (as in kill.py), which saves seconds."""

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import date
from pathlib import Path

import fuzz_cases
import fuzz_commands
from fuzz_case import Case, Stop

KEPT = 2  # folders that are kept of violations that look the same


# --- bases ------------------------------------------------------------------------------------


def make_bases(folder: Path):
    "Runs that stand at several points, made by the commands themselves."
    for name, (base, argv, stop) in fuzz_commands.BASES.items():
        case = Case(0, "base", folder / name, random.Random(0), folder)
        if base:
            case.use(base)
        commands = argv if isinstance(argv[0], list) else [argv]
        for command in commands:
            try:
                case.command(command, long=bool(stop), stop=stop)
            except Stop:
                if stop and case.violation[0] == f"status {-signal.SIGKILL}":
                    continue
                raise SystemExit(f"base {name}: {case.given}\n{case.violation}") from None
        case.own.clear()


# --- the proof --------------------------------------------------------------------------------


def one_case(number, options, base: Path) -> Case:
    "Draw a case and carry it out."
    rng = random.Random(f"{options.seed}/{number}")
    kinds = fuzz_cases.KINDS
    (drawn,) = rng.choices([*kinds], [weight for weight, _ in kinds.values()])
    kind = options.kind or drawn
    folder = base / f"case-{number}"
    case = Case(number, kind, folder, rng, base / "bases", options.real)
    try:
        kinds[kind][1](case)
    except Stop:
        pass
    except Exception:
        case.violation = "the fuzzer itself", traceback.format_exc()
    return case


def numbers_of(job: int, options):
    "The numbers of a job's cases, until time is up."
    if options.case is not None:
        yield options.case
        return
    end = time.time() + 60 * options.minutes
    number = job
    while time.time() < end:
        yield number
        number += options.jobs


def tell(case: Case, name: str):
    "Print a violation, so that it can be repeated."
    print(f"VIOLATION case {case.number} [{name}] {ascii(case.violation[1])[-300:]}")
    print(f"    {'; '.join(case.notes)}\n    {case.given}", flush=True)


def work(job: int, options, base: Path):
    "The cases of one job: kinds, statuses, violations."
    counts = ("kinds", "statuses", "violations", "noise")
    found = dict(first={}, **{name: Counter() for name in counts})
    alone = options.case is not None
    for number in numbers_of(job, options):
        case = one_case(number, options, base)
        found["kinds"][case.kind] += 1
        found["noise"] += case.noise
        for status, n in case.statuses.items():
            found["statuses"][f"{case.kind}: {status}"] += n
        keep = alone
        if case.violation:
            name = f"{case.kind}: {case.violation[0]}"
            found["violations"][name] += 1
            found["first"].setdefault(name, number)
            tell(case, name)
            keep |= found["violations"][name] <= KEPT
        elif alone:
            print(f"right: {'; '.join(case.notes)}\n    {case.given}")
        if keep:
            print(f"    kept: {case.folder}", flush=True)
        else:
            shutil.rmtree(case.folder, ignore_errors=True)
    return found


def work_in_parallel(options, base: Path) -> list[dict]:
    "What every job has found."
    jobs = [(job, options, base) for job in range(options.jobs)]
    if options.jobs == 1:
        return [work(*jobs[0])]
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        return pool.starmap(work, jobs, chunksize=1)


def proof(options, base: Path) -> dict:
    "Make the bases, carry out the cases, print what was found. Returns the record for proofs.json."
    started = time.time()
    make_bases(base / "bases")
    print(f"bases after {time.time() - started:.0f} s; cases in {base}")
    print(f"SMALL='{' '.join(fuzz_commands.SMALL)}'", flush=True)
    parts = work_in_parallel(options, base)
    shutil.rmtree(base / "bases")
    total = {k: sum((p[k] for p in parts), Counter()) for k in parts[0] if k != "first"}
    first = {}
    for part in parts:
        first |= part["first"]
    print("\nnoise on stderr (not counted):", *total["noise"].most_common(12), sep="\n  ")
    print("\nviolations:")
    for name, n in total["violations"].most_common():
        print(f"  {n:4}  {name}   (first: case {first[name]})")
    command = f"python tests/fuzz.py --minutes {options.minutes:g} --seed {options.seed}"
    return dict(
        date=str(date.today()),
        command=command + f" --jobs {options.jobs}",
        seed=options.seed,
        minutes=round((time.time() - started) / 60, 1),
        cases=total["kinds"].total(),
        commands=total["statuses"].total(),
        kinds=dict(sorted(total["kinds"].items())),
        statuses=dict(sorted(total["statuses"].items())),
        violations=total["violations"].total(),
    )


def minutes(text):
    "A finite number."
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--minutes", type=minutes, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--case", type=int, help="this case alone; its folder is kept")
    parser.add_argument("--kind", choices=[*fuzz_cases.KINDS], help="cases of this kind only")
    parser.add_argument("--real", action="store_true", help="no forks: start Python each time")
    parser.add_argument("--record", action="store_true", help="write the result to proofs.json")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    file = Path(__file__).with_name("proofs.json").resolve()
    base = Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.chdir(base)  # away from the repository's settings.ini
    record = proof(options, base)
    print(json.dumps(record, indent=1))
    if options.record:
        proofs = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(proofs | dict(fuzz=record), indent=1) + "\n")
    if not any(base.iterdir()):
        base.rmdir()
    sys.exit(1 if record["violations"] else 0)


if __name__ == "__main__":
    main()
