"""Bad data in public formats: one line that names file, place and remedy, and --skip-bad leaves the
good ones. The tables stand in `bad_data` and `bad_files`."""

import json
import re

import pyarrow as pa
import pytest
from bad_data import NAMES, RECORDS, N, folder_of_pictures, good
from bad_files import FILES, pairs, table, text_of
from datasets import Dataset, Video

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.cli import main
from vlmrlhf_course.data.own import DataConfig, good_rows, rows_at

SHOWN = [f"{i}-{name}-{str(change)[:40]}" for i, (name, change, _) in enumerate(RECORDS)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    folder_of_pictures(folder)
    return folder


def read(path, skipped=None) -> list[dict]:
    "As training reads it."
    _, rows = rows_at(str(path), DataConfig(train=str(path)), skipped)
    return good_rows(rows, skipped)


def refused(path, words: str, *names: str) -> str:
    "One line that says all of it."
    with pytest.raises(UserError) as e:
        read(path)
    line = str(e.value)
    assert "\n" not in line and len(line) < 600 and " at 0x" not in line
    assert any(word in line for word in words.split("|")), line
    assert all(name in line for name in names), line
    assert re.search("[;:] (mend|give|save|name|in |no record can)|Call it", line)
    return line


def test_there_are_many():
    assert len(RECORDS) > 100 and len(FILES) > 55
    assert {name for name, *_ in RECORDS} == set(NAMES.split())


@pytest.mark.parametrize("name", NAMES.split())
def test_good_ones_are_read(name, pictures):
    file = pictures / f"good-{name}.jsonl"
    file.write_text("\ufeff" + text_of([good(name, i) for i in range(N)]).replace("\n", "\r\n"))
    assert len({row["place"] for row in read(file)}) == N
    whole = file.with_suffix(".json")
    whole.write_text(json.dumps([good(name, i) for i in range(N)]))
    assert [r["prompt"] for r in read(whole)] == [r["prompt"] for r in read(file)]


@pytest.mark.parametrize("name, change, words", RECORDS, ids=SHOWN)
def test_a_bad_record(name, change, words, pictures):
    "Wherever it stands: the first record does not decide alone what the columns mean."
    for at in (0, 3):
        rows = [good(name, i) for i in range(N)]
        rows[at] |= change
        file = pictures / "bad.jsonl"
        file.write_text(text_of(rows), "utf-8")
        refused(file, words, f"{file}, line {at + 1}: ", "--skip-bad")
        skipped = {}
        left = read(file, skipped)
        assert {row["place"] for row in left} == places(file) - {f"{file}, line {at + 1}"}
        assert len(skipped) == 1 and len(next(iter(skipped.values()))) < 500


def places(file) -> set[str]:
    return {f"{file}, line {i}" for i in range(1, N + 1)}


def test_bad_records_in_a_table(pictures):
    "The same where Parquet can hold them beside good ones."
    tried = 0
    for name, change, words in RECORDS:
        rows = [good(name, i) for i in range(N)]
        rows[3] |= change
        try:
            file = table(pictures, rows, f"bad-{tried}.parquet")
            back = pa.parquet.read_table(file).slice(3, 1).to_pylist()[0]
        except (pa.ArrowException, TypeError, UnicodeError):
            continue
        if all(repr(back.get(key)) == repr(value) for key, value in change.items()):
            tried += 1
            refused(file, words, f"{file}, row 3: ", "--skip-bad")
            skipped = {}
            assert len({row["place"] for row in read(file, skipped)}) == N - 1
    assert tried > 40


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file(name, pictures, tmp_path):
    folder_of_pictures(tmp_path)
    write, words = FILES[name]
    path = write(tmp_path)
    refused(path, words, str(path).replace("\0", "\\x00"))
    try:
        assert not read(path, skipped={}), "none is good"
    except UserError as e:
        assert len(str(e)) < 600 and "\n" not in str(e)


def test_the_command_says_it_too(pictures, capsys):
    file = pictures / "some.jsonl"
    file.write_text(text_of([*pairs(), pairs()[0] | dict(chosen="")]), "utf-8")
    assert main(["data", "check", str(file)]) == 1
    said = capsys.readouterr()
    assert f"{N} pairs are good, 1 records are not" in said.out and "line 7: chosen is" in said.out
    file.write_text("", "utf-8")
    assert main(["data", "check", str(file)]) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0


@pytest.mark.parametrize("name", NAMES.split())
def test_a_format_by_its_name(name, pictures):
    file = pictures / "named.jsonl"
    file.write_text(text_of([good(name, i) for i in range(N)]), "utf-8")
    named = DataConfig(train=str(file), format=name)
    assert rows_at(str(file), named) == rows_at(str(file), DataConfig(train=str(file)))


def test_answers_are_not_swallowed(pictures):
    "Pairs that lack one side are no prompts."
    file = pictures / "half.jsonl"
    file.write_text(text_of([dict(prompt="What?", chosen="A cat.")] * 3), "utf-8")
    refused(file, "pairs (misses rejected)", "line 1")


@pytest.mark.parametrize("nothing", [None, [], ""])
def test_a_column_for_films_that_is_empty_is_no_film(nothing, pictures):
    file = pictures / "no-film.jsonl"
    file.write_text(text_of([good("rlaif-v", i) | dict(videos=nothing) for i in range(N)]))
    assert len(read(file)) == N


def test_films_that_a_table_holds_are_refused_by_name(pictures):
    "They are not decoded: for that, `datasets` would want another package."
    rows = [good("rlaif-v", i) | dict(video=dict(bytes=b"film", path=None)) for i in range(N)]
    features = Dataset.from_list(rows[:1]).features.copy()
    features["video"] = Video()
    file = pictures / "films.parquet"
    Dataset.from_list(rows, features=features).to_parquet(file)
    refused(file, "video: films and sounds are not read", f"{file}, row 0: ")
