"Pictures that stand inside of records: read from the file when they are looked at, never all held."

import base64
import io
import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.data.files import records_in
from vlmrlhf_course.data.known import Known
from vlmrlhf_course.data.own import DataConfig, rows_at, splits_of
from vlmrlhf_course.data.prompts import open_image

SIDE = 64  # of noise: some 16,000 signs of base64


def noise(seed: int) -> bytes:
    "A picture's file, which no two seeds share."
    pixels = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def uri(seed: int) -> str:
    return "data:image/png;base64," + base64.b64encode(noise(seed)).decode()


def pair(seed: int, image=None, prompt="what is it ?") -> dict:
    said = dict(prompt=prompt, chosen="noise .", rejected="a cat .")
    return dict(image=uri(seed) if image is None else image) | said


def written(file, records) -> str:
    "A list, or lines; the first signs are a byte-order mark and a letter of two bytes."
    texts = [json.dumps(record | dict(id="é"), ensure_ascii=False) for record in records]
    text = "\n".join(texts) if file.suffix == ".jsonl" else "[ " + " ,\n ".join(texts) + " ]"
    file.write_text("\ufeff" + text, "utf-8")
    return str(file)


def read(path: str) -> list[dict]:
    return rows_at(path, DataConfig(train=path))[1]


def pixels(ref: str) -> bytes:
    return open_image(ref).tobytes()


def message(seed: int) -> list[dict]:
    picture = dict(type="image_url", image_url=dict(url=uri(seed)))
    return [dict(role="user", content=[picture, dict(type="text", text="what ?")])]


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
@pytest.mark.parametrize(
    "form",
    [
        pair,
        lambda i: pair(i, dict(bytes=base64.b64encode(noise(i)).decode(), path=None)),
        lambda i: pair(i, dict(bytes=list(noise(i)), path=None)),
        lambda i: {k: v for k, v in pair(i, prompt=message(i)).items() if k != "image"},
    ],
    ids=["uri", "text", "numbers", "message"],
)
def test_the_picture_is_the_one_of_its_record(form, ending, tmp_path):
    rows = read(written(tmp_path / f"a{ending}", map(form, range(4))))
    assert all(len(row["image"]) < 300 for row in rows)
    want = [Image.open(io.BytesIO(noise(i))).tobytes() for i in range(4)]
    assert [pixels(row["image"]) for row in rows] == want


def test_several_of_a_record(tmp_path):
    "One of them short, which stays where it is."
    small = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(small, "PNG")
    short = "data:image/png;base64," + base64.b64encode(small.getvalue()).decode()
    record = dict(images=[uri(1), short, uri(2)]) | pair(0)
    del record["image"]
    (row,) = read(written(tmp_path / "a.jsonl", [record]))
    first, second, third = row["image"]
    assert second == short and first.startswith("kept:")
    assert [open_image(ref).size for ref in (first, second, third)] == [(64, 64), (2, 2), (64, 64)]
    assert pixels(first) != pixels(third)


def test_memory_is_flat_over_many(tmp_path):
    "Pictures of 1,200 records are some 20 MB; their rows need a small part of that."
    grown = {}
    for n in (300, 1200):
        with open(tmp_path / f"{n}.jsonl", "w") as file:
            file.writelines(json.dumps(pair(i)) + "\n" for i in range(n))
        path, known = str(tmp_path / f"{n}.jsonl"), Known(tmp_path / "known.sqlite")
        splits_of(DataConfig(train=path))  # whatever is loaded once
        tracemalloc.start()
        found = splits_of(DataConfig(train=path), look=known.look)
        now, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        grown[n] = now
        assert len(found[1]["train"]) == n - 2 * n // 10 and peak - now < 2**20
    assert (grown[1200] - grown[300]) / 900 < 2000, "bytes a record"


def test_the_same_picture_has_one_name(tmp_path):
    "So its rows stay on one side of a split, and no order of the file changes which."
    rows = [pair(i % 30, prompt="what ?") | dict(chosen=f"it is {i} .") for i in range(60)]
    sides = []
    for name, every in (("a", rows), ("b", [pair(99), *rows[::-1]])):
        path = written(tmp_path / f"{name}.jsonl", every)
        found = splits_of(DataConfig(train=path))[1]
        names = Counter(row["image"] for row in read(path))
        assert sorted(names.values()) == [1] * (name == "b") + [2] * 30
        sides.append({row["chosen"]: side for side, part in found.items() for row in part})
    shared = {said for said in sides[0] if sides[0][said] == sides[1].get(said)}
    assert len(shared) >= 56  # the new picture may push one of them out
    test = {int(said.split()[2]) % 30 for said, side in sides[0].items() if side == "test"}
    train = {int(said.split()[2]) % 30 for said, side in sides[0].items() if side == "train"}
    assert test and not test & train


def test_the_content_is_known_wherever_it_stands(tmp_path):
    digests = []
    for name, every in (("a", [pair(1)]), ("b", [pair(2), pair(1)])):
        row, known = read(written(tmp_path / f"{name}.jsonl", every))[-1], Known(tmp_path / "k")
        known.look([row])
        digests.append(known.content([row]))
    assert digests[0] == digests[1]


def test_a_file_that_has_changed_since(tmp_path):
    path = written(tmp_path / "a.jsonl", [pair(1), pair(2)])
    refs = [row["image"] for row in read(path)]
    written(tmp_path / "a.jsonl", [pair(3), pair(2)])
    with pytest.raises(UserError, match="has changed since it was read"):
        open_image(refs[0])
    assert open_image(refs[1]).size == (SIDE, SIDE)


def test_a_large_list_says_that_it_is_held(tmp_path, monkeypatch, capsys):
    path = written(tmp_path / "a.json", [pair(1)])
    assert list(records_in(path)) and not capsys.readouterr().err
    monkeypatch.setattr("vlmrlhf_course.data.files.LARGE", 1000)
    assert list(records_in(path))
    said = capsys.readouterr().err
    assert path in said and "all of it in memory" in said and ".jsonl" in said
