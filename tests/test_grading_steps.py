"""The steps of grading, one by one and without a server: frames that nobody has packed, what a cell
defines, a mark for whatever a sandbox may say, names in the mail, records, tables and pages."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_grading import handed_in, reference

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.classroom.editions import STUB
from vlmrlhf_course.classroom.items import exercise_of, mistakes_of
from vlmrlhf_course.classroom.outcome import Outcome
from vlmrlhf_course.grading import child, feedback, grade, sandbox, similar
from vlmrlhf_course.grading.child import ENDED, TOO_LONG, TOO_MUCH, function_in, work
from vlmrlhf_course.grading.grade import BadNotebook, mark_of, seed_for, sources_in, without_numbers
from vlmrlhf_course.grading.gradebook import (
    collected,
    grade_one,
    mark_in_peace,
    seed_in,
    totals,
    write_tables,
)
from vlmrlhf_course.grading.jail import Limits
from vlmrlhf_course.grading.kit import asked
from vlmrlhf_course.grading.mail import Submission, submissions_in
from vlmrlhf_course.grading.sandbox import GONE, TRUSTED, choose, probe
from vlmrlhf_course.grading.wire import LENGTHS, STRANGERS, WireError, frame, importable, read_frame

# --- the wire, the child --------------------------------------------------------------------------


def forged(lengths: list, *tensors: list, body: bytes = b"") -> bytes:
    "A frame that nobody has packed."
    head = json.dumps([lengths, dict(list=[dict(tensor=one) for one in tensors])]).encode()
    return LENGTHS.pack(len(head), len(body)) + head + body


@pytest.mark.parametrize(
    "message",
    [
        forged([0], ["float64", [2]]),  # would be whatever lay in the memory
        forged([8, -8, 8], *[["uint8", [n]] for n in (8, 0, 8)], body=bytes(8)),  # shared
    ],
    ids=["no bytes", "a negative length"],
)
def test_bytes_belong_to_one_tensor(message):
    with pytest.raises(WireError):
        read_frame(io.BytesIO(message).read)


def test_a_stranger_may_not_send_as_much_as_we():
    said = frame("a" * 99)
    assert read_frame(io.BytesIO(said).read, longest=150) == "a" * 99
    with pytest.raises(WireError, match="too long"):
        read_frame(io.BytesIO(said).read, longest=50)


def test_what_a_cell_need_not_have():
    "Types of annotations, and registers, which are the library's."
    space = SimpleNamespace(one=1)
    text = (
        "REGISTER['f'] = 1\n@reward('mine')\ndef g(): pass\ndef f(x: Unknown):\n    return x + one"
    )
    assert function_in(text, "f", space)(2) == 3


def test_who_has_no_processor_time_left_took_too_long(monkeypatch):
    "The kernel's limit may come before the clock's."
    said = []
    monkeypatch.setattr(child, "answer", lambda *_: os.kill(os.getpid(), signal.SIGXCPU))
    monkeypatch.setattr(child, "write_all", lambda handle: said.append)
    child.keep(60, 100, [], None)
    assert child.RESULT.unpack(said[0]) == (TOO_LONG, 0)


# --- the sandbox ----------------------------------------------------------------------------------


def test_the_first_that_holds_is_chosen(monkeypatch):
    monkeypatch.setattr(sandbox, "usable", lambda b: "" if b.name == "docker" else "has a hole")
    assert choose().name == choose("docker").name == "docker"
    with pytest.raises(UserError, match=r"apart \(podman: has a hole\)"):
        choose("podman")


def test_a_probe_tells_what_is_open():
    def told(**succeeded) -> str:
        said = frame("") + frame(tuple(Outcome(dict(computes=True) | succeeded)))
        return probe(SimpleNamespace(query=lambda *_: (ENDED, said), last_words=lambda: ""))

    assert told(writes=False) == ""
    assert "writes" in told(writes=True) and "is lost" in told(computes=False)


def test_nothing_that_is_installed_is_python_s_own():
    assert not sandbox.INSTALLED & {Path(path).name for path in sandbox.system_paths()}


@pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")
def test_bubblewrap_shares_nothing(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    code = "import os, socket; print(os.getpid() < 9, len(socket.if_nameindex()), 'SECRET' in "
    code += "os.environ, os.listdir('/home') if os.path.exists('/home') else [])"
    python = [os.path.realpath(sys.executable), "-I", "-S", "-c", code]
    command = sandbox.bubblewrap(python, sandbox.system_paths())
    done = subprocess.run(command, capture_output=True, text=True)
    if "namespace" in done.stderr or "perm" in done.stderr.lower():
        pytest.skip(done.stderr)
    assert done.stdout == "True 1 False []\n", done.stderr


# --- marks ----------------------------------------------------------------------------------------

NAME = "masked_mean"


class Here:
    "A sandbox without walls, in this process; first it says what a test has put into its mouth."

    backend, limits = TRUSTED, Limits()

    def __init__(self, *answers: tuple[int, bytes]):
        self.answers, self.asked = list(answers), 0

    def query(self, request: dict, cases: bytes) -> tuple[int, bytes]:
        self.asked += 1
        if self.answers:
            return self.answers.pop(0)
        said = io.BytesIO()
        work(request, read_frame(io.BytesIO(cases).read, importable), said.write)
        return ENDED, said.getvalue()

    def last_words(self) -> str:
        return "no more"


@pytest.fixture(scope="module")
def frames() -> list[bytes]:
    "What comes back for the reference: a word, and an answer to each case."
    text = reference(NAME)
    one = asked(exercise_of(NAME), seed_for(1, text))
    said, found = Here().query(one.request | dict(cell=text), one.sent)[1], []
    while said:
        size = LENGTHS.size + sum(LENGTHS.unpack(said[: LENGTHS.size]))
        found.append(said[:size])
        said = said[size:]
    return found


STRANGE = frame(tuple(Outcome(torch.tensor(0.0), dict(nobody=torch.ones(1)))))
LONG = frame(tuple(Outcome("a" * STRANGERS)))


@pytest.mark.parametrize(
    "ended, heard, status, why",
    [
        (ENDED, lambda f: f, "right", ""),
        (TOO_LONG, lambda f: f, "stopped", "it took more than 10 s, in case {after}"),
        (ENDED, lambda f: f[:-1], "stopped", "its process ended in case {last}"),
        (TOO_MUCH, lambda f: [*f[:-1], f[-1][:-1]], "stopped", "longer than 32 MB"),
        (ENDED, lambda f: [*f[:-1], f[-1][:-1]], "wrong", "garbled: a frame that breaks off"),
        (ENDED, lambda f: [*f, f[-1]], "wrong", "garbled: more answers than questions"),
        (ENDED, lambda f: [f[0], STRANGE, *f[2:]], "wrong", "garbled: no outcome"),
        (ENDED, lambda f: [f[0], LONG, *f[2:]], "wrong", "garbled: a frame that is too long"),
    ],
)
def test_only_all_answers_in_time_have_points(frames, ended, heard, status, why):
    mark = mark_of(NAME, [reference(NAME)], Here((ended, b"".join(heard(frames)))), seed=1)
    assert (mark.status, mark.points > 0) == (status, status == "right")
    last = len(frames) - 1  # the first frame is a word
    assert why.format(last=last, after=last + 1) in mark.why


def test_a_mark_says_neither_numbers_nor_mistakes_that_it_does_not_know():
    for mistake in mistakes_of(NAME)[:2]:
        text = reference(NAME).replace(mistake.old, mistake.new)
        mark = mark_of(NAME, [text], Here(), seed=1)
        assert mark.mistakes == (mistake.what,) and mark.status == "wrong"
        assert "expected" in mark.case and "expected" not in mark.why
    said = "the result[1]: expected 1, got 2; row 1 has 2 tokens"
    assert without_numbers(said) == "the result[1] is wrong; row 1 has 2 tokens"
    said = "the result has keys ['a']; wanted: ['b']"
    assert without_numbers(said) == "the result has other keys"


def test_what_cannot_be_compared_is_wrong(monkeypatch):
    def fault_of(want, came, *_):
        if came is not want:
            raise RuntimeError("Boolean value of Tensor with more than one value is ambiguous")

    monkeypatch.setattr(grade, "fault_of", fault_of)
    mark = mark_of(NAME, [reference(NAME)], Here(), seed=1)
    assert mark.status == "wrong" and "of another kind inside" in mark.why


def test_a_sandbox_that_died_is_asked_once_more():
    gone = (GONE, b"")
    assert mark_of(NAME, [reference(NAME)], Here(gone), seed=1).points
    mark = mark_of(NAME, [reference(NAME)], Here(gone, gone), seed=1)
    assert (mark.status, mark.why) == ("not graded", "the sandbox died: no more")
    broken = SimpleNamespace(limits=Limits())
    assert mark_in_peace(NAME, [reference(NAME)], broken, 1).status == "not graded"


def test_who_hands_in_two_answers_has_none():
    mark = mark_of(NAME, [reference(NAME), "a = 1"], Here(), seed=1)
    assert mark.status == "missing" and not mark.points


# --- notebooks, names, records --------------------------------------------------------------------


def test_which_cells_count(tmp_path):
    "Code, by its own id or the one of nbgrader; not what a link leads to."
    path = handed_in(tmp_path / "1.ipynb", dict(gae="a"))
    book = json.loads(path.read_text())
    pasted = book["cells"][0] | dict(id="x", metadata=dict(nbgrader=dict(grade_id="gae")))
    text = book["cells"][0] | dict(id="gae", cell_type="markdown")
    path.write_text(json.dumps(book | dict(cells=[pasted, text])))
    assert sources_in(path, {"gae"}) == dict(gae=["a"])
    (tmp_path / "2.ipynb").symlink_to(path)
    with pytest.raises(BadNotebook, match="a link is not followed"):
        sources_in(tmp_path / "2.ipynb", {"gae"})
    path.write_bytes(b"[" * (grade.MOST_PARTS + 1))
    with pytest.raises(BadNotebook, match="parts; clear its outputs"):
        sources_in(path, {"gae"})


def test_a_folder_of_notebooks_is_read_whole(tmp_path):
    "What stands beside a folder `exercises` and what stands in it; both of two notebooks count."
    handed_in(tmp_path / "mail" / "anna" / "1.ipynb", {NAME: "a = 1"})
    handed_in(tmp_path / "mail" / "anna" / "exercises" / "2.ipynb", {NAME: "a = 2"})
    (anna,) = submissions_in(tmp_path / "mail")
    assert collected(anna, [NAME])[0] == {NAME: ["a = 1", "a = 2"]}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "submitted").symlink_to(tmp_path / "mail")
    with pytest.raises(UserError, match="no notebook in it"):
        submissions_in(tmp_path / "other")


def test_only_what_has_changed_is_graded_again(tmp_path):
    one = Submission("anna", "exercises", (handed_in(tmp_path / "1.ipynb", {NAME: "a = 1"}),))

    def graded(box: Here, seed: int, before: dict) -> dict:
        return grade_one(one, [NAME], box, seed, before)

    def times(seed: int, before: dict) -> int:
        box = Here()
        graded(box, seed, before)
        return box.asked

    first = graded(Here(), 1, {})
    assert times(1, first) == 0 and times(2, first) == 1
    assert times(1, first | dict(backend="landlock")) == 1
    lost = graded(Here((GONE, b""), (GONE, b"")), 1, {})
    assert lost["items"][0]["status"] == "not graded" and times(1, lost) == 1
    handed_in(tmp_path / "1.ipynb", {NAME: "a = 2"})
    assert times(1, first) == 1


def test_a_folder_of_grades_keeps_its_seed(tmp_path):
    (tmp_path / "thesis.tex").write_text("!")
    with pytest.raises(UserError, match="something else in it"):
        seed_in(tmp_path, 1)
    (tmp_path / "grades.json").write_text('{"seed": 5}')
    assert (seed_in(tmp_path, None), seed_in(tmp_path, 7)) == (5, 7)


# --- tables and pages -----------------------------------------------------------------------------


def result_of(student: str, assignment: str, **more) -> dict:
    item = dict(exercise="gae", points=1, most=2, status="wrong", why="", case="", mistakes=[])
    return dict(student=student, assignment=assignment, troubles=[], items=[item]) | more


def test_points_are_summed_and_every_assignment_has_a_page(tmp_path):
    one, other = result_of("anna", "week 1"), result_of("anna", "week 2", troubles=["<i>"])
    assert totals(one) == (1, 2)
    write_tables(tmp_path, [one, other])
    (row, _) = csv.DictReader(io.StringIO((tmp_path / "grades.csv").read_text()))
    assert (row["raw_score"], row["score"], row["max_score"]) == ("1", "1", "2")
    feedback.write_pages(tmp_path, [one, other])
    pages = sorted((tmp_path / "feedback").iterdir())
    assert [path.stem for path in pages] == ["anna__week 1", "anna__week 2"]
    assert "&lt;i&gt;" in pages[1].read_text()


def test_marks_of_a_person_find_their_answer_again(tmp_path):
    "Whatever a spreadsheet puts at the start of a file, and a student is called; 0 is a mark."
    one, file = Submission("=anna", "exercises", ()), tmp_path / "written.csv"
    row = feedback.written_row(one, "E3", "Because.", {})
    table = feedback.table(feedback.WRITTEN, [row | dict(points="0,0", comment="no")])
    file.write_text(table, "utf-8-sig")
    again = feedback.written_row(one, "E3", "Because.", feedback.marked(file))
    assert (again["value"], again["comment"]) == (0.0, "no")
    assert feedback.item_of(again)["status"] == "marked"
    other = feedback.written_row(one, "E3", "Why not?", feedback.marked(file))
    assert feedback.item_of(other)["status"] == "not marked yet"


def test_stubs_and_what_is_short_are_not_alike():
    own = dict(gae=f"def gae():\n    {STUB}", whiten="def whiten(x):\n    return x")
    assert list(similar.written(own)) == ["whiten"]
    short, text = similar.pieces_of("x = 1\ny = 2"), similar.pieces_of(reference("gae"))
    assert short and similar.likeness(short, short) is None
    longer = similar.pieces_of(reference("gae") + reference("whiten"))
    assert similar.likeness(text, longer) < similar.ALIKE
