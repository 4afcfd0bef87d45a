"""What a command meets before it computes: launchers, other processes, arms."""

import fcntl
import os
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import kill
import pytest
from commands import plain_environment, refused
from conftest import REPO
from torch.distributed import HashStore

from vlmrlhf_course.arms import Arm, _start_arm, new_process
from vlmrlhf_course.base import launch, runs
from vlmrlhf_course.base.folders import claim
from vlmrlhf_course.base.settings import OTHER_LAUNCHERS, UserError
from vlmrlhf_course.cli import main
from vlmrlhf_course.train import sft

STEPS = ["--set", "sft.projector.steps=1", "sft.language.steps=1"]
SMOKE = ["--scale", "smoke"]
STARTED = []  # processes; none outlives its test


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    "No test hangs, none sees what launchers have set, and its processes end with it."
    with plain_environment(monkeypatch, *TWO):
        yield
    while STARTED:
        ends(STARTED.pop(), 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The folder of a run whose SFT is done, in a few seconds."
    folder = tmp_path_factory.mktemp("made") / "run"
    process = kill.Forked(["sft", *SMOKE, "--out", folder, *STEPS], folder.with_suffix(".log"))
    assert process.wait() == 0, process.said()
    return folder


@contextmanager
def held(folder):
    "Hold the lock of a folder, as another process would that makes its stage."
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # for the processes, too, that inherit it
        os.close(descriptor)


TWO = dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "PMI_SIZE")
TIMES = ("VLMRLHF_TIMEOUT", "VLMRLHF_MEETING")
NO_NUMBERS = [(TWO | {k: v}, k) for k in (*COUNTS, *TIMES) for v in ("", "two", "-3", "nan")]
INFINITE = [(TWO | {name: "inf"}, name) for name in COUNTS]
ENDLESS = [(TWO | {name: value}, name) for name in TIMES for value in ("inf", "1e300")]
LACKING = [({k: v for k, v in TWO.items() if k != name}, name) for name in [*TWO][1:]]
OTHERS = [({name: "2"}, name) for name in OTHER_LAUNCHERS]


@pytest.mark.parametrize(
    "env, word",
    [
        *NO_NUMBERS,
        *INFINITE,
        *ENDLESS,
        *LACKING,
        *OTHERS,
        (dict(RANK="abc"), "RANK"),
        (dict(RANK="1"), "no WORLD_SIZE"),
        (TWO | dict(RANK="2"), "RANK=2"),
        (dict(VLMRLHF_TIMEOUT="0"), "TIMEOUT"),
        (TWO | dict(PMI_SIZE="3"), "PMI_SIZE=3"),
        (TWO | dict(MASTER_PORT="65536"), "MASTER_PORT"),
        (TWO | dict(MASTER_ADDR=""), "MASTER_ADDR"),
    ],
)
def test_launcher_variables(capsys, tmp_path, monkeypatch, env, word):
    "Is a variable that is empty, no number, or at odds with another named at once?"
    monkeypatch.setattr(launch, "peers", lambda: pytest.fail("nobody looked at the environment"))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    line = refused(capsys, "sft", *SMOKE, "--out", tmp_path / "out")
    assert word in line and "unset" in line and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "env, counts",
    [
        (dict(ONEDNN_DEFAULT_FPMATH_MODE="bf16"), True),
        (dict(XLA_USE_BF16="1"), True),
        (dict(NVIDIA_TF32_OVERRIDE="1"), True),
        (dict(ATEN_CPU_CAPABILITY="avx2"), True),
        (dict(ACCELERATE_MIXED_PRECISION="NO"), False),
        (dict(NVIDIA_TF32_OVERRIDE="0"), True),
        (dict(ONEDNN_DEFAULT_FPMATH_MODE=""), False),
        (dict(ACCELERATE_DYNAMO_BACKEND="no"), False),
        (dict(VLMRLHF_QUIET="1"), False),
        (dict(ACCELERATE_DYNAMO_MODE="default"), False),
    ],
)
def test_variables_on_record(tmp_path, monkeypatch, env, counts):
    "Does a stage's record hold what changes its numbers, and nothing else?"
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert launch.environment() == (env if counts else {})
    assert ("environment" in runs.Run(tmp_path, "smoke").uses("sft")) == counts


@pytest.mark.parametrize("name", ["ACCELERATE_MIXED_PRECISION", "ONEDNN_DEFAULT_FPMATH_MODE"])
def test_results_made_under_other_variables(capsys, made, tmp_path, monkeypatch, name):
    "Is a stage refused that was made with, or without, what changes its numbers?"
    monkeypatch.setenv(name, "no" if name.startswith("ACC") else "")
    assert main(["sft", *SMOKE, "--out", str(made), *STEPS]) == 0
    monkeypatch.setenv(name, "bf16")
    assert name in refused(capsys, "sft", *SMOKE, "--out", made, *STEPS)
    argv = ["sft", *SMOKE, "--out", tmp_path / "out", *STEPS]
    monkeypatch.setattr(sft, "train_sft", lambda *a: sys.exit("begun, and that is enough"))
    assert kill.Forked(argv, tmp_path / "log").wait() == 1
    monkeypatch.delenv(name)
    assert name in refused(capsys, *argv)


