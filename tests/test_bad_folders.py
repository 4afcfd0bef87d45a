"""Output folders, records of stages and damaged runs: refused in one line, nothing lost."""

import json
import os
import shutil

import pytest
from commands import edit_json, edit_record, edit_weights, refused, smoke, tree

from vlmrlhf_course.base import files
from vlmrlhf_course.cli import main
from vlmrlhf_course.train import sft

# --- folders and records of a run -------------------------------------------------------------


class TestFolders:
    @pytest.mark.parametrize("verb", ["run", "sft"])
    def test_out_is_a_file(self, capsys, tmp_path, verb):
        (tmp_path / "file").write_text("mine")
        assert str(tmp_path / "file") in refused(capsys, *smoke(verb, tmp_path / "file"))
        assert (tmp_path / "file").read_text() == "mine"

    def test_out_cannot_be_written(self, capsys, tmp_path):
        folder = tmp_path / "locked"
        folder.mkdir()
        folder.chmod(0o500)
        if os.access(folder, os.W_OK):
            folder = "/proc/nowhere"  # root may write everywhere but here
        line = refused(capsys, *smoke("run", folder))
        assert f"{folder}" in line and "--out" in line

    def test_stage_folder_is_a_file(self, capsys, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "sft").write_text("mine")
        assert str(tmp_path / "run" / "sft") in refused(capsys, *smoke("sft", tmp_path / "run"))

    @pytest.mark.parametrize("record", ["done.json", "begun.json"])
    @pytest.mark.parametrize(
        "text, words",
        [
            ("{", ["cannot be read"]),
            ("", ["cannot be read"]),
            ("[]", ["not the record"]),
            ("{}", ["not the record"]),
            ('{"uses": 3}', ["not the record"]),
            ('{"uses": {"seed": 0}}', ["other settings"]),
            ("\0", ["cannot be read"]),
        ],
    )
    def test_foreign_record(self, capsys, tmp_path, record, text, words):
        file = tmp_path / "run" / "sft" / record
        file.parent.mkdir(parents=True)
        file.write_text(text)
        line = refused(capsys, *smoke("sft", tmp_path / "run"))
        assert str(file.parent) in line and "delete" in line and all(w in line for w in words), line
        assert file.read_text() == text

    def test_begun_with_other_settings(self, capsys, tmp_path, monkeypatch):
        """A stage that was stopped is not continued with other settings: its checkpoints belong to
        the old ones."""

        def stop(*a, **k):
            raise KeyboardInterrupt

        monkeypatch.setattr(sft, "train_sft", stop)
        argv = smoke("sft", tmp_path / "run")
        assert main(argv) == 130
        line = refused(capsys, *argv, "--set", "sft.language.lr=0.5")
        assert "sft.language" in line and "other settings" in line and "--out" in line
        assert main(argv) == 130, "and with its own it goes on"


@pytest.fixture(scope="module")
def spoiled(smoke_run, tmp_path_factory):
    "A finished run, to be damaged and mended."
    folder = tmp_path_factory.mktemp("spoiled") / "run"
    shutil.copytree(smoke_run, folder)
    return folder


def write(text):
    return lambda file: file.write_text(text)


def gone(file):
    file.unlink()


def cut(file):
    os.truncate(file, 1000)


def emptied(file):
    file.write_bytes(b"")


def weights(edit):
    "Spoil a file of weights: `edit(name, tensor)` gives the new tensor, or None to leave it out."

    def edited(tensors):
        new = {name: edit(name, tensor) for name, tensor in tensors.items()}
        return {name: tensor for name, tensor in new.items() if tensor is not None}

    return lambda file: edit_weights(file, edited)


def without_the_first(file):
    edit_weights(file, lambda tensors: dict(list(tensors.items())[1:]))


not_finite = weights(lambda name, tensor: tensor * float("nan"))
headless = weights(lambda name, tensor: None if "head" in name else tensor)
one_row = weights(lambda name, tensor: tensor[:1].clone())

