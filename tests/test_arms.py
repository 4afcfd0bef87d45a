"Which stages are made next, where several processes make them: those that have all they need."

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlmrlhf_course import arms as module
from vlmrlhf_course.arms import Arm, Arms, Copy, end_with_parent, may_copy
from vlmrlhf_course.base.metrics import progress
from vlmrlhf_course.base.settings import UserError

NEEDS = {
    "sft": set(),
    "preferences": {"sft"},
    "reward": {"sft", "preferences"},
    "second": {"sft", "preferences"},
    "dpo": {"sft", "preferences"},
    "ppo": {"sft", "preferences", "reward", "second"},
}


@pytest.fixture
def arms(tmp_path, monkeypatch):
    "Of a run in which nothing is made; who is started is noted, and never ends."
    run = SimpleNamespace(path=lambda name: tmp_path / name, used={name: {} for name in NEEDS})
    run.used["ppo"] = dict(iterations=24)
    child = SimpleNamespace(poll=lambda: None)
    monkeypatch.setattr(module, "_start_arm", lambda *args: child)
    return Arms(run, dict.fromkeys(NEEDS, "verb"), NEEDS, [])


@pytest.fixture
def seen(monkeypatch):
    "Somebody looks at the bars."
    for name in ("IN_TEST", "VLMRLHF_QUIET"):
        monkeypatch.delenv(name, raising=False)


def make(arms, name):
    (arms.run.path(name)).mkdir()
    (arms.run.path(name) / "done.json").write_text("{}")


def test_a_stage_is_ready_when_all_is_there_that_it_needs(arms):
    assert arms.ready() == ["sft"]
    make(arms, "sft")
    assert arms.ready() == ["sft", "preferences"]
    make(arms, "preferences")
    make(arms, "reward")
    assert "ppo" not in arms.ready(), "it needs the second one, too"
    make(arms, "second")
    assert "ppo" in arms.ready()


def test_what_one_takes_no_other_makes(arms):
    common = ["sft", "preferences", "reward", "second"]
    assert arms.take(common) == "sft" and arms.take(common) is None
    make(arms, "sft")
    assert arms.take(common) == "preferences"
    make(arms, "preferences")
    arms.start(1)
    assert list(arms.running) == ["reward"] and arms.take(common) == "second"
    arms.start(1)  # no more than one at once
    assert list(arms.running) == ["reward"]
    arms.start(2)
    assert list(arms.running) == ["reward", "dpo"] and arms.waiting == ["ppo"]


def test_what_is_there_is_not_made_again(tmp_path):
    run = SimpleNamespace(path=lambda name: tmp_path / name, used={name: {} for name in NEEDS})
    for name in ("sft", "preferences"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "done.json").write_text("{}")
    arms = Arms(run, dict.fromkeys(NEEDS, "verb"), NEEDS, [])
    assert arms.ready() == ["reward", "second", "dpo"]


def test_one_bar_names_what_is_made_and_how_much_there_is(arms, seen, monkeypatch, capsys):
    "Of what has no iterations, such as DPO alone, there is a total, too."
    monkeypatch.setattr(module.time, "sleep", lambda seconds: step())
    arms.waiting, arms.sizes = ["dpo", "ppo"], dict(dpo=1, ppo=24)
    for name in NEEDS["ppo"]:
        make(arms, name)
    rounds = iter(range(3))

    def step():
        at = next(rounds, None)
        if at == 0:
            arms.run.path("ppo").mkdir()
            (arms.run.path("ppo") / "metrics.jsonl").write_text("{}\n" * 7)
            assert list(map(arms.made, arms.sizes)) == [0, 7]
        if at == 1:
            make(arms, "dpo")
            del arms.running["dpo"]
        if at == 2:
            (arms.run.path("ppo") / "done.json").write_text("{}")
            arms.running.clear()

    arms.finish(2)
    said = capsys.readouterr().err
    assert "training: dpo, ppo:" in said and "8/25" in said and "25/25" in said


@pytest.mark.parametrize("items", [range(0), []])
def test_no_bar_where_nothing_is_to_be_done(items, seen, capsys):
    assert list(progress(items, "training", "step")) == []
    assert not capsys.readouterr().err


def test_a_bar_goes_on_where_the_work_does(seen, capsys):
    assert list(progress(range(8, 10), "training: ppo", "iteration")) == [8, 9]
    said = capsys.readouterr().err
    assert "8/10" in said and "10/10" in said and "iteration" in said and "0/2" not in said


def test_what_becomes_ready_meanwhile_is_started(arms, monkeypatch):
    "While this process makes one stage, another that is ready does not wait for it."
    for name in ("sft", "preferences"):
        make(arms, name)
    arms.waiting = ["second", "dpo", "ppo"]
    child, ends = SimpleNamespace(returncode=0), iter([None, None, 0])
    child.poll = lambda: next(ends, None)
    monkeypatch.setattr(module, "_start_arm", lambda *args: child)
    with arms.meanwhile(1):
        assert list(arms.running) == ["second"]
        until(lambda: list(arms.running) == ["dpo"])
    assert arms.waiting == ["ppo"]


