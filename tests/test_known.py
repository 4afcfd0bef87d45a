"""What was checked is known by its content: nothing is opened or laid out twice, what has changed
is looked at again, and memory does not grow with the number of records."""

import gc
import json
import sqlite3
import tracemalloc

import pytest
from own_data import checkpoint, lines, recipe, squares
from PIL import Image
from report_models import make

from vlmrlhf_course.cli import main
from vlmrlhf_course.data.examine import examine
from vlmrlhf_course.data.files import records_in
from vlmrlhf_course.data.known import Known
from vlmrlhf_course.data.own import DataConfig, rows_at
from vlmrlhf_course.model.family import FAMILIES
from vlmrlhf_course.model.vlm import VLM


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "A cache of one's own."
    monkeypatch.setenv("VLMRLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "known.sqlite"


@pytest.fixture
def counted(monkeypatch):
    "How often a picture was opened, and a prompt laid out."
    seen = dict(opened=0, laid_out=0)

    def count(owner, name, key):
        real = getattr(owner, name)

        def counting(*args, **how):
            seen[key] += 1
            return real(*args, **how)

        monkeypatch.setattr(owner, name, counting)

    count(Image, "open", "opened")
    count(VLM, "prompt_ids", "laid_out")
    return seen


def asked(folder, n=6, questions=4) -> str:
    "A file of pairs in which every picture is asked about several times."
    rows = squares(n, folder / "pictures")
    every = [r | dict(prompt=f"{r['prompt']}{' ?' * i}") for i in range(questions) for r in rows]
    return str(lines(every, folder / "pairs.jsonl"))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_picture_is_opened_once(kind, tmp_path, counted):
    "Whatever is asked about it, and never to learn its size."
    file, vlm = asked(tmp_path), make(kind)
    found = examine(file, DataConfig(train=file), vlm)
    assert (len(found.rows), len(found.faults), counted["opened"]) == (24, 0, 6)
    examine(file, DataConfig(train=file), make(kind))
    assert counted == dict(opened=6, laid_out=24), "known by its content"


def test_what_has_changed_is_looked_at_again(tmp_path, counted):
    file, vlm = asked(tmp_path), make()
    examine(file, DataConfig(train=file), vlm)
    rows = [json.loads(line) for line in open(file)]
    rows[3]["chosen"] = ""
    rows[4]["chosen"] = "a red boat ."
    Image.new("RGB", (32, 32), "green").save(tmp_path / "pictures" / "0.png")
    (tmp_path / "pictures" / "1.png").write_text("none")
    lines(rows, tmp_path / "pairs.jsonl")
    counted |= dict(opened=0, laid_out=0)
    found = examine(file, DataConfig(train=file), vlm)
    assert {place.split()[-1] for place in found.faults} == {"2", "4", "8", "14", "20"}
    assert counted["laid_out"] == 4 + 1, "of the other picture, and the other answer"
    vlm.tokenizer.add_tokens(["giraffe"])
    counted["laid_out"] = 0
    examine(file, DataConfig(train=file), make())
    assert counted["laid_out"] == 0, "of the same tokenizer nothing"
    examine(file, DataConfig(train=file), vlm)
    assert counted["laid_out"] == 19, "of another one everything"


@pytest.mark.parametrize("content", [b"no database", b""])
def test_a_damaged_database_is_no_harm(content, cache, tmp_path):
    file = asked(tmp_path)
    cache.parent.mkdir()
    cache.write_bytes(content)
    assert len(examine(file, DataConfig(train=file)).rows) == 24
    cache.unlink()
    cache.mkdir()
    assert len(examine(file, DataConfig(train=file)).rows) == 24


def test_training_knows_what_the_check_has_found(tmp_path, cache, counted):
    "And says that its data changed, by name; the stage is made anew only where it is told so."
    file, model = asked(tmp_path, 12, 3), checkpoint("llava", tmp_path / "llava")
    given = ["--model", str(model), "--data", file]
    assert main(["data", "check", file, *given[:2]]) == 0
    run = ["reward", *given, "--config", str(recipe(tmp_path)), "--out", str(tmp_path / "run")]
    counted |= dict(opened=0, laid_out=0)
    assert main(run) == 0
    assert counted["opened"] <= 12, "for the features of each, and for nothing else"
    assert counted["laid_out"] == 0
    assert sqlite3.connect(cache).execute("select count(*) from pictures").fetchone() == (12,)


@pytest.mark.parametrize("changed", ["row", "picture", "picture again"])
def test_changed_data_are_said(changed, tmp_path, capsys):
    file, model = asked(tmp_path, 12, 3), checkpoint("llava", tmp_path / "llava")
    run = ["reward", "--model", str(model), "--data", file, "--config", str(recipe(tmp_path))]
    run += ["--out", str(tmp_path / "run")]
    assert main(run) == 0
    done = tmp_path / "run" / "reward" / "done.json"
    before, picture = done.read_bytes(), tmp_path / "pictures" / "7.png"
    if changed == "row":
        text = open(file).read()
        open(file, "w").write(text.replace("the picture is", "the picture is the", 1))
    elif changed == "picture":
        Image.new("RGB", (32, 32), "green").save(picture)
    else:
        picture.write_bytes(picture.read_bytes())
    capsys.readouterr()
    status = main(run)
    said = capsys.readouterr().err
    assert done.read_bytes() == before, "nothing is made anew by itself"
    if changed == "picture again":
        assert status == 0, "the same picture with another date"
        return
    line = said.strip().splitlines()[-1]
    assert status == 2 and file in line and "move that folder away, or delete it" in line
    assert ("pictures of" in line) == (changed == "picture")
    assert changed == "row" or f"{picture}: another picture" in said
    again = [*run[:-1], str(tmp_path / "again")]
    assert main(again) == 0


# --- memory ---------------------------------------------------------------------------------------


def beyond_the_rows(read) -> float:
    "MB that were needed at the worst, besides what is given back."
    gc.collect()
    tracemalloc.start()
    try:
        kept = read()
        gc.collect()
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept
    return (peak - now) / 2**20


@pytest.mark.parametrize("kind", ["lines", "table", "records", "examined"])
def test_memory_is_flat(kind, tmp_path):
    "Four times as many records: the same memory besides the rows."
    needed = {}
    for n in (500, 2000):
        rows = squares(4, tmp_path / "pictures")
        every = [rows[i % 4] | dict(prompt=f"{i} what ?" * 20, id=i) for i in range(n)]
        file = str(lines(every, tmp_path / f"{n}.jsonl"))
        if kind == "table":
            from datasets import Dataset

            file = str(tmp_path / f"{n}.parquet")
            Dataset.from_list(every).to_parquet(file)
            rows_at(file, DataConfig())  # what libraries load is loaded
        read = dict(
            lines=lambda: rows_at(file, DataConfig()),
            table=lambda: rows_at(file, DataConfig()),
            records=lambda: [sum(1 for _ in records_in(file))],
            examined=lambda: examine(file, DataConfig(), known=Known()),
        )[kind]
        needed[n] = beyond_the_rows(read)
    assert needed[2000] < needed[500] + 1, needed
    assert needed[2000] < 5, needed


def test_layouts_do_not_pile_up(monkeypatch, tmp_path):
    "Of a hundred thousand questions the last ten thousand are kept."
    monkeypatch.setattr("vlmrlhf_course.model.vlm.MOST_LAYOUTS", 5)
    file, vlm = asked(tmp_path, 2, 9), make()
    assert len(examine(file, DataConfig(train=file), vlm).rows) == 18
    assert len(vlm._prompts) <= 5
