"""The grader against those who want to cheat it: the corpus of `hostile/` through `vlmrlhf grade`.

No undeserved point, no process left, nothing written elsewhere, and the next one is graded."""

import csv
import inspect
import itertools
import json
import os
import re
import subprocess
import time
from pathlib import Path

import hostile_corpus
import hostile_files
import hostile_table
import pytest
from conftest import REPO
from hostile_corpus import LAST, Kind, faults, graded, kinds, lay_out, listing, processes

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.classroom.items import exercise_of, mistakes_of
from vlmrlhf_course.grading import mail
from vlmrlhf_course.grading.gradebook import grade_all, inert, table
from vlmrlhf_course.grading.mail import asked_of, cell_of, coding, line, submissions_in
from vlmrlhf_course.grading.sandbox import BACKENDS, choose, usable
from vlmrlhf_course.grading.similar import pieces_of

ALL = kinds()
QUICK = ("out_of_it", "library", "forged", "honest")  # files of kinds that end by themselves
WALL_CLOCK = 120  # seconds
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def state_of_the_repository() -> str:
    command = ["git", "-C", str(REPO), "status", "--porcelain", "--ignored=no"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def in_tmp() -> set[str]:
    "Names that the corpus tries to write."
    places = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))
    names = ("huge", "x", "pwned", "answers")
    tried = [place / name for place, name in itertools.product(places, names)]
    return {str(path) for path in tried if path.exists()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "All kinds, graded once, by whatever wall holds here; and what there was before."
    post = lay_out(tmp_path_factory.mktemp("hostile"), ALL)
    before = (listing(post.mail), listing(post.root / "work"), state_of_the_repository(), in_tmp())
    done = graded(post)
    after = (listing(post.mail), listing(post.root / "work"), state_of_the_repository(), in_tmp())
    print(f"{len(ALL)} kinds: {done.seconds:.0f} s, {done.megabytes} MB")
    return post, done, before, after


# --- the corpus -----------------------------------------------------------------------------------


def test_there_are_many_kinds():
    assert len(ALL) >= 75 and sum(kind.full for kind in ALL) >= 8
    assert len({kind.name for kind in ALL}) == len({kind.who for kind in ALL}) == len(ALL)
    limits = [kind.name for kind in ALL if kind.limit]
    assert limits == [kind.name for kind in ALL if kind.full and "honest" not in kind.name]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_each_gets_what_it_deserves(run, kind):
    assert not faults(kind, run[1].results)


def test_the_batch_ends_and_the_last_is_right(run):
    post, done, *_ = run
    assert done.status == 0 and "grade: done" in done.said
    assert not faults(Kind(LAST, "", full=True), done.results)
    assert LAST in list(done.results)[-2:]
    busy = max(1, os.getloadavg()[0] / (os.cpu_count() or 1))  # others work on this machine, too
    assert done.seconds < WALL_CLOCK * busy, f"{done.seconds:.0f} s"
    assert done.megabytes < 2500, "neither a child nor the grader itself takes more"


def test_nothing_is_left_and_nothing_written_elsewhere(run):
    post, done, before, after = run
    assert before == after
    assert not list((post.root / "tmp").iterdir()) and not processes(post.root)
    known = {"mail", "out", "work", "tmp", "secret"}
    assert {path.name for path in post.root.iterdir()} <= known
    made = {path.name for path in post.out.iterdir()}
    assert made <= {"grades.json", "results", "feedback"} | {
        f"{name}.csv" for name in ("grades", "items", "written", "similar")
    }


def test_what_is_said_and_written_does_nothing(run):
    "No code for a terminal, no tag, no formula; and every file can be read again."
    post, done, *_ = run
    assert not CONTROL.search(done.said)
    for page in (post.out / "feedback").iterdir():
        text = page.read_text("utf-8")
        assert not re.search("<(script|img|iframe)", text), page
        assert not CONTROL.search(text) and len(text) < 200_000
    for name in ("grades", "items", "written", "similar"):
        with open(post.out / f"{name}.csv", newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [c for c in cells if c.lstrip()[:1] in tuple("=+@＝＋－＠")], name
        assert not [c for c in cells if c.startswith("-") and not c[1:2].isdigit()], name


def test_each_has_a_row_of_its_own(run):
    post, done, *_ = run
    rows = list(csv.DictReader(open(post.out / "grades.csv", encoding="utf-8")))
    names = [(row["student_id"], row["assignment"]) for row in rows]
    assert len(names) == len(set(names)) == len(list((post.out / "results").iterdir()))
    assert len(rows) == len(list((post.out / "feedback").iterdir()))
    answered = {"written, with a script", "written, endless", "written, half a character"}
    assert len({row["max_score"] for row in rows if row["student_id"] not in answered}) == 1


def test_a_second_run_reads_what_the_first_has_written(run):
    post, done, *_ = run
    again = graded(post)
    assert again.status == 0 and again.results == done.results and again.seconds < done.seconds


def test_landlock_alone_holds_too(tmp_path):
    why = usable(next(b for b in BACKENDS if b.name == "landlock"))
    if why:
        pytest.skip(why)
    some = [kind for kind in ALL if kind.file in QUICK]
    post = lay_out(tmp_path, some)
    before = listing(post.mail)
    done = graded(post, "landlock")
    found = [
        fault for kind in [*some, Kind(LAST, "", full=True)] for fault in faults(kind, done.results)
    ]
    assert done.status == 0 and not found
    assert listing(post.mail) == before and not processes(tmp_path)


def test_the_readme_counts_them():
    assert f"{len(ALL)} submissions, most of which try to cheat" in (REPO / "README.md").read_text()


def test_the_table_has_a_row_for_each_kind():
    text = hostile_table.FILE.read_text("utf-8")
    missing = [kind.name for kind in ALL if f"\n| {hostile_table.plain(kind.name)} |" not in text]
    assert not missing, "python tests/hostile_table.py"


# --- what needs a folder of its own ---------------------------------------------------------------


def hand_in(path: Path, *names: str, source: str = "pass"):
    "A notebook with a cell for each of these exercises."
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [hostile_files.code(cell_of(name), source) for name in names]
    path.write_text(json.dumps(hostile_files.notebook(cells)), "utf-8")


def test_one_submission_decides_nothing_for_others(tmp_path):
    "Neither what is asked of them, nor that there is nothing to ask."
    for name in ("anna", "bert", "cleo", "dora"):
        hand_in(tmp_path / name / "1.ipynb", "gae")
    hand_in(tmp_path / "mallory" / "1.ipynb", *coding())
    hand_in(tmp_path / "mallory" / "odd" / "1.ipynb")
    asked = asked_of(submissions_in(tmp_path), None)
    assert {coding()[name] for name in asked["exercises"]} == {"07_advantages"}
    assert asked["odd"] == []


def test_a_link_called_submitted_leads_nowhere(tmp_path):
    hand_in(tmp_path / "elsewhere" / "eve" / "1.ipynb", "gae")
    hand_in(tmp_path / "mail" / "anna" / "1.ipynb", "gae")
    (tmp_path / "mail" / "submitted").symlink_to(tmp_path / "elsewhere")
    assert [one.student for one in submissions_in(tmp_path / "mail")] == ["anna"]


def test_settings_do_not_come_by_mail(tmp_path, monkeypatch):
    hand_in(tmp_path / "mail" / "anna" / "1.ipynb", "gae")
    (tmp_path / "mail" / "settings.ini").write_text("[points]\ngae = 999999\n")
    monkeypatch.chdir(tmp_path / "mail")
    with pytest.raises(UserError, match="among the submissions"):
        grade_all(tmp_path / "mail", tmp_path / "out", choose())


def test_a_folder_that_cannot_be_read_is_left_out(tmp_path, monkeypatch, capsys):
    "Root can read all, so that the refusal is made up."
    hand_in(tmp_path / "anna" / "1.ipynb", "gae")
    hand_in(tmp_path / "closed" / "1.ipynb", "gae")
    real = Path.iterdir

    def iterdir(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    found = {one.student: one.notebooks for one in submissions_in(tmp_path)}
    assert found["closed"] == () and len(found["anna"]) == 1
    assert "closed: Permission denied, left out" in capsys.readouterr().err


def test_tables_and_lines():
    for text in ("=1", " =1", "\t1", "+1", "-1", "@a", "＝1", "\n=1"):
        assert inert(text) == f"'{text}"
    assert inert("a=1") == "a=1" and line("a\x1b[2J\nb\ud800") == "a\\x1b[2J\\nb\\ud800"
    assert len(inert("a" * 10**6)) < 60_000
    rows = list(csv.DictReader(table(["a"], [dict(a="\ud800\x00\r\n;,\"'\n=1")]).splitlines(True)))
    assert rows == [dict(a="\\ud800\\x00\n;,\"'\n=1")]


def test_similarity_is_not_for_giants():
    start = time.monotonic()
    assert not pieces_of("x = [" + "1," * 50_000 + "]")
    assert not pieces_of("x = 1" + "+1" * 9_000) and not pieces_of("-" * 19_000 + "1")
    assert time.monotonic() - start < 5


def test_safe_names_differ_and_fit():
    names = ["a", "A", "a.", "a_", "..", "%", "", "\udce9", "é", "e\u0301", "🦊" * 62, "🦊" * 63]
    assert len({mail.safe(name) for name in names}) == len(names)
    assert max(len(mail.safe(name)) for name in names) < 100


# --- how long it takes ----------------------------------------------------------------------------


def test_thirty_submissions_of_a_chapter(tmp_path):
    "A whole chapter: right, with a known mistake, and not written, ten each."
    names = [name for name, chapter in coding().items() if chapter == "07_advantages"]
    for number in range(30):
        cells = []
        for name in names:
            text = inspect.getsource(exercise_of(name).function) + f"\n# {number}"
            mistake = mistakes_of(name)[number % len(mistakes_of(name))]
            wrong = text.replace(mistake.old, mistake.new)
            function = exercise_of(name).function.__name__
            stub = f"def {function}(*a, **k):\n    raise NotImplementedError  # {number}"
            cells.append(hostile_files.code(cell_of(name), (text, wrong, stub)[number % 3]))
        book = tmp_path / "mail" / f"student {number:02}" / "07_advantages.ipynb"
        book.parent.mkdir(parents=True)
        book.write_text(json.dumps(hostile_files.notebook(cells)))
    for name in ("work", "tmp"):
        (tmp_path / name).mkdir()
    done = graded(hostile_corpus.Post(tmp_path), chapters=["07_advantages"])
    statuses = [{i["status"] for i in r["items"]} for (r,) in done.results.values()]
    assert statuses == [{"right"}, {"wrong"}, {"not written"}] * 10, done.said
    print(f"30 submissions of {len(names)} exercises: {done.seconds:.0f} s")
    assert done.seconds < WALL_CLOCK, f"{done.seconds:.0f} s"
