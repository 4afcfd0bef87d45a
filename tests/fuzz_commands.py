"""What the cases of fuzz.py share: the smallest settings, prepared runs, tables of odd values."""

import os
import shutil
from pathlib import Path

import yaml
from stage_table import STAGES, arms_of, run_of, short_training

TABLES = Path(__file__).with_name("fuzz_values.yaml").read_text("utf-8")
VALUES = yaml.load(TABLES, Loader=yaml.BaseLoader)  # every value is text
SMALL = (
    "sft.projector.steps=2 sft.projector.save_every=1 sft.projector.batch=4 "
    "sft.language.steps=3 sft.language.save_every=1 sft.language.batch=4 "
    "preferences.prompts=12 preferences.validation=8 reward_small.prompts=6 evaluate.scenes=4"
).split()
SMALL += short_training(iterations=2, prompts=4, minibatch=4, epochs=1)

ARMS = arms_of(run_of("smoke", SMALL))  # name → kind
ARM_KINDS = tuple(dict.fromkeys(ARMS.values()))
VERBS = (*STAGES, "run")


def line(verb, *more, sets=(), out="run", scale="smoke"):
    "A command line with the smallest settings."
    return [verb, "--scale", scale, "--out", out, *more, "--set", *SMALL, *sets]


# name → (base that it goes on from, its commands, where they are killed: folder and checkpoint)
BASES = {
    "sft": (None, line("sft"), None),
    "pairs": ("sft", line("preferences"), None),
    "reward": ("pairs", line("reward"), None),
    "ppo": ("reward", line("ppo"), None),
    "arms": ("ppo", [line(kind, "--arm", arm) for arm, kind in ARMS.items()], None),
    "whole": ("arms", line("run"), None),
    "other": (None, line("ppo", "--seed", "1"), None),
    "stopped-projector": (None, line("sft"), ("fit-projector", 1)),
    "stopped-sft": (None, line("sft"), ("fit-language", 2)),
    "stopped-reward": ("pairs", line("reward"), ("reward/", 2)),
    "stopped-detector": ("sft", line("detector"), ("detector/", 1)),
}
BASES |= {f"stopped-{kind}": ("reward", line(kind), (f"{kind}/", 1)) for kind in ARM_KINDS}
# The commands that go on from there, quick ones more often.
NEXT = {
    "sft": ("sft", "preferences", "detector", "reward"),
    "pairs": ("preferences", "reward", "reward", "dpo"),
    "reward": ("reward", "ppo", *ARM_KINDS),
    "ppo": ("ppo", "ppo", "evaluate"),
    "arms": ("evaluate", "evaluate", "run", "run", *ARM_KINDS),
    "whole": ("run", "run", "ppo", "reward", "evaluate"),
    "other": ("ppo", "reward"),
    "stopped-projector": ("sft",),
    "stopped-sft": ("sft", "sft", "preferences"),
    "stopped-reward": ("reward", "reward", "ppo"),
    "stopped-detector": ("detector", "detector", "preferences"),
}
NEXT |= {f"stopped-{kind}": (kind, kind, "run") for kind in ARM_KINDS}


def write(path, data):
    "Write bytes or text, also text that is no UTF-8."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else os.fsencode(data))


def clear(path: Path):
    "Remove a file, a link or a folder."
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def files_of(folder: Path) -> list[Path]:
    "The files of a run, without TensorBoard's."
    every = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return [p for p in every if "tensorboard" not in p.parts]


def go_on(case, base, folder="run"):
    "The same command again, the next one, or `run`; and once more as if nobody had looked."
    r = case.rng
    verb = r.choice(NEXT[base] if r.random() < 0.95 else VERBS)
    more = ["--seed", "1"] if base == "other" else []
    status = case.command(line(verb, *more, out=folder))
    if r.random() < 0.25 and status == 2:
        case.command(line(verb, *more, out=folder))


STOPPED = [name for name in NEXT if name.startswith("stopped") and "projector" not in name]


def base_of(case) -> str:
    "A prepared run; those that were stopped, or are large, more often."
    return case.rng.choice([*NEXT, *STOPPED, "whole", "reward"])
