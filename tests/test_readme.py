"Every figure in the README is in the ledger of measured figures, and the other way round."
import json
import re

import pytest
from conftest import REPO

LEDGER = REPO / "tests" / "ledger.json"


def ledger(): return json.loads(LEDGER.read_text("utf-8"))
def readme(): return (REPO / "README.md").read_text("utf-8")


def number_in(text, value):
    "Does `value` stand in `text` as a number of its own, not as a part of a longer one?"
    return re.search(rf"(?<![\w.]){re.escape(value)}(?!\w|\.\d)", text) is not None


def test_ledger_is_there():
    "Measured figures live in tests/ledger.json: a name → the figure as the README prints it."
    assert LEDGER.is_file(), "tests/ledger.json is missing"
    assert ledger() and all(isinstance(v, str) and re.search(r"\d", v) for v in ledger().values())


def test_every_measured_figure_is_in_the_readme():
    text = readme()
    missing = {name: value for name, value in ledger().items() if not number_in(text, value)}
    assert not missing, f"not in README.md: {missing}"


def test_every_figure_in_a_table_is_measured():
    "A decimal number in a table of the README that no entry of the ledger holds was made up, or is out of date."
    rows = [line for line in readme().splitlines() if line.lstrip().startswith("|")]
    assert rows, "the README has no table"
    known = " ".join(ledger().values())
    loose = [n for row in rows for n in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", row) if not number_in(known, n)]
    assert not loose, f"in README.md, not in the ledger: {loose}"


@pytest.mark.parametrize("text, value, there", [("| 0.31 |", "0.31", True), ("10.31", "0.31", False), ("0.312", "0.31", False), ("31 %.", "31", True), ("0.31.", "0.31", True), ("2.31", "31", False)])
def test_numbers_are_matched_whole(text, value, there): assert number_in(text, value) is there


def test_figures_quoted_in_chapters_are_measured():
    "A chapter quotes the full run as `0.123<!--name-->`: the comment is invisible there, and names the entry of the ledger."
    cells = [c for file in (REPO / "nbs").glob("*.ipynb") for c in json.loads(file.read_text("utf-8"))["cells"] if c["cell_type"] == "markdown"]
    quotes = [q for c in cells for q in re.findall(r"([\d.]+)<!--([\w.]+)-->", "".join(c["source"]))]
    assert len(quotes) >= 6
    assert not (wrong := [(name, shown, ledger().get(name)) for shown, name in quotes if ledger().get(name) != shown]), wrong
