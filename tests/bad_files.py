"""Whole files of other people that are wrong: who writes them, and what must be said (`|`: or)."""

import json
import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from bad_data import N, good, png, rating
from datasets import Dataset, DatasetDict, Image


def pairs(n: int = N) -> list[dict]:
    return [good("pairs", i) for i in range(n)]


def text_of(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(folder: Path, rows: list[dict], name: str = "x.parquet") -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder / name


def written(name: str, content: bytes | str):
    "A file of this name that holds just this."

    def write(folder: Path) -> Path:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
        return folder / name

    return write


def cut_table(share: float):
    "A Parquet file that ends too early."

    def write(folder: Path) -> Path:
        data = table(folder, pairs(200)).read_bytes()
        return written("x.parquet", data[: int(len(data) * share)])(folder)

    return write


def torn_table(folder: Path) -> Path:
    "A Parquet file with foreign bytes in its middle."
    rows = [row | dict(chosen=os.urandom(50).hex()) for row in pairs(3000)]
    data = bytearray(table(folder, rows).read_bytes())
    data[2000:60_000] = os.urandom(58_000)
    return written("x.parquet", bytes(data))(folder)


def columns(**types):
    "A Parquet file whose columns have other types."

    def write(folder: Path) -> Path:
        rows = dict(image=["a.png"] * 3, prompt=["What?"] * 3, chosen=["A cat."] * 3)
        rows |= dict(rejected=["A dog."] * 3)
        arrays = {key: pa.array(types.get(key, value)) for key, value in rows.items()}
        pq.write_table(pa.table(arrays), folder / "x.parquet")
        return folder / "x.parquet"

    return write


def saved(rows: list[dict], splits: bool = False, **features):
    "A folder that `datasets` has saved."

    def write(folder: Path) -> Path:
        data = Dataset.from_list(rows)
        for name, feature in features.items():
            data = data.cast_column(name, feature)
        data = DatasetDict(train=data, test=data) if splits else data
        data.save_to_disk(folder / "saved")
        return folder / "saved"

    return write


def broken(name: str, content: bytes = b"{", splits: bool = False):
    "A saved folder in which one file is not as it was."

    def write(folder: Path) -> Path:
        path = saved(pairs(), splits)(folder)
        (path / name).write_bytes(content)
        return path

    return write


def named(name: str):
    return lambda folder: folder / name


def made(name: str, how):
    def write(folder: Path) -> Path:
        how(folder / name)
        return folder / name

    return write


def folder_with(name: str):
    def write(folder: Path) -> Path:
        (folder / "data").mkdir()
        (folder / "data" / name).write_text(text_of(pairs()))
        return folder / "data"

    return write


FILES = {  # what it is → who writes it, words of the fault
    "empty": (written("x.jsonl", ""), "holds no record"),
    "blank lines": (written("x.jsonl", "\n \n\n"), "holds no record"),
    "empty list": (written("x.json", "[]"), "holds no record"),
    "empty .json": (written("x.json", ""), "not JSON"),
    "one record": (written("x.json", json.dumps(pairs()[0])), "no list of records"),
    "number": (written("x.json", "7"), "no list of records"),
    "under a key": (written("x.json", json.dumps(dict(data=pairs()))), "'data'"),
    "cut .json": (written("x.json", json.dumps(pairs())[:-9]), "not JSON"),
    "lines as .json": (written("x.json", text_of(pairs())), "Call it .jsonl"),
    "list as .jsonl": (written("x.jsonl", json.dumps(pairs(), indent=1)), "Call it .json"),
    "list in a line": (written("x.jsonl", json.dumps(pairs())), "Call it .json"),
    "deep": (written("x.json", "[" * 100_000), "not JSON"),
    "numbers": (written("x.jsonl", "1\n2\n"), "a record is a number"),
    "nulls": (written("x.json", "[null, null]"), "a record is missing or null"),
    "text": (written("x.jsonl", "Once upon a time\n"), "not JSON"),
    "UTF-16": (written("x.jsonl", text_of(pairs()).encode("utf-16")), "UTF-16"),
    "UTF-16, no mark": (written("x.jsonl", text_of(pairs()).encode("utf-16-le")), "not JSON|UTF"),
    "UTF-32": (written("x.json", json.dumps(pairs()).encode("utf-32")), "UTF"),
    "Latin-1": (written("x.jsonl", '{"prompt": "café"}\n'.encode("latin-1")), "not UTF-8"),
    "picture": (written("x.jsonl", png()), "not UTF-8"),
    "gzip": (written("x.jsonl.gz", b"\x1f\x8b"), "not a kind of file"),
    "CSV": (written("x.csv", "prompt,chosen\n"), "not a kind of file"),
    "no ending": (written("data", text_of(pairs())), "not a kind of file"),
    "unknown columns": (written("x.jsonl", text_of([dict(a=1, b=2)] * 3)), "no known format"),
    "no columns": (written("x.jsonl", "{}\n{}\n"), "no known format"),
    "only ties": (
        written("x.jsonl", text_of([good("vlfeedback", 0) | rating("5")])),
        "rated alike",
    ),
    "all bad": (written("x.jsonl", text_of([r | dict(chosen="") for r in pairs()])), "line 1"),
    "missing .jsonl": (named("nowhere.jsonl"), "no such file"),
    "missing .parquet": (named("nowhere.parquet"), "no such file"),
    "missing folder": (named("nowhere/"), "no such"),
    "folder as .jsonl": (made("x.jsonl", Path.mkdir), "directory|no table"),
    "pipe": (made("x.jsonl", os.mkfifo), "not a regular file"),
    "pipe as table": (made("x.parquet", os.mkfifo), "not a regular file"),
    "circle": (made("x.jsonl", lambda p: p.symlink_to(p)), "x.jsonl"),
    "device": (made("x.jsonl", lambda p: p.symlink_to("/dev/zero")), "not a regular file"),
    "empty table": (written("x.parquet", b""), "cannot be read"),
    "text as table": (written("x.parquet", text_of(pairs())), "cannot be read"),
    "table without an end": (cut_table(0.9), "cannot be read"),
    "half a table": (cut_table(0.5), "cannot be read"),
    "torn table": (torn_table, "cannot be read"),
    "no rows": (columns(image=[], prompt=[], chosen=[], rejected=[]), "holds no record"),
    "rows without columns": (
        lambda folder: table(folder, [{}, {}]),
        "no known format|holds no record",
    ),
    "numbers for answers": (columns(chosen=[1, 2, 3]), "row 0: chosen is a number"),
    "bytes for answers": (columns(chosen=[b"A", b"B", b"C"]), "row 0: chosen is"),
    "all null": (columns(rejected=[None] * 3), "no known format|rejected"),
    "lists for questions": (columns(prompt=[["What?"]] * 3), "row 0: prompt"),
    "numbers for pictures": (columns(image=[1.5, 2.5, 3.5]), "row 0: image is a number"),
    "bytes for pictures": (columns(image=[b"no", b"no", b"no"]), "row 0: image"),
    "nested nulls": (
        columns(prompt=[[dict(role="user", content=None)], [None], None]),
        "row 0: prompt",
    ),
    "NaN weights": (
        lambda folder: table(folder, [r | dict(weight=math.nan) for r in pairs()]),
        "row 0: weight is nan",
    ),
    "empty folder": (made("data", Path.mkdir), "cannot be read"),
    "folder of lines": (folder_with("x.jsonl"), "x.jsonl"),
    "folder of others": (folder_with("x.txt"), "cannot be read"),
    "several splits": (saved(pairs(), splits=True), "several splits"),
    "broken splits": (broken("dataset_dict.json", splits=True), "cannot be read"),
    "broken state": (broken("state.json"), "cannot be read"),
    "broken arrow": (broken("data-00000-of-00001.arrow", b"no"), "cannot be read"),
    "no picture in a column": (
        saved([r | dict(image=dict(bytes=b"no", path=None)) for r in pairs()], image=Image()),
        "row 0: image",
    ),
    "hub": (lambda folder: "hub:nobody/nothing", "hub:nobody/nothing: cannot be read"),
    "hub, no name": (lambda folder: "hub:", "hub:"),
    "hub, split": (lambda folder: "hub:nobody/nothing:", "hub:nobody/nothing"),
    "NUL": (lambda folder: "x\0.jsonl", "x"),
}
