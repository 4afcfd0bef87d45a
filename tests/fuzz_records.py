"""Kinds of cases of fuzz.py: pairs with any values in them, and pictures of any kind."""

import io
import json
import os

from fuzz_commands import ARM_KINDS, VALUES, line, write
from PIL import Image

# --- records ----------------------------------------------------------------------------------

PIECES = [*VALUES["pieces"], "cat " * 3000, "\U0001f408" * 50, "<image>" * 700]
PIECES.append("scene:beach: " + "small red cat @4; " * 400)


def piece(r) -> str:
    "A text, or what may stand in its place."
    return r.choice(PIECES)


STRANGE = [2**63, 10**400, 0.5, 1e308, 5e-324, -0.0, 1e-45, 1e39, 1e20]
NO_NUMBERS = [float("nan"), float("inf"), float("-inf"), "RAW1e999", "RAW-", "RAW01"]
RAW = ["9" * 5000, "[" * 2000 + "]" * 2000, "[" * 200_000, '"\\ud800"', "'a'", '{"a":1,"a":2}']
RAW += ["0." + "0" * 400 + "1", '"\\u0000"', '"\t"', ""]


def value(r, depth=0):
    "Any JSON value; a string that begins with `RAW` stands for its rest."
    kind = r.randrange(12 if depth < 3 else 9)
    if kind < 3:
        return piece(r)
    if kind < 5:
        return r.choice([0, 1, -1, *STRANGE])
    if kind == 5:
        return r.choice((None, True, False))
    if kind == 6:
        return r.choice(NO_NUMBERS)
    if kind == 7:
        return "RAW" + r.choice(RAW)
    if kind == 8:
        return piece(r) + piece(r)
    if kind == 9:
        return {piece(r)[:20]: value(r, depth + 1) for _ in range(r.randrange(4))}
    return [value(r, depth + 1) for _ in range(r.randrange(4))]


def text_of(record) -> str:
    "JSON in which the strings that begin with `RAW` stand as they are, without quotes."
    raw = []

    def put(v):
        if isinstance(v, str) and v.startswith("RAW"):
            raw.append(v[3:])
            return f"\x01{len(raw) - 1}\x01"
        if isinstance(v, list):
            return [put(x) for x in v]
        if isinstance(v, dict):
            return {k: put(x) for k, x in v.items()}
        return v

    text = json.dumps(put(record))
    for i, piece in enumerate(raw):
        text = text.replace(f'"\\u0001{i}\\u0001"', piece)
    return text


KEYS = ["image", "prompt", "chosen", "rejected", "weight", "gold", "kind", "id", "x"]


def odd_rows(case, rows) -> bytes:
    "Some values of some records are replaced, or removed."
    r = case.rng
    for _ in range(r.choice((1, 1, 2, len(rows)))):
        row, key = r.choice(rows), r.choice(KEYS)
        row[key] = value(r)
        case.note(f"{key}={ascii(row[key])[:100]}")
        if r.random() < 0.1:
            del row[key]
    return "\n".join(map(text_of, rows)).encode()


def odd_line(case, rows) -> bytes:
    "One line is another JSON value."
    lines = [text_of(row) for row in rows]
    lines[case.rng.randrange(len(lines))] = text_of(value(case.rng))
    return "\n".join(lines).encode()


def odd_bytes(r, data: bytes) -> bytes:
    "Cut, or with other bytes in it."
    at = r.randrange(len(data))
    before, after = data[:at], data[at:]
    zero, more = before + b"\0" + after[1:], before + r.randbytes(3) + after
    no_utf8 = data.replace(b"cat", b"c\xff")
    return r.choice((before, after, more, r.randbytes(99), zero, no_utf8))


def odd_order(r, data: bytes) -> bytes:
    "Lines moved, repeated or left out."
    lines = data.splitlines()
    r.shuffle(lines)
    return b"\n".join(r.choice((lines, lines * 2, lines[:1] * 9, lines[1:])))


def few_rows(r, rows) -> bytes:
    "Hardly any records, with pictures or without."
    rows = rows[: r.choice((0, 1, 1, 2, 3))]
    if r.random() < 0.5:
        rows = [row | dict(image=None) for row in rows]
    return "\n".join(map(text_of, rows)).encode()


def odd_format(r, data: bytes) -> bytes:
    "What editors and other tools make of such a file."
    ends = data.replace(b"\n", b"\r\n"), data.replace(b"\n", b"\r")
    marked = b"\xef\xbb\xbf" + data, data.decode().encode("utf-16")
    around = b"\n\n" + data, data + b"\x1a", data[:-1]
    array = b"[" + data.replace(b"\n", b",") + b"]"
    return r.choice((*ends, *marked, *around, array))


