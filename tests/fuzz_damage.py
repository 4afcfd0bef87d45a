"""Kinds of cases of fuzz.py (see fuzz_cases.py): damaged files and folders, foreign ones."""
import hashlib
import json
import os
import pickle
import shutil
import stat
from pathlib import Path

from vlmrlhf_course.base import files

SMALL = ("sft.projector.steps=2 sft.projector.save_every=1 sft.projector.batch=4 "
         "sft.language.steps=3 sft.language.save_every=1 sft.language.batch=4 "
         "preferences.prompts=12 preferences.validation=8 reward.fit.batch=4 "
         "reward.fit.save_every=1 reward_small.prompts=6 ppo.iterations=2 ppo.answers=4 "
         "ppo.minibatch=4 ppo.pool=20 ppo.save_every=1 evaluate.scenes=4").split()
ARMS = ("ppo", "ppo_rm", "gold", "hacked")
VERBS = ("sft", "preferences", "reward", "ppo", "evaluate", "run")


def line(verb, *more, sets=(), out="run", scale="smoke"):
    "A command line with the smallest settings."
    return [verb, "--scale", scale, "--out", out, *more, "--set", *SMALL, *sets]


ONE = line("reward")
# name → (base that it goes on from, its commands, where they are killed: folder and checkpoint)
BASES = {
    "sft": (None, line("sft"), None), "pairs": ("sft", line("preferences"), None),
    "reward": ("pairs", line("reward"), None), "ppo": ("reward", line("ppo"), None),
    "arms": ("ppo", [line("ppo", "--arm", a) for a in ARMS], None),
    "whole": ("arms", line("run"), None), "other": (None, line("ppo", "--seed", "1"), None),
    "stopped-projector": (None, line("sft"), ("fit-projector", 1)),
    "stopped-sft": (None, line("sft"), ("fit-language", 2)),
    "stopped-reward": ("pairs", line("reward"), ("reward/", 2)),
    "stopped-ppo": ("reward", line("ppo"), ("ppo/", 1))}
# The commands that go on from there, quick ones more often.
NEXT = {"sft": ("sft", "preferences", "reward"), "pairs": ("preferences", "reward", "reward"),
        "reward": ("reward", "ppo", "ppo"), "ppo": ("ppo", "ppo", "evaluate"),
        "arms": ("evaluate", "ppo", "run"), "whole": ("run", "run", "ppo", "reward", "evaluate"),
        "other": ("ppo", "reward"), "stopped-projector": ("sft",),
        "stopped-sft": ("sft", "sft", "preferences"), "stopped-reward": ("reward", "reward", "ppo"),
        "stopped-ppo": ("ppo", "ppo", "run")}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else os.fsencode(data))


# --- scales ---------------------------------------------------------------------------------

BROKEN = [b"", b"\0", b"\xff\xfe", b"ppo: {clip: [\n", b"- a\n", b"3", b"null", b"ppo:\n", b"{}",
          b"ppo: {clip: .1}\nppo: {clip: .2}\n", b"ppo: {clip: .1, clip: .2}\n", b"a: &a [*a]\n",
          b"ppo: &p {clip: .1}\ngold: {<<: *p}\n", b"ppo: !!python/name:os.system\n",
          b"1: {a: 1}\n", b"ppo: {1: 2}\n", b"ppo: {null: 2}\n", b"? [a]\n: b\n", b"--- a\n--- b\n",
          b"%YAML 9\n", b"ppo: {clip: ${oc.env:HOME}}\n", b"ppo: ${sft}\n", b"ppo: ???\n",
          b"true: {a: 1}\n", b"{" * 3000, b"[" * 3000, b"ppo: {clip: '\\ud83d'}\n",
          b'ppo: {clip: "\\ud83d"}\n', b"\xef\xbb\xbfppo: {clip: .1}\n", b"ppo: {lora: null}\n",
          b"ppo: {kinds: null}\n", b"ppo:\n\tclip: 1\n", b"ppo: {lora: {r: {}}}\n",
          b"ppo: null\nsft: null\n", b"&a : *a\n"]


