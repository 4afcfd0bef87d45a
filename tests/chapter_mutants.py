"""Would a chapter notice? Each runs once with one function of its own broken, the way a row of
`mutations/` breaks it, or at random where no row does; one of its cells must then fail. Reading the
figures is not enough: a learner who changes the code has nothing but the cells' asserts.

    python tests/chapter_mutants.py              # every chapter; exits 1 where one notices nothing
    python tests/chapter_mutants.py --only 07    # those whose name begins so
    python tests/chapter_mutants.py --seed 3     # other functions

The notebooks are not touched. The chapters' lesson is read from the user's cache."""

import argparse
import os
import random
import sys
import time
from pathlib import Path

import nbformat
from mutants import MUTANTS, Mutant, record, segment
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from random_mutants import changes_in, compiles

NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"
LIMIT = 900  # seconds for a cell


def broken(source: str, m: Mutant) -> str | None:
    "An exported cell with a mutant in it; None where that is about something else."
    if not source.startswith("#| export"):
        return None
    try:
        start, end = segment(source, m.where)
    except StopIteration:
        return None
    lines = source.splitlines(keepends=True)
    code = "".join(lines[start:end])
    if code.count(m.old) != 1:
        return None
    return "".join(lines[:start]) + code.replace(m.old, m.new) + "".join(lines[end:])


def ways(book: nbformat.NotebookNode) -> list[tuple[int, str, str]]:
    "How a chapter's own functions can be broken: (cell, its new source, what that does)."
    cells = [(i, cell.source) for i, cell in enumerate(book.cells) if cell.cell_type == "code"]
    found = [(i, broken(source, m), m.name) for i, source in cells for m in MUTANTS]
    found = [way for way in found if way[1]]
    if found:
        return found
    exported = [(i, source) for i, source in cells if source.startswith("#| export")]
    drawn = [(i, change) for i, source in exported for change in changes_in(source, Path("."))]
    return [(i, change.text, change.name) for i, change in drawn if compiles(change.text)]


def noticed_in(book: nbformat.NotebookNode) -> str | None:
    "The first cell that fails, and with what; None where all of them run."
    client = NotebookClient(book, timeout=LIMIT, resources=dict(metadata=dict(path=NOTEBOOKS)))
    try:
        client.execute()
    except CellExecutionError as e:
        cell = next(c for c in book.cells if any(o.output_type == "error" for o in outputs(c)))
        return f"{cell.id}: {e.ename}"
    return None


def outputs(cell) -> list:
    return cell.get("outputs", [])


def try_chapter(path: Path, seed: int) -> bool | None:
    "Break one function and run the chapter; None where nothing of it can be broken."
    book = nbformat.read(path, 4)
    known = ways(book)
    if not known:
        return None
    i, source, what = random.Random(f"{seed}/{path.stem}").choice(known)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    book.cells[i].source = source
    since = time.time()
    cell = noticed_in(book)
    said = f"noticed in {cell}" if cell else "NOT NOTICED"
    print(f"{path.stem:16} {time.time() - since:4.0f} s  {what[:70]:70} {said}", flush=True)
    return bool(cell)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="NN")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ |= dict(HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore:IProgress not found")
    chapters = sorted(NOTEBOOKS.glob(f"{args.only}*.ipynb"))
    found = {path.stem: try_chapter(path, args.seed) for path in chapters}
    tried = {name: noticed for name, noticed in found.items() if noticed is not None}
    missed = [name for name, noticed in tried.items() if not noticed]
    print(f"{len(tried) - len(missed)} of {len(tried)} chapters noticed; missed by {missed}")
    if not args.only:
        record(dict(chapters=len(tried), noticed=len(tried) - len(missed)), "chapters")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
