"""Kinds of cases of fuzz.py: files and folders of a run that are damaged, swapped or locked."""

import hashlib
import json
import os
import pickle
import shutil
import stat
from pathlib import Path

import torch
from fuzz_commands import NEXT, STOPPED, VALUES, base_of, clear, files_of, go_on, line, write

from vlmrlhf_course.base.records import sum_of

SHAPES = [*VALUES["shapes"], "[" * 100_000]


class Evil:
    "A pickle that makes a folder when it is loaded."

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def evil_file(case, path: Path, zipped: bool):
    "Replace a file by such a pickle, plain or as torch.save packs it."
    if not zipped:
        write(path, pickle.dumps(Evil(case.canary)))
        return
    path.unlink(missing_ok=True)
    torch.save(Evil(case.canary), path)


def seal_again(case, folder: Path):
    "Make every seal fit what lies there: whoever changes a file may change these, too."
    case.resealed = True
    for record in [*folder.rglob("manifest.json"), *folder.rglob("done.json")]:
        if not record.is_file():
            continue  # a pipe, say: opening one would wait for ever
        try:
            was = json.loads(record.read_text())
            for name in was["files"]:
                if not (record.parent / name).is_file():
                    continue
                data = (record.parent / name).read_bytes()
                was["files"][name] = [len(data), hashlib.sha256(data).hexdigest()]
            if "sum" in was:
                was["sum"] = sum_of(was)
            record.write_text(json.dumps(was))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass


def keys_of(tree) -> list:
    "The keys of an object, the places of an array; of anything else none."
    if isinstance(tree, dict):
        return [*tree]
    if isinstance(tree, list):
        return [*range(len(tree))]
    return []


OTHER_VALUES = ("null", "3", "-1", '"x"', "[]", "{}", "true", "1e300", "[3]", '"\\ud83d"')


def change_json(path: Path, r):
    "Change one value somewhere in a JSON file."
    try:
        tree = json.loads(path.read_text()) if path.is_file() else None
    except (ValueError, RecursionError):
        tree = None
    if tree is None:
        return  # damaged already
    at = tree
    for _ in range(r.randrange(5)):
        below = [key for key in keys_of(at) if keys_of(at[key])]
        if not below:
            break
        at = at[r.choice(below)]
    if keys_of(at):
        key = r.choice(keys_of(at))
        if r.random() < 0.3:
            del at[key]
        else:
            at[key] = json.loads(r.choice(OTHER_VALUES))
    path.write_text(json.dumps(tree))


DAMAGES = """
    cut flip empty delete delete shape folder fifo link pickle random away loop full stage
""".split()