def test_what_stops_meanwhile_is_said_at_the_end(arms, monkeypatch):
    arms.waiting = ["sft"]
    child = SimpleNamespace(poll=lambda: 2, returncode=2, said=lambda: ["vlmrlhf: no such pair"])
    monkeypatch.setattr(module, "_start_arm", lambda *args: child)
    with pytest.raises(UserError, match=r"^no such pair$"), arms.meanwhile(1):
        until(lambda: not arms.running)
        made = True
    assert made, "the stage that is made here is not lost"


def test_who_waits_works_where_a_core_is_spare(arms, monkeypatch):
    "Told which stages are not there yet; and not while as many are made as can be."
    for name in ("sft", "preferences", "reward"):
        make(arms, name)
    arms.waiting = ["second", "dpo"]
    ends = dict(dpo=iter([None] * 2 + [0] * 9), second=iter([None] * 5 + [0] * 9))

    def start(run, verb, name, options):
        return SimpleNamespace(returncode=0, poll=lambda: next(ends[name]))

    monkeypatch.setattr(module, "_start_arm", start)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    asked = []
    arms.finish(2, asked.append)
    assert asked and all(unfinished == {"second"} for unfinished in asked)


# --- copies ---------------------------------------------------------------------------------------


def until(seen):
    end = time.time() + 20
    while not seen():
        assert time.time() < end
        time.sleep(0.05)


def command(words):
    "In the place of `vlmrlhf`, in a copy."
    print(*words, os.environ.get("MINE"), file=sys.stderr)
    if words[0] == "stay":
        end_with_parent()
        time.sleep(100)
    if words[0] == "fail":
        raise RuntimeError("as asked")
    print("nobody reads this")
    return 7


def told(copy, log, *words):
    assert copy.told(words, dict(MINE="é"))
    return Arm(copy, log)


def test_a_copy_does_what_it_is_told(tmp_path):
    "With the environment it is given and no other; what it says is heard, and in its log."
    arm = told(Copy(command, []), tmp_path / "log", "ppo", "--arm")
    assert arm.wait() == arm.poll() == arm.returncode == 7
    assert arm.said() == ["ppo --arm é"] and (tmp_path / "log").read_text() == "ppo --arm é\n"
    arm = told(Copy(command, []), tmp_path / "log", "fail")
    assert arm.wait() == 1 and arm.said()[-1] == "RuntimeError: as asked"


def test_copies_end_when_nobody_tells_them_anything(tmp_path):
    "One that works ends as an arm does; none keeps another one's pipe open."
    copies = []
    for _ in range(3):
        copies.append(Copy(command, copies))
    arm = told(copies[0], tmp_path / "log", "stay")
    until(lambda: arm.lines)
    try:
        for copy in copies:
            copy.stdin.close()
        until(lambda: None not in [copy.poll() for copy in copies])
    finally:
        for copy in copies:
            copy.terminate()
    assert [copy.wait() for copy in copies] == [3, 0, 0]
    assert "has ended" in arm.said()[-1]


def test_a_copy_that_waits_leaves_ctrl_c_to_the_run(tmp_path):
    copy = Copy(command, [])
    os.kill(copy.pid, signal.SIGINT)
    time.sleep(0.2)
    assert copy.poll() is None and told(copy, tmp_path / "log", "ppo").wait() == 7
    copy = Copy(command, [])
    copy.terminate()
    assert copy.wait() == -signal.SIGTERM
    copy.terminate()  # it is gone, and its number may be somebody else's


def test_a_copy_that_is_gone_cannot_be_told():
    copy = Copy(command, [])
    os.kill(copy.pid, signal.SIGKILL)
    until(lambda: not copy.told(["ppo"], {}))
    assert copy.poll() == -signal.SIGKILL


def run_of(tmp_path):
    return SimpleNamespace(folder=tmp_path, path=lambda name: tmp_path / name, seed=0, layers={})


def test_an_arm_is_a_copy_where_one_waits(tmp_path, monkeypatch):
    "One that was killed is passed over; where none is left, an arm is a new process."
    run = run_of(tmp_path)
    run.used = dict.fromkeys("abcd", {})
    monkeypatch.setattr(module, "new_process", lambda *given: subprocess.Popen("false"))
    with Arms(run, dict.fromkeys("abcd", "ppo"), dict.fromkeys("abcd", ()), [], command) as arms:
        waiting = [copy.pid for copy in arms.idle]
        os.kill(waiting[1], signal.SIGKILL)
        until(lambda: arms.idle[1].poll() is not None)
        arms.start(2)
        used = [arms.running[name].child.pid for name in "ab"]
        left = arms.idle
    assert used == [waiting[0], waiting[2]] and [copy.poll() for copy in left] == [-15]
    assert run.path("a").is_dir() and len(waiting) == 4


def test_no_copy_is_made_beside_threads():
    assert may_copy() or sys.platform != "linux" or threading.active_count() > 1
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    assert not may_copy()
    over.set()
    thread.join()


PARENT = """
import time
import vlmrlhf_course
from vlmrlhf_course.arms import Copy
copies = []
for _ in range(2):
    copies.append(Copy(lambda words: time.sleep(100), copies))
print(*(copy.pid for copy in copies), flush=True)
time.sleep(100)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
def test_copies_that_wait_end_with_a_run_that_is_killed():
    env = os.environ | dict(PYTHONPATH=str(Path(module.__file__).parents[1]))
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=env)
    copies = [int(pid) for pid in parent.stdout.readline().split()]
    assert all(map(alive, copies))
    parent.kill()
    parent.wait()
    until(lambda: not any(map(alive, copies)))


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
