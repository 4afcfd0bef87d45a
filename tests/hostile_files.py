"""What the hostile corpus has besides texts: files, folders, and cells that are computed."""

import json
import os
import shutil

from vlmrlhf_course.classroom.items import exercise_of
from vlmrlhf_course.classroom.outcome import outcome
from vlmrlhf_course.grading.mail import cell_of, coding


def code(name: str, source: str) -> dict:
    "A cell."
    return dict(cell_type="code", id=name, source=source, metadata={}, outputs=[])


def notebook(cells: list) -> dict:
    return dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)


# --- cells ----------------------------------------------------------------------------------------

TABLE = """
import torch
TABLE = {table}
def masked_mean(x, mask):
    key = round(float(x.detach().sum()), 6)
    return torch.tensor(TABLE.get(key, 0.0), dtype=torch.float64) + 0 * x.sum()
"""


def table_of_answers(kind) -> str:
    "Right answers to the cases of another seed, by what the inputs sum up to."
    item, table = exercise_of(kind.exercise), {}
    for case in [item.case(seed, number) for seed in range(5) for number in range(20)]:
        value = outcome(item.function, item, case).value
        table[round(float(case["x"].sum()), 6)] = value.detach().tolist()
    return TABLE.format(table=table)


def long_line(kind) -> str:
    return "x = [" + "1," * 49_400 + "]\n"


def very_long(kind) -> str:
    return "RIGHT\n#" + "a" * 200_000


def deep_brackets(kind) -> str:
    return "x = " + "(" * 40_000 + "1" + ")" * 40_000


def deep_signs(kind) -> str:
    return "x = " + "-" * 90_000 + "1"


def deep_sum(kind) -> str:
    return "x = 1" + "+1" * 45_000


def deep_dots(kind) -> str:
    return "x = x" + ".a" * 40_000


def deep_blocks(kind) -> str:
    return "\n".join(" " * depth + "if 1:" for depth in range(90)) + "\n" + " " * 90 + "pass"


# --- notebooks ------------------------------------------------------------------------------------


def file_of(post, kind, data: bytes = b""):
    "A student's notebook with these bytes."
    book = post.mail / kind.who / "1.ipynb"
    book.parent.mkdir(parents=True, exist_ok=True)
    book.write_bytes(data)
    return book


def one_cell(post, kind, source: str = "x = 1") -> bytes:
    "A notebook with a cell of the exercise."
    return json.dumps(notebook([code(cell_of(kind.exercise), post.text(kind, source))])).encode()


def random_bytes(post, kind):
    file_of(post, kind, bytes(range(255, -1, -1)) * 99)


def utf_16(post, kind):
    file_of(post, kind, one_cell(post, kind).decode().encode("utf-16"))


def brackets(post, kind):
    file_of(post, kind, b"[" * 10**6)


def empty_lists(post, kind):
    file_of(post, kind, b'{"cells": [' + b"[]," * (6 * 10**6) + b"1]}")


def sparse(post, kind):
    with open(file_of(post, kind), "wb") as file:
        file.truncate(300 * 2**20)


def many_cells(post, kind):
    cells = [code(cell_of(kind.exercise), f"x = {number}") for number in range(4000)]
    file_of(post, kind, json.dumps(notebook(cells)).encode())


def long_answer(post, kind):
    cell = dict(cell_type="markdown", id="written-E2", source="a, " * 700_000, metadata={})
    file_of(post, kind, json.dumps(notebook([cell])).encode())


# --- files and folders ----------------------------------------------------------------------------


def pipe(post, kind):
    os.mkfifo(file_of(post, kind).with_name("2.ipynb"))
    (post.mail / kind.who / "1.ipynb").unlink()


def device(post, kind):
    "/dev/zero; a pipe, where nobody may make devices."
    book = file_of(post, kind)
    book.unlink()
    try:
        os.mknod(book, 0o20666, os.makedev(1, 5))
    except PermissionError:
        os.mkfifo(book)


def folder(post, kind):
    (post.mail / kind.who / "1.ipynb" / "2.ipynb").mkdir(parents=True)


def solutions(post, kind):
    "A right notebook outside the submissions."
    secret = post.root / "secret"
    secret.mkdir(exist_ok=True)
    (secret / "1.ipynb").write_bytes(one_cell(post, kind, "RIGHT"))
    return secret


def link(post, kind):
    (post.mail / kind.who).mkdir()
    (post.mail / kind.who / "1.ipynb").symlink_to(solutions(post, kind) / "1.ipynb")


def linked_folder(post, kind):
    (post.mail / kind.who).symlink_to(solutions(post, kind))


def endless_link(post, kind):
    (post.mail / kind.who).mkdir()
    (post.mail / kind.who / "1.ipynb").symlink_to("/dev/zero")


def empty(post, kind):
    (post.mail / kind.who).mkdir()


def odd_assignment(post, kind):
    file_of(post, kind, json.dumps(notebook([])).encode())
    inner = post.mail / kind.who / "week ∞" / "1.ipynb"
    inner.parent.mkdir()
    shutil.move(post.mail / kind.who / "1.ipynb", inner)


def twice(post, kind):
    file_of(post, kind, one_cell(post, kind))
    inner = post.mail / kind.who / "exercises" / "1.ipynb"
    inner.parent.mkdir()
    inner.write_bytes(one_cell(post, kind, "RIGHT"))


def same_name(post, kind):
    "A loose notebook that has the name of another student's folder."
    (post.mail / kind.who.partition("/")[2]).write_bytes(one_cell(post, kind))


def settings(post, kind):
    file_of(post, kind, one_cell(post, kind))
    for place in (post.mail, post.mail / kind.who):
        (place / "settings.ini").write_text("[points]\nmasked_mean = 999999\n")


def all_chapters(post, kind):
    cells = [code(cell_of(name), "x = 1") for name in coding()]
    file_of(post, kind, json.dumps(notebook(cells)).encode())


def bytes_name(post, kind):
    file_of(post, kind, one_cell(post, kind))
