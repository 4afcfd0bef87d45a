"What makes a run quicker changes nothing of it: copies of a process measure, and who loads a \
stage that is done asks for what that needs."

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import vlmrlhf_course
from vlmrlhf_course.base.launch import in_copies
from vlmrlhf_course.base.stages import config_of
from vlmrlhf_course.pipeline import obtain, reopen
from vlmrlhf_course.report import evaluate
from vlmrlhf_course.report.evaluate import Policies, compare


@pytest.fixture(scope="module")
def run(smoke_run):
    return reopen(smoke_run)


@pytest.fixture(scope="module")
def who(run):
    arms = {name: obtain(run, name) for name in ("ppo_rm", "dpo")}
    return Policies(obtain(run, "sft"), obtain(run, "reward"), arms, "ppo_rm")


def test_a_finished_arm_is_loaded_without_its_preferences(run, who):
    "Nor without the model that has chosen it: nobody asks for them any more."
    assert {"sft", "reward", "ppo_rm", "dpo"} <= run.kept.keys()
    assert not {"preferences", "reward_second", "detector"} & run.kept.keys()


def test_copies_measure_what_one_measures(run, who, monkeypatch):
    "Every figure, every word; and it was not this process that has measured."
    cfg = replace(config_of(run, "evaluate"), arms=("ppo_rm", "dpo"), scenes=6, best_of=2)
    alone = compare(who, run.source, cfg)
    monkeypatch.setattr(evaluate, "table_row", in_another_process(evaluate.table_row, os.getpid()))
    assert compare(who, run.source, cfg, copies=2) == alone


def in_another_process(function, here):
    def measured(*given):
        assert os.getpid() != here
        return function(*given)

    return measured


PARENT = """
import sys, time
import vlmrlhf_course
from vlmrlhf_course.base.launch import in_copies
import torch
torch.set_num_threads(1)
def stay(x):
    print(__import__("os").getpid(), flush=True)
    time.sleep(60)
list(in_copies(stay, [1, 2], 2))
"""


def alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
def test_copies_end_with_the_process_that_made_them():
    "Also where that is killed, and can say nothing."
    env = os.environ | dict(PYTHONPATH=str(Path(vlmrlhf_course.__file__).parents[1]))
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=env)
    copies = [int(parent.stdout.readline()) for _ in range(2)]
    assert all(map(alive, copies))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.time() + 20
    while any(map(alive, copies)):
        assert time.time() < end, "a copy is still there"
        time.sleep(0.2)


def test_several_threads_are_not_copied(monkeypatch):
    "OpenMP's threads would be missing in a copy, and it would wait for them."
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    assert list(in_copies(lambda x: os.getpid(), [1, 2], 2)) == [os.getpid()] * 2
