"""Kill runs at random moments, continue them, and compare every file of the end with a run that was left alone.

    python tests/kill.py --kills 30 --scale smoke      # writes what it found to tests/proofs.json

Each run is killed (SIGKILL) once or twice in every stage, also while a checkpoint is being written; then `vlmrlhf run --resume`
goes on. Nothing is mocked but the start of processes: they are forked from one that has imported PyTorch, which saves seconds
a kill."""
import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", VLMRLHF_QUIET="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error",
                  TRANSFORMERS_NO_ADVISORY_WARNINGS="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

from accelerate.state import AcceleratorState

from vlmrlhf_course import cli
from vlmrlhf_course.report import evaluate  # noqa: F401  (evaluate imports everything that a run needs)

ARMS = ("ppo", "ppo_rm", "gold", "hacked")
STAGES = {"sft": ["sft"], "preferences": ["preferences"], "reward": ["reward", "reward_small"], "ppo": list(ARMS), "evaluate": ["evaluate"]}
# Smaller than smoke, and with a checkpoint after every step, so that there are many to be hit.
SMALLER = ("sft.projector.steps=4 sft.projector.save_every=1 sft.language.steps=6 sft.language.save_every=1 preferences.prompts=16 "
           "preferences.validation=8 reward.epochs=2 reward.fit.batch=4 reward.fit.save_every=1 reward_small.prompts=6 ppo.iterations=3 "
           "ppo.answers=6 ppo.minibatch=3 ppo.save_every=1 ppo.eval_every=3 evaluate.scenes=8").split()


# --- processes ------------------------------------------------------------------------------------------------------

class Forked:
    "A forked process that runs `vlmrlhf`, with the methods of Popen that the library uses. `env` as at the start of a program."
    def __init__(self, argv, log: Path, **env: str):
        self.returncode, (end, self.stdin), self.log = None, os.pipe(), log
        self.pid = os.fork()
        if self.pid:
            os.close(end)
            return
        try:
            os.close(self.stdin)
            os.dup2(end, 0)
            for fd in (1, 2): os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            os.environ.update(env)
            if "VLMRLHF_ARM" not in env: os.setsid()
            AcceleratorState._reset_state(reset_partial_state=True)   # what a process that has just started knows
            cli._start_arm = start_arm
            status = cli.main([str(a) for a in argv])
            sys.stdout.flush(), sys.stderr.flush()
        except BaseException:
            import traceback
            traceback.print_exc(), sys.stderr.flush()
            status = 1
        os._exit(status)

    def _ended(self, flags):
        if self.returncode is None and (ended := os.waitpid(self.pid, flags))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
            os.close(self.stdin)
        return self.returncode

    def poll(self): return self._ended(os.WNOHANG)
    def wait(self): return self._ended(0)
    def said(self): return self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
    def terminate(self):
        if self.poll() is None: os.kill(self.pid, signal.SIGTERM)


def start_arm(run, args, arm):
    argv = ["ppo", "--arm", arm, "--out", run.folder, "--scale", args.scale, "--seed", run.seed] + (["--set", *args.set] if args.set else [])
    run.path(arm).mkdir(parents=True, exist_ok=True)
    return Forked(argv, run.path(arm) / "stderr.log", VLMRLHF_ARM="1")


def children(pid: int) -> list[int]:
    try: return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError): return []


def cpu(pid: int) -> float:
    "Seconds of CPU time of a process and its children, dead or alive: a clock that a busy machine does not change."
    try: after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError): return 0.
    return sum(map(int, after_name[11:15])) / os.sysconf("SC_CLK_TCK") + sum(map(cpu, children(pid)))


def kill(process: Forked, whom: str) -> str | None:
    "SIGKILL to the `process` alone, to its `group`, or to one `arm` of PPO (then the process must end by itself). None: it was over."
    arms = children(process.pid) if whom == "arm" else []
    if arms: os.kill(random.choice(arms), signal.SIGKILL)
    elif whom == "group": os.killpg(process.pid, signal.SIGKILL)
    else: whom = "process"; os.kill(process.pid, signal.SIGKILL)
    if (status := process.wait()) == 0: return None
    assert status == (2 if arms else -signal.SIGKILL), f"ended with status {status}"
    return whom


# --- moments --------------------------------------------------------------------------------------------------------

def is_done(folder: Path, stage: str) -> bool: return all((folder / part / "done.json").is_file() for part in STAGES[stage])
def stage_of(folder: Path) -> str: return next((s for s in STAGES if not is_done(folder, s)), "evaluate")


def begun(folder: Path, stage: str) -> bool:
    "Are the stages before `stage` done?"
    return (folder / "config.yaml").is_file() and all(is_done(folder, s) for s in list(STAGES)[:list(STAGES).index(stage)])


