"An engineer's checkpoint and file of pairs: one command from there to a folder that others load."

import json
import shutil

import pytest
from conftest import REPO
from own_data import QUESTION, checkpoint, lines, recipe, squares
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.cli import main


@pytest.fixture
def own(tmp_path):
    "Arguments for a checkpoint and pairs of one's own."

    def arguments(kind="llava", pairs=30, out="run"):
        model = checkpoint(kind, tmp_path / kind) if not (tmp_path / kind).exists() else None
        model = model or tmp_path / kind
        data = lines(squares(pairs, tmp_path / "pictures"), tmp_path / "pairs.jsonl")
        given = ["--model", model, "--data", data, "--config", recipe(tmp_path)]
        return list(map(str, [*given, "--out", tmp_path / out]))

    return arguments


def figures(folder):
    return json.loads((folder / "report.json").read_text("utf-8"))


def test_one_command_from_a_checkpoint_to_a_report_and_an_adapter(own, tmp_path, capsys):
    assert main(["run", *own()]) == 0
    said = capsys.readouterr()
    assert "pairs, read as" in said.err and "PPO" in said.out
    found = figures(tmp_path / "run")
    assert {"sft", "ppo", "ppo_greedy", "best_of_n", "reward_model"} <= found.keys()
    assert {"reward", "kl", "length", "wins"} <= found["ppo"].keys()
    assert not {"chair_i", "recall", "true_score"} & found["ppo"].keys(), "nobody knows the truth"
    assert not (tmp_path / "run" / "sft" / "language").exists(), "nothing to train there"

    stage, to = str(tmp_path / "run" / "ppo"), tmp_path / "adapter"
    assert main(["export", stage, "--to", str(to)]) == 0
    trunk = json.loads((to / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert trunk == str(tmp_path / "llava")
    PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(trunk), to)


@pytest.mark.parametrize("algorithm", ["dpo", "grpo", "rloo"])
def test_other_algorithms_by_a_word(algorithm, own, tmp_path):
    assert main(["run", "--algorithm", algorithm, *own("gemma3")]) == 0
    assert {algorithm, f"{algorithm}_greedy"} <= figures(tmp_path / "run").keys()


def test_a_reward_model_learns_what_the_pictures_show(own, tmp_path):
    more = ["--set", "reward.epochs=12"]
    assert main(["reward", *own(pairs=120), *more]) == 0
    done = json.loads((tmp_path / "run" / "reward" / "done.json").read_text())
    assert done["pair_accuracy"]["labels"] > 0.8 > 0.7 > done["image_ablated"]["labels"]


def test_the_same_run_again_computes_nothing(own, tmp_path, capsys):
    given = own()
    assert main(["reward", *given]) == 0
    before = (tmp_path / "run" / "reward" / "done.json").stat().st_mtime_ns
    assert main(["reward", *given]) == 0
    assert (tmp_path / "run" / "reward" / "done.json").stat().st_mtime_ns == before


def test_other_data_under_the_same_name_are_noticed(own, tmp_path, capsys):
    given = own()
    assert main(["reward", *given]) == 0
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:-3]), "utf-8")
    assert main(["reward", *given]) == 2
    assert "data" in capsys.readouterr().err.splitlines()[-1]


def test_another_checkpoint_under_the_same_name_is_noticed(own, tmp_path, capsys):
    given = own()
    assert main(["reward", *given]) == 0
    shutil.rmtree(tmp_path / "llava")
    shutil.copytree(checkpoint("gemma3", tmp_path / "other"), tmp_path / "llava")
    assert main(["reward", *given]) == 2
    assert "model" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("missing, wanted", [("--model", "--model"), ("--data", "--data")])
def test_a_model_without_data_is_no_run(missing, wanted, own, capsys):
    given = own()
    at = given.index(missing)
    assert main(["run", *given[:at], *given[at + 2 :]]) == 2
    line = capsys.readouterr().err.strip()
    assert f"give {wanted}" in line and "\n" not in line


