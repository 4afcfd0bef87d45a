"A reward model of another run, or an exported one, pays this run's policies: it is copied, not \
trained, and stands on the same checkpoint."

import json
import shutil

import pytest
from own_data import QUESTION, checkpoint, lines, recipe, squares
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlmrlhf_course.cli import main


def given(folder, kind, data, out, *more) -> list[str]:
    "Arguments of the command."
    model = folder / kind
    if not model.exists():
        checkpoint(kind, model)
    words = ["--model", model, "--data", data, "--config", recipe(folder), "--out", folder / out]
    return list(map(str, [*words, *more]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A folder with pairs, a checkpoint, a run that has a reward model, and the same exported."
    folder = tmp_path_factory.mktemp("given")
    lines(squares(40, folder / "pictures"), folder / "pairs.jsonl")
    words = given(folder, "llava", folder / "pairs.jsonl", "first")
    assert main(["reward", *words]) == 0
    assert main(["export", str(folder / "first" / "reward"), "--to", str(folder / "exported")]) == 0
    return folder


def weights(folder):
    return load_file(folder / "reward" / "reward.safetensors")


@pytest.mark.parametrize("place", ["first/reward", "exported"])
def test_it_pays_another_run(place, trained, capsys):
    "Which brings prompts alone, and no pairs: nothing is trained, and nothing is ranked."
    asked = [dict(image=row["image"], prompt=QUESTION) for row in squares(20, trained / "more")]
    data = lines(asked, trained / "prompts.jsonl")
    out = f"paid by {place.replace('/', ' ')}"
    more = ["--reward-model", trained / place]
    assert main(["run", *given(trained, "llava", data, out, *more)]) == 0
    run, first = trained / out, weights(trained / "first")
    assert f"reward: taken from {trained / place}" in capsys.readouterr().err
    assert not (run / "preferences").exists()
    own = weights(run)
    assert own.keys() == first.keys() and all((own[k] == first[k]).all() for k in own)
    report = json.loads((run / "report.json").read_text())
    assert {"reward", "kl", "wins"} <= report["ppo"].keys() and report["reward_model"] == {}
    assert main(["export", str(run / "reward"), "--to", str(run / "again")]) == 0
    for name in ("adapter_model", "head"):
        old, new = (
            load_file(at / f"{name}.safetensors") for at in (trained / "exported", run / "again")
        )
        assert old.keys() == new.keys() and all((old[k] == new[k]).all() for k in old)


def test_it_stays_when_the_other_run_is_gone(trained, tmp_path):
    other, words = tmp_path / "other", ["--reward-model", tmp_path / "other" / "reward"]
    shutil.copytree(trained / "first", other)
    words = given(trained, "llava", trained / "pairs.jsonl", tmp_path / "run", *words)
    assert main(["reward", *words]) == 0
    shutil.rmtree(other)
    assert main(["export", str(tmp_path / "run" / "reward"), "--to", str(tmp_path / "out")]) == 0


def test_on_pairs_it_is_measured(trained, tmp_path):
    words = ["--reward-model", trained / "exported"]
    words = given(trained, "llava", trained / "pairs.jsonl", tmp_path / "run", *words)
    assert main(["run", "--algorithm", "grpo", *words]) == 0
    known = json.loads((tmp_path / "run" / "report.json").read_text())["reward_model"]
    assert set(known) == {"test_accuracy", "test_error"} and 0 <= known["test_accuracy"] <= 1


def refusal(capsys, *words) -> str:
    assert main(list(map(str, words))) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert len(line) < 600
    return line


def test_on_another_checkpoint_it_is_refused(trained, tmp_path, capsys):
    for place in ("first/reward", "exported"):
        words = given(trained, "gemma3", trained / "pairs.jsonl", tmp_path / "run")
        line = refusal(capsys, "ppo", *words, "--reward-model", trained / place)
        assert "another checkpoint" in line and f"start from {trained / 'llava'}" in line


@pytest.mark.parametrize(
    "place, words",
    [
        ("nowhere", "no reward model there"),
        ("first/sft", "no reward model there"),
        ("llava", "no reward model there"),
        ("merged", "export the reward model with --adapter"),
        ("broken", "cannot be read"),
    ],
)
def test_what_is_no_reward_model_is_refused_before_anything_is_computed(
    place, words, trained, tmp_path, capsys
):
    if place == "merged":
        (trained / place).mkdir()
        shutil.copy(trained / "exported" / "head.safetensors", trained / place)
    if place == "broken":
        shutil.copytree(trained / "exported", trained / place)
        (trained / place / "head.safetensors").write_bytes(b"no header")
    given_words = given(trained, "llava", trained / "pairs.jsonl", tmp_path / "run")
    line = refusal(capsys, "ppo", *given_words, "--reward-model", trained / place)
    assert words in line and str(trained / place) in line
    assert not (tmp_path / "run" / "sft").exists()


@pytest.fixture(scope="module")
def packed(trained):
    "The same reward model, as if it had been trained beside a packed trunk, in a run and exported."
    data, name = lines(squares(20, trained / "others"), trained / "others.jsonl"), "in four bits"
    words = given(trained, "llava", data, name, "--set", "model.quantisation=nf4")
    assert main(["reward", *words]) == 0
    to = str(trained / "exported packed")
    assert main(["export", str(trained / name / "reward"), "--to", to]) == 0
    return data


@pytest.mark.parametrize(
    "place, here, there",
    [
        ("first/reward", "nf4", "none"),
        ("exported", "nf4", "none"),
        ("in four bits/reward", "none", "nf4"),
        ("exported packed", "none", "nf4"),
    ],
)
def test_a_trunk_that_was_packed_otherwise(place, here, there, trained, packed, tmp_path, capsys):
    "Scores depend on it: a reward model from there is refused, whichever form it has."
    more = ["--reward-model", trained / place, "--set", f"model.quantisation={here}"]
    assert main(["reward", *given(trained, "llava", packed, tmp_path / "run", *more)]) == 2
    said = capsys.readouterr().err
    assert f"model.quantisation={there}, and here it is {here}" in said


def test_packed_alike_it_pays(trained, packed, tmp_path):
    more = ["--reward-model", trained / "exported packed", "--set", "model.quantisation=nf4"]
    assert main(["reward", *given(trained, "llava", packed, tmp_path / "run", *more)]) == 0


def test_an_export_that_does_not_say(trained, tmp_path, capsys):
    "One that was written before heads said so: nobody can tell, and that is said."
    old = tmp_path / "old"
    shutil.copytree(trained / "exported", old)
    with safe_open(old / "head.safetensors", "pt") as f:
        kept = dict(config=f.metadata()["config"])
    save_file(load_file(old / "head.safetensors"), old / "head.safetensors", kept)
    words = given(trained, "llava", trained / "pairs.jsonl", tmp_path / "run")
    assert main(["reward", *words, "--reward-model", str(old)]) == 0
    assert "learned beside a packed trunk, nobody can tell" in capsys.readouterr().err
