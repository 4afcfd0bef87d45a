"""Random configurations, command lines, environments, records, pictures, foreign files and damage:
whatever `vlmrlhf` is given, it ends with a whole result, or with one line that says what is wrong.

    python tests/fuzz.py --minutes 60 --seed 0            # all kinds
    python tests/fuzz.py --seed 0 --case 17               # exactly one case again
    python tests/fuzz.py --seed 0 --case 17 --real        # the same in processes of its own
    python tests/fuzz.py --minutes 60 --seed 0 --record   # writes what it found to proofs.json

The kinds of cases stand in `fuzz_cases.py`. What is checked of each command:

- status 0 with every file of the result there and readable, or status 2 or 3 with a last line
  on stderr that begins `vlmrlhf: `; no traceback, no other status, no waiting without end;
- no code of data is executed, no foreign file is changed or removed, nothing is written
  outside `--out`, no process is left behind.

Processes are forked from one that has imported PyTorch (as in kill.py), which saves seconds."""
import argparse
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import date
from pathlib import Path

import fuzz_cases
import fuzz_damage
import fuzz_fork as fork
from PIL import Image
from safetensors.torch import load_file

SKIPPED_PARTS = ("tensorboard", "checkpoints")
READ_LOGS = ("ppo", "gold", "hacked")   # stages whose metrics the evaluation draws
# What a stage needs: the folders whose records must be whole where a verb ends well.
BEFORE = dict(sft=[], preferences=["sft"], reward=["sft", "preferences"],
              ppo=["sft", "preferences"], run=[], evaluate=[])
PARTS = ["sft", "preferences", "reward", "reward_small", "ppo", "ppo_rm", "gold", "hacked"]
SMALL = " ".join(fuzz_damage.SMALL)
KEPT = 2   # folders that are kept of violations that look the same


# --- what is on the disk ----------------------------------------------------------------------

def walk(folder: Path):
    "Every path below a folder, also of links, pipes and folders without a file."
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            try:
                yield from walk(Path(entry.path))
            except PermissionError:
                pass


def state(path: Path) -> tuple:
    "What must stay as it is where a path is not the run's."
    seen = path.lstat()
    kind = stat.S_IFMT(seen.st_mode)
    if stat.S_ISLNK(kind):
        return kind, os.readlink(path)
    if not stat.S_ISREG(kind):
        return kind, seen.st_mode
    try:
        return kind, seen.st_mode, hashlib.sha256(path.read_bytes()).hexdigest()
    except PermissionError:
        return kind, seen.st_mode, seen.st_size


def not_finite(text):
    raise ValueError(f"{text} is not finite")


def unreadable(path: Path, small_faults: bool) -> str | None:
    "What is wrong with a file of a result, or None. `small_faults`: records may be bad."
    if path.exists() and not path.is_file():
        return "no file"
    try:
        if path.suffix == ".safetensors":
            bad = [k for k, v in load_file(path).items() if not v.isfinite().all()]
            return f"{bad[0]} is not finite" if bad else None
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"), parse_constant=not_finite)
        elif path.suffix == ".jsonl" and not small_faults:
            for line in path.read_text(encoding="utf-8-sig").split("\n"):
                if line.strip():
                    json.loads(line)
        elif path.suffix == ".html":
            return None if "</" in path.read_text(encoding="utf-8") else "empty"
        elif path.suffix == ".png":
            Image.open(path).load()
    except Exception as e:   # of half a dozen libraries
        return f"{type(e).__name__}: {str(e)[:80]}"
    return None


# --- a case -----------------------------------------------------------------------------------

class Stop(Exception):
    "A case is over: a command of it was wrong, or nothing can follow it."


