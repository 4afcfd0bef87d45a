"""Grading: right code has its points behind every wall, wrong code has none and hears why, and a
folder of submissions is graded to its end, again with the same result, and without harm."""

import csv
import inspect
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.classroom.course import load_course
from vlmrlhf_course.classroom.items import exercise_of, mistakes_of
from vlmrlhf_course.cli import main
from vlmrlhf_course.grading import gradebook, sandbox
from vlmrlhf_course.grading.grade import course, mark_of, seed_for, stated, worth
from vlmrlhf_course.grading.gradebook import grade_all
from vlmrlhf_course.grading.jail import Limits
from vlmrlhf_course.grading.mail import cell_of, coding
from vlmrlhf_course.grading.sandbox import BACKENDS, TRUSTED, Backend, Sandbox, choose

REPO = Path(__file__).parents[1]
QUICK = Limits(seconds=3)


@pytest.fixture(scope="session")
def wall() -> Backend:
    "Whatever holds here; without one nothing can be graded, and that is an error."
    return choose()


@pytest.fixture(scope="module")
def box(wall):
    with Sandbox(wall, QUICK) as box:
        yield box


def handed_in(path: Path, texts: dict[str, str], **written: str) -> Path:
    "A notebook with these texts under the ids of exercises."
    fixed = dict(cell_type="code", metadata={}, outputs=[], execution_count=None)
    cells = [fixed | dict(id=cell_of(name), source=text) for name, text in texts.items()]
    for name, answer in written.items():
        cell = dict(cell_type="markdown", id=f"written-{name}", metadata={}, source=answer)
        cells.append(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    book = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(book), "utf-8")
    return path


def reference(name: str) -> str:
    "The library's own solution, alone; what stands beside it in its cell is in the kit."
    return inspect.getsource(exercise_of(name).function)


def marks_in(result: dict) -> dict[str, dict]:
    return {item["exercise"]: item for item in result["items"]}


# --- behind walls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS[:2], ids=lambda b: b.name)
def test_all_solutions_are_right_and_no_stub_is(backend, tmp_path):
    "The cells of `solutions/` and `exercises/`, as a student would hand them in."
    why = sandbox.usable(backend)
    if why:
        pytest.skip(f"{backend.name}: {why}")
    for edition in ("solutions", "exercises"):
        shutil.copytree(REPO / edition, tmp_path / "mail" / edition)
    _, results = grade_all(tmp_path / "mail", tmp_path / "out", backend, jobs=2)
    stubs, solved = [marks_in(r) for r in sorted(results, key=lambda r: r["student"])]
    wrong = {name: item["why"] for name, item in solved.items() if item["status"] != "right"}
    assert not wrong
    assert set(solved) == set(coding()) and len(solved) >= 66
    odd = {n: i["why"] for n, i in stubs.items() if i["status"] != "not written"}
    assert not odd
    assert not any(item["points"] for item in stubs.values())


@pytest.mark.parametrize("name", ["gae", "ppo_policy_loss", "dpo_loss", "judge", "dedupe", "phase"])
def test_a_mistake_is_named_and_numbers_are_kept_apart(box, name):
    for mistake in mistakes_of(name)[:3]:
        text = reference(name).replace(mistake.old, mistake.new)
        mark = mark_of(name, [text], box, seed=5)
        assert (mark.points, mark.status) == (0, "wrong"), mistake.what
        assert mistake.what in mark.mistakes
        assert "expected" not in mark.why


def test_cases_depend_on_the_text():
    "A table of answers to the cases of an earlier submission is of no use in the next one."
    assert seed_for(1, "a") == seed_for(1, "a")
    assert len({seed_for(1, "a"), seed_for(1, "a "), seed_for(2, "a")}) == 3


def test_a_server_that_died_is_replaced(wall):
    with Sandbox(wall, QUICK) as box:
        assert mark_of("whiten", [reference("whiten")], box, seed=1).points
        box.server.kill()
        box.server.wait()
        assert mark_of("whiten", [reference("whiten")], box, seed=1).points


def test_a_sandbox_that_cannot_start_costs_nobody_points(tmp_path, wall):
    "The mark says that it is not graded, and the next run does not take it for a result."
    broken = wall._replace(name=wall.name, wrapped=lambda python, readable: ["/bin/false"])
    handed_in(tmp_path / "mail" / "anna.ipynb", dict(whiten=reference("whiten")))
    _, (first,) = grade_all(tmp_path / "mail", tmp_path / "out", broken, seed=1)
    assert {item["status"] for item in first["items"] if "died" in item["why"]} == {"not graded"}
    _, (second,) = grade_all(tmp_path / "mail", tmp_path / "out", wall, seed=1)
    assert marks_in(second)["whiten"]["status"] == "right"


