"""Results are sealed: what belongs elsewhere, or was changed, is noticed before it is used."""

import json
import re
import shutil

import pytest
import torch
from commands import (
    copy_stages,
    edit_record,
    interrupted,
    refused,
    same_files,
    smoke,
    stop_at,
    stopped_sft,
    tree,
)

from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.cli import main
from vlmrlhf_course.data.preferences import fleiss_kappa
from vlmrlhf_course.train import fit as fit_module


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory):
    "The SFT stage and the pairs of seed 1."
    folder = tmp_path_factory.mktemp("other") / "run"
    assert main(smoke("preferences", folder, "--seed", 1)) == 0
    return folder


# --- the same bits ----------------------------------------------------------------------------

DROPOUT = ["--set", "reward.lora.dropout=0.3", "reward.epochs=3", "reward.fit.save_every=1"]


def test_dropout_gives_the_same_bits(smoke_run, tmp_path, capsys, monkeypatch):
    """The same command twice; once more, stopped behind a checkpoint and continued; and dropout
    does something."""
    for name in ("a", "b", "stopped", "without"):
        copy_stages(smoke_run, tmp_path / name, "sft", "preferences")
    torch.manual_seed(4)
    assert main(smoke("reward", tmp_path / "a", *DROPOUT)) == 0
    torch.manual_seed(5)  # whatever was drawn before
    assert main(smoke("reward", tmp_path / "b", *DROPOUT)) == 0
    stop_at(monkeypatch, fit_module, "backward_through", 3)
    interrupted(capsys, *smoke("reward", tmp_path / "stopped", *DROPOUT))
    monkeypatch.undo()
    stop_at(monkeypatch, fit_module, "backward_through", 5)  # of six steps two are done
    assert main(smoke("reward", tmp_path / "stopped", *DROPOUT)) == 0
    monkeypatch.undo()
    for name in ("b", "stopped"):
        mine, theirs = tmp_path / "a" / "reward", tmp_path / name / "reward"
        same_files(mine, theirs, ["reward.safetensors", "metrics.jsonl"])
    assert main(smoke("reward", tmp_path / "without", "--set", "reward.epochs=3")) == 0
    rows = [read_jsonl(tmp_path / name / "reward" / "metrics.jsonl") for name in ("a", "without")]
    assert rows[0][-1]["loss"] != rows[1][-1]["loss"]


def test_dropout_that_is_not_used_is_said(smoke_run, tmp_path, capsys):
    copy_stages(smoke_run, tmp_path / "run", "sft", "preferences", "reward")
    argv = smoke("ppo", tmp_path / "run", "--arm", "ppo_rm", "--set", "ppo.lora.dropout=0.2")
    assert main(argv) == 0
    assert "ppo_rm.lora.dropout is not used" in capsys.readouterr().err


# --- files of other runs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, verb",
    [
        ("sft/language/model.safetensors", "preferences"),
        ("sft/projector/model.safetensors", "preferences"),
        ("sft/done.json", "preferences"),
        ("preferences/done.json", "reward"),
        ("preferences/train.jsonl", "reward"),
        ("preferences/candidates-train.jsonl", "reward"),
        ("sft/fit-language/metrics.jsonl", "preferences"),
    ],
)
def test_of_another_seed(capsys, smoke_run, other_seed, tmp_path, file, verb):
    copy_stages(smoke_run, tmp_path / "run", "sft", "preferences")
    shutil.copy(other_seed / file, tmp_path / "run" / file)
    line = refused(capsys, *smoke(verb, tmp_path / "run"))
    assert str(tmp_path / "run" / file.split("/")[0]) in line


@pytest.mark.parametrize("sealed", [False, True], ids=["", "with its record"])
def test_of_another_arm(capsys, smoke_run, tmp_path, sealed):
    """The weights of `oracle` in the place of those of `ppo_rm`, also where the record comes along
    with other names in it."""
    shutil.copytree(smoke_run, tmp_path / "run")
    mine, theirs = tmp_path / "run" / "ppo_rm", smoke_run / "oracle"
    shutil.copy(theirs / "actor.safetensors", mine / "actor.safetensors")
    if sealed:
        sums = json.loads((theirs / "done.json").read_text())["files"]
        edit_record(mine / "done.json", files=sums)
        shutil.copy(theirs / "metrics.jsonl", mine / "metrics.jsonl")
    line = refused(capsys, *smoke("evaluate", tmp_path / "run"))
    assert str(mine) in line and ("changed" in line or "another run" in line)


