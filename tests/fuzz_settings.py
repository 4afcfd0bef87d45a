"""Kinds of cases of fuzz.py: settings, scale files, command lines, variables of the environment."""

import copy
import dataclasses
import os

from fuzz_commands import ARM_KINDS, ARMS, NEXT, SMALL, VALUES, VERBS, line, write
from fuzz_fork import accepted
from stage_table import LAST, STAGES, kind_of, run_of, stage_names

from vlmrlhf_course.rl.rewards import REWARDS
from vlmrlhf_course.world.scenes import WorldConfig

# --- settings ---------------------------------------------------------------------------------


def fields_of(cls, prefix):
    "Every field of a section, also of the sections in it: (path, type's name)."
    default = cls()
    for field in dataclasses.fields(cls):
        value, path = getattr(default, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from fields_of(type(value), path)
            yield path, "section"
        elif isinstance(value, dict):
            for key in REWARDS if field.name == "reward" else value:
                yield f"{path}.{key}", "float"
            yield path, "dict"
        else:
            yield path, type(value).__name__


LAYERS = run_of("smoke", []).layers
KINDS = {name: kind_of(LAYERS, name) for name in stage_names(LAYERS)}  # section → its kind
FIELDS = [*fields_of(WorldConfig, "world"), ("world.kind", "kind")]
for name, kind in KINDS.items():
    FIELDS += [*fields_of(STAGES[kind].config, name), (f"{name}.kind", "kind")]
    FIELDS += [(f"{name}.label", "str"), (f"{name}.help", "str")]
NUMBERS = VALUES["numbers"] + ["1" + "0" * zeros for zeros in (12, 20, 41)]
WORDS = [*VALUES["words"], "a" * 3000, "[" * 60]
CHOICES = VALUES["choices"]


def odd_value(case, kind) -> str:
    "A value that is rarely given; most often of the kind that the field wants."
    likely = NUMBERS if kind in ("int", "float") else [*CHOICES, *KINDS]
    value = case.rng.choice(case.rng.choice([likely, likely, NUMBERS, WORDS]))
    return value.replace("CANARY", str(case.canary))


def takes_long(path, kind, value) -> bool:
    "May a run with this value legitimately take hours?"
    try:
        return (kind == "int" or path.endswith("epochs")) and float(value) > 40
    except ValueError:
        return False


USUAL = ["0", "1", "2", "3", "5", "0.5", "1.5", *CHOICES]


def one_change(case, taken: bool):
    "A field, its kind and an odd value. `taken`: rather one that the library does not refuse."
    for _ in range(40 if taken else 1):
        path, kind = case.rng.choice(FIELDS)
        value = odd_value(case, kind)
        slow = takes_long(path, kind, value)
        if value not in USUAL and not slow and accepted(path, value):
            break
    return path, kind, value


STAGE = dict(world="sft") | {  # section → the command that reads it
    name: kind if name == kind else f"{kind} --arm {name}" for name, kind in KINDS.items()
}
START = dict(sft=None, preferences="sft", detector="sft", reward="pairs", evaluate="arms", run=None)
START |= dict.fromkeys(ARM_KINDS, "reward")


def tree_of(changes: dict) -> dict:
    """The settings of the prepared runs, nested, with changes `section.key: value`, as far as these
    do not contradict each other."""
    tree = copy.deepcopy(run_of("smoke", SMALL).layers)
    for path, value in changes.items():
        *above, last = path.split(".")
        at = tree
        for key in above:
            at = at.setdefault(key, {}) if isinstance(at, dict) else {}
        if isinstance(at, dict):
            at[last] = value
    return tree


def raw_yaml(tree, depth=0) -> str:
    "YAML of raw values: what is odd in them stays so."
    lines, indent = [], "  " * depth
    for key, value in tree.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{key}:\n{raw_yaml(value, depth + 1)}")
        else:
            lines.append(f"{indent}{key}: {value}\n")
    return "".join(lines)


def settings(case):
    "Odd values of one or two fields, by --set or in a file."
    r = case.rng
    taken = r.random() < 0.6
    drawn = [one_change(case, taken) for _ in range(r.choice((1, 1, 1, 2)))]
    changes = [(path, value) for path, _, value in drawn]
    long = any(takes_long(*change) for change in drawn)
    section = changes[0][0].split(".")[0]
    command = STAGE[section] if r.random() < 0.8 else r.choice(VERBS)
    verb, *more = command.split()
    base = START[verb]
    if base and section != "world":
        case.use(base)
    given = dict(c.split("=") for c in SMALL) | dict(changes)
    if r.random() < 0.6:
        sets = [f"{path}={value}" for path, value in given.items()]
        argv = [verb, "--scale", "smoke", "--out", "run", *more, "--set", *sets]
    else:
        write(case.cwd / "mine.yaml", raw_yaml(tree_of(dict(changes))))
        argv = [verb, "--scale", "mine.yaml", "--out", "run", *more]
    case.note(f"changes {changes}"[:300])
    case.command(argv, long=long, limit=6 if long else 120)


# --- arms of one's own ---------------------------------------------------------------------------

ARM_NAMES, ARM_WORDS = VALUES["arm names"], [*VALUES["arm words"], *KINDS]


def own_arm(r) -> dict:
    "A section that is to be an arm: mostly right, with something odd."
    likely = [*ARM_KINDS, *ARM_KINDS, *ARM_KINDS, "reward"]
    drawn = {
        "kind": r.choice(r.choice((likely, likely, likely, ARM_WORDS))),
        "label": r.choice(WORDS),
        "reward": r.choice(VALUES["rewards"]),
        "reward_model": r.choice([*KINDS, *ARM_NAMES]),
        "help": r.choice(WORDS),
        "clip": r.choice(NUMBERS),
    }
    more = r.sample([*drawn], r.choice((0, 0, 0, 1, 2)))
    return {key: drawn[key] for key in ["kind", *more]}


def compared(r, name) -> dict:
    "Which arms are compared, and which of them is shown."
    known = [name, name, *ARMS]
    arms = r.choices(r.choice((known, known, known, ARM_WORDS)), k=r.choice((0, 1, 2, 3)))
    drawn = dict(arms=f"[{','.join(arms)}]", headline=r.choice([*arms, "ppo_rm"][:2]))
    return drawn | dict(curve=r.choice(r.choice((["''"], known, ARM_WORDS))))


def own_arms(case):
    "A file with an arm of the user's own, then its verb, the comparison, or a whole run."
    r = case.rng
    name = r.choice(r.choice((["mine"], ["mine"], ARM_NAMES)))
    tree = tree_of({})
    mine = own_arm(r)
    tree[name] = tree.get(name, {}) | mine
    if r.random() < 0.5:
        tree[LAST] = tree[LAST] | compared(r, name)
    if r.random() < 0.2:  # a second arm, which may need the first, in a circle too
        tree[r.choice(ARM_NAMES)] = own_arm(r) | dict(reward_model=name)
    write(case.cwd / "mine.yaml", raw_yaml(tree))
    kind = mine["kind"] if mine["kind"] in VERBS else r.choice(ARM_KINDS)
    argv = r.choice(([kind, "--arm", name], [kind, "--arm", name], [LAST], ["run"], ["sft"]))
    case.use("arms" if argv[0] in (LAST, "run") else START[argv[0]] or "sft")
    case.note(f"{name}: {mine}; evaluate: {tree[LAST]}"[:300])
    long = argv[0] in (LAST, "run")
    case.command([*argv, "--scale", "mine.yaml", "--out", "run"], long=long, limit=40)


# --- files of settings ------------------------------------------------------------------------

BROKEN = [*VALUES["broken scales"], "{" * 3000, "[" * 3000]
SCALE_NAMES = ["mine.yaml", "smoke.yaml", "a b.yml", "smoke", "x", "é.yaml", "\udcff"]
INI = [*VALUES["ini"], "[course]\nscale = smoke\nruns = " + "r" * 300 + "\n"]


def scale_file(case):
    "A scale that is no scale: broken YAML, a folder, a pipe, a device."
    r = case.rng
    path = case.cwd / r.choice(SCALE_NAMES)
    kind = r.choice(["broken"] * 3 + ["random", "folder", "fifo", "link", "device"])
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


def settings_ini(case):
    "A settings file with odd contents, in the working directory or above it."
    r = case.rng
    path = r.choice((case.cwd, case.cwd, case.world)) / "settings.ini"
    kind = r.choice(["text"] * 6 + ["random", "folder", "fifo", "loop"])
    content = ""
    if kind == "text":
        content = r.choice(INI)
        write(path, content)
    elif kind == "random":
        write(path, r.randbytes(200))
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name)
    argv = [r.choice(("sft", "sft", "run", "--help"))]
    if argv != ["--help"]:
        argv += ["--out", "out"] if r.random() < 0.3 else []
        argv += ["--scale", "smoke"] if r.random() < 0.7 else []
        argv += ["--set", *SMALL]
    case.note(f"settings.ini: {kind} {ascii(content[:60])}")
    case.command(argv, limit=120, long="--scale" not in argv)


