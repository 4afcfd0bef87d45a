"""The kinds of cases of fuzz.py: each is a function that draws with `case.rng`, prepares a folder
and gives one command or several. To add one, write the function and name it in KINDS."""
import dataclasses
import io
import json
import os

from fuzz_damage import (ARMS, NEXT, SMALL, VERBS, code, damage, disk, foreign_before,
                         foreign_inside, line, modes, own_modules, scale_file, swap, write)
from fuzz_fork import accepted
from PIL import Image

from vlmrlhf_course import cli


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
            yield from ((f"{path}.{key}", "float") for key in value)
            yield path, "dict"
        else:
            yield path, type(value).__name__


FIELDS = [f for name, (cls, _) in cli.sections().items() for f in fields_of(cls, name)]
NUMBERS = ["0", "1", "2", "3", "5", "0.5", "0.99", "1.5", "-1", "-0.0", "-1e-9", "1e-3", "1e-8",
           "10", "100", "1e4", "1e-45", "1e-300", "5e-324", "1e30", "1e300", "-1e300", "1e308",
           "1e400", "1" + "0" * 12, "1" + "0" * 20, "1" + "0" * 41, str(2 ** 31), str(2 ** 63),
           "nan", "inf", "-inf", ".nan", ".inf", "-.inf", "1_0", "0x10", "0o17", "1:30", "3.0"]
WORDS = ["???", "", "null", "~", "true", "false", "yes", "hello", "2026-01-01", "é", "\udcff",
         "a" * 3000, " ", "[]", "[1]", "[1,2]", "[[]]", "[nan]", "[1e-45,1.0]", "[0,0]", "{}",
         "{a: 1}", "{a: {b: c}}", "'1'", '"', "[", "{", "}", "- a", "&a [*a]", "*a", "!!set {a}",
         "${oc.env:HOME}", "${oc.env:NO_SUCH}", "${nope}", "${", "${ppo.clip}", "${sft}", "$", "\t",
         "!!python/object/apply:os.mkdir [CANARY]", "!!binary aGVsbG8=", "1\n2", "[" * 60, "%"]
CHOICES = ["rm", "gold", "rm+penalty", "reward_small", "head", "adapter", "fixed", "adaptive",
           "cosine", "phases", "best", "last", "scalar", "token", "mean", "attention", "layer",
           "batch", "tanh", "none", "[0.5,1.0]", "[0.0,0.0]", "[1e300,1.0]"]


def odd_value(case, kind) -> str:
    likely = NUMBERS if kind in ("int", "float") else CHOICES
    value = case.rng.choice(case.rng.choice([likely, likely, NUMBERS, WORDS]))
    return value.replace("CANARY", str(case.canary))


def takes_long(path, kind, value) -> bool:
    "May a run with this value legitimately take hours?"
    try:
        return (kind == "int" or path.endswith("epochs")) and float(value) > 40
    except ValueError:
        return False


STAGE = dict(world="sft", sft="sft", preferences="preferences", reward="reward", ppo="ppo",
             reward_small="ppo --arm hacked", ppo_rm="ppo --arm ppo_rm", gold="ppo --arm gold",
             hacked="ppo --arm hacked", evaluate="evaluate")
START = dict(sft=None, preferences="sft", reward="pairs", ppo="reward", evaluate="arms", run=None)


def settings(case):
    "Odd values of one or two fields, by --set or in a file."
    r, changes, long = case.rng, [], False
    taken = r.random() < .6
    for _ in range(r.choice((1, 1, 1, 2))):
        for _ in range(40 if taken else 1):
            path, kind = r.choice(FIELDS)
            value = odd_value(case, kind)
            usual = value in ("0", "1", "2", "3", "5", "0.5", "1.5") or value in CHOICES
            if not usual and not takes_long(path, kind, value) and accepted(path, value):
                break
        long |= takes_long(path, kind, value)
        changes.append((path, value))
    section = changes[0][0].split(".")[0]
    verb, *more = (STAGE[section] if r.random() < .8 else r.choice(VERBS)).split()
    base = START[verb]
    if base and section != "world":
        case.use(base)
    given = dict(c.split("=") for c in SMALL) | dict(changes)
    if r.random() < .6:
        argv = [verb, "--scale", "smoke", "--out", "run", *more, "--set",
                *(f"{k}={v}" for k, v in given.items())]
    else:
        tree = {}
        for path, value in given.items():
            at = tree
            for key in path.split(".")[:-1]:
                at = at.setdefault(key, {}) if isinstance(at, dict) else {}
            if isinstance(at, dict):
                at[path.split(".")[-1]] = value
        write(case.cwd / "mine.yaml", yaml(tree))
        argv = [verb, "--scale", "mine.yaml", "--out", "run", *more]
    case.note(f"changes {changes}"[:300])
    case.command(argv, long=long, limit=6 if long else 120)


