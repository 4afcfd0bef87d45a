"""The tables of the benchmarks say what was measured."""

import json
import re
import sys

import pytest
from conftest import REPO
from torch.testing import assert_close

sys.path.insert(0, str(REPO))
from benchmarks import common, report


def test_readme_says_what_the_results_say():
    text = report.README.read_text("utf-8")
    assert report.render(text, report.results()) == text, "run python -m benchmarks.report"


def test_chapters_say_what_the_results_say():
    results, quoted = report.results(), []
    for chapter in report.CHAPTERS:
        text = report.quoting(chapter, results)
        if text == report.quoting(chapter, {}):
            continue
        quoted.append(chapter.name)
        stands = json.loads(chapter.read_text("utf-8"))
        assert json.loads(text) == stands, "run python -m benchmarks.report"
    assert "09_rollout.ipynb" in quoted


def test_every_result_has_its_place():
    names = {p.stem for p in common.RESULTS.glob("*.json")}
    assert names == report.results().keys()
    assert names >= {"naive", "breakdown", "scaling", "trl_peer", "two_stages", "detector"}


@pytest.mark.parametrize(
    "name", ["naive", "trl_peer", "breakdown", "scaling", "two_stages", "detector"]
)
def test_another_result_gives_another_readme(name):
    "Scale every figure of a result: its table must change."
    found, text = report.results(), report.README.read_text("utf-8")

    def scaled(x):
        if isinstance(x, dict):
            return {k: scaled(v) for k, v in x.items()}
        if isinstance(x, list):
            return [scaled(v) for v in x]
        return x * 1.37 if isinstance(x, float) else x

    assert report.render(text, found | {name: scaled(found[name])}) != text


def test_prose_has_no_measured_figures():
    """Figures live in the generated blocks; outside them a decimal number would go stale (versions
    and code aside)."""
    text, generated = report.README.read_text("utf-8"), r"<!-- ([\w.]+) -->.*?<!-- /\1 -->"
    text = re.sub(rf"{generated}|```.*?```|`[^`]*`", "", text, flags=re.S)
    assert not re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.-])|\d+ ?[×x] |\d+ ?%", text)


def test_numbers_and_tables():
    numbers = {0: "0", 0.0123: "0.012", 1.234: "1.23", 12.34: "12.3", 1234.5: "1234"}
    for number, text in numbers.items():
        assert common.number(number) == text
    lines = common.table(["a", "b"], [[1, 22]]).splitlines()
    assert lines == ["| a |  b |", "|---|---:|", "| 1 | 22 |"]
    assert_close(common.medians([dict(a=1.0), dict(a=5.0), dict(a=2.0)])["a"], 2.0)