# --- the command line and the environment ------------------------------------------------------

OUTS = [*VALUES["outs"], "o" * 300, "o" * 255, "/".join(["d" * 200] * 30)]
ODD = [*VALUES["odd numbers"], "1" * 5000]
ODD_SCALES = ["/", ".", "file", "SMOKE", "smoke.yaml", "fifo"]
FLAGS = {  # and what may follow each
    "--out": OUTS,
    "--seed": ODD,
    "--threads": ODD,
    "--seeds": ODD,
    "--se": ODD,
    "--arm": [*KINDS, *ODD],
    "--scale": ["smoke"] * 4 + ODD + ODD_SCALES,
    "--set": VALUES["sets"],
}
ALONE = ["--resume", "--skip-bad", "--help", "--out=run", "--", "--fast", "--resume=yes"]
ALONE += ["stray", "@file"]
ODD_VERBS = ["pretrain", "rum", "", "--help", "-h", "é", "--", "ru"]


def surroundings(case):
    "What the words of a command line may point at."
    write(case.cwd / "theirs" / "checkpoints" / "model.bin", "weeks of work")
    write(case.cwd / "file", "mine")
    os.mkfifo(case.cwd / "fifo")
    for name, to in (("link", "../elsewhere"), ("loop", "loop"), ("dangling", "nowhere")):
        (case.cwd / name).symlink_to(to)


