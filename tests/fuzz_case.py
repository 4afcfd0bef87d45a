"""One case of fuzz.py: a world of its own, the commands given in it, and what must hold of each."""

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import stat
from collections import Counter
from pathlib import Path

import fuzz_commands
import fuzz_fork as fork
from PIL import Image
from safetensors.torch import load_file

SKIPPED_PARTS = ("tensorboard", "checkpoints")
SMALL = " ".join(fuzz_commands.SMALL)


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
    "For json: NaN and infinity are no values of a result."
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
    except Exception as e:  # of half a dozen libraries
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
        self.canary, self.resealed = folder / "canary", False  # resealed: every seal was renewed
        self.own: set[Path] = set()
        self.notes, self.statuses, self.noise = [], Counter(), Counter()
        self.violation, self.given = None, ""
        program = self.world / "bin" / "gs"  # Pillow lets it interpret EPS files
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\nmkdir -p '{self.canary}'\nexit 1\n")
        program.chmod(0o755)

    def note(self, text):
        "What a reader of a violation should know of the case."
        self.notes.append(str(text))

    def use(self, base: str, name="run") -> Path:
        "Copy a prepared run into the working directory."
        folder = self.cwd / name
        shutil.copytree(self.bases / base / "w" / "cwd" / "run", folder, symlinks=True)
        self.own |= {folder, *walk(folder)}
        self.note(f"base {base}")
        return folder

    def command(self, argv, env=None, limit=120.0, long=False, stop=None, room=2**30) -> int:
        """Run `vlmrlhf` and check all that must hold. `long`: it may still be at work at the limit;
        `room`: no file may become larger than this many bytes, as on a disk that is nearly full."""
        argv, env = [str(a) for a in argv], dict(env or {})
        before = self.seen()
        asked = self.log / "asked.json"
        asked.unlink(missing_ok=True)
        every = fork.ENV | dict(HOME=str(self.home), TMPDIR=str(self.world / "tmp"))
        every |= dict(PATH=f"{self.world / 'bin'}:{os.environ['PATH']}") | env
        every = {k: v for k, v in every.items() if v is not None}
        start = fork.start_real if self.real else fork.start
        done = start(argv, every, self.cwd, self.log, stop=stop, room=room).end(limit)
        args = json.loads(asked.read_text()) if asked.is_file() else {}
        variables = [f"{k}={shlex.quote(str(v))}" for k, v in env.items()]
        words = shlex.join(argv).replace(SMALL, "$SMALL")
        self.given = " ".join([*variables, "vlmrlhf", words])
        if room < 2**30:
            self.given += f"   # with files of at most {room} bytes"
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

    def seen(self) -> dict:
        "Every path of the world, and how it stands; None for what is the run's."
        return {p: None if p in self.own else state(p) for p in walk(self.world)}

    def foreign(self, args, before):
        "Foreign files changed or removed, and anything written outside the run's folder."
        after = self.seen()
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
        base = self.cwd / args["outs"][-1]  # where `~` is the home
        if "own" not in args:
            return  # no verb of a stage
        folders = [base]
        if args.get("seeds", 1) > 1:
            folders = [base / f"seed-{args['seed'] + i}" for i in range(args["seeds"])]
            fault = unreadable(base / "spread.json", False)
            if fault:
                yield "status 0, but spread.json", fault
        if self.resealed:
            return
        for folder in folders:
            for path in expected(folder, args["own"], args["needed"]):
                if before.get(path) or unread(path, args["drawn"]):
                    continue  # a foreign file, or one that no later step reads
                loose = bool(args.get("skip_bad")) and path.parent.name == "preferences"
                fault = unreadable(path, loose)
                if fault:
                    yield f"status 0, but damaged: {shape(path.relative_to(folder))}", fault


def expected(folder: Path, own: list[str], needed: list[str]) -> list[Path]:
    "The files that must be there, whole, after a command has ended well: see `stages_of`."
    found = [folder / part / "done.json" for part in {*needed, *own}]
    if fork.LAST in own:
        found += [folder / "report.json", folder / "report.html"]
    for part in own:
        if (folder / part).is_dir():
            found += [p for p in walk(folder / part) if p.is_file()]
    return found


def unread(path: Path, drawn: list[str]) -> bool:
    "Is this a file that no later step reads? The report draws the metrics of the stages `drawn`."
    if path.name == "metrics.jsonl" and path.parent.name not in drawn:
        return True
    if path.name == "log.json":  # a mark, whatever it holds
        return True
    return bool({*path.parts} & {*SKIPPED_PARTS})


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
    "The kind of error that a traceback ends with, and where in the package it was raised."
    last = next((x for x in reversed(text.split("\n")) if re.match(r"[\w.]+(:|$)", x)), "")
    return f"{last.split(':')[0]} {place(text[text.rfind('Traceback') :])}"
