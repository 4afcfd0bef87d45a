"""Kill runs at random moments, continue them, and compare every file of the end with a run that was
left alone.

    python tests/kill.py --kills 30 --scale smoke      # writes what it found to tests/proofs.json

Each run is killed (SIGKILL) once or twice in every stage, also while a checkpoint is being written;
then `vlmrlhf run --resume` goes on. Which stages and arms there are, `stage_table.py` reads from
the library. Nothing is mocked but the start of a run: it is forked from a process that has
imported PyTorch, which saves seconds a kill. Its arms it starts as it always does."""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

import quiet  # noqa: F401  (before PyTorch and its friends are imported)
from accelerate.state import AcceleratorState
from stage_table import groups_of, run_of, short_training, with_every_arm

from vlmrlhf_course import cli

# Smaller than smoke, and with a checkpoint after every step, so that there are many to be hit.
SMALLER = (
    "sft.projector.steps=4 sft.projector.save_every=1 sft.language.steps=6 "
    "sft.language.save_every=1 preferences.prompts=16 preferences.validation=8 "
    "reward_small.prompts=6 evaluate.scenes=8"
).split()
SMALLER += short_training(iterations=3, prompts=6, minibatch=3, epochs=2)


# --- processes ------------------------------------------------------------------------------------


class Forked:
    """A forked process that runs `vlmrlhf`, with the methods of Popen
    that the library uses. `env` as at the start of a program."""

    def __init__(self, argv, log: Path, **env: str):
        self.returncode, (end, self.stdin), self.log = None, os.pipe(), log
        self.pid = os.fork()
        if self.pid:
            os.close(end)
            return
        try:
            os.close(self.stdin)
            os.dup2(end, 0)
            for fd in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            os.environ.update(env)
            os.setsid()
            # what a process that has just started knows
            AcceleratorState._reset_state(reset_partial_state=True)
            status = cli.main([str(a) for a in argv])
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            status = 1
        os._exit(status)

    def _ended(self, flags):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, flags)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                os.close(self.stdin)
        return self.returncode

    def poll(self):
        return self._ended(os.WNOHANG)

    def wait(self):
        return self._ended(0)

    def said(self):
        return self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []

    def terminate(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def cpu(pid: int) -> float:
    """Seconds of CPU time of a process and its children, dead
    or alive: a clock that a busy machine does not change."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    own = sum(map(int, after_name[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(map(cpu, children(pid)))


WAITING = 0.2  # seconds of CPU time that a copy of the run has taken which is no arm yet


def kill(process: Forked, whom: str) -> str | None:
    """SIGKILL to the `process` alone, to its `group`, or to one `arm`
    (then the process must end by itself). None: it was over."""
    running = [arm for arm in children(process.pid) if whom == "arm" and cpu(arm) > WAITING]
    if running:
        os.kill(random.choice(running), signal.SIGKILL)
    elif whom == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        whom = "process"
        os.kill(process.pid, signal.SIGKILL)
    status = process.wait()
    if status == 0:
        return None
    assert status == (2 if running else -signal.SIGKILL), f"ended with status {status}"
    return whom


# --- moments --------------------------------------------------------------------------------------


def is_done(folder: Path, stages: list[str]) -> bool:
    return all((folder / stage / "done.json").is_file() for stage in stages)


def group_at_work(folder: Path, groups: dict[str, list[str]]) -> str:
    "The group of stages (see `groups_of`) that a run is at."
    return next((g for g, stages in groups.items() if not is_done(folder, stages)), [*groups][-1])


def begun(folder: Path, groups: dict[str, list[str]], group: str) -> bool:
    "Are the stages before those of `group` done?"
    earlier = [*groups.values()][: [*groups].index(group)]
    return (folder / "config.yaml").is_file() and all(is_done(folder, s) for s in earlier)


def half_written(folder: Path, since: float = 0.0) -> bool:
    "Is a checkpoint half-written that was begun after `since`?"
    try:
        return any(p.stat().st_mtime > since for p in folder.glob("**/checkpoints/.part-*"))
    except FileNotFoundError:
        return False  # renamed while we looked


def wait_until(moment, process: Forked) -> bool:
    "Wait for a moment; False where the process ended before."
    while process.poll() is None:
        if moment():
            return True
        time.sleep(0.001)
    return False


# --- the end --------------------------------------------------------------------------------------


def contents(folder: Path) -> dict:
    """Every file of a run with what must not depend on interruptions:
    all but logs, TensorBoard's clock, time and memory used."""
    out = {}
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or "tensorboard" in file.parts or file.name == "stderr.log":
            continue
        data = file.read_bytes()
        if file == folder / "report.json":
            data = json.loads(data)
            data["run"] = {k: v for k, v in data["run"].items() if k == "seed"}
        out[str(file.relative_to(folder))] = data
    return out


def differences(a: Path, b: Path) -> list[str]:
    "Names of files that differ, or that only one of two runs has."
    one, two = contents(a), contents(b)
    return sorted(k for k in {*one, *two} if k not in one or k not in two or one[k] != two[k])


# --- the proof ------------------------------------------------------------------------------------


def durations(folder: Path, argv, groups: dict[str, list[str]]) -> dict[str, float]:
    "Let a run alone; how much CPU time each group of stages took."
    process, ends, now = Forked(argv, folder.with_suffix(".log")), {}, 0.0
    while process.poll() is None:
        now = max(now, cpu(process.pid))
        for group, stages in groups.items():
            if group not in ends and is_done(folder, stages):
                ends[group] = now
        time.sleep(0.005)
    assert process.returncode == 0, folder.with_suffix(".log").read_text()[-3000:]
    times = [0.0, *(ends.get(group, now) for group in groups)]
    return {group: max(0.0, b - a) for group, a, b in zip(groups, times, times[1:])}


def one_run(
    folder: Path,
    argv,
    groups: dict[str, list[str]],
    plan: list[str],
    took: dict[str, float],
    rng: random.Random,
) -> list[dict]:
    """One run with a kill for each entry of `plan`: a group of stages,
    or `checkpoint GROUP`. Then it is continued to its end."""
    kills, log = [], folder.with_suffix(".log")
    for goal in plan:
        process = Forked(argv + (["--resume"] if kills else []), log)
        group, now = goal.split()[-1], time.time()
        if not wait_until(lambda: begun(folder, groups, group), process):
            break
        if goal.startswith("checkpoint"):
            wait_until(lambda: half_written(folder, now), process)
            time.sleep(rng.uniform(0, 0.004))
            whom = "group"
        else:
            start, share = cpu(process.pid), rng.uniform(0.05, 0.95)
            wait_until(lambda: cpu(process.pid) - start > share * took[group], process)
            whom = rng.choice(["process", "group", "arm"]) if group == "arms" else "process"
        if process.poll() is not None:
            break
        killed = kill(process, whom)
        if not killed:
            break
        hit, torn = group_at_work(folder, groups), half_written(folder, now)
        kills.append(dict(goal=goal, hit=hit, whom=killed, half_written=torn))
        print(f"  {folder.name}: {kills[-1]}", flush=True)
    last = Forked(argv + ["--resume"], log)
    assert last.wait() == 0, log.read_text()[-3000:]
    return kills


def proof(kills: int, scale: str, seed: int, base: Path) -> dict:
    "Reference run, killed runs, comparison."
    rng, started, found, n = random.Random(seed), time.time(), [], 0

    sets = with_every_arm(scale, SMALLER)
    groups = groups_of(run_of(scale, sets))

    def argv(folder):
        return ["run", "--scale", scale, "--out", folder, "--set", *sets]

    took = durations(base / "alone", argv(base / "alone"), groups)
    logs = (base / "alone").glob("**/metrics.jsonl")
    parts = {part for log in logs for part in log.parts}
    trained = [group for group, stages in groups.items() if parts & {*stages}]
    print("left alone:", {s: round(t, 1) for s, t in took.items()}, flush=True)
    while len(found) < kills:
        n += 1
        plan, at = [*groups], trained[n % len(trained)]
        plan.insert(plan.index(at) + 1, f"checkpoint {at}")
        folder, left = base / f"killed-{n}", kills - len(found)
        found += one_run(folder, argv(folder), groups, plan[:left], took, rng)
        wrong = differences(base / "alone", folder)
        if wrong:
            raise SystemExit(f"{folder} differs: {wrong}")
        shutil.rmtree(folder)

    def count(key):
        return dict(sorted(Counter(str(k[key]) for k in found).items()))

    return dict(
        date=str(date.today()),
        command=f"python tests/kill.py --kills {kills} --scale {scale} --seed {seed}",
        kills=len(found),
        runs=n,
        stages=groups,
        hit=count("hit"),
        whom=count("whom"),
        while_a_checkpoint_was_written=sum(k["half_written"] for k in found),
        files_compared=len(contents(base / "alone")),
        seconds=round(time.time() - started),
        result="every file as in the run that was left alone",
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--scale", default="smoke")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    file = Path(__file__).with_name("proofs.json").resolve()
    with tempfile.TemporaryDirectory() as d:
        os.chdir(d)  # away from the repository's settings.ini
        record = proof(args.kills, args.scale, args.seed, Path(d))
    proofs = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(proofs | dict(kill=record), indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