@pytest.mark.parametrize(
    "name, value",
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_DYNAMO_BACKEND", "rocket"),
        ("ACCELERATE_MIXED_PRECISION", "bf17"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_TORCH_DEVICE", "rocket"),
    ],
)
def test_what_accelerate_cannot_read(tmp_path, name, value):
    "Is a value that does not exist, or needs what is not there, refused in one line that names it?"
    argv = ["sft", *SMOKE, "--out", tmp_path / "out", *STEPS]
    process = kill.Forked(argv, tmp_path / "log", **{name: value})
    assert process.wait() == 2 and f"{name}={value}" in process.said()[-1], process.said()


def quicken(monkeypatch, beat, silence):
    "Let signs of life come more often than for users; forked processes inherit that."
    monkeypatch.setattr(launch, "BEAT", beat)
    monkeypatch.setattr(launch, "SILENCE", silence)


@pytest.fixture
def pair(monkeypatch):
    "Two peers in one process, and what each was told about the loss of the other."
    quicken(monkeypatch, 0.05, 1.0)
    store = HashStore()
    told = [], []
    both = [launch.Peers(rank, 2, store, told[rank].append) for rank in (0, 1)]
    yield both, told
    for peer in both:
        peer.left.set()


def watched(peer):
    "Start a peer's signs of life."
    thread = threading.Thread(target=peer.watch, daemon=True)
    thread.start()
    return thread


def shared(peer, values):
    "What a peer gets of three decisions, of which the second is an error."

    def decide(value):
        time.sleep(0.1)
        return value or claim(Path(__file__))  # which is no folder

    got = []
    for value in values:
        try:
            got.append(peer.share(lambda: decide(value)))
        except UserError as e:
            got.append(str(e))
    return got


def test_shared_decisions(pair):
    "Does each process get what the main one decides, in order, and its errors?"
    (first, second), _ = pair
    others = []
    thread = threading.Thread(target=lambda: others.extend(shared(second, ["never asked"] * 3)))
    thread.start()
    mine = shared(first, [True, None, dict(a=[1])])
    thread.join(10)
    assert mine == others == [True, f"{__file__}: not a folder; choose another --out", dict(a=[1])]


@pytest.mark.parametrize("silence", [1, 1000])
def test_a_peer_that_stopped(pair, monkeypatch, silence):
    "Is an end with an error noticed at once, and told from silence?"
    quicken(monkeypatch, 0.05, silence)
    (first, second), (told, _) = pair
    second.leave(well=False)
    watched(first).join(20)
    assert told == ["process 1 ended with an error"]


@pytest.mark.parametrize("alive", [0, 2.5])
def test_a_peer_that_falls_silent(pair, alive):
    "Is a process lost that gives no sign of life any more, or never did, and not before?"
    (first, second), (told, _) = pair
    watcher = watched(first)
    if alive:
        beats = watched(second)
        time.sleep(alive)
        assert told == [], "it gave signs of life, longer than a silence may be"
        second.left.set()  # without a goodbye
        beats.join(10)
    start = time.monotonic()
    watcher.join(20)
    assert told == ["no sign of life from process 1 for 1 s"] and time.monotonic() - start > 0.7


def test_a_peer_that_left_well(pair):
    "May one process be ready long before the other?"
    (first, second), (told, told_second) = pair
    watchers = [watched(first), watched(second)]
    second.leave(well=True)
    time.sleep(2)
    assert told == [] and watchers[0].is_alive()
    start = time.monotonic()
    first.leave(well=True)  # the host of the store waits only for those who are still there
    watchers[0].join(10)
    assert time.monotonic() - start < 5
    assert told == told_second == []


def test_a_store_that_fails(pair):
    "Does a process whose store is gone count the host as lost, and say goodbye without an error?"
    (_, second), (_, told) = pair
    second.store = None  # or what else cannot be asked
    watched(second).join(20)
    assert told == ["'NoneType' object has no attribute 'set'"]
    second.leave(well=True)


def start(folder, verb, ranks=(0, 1), overrides=(), **env):
    "Processes of a run, as torchrun would start them."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        where = TWO | dict(MASTER_PORT=str(s.getsockname()[1]))
    argv = [verb, *SMOKE, "--out", folder, *STEPS, *overrides]
    for rank in map(str, ranks):
        env |= dict(RANK=rank, LOCAL_RANK=rank)
        STARTED.append(kill.Forked(argv, folder.with_suffix(f".{rank}"), **where | env))
    return STARTED[-len(ranks) :]


def ends(process, limit=60):
    "The status of a process; None, and it is killed, where it does not end in time."
    late = time.monotonic() + limit
    while process.poll() is None and time.monotonic() < late:
        time.sleep(0.05)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return None
    return process.returncode


def waits(process, folder):
    "Has a process opened a folder to lock it, besides what it inherits from this one?"
    try:
        opened = list(map(os.path.realpath, Path(f"/proc/{process.pid}/fd").iterdir()))
    except FileNotFoundError:  # it closed a file meanwhile: whoever waits asks again
        return False
    return opened.count(str(folder)) > 1


