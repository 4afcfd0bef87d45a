"""Preference data that is refused, by file and line, and what --skip-bad leaves out."""

import json
import re
import shutil

import pytest
import torch
from commands import refused, same_files, smoke, tree
from picture_files import BAD_PICTURES, GOOD_PICTURES
from safetensors.torch import load_file

from vlmrlhf_course.base.files import write_jsonl
from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.cli import main
from vlmrlhf_course.data.pairs import group_pairs, load_pairs
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.train.reward import swap_pictures


@pytest.fixture(scope="module")
def run_with_pairs(smoke_run, tmp_path_factory):
    "A run that has got as far as its pairs, and the pairs' lines."
    folder = tmp_path_factory.mktemp("pairs") / "run"
    for stage in ("sft", "preferences"):
        shutil.copytree(smoke_run / stage, folder / stage)
    return folder, (folder / "preferences" / "train.jsonl").read_text().splitlines()


def change(**values):
    return lambda line: json.dumps(json.loads(line) | values)


def without(key):
    return lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != key})


def huge_weight(line):
    return re.sub(r'"weight": [^,}]+', '"weight": 1e999', line)


NOWHERE = "/no/such/picture.png"
BAD_RECORDS = {  # what becomes of a line (or a picture for it), and the words that must be said
    "cut": (lambda line: line[:-9], ["not JSON"]),
    "no object": (lambda line: "[1, 2]", ["no 'image'"]),
    "no value": (lambda line: '{"image": }', ["not JSON"]),
    "two on a line": (lambda line: line + line, ["not JSON"]),
    "deep": (lambda line: "[" * 100_000, ["not JSON"]),
    "no image": (without("image"), ["no 'image'"]),
    "no prompt": (without("prompt"), ["no 'prompt'"]),
    "no chosen": (without("chosen"), ["no 'chosen'"]),
    "no rejected": (without("rejected"), ["no 'rejected'"]),
    "chosen a number": (change(chosen=3), ["chosen is not text"]),
    "chosen null": (change(chosen=None), ["chosen is not text"]),
    "rejected a list": (change(rejected=["a cat ."]), ["rejected is not text"]),
    "prompt a number": (change(prompt=1), ["prompt is not text"]),
    "image a number": (change(image=7), ["image is neither"]),
    "image empty": (change(image=""), ["image is neither"]),
    "images none": (change(image=[]), ["image is neither"]),
    "images with a number": (change(image=["blank", 7]), ["image is neither"]),
    "images with a gap": (change(image=["blank", None]), ["image is neither"]),
    "images in images": (change(image=[["blank"]]), ["image is neither"]),
    "images, one missing": (change(image=["blank", NOWHERE]), [NOWHERE, "no such file"]),
    "equal": (change(chosen="a cat .", rejected="a  cat ."), ["chosen equals rejected"]),
    "empty": (change(rejected=" "), ["empty answer"]),
    "image in a dict": (change(image={"height": 4}), ["image is neither"]),
    "weight nan": (change(weight=float("nan")), ["weight is not a finite number"]),
    "weight inf": (change(weight=float("inf")), ["weight is not a finite number"]),
    "weight huge": (huge_weight, ["weight is not a finite number"]),
    "weight text": (change(weight="much"), ["weight is not a finite number"]),
    "weight negative": (change(weight=-1), ["weight is not positive"]),
    "weight zero": (change(weight=0), ["weight is not positive"]),
    "long prompt": (change(prompt="red " * 10_000), ["tokens", "at most 512", "shorten"]),
    "long answer": (change(chosen="red " * 600 + "."), ["tokens", "at most 512"]),
    "no such picture": (change(image=NOWHERE), [NOWHERE, "no such file"]),
    "folder": (change(image="/tmp"), ["/tmp", "directory"]),
    "bad scene": (change(image="scene:moon: small red cat @4"), ["scene:moon", "unknown place"]),
}
for name in ("cut.png", "bomb.png", "zero.png", "damaged.png", "empty.png"):
    BAD_RECORDS[f"picture {name}"] = name, [name, "not a picture"]


