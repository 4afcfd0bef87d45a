"What makes a run quicker changes nothing of it: copies of a process measure, and who loads a \
stage that is done asks for what that needs."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vlmrlhf_course
from vlmrlhf_course.base.launch import in_copies
from vlmrlhf_course.base.records import sum_of
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.base.stages import config_of
from vlmrlhf_course.model.memory import FeatureCache, FeaturesConfig, Seen
from vlmrlhf_course.pipeline import obtain, reopen
from vlmrlhf_course.report import evaluate, record
from vlmrlhf_course.report.evaluate import Policies, compare
from vlmrlhf_course.report.record import REPORT, measure_beside


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


def test_copies_do_not_read_each_others_pictures(tmp_path):
    "Features on the disk: one folder, and the same count of files, in each copy."
    cache = FeatureCache(FeaturesConfig("disk", limit_gb=1.5 * 24 / 2**30))
    cache["before"] = Seen(torch.zeros(1, 2, 3))

    def keep(x):
        cache[x] = Seen(torch.full((1, 2, 3), float(x)))  # there is room for one: another goes
        time.sleep(0.5)
        return float(cache[x].features.mean())

    assert list(in_copies(keep, [1, 2, 3, 4], 2)) == [1.0, 2.0, 3.0, 4.0]
    assert float(cache["before"].features.sum()) == 0


def test_an_error_does_not_wait_for_others():
    def row(x):
        if x == 0:
            raise ValueError("no such row")
        time.sleep(30)

    start = time.time()
    with pytest.raises(ValueError, match="no such row"):
        list(in_copies(row, list(range(12)), 2))
    assert time.time() - start < 15


@pytest.fixture
def trained(smoke_run, tmp_path):
    "A finished run without its evaluation."
    copied = tmp_path / "run"
    shutil.copytree(smoke_run, copied, symlinks=True)
    shutil.rmtree(copied / "evaluate")
    for name in REPORT:
        (copied / name).unlink()
    return copied


@pytest.fixture
def unmeasured(trained, monkeypatch):
    "To measure anything is too late for what is wrong."

    def too_late(*given):
        raise AssertionError("measured before the records were looked at")

    monkeypatch.setattr("vlmrlhf_course.report.record.compare", too_late)
    return trained


@pytest.mark.parametrize("stage", ["preferences", "detector", "reward"])
def test_a_report_believes_no_edited_record(unmeasured, stage):
    record = unmeasured / stage / "done.json"
    found = json.loads(record.read_text())
    record.write_text(json.dumps(found | dict(kappa=0.9999, validation=0.9999)))
    with pytest.raises(UserError, match="has changed"):
        obtain(reopen(unmeasured), "evaluate")


def test_what_is_gone_is_made_again_before_anything_is_measured(unmeasured):
    shutil.rmtree(unmeasured / "detector")
    with pytest.raises(AssertionError, match="measured before"):
        obtain(reopen(unmeasured), "evaluate")
    assert (unmeasured / "detector" / "done.json").is_file()


# --- beside the last arm --------------------------------------------------------------------------


def measured_but(run, *unfinished):
    "Measure what can be while these train; the stages that were loaded for it are forgotten."
    while measure_beside(run, {*unfinished}):
        pass
    run.kept.clear()
    run.looked_at.clear()


def test_rows_measured_while_an_arm_trains_are_the_same(smoke_run, trained, monkeypatch):
    "Each is measured once, and the report is what it would have been."
    run = reopen(trained)
    assert not measure_beside(run, {"ppo_rm"}) and run.measured is None, "SFT is cooled to its KL"
    measured_but(run, "oracle", "dpo")
    assert {"sft", "best_of_n", "grpo_greedy"} <= run.measured.rows.keys()
    left, row = [], evaluate.table_row
    monkeypatch.setattr(evaluate, "table_row", lambda *given: left.append(given[-1]) or row(*given))
    obtain(run, "evaluate")
    assert left == ["dpo", "dpo_greedy", "oracle", "oracle_greedy"]
    reports = [json.loads((f / "report.json").read_text()) for f in (smoke_run, trained)]
    reports[0].pop("run")
    assert reports[0] == reports[1] and [*reports[0]] == [*reports[1]]
    pages = [(f / "before_after.png").read_bytes() for f in (smoke_run, trained)]
    assert pages[0] == pages[1]


def test_what_was_measured_on_something_else_does_not_count(trained, monkeypatch):
    "An arm that was made again meanwhile, from other settings say: its record has another sum."
    run, taken = reopen(trained), []
    measured_but(run, "oracle")
    monkeypatch.setattr(record, "compare", lambda *given: taken.append(given[-1]))
    for name, expected in (("oracle", run.measured), ("dpo", None)):
        done = trained / name / "done.json"
        info = json.loads(done.read_text()) | dict(note=1)
        done.write_text(json.dumps(info | dict(sum=sum_of(info))))
        with pytest.raises(TypeError):  # what `compare` gives is nothing, here
            obtain(run, "evaluate")
        assert taken[-1] is expected


def test_damage_is_found_although_it_was_measured(trained):
    run = reopen(trained)
    measured_but(run, "oracle")
    weights = next((trained / "grpo").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="grpo"):
        obtain(run, "evaluate")
