"""Processes for fuzz.py: forked from one that has imported PyTorch, or real ones."""

import ctypes
import faulthandler
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import kill  # sets the environment in which PyTorch is imported
from accelerate.state import AcceleratorState
from stage_table import LAST, before, drawn_arms, run_of

from vlmrlhf_course import cli
from vlmrlhf_course.base.checkpoints import Checkpoints
from vlmrlhf_course.pipeline import check_run

ENV = dict(
    OMP_NUM_THREADS="1",
    VLMRLHF_QUIET="1",
    HF_HUB_OFFLINE="1",
    LANG="C.UTF-8",
    TRANSFORMERS_VERBOSITY="error",
    TRANSFORMERS_NO_ADVISORY_WARNINGS="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TZ="UTC",
)
IDLE = 48.0  # seconds without work after which a command waits for something
MEMORY = 6 * 2**30  # what a command may take beyond what PyTorch maps
POPEN = subprocess.Popen
# What the package remembers of a process: empty now, and emptied in each fork.
OURS = [m for name, m in sys.modules.items() if name.startswith("vlmrlhf_course")]
BLANK, CACHES = [], []
for module in OURS:
    for name, value in vars(module).items():
        if isinstance(value, (set, dict, list)) and not value and not name.startswith("__"):
            BLANK.append(value)
        if hasattr(value, "cache_clear"):
            CACHES.append(value)


def forget():
    "Know what a process knows that has just started."
    AcceleratorState._reset_state(reset_partial_state=True)
    for holder in BLANK:
        holder.clear()
    for cached in CACHES:
        cached.cache_clear()
    tempfile.tempdir = None


def run_cli(argv):
    "`vlmrlhf` in this process, then its end."
    try:
        coding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
        coding = coding or "utf-8"
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, "w", encoding=coding, errors=errors or "strict", closefd=False)
        sys.stderr = open(2, "w", encoding=coding, errors="backslashreplace", closefd=False)
        forget()
        subprocess.Popen = popen
        try:
            status = cli.main(argv)
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else int(e.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        status = 1
        try:
            traceback.print_exc()
            sys.stderr.flush()
        except BaseException:
            pass
    os._exit(status or 0)


def popen(command, *args, **kwargs):
    "Popen that forks where the package starts itself."
    words = [] if isinstance(command, (str, bytes)) else [os.fsdecode(w) for w in command]
    if "vlmrlhf_course.cli" not in words:
        return POPEN(command, *args, **kwargs)
    return Arm(words, **kwargs)


class Arm:
    "A forked arm, with the methods of Popen that the package uses."

    def __init__(self, words, env=None, stdin=None, stdout=None, stderr=None, **_):
        self.returncode, self.stdin, self.args = None, None, words
        end = None
        if stdin == subprocess.PIPE:
            end, ours = os.pipe()
            self.stdin = open(ours, "wb", buffering=0)
        self.pid = os.fork()
        if self.pid:
            if end is not None:
                os.close(end)
            return
        try:
            self._redirect(end, stdout, stderr)
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
            at = words.index("vlmrlhf_course.cli")
            options = "".join(w[1:] for w in words[1:at] if w.startswith("-"))
            if "-m" in words and not {*options} & {*"IP"} and "PYTHONSAFEPATH" not in os.environ:
                own_modules()
            run_cli(words[at + 1 :])
        finally:
            os._exit(1)

    def _redirect(self, stdin, stdout, stderr):
        "In the child: the three streams, and no other file that was open."
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere if stdin is None else stdin, 0)
        for fd, given in ((1, stdout), (2, stderr)):
            if given == subprocess.DEVNULL:
                os.dup2(nowhere, fd)
            elif given is not None:
                os.dup2(given if isinstance(given, int) else given.fileno(), fd)
        os.closerange(3, 1024)

    def _ended(self, flags):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, flags)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def poll(self):
        return self._ended(os.WNOHANG)

    def wait(self, timeout=None):
        end = time.time() + (timeout or 1e9)
        while timeout and self.poll() is None:
            if time.time() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        return self._ended(0)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def own_modules():
    "`python -m` takes modules of the working directory before any other: do the same."
    for name in ("random", "json", "torch", "statistics", "yaml"):
        file = Path(f"{name}.py")
        if file.is_file():
            exec(compile(file.read_text(), str(file), "exec"), {})


def stop_at(folder: str, step: int):
    "Kill this process and its arms as soon as a stage has its checkpoint after `step` steps."
    save = Checkpoints.save

    def save_and_end(self, at, *args, **kwargs):
        save(self, at, *args, **kwargs)
        if at == step and folder in str(self.folder):
            os.killpg(0, signal.SIGKILL)

    Checkpoints.save = save_and_end