def lost(process, *words):
    "Does a survivor end with status 3 and one line?"
    assert ends(process) == 3, process.said()
    line = process.said()[-1]
    assert "another process of this run is gone or stuck" in line and "continues" in line, line
    assert all(word in line for word in words) and "Traceback" not in process.log.read_text()


def test_one_never_comes(tmp_path):
    "Does a process that waits for another one at the start give up after VLMRLHF_MEETING?"
    began = time.monotonic()
    for process in [
        *start(tmp_path / "a", "sft", [0], VLMRLHF_MEETING="5"),
        *start(tmp_path / "b", "sft", [1], VLMRLHF_MEETING="5"),
    ]:
        lost(process, "VLMRLHF_MEETING")
    assert time.monotonic() - began < 35, "less than without VLMRLHF_MEETING"


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", ["preferences", "lock"])
def test_one_is_killed_while_they_do_not_talk(made, tmp_path, monkeypatch, moment, victim):
    "Does the survivor end soon, also in a stage made alone and while it waits for a lock?"
    assert 1 < launch.BEAT < launch.SILENCE < 50, "the survivor has a minute"
    quicken(monkeypatch, 0.5, 8.0)
    folder = tmp_path / "run"
    shutil.copytree(made / "sft", folder / "sft")
    stage = folder / "preferences"
    begun = stage / "begun.json"
    with held(stage if moment == "lock" else tmp_path / "nothing"):
        both = start(folder, "preferences", overrides=["preferences.prompts=3000"])
        moments = dict(lock=lambda: waits(both[0], stage), preferences=begun.exists)
        assert kill.wait_until(moments[moment], both[1]), both[1].said()
        os.kill(both[victim].pid, signal.SIGKILL)
        lost(both[1 - victim])
        both[victim].wait()


def test_both_wait_for_their_turn(made, tmp_path, monkeypatch):
    "Do both processes wait for a lock, longer than any limit on talking, and find the stage done?"
    quicken(monkeypatch, 0.5, 5.0)
    folder = tmp_path / "run"
    with held(folder / "sft"):
        both = start(folder, "sft", VLMRLHF_TIMEOUT="2")
        assert kill.wait_until(lambda: waits(both[0], folder / "sft"), both[1]), both[1].said()
        time.sleep(8)
        assert [p.poll() for p in both] == [None, None], [p.said() for p in both]
        shutil.copytree(made / "sft", folder / "sft", dirs_exist_ok=True)
    assert [ends(p) for p in both] == [0, 0], [p.said() for p in both]
    assert "sft: done" in " ".join(both[0].said()) and both[1].said() == []


@pytest.mark.parametrize("verb", ["sft", "preferences"])
def test_other_settings_do_not_wait(capsys, made, tmp_path, verb):
    "Is a command with other settings refused at once where another process is at work?"
    shutil.copytree(made / "sft", tmp_path / "run" / "sft")
    stage = tmp_path / "run" / "sft"
    os.replace(stage / "done.json", stage / "begun.json")
    signal.alarm(10)
    with held(stage):
        assert main([verb, *SMOKE, "--out", str(stage.parent), *STEPS, "sft.language.steps=7"]) == 2
    assert "sft.language" in capsys.readouterr().err.splitlines()[-1]


def test_an_arm_minds_its_own_settings(tmp_path, monkeypatch):
    "Does it import nothing from here, keep its run's settings, and is it heard without a log?"
    (tmp_path / "mine.yaml").write_text("ppo: {iterations: 3}\n")
    run = runs.Run(tmp_path / "out", "mine.yaml")
    (tmp_path / "mine.yaml").unlink()
    run.layers["ppo"]["clpi"] = 0.1  # named by the arm, if these are what it reads
    for module in ("random", "torch", "vlmrlhf_course"):
        (tmp_path / f"{module}.py").write_text(f"open('imported-{module}', 'w').close()\n")
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f":{tmp_path}/link:{tmp_path}:{REPO}")
    monkeypatch.setattr(Path, "mkdir", lambda *a, **k: None)  # so that there is no place for a log
    arm = _start_arm(run, "ppo", "oracle", ["--scale", "mine.yaml"])
    monkeypatch.undo()
    assert arm.wait() == 2 and "ppo.clpi" in arm.said()[-1], arm.said()
    assert [f.name for f in tmp_path.glob("imported-*")] == [] and not (tmp_path / "out").exists()


def test_what_an_arm_says(tmp_path):
    "Are its last thousand lines remembered, and all in its log, where that can be written?"
    text = "import os\nfor i in range(1500): os.write(2, b'%d\\n' % i)\nos.write(2, b'\\xff')"
    (tmp_path / "place").mkdir()
    for log in (tmp_path / "nowhere" / "log", tmp_path / "place" / "log"):
        arm = Arm(new_process([sys.executable, "-c", text], dict(os.environ)), log)
        assert arm.wait() == arm.returncode == 0
        assert arm.said() == [*map(str, range(501, 1500)), "\ufffd"]
    assert log.read_bytes().splitlines() == [*(str(i).encode() for i in range(1500)), b"\xff"]