def yaml(tree, depth=0) -> str:
    "YAML of raw values: what is odd in them stays so."
    return "".join("  " * depth + (f"{k}:\n{yaml(v, depth + 1)}" if isinstance(v, dict)
                                   else f"{k}: {v}\n") for k, v in tree.items())


INI = ["[course]\n", "[course\n", "[course]\nseed = 1e3\n", "[course]\nseed =\n", "[x]\na=1\n",
       "[course]\nruns =\n", "[course]\nruns = \udcff\n", "[course]\nscale = ???\n", "\0",
       "a = 1\n", "[course]\nruns = ~\n", "[course]\nruns = /proc/x\n",
       "[course]\nseed = 1\nseed = 2\n", "[course]\n[course]\n", "[course]\nscale\n",
       "[DEFAULT]\nscale = smoke\n", "[DEFAULT]\na = 1\n", "[course]\nscale = %(x)s\n",
       "[course]\nruns = a\n  b\n", "[course]\nruns = mine.ini\n",
       "[course]\nscale = smoke\nruns = " + "r" * 300 + "\n", "[course]\nseed = ٣\n",
       "\ufeff[course]\n", "[course]\nseed = 99999999999999999999999\n", "[course]\ncache = \n",
       "[course]\nscale =\n", "[course]\nruns = ../elsewhere\n", "[course]\nscale = settings.ini\n",
       "[course]\nseed=0_1\n"]


def settings_ini(case):
    "A settings file with odd contents, in the working directory or above it."
    r = case.rng
    path = r.choice((case.cwd, case.cwd, case.world)) / "settings.ini"
    kind = r.choice(("text",) * 6 + ("random", "folder", "fifo", "loop"))
    if kind in ("text", "random"):
        write(path, r.choice(INI) if kind == "text" else r.randbytes(200))
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name)
    verb = r.choice(("sft", "sft", "run", "--help"))
    argv = [verb, "--set", *SMALL] if verb != "--help" else [verb]
    if verb != "--help" and r.random() < .7:
        argv[1:1] = ["--scale", "smoke"]
    if r.random() < .3:
        argv[1:1] = ["--out", "out"] if verb != "--help" else []
    case.note(f"settings.ini: {kind} {path.read_bytes()[:60] if kind == 'text' else ''}")
    case.command(argv, limit=120, long="--scale" not in argv)


def command_line(case):
    "Random verbs, flags and values of them."
    r = case.rng
    verb = r.choice((*VERBS, *VERBS, *VERBS, "pretrain", "rum", "", "--help", "-h", "é", "--",
                     "ru"))
    words, small = [], r.random() < .9
    outs = ["", " ", ".", "..", "file", "file/run", "theirs", "link", "loop", "a/b/c", "~", "~/run",
            "o" * 300, "run\nrun", "\udcff", "-", "--", "/proc/x", "/dev/null", "fifo", "run/",
            "é \U0001f408", "o" * 255, "/".join(["d" * 200] * 30), "dangling", "$HOME", "*", "run"]
    odd = ["", "x", "-1", "0", "1", "2", "1e3", "99999999999999999999", "٣", " 1", "1_0", "0x1",
           "3.0", "1" * 5000, "\udcff", "nan", "-", "None", "'1'", "+1"]
    flags = {"--out": outs, "--seed": odd, "--threads": odd, "--seeds": odd, "--arm": [*ARMS, *odd],
             "--scale": ["smoke"] * 4 + [*odd, "/", ".", "file", "SMOKE", "smoke.yaml", "fifo"],
             "--resume": None, "--skip-bad": None, "--help": None, "--out=run": None, "--": None,
             "--se": odd, "--fast": None, "--resume=yes": None, "stray": None, "@file": None,
             "--set": ["a", "=", ".=", "a.b", "a=b", "ppo.clip", "ppo..clip=1", ".ppo.clip=1",
                       "é.é=1", "ppo.clip=.1=.2", "ppo.lora.r.x=1", "ppo.kinds.dog=1", "ppo=1.0",
                       "ppo.=1", "", "ppo.clip[0]=1", "ppo[clip]=.1", "\udcff.a=1", "a.b=\udcff",
                       "ppo.kinds={}"]}
    for flag in r.choices([*flags, "--out", "--out", "--seed",
                           "--set"], k=r.choice((0, 1, 1, 2, 3))):
        words += [flag] + ([r.choice(flags[flag])] if flags[flag] else [])
    if small and verb in VERBS:
        words = ["--scale", "smoke", *words] if "--scale" not in words else words
        words += ["--set", *SMALL] if words[-2:-1] != ["--set"] else SMALL
    (case.cwd / "theirs" / "checkpoints").mkdir(parents=True)
    write(case.cwd / "theirs" / "checkpoints" / "model.bin", "weeks of work")
    write(case.cwd / "file", "mine")
    os.mkfifo(case.cwd / "fifo")
    for name, to in (("link", "../elsewhere"), ("loop", "loop"), ("dangling", "nowhere")):
        (case.cwd / name).symlink_to(to)
    slow = not small or verb in ("run", "pretrain", "evaluate") or "--scale" not in words
    case.command([verb, *words], long=slow, limit=8 if slow else 120)