def records(case):
    "Pairs with any JSON values, and files whose lines are cut, moved or no text."
    r = case.rng
    folder = case.use("pairs") / "preferences"
    file = folder / r.choice(("train.jsonl", "train.jsonl", "validation.jsonl"))
    data = file.read_bytes()
    rows = [json.loads(text) for text in data.decode().splitlines()]
    ways = {  # name → (how often, what becomes of the file)
        "value": (8, lambda: odd_rows(case, rows)),
        "whole": (1, lambda: text_of(value(r)).encode()),
        "line": (1, lambda: odd_line(case, rows)),
        "bytes": (2, lambda: odd_bytes(r, data)),
        "lines": (1, lambda: odd_order(r, data)),
        "few": (1, lambda: few_rows(r, rows)),
        "format": (1, lambda: odd_format(r, data)),
    }
    (kind,) = r.choices([*ways], [often for often, _ in ways.values()])
    file.write_bytes(ways[kind][1]())
    case.note(f"{file.name}: {kind}")
    learn(case)


def learn(case):
    "The commands that read pairs; the second as if the user had not looked."
    r = case.rng
    more = ["--skip-bad"] if r.random() < 0.5 else []
    verb = r.choice(("reward", "reward", "reward", "dpo", "preferences"))
    if case.command(line(verb, *more)) == 0 and r.random() < 0.2:
        case.command(line(r.choice(("reward", *ARM_KINDS)), *more))


# --- pictures ---------------------------------------------------------------------------------

# Beginnings of files of other kinds.
ALONE = [
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"\xd7\xcd\xc6\x9a" + b"\0" * 60,
    b"\xff\xfe\0\x10\0\x10" + b"\0" * 1300,
    b"SIMPLE  =                    T".ljust(2880),
    b"\0\0\0\0\x12\xaf" + b"\0" * 130,
    b'/* XPM */\n"1 1 1 1",\n"a c #000000",\n"a"',
    b"8BPS\0\1" + b"\0" * 40,
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    b"P6 99999 99999 255\n",
    b"P2 2 2 9\n1 2 3 ",
    b"qoif\0\0",
    b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {\n",
]
NO_PICTURES = [*VALUES["no pictures"], "a" * 5000]
LINKS = ["/dev/zero", "nowhere", "/proc/self/mem", "/etc", ".."]
SIZES = [(8, 8), (64, 48), (1, 1), (1, 3000), (3000, 1), (2, 2)]


def encoded(case) -> bytes:
    "A picture of some size, in some mode and format."
    r, out = case.rng, io.BytesIO()
    size, form, mode = r.choice(SIZES), r.choice(VALUES["formats"]), r.choice(VALUES["modes"])
    case.note(f"{form} {mode} {size}")
    image = Image.new("RGB", size, "red")
    try:
        if mode in ("I;16", "LAB", "HSV"):  # to which nothing is converted
            Image.new(mode, size).save(out, form)
        else:
            image.convert(mode).save(out, form)
    except Exception:  # a format that cannot hold this mode
        out = io.BytesIO()
        image.save(out, "PNG")
    return out.getvalue()


def hurt(r, data: bytes) -> bytes:
    "Some bytes of a picture are others, or its second half is gone."
    changed = bytearray(data)
    for _ in range(r.choice((1, 3, 20))):
        at = r.randrange(min(len(changed), r.choice((30, 10**6))))
        changed[at] = r.choice((0, 255, r.randrange(256)))
    return bytes(changed if r.random() < 0.8 else changed[: len(changed) // 2])


def picture(case) -> str:
    "A path with some kind of picture behind it, or something else."
    r = case.rng
    kinds = dict(made=5, hurt=4, alone=2, fifo=1, folder=1, link=1, special=1)
    (kind,) = r.choices([*kinds], [*kinds.values()])
    case.note(f"picture {kind}")
    if kind == "special":
        return r.choice(NO_PICTURES)
    folder = case.cwd / "pictures" / str(r.randrange(10**9))  # of its own: two may share a name
    path = folder / r.choice(("a.png", "é.jpg", "a", "a b.eps"))
    folder.mkdir(parents=True)
    if kind == "made":
        write(path, encoded(case))
    elif kind == "hurt":
        write(path, hurt(r, encoded(case)))
    elif kind == "alone":
        write(path, r.choice(ALONE))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(r.choice([path.name, *LINKS]))
    return str(path) if r.random() < 0.7 else str(path.relative_to(case.cwd))


def pictures(case):
    "Pairs about files that are pictures of all kinds, or none."
    r = case.rng
    file = case.use("pairs") / "preferences" / "train.jsonl"
    rows = [json.loads(x) for x in file.read_text().splitlines()]
    for _ in range(r.choice((1, 1, 1, 3))):
        path = picture(case)
        several = [path], [path, "blank"], [path, path]
        r.choice(rows)["image"] = r.choice((path, path, path, *several))
    file.write_text("\n".join(map(json.dumps, rows)))
    learn(case)