class TestRecords:
    @pytest.mark.parametrize("name", BAD_RECORDS)
    def test_names_file_line_and_remedy(self, capsys, run_with_pairs, tmp_path, name):
        (folder, lines), (spoil, words) = run_with_pairs, BAD_RECORDS[name]
        if isinstance(spoil, str):
            (tmp_path / spoil).write_bytes(BAD_PICTURES[spoil])
            spoil = change(image=str(tmp_path / spoil))
        file = folder / "preferences" / "train.jsonl"
        file.write_text("\n".join([*lines[:2], spoil(lines[2]), *lines[3:], ""]))
        before = tree(folder)
        line = refused(capsys, *smoke("reward", folder))
        assert f"{file}, line 3: " in line, line
        assert "mend or delete the line" in line, line
        assert "--skip-bad" in line, line
        assert all(w in line for w in words), line
        after = tree(folder)
        assert {k: after[k] for k in before} == before and "reward/done.json" not in after

    @pytest.mark.parametrize(
        "data, words",
        [(b"\xff\xfe\x00", ["not UTF-8"]), (b"", ["no pairs"]), (None, ["no such file"])],
    )
    def test_whole_file(self, capsys, run_with_pairs, data, words):
        folder, _ = run_with_pairs
        file = folder / "preferences" / "train.jsonl"
        if data is None:
            file.unlink()
        else:
            file.write_bytes(data)
        line = refused(capsys, *smoke("reward", folder))
        assert str(file) in line and all(w in line for w in words), line

    def test_what_editors_do_is_harmless(self, tmp_path, run_with_pairs):
        "A byte-order mark, empty lines, Windows line ends, rare separators inside strings."
        rows = [json.loads(line) for line in run_with_pairs[1][:3]]
        rows[0]["note"] = "one\u2028two"
        text = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\r\n\r\n"
        (tmp_path / "pairs.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert load_pairs(tmp_path / "pairs.jsonl") == rows

    def test_unusual_pictures_are_learned_from(self, vlm, tmp_path):
        for name, (data, _) in GOOD_PICTURES.items():
            (tmp_path / name).write_bytes(data)
        rows = [
            dict(
                image=str(tmp_path / name),
                prompt="describe the picture .",
                chosen="a red cat .",
                rejected="a blue cat .",
            )
            for name in GOOD_PICTURES
        ]
        write_jsonl(tmp_path / "pairs.jsonl", rows)
        assert load_pairs(tmp_path / "pairs.jsonl", vlm) == rows
        assert vlm.features([r["image"] for r in rows]).isfinite().all()

    def test_several_pictures(self, vlm, tmp_path):
        "A list in the file is a tuple in the pair, so that pairs can be grouped by their pictures."
        row = dict(
            image=["blank", "scene:beach: small red cat @4"],
            prompt="describe the picture .",
            chosen="a red cat .",
            rejected="a blue cat .",
        )
        another = row | dict(rejected="a cup .")
        turned, blind = row | dict(image=row["image"][::-1]), row | dict(image=None)
        write_jsonl(tmp_path / "pairs.jsonl", [row, another, turned, blind])
        rows = load_pairs(tmp_path / "pairs.jsonl", vlm)
        both = tuple(row["image"])
        assert [r["image"] for r in rows] == [both, both, both[::-1], None]
        assert list(map(len, group_pairs(rows))) == [2, 1, 1]
        assert swap_pictures(rows)[0]["image"] == rows[2]["image"]
        batch = vlm.batch([Prompt("", r["prompt"], "", r["image"]) for r in rows])
        assert batch.pictures.counts.tolist() == [2, 2, 2, 0]


class TestSkipBad:
    def test_good_records_are_kept_and_bad_ones_counted(self, capsys, run_with_pairs, tmp_path):
        """Three bad records among the good: the reward model is, bit for bit, the one that the good
        ones alone give."""
        folder, lines = run_with_pairs
        bad = [
            lines[0][:-9],
            change(weight=float("nan"))(lines[1]),
            change(image="/no/such/picture.png")(lines[2]),
        ]
        mixed = [bad[0], *lines[:5], bad[1], bad[2], *lines[5:]]
        for name, chosen in (("good", lines), ("mixed", mixed)):
            shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("reward"))
            (tmp_path / name / "preferences" / "train.jsonl").write_text("\n".join(chosen))
        assert main(smoke("reward", tmp_path / "good")) == 0
        capsys.readouterr()
        assert main(smoke("reward", tmp_path / "mixed", "--skip-bad")) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        file = tmp_path / "mixed" / "preferences" / "train.jsonl"
        assert len(said) == 1, said
        assert f"skipped 3 of {len(lines) + 3} records; {file}, line 1: not JSON" in said[0], said
        done = json.loads((tmp_path / "mixed" / "reward" / "done.json").read_text())
        assert done["skipped"]["records"] == 3 and "line 1: not JSON" in done["skipped"]["first"]
        stages = [tmp_path / name / "reward" for name in ("good", "mixed")]
        same_files(*stages, ["metrics.jsonl"])
        good, mixed = (load_file(stage / "reward.safetensors") for stage in stages)
        assert good.keys() == mixed.keys(), "their headers name different edits of the pairs"
        assert all(torch.equal(tensor, mixed[name]) for name, tensor in good.items())
        assert "skipped" not in json.loads((tmp_path / "good" / "reward" / "done.json").read_text())

    def test_nothing_good_is_left(self, capsys, run_with_pairs, tmp_path):
        folder, lines = run_with_pairs
        file = folder / "preferences" / "train.jsonl"
        file.write_text("\n".join(line[:-9] for line in lines))
        line = refused(capsys, *smoke("reward", folder, "--skip-bad"))
        assert f"{file}, line 1: not JSON" in line and "no other record is good" in line

    def test_only_pairs_are_skipped(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"stap": 1}\n')
        with pytest.raises(UserError, match="line 2") as e:
            read_jsonl(tmp_path / "metrics.jsonl", ("step",))
        assert "--skip-bad" not in str(e.value)