class Case:
    """A folder with a world `w` of its own (working directory, home, things elsewhere), what is
    the run's in it, and the commands that were given."""
    def __init__(self, number, kind, folder: Path, rng: random.Random, bases: Path, real=False):
        self.number, self.kind, self.folder, self.rng = number, kind, folder, rng
        self.bases, self.real = bases, real
        self.world, self.log = folder / "w", folder / "log"
        self.cwd, self.home, self.elsewhere = (self.world / n for n in ("cwd", "home", "elsewhere"))
        for place in (self.cwd, self.home, self.elsewhere, self.world / "tmp", self.log):
            place.mkdir(parents=True)
        self.canary, self.resealed = folder / "canary", False   # resealed: every seal was renewed
        self.own: set[Path] = set()
        self.notes, self.statuses, self.noise = [], Counter(), Counter()
        self.violation, self.given = None, ""
        program = self.world / "bin" / "gs"   # Pillow lets it interpret EPS files
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\nmkdir -p '{self.canary}'\nexit 1\n")
        program.chmod(0o755)

    def note(self, text):
        self.notes.append(str(text))

    def use(self, base: str, name="run") -> Path:
        "Copy a prepared run into the working directory."
        folder = self.cwd / name
        shutil.copytree(self.bases / base / "w" / "cwd" / "run", folder, symlinks=True)
        self.own |= {folder, *walk(folder)}
        self.note(f"base {base}")
        return folder

    def command(self, argv, env=None, limit=120., long=False, stop=None, room=2 ** 30) -> int:
        """Run `vlmrlhf` and check all that must hold. `long`: it may still be at work at the limit;
        `room`: no file may become larger than this many bytes, as on a disk that is nearly full."""
        argv, env = [str(a) for a in argv], dict(env or {})
        before = {p: None if p in self.own else state(p) for p in walk(self.world)}
        asked = self.log / "asked.json"
        asked.unlink(missing_ok=True)
        names = dict(HOME=self.home, TMPDIR=self.world / "tmp",
                     PATH=f"{self.world / 'bin'}:{os.environ['PATH']}")
        every = fork.ENV | {k: str(v) for k, v in names.items()} | env
        every = {k: v for k, v in every.items() if v is not None}
        start = fork.start_real if self.real else fork.start
        done = start(argv, every, self.cwd, self.log,
                     stop=stop, room=room).end(limit)
        args = json.loads(asked.read_text()) if asked.is_file() else {}
        self.given = f"{' '.join(f'{k}={shlex.quote(str(v))}' for k, v in env.items())} "
        self.given += "vlmrlhf " + shlex.join(argv).replace(SMALL, "$SMALL")
        self.given += f"   # with files of at most {room} bytes" * (room < 2 ** 30)
        self.statuses[done.how(long)] += 1
        for fault in self.faults(done, args, before, long):
            self.violation = fault
            raise Stop
        return done.status

    def faults(self, done, args, before, long):
        "What is wrong with a command that has ended: (signature, text)."
        yield from self.foreign(args, before)
        if self.canary.exists():
            yield "code of data was executed", ""
        if "Traceback (most recent call last)" in done.err:
            yield f"traceback {raised(done.err)}", done.err.strip().split("\n")[-1]
        for log in self.cwd.glob("**/stderr.log"):
            if log.is_file() and log.stat().st_mtime >= done.began:
                said = log.read_text(errors="replace")
                if "Traceback (most recent call last)" in said:
                    yield f"traceback in an arm {raised(said)}", said.strip().split("\n")[-1]
        if done.hung and not long:
            yield f"hang ({done.hung}) {place(done.stack)}", f"after {done.seconds:.0f} s"
        elif done.left:
            yield "a process was left behind", ""
        elif not done.hung and done.status not in (0, 2, 3):
            yield f"status {done.status}", done.err.strip().split("\n")[-1]
        lines = [line for line in done.err.split("\n") if line.strip()]
        if done.status in (2, 3):
            last = lines[-1] if lines else ""
            if not last.startswith("vlmrlhf: ") or not last[9:].strip():
                yield f"status {done.status}, last line {last[:30]!r}", last
            lines.pop()
        for line in lines:
            if not re.search(r"^vlmrlhf: |%\||it/s", line):
                self.noise[re.sub(r"[\d'/].*", "", line.strip())[:60]] += 1
        if done.status == 0 and args and not done.hung:
            yield from self.result(args, before)

    def foreign(self, args, before):
        "Foreign files changed or removed, and anything written outside the run's folder."
        after = {p: None if p in self.own else state(p) for p in walk(self.world)}
        for path, was in before.items():
            name = path.relative_to(self.world)
            if was is None or after.get(path) == was:
                continue
            how = "changed" if path in after else "removed"
            yield f"foreign file {how}: {shape(Path(*name.parts[-2:]))}", str(name)
        out = [self.cwd / o for o in args.get("outs", ())]
        out += [Path(os.path.realpath(o)) for o in out]
        free = [self.home / ".cache", self.home / ".config", self.world / "tmp", *out]
        for path in after.keys() - before.keys():
            if any(path.is_relative_to(f) or f.is_relative_to(path) for f in free):
                self.own.add(path)
                continue
            name = path.relative_to(self.world)
            yield f"written outside --out: {shape(name)}", str(name)

    def result(self, args, before):
        "What is missing or cannot be read where a command says that all went well."
        verb, base = args["verb"], self.cwd / args["outs"][-1]   # where `~` is the home
        if verb not in BEFORE:
            return
        folders = [base]
        if args.get("seeds", 1) > 1:
            folders = [base / f"seed-{args['seed'] + i}" for i in range(args["seeds"])]
            if fault := unreadable(base / "spread.json", False):
                yield "status 0, but spread.json", fault
        mine = dict(run=PARTS, evaluate=PARTS, ppo=[args.get("arm")]).get(verb, [verb])
        for folder in folders:
            expected = [folder / p / "done.json" for p in {*BEFORE[verb], *mine}]
            if verb in ("run", "evaluate"):
                expected += [folder / n for n in ("report.json", "report.html")]
            for part in mine:
                if (folder / part).is_dir():
                    expected += [p for p in walk(folder / part) if p.is_file()]
            for path in expected:
                unread = path.name == "metrics.jsonl" and not path.parent.name.startswith(READ_LOGS)
                unread |= path.name == "log.json"   # a mark, whatever it holds
                if before.get(path) or unread or {*path.parts} & {*SKIPPED_PARTS}:
                    continue   # a foreign file, or one that no later step reads
                loose = bool(args.get("skip_bad")) and path.parent.name == "preferences"
                if not self.resealed and (fault := unreadable(path, loose)):
                    yield f"status 0, but damaged: {shape(path.relative_to(folder))}", fault