# A file of a stage, what becomes of it, the verb that finds it, and what that says where somebody
# has renewed the seal.
DAMAGE = [
    (
        "hacked/metrics.jsonl",
        write('{"step": 0\n{"step": 1}\n'),
        "evaluate",
        ["line 1", "not JSON"],
    ),
    ("hacked/metrics.jsonl", write('{"step": 0}\n'), "evaluate", ["line 1", "no 'kl'"]),
    ("ppo_rm/metrics.jsonl", gone, "evaluate", ["is missing"]),
    ("reward/reward.safetensors", cut, "evaluate", ["cannot be read"]),
    ("reward/reward.safetensors", gone, "evaluate", ["is missing"]),
    ("reward/reward.safetensors", not_finite, "evaluate", ["not finite"]),
    ("reward/reward.safetensors", headless, "evaluate", ["cannot be read"]),
    ("detector/detector.safetensors", not_finite, "evaluate", ["not finite"]),
    ("detector/detector.safetensors", without_the_first, "evaluate", ["cannot be read"]),
    ("ppo_rm/actor.safetensors", without_the_first, "evaluate", ["do not fit"]),
    ("ppo_rm/actor.safetensors", one_row, "evaluate", ["cannot be read"]),
    ("ppo_rm/actor.safetensors", emptied, "evaluate", ["cannot be read"]),
]


def fields(**values):
    return lambda file: edit_json(file, **values)


ACCURATE = dict(labels=0.999, gold=0.999)
RECORDS = [
    ("report.json", write("{"), "run", ["not what this run wrote", "delete it"]),
    (
        "preferences/done.json",
        fields(uses=dict(seed=5)),
        "reward",
        ["preferences", "other settings"],
    ),
    ("reward/done.json", fields(pair_accuracy=ACCURATE), "evaluate", ["done.json: has changed"]),
    ("preferences/done.json", fields(files=3), "reward", ["no list of the stage's files"]),
]


class TestDamagedRun:
    def refused(self, capsys, smoke_run, spoiled, file, verb, words):
        "The line names the place and every word; then all is mended."
        line = refused(capsys, *smoke(verb, spoiled))
        at = spoiled / file
        assert all(w in line for w in words), line
        assert str(at) in line or str(at.parent) in line, line
        assert "delete" in line, line
        spoilt = {file}
        if at.parent != spoiled:
            spoilt.add(f"{at.parent.name}/done.json")
        for name in spoilt:
            shutil.copy(smoke_run / name, spoiled / name)

    @pytest.mark.parametrize("file, spoil, verb, words", DAMAGE)
    def test_by_its_seal(self, capsys, smoke_run, spoiled, file, spoil, verb, words):
        spoil(spoiled / file)
        stage, name = file.split("/")
        words = [name, f"put the file back, or delete {spoiled / stage}"]
        self.refused(capsys, smoke_run, spoiled, file, verb, words)

    @pytest.mark.parametrize("file, spoil, verb, words", DAMAGE)
    def test_by_what_is_in_it(self, capsys, smoke_run, spoiled, file, spoil, verb, words):
        "Whoever changes a file can change its seal."
        at = spoiled / file
        spoil(at)
        if at.is_file():
            record = at.with_name("done.json")
            sums = json.loads(record.read_text())["files"]
            edit_record(record, files=sums | {at.name: files.digest(at)})
        self.refused(capsys, smoke_run, spoiled, file, verb, words)

    @pytest.mark.parametrize("file, spoil, verb, words", RECORDS)
    def test_records(self, capsys, smoke_run, spoiled, file, spoil, verb, words):
        spoil(spoiled / file)
        self.refused(capsys, smoke_run, spoiled, file, verb, words)

    def test_and_afterwards_it_is_whole(self, smoke_run, spoiled):
        "None of the refusals changed anything else."
        assert tree(smoke_run) == tree(spoiled)
