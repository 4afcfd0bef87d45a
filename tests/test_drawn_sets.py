"""Drawn pairs in three public formats: the same pairs come out of all of them."""

import pytest
from drawn_sets import SETS, SIDE, pairs

from vlmrlhf_course.cli import main
from vlmrlhf_course.data.own import DataConfig, good_rows, rows_at
from vlmrlhf_course.data.prompts import open_image


@pytest.mark.parametrize("n", [200])
def test_the_same_pairs_from_all_formats(n, tmp_path, capsys):
    drawn = pairs(n)
    want = [(r["prompt"], r["chosen"], r["rejected"], pixels(r)) for r in drawn]
    for name, write in SETS.items():
        file = str(write(drawn, tmp_path))
        kind, rows = rows_at(file, DataConfig(train=file))
        assert kind == "pairs" and f"read as {name}" in capsys.readouterr().err
        found = good_rows(rows)
        got = [(r["prompt"], r["chosen"], r["rejected"], pixels(r)) for r in found]
        assert got == want, name


def pixels(row: dict) -> bytes:
    return open_image(row["image"], SIDE).tobytes()


def test_one_becomes_another(tmp_path, capsys):
    "`data convert` writes them in our own format, pictures and all."
    for name, write in SETS.items():
        file, to = write(pairs(20), tmp_path), tmp_path / f"{name}-own"
        assert main(["data", "convert", str(file), "--to", str(to)]) == 0
        assert main(["data", "check", str(to / "data.jsonl")]) == 0
        assert "20 pairs are good, 0 records are not" in capsys.readouterr().out
