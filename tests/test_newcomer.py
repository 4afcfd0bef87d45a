"What an engineer met who had read README alone: each of these was silent, late or unclear."

import json

import pytest
from own_data import QUESTION, checkpoint, lines, recipe, squares
from safetensors.torch import load_file

from vlmrlhf_course.cli import main
from vlmrlhf_course.pipeline import own_run


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A checkpoint, pairs, demonstrations, a recipe; and a run that is done."
    folder = tmp_path_factory.mktemp("desk")
    checkpoint("llava", folder / "model")
    rows = squares(30, folder / "pictures")
    lines(rows, folder / "pairs.jsonl")
    told = [dict(image=r["image"], prompt=QUESTION, answer=r["chosen"]) for r in rows]
    lines(told, folder / "told.jsonl")
    recipe(folder)
    assert main(["dpo", *given(folder, "pairs.jsonl", "run")]) == 0
    return folder


def given(folder, data, out) -> list[str]:
    words = ["--model", folder / "model", "--data", folder / data, "--out", folder / out]
    return list(map(str, [*words, "--config", folder / "seconds.yaml"]))


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("verb", [["run", "--algorithm", "dpo"], ["run"], ["reward"], ["dpo"]])
def test_what_has_no_pairs_is_refused_before_anything_is_trained(verb, desk, tmp_path, capsys):
    words = given(desk, "told.jsonl", tmp_path / "run")
    assert main([*verb, *words]) == 2
    assert "demonstrations, and no pairs" in last_line(capsys)
    assert not (tmp_path / "run" / "sft").exists()


def test_demonstrations_alone_are_enough_for_sft(desk, tmp_path):
    words = given(desk, "told.jsonl", tmp_path / "run")
    assert main(["sft", *words, "--set", "sft.language.steps=1"]) == 0


def test_a_run_is_exported_without_its_data(desk, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["export", str(desk / "run" / "dpo"), "--to", str(first)]) == 0
    (desk / "pairs.jsonl").rename(desk / "moved.jsonl")
    try:
        assert main(["export", str(desk / "run" / "dpo"), "--to", str(second)]) == 0
    finally:
        (desk / "moved.jsonl").rename(desk / "pairs.jsonl")
    one, two = (load_file(at / "adapter_model.safetensors") for at in (first, second))
    assert one.keys() == two.keys() and all((one[k] == two[k]).all() for k in one)


def test_an_export_says_that_it_takes_the_place_of_another(desk, tmp_path, capsys):
    words = ["export", str(desk / "run" / "dpo"), "--to", str(tmp_path / "to")]
    assert main(words) == 0 and "written over" not in capsys.readouterr().out
    assert main(words) == 0 and f"{tmp_path / 'to'} is written over" in capsys.readouterr().out


def test_data_check_takes_what_a_run_takes(desk, tmp_path, capsys):
    rows = [json.loads(line) for line in (desk / "pairs.jsonl").read_text().splitlines()]
    other = [dict(photo=row.pop("image"), **row) for row in rows]
    file = lines(other, desk / "photos.jsonl")
    assert main(["data", "check", str(file)]) == 0
    assert "no record has a picture" in capsys.readouterr().out
    named = ["--set", "data.columns.image=photo"]
    assert main(["data", "check", str(file), *named]) == 0
    assert "no record has a picture" not in capsys.readouterr().out
    (tmp_path / "named.yaml").write_text("data: {columns: {image: photo}}\n")
    assert main(["data", "check", str(file), "--config", str(tmp_path / "named.yaml")]) == 0
    assert "30 pairs are good, 0 records" in capsys.readouterr().out


def test_a_missing_picture_is_no_such_file(desk, capsys):
    row = json.loads((desk / "pairs.jsonl").read_text().splitlines()[0])
    file = lines([row | dict(image="pictures/nowhere.png")], desk / "lost.jsonl")
    assert main(["data", "check", str(file)]) == 1
    said = capsys.readouterr().out
    assert "no such file" in said and "not a picture" not in said
    kind = next(line for line in said.splitlines() if " × " in line).split("; first: ")[0]
    assert kind.count("`") % 2 == 0, "no message is cut in the middle of a name"


def test_a_misspelt_key_in_a_group_is_named_with_its_neighbours(desk, tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("reward: {fit: {step: 3}}\n")
    words = given(desk, "pairs.jsonl", tmp_path / "run")[:-1] + [str(tmp_path / "my.yaml")]
    assert main(["reward", *words]) == 2
    line = last_line(capsys)
    assert "unknown key reward.fit.step" in line and "steps" in line and "FitConfig" not in line


def test_a_report_samples_as_long_as_it_is_told(desk, tmp_path):
    "And calls what a run started from by that name, where no SFT has made it."
    words = given(desk, "pairs.jsonl", "run")
    more = ["--set", "evaluate.arms=[dpo]", "evaluate.headline=dpo", "evaluate.max_new_tokens=3"]
    assert main(["evaluate", *words, *more]) == 0
    found = json.loads((desk / "run" / "report.json").read_text())
    rows = [row for row in found.values() if isinstance(row, dict) and "length" in row]
    assert rows and max(row["length"] for row in rows) <= 3
    page = (desk / "run" / "report.html").read_text()
    assert "the start" in page and "SFT" not in page.split("<table")[1].split("</table>")[0]
    run = own_run(desk / "other", desk / "model", desk / "pairs.jsonl")
    assert run.layers["evaluate"]["max_new_tokens"] == run.layers["ppo"]["max_new_tokens"] == 256
