"""Kinds of cases of fuzz.py: files of others, before a run begins and inside it."""

from pathlib import Path

from fuzz_commands import VALUES, base_of, go_on, line, write

TEMPTING, WANTED = VALUES["tempting"], VALUES["wanted"]
AMONG_CHECKPOINTS = VALUES["among checkpoints"]
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
            elif r.random() < 0.1:
                path.mkdir()
            else:
                write(path, r.choice(CONTENT))
        except (FileExistsError, NotADirectoryError):
            continue  # a file stands where a folder should be
        case.note(f"foreign {path.relative_to(case.cwd)}")


def foreign_before(case):
    "A folder with other things in it is given as --out."
    r = case.rng
    folder = case.cwd / "run"
    folder.mkdir()
    plant(case, folder, TEMPTING, r.choice((1, 3, 6)))
    if r.random() < 0.6:
        plant(case, folder, WANTED, r.choice((1, 2, 3)))
    verb = r.choice(["sft"] * 5 + ["preferences", "run"])
    case.command(line(verb, out=r.choice(("run", "run/"))))


def foreign_inside(case):
    "Foreign things inside a run's folders, before the command goes on."
    r, base = case.rng, base_of(case)
    folder = case.use(base)
    inside = sorted(p for p in folder.rglob("*") if p.is_dir() and "tensorboard" not in p.parts)
    for place in r.sample([folder, *inside], r.choice((1, 2))):
        names = TEMPTING
        if "checkpoints" in place.parts or place.name.startswith("fit-"):
            names = AMONG_CHECKPOINTS  # foreign ones, none of our own
        plant(case, place, names, r.choice((1, 2, 3)))
    begun = {p.name for p in folder.iterdir()}
    free = [n for n in WANTED if "/" in n and n.split("/")[0] not in begun]
    if free and r.random() < 0.3:
        plant(case, folder, free, 1)
    go_on(case, base)
