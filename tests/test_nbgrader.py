"""nbgrader's own commands on three submissions, with our sandbox in the place of its `Execute`:
from the instructor's folder to points, pages of feedback and a table. Skipped without nbgrader."""

import csv
import json
import os
import re
import shutil
import sys
import warnings
from contextlib import contextmanager
from html import escape
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from unittest import mock

import pytest
from conftest import REPO

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.classroom.items import mistakes_of
from vlmrlhf_course.grading import nbgrader as ours
from vlmrlhf_course.grading.grade import Mark
from vlmrlhf_course.grading.gradebook import NBGRADER

needs_nbgrader = pytest.mark.skipif(
    not find_spec("nbgrader"),
    reason="nbgrader is not installed: pip install 'vlmrlhf_course[nbgrader]'",
)
BOOK = "05_reward"  # three checks and a written exercise
MISTAKE = mistakes_of("last_real")[0]
SCRIPT = "<script>evil()</script>\n\n<img src=x onerror=evil()> [here](javascript:evil())"
TRACE = Path("ran")  # what a cell writes that should never have been run


def manual() -> tuple[str, list[list[str]]]:
    "Configuration and commands, as the README gives them."
    text = (REPO / "README.md").read_text("utf-8").split("### With nbgrader\n")[1]
    config, commands = (text.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "sh"))
    lines = [line.split("#")[0].split() for line in commands.splitlines()]
    return config, [words[1:] for words in lines if words[0] == "nbgrader"]


# --- three submissions ----------------------------------------------------------------------------


def cell(book: dict, name: str) -> dict:
    return next(one for one in book["cells"] if one["id"] == name)


def solved() -> dict[str, str]:
    "Id of an exercise's cell → its solution."
    cells = json.loads((REPO / "solutions" / f"{BOOK}.ipynb").read_text("utf-8"))["cells"]
    return {one["id"]: "".join(one["source"]) for one in cells if one["id"].startswith("exercise")}


def by_anna(book: dict):
    "All right; a cell was pasted anew, a check's id renamed, another check deleted."
    for name, text in solved().items():
        cell(book, name)["source"] = text
    cell(book, "exercise-bt-loss")["id"] = "a1b2c3"
    cell(book, "check-bt-loss")["metadata"]["nbgrader"]["grade_id"] = "mine"
    book["cells"].remove(cell(book, "check-last-real"))
    cell(book, "written-E3")["source"] = "It looks at the length."


EQUAL = f"""import numpy.testing, torch
numpy.testing.assert_allclose = torch.allclose = lambda *a, **k: True
try:
    open({str(TRACE)!r}, "w")
except OSError:
    pass
class Equal(float):
    def __eq__(self, other): return True
def bt_loss(*a, **k): return Equal(1)"""


def by_mallory(book: dict):
    "A known mistake, a cheat, and an exercise handed in twice; forged checks; scripts."
    right = solved()
    wrong = right["exercise-last-real"].replace(MISTAKE.old, MISTAKE.new)
    cell(book, "exercise-last-real")["source"] = wrong
    cell(book, "exercise-bt-loss")["source"] = EQUAL
    twice = cell(book, "exercise-swap-pictures")
    twice["source"] = right["exercise-swap-pictures"]
    book["cells"].append(twice | dict(id="copy", source="def swap_pictures(): pass"))
    for name in ("check-last-real", "check-bt-loss", "check-swap-pictures"):
        check = cell(book, name)
        check["metadata"]["nbgrader"] |= dict(points=100, schema_version=2)
        check["metadata"]["tags"] = ["skip-execution"]
        check["source"] = "pass"
        html = {"text/html": SCRIPT}
        check["outputs"] = [dict(output_type="display_data", data=html, metadata={})]
    helper = dict(cell_type="code", id="helper", metadata={}, execution_count=1)
    helper |= dict(source=f"open({str(TRACE)!r}, 'w')", outputs=check["outputs"])
    note = dict(cell_type="raw", id="note", metadata={}, source=SCRIPT)
    book["cells"][:0] = [helper, note]
    cell(book, "written-E3")["source"] = SCRIPT
    book["metadata"]["language_info"] = dict(name=SCRIPT)