def test_the_readme_s_python(tmp_path, monkeypatch, capsys):
    "As it stands there, on a folder, a file and a recipe of those names."
    text = (REPO / "README.md").read_text("utf-8").split("The same in Python:")[1]
    code = text.split("```python\n")[1].split("```")[0]
    checkpoint("llava", tmp_path / "my-model")
    lines(squares(30, tmp_path / "pictures"), tmp_path / "pairs.jsonl")
    recipe(tmp_path).rename(tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "30 pairs are good, 0 records are not" in capsys.readouterr().out
    config = json.loads((tmp_path / "my-adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == str(tmp_path / "my-model")


def test_conversations_with_several_pictures(own, tmp_path):
    "A system text, an earlier turn, and a picture in the middle of the question."
    given, rows = own(), squares(30, tmp_path / "pictures")
    talks = []
    for row, other in zip(rows, rows[1:] + rows[:1]):
        shown = dict(type="image")
        text = dict(type="text", text="and what colour is this picture ?")
        asked = [
            dict(role="system", content="the colour is one colour ."),
            dict(role="user", content=[shown, dict(type="text", text=QUESTION)]),
            dict(role="assistant", content=other["chosen"]),
            dict(role="user", content=[text, shown]),
        ]
        images = [other["image"], row["image"]]
        answers = {
            key: [dict(role="assistant", content=row[key])] for key in ("chosen", "rejected")
        }
        talks.append(dict(images=images, prompt=asked) | answers)
    lines(talks, tmp_path / "pairs.jsonl")
    assert main(["reward", *given]) == 0
    first = (tmp_path / "run" / "preferences" / "train.jsonl").read_text().splitlines()[0]
    assert [turn[0] for turn in json.loads(first)["prompt"]] == [m["role"] for m in asked]
    assert main(["ppo", *given]) == 0


@pytest.mark.parametrize(
    "change, fault",
    [
        ("{", "not JSON"),
        (dict(image="pictures/nowhere.png"), "nowhere.png"),
        (dict(rejected="the picture is red .", chosen="the picture is red ."), "chosen equals"),
        (dict(chosen=7), "chosen"),
        (dict(prompt=[dict(role="wizard", content="?")]), "wizard"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(change, fault, own, tmp_path, capsys):
    given, file = own(), tmp_path / "pairs.jsonl"
    good = file.read_text("utf-8").splitlines()
    bad = change if isinstance(change, str) else json.dumps(json.loads(good[4]) | change)
    file.write_text("\n".join([*good, bad]), "utf-8")
    assert main(["reward", *given]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{file}, line 31: " in line and fault in line and "--skip-bad" in line
    assert main(["data", "check", str(file)]) == 1
    assert "30 pairs are good, 1 records are not" in capsys.readouterr().out


def test_bad_records_are_left_out_and_counted(own, tmp_path, capsys):
    "Wherever they would have gone: into training, validation or the test."
    given, file = own(pairs=80), tmp_path / "pairs.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    for i, row in enumerate(rows[::2]):
        row["image"] = f"pictures/no-{i}.png"
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert main(["run", "--skip-bad", *given]) == 0
    skipped = json.loads((tmp_path / "run" / "preferences" / "done.json").read_text())["skipped"]
    assert skipped["records"] > 10 and "line 1" in skipped["first"]


def test_demonstrations_are_learned_by_an_adapter_or_by_the_whole_model(own, tmp_path):
    "And then stand in weights that plain transformers load."
    given, pictures = own(), squares(30, tmp_path / "pictures")
    told = [dict(image=r["image"], prompt=r["prompt"], answer=r["chosen"]) for r in pictures]
    lines(told, tmp_path / "pairs.jsonl")
    steps = ["sft.language.steps=12", "sft.language.lr=1e-2", "sft.language.batch=8"]
    ends = {}
    for r in (4, 0):
        out = tmp_path / f"sft-{r}"
        assert main(["sft", *given[:-1], str(out), "--set", *steps, f"sft.lora.r={r}"]) == 0
        rows = read_jsonl(out / "sft" / "fit-language" / "metrics.jsonl")
        assert rows[-1]["loss"] < rows[0]["loss"] - 0.3, r
        plain = AutoModelForImageTextToText.from_pretrained(out / "sft" / "language")
        assert not any("lora" in name for name, _ in plain.named_parameters())
        ends[r] = dict(plain.named_parameters())
    start = dict(AutoModelForImageTextToText.from_pretrained(given[1]).named_parameters())
    moved = {r: {n for n, p in ends[r].items() if not p.equal(start[n])} for r in ends}
    assert moved[4] < moved[0] and not any("vision_tower" in name for name in moved[0])
    assert all("language_model" in name for name in moved[4])
