"""`exercises/` and `solutions/` are what the chapters give: solutions pass their checks, stubs do
not, and no line of a solution stands in a hand-out."""

import ast
import json
import subprocess
import sys

import nbformat
import pytest
from conftest import REPO

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.classroom.course import load_course, statements
from vlmrlhf_course.classroom.editions import (
    Chapter,
    build,
    code_cell,
    edition,
    editions,
    leaks,
    notebook_text,
    text_cell,
)
from vlmrlhf_course.classroom.items import EXERCISES, equivalents_of, mistakes_of
from vlmrlhf_course.classroom.needs import names_needed
from vlmrlhf_course.classroom.points import nbgraded
from vlmrlhf_course.classroom.register import check_file

CHAPTERS = [Chapter(path) for path in sorted((REPO / "nbs").glob("*.ipynb"))]
CHAPTERS = [chapter for chapter in CHAPTERS if chapter.exercises()]
EDITED = [chapter.path.name for chapter in CHAPTERS]
CHECKED = [chapter.path.name for chapter in CHAPTERS if chapter.marked]
STATED = [(chapter, s) for chapter in CHAPTERS for s in chapter.statements.values()]
WRITTEN = {s.number: (chapter, s) for chapter, s in STATED if s.points}


@pytest.fixture(autouse=True)
def own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMRLHF_PROGRESS", str(tmp_path / "progress.json"))


def test_the_editions_are_built_again_to_the_byte(tmp_path):
    build(REPO, tmp_path)
    built = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    there = [p for folder in ("exercises", "solutions") for p in (REPO / folder).iterdir()]
    there = [p.relative_to(REPO) for p in there if p.suffix == ".ipynb"]
    statements = [p for p in built if p.suffix == ".json"]
    assert sorted([*there, *statements]) == built, "run `vlmrlhf exercises build`"
    for path in built:
        assert (tmp_path / path).read_bytes() == (REPO / path).read_bytes(), path


@pytest.mark.parametrize("chapter", CHAPTERS, ids=EDITED)
def test_nothing_is_given_away(chapter):
    asked = edition(chapter, solved=False)
    assert not leaks(chapter, asked)
    for cell in asked:
        assert not cell.get("outputs") and set(cell["metadata"]) <= {"nbgrader"}
        assert "#|" not in cell["source"]
        for title in ("Answer", "Solution", "Rubric"):
            assert f"<summary>{title}" not in cell["source"]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=EDITED)
def test_every_exercise_is_stated_and_can_be_checked(chapter):
    for marked in chapter.marked.values():
        for name, number in marked.functions.items():
            assert name in EXERCISES, f"{name}: no inputs; write them in a cases notebook"
            assert chapter.statements[number].hints, f"{number}: no hint"


@pytest.mark.parametrize("name", CHECKED)
def test_solutions_pass_and_stubs_do_not(name, capsys):
    assert check_file(REPO / "solutions" / name)
    assert not check_file(REPO / "exercises" / name)
    said = capsys.readouterr().out
    asked = json.dumps(json.loads((REPO / "exercises" / name).read_text())).count('check(\\"')
    assert said.count("✓") == said.count("✗") == asked