def replaced(case, path: Path, kind: str):
    "Something else stands where a file was, or nothing."
    clear(path)
    mine = case.elsewhere / "mine.txt"
    write(mine, "mine")
    if kind == "empty":
        write(path, b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "full":
        write(path / "mine.txt", "mine")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind in ("link", "away", "loop"):
        targets = dict(link=mine, away=case.elsewhere / "new.txt", loop=path)
        path.symlink_to(targets[kind])


def hurt(case, folder: Path, path: Path):
    "One kind of damage to a file (or folder) of a run."
    r = case.rng
    more = ["shape", "value", "value", "value"] if path.suffix == ".json" else []
    kind = r.choice(DAMAGES + more)
    case.note(f"{kind} {path.relative_to(folder)}")
    data = path.read_bytes()
    if kind == "cut":
        write(path, data[: r.randrange(len(data) + 1)])
    elif kind == "flip" and data:
        at = r.randrange(min(len(data), r.choice((40, 10**9))))
        flipped = data[at] ^ 1 << r.randrange(8)
        write(path, data[:at] + bytes([flipped]) + data[at + 1 :])
    elif kind == "shape":
        write(path, r.choice(SHAPES))
    elif kind == "value":
        change_json(path, r)
    elif kind == "pickle":
        evil_file(case, path, r.random() < 0.5)
    elif kind == "random":
        write(path, r.randbytes(r.choice((1, 100, len(data)))))
    elif kind == "stage":
        clear(path.parent if path.parent != folder else path)
    else:
        replaced(case, path, kind)


def damage(case):
    "Files of a run, finished or stopped, that are cut, changed, gone, or something else."
    r, base = case.rng, base_of(case)
    folder = case.use(base)
    every = files_of(folder)
    likely = [p for p in every if p.suffix in (".json", ".jsonl", ".yaml")]
    likely += [p for p in every if "checkpoints" in p.parts]
    for _ in range(r.choice((1, 1, 1, 2))):
        path = r.choice(r.choice((every, likely)))
        if path.is_file() and not path.is_symlink():
            hurt(case, folder, path)
    if r.random() < 0.5:
        seal_again(case, folder)
        case.note("sealed again")
    go_on(case, base)


CODED = ("config.json", "processor_config.json", "tokenizer_config.json")
CLASSES = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor")


def code_in_a_model(case, model: Path):
    "Code beside a model's weights, and configurations that name it."
    text = f"import os\nos.mkdir({str(case.canary)!r})\nfrom transformers import *\n"
    write(model / "evil.py", text + "class E(LlavaConfig):\n    model_type = 'evil'\n")
    for name in case.rng.sample(CODED, 2):
        auto = dict.fromkeys(CLASSES, "evil.E") | dict(AutoTokenizer=["evil.E", "evil.E"])
        more = dict(auto_map=auto)
        if name == "config.json" and case.rng.random() < 0.5:
            more["model_type"] = "evil"
        write(model / name, json.dumps(json.loads((model / name).read_text()) | more))
    case.note("a model with code")


def code(case):
    "Pickles in checkpoints (with manifests that fit), and code in folders of models."
    r = case.rng
    base = r.choice((*STOPPED, "sft"))
    folder = case.use(base)
    if base == "sft":
        code_in_a_model(case, folder / "sft" / "language")
    else:
        saved = [p for p in files_of(folder) if "checkpoints" in p.parts and p.suffix != ".json"]
        for path in r.sample(saved, r.choice((1, 2, len(saved)))):
            case.note(f"pickle {path.relative_to(folder)}")
            evil_file(case, path, r.random() < 0.6)
        seal_again(case, folder)
    go_on(case, base)


def own_modules(case):
    "Files of the user that are named as modules of Python, in the working directory."
    case.use("reward")
    modules = ("random", "json", "torch", "statistics", "yaml", "sitecustomize")
    for name in case.rng.sample(modules, 3):
        write(case.cwd / f"{name}.py", f"import os\nos.mkdir({str(case.canary)!r})\n")
    case.command(line("run"))


def swap(case):
    "Files and folders of another seed, another arm, another stage or another checkpoint."
    r, base = case.rng, base_of(case)
    folder = case.use(base)
    other = case.bases / r.choice([*NEXT, "other", "other"]) / "w" / "cwd" / "run"
    if r.random() < 0.5:
        here, there = files_of(folder), files_of(other)
        mine = r.choice(here)
        alike = [p for p in here + there if p.name == mine.name and p != mine]
        theirs = r.choice(alike or there)
        mine.write_bytes(theirs.read_bytes())
    else:
        mine = r.choice(sorted(p for p in folder.rglob("*") if p.is_dir()))
        alike = sorted(p for p in other.rglob(mine.name) if p.is_dir())
        theirs = r.choice(alike or [other / "sft"])
        clear(mine)
        shutil.copytree(theirs, mine)
        case.own |= {*mine.rglob("*")}
    case.note(f"{mine.relative_to(folder)} from {theirs.relative_to(theirs.parents[2])}")
    if r.random() < 0.3:
        seal_again(case, folder)
    go_on(case, base)


def modes(case):
    "Files and folders that may not be read or written."
    base = base_of(case)
    folder = case.use(base)
    for path in case.rng.sample([folder, *sorted(folder.rglob("*"))], 2):
        mode = case.rng.choice((0, 0o400, 0o500, 0o200))
        case.note(f"chmod {oct(mode)} {path.relative_to(case.cwd)}")
        if path.is_dir() and mode == 0o400:
            mode |= stat.S_IXUSR
        path.chmod(mode)
    go_on(case, base)


def disk(case):
    "No file may grow beyond some size, as where a disk is full; then there is room again."
    r, base = case.rng, base_of(case)
    case.use(base)
    verb = r.choice(NEXT[base])
    seed = ["--seed", "1"] if base == "other" else []
    argv = line(verb, *seed)
    room = int(10 ** r.uniform(3.3, 6.5))
    if case.command(argv, room=room) != 0:
        case.command(argv)
