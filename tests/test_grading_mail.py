"""What an instructor's folder may look like, and what becomes of marks that a person has typed:
nothing vanishes without a line."""

import csv
import io
import json
from pathlib import Path

import pytest
from conftest import REPO
from test_grading import handed_in, rows

from vlmrlhf_course.base import settings
from vlmrlhf_course.classroom.points import UNANSWERED
from vlmrlhf_course.grading import gradebook
from vlmrlhf_course.grading.feedback import WRITTEN, marked, merge_written, page_of, table
from vlmrlhf_course.grading.grade import worth
from vlmrlhf_course.grading.gradebook import WAITING, collected, summary
from vlmrlhf_course.grading.mail import chapters_asked, names_in, submissions_in, writing

NAME = "kl_estimate"  # of chapter 8
ABOUT = dict(written=dict(exercises=["E3"]))


@pytest.fixture(autouse=True)
def said_once(monkeypatch):
    "Each test hears every line."
    monkeypatch.setattr(settings, "_noticed", set())


def layout(root: Path, *places: str) -> Path:
    for place in places:
        handed_in(root / place, {NAME: "a = 1"})
    return root


def who(root: Path) -> dict[tuple, list[str]]:
    "(student, assignment) → names of notebooks."
    found = submissions_in(root)
    assert len({one.key for one in found}) == len(found)
    return {
        (one.student, one.assignment): [p.name for p in (*one.notebooks, *one.deeper)]
        for one in found
    }


def stub_of(chapter: str, cell: str) -> str:
    cells = json.loads((REPO / "exercises" / f"{chapter}.ipynb").read_text("utf-8"))["cells"]
    return "".join(next(one for one in cells if one["id"] == cell)["source"])


# --- layouts --------------------------------------------------------------------------------------


def test_nbgrader_s_folder_beside_others(tmp_path, capsys):
    "Whoever is in `submitted` is there, whatever lies beside it; nobody is called `source`."
    mail = layout(tmp_path, "anna.ipynb", "submitted/bob/ps1/8.ipynb", "Untitled.ipynb")
    layout(mail, "source/ps1/8.ipynb", "release/ps1/8.ipynb", "autograded/bob/ps1/8.ipynb")
    found = who(mail)
    assert set(found) == {
        ("bob", "ps1"),
        ("anna", "exercises"),
        ("Untitled", "exercises"),
    }
    said = capsys.readouterr().err
    for name in ("source", "release", "autograded"):
        assert f"{name}: a folder of nbgrader's, left out" in said


def test_a_student_may_be_called_submitted(tmp_path):
    found = who(layout(tmp_path, "anna/8.ipynb", "submitted/8.ipynb", "submitted/week 2/8.ipynb"))
    assert {("submitted", "exercises"), ("submitted", "week 2"), ("anna", "exercises")} == set(
        found
    )


def test_one_name_twice_is_said(tmp_path, capsys):
    mail = layout(tmp_path, "anna/8.ipynb", "anna.ipynb", "submitted/anna/8.ipynb", "bert.IPYNB")
    students = {student for student, _ in who(mail)}
    assert len(students) == 4 and {"anna", "bert"} < students
    assert capsys.readouterr().err.count("anna has handed in something else, too") == 2


def test_what_is_not_read_is_named(tmp_path, capsys):
    mail = layout(tmp_path, "anna/8.ipynb", "bert/1/2/3/4/5/6/7/8/8.ipynb", "bert/8.ipynb")
    for name in ("a.zip", "b.zip", "c.zip", "d.zip", "e.py", "f.ipynb.txt", ".hidden"):
        (mail / name).write_text("x")
    submissions_in(mail)
    said = capsys.readouterr().err
    assert "4 of kind .zip: a.zip, b.zip, c.zip, …" in said and "1 of kind .py: e.py" in said
    assert "1 whose name does not end in .ipynb (rename it): f.ipynb.txt" in said
    assert "1 in folders too deep for a submission" in said and ".hidden" not in said


