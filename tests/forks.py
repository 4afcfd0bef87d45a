"""Run tests on copies of the package, each in a fork of one warm process. `mutants.py` uses it; the
sources are never touched."""

import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "vlmrlhf_course"
LIMIT = 300  # seconds by the clock; a mutant that hangs is noticed, too
WARM = (
    "hypothesis",
    "hypothesis.strategies",
    "pytest",
    "torch.multiprocessing",
    "torch.utils.tensorboard",
    "vlmrlhf_course.report.evaluate",
)


class Job(NamedTuple):
    tests: str  # `test_kl.py -k 'k1 or k2'`, or several files
    name: str = ""
    module: Path | None = None  # what is other in the copy, relative to the package,
    text: str = ""  # and its text there


def start(job: Job, folder: Path) -> int:
    "Fork; the child tests a copy of the package in `folder`. Returns its process id."
    copy = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "pretrained"))
    (copy / "pretrained").symlink_to(PACKAGE / "pretrained")
    if job.module:
        (copy / job.module).write_text(job.text, encoding="utf-8")
    pid = os.fork()
    if pid:
        return pid
    code = 9
    try:
        code = run_tests(job.tests, folder)
    finally:
        os._exit(code)


def run_tests(tests: str, folder: Path) -> int:
    "In the child: pytest on the package in `folder`, with its output in `folder/log`."
    os.setpgid(0, 0)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    # tests with two processes fork, too, and so need not import everything twice more
    os.environ.update(PYTHONPATH=str(folder), VLMRLHF_START="fork")
    import pytest

    file, chosen = file_and_choice(tests)
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
    files = [str(TESTS / name) for name in file.split()]
    return int(pytest.main([*options, *files, "-k", chosen]))


def file_and_choice(tests: str) -> tuple[str, str]:
    "`test_kl.py -k 'k1 or k2'` in its two parts."
    file, _, chosen = tests.partition(" -k ")
    return file, chosen.strip("'")


def verdict(status: int, log: str) -> tuple[str, str]:
    "What became of a mutant, and which test noticed it."
    if os.WIFSIGNALED(status):
        hung = os.WTERMSIG(status) == signal.SIGKILL
        return ("killed", "did not end in time") if hung else ("ERROR", "")
    code = os.WEXITSTATUS(status)
    failed = [line for line in log.splitlines() if line.startswith("FAILED")]
    if code == 1 and failed:
        return "killed", failed[0].split(" - ")[0].split("::", 1)[-1]
    return ("SURVIVED" if code == 0 else "ERROR"), ""


class Running(NamedTuple):
    job: Job
    folder: Path
    since: float

    def ended(self, pid: int, limit: float):
        "Exit status and CPU time used, or None while it runs. What takes too long is killed."
        done, status, used = os.wait4(pid, os.WNOHANG)
        if not done and time.time() - self.since > limit:
            os.killpg(pid, signal.SIGKILL)
            done, status, used = os.wait4(pid, 0)
        return (status, used.ru_utime + used.ru_stime) if done else None


def run_all(work: list[Job], at_once: int, report, limit: float = LIMIT):
    """Run all `work`, `at_once` at a time. As each job ends,
    `report(job, verdict, by whom, seconds of CPU time, log)` is called."""
    waiting, running = list(work), {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job, folder = waiting.pop(0), Path(tempfile.mkdtemp(prefix="mutant-"))
                running[start(job, folder)] = Running(job, folder, time.time())
            time.sleep(0.02)
            for pid, run in list(running.items()):
                end = run.ended(pid, limit)
                if not end:
                    continue
                del running[pid]
                log = (run.folder / "log").read_text(encoding="utf-8", errors="replace")
                shutil.rmtree(run.folder, ignore_errors=True)
                report(run.job, *verdict(end[0], log), end[1], log)
    finally:
        for pid, run in running.items():
            os.killpg(pid, signal.SIGKILL)
            shutil.rmtree(run.folder, ignore_errors=True)


def warm_up():
    """Import everything once, then forget the package:
    each fork imports its own copy, and nothing else again."""
    os.environ.update(
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_VERBOSITY="error",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
    sys.path.insert(0, str(PACKAGE.parent))
    for name in WARM:
        importlib.import_module(name)
    from hypothesis import Phase, settings

    # found is enough: no shrinking
    phases = [Phase.explicit, Phase.generate]
    settings.register_profile(
        "mutants", deadline=None, max_examples=40, derandomize=True, phases=phases
    )
    for name in [n for n in sys.modules if n.split(".")[0] == PACKAGE.name]:
        del sys.modules[name]
    sys.path.remove(str(PACKAGE.parent))