@pytest.mark.parametrize("what", ["fit-language/checkpoints", "projector", "begun.json"])
def test_of_another_seed_in_the_middle(capsys, smoke_run, tmp_path, monkeypatch, what):
    """Of two runs that were stopped, one gets what is the other's; when that is moved away, it goes
    on to its own end."""
    argv = stopped_sft(tmp_path / "0", 0, capsys, monkeypatch)
    stopped_sft(tmp_path / "1", 1, capsys, monkeypatch)
    mine, theirs = (tmp_path / seed / "sft" / what for seed in ("0", "1"))
    if mine.is_dir():
        shutil.rmtree(mine)
        shutil.copytree(theirs, mine)
    else:
        shutil.copy(theirs, mine)
    line = refused(capsys, *argv)
    assert str(tmp_path / "0" / "sft") in line
    assert "another run" in line or "other settings" in line
    named = re.search(r"move (?:that folder|it|(\S+)) away", line)[1]
    folder = mine if mine.is_dir() else mine.parent
    shutil.move(named or folder, tmp_path / "away")
    assert main(argv) == 0
    names = ["language/model.safetensors", "projector/model.safetensors"]
    same_files(smoke_run / "sft", tmp_path / "0" / "sft", names)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: f.unlink(),
        lambda f: f.write_text('{"step": 0, "loss": 1.0}\n'),
        lambda f: f.write_text(f.read_text().replace("loss", "lost")),
    ],
)
def test_metrics_that_were_lost(capsys, smoke_run, tmp_path, monkeypatch, spoil):
    "While the stage was stopped: they come back from the checkpoint, and that is said."
    argv = stopped_sft(tmp_path / "run", 0, capsys, monkeypatch)
    file = tmp_path / "run" / "sft" / "fit-language" / "metrics.jsonl"
    spoil(file)
    assert main(argv) == 0
    assert f"{file}: not as it was" in capsys.readouterr().err
    same_files(smoke_run / "sft", tmp_path / "run" / "sft", ["fit-language/metrics.jsonl"])


# --- pairs may be edited ----------------------------------------------------------------------


def test_edited_pairs(capsys, smoke_run, tmp_path):
    """An edit is used, said and recorded; what was made of the pairs as they were before is not
    mixed with it."""
    copy_stages(smoke_run, tmp_path / "run", "sft", "preferences", "reward")
    file = tmp_path / "run" / "preferences" / "train.jsonl"
    rows = file.read_text().splitlines()
    file.write_text("\r\n".join(rows) + "\r\n\r\n")
    assert main(smoke("reward", tmp_path / "run")) == 0, "line ends are no edit"
    assert "edited" not in capsys.readouterr().err, "line ends are no edit"
    file.write_text("\n".join(rows[1:]) + "\n")
    line = refused(capsys, *smoke("reward", tmp_path / "run"))
    assert "reward" in line and "edited" in line
    shutil.rmtree(tmp_path / "run" / "reward")
    assert main(smoke("reward", tmp_path / "run")) == 0
    assert f"{file}: edited since it was made" in capsys.readouterr().err
    uses = json.loads((tmp_path / "run" / "reward" / "done.json").read_text())["uses"]
    assert list(uses["preferences"]["edited"]) == ["train.jsonl"]
    file.write_text("\n".join(rows) + "\n")
    assert "edited" in refused(capsys, *smoke("reward", tmp_path / "run")), "and back again"


@pytest.mark.parametrize("key", ["prompt", "chosen", "rejected", "image", "note"])
@pytest.mark.parametrize("half", ["\\ud83d", "\\udc00 ."])
def test_half_a_surrogate_pair(tmp_path, key, half):
    "No text holds that, wherever it stands in a record; a whole pair is a sign like any other."
    row = dict(image="blank", prompt="describe .", chosen="a cat .", rejected="a cup .", note="x")
    for text, good in ((half, False), ("\\ud83d\\udc31", True)):
        line = json.dumps(row | {key: "@"}).replace('"@"', f'"{text}"')
        (tmp_path / "pairs.jsonl").write_text(line + "\n")
        if good:
            assert read_jsonl(tmp_path / "pairs.jsonl")[0][key] == "\U0001f431"
        else:
            with pytest.raises(UserError, match="line 1: half of a surrogate pair"):
                read_jsonl(tmp_path / "pairs.jsonl")


def test_one_pair(capsys, smoke_run, tmp_path):
    """It has no spread from which a scale could be taken: the reward model is made all the same,
    and is finite. For a second one nothing is left, which is said."""
    copy_stages(smoke_run, tmp_path / "run", "sft", "preferences")
    file = tmp_path / "run" / "preferences" / "train.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    assert main(smoke("ppo", tmp_path / "run")) == 2
    assert "skip=12" in capsys.readouterr().err
    assert main(smoke("ppo", tmp_path / "run", "--set", "ppo.chosen_by=''")) == 0


def test_answers_that_are_all_alike(capsys, smoke_run, tmp_path):
    """No two annotators can disagree then: a line that says so, and what to do. (To a closed
    question both answers are there.)"""
    copy_stages(smoke_run, tmp_path / "run", "sft")
    cold = ["--set", "preferences.temperatures=[0,0]", "preferences.kinds={detail: 1}"]
    line = refused(capsys, *smoke("preferences", tmp_path / "run", *cold))
    assert "two different answers" in line and "temperatures" in line
    with pytest.raises(ValueError, match="nobody"):
        fleiss_kappa([])
    shutil.rmtree(tmp_path / "run" / "preferences")
    assert main(smoke("preferences", tmp_path / "run")) == 0, "the advice works"


def test_a_refused_command_changes_nothing(capsys, smoke_run, tmp_path):
    """Settings that are not those of a stage that is done, or begun, are refused before anything is
    made."""
    copy_stages(smoke_run, tmp_path / "run", "sft", "preferences", "reward", "ppo_rm")
    assert main(smoke("sft", tmp_path / "run")) == 0  # writes the run's own record
    before = tree(tmp_path / "run")
    line = refused(capsys, *smoke("run", tmp_path / "run", "--set", "ppo.clip=0.1"))
    assert "ppo_rm.clip" in line and tree(tmp_path / "run") == before