def test_a_folder_deeper_is_read_for_what_is_nowhere_else(tmp_path):
    mail = tmp_path / "mail"
    handed_in(mail / "anna" / "ps1" / "8.ipynb", {NAME: stub_of("08_kl", "exercise-kl-estimate")})
    handed_in(mail / "anna" / "ps1" / "inner" / "8.ipynb", {NAME: "a = 1"})
    handed_in(mail / "bert" / "ps1" / "8.ipynb", {NAME: "a = 2"})
    handed_in(mail / "bert" / "ps1" / "old" / "8.ipynb", {NAME: "a = 3"})
    handed_in(mail / "cleo" / "ps1" / "inner" / "8.ipynb", {NAME: "a = 4"})
    anna, bert, cleo = [collected(one, [NAME]) for one in submissions_in(mail)]
    assert anna[0] == {NAME: ["a = 1"]} and "inner/8.ipynb" in anna[1][0]
    assert bert[0] == {NAME: ["a = 2"]} and cleo[0] == {NAME: ["a = 4"]}


def test_an_untouched_copy_does_not_harm(tmp_path):
    stub = stub_of("08_kl", "exercise-kl-estimate")
    handed_in(tmp_path / "lee" / "8-Copy1.ipynb", {NAME: stub + "\n"})
    handed_in(tmp_path / "lee" / "8.ipynb", {NAME: "a = 1"})
    (lee,) = submissions_in(tmp_path)
    assert collected(lee, [NAME]) == ({NAME: ["a = 1"]}, [])
    handed_in(tmp_path / "lee" / "8-Copy1.ipynb", {NAME: "a = 2"})
    texts, (trouble,) = collected(lee, [NAME])
    assert len(texts[NAME]) == 2 and "8-Copy1.ipynb and 8.ipynb" in trouble
    handed_in(tmp_path / "lee" / "8.ipynb", {NAME: stub})
    handed_in(tmp_path / "lee" / "8-Copy1.ipynb", {NAME: stub})
    assert collected(lee, [NAME]) == ({NAME: [stub]}, [])


def test_an_assignment_of_one_person_is_said(tmp_path, capsys):
    layout(tmp_path, *(f"{name}/ps1/8.ipynb" for name in "abcde"), "f/ps1x/8.ipynb")
    assert set(chapters_asked(submissions_in(tmp_path))) == {"ps1", "ps1x"}
    assert (
        "ps1x: an assignment of 1 of 6 students: f (did you mean 'ps1'?)" in capsys.readouterr().err
    )


# --- what counts ----------------------------------------------------------------------------------


def test_written_answers_of_a_chapter_count_for_everybody(tmp_path):
    "Who deletes the cell has no more points than who leaves it empty. Other chapters: none."
    handed_in(tmp_path / "anna.ipynb", {"bt_loss": "a = 1"}, E3="Length.")
    handed_in(tmp_path / "bert.ipynb", {"bt_loss": "a = 1"}, E3=UNANSWERED)
    handed_in(tmp_path / "cleo.ipynb", {"bt_loss": "a = 1"})
    everybody = submissions_in(tmp_path)
    asked = names_in(chapters_asked(everybody), writing())
    assert asked == dict(exercises=["E3"])
    results = [dict(student=n, assignment="exercises", items=[]) for n in ("anna", "bert", "cleo")]
    merge_written(tmp_path, tmp_path / "out", dict(written=asked), results)
    items = [item for result in results for item in result["items"]]
    assert [item["status"] for item in items] == [WAITING, "missing", "missing"]
    assert {item["most"] for item in items} == {worth("E3")}
    assert names_in(chapters_asked(everybody, ["08_kl"]), writing()) == dict(exercises=[])


def test_an_answer_that_waits_is_not_lost(tmp_path):
    item = dict(exercise="gae", points=3, most=4, status="right", why="", case="", mistakes=[])
    answer = item | dict(exercise="E3", points=0, most=10, status=WAITING)
    result = dict(student="a", assignment="exercises", troubles=[], items=[item, answer])
    page = page_of(result)
    assert "3 of 4 points</b>, and 10 more that are not marked yet" in page
    assert "<td>E3</td><td>– of 10</td>" in page and 'class="wrong"' not in page
    about = dict(backend="x", seed=1, settings="/a/settings.ini", written=dict(exercises=["E3"]))
    said = summary(about | dict(exercises=dict(exercises=["gae"])), [result])
    assert "75% of all points; 10 are not marked yet" in said and "/a/settings.ini" in said


# --- written.csv ----------------------------------------------------------------------------------


