"What a check refuses, and what it says: by functions that are wrong in one way each."

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import REPO

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.classroom import check as check_module
from vlmrlhf_course.classroom.check import (
    CheckFailed,
    check,
    hint,
    note,
    overview,
    progress,
    statements,
)
from vlmrlhf_course.classroom.compare import difference
from vlmrlhf_course.classroom.items import exercise_of, mistakes_of, with_mistake
from vlmrlhf_course.classroom.outcome import LATE, outcome
from vlmrlhf_course.rl.advantages import gae, whiten
from vlmrlhf_course.rl.ppo import mean_and_deviation, ppo_policy_loss
from vlmrlhf_course.train.reward import swap_pictures


@pytest.fixture(autouse=True)
def own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMRLHF_PROGRESS", str(tmp_path / "progress.json"))


def refused(name, function) -> str:
    with pytest.raises(CheckFailed) as e:
        check(name, function)
    return str(e.value)


def test_the_library_s_own_pass(capsys):
    for function in (gae, whiten, ppo_policy_loss):
        check(function.__name__, function)
    assert capsys.readouterr().out.count("✓") == 3


@pytest.mark.parametrize("name", ["gae", "full_kl", "ppo_policy_loss", "group_advantages"])
def test_every_mistake_is_named(name):
    "By its own words; with where the first difference is, and how to get a hint."
    item = exercise_of(name)
    for mistake in mistakes_of(name):
        said = refused(name, with_mistake(item, mistake))
        assert f"This is exactly what comes out if {mistake.what}." in said
        assert said.startswith(f"{name}, case ") and f'hint("{name}")' in said


WRONG = {
    "another shape": (lambda x, mask, **k: whiten(x, mask, **k)[:1], "has shape (1, "),
    "another type": (lambda x, mask, **k: whiten(x, mask, **k).tolist(), "is a list; wanted: a"),
    "half of the digits": (lambda x, mask, **k: whiten(x, mask, **k).float(), "torch.float32"),
    "nothing": (lambda x, mask, **k: None, "is a NoneType"),
    "padding": (lambda x, mask, **k: whiten(x, mask, **k) + (~mask).double(), "this is padding"),
    "an error": (lambda x, mask, **k: 1 / 0, "ZeroDivisionError"),
    "in place": (lambda x, mask, **k: whiten(x, mask, **k) + 0 * x.add_(1), "changed in place"),
    "other arguments": (lambda y: y, "TypeError"),
}


@pytest.mark.parametrize("function, words", WRONG.values(), ids=WRONG)
def test_what_is_refused_and_why(function, words):
    assert words in refused("whiten", function)


def test_a_right_value_with_a_wrong_gradient():
    def detached(**arguments):
        value = ppo_policy_loss(**arguments)
        return value.detach() + 0 * arguments["logprobs"].sum()

    assert "the value is right, but the gradient of logprobs" in refused(
        "ppo_policy_loss", detached
    )


def test_a_gradient_where_none_may_be():
    def leaking(**arguments):
        old = arguments["old_logprobs"] * arguments["mask"]
        return ppo_policy_loss(**arguments) + (old - old.detach()).sum()

    def harmless(**arguments):
        return ppo_policy_loss(**arguments) + 0 * arguments["old_logprobs"].sum()

    assert "a gradient reaches old_logprobs" in refused("ppo_policy_loss", leaking)
    check("ppo_policy_loss", harmless)


class Equal:
    "Says of everything that it is the same."

    def __eq__(self, other):
        return True

    shape, dtype = (2, 3), torch.float64


def test_what_is_equal_to_everything_is_equal_to_nothing():
    for want in (1.0, 1, "a", True, None, torch.zeros(2, 3), [1.0], dict(a=1)):
        assert difference(want, Equal()) is not None


def test_what_is_not_written_yet_is_no_try():
    def stub(x, mask, **more):
        raise NotImplementedError  # your turn

    assert refused("whiten", stub) == "whiten: not written yet" and progress() == {}


def test_a_loop_that_does_not_end_is_stopped(monkeypatch):
    "Also where it catches all errors; and the clock is as it was."
    monkeypatch.setattr("vlmrlhf_course.classroom.outcome.SECONDS", 0.2)
    before = signal.getsignal(signal.SIGVTALRM)

    def hanging(x, mask, **more):
        while len(mask) > 1:
            try:
                x = x + 1
            except Exception:
                pass
        return whiten(x, mask, **more)

    assert ": took more than 0.2 s of computing" in refused("whiten", hanging)
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_the_clock_rings_again_for_who_does_not_listen(monkeypatch):
    monkeypatch.setattr("vlmrlhf_course.classroom.outcome.SECONDS", 0.1)

    def insisting(x, mask, **more):
        late = time.process_time() + 5
        try:
            while time.process_time() < late:
                pass
        except BaseException:
            while time.process_time() < late:
                pass
        return whiten(x, mask, **more)

    item = exercise_of("whiten")
    assert outcome(insisting, item, item.case(0, 0)).error.startswith(LATE)


def test_a_clock_that_somebody_else_uses_is_left_alone():
    "And in another thread, where Python takes no signals, a check works without one."
    signal.setitimer(signal.ITIMER_VIRTUAL, 1000)
    try:
        check("whiten", whiten)
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 900
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(check, "whiten", whiten).result()
        assert isinstance(pool.submit(check, "whiten", gae).exception(), CheckFailed)