def test_no_name_is_missing_where_a_cell_was_left_out():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "F821"]
    done = subprocess.run([*command, "exercises", "solutions"], cwd=REPO, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()[-2000:]


def test_the_table_of_kills_is_of_these_exercises():
    "As many mistakes and equivalents as there are now; all of the one fail, all of the other pass."
    text = (REPO / "exercises" / "kills.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and " of " in line]
    want = []
    for name in sorted(EXERCISES):
        counts = len(mistakes_of(name)), len(equivalents_of(name))
        want.append(f"| {name} | {' | '.join(f'{n} of {n}' for n in counts)} |")
    assert rows == want, "run `vlmrlhf exercises kill`"


def test_a_leaky_chapter_is_refused(tmp_path):
    "A line of the solution stands in a later cell: the file and the cell are named."
    ask = "**Exercise 1.1 (5 min, ★)** Write `f`.\n\n<details><summary>Hint</summary>Do.</details>"
    body = "    wanted_value = x + 12345\n    return wanted_value"
    solved = f"#| export\n#| exercise: f 1.1\ndef f(x):\n{body}"
    later = "x = 1\nwanted_value = x + 12345"
    path = tmp_path / "01_leaky.ipynb"
    cells = [text_cell("ask", ask), code_cell("f", solved), code_cell("later", later)]
    path.write_text(notebook_text(cells))
    with pytest.raises(UserError, match=r"01_leaky.*cell later: wanted_value = x \+ 12345"):
        editions(Chapter(path))
    path.write_text(notebook_text(cells[:2]))
    asked, solution = editions(Chapter(path))
    assert "wanted_value" not in asked and "return wanted_value" in solution


# --- nbgrader's metadata --------------------------------------------------------------------------


def about(cell: dict) -> dict:
    "What nbgrader is told of a cell, in a word for each that is true, and its points."
    told = cell["metadata"].get("nbgrader", {})
    kinds = [kind for kind in ("grade", "solution", "locked", "task") if told.get(kind)]
    return dict(kind=" ".join(kinds), points=told.get("points"), id=told.get("grade_id"))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=EDITED)
def test_nbgrader_is_told_who_writes_what_and_for_how_much(chapter):
    "Every other cell, and every solution, says nothing."
    want = {}
    for marked in chapter.marked.values():
        want[marked.own_id] = dict(kind="solution", points=None, id=marked.own_id)
        for name, number in marked.functions.items():
            own = f"check-{name.replace('_', '-')}"
            worth = chapter.course.points.get(name, chapter.statements[number].stars)
            want[own] = dict(kind="grade locked", points=worth, id=own)
    for number, s in chapter.statements.items():
        if s.points:
            own = f"written-{number}"
            want[own] = dict(kind="grade solution", points=s.points, id=own)
    for solved, wanted in ((False, want), (True, {})):
        cells = edition(chapter, solved=solved)
        told = {cell["id"]: about(cell) for cell in cells if "nbgrader" in cell["metadata"]}
        assert told == wanted
    assert load_course(REPO).points["gae"] != statements()["gae"]["stars"], "some are not stars"


def test_half_points_stay_half_and_whole_ones_whole():
    cell = dict(id="check-gae", cell_type="code", metadata={})
    for points in (2.5, 2):
        told = about(nbgraded(cell, written=False, points=float(points)))["points"]
        assert (told, type(told)) == (points, type(points))


def test_a_cell_needs_no_types():
    tree = ast.parse("x: Unknown = START\ndef f(y: Unknown = x) -> Unknown:\n    return g(y)")
    assert names_needed(tree.body, ["f"]) == {"START", "x", "y", "g"}


@pytest.mark.parametrize("path", sorted((REPO / "exercises").glob("*.ipynb")), ids=lambda p: p.stem)
def test_hand_outs_are_notebooks_and_nbgrader_s_own_validator_says_so(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    v3 = pytest.importorskip("nbgrader.nbgraderformat.v3", reason="nbgrader is not installed")
    v3.MetadataValidatorV3().validate_nb(book)


# --- written exercises ----------------------------------------------------------------------------


def test_the_source_s_seven_are_written_and_stated():
    assert sorted(WRITTEN) == [f"E{i}" for i in range(1, 8)]
    stated = statements()
    for number, (chapter, s) in WRITTEN.items():
        assert stated[number] == json.loads(json.dumps(s._asdict())), "vlmrlhf exercises build"
        assert 2 <= len(s.hints) <= 3 and len(s.answers) == 1 and 4 <= len(s.rubric) <= 7
        assert sum(row["points"] for row in s.rubric) == s.points, chapter.path


@pytest.mark.parametrize("number", sorted(WRITTEN))
def test_a_written_exercise_has_a_cell_to_answer_in_and_only_the_hand_out_has_it(number):
    chapter, s = WRITTEN[number]
    asked, solved = (edition(chapter, solved=solved) for solved in (False, True))
    place = next(i for i, cell in enumerate(asked) if cell["id"] == f"written-{number}")
    answer = text_cell(f"written-{number}", "*Your answer:*")
    assert asked[place] == nbgraded(answer, written=True, points=s.points)
    assert f"**Exercise {number} (" in asked[place - 1]["source"]
    assert s.hints[0] in asked[place - 1]["source"]
    whole, model = (json.dumps(cells, ensure_ascii=False) for cells in (asked, solved))
    for said in (s.answers[0].splitlines()[0], *(row["earned_by"] for row in s.rubric)):
        part = json.dumps(said, ensure_ascii=False)[1:-1]
        assert part not in whole and part in model
    assert "*Your answer:*" not in model


ASK = "**Exercise E9 (5 min, ★)** Say why."
FOLDED = {"Hint 1": "Think of the leash.", "Answer": "Because the reference is far away by then."}
RUBRIC = "3 points.\n\n- 2: says that the reference is far away\n- 1: says which of the two moved"


def stated(rubric=RUBRIC, title="Rubric", **folded):
    "A statement with its blocks."
    blocks = FOLDED | folded | {title: f"\n\n{rubric}\n\n"}
    shown = (f"<details><summary>{k}</summary>{v}</details>" for k, v in blocks.items() if v)
    return f"{ASK}\n\n" + "\n".join(shown)


def chapter_of(tmp_path, *texts) -> Chapter:
    "A chapter of text cells, and one of code, without which there is no notebook."
    path = tmp_path / "nbs" / "01_small.ipynb"
    path.parent.mkdir(exist_ok=True)
    cells = [text_cell(f"text-{i}", text) for i, text in enumerate(texts)]
    path.write_text(notebook_text([*cells, code_cell("code", "x = 1")]))
    return Chapter(path)


def test_a_chapter_may_have_written_exercises_alone(tmp_path):
    chapter = chapter_of(tmp_path, "# Small", stated(), "And on.")
    asked, solved = (json.loads(text)["cells"] for text in editions(chapter))
    assert [cell["id"] for cell in asked] == ["text-0", "written-E9", "text-2", "code"]
    assert [cell["id"] for cell in solved] == ["text-0", "code"]
    assert build(tmp_path) == ["E9"]
    file = tmp_path / "vlmrlhf_course" / "classroom" / "statements.json"
    said = json.loads(file.read_text("utf-8"))["E9"]
    assert (said["points"], said["chapter"]) == (3, "01_small")
    assert said["rubric"][1] == dict(points=1, earned_by="says which of the two moved")


MALFORMED = {
    "another sum": (stated("4 points.\n- 2: a\n- 1: b"), "sum to 3 points, not to 4"),
    "no maximum": (stated("- 2: a\n- 1: b"), "give one rubric"),
    "no rows": (stated("3 points."), "give one rubric"),
    "prose": (stated("3 points.\n- 3: a\nAnd be fair."), "give one rubric"),
    "nothing": (stated(""), "give one rubric"),
    "two rubrics": (stated() + stated()[len(ASK) :], "give one rubric"),
    "no answer": (stated(Answer=""), "a rubric without an answer"),
}


@pytest.mark.parametrize("text, words", MALFORMED.values(), ids=MALFORMED)
def test_a_rubric_that_is_not_in_order_names_file_and_exercise(text, words, tmp_path):
    with pytest.raises(UserError, match=f"01_small.ipynb, exercise E9: .*{words}"):
        chapter_of(tmp_path, text)


def test_a_rubric_of_no_exercise_is_refused(tmp_path):
    "Its learners would be asked for nothing, and its rubric would be read by nobody."
    with pytest.raises(
        UserError, match="01_small.ipynb: a rubric stands there without an exercise"
    ):
        chapter_of(tmp_path, stated().replace("(5 min, ★)", "(5 minutes)"))


GIVEN = {
    "a row of the rubric": "Grading:\n\n- 2: says that the reference is far away",
    "a sentence of the answer": "By then: Because the reference is far away by then. So it is.",
    "another title": "<details><summary>Reference answer</summary>Far away.</details>",
    "a plural": "<details><summary>Rubrics</summary>Far away.</details>",
    "no end": "<details><summary>Answer</summary>Far away.",
    "a block that is open": "<details open><summary>Rubric</summary>- 3: Far away.</details>",
}


@pytest.mark.parametrize("text", GIVEN.values(), ids=GIVEN)
def test_what_is_withheld_may_stand_nowhere_else(text, tmp_path):
    chapter = chapter_of(tmp_path, stated(), text)
    with pytest.raises(UserError, match="01_small.*cell text-1: "):
        editions(chapter)


def test_an_exercise_is_written_or_checked_and_stated_once(tmp_path):
    path = chapter_of(tmp_path, stated()).path
    marked = "#| export\n#| exercise: f E9\ndef f(x):\n    return x"
    path.write_text(notebook_text([text_cell("ask", stated()), code_cell("f", marked)]))
    with pytest.raises(UserError, match="cell f: exercise: f E9: .*a written exercise"):
        Chapter(path)
    other = chapter_of(tmp_path, stated()).path
    other.with_name("02_other.ipynb").write_text(other.read_text())
    with pytest.raises(UserError, match="02_other.ipynb: exercise E9 is in 01_small, too"):
        build(tmp_path)


@pytest.mark.parametrize("folder", ["exercises", "solutions"])
def test_hand_outs_are_no_longer_than_chapters(folder):
    for path in (REPO / folder).glob("*.ipynb"):
        assert len(json.loads(path.read_text("utf-8"))["cells"]) <= 60, path