def half_written(folder: Path, since: float = 0.) -> bool:
    "Is a checkpoint half-written that was begun after `since`?"
    try: return any(p.stat().st_mtime > since for p in folder.glob("**/checkpoints/.part-*"))
    except FileNotFoundError: return False   # renamed while we looked


def wait_until(moment, process: Forked) -> bool:
    "Wait for a moment; False where the process ended before."
    while process.poll() is None:
        if moment(): return True
        time.sleep(.001)
    return False


# --- the end --------------------------------------------------------------------------------------------------------

def contents(folder: Path) -> dict:
    "Every file of a run with what must not depend on interruptions: all but logs, TensorBoard's clock, time and memory used."
    out = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and "tensorboard" not in f.parts and f.name != "stderr.log"):
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


# --- the proof ------------------------------------------------------------------------------------------------------

def durations(folder: Path, argv) -> dict[str, float]:
    "Let a run alone; how much CPU time each stage took."
    process, ends, now = Forked(argv, folder.with_suffix(".log")), {}, 0.
    while process.poll() is None:
        now = max(now, cpu(process.pid))
        for s in STAGES:
            if s not in ends and is_done(folder, s): ends[s] = now
        time.sleep(.005)
    assert process.returncode == 0, folder.with_suffix(".log").read_text()[-3000:]
    times = [0., *(ends.get(s, now) for s in STAGES)]
    return {s: b - a for s, a, b in zip(STAGES, times, times[1:])}


def one_run(folder: Path, argv, plan: list[str], took: dict[str, float], rng: random.Random, left: int) -> list[dict]:
    "One run with a kill for each entry of `plan`: a stage, or `checkpoint STAGE`. Then it is continued to its end."
    kills, log = [], folder.with_suffix(".log")
    for goal in plan[:left]:
        process = Forked(argv + (["--resume"] if kills else []), log)
        stage, now = goal.split()[-1], time.time()
        if not wait_until(lambda: begun(folder, stage), process): break
        if goal.startswith("checkpoint"):
            wait_until(lambda: half_written(folder, now), process)
            time.sleep(rng.uniform(0, .004))
            whom = "group"
        else:
            start, share = cpu(process.pid), rng.uniform(.05, .95)
            wait_until(lambda: cpu(process.pid) - start > share * took[stage], process)
            whom = rng.choice(["process", "group", "arm"]) if stage == "ppo" else "process"
        if process.poll() is not None: break
        if not (whom := kill(process, whom)): break
        kills.append(dict(goal=goal, hit=stage_of(folder), whom=whom, half_written=half_written(folder, now)))
        print(f"  {folder.name}: {kills[-1]}", flush=True)
    last = Forked(argv + ["--resume"], log)
    assert last.wait() == 0, log.read_text()[-3000:]
    return kills


def proof(kills: int, scale: str, seed: int, base: Path) -> dict:
    "Reference run, killed runs, comparison."
    rng, started, found, n = random.Random(seed), time.time(), [], 0
    def argv(folder): return ["run", "--scale", scale, "--out", folder, "--set", *SMALLER]
    took = durations(base / "alone", argv(base / "alone"))
    print("left alone:", {s: round(t, 1) for s, t in took.items()}, flush=True)
    while len(found) < kills:
        n += 1
        plan = ["sft", "preferences", "reward", "ppo", "evaluate"]
        at = ("sft", "reward", "ppo")[n % 3]
        plan.insert(plan.index(at) + 1, f"checkpoint {at}")
        folder = base / f"killed-{n}"
        found += one_run(folder, argv(folder), plan, took, rng, kills - len(found))
        if wrong := differences(base / "alone", folder): raise SystemExit(f"{folder} differs: {wrong}")
        shutil.rmtree(folder)
    def count(key): return {str(v): sum(k[key] == v for k in found) for v in sorted({k[key] for k in found}, key=str)}
    return dict(date=str(date.today()), command=f"python tests/kill.py --kills {kills} --scale {scale} --seed {seed}", kills=len(found), runs=n,
                hit=count("hit"), whom=count("whom"), while_a_checkpoint_was_written=sum(k["half_written"] for k in found),
                files_compared=len(contents(base / "alone")), seconds=round(time.time() - started), result="every file as in the run that was left alone")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--scale", default="smoke")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    file = Path(__file__).with_name("proofs.json").resolve()
    with tempfile.TemporaryDirectory() as d:
        os.chdir(d)   # away from the repository's settings.ini
        record = proof(args.kills, args.scale, args.seed, Path(d))
    proofs = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(proofs | dict(kill=record), indent=1) + "\n")
    print(json.dumps(record, indent=1))