def scale_file(case):
    "A scale that is no scale: broken YAML, a folder, a pipe, a device."
    r, path = case.rng, case.cwd / r_name(case)
    kind = r.choice(("broken", "broken", "broken", "random", "folder", "fifo", "link", "device"))
    if kind == "broken":
        write(path, r.choice(BROKEN))
    elif kind == "random":
        write(path, r.randbytes(r.choice((1, 20, 5000))))
    elif kind == "folder":
        path.mkdir(exist_ok=True)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(r.choice((path.name, "/dev/null", "/", "nowhere", "/proc/self/mem")))
    scale = r.choice(("/dev/null", "/dev/zero")) if kind == "device" else str(path)
    case.note(f"scale file {kind}")
    case.command(line(r.choice(("sft", "sft", "reward", "run")), scale=scale), long=False)


def r_name(case) -> str:
    return case.rng.choice(("mine.yaml", "smoke.yaml", "a b.yml", "smoke", "x", "é.yaml", "\udcff"))


# --- damage -----------------------------------------------------------------------------------

SHAPES = ["3", "null", "[]", "{}", '{"run": 1}', '{"uses": {}}', '{"uses": 3}', '"x"', "true",
          "[[]]", '{"run": {}}', '{"uses": null}', "[1, 2]", '{"a": {"b": []}}', "NaN",
          '{"uses": []}', "{", '{"../../elsewhere/mine.txt": [4, "x"]}', '{"/dev/zero": [0, "x"]}',
          "[" * 100_000, ""]


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
    import torch
    path.unlink(missing_ok=True)
    torch.save(Evil(case.canary), path)


def seal_again(folder: Path):
    "Make every seal fit what lies there: whoever changes a file may change these, too."
    for record in [*folder.rglob("manifest.json"), *folder.rglob("done.json")]:
        if not record.is_file():
            continue   # a pipe, say: opening one would wait for ever
        try:
            was = json.loads(record.read_text())
            for name in was["files"]:
                if not (record.parent / name).is_file():
                    continue
                data = (record.parent / name).read_bytes()
                was["files"][name] = [len(data), hashlib.sha256(data).hexdigest()]
            if "sum" in was:
                was["sum"] = files.sum_of(was)
            record.write_text(json.dumps(was))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass


def files_of(folder: Path) -> list[Path]:
    every = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return [p for p in every if "tensorboard" not in p.parts]