# --- environment ------------------------------------------------------------------------------

def environment(case):
    "Variables of launchers, empty, not numbers, or without each other."
    r = case.rng
    odd = ["", "", "0", "1", "2", "-1", "abc", "1e3", "nan", "inf", "1e300", " 0", "0x1",
           "99999999", "\udcff", "9" * 30, "true", "1.5", "0:1"]
    known = ("RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE VLMRLHF_TIMEOUT PMI_SIZE "
             "OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_LOCAL_RANK "
             "MV2_COMM_WORLD_SIZE PMI_RANK MASTER_PORT OMP_NUM_THREADS IN_TEST COLUMNS "
             "ACCELERATE_USE_CPU CUDA_VISIBLE_DEVICES ACCELERATE_USE_DEEPSPEED "
             "ACCELERATE_USE_FSDP ACCELERATE_GRADIENT_ACCUMULATION_STEPS TQDM_MININTERVAL "
             "ACCELERATE_DISPATCH_BATCHES ACCELERATE_USE_MEGATRON_LM SLURM_NTASKS "
             "ACCELERATE_DEBUG_MODE ACCELERATE_ALLOW_CP_STANDALONE VLMRLHF_QUIET HF_HUB_OFFLINE "
             "TORCHELASTIC_RUN_ID GROUP_RANK NCCL_TIMEOUT")
    names = dict.fromkeys(known.split(), odd)
    names |= dict(MASTER_ADDR=["", "localhost", "127.0.0.1", "no.such.host", "256.1.1.1", "\udcff"],
                  ACCELERATE_MIXED_PRECISION=["", "no", "fp16", "bf16", "fp8", "abc"],
                  ACCELERATE_TORCH_DEVICE=["", "cpu", "cuda", "cuda:9", "abc", "meta"],
                  ACCELERATE_DYNAMO_BACKEND=["no", "EAGER", "abc"], ACCELERATE_LOG_LEVEL=["x"],
                  PYTHONIOENCODING=["ascii", "latin-1", "koi8-r", "cp1252", "ascii:replace"],
                  HOME=["", "/nowhere", "\udcff", None], TMPDIR=["", "/nowhere", "/dev/null"],
                  VLMRLHF_TIMEOUT=[*odd, "soon", "-5", "0.001"], HF_HOME=["", "/proc/x"],
                  VLMRLHF_CACHE=["", "~"], PATH=["", "/nowhere"], TZ=["", "No/Where"],
                  TRANSFORMERS_VERBOSITY=["", "loud"], PYTHONHASHSEED=["random", "1"])
    env = {}
    likely = [n for n in names if n.startswith(("RANK", "WORLD", "MASTER", "LOCAL", "VLM",
                                                "ACCEL"))]
    for name in r.choices([*names, *likely], k=r.choice((1, 1, 2, 3, 5))):
        env[name] = r.choice(names[name])
    if r.random() < .2:   # as a launcher sets them, but for one
        env |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(20000 + case.number % 20000), VLMRLHF_TIMEOUT="3")
        name = r.choice([*env])
        env[name] = r.choice(names[name])
    peers = any(env.get(n, "0").strip().isdigit() and int(env[n]) > 1 for n in env
                if n.endswith("_SIZE") and env[n] is not None)
    patient = peers and env.get("VLMRLHF_TIMEOUT") not in ("3", "0.001", "-5", "-1", "0", "1", "2")
    base = r.choice((None, "sft", "pairs", "reward"))
    if base:
        case.use(base)
    verb = r.choice({None: ["sft"], "reward": ["ppo"]}.get(base, NEXT.get(base)))
    case.command(line(verb), env=env, long=patient, limit=12 if patient else 100)


