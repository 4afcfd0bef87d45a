"Every figure in the README is in the ledger of measured figures, and the other way round."

import json
import re

import make_ledger
import pytest
from conftest import REPO

LEDGER = REPO / "tests" / "ledger.json"


def ledger():
    return json.loads(LEDGER.read_text("utf-8"))


def readme():
    return (REPO / "README.md").read_text("utf-8")


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
    "A decimal number in the README's tables that no entry of the ledger holds is out of date."
    rows = [line for line in readme().splitlines() if line.lstrip().startswith("|")]
    assert rows, "the README has no table"
    known = " ".join(ledger().values())
    numbers = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", "\n".join(rows))
    loose = [n for n in numbers if not number_in(known, n)]
    assert not loose, f"in README.md, not in the ledger: {loose}"


def test_the_tables_are_those_of_the_ledger():
    "Each number in its row and column, and the rows called as in a report."
    start, end = "<!-- table -->\n", "\n<!-- /table -->"
    assert readme().split(start)[1].split(end)[0] == make_ledger.tables(ledger())


@pytest.mark.parametrize(
    "text, value, there",
    [
        ("| 0.31 |", "0.31", True),
        ("10.31", "0.31", False),
        ("0.312", "0.31", False),
        ("31 %.", "31", True),
        ("0.31.", "0.31", True),
        ("2.31", "31", False),
    ],
)
def test_numbers_are_matched_whole(text, value, there):
    assert number_in(text, value) is there


def quotes():
    "(number, name) of each `0.123<!--name-->` in a chapter: the comment is invisible there."
    for file in (REPO / "nbs").glob("*.ipynb"):
        for cell in json.loads(file.read_text("utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                yield from re.findall(r"([\d.]+)<!--([\w.]+)-->", "".join(cell["source"]))


def test_figures_quoted_in_chapters_are_measured():
    found, known = list(quotes()), ledger()
    assert len(found) >= 6
    wrong = [(name, shown, known.get(name)) for shown, name in found if known.get(name) != shown]
    assert not wrong


def test_what_the_readme_says_of_fuzzing_is_on_record():
    fuzz = json.loads((REPO / "tests" / "proofs.json").read_text("utf-8"))["fuzz"]
    assert fuzz["minutes"] >= 60 and fuzz["violations"] == 0
    assert f"an hour, {fuzz['cases']:,} cases, nothing" in readme()


# --- how the ledger is made -----------------------------------------------------------------------


def report_of(chair_i, more=0.0):
    "A report in which every row has a figure of its own, and two have a given share."
    reward_model = dict.fromkeys(make_ledger.REWARD_MODEL, 0.75)
    report = dict(reward_model=reward_model)
    for row in make_ledger.SHOWN:
        columns = [col for col in make_ledger.COLUMNS if col != "iterations"]
        report[row] = dict.fromkeys(columns, 0.5 + more) | dict(length=28.25, intervals={})
        if row.removesuffix("_greedy") in make_ledger.ARMS:
            report[row]["iterations"] = 48
        report[row]["chair_i"] = chair_i.get(row, 0.1)
    return report


def test_the_ledger_of_reports_by_hand():
    first = report_of(dict(sft=0.4, sft_greedy=0.2, ppo_rm=0.1, ppo_rm_greedy=0.1))
    second = report_of(dict(sft=0.5, sft_greedy=0.4, ppo_rm=0.2, ppo_rm_greedy=0.1), more=0.1)
    numbers = make_ledger.ledger(first) | make_ledger.over_seeds([first, second])
    assert numbers["sft.chair_i"] == "0.400" and numbers["oracle_greedy.length"] == "28.2"
    assert numbers["dpo.iterations"] == "48" and "sft.iterations" not in numbers
    assert numbers["seeds.sft.chair_i"] == "0.450 ± 0.071"  # |a − b| / √2
    assert numbers["seeds.grpo.novel_chair_i"] == "0.550 ± 0.071"
    assert numbers["seeds.ppo_rm.fall"] == "75%, 60%"
    assert numbers["seeds.ppo_rm_greedy.fall"] == "50%, 75%", "against SFT's greedy answers"
    assert not {"seeds.sft.fall", "seeds.sft_greedy.fall"} & numbers.keys()
    lines = make_ledger.tables(numbers).splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.count("|") > 8]
    assert names[0].startswith("300 held-out") and names[2:] == [
        make_ledger.names()[row] for row in make_ledger.SHOWN
    ]
    assert "**PPO, reward model**" in names
    (line,) = [line for line in lines if line.startswith("| PPO, reward model, greedy | 0.100 |")]
    assert line.split(" | ")[-1] == "48 |" and line.count("|") == len(make_ledger.COLUMNS) + 2
