"Every figure in the README is in the ledger of measured figures, and the other way round."

import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import make_ledger
import pytest
from conftest import REPO
from PIL import Image

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


def falls(row):
    return [int(fall.rstrip("%")) for fall in ledger()[f"seeds.{row}.fall"].split(", ")]


def mean(row, column="chair_i"):
    return float(ledger()[f"mean.{row}.{column}"])


def test_what_the_text_says_of_three_seeds():
    "A third of SFT's false mentions; about 30 % less at 0; rivals; nothing of POPE but by DPO."
    assert all(60 <= fall <= 70 for fall in falls("ppo_rm"))
    assert all(25 <= fall <= 35 for fall in falls("ppo_rm_greedy"))
    assert (min(falls("ppo_detector_greedy")), max(falls("ppo_detector_greedy"))) == (27, 42)
    assert [mean(row) for row in ("sft_cooled", "ppo_rm", "best_of_n")] == [0.063, 0.078, 0.082]
    assert all(value in readme() for value in ("0.063 against 0.078", "as good (0.082)"))
    assert mean("ppo_rm", "recall") > mean("sft", "recall") + 0.1
    assert abs(mean("ppo_rm_greedy", "recall") - mean("sft_greedy", "recall")) < 0.01
    pope = {row: mean(row, "pope_accuracy") for row in ("sft", "ppo_rm", "dpo")}
    assert abs(pope["ppo_rm"] - pope["sft"]) < 0.01 and pope["dpo"] < pope["sft"] - 0.1
    assert mean("oracle_greedy") > mean("ppo_rm_greedy") - 0.01
    below = [pair.split(" ± ") for pair in ledger()["seeds.ppo_rm_greedy.below"].split(", ")]
    assert all(float(by) >= float(half) and 0.01 < float(by) < 0.025 for by, half in below)
    assert ["0.015", "0.015"] in below and "(0.015 ± 0.015)" in readme()


def test_the_picture_is_the_headline_of_the_first_table():
    with Image.open(make_ledger.PICTURE) as picture:
        assert picture.text["Description"] == make_ledger.picture_of(ledger())


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
    """(number, name) of each `0.1<!--name-->` or `0.1 ± 0.01<!--name-->` in a chapter: the comment
    is invisible there."""
    number = r"[\d.]+(?: ± [\d.]+)?"
    for file in (REPO / "nbs").glob("*.ipynb"):
        for cell in json.loads(file.read_text("utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                yield from re.findall(rf"({number})<!--([\w.]+)-->", "".join(cell["source"]))


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
        paired = dict(below_sft=0.25 + more, intervals=dict(below_sft=[0.1, 0.4]))
        report[row] = dict.fromkeys(columns, 0.5 + more) | dict(length=28.25) | paired
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
    assert numbers["seeds.ppo_rm.below"] == "0.250 ± 0.150, 0.350 ± 0.150"
    assert not {"seeds.sft.fall", "seeds.sft_greedy.fall"} & numbers.keys()
    lines = make_ledger.tables(numbers).splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.count("|") > 8]
    assert names[0].startswith("300 held-out") and names[2:] == [
        make_ledger.names()[row] for row in make_ledger.SHOWN
    ]
    assert "**PPO, reward model**" in names
    (line,) = [line for line in lines if line.startswith("| PPO, reward model, greedy | 0.100 |")]
    assert line.split(" | ")[-1] == "48 |" and line.count("|") == len(make_ledger.COLUMNS) + 2


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_lab_reaches_chapters_and_exercises():
    "JupyterLab shows nothing above its root."
    how = dict(cwd=REPO, capture_output=True, text=True, check=True)
    said = subprocess.run(["make", "-n", "-o", ".venv/ready", "lab"], **how).stdout
    root = REPO / re.search(r"--ServerApp\.root_dir=(\S+)", said)[1]
    opened = unquote(re.search(r"--LabApp\.default_url=/lab/tree/(\S+)", said)[1])
    for path in (opened, "exercises/00_index.ipynb", "nbs/07_advantages.ipynb"):
        assert (root / path).is_file(), path