def test_docker_is_asked_for_what_its_documentation_says(tmp_path, monkeypatch):
    "No engine runs here: a stand-in notes its arguments and runs Python, locked in by itself."
    stand_in = tmp_path / "bin" / "docker"
    stand_in.parent.mkdir()
    noted = tmp_path / "arguments"
    stand_in.write_text(
        f'#!/bin/sh\necho "$@" > {noted}\n'
        'while [ "$1" != "debian:stable-slim" ]; do shift; done\nshift\nexec "$@"\n'
    )
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    docker = next(b for b in BACKENDS if b.name == "docker")
    said = sandbox.usable(docker)
    words = noted.read_text()
    for word in ("run --rm -i", "--network none", "--read-only", "--cap-drop ALL"):
        assert word in words
    assert "no-new-privileges" in words and ":ro" in words and "vlmrlhf_course/" not in words
    assert not said, "Landlock and seccomp are used within a container, too"


def test_no_wall_no_grades(tmp_path, capsys, monkeypatch):
    handed_in(tmp_path / "mail" / "anna.ipynb", dict(gae=reference("gae")))
    missing = [Backend("bubblewrap", None, False, "no-such-program")]
    monkeypatch.setattr(choose, "__defaults__", ("auto", missing))
    argv = ["grade", str(tmp_path / "mail"), "--out", str(tmp_path / "out")]
    assert main(argv) != 0
    said = capsys.readouterr().err
    assert "no-such-program is not installed" in said and "--trusted" in said
    assert not (tmp_path / "out").exists()
    assert main([*argv, "--trusted", "--seed", "1", "--chapters", "07_advantages"]) == 0
    assert json.loads((tmp_path / "out" / "grades.json").read_text())["backend"] == TRUSTED.name


# --- a folder of submissions ----------------------------------------------------------------------


@pytest.fixture
def mail(tmp_path) -> Path:
    "Three layouts in one folder, and things that are no submissions."
    mail = tmp_path / "mail"
    both = dict(gae=reference("gae"), whiten=reference("whiten"))
    handed_in(mail / "anna.ipynb", both)
    handed_in(mail / "bert" / "07_advantages.ipynb", both | dict(gae="def gae():\n    pass"))
    handed_in(mail / "cleo" / "week3" / "x.ipynb", dict(kl_estimate=reference("kl_estimate")))
    (mail / "notes.txt").write_text("no submission")
    (mail / "dora").mkdir()
    (mail / "emil.ipynb").symlink_to(mail / "anna.ipynb")
    return mail


def test_three_layouts(mail, tmp_path, wall, capsys):
    about, results = grade_all(mail, tmp_path / "out", wall, seed=1, limits=QUICK)
    by = {(r["student"], r["assignment"]): marks_in(r) for r in results}
    assert set(by) == {(s, "exercises") for s in ("anna", "bert", "dora")} | {("cleo", "week3")}
    assert by["anna", "exercises"]["gae"]["points"] == worth("gae")
    assert by["bert", "exercises"]["gae"]["points"] == 0
    assert by["bert", "exercises"]["whiten"]["points"] == worth("whiten")
    assert by["anna", "exercises"].keys() == by["dora", "exercises"].keys(), "the same for all"
    assert "kl_estimate" in about["exercises"]["week3"]
    assert "emil.ipynb: a link, left out" in capsys.readouterr().err


