"""The hostile corpus: submissions that try to cheat or to break the grader, as data in `hostile/`.

A kind has a name, a sentence on what it tries, a cell (or whole notebooks, or what a function of
`hostile_files.py` makes), and what must come of it: no points and a status, or full marks."""

import inspect
import json
import os
import resource
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import hostile_files
import yaml

from vlmrlhf_course.classroom.items import exercise_of
from vlmrlhf_course.grading.mail import cell_of, coding

REPO = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "hostile"
LAST = "🧠 honest, last"  # graded after all others
SECONDS = 2  # that an exercise may take here
SEND = """
import json, os, struct
def is_open(handle):
    try:
        return bool(os.fstat(handle))
    except OSError:
        return False
def send(tree, lengths=(), body=b"", sizes=None):
    head = json.dumps([list(lengths), tree]).encode()
    data = struct.pack(">II", *(sizes or (len(head), len(body)))) + head + body
    for handle in filter(is_open, range(3, 256)):
        rest = data
        while rest:
            rest = rest[os.write(handle, rest) :]
def outcome(value, gradients=None, leaks=(), error="", changed=()):
    return {"tuple": [value, gradients, {"tuple": list(leaks)}, error, {"tuple": list(changed)}]}
"""


@dataclass
class Kind:
    "One way to be hostile, or honest."

    name: str
    tries: str
    file: str = ""  # of the corpus
    exercise: str = "masked_mean"
    student: str = ""
    cell: str | None = None
    cell_from: str = ""  # a function of `hostile_files` that writes the cell
    cells: list = field(default_factory=list)
    raw: str | None = None  # the notebook's bytes
    make: str = ""  # a function of `hostile_files` that makes files and folders
    status: str | list = ""
    why: str = ""
    trouble: str = ""
    full: bool = False
    absent: bool = False  # no submission at all
    limit: str = ""  # known, and accepted

    @property
    def who(self) -> str:
        return self.student or self.name


def kinds(*files: str) -> list[Kind]:
    "Those of some files of the corpus, or all."
    paths = [p for p in sorted(FOLDER.glob("*.yaml")) if not files or p.stem in files]
    return [Kind(**row, file=p.stem) for p in paths for row in yaml.safe_load(p.read_text("utf-8"))]


def reference(name: str) -> str:
    return inspect.getsource(exercise_of(name).function)


class Post(NamedTuple):
    "Where submissions are, and what else there is."

    root: Path

    @property
    def mail(self) -> Path:
        return self.root / "mail"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def text(self, kind: Kind, source: str) -> str:
        "A cell with its words filled in."
        words = dict(MAIL=self.mail, OUT=self.out, REPO=REPO, SITE=Path(yaml.__file__).parents[1])
        words |= {"RIGHT": reference(kind.exercise).rstrip("\n"), "SEND": SEND}
        words |= {"$id": cell_of(kind.exercise)}
        for word, meaning in words.items():
            source = source.replace(word, str(meaning))
        return source

    def filled(self, kind: Kind, value):
        "Cells with their words filled in."
        if isinstance(value, str):
            return self.text(kind, value)
        if isinstance(value, list):
            return [self.filled(kind, x) for x in value]
        if isinstance(value, dict):
            return {key: self.filled(kind, x) for key, x in value.items()}
        return value

    def put(self, kind: Kind):
        "Hand a kind in."
        if kind.make:
            getattr(hostile_files, kind.make)(self, kind)
            return
        book = self.mail / kind.who / "1.ipynb"
        book.parent.mkdir(parents=True, exist_ok=True)
        if kind.raw is not None:
            book.write_bytes(self.text(kind, kind.raw).encode())
            return
        source = kind.cell
        if kind.cell_from:
            source = getattr(hostile_files, kind.cell_from)(kind)
        cells = kind.cells or [hostile_files.code("$id", source)]
        book.write_text(json.dumps(hostile_files.notebook(self.filled(kind, cells))), "utf-8")


def lay_out(root: Path, some: list[Kind]) -> Post:
    "A folder of submissions, and an honest one that comes last."
    post = Post(root)
    for kind in [*some, Kind(LAST, "honest", cell="RIGHT", full=True)]:
        post.put(kind)
    (root / "work").mkdir()
    (root / "work" / "settings.ini").write_text(f"[exercises]\nseconds = {SECONDS}\n")
    (root / "tmp").mkdir()
    return post


class Graded(NamedTuple):
    "What the command did."

    status: int
    said: str
    seconds: float
    megabytes: int  # of the largest process
    results: dict  # student → results


def graded(post: Post, sandbox: str = "auto", chapters: list[str] | None = None) -> Graded:
    "`vlmrlhf grade`, as an instructor runs it."
    names = {kind.exercise for kind in kinds()}
    chapters = chapters or sorted({coding()[name] for name in names})
    command = [sys.executable, "-m", "vlmrlhf_course.cli", "grade", str(post.mail)]
    command += ["--out", str(post.out), "--seed", "7", "--sandbox", sandbox, "--jobs", "2"]
    path = f"{REPO}:{os.environ.get('PYTHONPATH', '')}"
    env = os.environ | dict(PYTHONPATH=path, TMPDIR=str(post.root / "tmp"), OMP_NUM_THREADS="1")
    start, where = time.monotonic(), post.root / "work"
    done = subprocess.run(
        [*command, "--chapters", *chapters], cwd=where, env=env, capture_output=True, timeout=600
    )
    seconds = time.monotonic() - start
    results, record = {}, post.out / "grades.json"
    for result in json.loads(record.read_text())["results"] if record.is_file() else []:
        results.setdefault(result["student"], []).append(result)
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    return Graded(done.returncode, (done.stdout + done.stderr).decode(), seconds, most, results)


def item_in(kind: Kind, results: dict) -> dict:
    "What came of a kind."
    (result,) = results[kind.who]
    return next(item for item in result["items"] if item["exercise"] == kind.exercise)


def faults(kind: Kind, results: dict) -> list[str]:
    "What came otherwise than it must."
    if kind.absent:
        return [f"{kind.name}: graded"] if kind.who in results else []
    if len(results.get(kind.who, ())) != 1:
        return [f"{kind.name}: {len(results.get(kind.who, ()))} results"]
    (result,), item = results[kind.who], item_in(kind, results)
    total = sum(other["points"] for other in result["items"])
    wanted = [kind.status] if isinstance(kind.status, str) else kind.status
    troubles = " ".join(result["troubles"])
    checks = {
        f"{total} points": total == item["points"] == (item["most"] if kind.full else 0),
        f"status {item['status']}": wanted == [""] or item["status"] in wanted,
        f"why {item['why'][:150]!r}": kind.why in item["why"],
        f"trouble {troubles!r}": kind.trouble in troubles,
        "a leak": "LEAK" not in item["why"] + item["case"],
        "not graded": kind.full or item["status"] != "not graded",
        "a long text": len(item["why"]) + len(item["case"]) < 5000,
    }
    return [f"{kind.name}: {what}" for what, good in checks.items() if not good]


def listing(root: Path) -> dict[str, tuple]:
    "What there is, and when it was changed."
    found = {}
    for path in [root, *root.rglob("*")]:
        about = path.lstat()
        kept = about.st_size if stat.S_ISREG(about.st_mode) else 0
        found[str(path)] = (about.st_mtime_ns, about.st_mode, kept)
    return found


def processes(root: Path) -> list[str]:
    "Command lines that name a folder."
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if os.fsencode(root) in line and path.parent.name != str(os.getpid()):
            found.append(line.decode(errors="replace"))
    return found
