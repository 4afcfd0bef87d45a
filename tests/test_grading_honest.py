"""Honest work that looks odd, and a grader that is stopped, called elsewhere, or asked again."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import REPO
from test_grading import handed_in, reference
from test_grading_mail import said_once  # noqa: F401  each test hears every line

from vlmrlhf_course.base.files import MARK
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.classroom.editions import ALONE
from vlmrlhf_course.classroom.outcome import kept_statements, tree_of
from vlmrlhf_course.classroom.register import check_file
from vlmrlhf_course.grading import feedback, sandbox, similar
from vlmrlhf_course.grading.grade import mark_of, remedy
from vlmrlhf_course.grading.gradebook import compare_settings, digest_for
from vlmrlhf_course.grading.jail import Limits
from vlmrlhf_course.grading.sandbox import Closed, Sandbox, choose

OWN_TABLE = """%matplotlib inline
KINDS = {}
KINDS["k1"] = lambda d: d
KINDS["k2"] = lambda d: d * d / 2
KINDS["k3"] = lambda d: torch.expm1(-d) + d

def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    if kind not in ("k1", "k2", "k3"):
        raise ValueError(kind)
    return KINDS[kind](logprobs - ref_logprobs)

check("kl_estimate", kl_estimate)
"""
NAME = "kl_estimate"


@pytest.fixture(scope="module")
def box():
    with Sandbox(choose(), Limits(seconds=3)) as box:
        yield box


@pytest.fixture
def book(tmp_path, monkeypatch):
    "A notebook of this text and its check, as `vlmrlhf check` reads it."
    monkeypatch.setenv("VLMRLHF_PROGRESS", str(tmp_path / "progress.json"))

    def made(text: str) -> Path:
        path = handed_in(tmp_path / "8.ipynb", {NAME: text})
        found = json.loads(path.read_text("utf-8"))
        asks = [dict(found["cells"][0], id="c", source=f'check("{NAME}", {NAME})')]
        asks.append(dict(asks[0], id="d", source='check("full_kl", full_kl)'))
        asks.append(dict(asks[0], id="exercise-full-kl", source=reference("full_kl")))
        path.write_text(json.dumps(found | dict(cells=found["cells"] + asks)), "utf-8")
        return path

    return made


# --- honest cells ---------------------------------------------------------------------------------


def test_a_dict_of_one_s_own_and_notebook_lines_cost_nothing(box):
    mark = mark_of(NAME, [OWN_TABLE], box, seed=1)
    assert mark.status == "right" and mark.points
    assert "%matplotlib inline" in mark.why and "check(" in mark.why


@pytest.mark.parametrize(
    "text",
    ["REWARDS['x'] = f", "A = REWARDS\nA['x'] = f", "A = {}\nA = B.c\nA['x'] = f", "a.b['x'] = f"],
)
def test_what_is_the_library_s_is_not_changed(text):
    kept = kept_statements(tree_of(text).body)
    assert len(kept) == text.count("\n"), "all but the last line"


@pytest.mark.parametrize(
    "line, helps",
    [
        ("import matplotlib.pyplot as plt", "plots belong in another cell"),
        ("x = helper(1)", "graded alone: move what it needs"),
        ("x = float(input())", "leave input() out"),
        ("x = open('weights.json')", "no files are there"),
    ],
)
def test_an_honest_cell_that_does_not_run_hears_what_helps(box, line, helps):
    mark = mark_of(NAME, [f"{line}\n{reference(NAME)}"], box, seed=1)
    assert mark.status == "does not run" and helps in mark.why
    assert not remedy("ValueError: no")


def test_an_error_names_no_place_of_this_machine(box):
    text = "import sys, os\nraise ValueError(str(sys.orig_argv) + str(sys.argv) + os.__file__)"
    mark = mark_of(NAME, [text], box, seed=1)
    assert "ValueError" in mark.why and "os.py" in mark.why
    for place in (sys.base_prefix, str(box.folder), "serve("):
        assert place not in mark.why


@pytest.mark.parametrize(
    "line", ["1 / 0", "input()", "exit()", "import pandas as pd", "plt.plot()"]
)
def test_the_command_s_check_goes_on_after_a_cell_that_does_not_run(book, capsys, line):
    assert not check_file(book(f"{line}\n{reference(NAME)}"))
    said = capsys.readouterr().out.splitlines()
    assert [text[:1] for text in said if text[:1] in "✗✓"] == ["✗", "✓"], said


def test_the_command_s_check_reads_what_a_grader_reads(book, capsys):
    "The exercise's own cell; neither a later one, nor the check within it."
    assert check_file(book(OWN_TABLE))
    path = book("def kl_estimate(*a, **k):\n    return 1")
    found = json.loads(path.read_text("utf-8"))
    later = dict(found["cells"][0], id="later", source=reference(NAME))
    path.write_text(json.dumps(found | dict(cells=[*found["cells"], later])), "utf-8")
    assert not check_file(path)


def test_every_hand_out_says_that_cells_are_graded_alone():
    for path in sorted((REPO / "exercises").glob("*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        coded = path.stem == "00_index" or any(c["id"].startswith("exercise-") for c in cells)
        assert (ALONE in "".join(cells[0]["source"])) == coded, path.stem


# --- what looks alike -----------------------------------------------------------------------------


def test_copies_are_seen_through_dead_lines_and_padding(capsys):
    text = reference("gae")
    dead = text.rstrip("\n") + "\n    raise NotImplementedError  # your turn\n"
    dead += "    for one in range(9):\n        print(one, [one, one], one * 2 + one, dict(a=one))\n"
    padded = text + "\n#" + " " * 30_000 + "\n" + " \n" * 30_000
    long = text + "\nx = '" + "a" * 30_000 + "'"
    given = dict(anna=text, dead=dead, padded=padded, long=long, magic="%time\n" + text)
    given["the library"] = text
    texts = {name: similar.written(dict(gae=one)) for name, one in given.items()}
    assert all(texts.values())
    found = similar.similar(texts)
    pairs = {(row["one"], row["other"]) for row in found if row.get("likeness")}
    for name in ("dead", "padded", "magic", "the library (a student)", "the library"):
        assert ("anna", name) in pairs
    assert [row["one"] for row in found if "not compared" in row["other"]] == ["long"]
    stub = text[: text.index('    "')] + "    'No.'\n    raise NotImplementedError\n    return 1"
    assert not similar.written(dict(gae=stub))


# --- the command, again and elsewhere -------------------------------------------------------------


def test_limits_decide_about_grading_again():
    made = [
        digest_for({}, [], 1, Limits(seconds=n, megabytes=m)) for n, m in ((1, 9), (2, 9), (1, 8))
    ]
    assert len(set(made)) == 3


def test_points_do_not_change_with_the_folder(tmp_path, capsys):
    now = dict(settings="/a/settings.ini", points=dict(gae=4), limits=[10])
    compare_settings(tmp_path, {}, now)
    compare_settings(tmp_path, now, now | dict(settings=""))
    with pytest.raises(
        UserError, match="with /a/settings.ini, now with no settings.ini: gae 4 → 2"
    ):
        compare_settings(tmp_path, now, dict(settings="", points=dict(gae=2), limits=[10]))
    with pytest.raises(UserError, match=r"limits \[10\] → \[3\]"):
        compare_settings(tmp_path, now, now | dict(settings="", limits=[3]))
    compare_settings(tmp_path, now, now | dict(points=dict(gae=5)))
    assert "other points than in the last run: gae 4 → 5" in capsys.readouterr().err


def test_pages_of_nobody_are_named_and_left(tmp_path, capsys):
    one = dict(student="anna", assignment="exercises", troubles=[], items=[])
    feedback.write_pages(tmp_path, [one, one | dict(student="bert")])
    feedback.write_pages(tmp_path, [one])
    said = capsys.readouterr().err
    assert "1 pages of an earlier run" in said and "bert.html" in said
    assert (tmp_path / "feedback" / "bert.html").exists()


def test_a_kit_that_a_kill_has_left_is_swept(tmp_path, monkeypatch):
    "But one in use is not, nor what only has the name."
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    left, other = tmp_path / ".part-vlmrlhf-kit-12345678", tmp_path / ".part-vlmrlhf-kit-mine"
    for folder in (left, other):
        (folder / "kit").mkdir(parents=True)
    (left / MARK).touch()
    (left / "torch").symlink_to(tmp_path)
    with Sandbox(choose("trusted")) as first, Sandbox(choose("trusted")) as second:
        assert first.folder.exists() and second.folder.exists() and not left.exists()
    assert sorted(tmp_path.iterdir()) == [other]


def test_a_closed_sandbox_starts_nothing():
    with Sandbox(choose("trusted")) as box:
        pass
    with pytest.raises(Closed):
        box.query({}, b"")
    assert box.server is None


def test_ctrl_c_ends_it_soon_and_keeps_what_is_done(tmp_path):
    mail, out = tmp_path / "mail", tmp_path / "out"
    handed_in(mail / "anna" / "8.ipynb", {NAME: reference(NAME)})
    for name in ("bert", "cleo", "dora", "emil"):
        handed_in(mail / name / "8.ipynb", {NAME: "while True: pass"})
    (tmp_path / "settings.ini").write_text("[exercises]\nseconds = 100\n")
    words = ["grade", str(mail), "--out", str(out), "--jobs", "1", "--chapters", "08_kl"]
    command = [sys.executable, "-m", "vlmrlhf_course.cli", *words]
    # Whoever has started pytest in the background lets it ignore Ctrl-C, and children inherit that.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    more = dict(stderr=subprocess.PIPE, env=os.environ, preexec_fn=hears)
    run = subprocess.Popen(command, cwd=tmp_path, **more)
    try:
        late = time.monotonic() + 120
        while not list(out.glob("results/anna*")) and time.monotonic() < late:
            time.sleep(0.1)
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        asked = time.monotonic()
        said = run.communicate(timeout=60)[1].decode()
    finally:
        run.kill()
    busy = max(1, os.getloadavg()[0] / (os.cpu_count() or 1))  # others work on this machine, too
    assert time.monotonic() - asked < 3 * busy
    assert run.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert [path.name for path in (out / "results").iterdir()] == ["anna__exercises.json"]