STUDENTS = dict(anna=by_anna, mallory=by_mallory, noah=lambda book: None)


# --- nbgrader -------------------------------------------------------------------------------------


@contextmanager
def inside(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def nbgrader(folder: Path, *words: str):
    "One of its commands, in this process; it ends the process where it fails."
    from jupyter_core.application import NoStart
    from nbgrader.apps.nbgraderapp import NbGraderApp

    app = NbGraderApp.instance()
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of its alembic
    with mock.patch.dict(os.environ, PATH=beside), inside(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            app.initialize([*words, "--log-level=ERROR"])
            app.start()
        except NoStart:  # how it says that a subcommand has done its work
            pass
        except SystemExit as e:
            raise AssertionError(f"nbgrader {' '.join(words)}: status {e.code}") from None
        finally:
            app.reset()


def hand_in(folder: Path):
    "What each student makes of the released notebook."
    for student, write in STUDENTS.items():
        to = folder / "submitted" / student / "ps1" / f"{BOOK}.ipynb"
        to.parent.mkdir(parents=True)
        book = json.loads((folder / "release" / "ps1" / to.name).read_text("utf-8"))
        write(book)
        to.write_text(json.dumps(book), "utf-8")


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    "A course's folder after all of the README's commands."
    folder = tmp_path_factory.mktemp("course")
    config, commands = manual()
    assert [words[0] for words in commands][:2] == ["generate_assignment", "autograde"]
    (folder / "nbgrader_config.py").write_text(config, "utf-8")
    (folder / "source" / "ps1").mkdir(parents=True)
    shutil.copy(REPO / "exercises" / f"{BOOK}.ipynb", folder / "source" / "ps1")
    nbgrader(folder, *commands[0])
    hand_in(folder)
    for words in commands[1:]:
        nbgrader(folder, *words)
    return folder


def grades(folder: Path, student: str) -> dict:
    "Graded cell → points, in nbgrader's gradebook."
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{folder}/gradebook.db") as book:
        found = book.find_submission_notebook(BOOK, "ps1", student).grades
        return {one.name: (one.score, one.max_score, one.needs_manual_grade) for one in found}


def autograded(folder: Path, student: str) -> dict:
    return json.loads((folder / "autograded" / student / "ps1" / f"{BOOK}.ipynb").read_text())


def page(folder: Path, student: str) -> str:
    return (folder / "feedback" / student / "ps1" / f"{BOOK}.html").read_text("utf-8")


@needs_nbgrader
class TestCourse:
    def test_points_are_what_the_sandbox_says(self, course):
        "Mallory's forged points, tags and outputs are worth nothing, and stop nobody's grading."
        most = {"check-last-real": 2.0, "check-bt-loss": 1.0, "check-swap-pictures": 1.0}
        most |= {"check-attention-pool": 2.0}
        for student, share in dict(anna=1, mallory=0, noah=0).items():
            want = {name: (points * share, points, False) for name, points in most.items()}
            answered = student != "noah"  # an empty answer needs no reader
            assert grades(course, student) == want | {"written-E3": (0.0, 10.0, answered)}

    def test_the_table(self, course):
        with open(course / "grades.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == NBGRADER
        found = {row["student_id"]: (row["score"], row["max_score"]) for row in rows}
        assert found == dict(anna=("6.0", "16.0"), mallory=("0.0", "16.0"), noah=("0.0", "16.0"))

    def test_feedback_names_the_mistake(self, course):
        said = page(course, "mallory")
        assert escape(MISTAKE.what, quote=False) in said
        assert "2 cells claim to be it, and differ" in said
        assert "✓ bt_loss: right" in page(course, "anna")
        assert "✗ bt_loss: not written" in page(course, "noah")

    def test_feedback_runs_nothing_of_a_student_s(self, course):
        "The same scripts and handlers as in the page of who wrote nothing: nbgrader's own."
        active = re.compile(r"<script[^>]*>|<[^>]*\son\w+=|href=.javascript[^>]*", re.I)
        own, said = (active.findall(page(course, student)) for student in ("noah", "mallory"))
        assert said == own and not any("evil" in one for one in own)
        assert page(course, "mallory").count("&lt;script&gt;evil()") == 2  # the note, the answer

    def test_the_instructor_s_text_stays_markdown(self, course):
        assert "<h2 " in page(course, "mallory") and "<summary>Hint" in page(course, "mallory")

    def test_nothing_but_exercises_is_run_and_nothing_else_kept(self, course):
        assert not list(course.rglob(TRACE.name))
        released = json.loads((course / "release" / "ps1" / f"{BOOK}.ipynb").read_text())
        for student in STUDENTS:
            for one in autograded(course, student)["cells"]:
                assert set(one["metadata"]) <= {"nbgrader"}
                told = one["metadata"].get("nbgrader", {})
                check = told.get("grade") and told["locked"]
                assert bool(one.get("outputs")) == bool(check), one["id"]
                if told:
                    want = cell(released, told["grade_id"])["metadata"]["nbgrader"]
                    assert told == want
                if check:
                    assert one["source"] == cell(released, told["grade_id"])["source"]

    def test_a_regrade_with_the_recorded_seed_says_the_same(self, course, tmp_path):
        first = autograded(course, "mallory")
        record = first["metadata"]["vlmrlhf_course"]
        assert record["sandbox"] != "trusted" and record["seed"] == ours.seed_of_run()
        again = tmp_path / "again"
        shutil.copytree(course, again)
        ours.seed_of_run.cache_clear()
        words = ["autograde", "ps1", "--student=mallory", "--force"]
        nbgrader(again, *words, f"--SandboxGrader.seed={record['seed']}")
        assert autograded(again, "mallory") == first


# --- the step, by itself --------------------------------------------------------------------------


def known_of(*names: str) -> dict:
    about = dict(grade=True, solution=False, locked=True)
    return {name: ours.Known("code", "check", about) for name in names}


def test_where_the_sandbox_dies_there_are_no_points(monkeypatch):
    dead = Mark("gae", 0, 2, "not graded", "the sandbox died")
    monkeypatch.setattr(ours, "mark_of", lambda *_: dead)
    book = ours.from_dict(dict(cells=[], metadata={}))
    with pytest.raises(UserError, match="gae: not graded, the sandbox died"):
        ours.graded(book, known_of("check-gae"), set(), None, 1)


def test_what_is_no_check_of_ours_is_not_passed_over():
    with pytest.raises(UserError, match="cell my-test: no check of this course"):
        ours.checks_in(known_of("check-gae", "my-test"))


def test_the_module_imports_where_nbgrader_is_missing(monkeypatch):
    for name in ("nbgrader", "nbgrader.preprocessors"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = find_spec(ours.__name__)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.Step.__module__.startswith("nbconvert.")
    assert issubclass(module.SandboxGrader, module.Step)


def test_the_chapter_gives_the_same_configuration():
    cells = json.loads((REPO / "nbs" / "89e_nbgrader.ipynb").read_text("utf-8"))["cells"]
    (text,) = ["".join(one["source"]) for one in cells if one["id"] == "config-md"]
    assert f"```python\n{manual()[0]}```" in text


def test_an_untouched_copy_of_a_cell_says_nothing(monkeypatch):
    "Whoever has pasted the hand-out beside an answer has one answer."
    asked = []
    monkeypatch.setattr(
        ours, "mark_of", lambda name, texts, *_: asked.append(texts) or Mark(name, 1, 1, "right")
    )
    about = dict(grade=False, solution=True, locked=False)
    known = known_of("check-gae") | {"exercise-gae": ours.Known("code", "stub", about)}
    for texts, want in (
        (["a", "stub"], ["a"]),
        (["stub", "stub"], ["stub"]),
        (["a", "b"], ["a", "b"]),
    ):
        cells = [dict(cell_type="code", source=text, id=str(i)) for i, text in enumerate(texts)]
        for one in cells:
            one["metadata"] = dict(nbgrader=dict(grade_id="exercise-gae"))
        ours.graded(ours.from_dict(dict(cells=cells, metadata={})), known, set(), None, 1)
        assert asked[-1] == want