def clear(path: Path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def change_json(path: Path, r):
    "Change one value somewhere in a JSON file."
    try:
        tree = json.loads(path.read_text()) if path.is_file() else None
    except (ValueError, RecursionError):
        tree = None
    if tree is None:
        return   # damaged already
    at = tree
    for _ in range(r.randrange(5)):
        keys = [*at] if isinstance(at, dict) else [*range(len(at))] if isinstance(at, list) else []
        below = [k for k in keys if isinstance(at[k], (dict, list)) and at[k]]
        if not below:
            break
        at = at[r.choice(below)]
    if isinstance(at, (dict, list)) and at:
        key = r.choice([*at] if isinstance(at, dict) else [*range(len(at))])
        if r.random() < .3:
            del at[key]
        else:
            at[key] = json.loads(json.dumps(r.choice((None, 3, -1, "x", [], {}, True, 1e300, [3],
                                                      "\ud83d"))))
    path.write_text(json.dumps(tree))


def hurt(case, folder: Path, path: Path):
    "One kind of damage to a file (or folder) of a run."
    r = case.rng
    kinds = ["cut", "flip", "empty", "delete", "delete", "shape", "folder", "fifo", "link",
             "pickle", "random", "away", "loop", "full", "stage"]
    if path.suffix == ".json":
        kinds += ["shape", "value", "value", "value"]
    kind = r.choice(kinds)
    case.note(f"{kind} {path.relative_to(folder)}")
    data = path.read_bytes()
    if kind == "cut":
        write(path, data[:r.randrange(len(data) + 1)])
    elif kind == "flip" and data:
        at = r.randrange(min(len(data), r.choice((40, 10 ** 9))))
        write(path, data[:at] + bytes([data[at] ^ 1 << r.randrange(8)]) + data[at + 1:])
    elif kind == "shape":
        write(path, r.choice(SHAPES))
    elif kind == "value":
        change_json(path, r)
    elif kind == "pickle":
        evil_file(case, path, r.random() < .5)
    elif kind == "random":
        write(path, r.randbytes(r.choice((1, 100, len(data)))))
    elif kind == "stage":
        clear(path.parent if path.parent != folder else path)
    else:
        clear(path)
        mine = case.elsewhere / "mine.txt"
        write(mine, "mine")
        if kind == "empty":
            write(path, b"")
        elif kind in ("folder", "full"):
            path.mkdir()
            if kind == "full":
                write(path / "mine.txt", "mine")
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind in ("link", "away", "loop"):
            path.symlink_to({"link": mine, "away": case.elsewhere / "new.txt", "loop": path}[kind])


def go_on(case, base, folder="run"):
    "The same command again, the next one, or `run`; and once more as if nobody had looked."
    r = case.rng
    verb = r.choice(NEXT[base] if r.random() < .95 else VERBS)
    more = ["--seed", "1"] if base == "other" else []
    status = case.command(line(verb, *more, out=folder))
    if r.random() < .25 and status == 2:
        case.command(line(verb, *more, out=folder))


def base_of(case) -> str:
    return case.rng.choice([*NEXT, "stopped-sft", "stopped-reward", "stopped-ppo", "whole",
                            "reward"])


def damage(case):
    "Files of a run, finished or stopped, that are cut, changed, gone, or something else."
    r, base = case.rng, base_of(case)
    folder = case.use(base)
    files = files_of(folder)
    likely = [p for p in files if p.suffix in (".json", ".jsonl", ".yaml")] + [
        p for p in files if "checkpoints" in p.parts]
    for _ in range(r.choice((1, 1, 1, 2))):
        path = r.choice(r.choice((files, likely)))
        if path.is_file() and not path.is_symlink():
            hurt(case, folder, path)
    if r.random() < .5:
        seal_again(folder)
        case.resealed = True
        case.note("sealed again")
    go_on(case, base)


def code(case):
    "Pickles in checkpoints (with manifests that fit), and code in folders of models."
    r, base = case.rng, case.rng.choice(("stopped-sft", "stopped-reward", "stopped-ppo", "sft"))
    folder = case.use(base)
    if base == "sft":
        model = folder / "sft" / "language"
        text = f"import os\nos.mkdir({str(case.canary)!r})\nfrom transformers import *\n"
        write(model / "evil.py", text + "class E(LlavaConfig):\n    model_type = 'evil'\n")
        for name in r.sample(("config.json", "processor_config.json", "tokenizer_config.json"), 2):
            classes = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor")
            auto = dict.fromkeys(classes, "evil.E") | dict(AutoTokenizer=["evil.E", "evil.E"])
            more = dict(auto_map=auto)
            more |= dict(model_type="evil") if name == "config.json" and r.random() < .5 else {}
            write(model / name, json.dumps(json.loads((model / name).read_text()) | more))
        case.note("a model with code")
    else:
        files = [p for p in files_of(folder) if "checkpoints" in p.parts and p.suffix != ".json"]
        for path in r.sample(files, r.choice((1, 2, len(files)))):
            case.note(f"pickle {path.relative_to(folder)}")
            evil_file(case, path, r.random() < .6)
        seal_again(folder)
        case.resealed = True
    go_on(case, base)


def own_modules(case):
    "Files of the user that are named as modules of Python, in the working directory."
    case.use("reward")
    for name in case.rng.sample(("random", "json", "torch", "statistics", "yaml",
                                 "sitecustomize"), 3):
        write(case.cwd / f"{name}.py", f"import os\nos.mkdir({str(case.canary)!r})\n")
    case.command(line("run"))


def swap(case):
    "Files and folders of another seed, another arm, another stage or another checkpoint."
    r, base = case.rng, base_of(case)
    folder = case.use(base)
    other = case.bases / r.choice([*NEXT, "other", "other"]) / "w" / "cwd" / "run"
    here, there = files_of(folder), files_of(other)
    if r.random() < .5:
        a = r.choice(here)
        alike = [p for p in here + there if p.name == a.name and p != a]
        b = r.choice(alike or there)
        data = b.read_bytes()
    else:
        a = r.choice(sorted(p for p in folder.rglob("*") if p.is_dir()))
        alike = [p for p in other.rglob(a.name) if p.is_dir()]
        b = r.choice(sorted(alike) or [other / "sft"])
        data = None
    case.note(f"{a.relative_to(folder)} from {b.relative_to(b.parents[2])}")
    if data is not None:
        a.write_bytes(data)
    else:
        clear(a)
        shutil.copytree(b, a)
        case.own |= {p for p in a.rglob("*")}
    if r.random() < .3:
        seal_again(folder)
        case.resealed = True
    go_on(case, base)


def modes(case):
    "Files and folders that may not be read or written."
    base = base_of(case)
    folder = case.use(base)
    for path in case.rng.sample([folder, *sorted(folder.rglob("*"))], 2):
        mode = case.rng.choice((0, 0o400, 0o500, 0o200))
        case.note(f"chmod {oct(mode)} {path.relative_to(case.cwd)}")
        path.chmod(mode | (stat.S_IXUSR if path.is_dir() and mode == 0o400 else 0))
    go_on(case, base)


def disk(case):
    "No file may grow beyond some size, as where a disk is full; then there is room again."
    r, base = case.rng, base_of(case)
    case.use(base)
    verb = r.choice(NEXT[base])
    argv = line(verb, *(["--seed", "1"] if base == "other" else []))
    room = int(10 ** r.uniform(3.3, 6.5))
    if case.command(argv, room=room) != 0:
        case.command(argv)


# --- foreign files ----------------------------------------------------------------------------

TEMPTING = ("checkpoints/model.bin", "checkpoints/step-3/x", "step-3/model.bin", ".part-1/x",
            ".part-a", ".x.123", ".cache.2/x", "thesis/checkpoints/a.bin", "data/.part-1",
            "notes.txt", ".git/HEAD", "a/b/c/.history.2024", "language/model.safetensors",
            "config.json", "old/step-1/manifest.json", "tensorboard/events.out.tfevents.1.mine",
            "a/done.json", "seed-0/notes.txt", ".done.json.12", "checkpoints.zip",
            "checkpoints/.keep", ".config.yaml.77", "link/", "models/sft/done.json")
# Names that a run wants for itself: foreign only as long as the stage has not begun.
WANTED = ("config.yaml", "report.json", "report.html", "before_after.png", "spread.json",
          "done.json", "begun.json", "manifest.json", "metrics.jsonl", "sft", "ppo", "evaluate/x",
          "stderr.log", "sft/metrics.jsonl", "sft/done.json", "sft/begun.json",
          "sft/language/config.json", "sft/fit-language/metrics.jsonl",
          "sft/fit-language/checkpoints/step-1/x", "sft/projector/x", "ppo/stderr.log",
          "ppo/actor.safetensors", "hacked/metrics.jsonl", "preferences/train.jsonl",
          "reward/reward.safetensors", "sft/.part-language/x", "sft/.part-language", "reward",
          "preferences/candidates-train.jsonl", "ppo/checkpoints/.part-1/x",
          "reward_small/done.json")
CONTENT = (b"", b"mine", b"{}", b'{"uses": {}}', b"ppo: {clip: .1}\n", b"\0\xff" * 50)


def plant(case, folder: Path, names, number):
    "Put foreign files and folders below `folder`; what is there stays."
    r = case.rng
    for name in r.sample(names, number):
        path = folder / name
        if path.exists() or path.is_symlink():
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if name == "link/":
                path.symlink_to(case.elsewhere)
                write(case.elsewhere / "checkpoints" / "x", "mine")
            elif r.random() < .1:
                path.mkdir()
            else:
                write(path, r.choice(CONTENT))
        except (FileExistsError, NotADirectoryError):
            continue   # a file stands where a folder should be
        case.note(f"foreign {path.relative_to(case.cwd)}")


def foreign_before(case):
    "A folder with other things in it is given as --out."
    r = case.rng
    folder = case.cwd / "run"
    folder.mkdir()
    plant(case, folder, TEMPTING, r.choice((1, 3, 6)))
    if r.random() < .6:
        plant(case, folder, WANTED, r.choice((1, 2, 3)))
    verb = r.choice(("sft",) * 5 + ("preferences", "run"))
    case.command(line(verb, out=r.choice(("run", "run/"))))


def foreign_inside(case):
    "Foreign things inside a run's folders, before the command goes on."
    r, base = case.rng, base_of(case)
    folder = case.use(base)
    inside = sorted(p for p in folder.rglob("*") if p.is_dir() and "tensorboard" not in p.parts)
    for place in r.sample([folder, *inside], r.choice((1, 2))):
        names = TEMPTING
        if "checkpoints" in place.parts or place.name.startswith("fit-"):   # a foreign name, no own
            names = ("notes.txt", "step-mine/x", "step-99/x", "step-1.bak/x", ".part-77/x",
                     ".part-mine", ".x.123", "step-", "step-1/notes.txt", "step-2/notes.txt",
                     "old/checkpoints/x")
        plant(case, place, names, r.choice((1, 2, 3)))
    begun = {p.name for p in folder.iterdir()}
    free = [n for n in WANTED if "/" in n and n.split("/")[0] not in begun]
    if free and r.random() < .3:
        plant(case, folder, free, 1)
    go_on(case, base)