def tell(file: Path):
    "Write down what was asked for, once the command line is understood, and what came of it."
    execute = cli.execute

    def told(args, *more, **kwargs):
        seen = {k: v for k, v in vars(args).items() if isinstance(v, (str, int, list))}
        out = args.out or f"{cli.load_settings().runs}/{Path(args.scale).stem}-seed-{args.seed}"
        if args.verb == "pretrain" and not args.out:
            out = "pretrained"
        seen["outs"] = [out, os.path.expanduser(out)]
        file.write_text(json.dumps(seen))
        status = execute(args, *more, **kwargs)
        if status == 0 and args.verb != "pretrain":
            file.write_text(json.dumps(seen | stages_of(args)))
        return status

    cli.execute = told


def stages_of(args) -> dict:
    "Which stages a command has made that ended well, which it needed, which logs the report draws."
    run = run_of(args.scale, args.set)
    name = LAST if args.verb == "run" else getattr(args, "arm", None) or args.verb
    earlier = before(run, name)
    own = [*earlier, name] if name == LAST else [name]
    return dict(own=own, needed=earlier, drawn=drawn_arms(run) if name == LAST else [])


class Done:
    "How a command ended."

    def __init__(self, status, hung, left, err, stack, began):
        self.status, self.hung, self.left, self.err = status, hung, left, err
        self.stack, self.began, self.seconds = stack, began, time.time() - began

    def how(self, long) -> str:
        "In a word or two: the status, or why there is none."
        if self.hung and long:
            return "still at work"
        return self.hung or str(self.status)


class Process:
    "A command that was started: how to wait for its end."

    def __init__(self, pid, log):
        self.pid, self.log, self.began = pid, log, time.time()

    def end(self, limit) -> Done:
        "Wait for the end; kill what takes too long, or does nothing."
        watch, hung, left = os.pidfd_open(self.pid), None, False
        worked, since = 0.0, time.time()
        while not select.select([watch], [], [], 1.0)[0]:
            now = time.time()
            cpu = kill.cpu(self.pid)
            if cpu > worked + 0.05:
                worked, since = cpu, now
            if now - self.began > limit:
                hung = "limit"
            elif now - since > IDLE:
                hung = "idle"
            if hung:
                self.send(signal.SIGUSR1)  # write the stacks
                time.sleep(0.3)
                break
        os.close(watch)
        if not hung:
            left = self.others_stay()
        self.send(signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        err, stack = ((self.log / n).read_text(errors="replace") for n in ("stderr", "stack"))
        return Done(status, hung, left, err, stack, self.began)

    def send(self, number):
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass

    def others_stay(self) -> bool:
        "Is a process that the command started still there, some time after its end?"
        for _ in range(20):
            alive = [p for p in Path("/proc").iterdir() if p.name.isdigit() and self.is_ours(p)]
            if not alive:
                return False
            time.sleep(0.15)
        return True

    def is_ours(self, entry) -> bool:
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        return int(fields[2]) == self.pid and fields[0] != "Z" and entry.name != str(self.pid)


def limits(room):
    "In the child: memory, size of files, no core, no root's way past modes; less urgent."
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (room,) * 2)
    os.nice(max(0, 10 - os.nice(0)))
    if os.geteuid() == 0:  # the version of the interface, then effective, permitted, inherited
        head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None)
        if libc.capget(head, sets) == 0:
            sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            libc.capset(head, sets)


def outputs(log: Path):
    "Open what a command writes to."
    (log / "stack").write_text("")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    return [os.open(log / n, flags) for n in ("stdout", "stderr")]


def start(argv, env, cwd, log, stop=None, room=2**30) -> Process:
    "Fork a command with the environment `env`."
    out, err = outputs(log)
    pid = os.fork()
    if pid:
        os.close(out)
        os.close(err)
        return Process(pid, log)
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.closerange(3, 1024)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        limits(room)
        faulthandler.register(signal.SIGUSR1, file=open(log / "stack", "w"))
        tell(log / "asked.json")
        if stop:
            stop_at(*stop)
        run_cli(argv)
    finally:
        os._exit(1)


ENTRY = """
import pathlib
import sys
sys.path.append({tests!r})
import fuzz_fork
fuzz_fork.tell(pathlib.Path({asked!r}))
sys.exit(fuzz_fork.cli.main())
"""


def start_real(argv, env, cwd, log, stop=None, room=2**30) -> Process:
    "Start Python for a command, with nothing of the working directory in its path."
    entry = log / "vlmrlhf"
    entry.write_text(ENTRY.format(tests=str(Path(__file__).parent), asked=str(log / "asked.json")))
    out, err = outputs(log)
    env = env | dict(PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    child = POPEN(
        [sys.executable, str(entry), *argv],
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        start_new_session=True,
        preexec_fn=lambda: limits(room),
    )
    os.close(out)
    os.close(err)
    child.returncode = 0  # it is waited for by its number
    return Process(child.pid, log)


def accepted(path, value) -> bool:
    "Does the library take this value? Then a command shows whether it can work with it."
    try:
        check_run(run_of("smoke", [f"{path}={value}"]))
    except Exception:  # also what is no UserError: the command finds it again
        return False
    return True