# --- records and pictures ---------------------------------------------------------------------

def pieces(r) -> str:
    return r.choice(("a red cat .", "\ud83d", "\udc00", "\0", "\u2028", "\u202e", "cat " * 3000, "",
                     " ", "blank", "scene:", "scene:beach: small red cat @4", "scene:beach: @", ".",
                     "<image>", "scene:beach: small red cat on small red cat @4", "/dev/zero",
                     "<pad>", "</s>", "\U0001f408" * 50, "a\nb .", "\r", "<image>" * 700,
                     "http://x.y/z.png", "{}", "%s", "file:///etc/passwd",
                     "scene:beach: " + "small red cat @4; " * 400, "~", "\x7f ."))


def value(r, depth=0):
    "Any JSON value; a string that begins with `RAW` stands for its rest."
    kind = r.randrange(12 if depth < 3 else 9)
    if kind < 3:
        return pieces(r)
    if kind < 5:
        return r.choice((0, 1, -1, 2 ** 63, 10 ** 400, .5, 1e308, 5e-324, -0.0, 1e-45, 1e39, 1e20))
    if kind == 5:
        return r.choice((None, True, False))
    if kind == 6:
        return r.choice((float("nan"), float("inf"), float("-inf"), "RAW1e999", "RAW-", "RAW01"))
    if kind == 7:
        return "RAW" + r.choice(("9" * 5000, "[" * 2000 + "]" * 2000, "[" * 200_000, '"\\ud800"',
                                 "'a'", '{"a":1,"a":2}', "0." + "0" * 400 + "1", '"\\u0000"',
                                 '"\t"', ""))
    if kind == 8:
        return pieces(r) + pieces(r)
    if kind == 9:
        return {pieces(r)[:20]: value(r, depth + 1) for _ in range(r.randrange(4))}
    return [value(r, depth + 1) for _ in range(r.randrange(4))]


def text_of(record) -> str:
    raw = []

    def put(v):
        if isinstance(v, str) and v.startswith("RAW"):
            raw.append(v[3:])
            return f"\x01{len(raw) - 1}\x01"
        if isinstance(v, list):
            return [put(x) for x in v]
        return {k: put(x) for k, x in v.items()} if isinstance(v, dict) else v
    text = json.dumps(put(record))
    for i, piece in enumerate(raw):
        text = text.replace(f'"\\u0001{i}\\u0001"', piece)
    return text


def records(case):
    "Pairs with any JSON values, and files whose lines are cut, moved or no text."
    r = case.rng
    folder = case.use("pairs") / "preferences"
    file = folder / r.choice(("train.jsonl", "train.jsonl", "validation.jsonl"))
    data = file.read_bytes()
    rows = [json.loads(x) for x in data.decode().splitlines()]
    kind = r.choice(("value",) * 8 + ("whole", "line", "bytes", "bytes", "lines", "few", "format"))
    if kind == "value":
        for _ in range(r.choice((1, 1, 2, len(rows)))):
            row = r.choice(rows)
            key = r.choice(("image", "prompt", "chosen", "rejected", "weight", "gold", "kind", "id",
                            "x"))
            row[key] = value(r)
            case.note(f"{key}={ascii(row[key])[:100]}")
            if r.random() < .1:
                del row[key]
        data = "\n".join(map(text_of, rows)).encode()
    elif kind in ("whole", "line"):
        lines = [text_of(x) for x in rows]
        lines[r.randrange(len(lines))] = text_of(value(r))
        data = "\n".join(lines if kind == "line" else [text_of(value(r))]).encode()
    elif kind == "bytes":
        at = r.randrange(len(data))
        data = r.choice((data[:at], data[at:], data[:at] + r.randbytes(3) + data[at:],
                         r.randbytes(99), data[:at] + b"\0" + data[at + 1:],
                         data.replace(b"cat", b"c\xff")))
    elif kind == "lines":
        lines = data.splitlines()
        r.shuffle(lines)
        data = b"\n".join(r.choice((lines, lines * 2, lines[:1] * 9, lines[1:])))
    elif kind == "few":
        rows = rows[:r.choice((0, 1, 1, 2, 3))]
        if r.random() < .5:
            rows = [x | dict(image=None) for x in rows]
        data = "\n".join(map(text_of, rows)).encode()
    else:
        data = r.choice((b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"),
                         data.replace(b"\n", b"\r"), data.decode().encode("utf-16"), b"\n\n" + data,
                         data + b"\x1a", data[:-1], b"[" + data.replace(b"\n", b",") + b"]"))
    file.write_bytes(data)
    case.note(f"{file.name}: {kind}")
    learn(case)