def shape(path) -> str:
    "A path without what differs from case to case."
    return ascii(re.sub(r"\d{3,}", "N", str(path)))[1:-1][:80]


def place(text: str) -> str:
    "The innermost function of the package that a stack names."
    found = re.findall(r'vlmrlhf_course/(?:\w+/)?(\w+)\.py", line \d+,? in (\S+)', text)
    if not found:
        return ""
    return "at " + ".".join(found[0] if "most recent call first" in text else found[-1])


def raised(text: str) -> str:
    last = next((x for x in reversed(text.split("\n")) if re.match(r"[\w.]+(:|$)", x)), "")
    return f"{last.split(':')[0]} {place(text[text.rfind('Traceback'):])}"


# --- bases ------------------------------------------------------------------------------------

def make_bases(folder: Path):
    "Runs that stand at several points, made by the commands themselves."
    for name, (base, argv, stop) in fuzz_damage.BASES.items():
        case = Case(0, "base", folder / name, random.Random(0), folder)
        if base:
            case.use(base)
        for one in argv if isinstance(argv[0], list) else [argv]:
            try:
                case.command(one, long=bool(stop), stop=stop)
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
    kind = rng.choices([*kinds], [weight for weight, _ in kinds.values()])[0]
    kind = options.kind or kind
    folder = base / f"case-{number}"
    case = Case(number, kind, folder, rng, base / "bases", options.real)
    try:
        kinds[kind][1](case)
    except Stop:
        pass
    except Exception:
        case.violation = "the fuzzer itself", traceback.format_exc()
    return case


def work(job: int, options, base: Path):
    "The cases of one job, until time is up: kinds, statuses, violations."
    counts = ("kinds", "statuses", "violations", "noise")
    found = dict(first={}, **{name: Counter() for name in counts})
    end = time.time() + 60 * options.minutes
    number = job
    numbers = [options.case] if options.case is not None else None
    while numbers or numbers is None and time.time() < end:
        case = one_case(numbers.pop() if numbers else number, options, base)
        number += options.jobs
        found["kinds"][case.kind] += 1
        found["noise"] += case.noise
        for status, n in case.statuses.items():
            found["statuses"][f"{case.kind}: {status}"] += n
        if case.violation:
            name = f"{case.kind}: {case.violation[0]}"
            found["violations"][name] += 1
            found["first"].setdefault(name, case.number)
            print(f"VIOLATION case {case.number} [{name}] {ascii(case.violation[1])[-300:]}\n"
                  f"    {'; '.join(case.notes)}\n    {case.given}", flush=True)
            if found["violations"][name] <= KEPT or options.case is not None:
                print(f"    kept: {case.folder}", flush=True)
                continue
        elif options.case is not None:
            print(f"right: {'; '.join(case.notes)}\n    {case.given}\n    kept: {case.folder}")
            continue
        shutil.rmtree(case.folder, ignore_errors=True)
    return found


def proof(options, base: Path) -> dict:
    started = time.time()
    make_bases(base / "bases")
    print(f"bases after {time.time() - started:.0f} s; cases in {base}\n"
          f"SMALL='{SMALL}'", flush=True)
    jobs = [(j, options, base) for j in range(options.jobs)]
    if options.jobs == 1:
        parts = [work(*jobs[0])]
    else:
        with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
            parts = pool.starmap(work, jobs, chunksize=1)
    shutil.rmtree(base / "bases")
    total = {k: sum((p[k] for p in parts), Counter()) for k in parts[0] if k != "first"}
    first = {k: v for p in parts for k, v in p["first"].items()}
    by_status = {k: n for k, n in sorted(total["statuses"].items())}
    print("\nnoise on stderr (not counted):", *total["noise"].most_common(12), sep="\n  ")
    print("\nviolations:")
    for name, n in total["violations"].most_common():
        print(f"  {n:4}  {name}   (first: case {first[name]})")
    command = f"python tests/fuzz.py --minutes {options.minutes:g} --seed {options.seed}"
    return dict(date=str(date.today()), command=command + f" --jobs {options.jobs}",
                seed=options.seed, minutes=round((time.time() - started) / 60, 1),
                cases=total["kinds"].total(), commands=total["statuses"].total(),
                kinds=dict(sorted(total["kinds"].items())), statuses=by_status,
                violations=total["violations"].total())


def number(text):
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=number, default=5.)
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
    os.chdir(base)   # away from the repository's settings.ini
    record = proof(options, base)
    print(json.dumps(record, indent=1))
    if options.record:
        proofs = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(proofs | dict(fuzz=record), indent=1) + "\n")
    if not any(base.iterdir()):
        base.rmdir()
    sys.exit(1 if record["violations"] else 0)