def test_what_a_function_prints_is_shown_once(capsys):
    def talkative(x, mask, **more):
        print("shape", *x.shape)
        return whiten(x, mask, **more)

    check("whiten", talkative)
    said = capsys.readouterr().out
    assert said.count("shape") == 1 and said.count("is shown for case 1") == 1 and "✓" in said


def test_what_it_prints_in_the_case_that_fails_is_shown(capsys):
    def talkative(x, mask, **more):
        print("rows:", len(mask))
        return whiten(x, mask, **more) * (1 if mask.any(1).all() else 2)

    text = refused("whiten", talkative)
    assert "case 1 of" not in text and "It printed there: rows: " in text
    assert capsys.readouterr().out.count("rows:") == 1


def test_a_result_that_hangs_on_a_graph_is_refused():
    def attached(x, mask, **more):
        return whiten(x.requires_grad_(), mask, **more)

    assert "still hangs on a graph" in refused("whiten", attached)


def test_processes_are_told_apart_by_reduce():
    "Who never asks the others is refused, and told so."
    for name, function in (("whiten", whiten), ("mean_and_deviation", mean_and_deviation)):

        def alone(function=function, **arguments):
            return function(**arguments | dict(reduce=lambda t: t))

        assert "comes out if reduce is ignored" in refused(name, alone)


@pytest.mark.parametrize("name", ["whiten", "mean_and_deviation"])
def test_cases_can_be_sent_to_another_process(name):
    for number in range(exercise_of(name).cases):
        pickle.dumps(exercise_of(name).case(0, number))


def test_arguments_that_are_no_tensors_are_looked_at_too():
    def spoilt(rows):
        found = swap_pictures(rows)
        for row, other in zip(rows, found):
            row["image"] = other["image"]
        return found

    assert "rows is changed in place" in refused("swap_pictures", spoilt)


def test_tokens_are_named_only_where_an_index_is_a_token_s():
    mask = torch.tensor([[True, False], [True, True]])
    assert "row 0 has 1 token" in difference(torch.zeros(2, 2), torch.eye(2), mask=mask)
    assert "token" not in difference(torch.zeros(2, 5), torch.ones(2, 5), mask=mask)


def test_the_handed_out_cells_run_in_a_fresh_process(tmp_path):
    "In the order in which they stand: the first one imports the check, a solved one passes it."
    cells = json.loads((REPO / "exercises" / "07_advantages.ipynb").read_text())["cells"]
    first = next(c for c in cells if c["cell_type"] == "code")
    start = first["source"][0]
    assert "import case, check, hint" in start
    ask = next("".join(c["source"]) for c in cells if c["id"] == "check-gae")
    code = f"{start}\nfrom vlmrlhf_course.rl.advantages import gae\n{ask}\nhint('gae')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        f"✓ gae: {exercise_of('gae').cases} cases" in done.stdout
        and "gae, hint 1 of 3" in done.stdout
    )


def test_a_notebook_shows_the_message_and_no_traceback(tmp_path):
    "A traceback through the library would hide it: where the check raised helps nobody."
    code = "from vlmrlhf_course.classroom.check import check; check('gae', lambda **given: None)"
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--colors=NoColor", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"IPYTHONDIR": str(tmp_path)},
    )
    assert done.stdout.startswith("gae, case 1 of ") and done.returncode == 1, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_progress_counts_tries_and_keeps_what_was_done(capsys):
    check("gae", gae)
    refused("gae", whiten)
    refused("whiten", gae)
    hint("gae")
    hint("gae")
    assert progress()["gae"] == dict(done=True, tries=2, hints=2)
    assert progress()["whiten"] == dict(done=False, tries=1, hints=0)
    hints = statements()["gae"]["hints"]
    said = capsys.readouterr().out
    assert hints[0] in said and hints[1] in said and hints[2] not in said
    table = overview()
    checked = [name for name, said in statements().items() if not said["points"]]
    assert table.startswith(f"**1 of {len(checked)} done**") and "✓" in table
    assert "| 1 try |" in table


def test_a_written_exercise_has_hints_and_is_done_by_nobody(capsys, monkeypatch):
    "It stands in the overview as written, whatever the record of progress says."
    said = dict(chapter="07_small", number="E9", minutes=5, stars=2, hints=["Think."], points=4)
    checked = statements()["gae"]
    monkeypatch.setattr(check_module, "statements", lambda: dict(gae=checked, E9=said))
    hint("E9")
    assert "E9, hint 1 of 1: Think." in capsys.readouterr().out
    note("E9", done=True)
    table = overview()
    assert table.startswith("**0 of 1 done**; 1 more are written answers")
    row = "| [07_small](07_small.ipynb) | E9 | written | 5 min | ★★ | 4 | a person marks it |"
    assert row in table and "Next: 7.1 `gae` in [07_advantages]" in table
    assert "✓" not in table


def test_a_broken_record_of_progress_is_said_and_kept(tmp_path):
    file = tmp_path / "progress.json"
    for text in ("{", json.dumps([1])):
        file.write_text(text)
        with pytest.raises(UserError, match="no record of progress; move it away"):
            progress()
        assert file.read_text() == text