def learn(case):
    "The commands that read pairs; the second as if the user had not looked."
    r = case.rng
    more = ["--skip-bad"] * (r.random() < .5)
    verb = r.choice(("reward", "reward", "reward", "preferences"))
    if case.command(line(verb, *more)) == 0 and r.random() < .2:
        case.command(line(r.choice(("reward", "ppo")), *more))


FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX", "EPS", "SGI",
           "IM", "DDS", "JPEG2000", "ICNS", "XBM", "MSP", "SPIDER", "PDF", "AVIF", "BLP", "MPO",
           "DIB")
MODES = ("RGB", "RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F", "YCbCr", "HSV", "LAB")
ALONE = [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\xd7\xcd\xc6\x9a" + b"\0" * 60,
         b"\xff\xfe\0\x10\0\x10" + b"\0" * 1300, b"SIMPLE  =                    T".ljust(2880),
         b"\0\0\0\0\x12\xaf" + b"\0" * 130, b'/* XPM */\n"1 1 1 1",\n"a c #000000",\n"a"',
         b"8BPS\0\1" + b"\0" * 40, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
         b"%%EndComments\nshowpage\n", b"P6 99999 99999 255\n", b"P2 2 2 9\n1 2 3 ", b"qoif\0\0",
         b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {\n"]


def picture(case) -> str:
    "A path with some kind of picture behind it, or something else."
    r = case.rng
    folder = case.cwd / "pictures" / str(r.randrange(10 ** 9))   # of its own: two may share a name
    path = folder / r.choice(("a.png", "é.jpg", "a", "a b.eps"))
    folder.mkdir(parents=True)
    kind = r.choice(("made",) * 5 + ("hurt",) * 4 + ("alone", "alone", "fifo", "folder", "link",
                                                     "special"))
    case.note(f"picture {kind}")
    if kind in ("made", "hurt"):
        size = r.choice(((8, 8), (64, 48), (1, 1), (1, 3000), (3000, 1), (2, 2)))
        image = Image.new("RGB", size, "red").convert("L" if size == (1, 1) else "RGB")
        form, mode, out = r.choice(FORMATS), r.choice(MODES), io.BytesIO()
        case.note(f"{form} {mode} {size}")
        try:
            image = Image.new(mode, size) if mode in ("I;16", "LAB", "HSV") else image.convert(mode)
            image.save(out, form)
        except Exception:   # a format that cannot hold this mode
            image.convert("RGB").save(out, "PNG")
        data = bytearray(out.getvalue())
        for _ in range(r.choice((1, 3, 20)) if kind == "hurt" else 0):
            at = r.randrange(min(len(data), r.choice((30, 10 ** 6))))
            data[at] = r.choice((0, 255, r.randrange(256)))
        write(path, bytes(data if r.random() < .8 or kind == "made" else data[:len(data) // 2]))
    elif kind == "alone":
        write(path, r.choice(ALONE))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.unlink(missing_ok=True)
        path.symlink_to(r.choice((path.name, "/dev/zero", "nowhere", "/proc/self/mem", "/etc",
                                  "..")))
    else:
        return r.choice(("/dev/zero", "/dev/stdin", "/dev/tty", "/proc/self/fd/0", "/dev/fd/1",
                         "/dev/null", "/proc/self/environ", "nowhere.png", "a" * 5000,
                         "/dev/random", "~/a.png"))
    return str(path) if r.random() < .7 else str(path.relative_to(case.cwd))


def pictures(case):
    "Pairs about files that are pictures of all kinds, or none."
    r = case.rng
    file = case.use("pairs") / "preferences" / "train.jsonl"
    rows = [json.loads(x) for x in file.read_text().splitlines()]
    for _ in range(r.choice((1, 1, 1, 3))):
        ref = picture(case)
        r.choice(rows)["image"] = r.choice((ref, ref, ref, [ref], [ref, "blank"], [ref, ref]))
    file.write_text("\n".join(map(json.dumps, rows)))
    learn(case)


KINDS = {   # name → (weight, function): most of the quick ones
    "settings": (34, settings), "scale_file": (6, scale_file), "settings_ini": (6, settings_ini),
    "command_line": (14, command_line), "environment": (8, environment), "records": (14, records),
    "pictures": (8, pictures), "damage": (18, damage), "code": (3, code), "swap": (5, swap),
    "own_modules": (.3, own_modules), "modes": (3, modes), "disk": (4, disk),
    "foreign_before": (4, foreign_before), "foreign_inside": (6, foreign_inside)}