def test_a_second_run_asks_only_what_is_new(mail, tmp_path, wall, monkeypatch):
    out, asked = tmp_path / "out", []
    real = gradebook.mark_of

    def counted(name, *rest):
        asked.append(name)
        return real(name, *rest)

    monkeypatch.setattr(gradebook, "mark_of", counted)
    _, first = grade_all(mail, out, wall, limits=QUICK)
    seed, count = json.loads((out / "grades.json").read_text())["seed"], len(asked)
    _, again = grade_all(mail, out, wall, limits=QUICK)
    assert again == first and len(asked) == count
    handed_in(mail / "anna.ipynb", dict(gae=reference("gae") + "\n# later"))
    _, later = grade_all(mail, out, wall, limits=QUICK)
    assert len(asked) == count + len(marks_in(later[0])), "anna's alone"
    _, anew = grade_all(mail, tmp_path / "other", wall, seed=seed, limits=QUICK)
    assert anew == later, "the recorded seed gives the same"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda mail, out: (out.mkdir(), (out / "thesis.tex").write_text("!")), "something else"),
        (lambda mail, out: (out.mkdir(), (out / "grades.json").write_text("[]")), "no record"),
        (lambda mail, out: shutil.rmtree(mail), "no folder"),
        (lambda mail, out: [f.unlink() for f in mail.glob("*.ipynb")], "give --chapters"),
    ],
)
def test_what_cannot_be_graded_is_refused_and_left_alone(tmp_path, change, words):
    mail, out = tmp_path / "mail", tmp_path / "out"
    handed_in(mail / "anna.ipynb", dict(gae=reference("gae")))
    (mail / "bert").mkdir()
    change(mail, out)
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises(UserError, match=words):
        grade_all(mail, out, TRUSTED)
    assert (sorted(out.rglob("*")) if out.exists() else None) == before


def test_grades_do_not_go_among_submissions(mail):
    with pytest.raises(UserError, match="inside the submissions"):
        grade_all(mail, mail / "grades", TRUSTED)
    with pytest.raises(UserError, match="no chapter with exercises; there are"):
        grade_all(mail, mail.parent / "out", TRUSTED, chapters=["07_advantage"])
    with pytest.raises(UserError, match="no such sandbox"):
        choose("moat")


# --- the command ----------------------------------------------------------------------------------


def rows(file: Path) -> list[dict]:
    with open(file, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_the_command_from_mail_to_feedback(tmp_path, capsys, wall):
    "Grades, items, pages, what looks alike; then a person marks an answer, and it counts."
    mail, out = tmp_path / "mail", tmp_path / "out"
    text = reference("gae")
    handed_in(mail / "anna.ipynb", dict(gae=text), E3="Because <script>alert(1)</script>.")
    handed_in(mail / "bert.ipynb", dict(gae=text.replace("advantages", "adv")))
    wrong = text.replace(mistakes_of("gae")[0].old, mistakes_of("gae")[0].new)
    handed_in(mail / "cleo.ipynb", dict(gae=wrong))
    argv = ["grade", str(mail), "--out", str(out), "--seed", "3"]
    argv += ["--chapters", "07_advantages", "05_reward"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert f"3 submissions, {wall.name}, seed 3" in said and "grade: done" in said
    grades = {row["student_id"]: row for row in rows(out / "grades.csv")}
    assert list(grades["anna"]) == gradebook.NBGRADER
    assert float(grades["anna"]["score"]) == worth("gae") and float(grades["cleo"]["score"]) == 0
    items = {(r["student"], r["exercise"]): r for r in rows(out / "items.csv")}
    assert mistakes_of("gae")[0].what in items["cleo", "gae"]["mistakes"]
    alike = {(row["one"], row["other"]) for row in rows(out / "similar.csv")}
    assert ("anna", "bert") in alike
    page = (out / "feedback" / "cleo.html").read_text()
    assert "default-src 'none'" in page and "expected" not in page

    (answer,) = rows(out / "written.csv")
    assert answer["exercise"] == "E3" and not answer["points"] and "<script>" in answer["answer"]
    table = (out / "written.csv").read_text().replace(",10.0,,,", ",10.0,7.5,well put,")
    (out / "written.csv").write_text(table)
    assert main(argv) == 0
    grades = {row["student_id"]: row for row in rows(out / "grades.csv")}
    assert float(grades["anna"]["score"]) == worth("gae") + 7.5
    assert "well put" in (out / "feedback" / "anna.html").read_text()
    handed_in(mail / "anna.ipynb", dict(gae=text), E3="Something else.")
    assert main(argv) == 0
    assert "the answer has changed since it was marked" in capsys.readouterr().err
    (row,) = rows(out / "written.csv")
    assert not row["points"] and row["before"] == "changed since marked: 7.5 points; well put"
    main([*argv, "--show-cases"])
    assert "expected" in (out / "feedback" / "cleo.html").read_text()


def test_points_come_from_settings(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[exercises]\nper_star = 2\n[points]\ngae = 7\n")
    monkeypatch.chdir(tmp_path)
    course.cache_clear()
    assert (worth("gae"), worth("whiten")) == (7.0, 2.0 * load_stars("whiten"))
    monkeypatch.chdir(REPO)
    course.cache_clear()
    assert worth("gae") == load_course(REPO).points["gae"]


def load_stars(name: str) -> int:
    return stated()[name]["stars"]