def merged(mail: Path, out: Path) -> list[dict]:
    "What stands in written.csv after another run."
    students = sorted({one.student for one in submissions_in(mail)})
    results = [dict(student=n, assignment="exercises", items=[]) for n in students]
    merge_written(mail, out, ABOUT, results)
    return rows(out / "written.csv")


@pytest.fixture
def marks(tmp_path):
    "Two answers, marked by a person: the folders of submissions and grades."
    for name in ("0012345", "anna"):
        handed_in(tmp_path / "mail" / f"{name}.ipynb", {"bt_loss": "a = 1"}, E3=f"By {name}.")
    (tmp_path / "out").mkdir()
    found = merged(tmp_path / "mail", tmp_path / "out")
    typed = [row | dict(points="7.5", comment=f"good, {row['student']}") for row in found]
    (tmp_path / "out" / "written.csv").write_text(table(WRITTEN, typed), "utf-8")
    return tmp_path / "mail", tmp_path / "out"


def test_marks_are_kept_whatever_becomes_of_their_student(marks, capsys):
    mail, out = marks
    file = out / "written.csv"
    file.write_text(file.read_text("utf-8").replace("\n0012345,", "\n12345,"), "utf-8")
    (mail / "anna.ipynb").rename(mail.parent / "anna.ipynb")
    found = {row["student"]: row for row in merged(mail, out)}
    said = capsys.readouterr().err
    assert "2 marked rows fit no answer" in said and "anna, E3" in said
    assert "12345, E3 (did you mean '0012345'?)" in said
    assert not found["0012345"]["points"]
    assert [found[n]["points"] for n in ("12345", "anna")] == ["7.5", "7.5"]
    assert found["anna"]["comment"] == "good, anna"
    (mail.parent / "anna.ipynb").rename(mail / "anna.ipynb")
    for path in mail.glob("0*"):
        path.unlink()
    found = {row["student"]: row for row in merged(mail, out)}
    assert found["anna"]["points"] == "7.5" and set(found) == {"anna", "12345"}


def test_points_of_another_answer_stay_in_sight(marks):
    mail, out = marks
    for text in ("Other.", "Third.", UNANSWERED):
        handed_in(mail / "anna.ipynb", {"bt_loss": "a = 1"}, E3=text)
        for _ in range(2):
            row = next(row for row in merged(mail, out) if row["student"] == "anna")
            assert not row["points"] and "7.5 points; good, anna" in row["before"]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda text: text.replace("good", "größer").encode("cp1252"), "save it as CSV in UTF-8"),
        (lambda text: text.replace(",7.5,", ",11,").encode(), "give a number from 0 to 10"),
        (lambda text: text.replace(",10.0,7.5,", ",99,12,").encode(), "give a number from 0 to 10"),
        (lambda text: text.replace("0012345,", "anna,").encode(), "anna, E3 is marked in two rows"),
        (lambda text: text.replace(",10.0,", ",10,,").encode(), "more cells than columns"),
        (lambda text: b"\xff\xfe" + text.encode("utf-16-le"), "save it as CSV in UTF-8"),
    ],
)
def test_a_broken_table_is_said_before_anything_is_graded(
    marks, capsys, change, words, monkeypatch
):
    from vlmrlhf_course.cli import main

    mail, out = marks
    file = out / "written.csv"
    file.write_bytes(change(file.read_text("utf-8")))
    before = file.read_bytes()
    monkeypatch.setattr(gradebook, "grade_all", None)
    assert main(["grade", str(mail), "--out", str(out), "--trusted"]) == 2
    assert words in capsys.readouterr().err and file.read_bytes() == before


def test_what_a_spreadsheet_does_to_a_table_that_is_right(marks):
    "An emptied `most`, semicolons, a mark at the start of the file."
    mail, out = marks
    found = rows(out / "written.csv")
    text = io.StringIO()
    writer = csv.DictWriter(text, WRITTEN, delimiter=";")
    writer.writeheader()
    writer.writerows(row | dict(most="", points="7,5") for row in found)
    (out / "written.csv").write_text(text.getvalue(), "utf-8-sig")
    assert [row["value"] for row in marked(out / "written.csv").values()] == [7.5, 7.5]
    assert all(not row["digest"][0].isdigit() for row in found), "12 digits are a number"