def command_line(case):
    "Random verbs, flags and values of them."
    r = case.rng
    verb = r.choice([*VERBS * 3, *ODD_VERBS])
    small = r.random() < 0.9
    words = []
    likely = [*FLAGS, *ALONE, "--out", "--out", "--seed", "--set"]
    for flag in r.choices(likely, k=r.choice((0, 1, 1, 2, 3))):
        words.append(flag)
        if flag in FLAGS:
            words.append(r.choice(FLAGS[flag]))
    if small and verb in VERBS:
        if "--scale" not in words:
            words = ["--scale", "smoke", *words]
        already = words[-2:-1] == ["--set"]
        words += SMALL if already else ["--set", *SMALL]
    surroundings(case)
    slow = not small or verb in ("run", "pretrain", "evaluate") or "--scale" not in words
    case.command([verb, *words], long=slow, limit=8 if slow else 120)


ODD_VALUES = [*VALUES["odd values"], "9" * 30]
VARIABLES = dict.fromkeys(VALUES["variables"], ODD_VALUES) | VALUES["special variables"]
VARIABLES["VLMRLHF_TIMEOUT"] = ODD_VALUES + VALUES["special variables"]["VLMRLHF_TIMEOUT"]
LIKELY = ("RANK", "WORLD", "MASTER", "LOCAL", "VLM", "ACCEL")  # how their names begin
VERBS_AFTER = NEXT | {None: ["sft"], "reward": ARM_KINDS}
NO_PATIENCE = ("3", "0.001", "-5", "-1", "0", "1", "2")


def draw_variable(r, name):
    "A value, or None: without the variable."
    value = r.choice(VARIABLES[name])
    return None if value == "UNSET" else value


def many_processes(env) -> bool:
    "Do these variables tell of other processes, for which a command waits?"
    sizes = [v for name, v in env.items() if name.endswith("_SIZE") and v is not None]
    return any(v.strip().isdigit() and int(v) > 1 for v in sizes)


def environment(case):
    "Variables of launchers, empty, not numbers, or without each other."
    r, env = case.rng, {}
    likely = [name for name in VARIABLES if name.startswith(LIKELY)]
    for name in r.choices([*VARIABLES, *likely], k=r.choice((1, 1, 2, 3, 5))):
        env[name] = draw_variable(r, name)
    if r.random() < 0.2:  # as a launcher sets them, but for one
        env |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", VLMRLHF_TIMEOUT="3")
        env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20000 + case.number % 20000))
        name = r.choice([*env])
        env[name] = draw_variable(r, name)
    patient = many_processes(env) and env.get("VLMRLHF_TIMEOUT") not in NO_PATIENCE
    base = r.choice((None, "sft", "pairs", "reward"))
    if base:
        case.use(base)
    verb = r.choice(VERBS_AFTER[base])
    case.command(line(verb), env=env, long=patient, limit=12 if patient else 100)
