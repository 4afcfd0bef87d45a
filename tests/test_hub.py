"A name on the hub, as it lies in the cache once it was loaded down: without a network, and said \
in a line where it is not there."

import shutil

import pytest
from own_data import checkpoint, lines, recipe, squares

from vlmrlhf_course.cli import main

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A cache of the hub that holds one model, `somebody/tiny-llava`."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = tmp_path / "hub" / "models--somebody--tiny-llava"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(REVISION)
    checkpoint("llava", model / "snapshots" / REVISION)
    return tmp_path


def words(folder, name, *more):
    data = lines(squares(40, folder / "pictures"), folder / "pairs.jsonl")
    given = ["--model", name, "--data", data, "--config", recipe(folder), "--out", folder / "run"]
    return [*map(str, given), *more]


def test_a_model_by_its_name(hub, capsys):
    assert main(["reward", *words(hub, "somebody/tiny-llava")]) == 0
    target = hub / "exported"
    assert main(["export", str(hub / "run" / "reward"), "--to", str(target)]) == 0
    assert "somebody" in (target / "adapter_config.json").read_text()


@pytest.mark.parametrize("name", ["somebody/else", "somebody/tiny-lava"])
def test_a_name_that_nobody_has(hub, name, capsys):
    assert main(["reward", *words(hub, name)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and f"--model {name}: no such folder, and not from the hub" in said[0]


def test_a_download_that_was_cut_off(hub, capsys):
    "Half of a model is none."
    found = next((hub / "hub").glob("models--*/snapshots/*"))
    next(found.glob("*.safetensors")).unlink()
    assert main(["reward", *words(hub, "somebody/tiny-llava")]) == 2
    assert "give a folder with a whole checkpoint" in capsys.readouterr().err
    shutil.rmtree(found)
    assert main(["reward", *words(hub, "somebody/tiny-llava")]) == 2


def test_data_by_their_name(hub, monkeypatch, capsys):
    "`datasets` is asked for the name and the split; what it says is said."
    from datasets import Dataset

    rows = squares(40, hub / "pictures")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name != "somebody/squares":
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub (OfflineModeIsEnabled)")
        return Dataset.from_list([row | dict(image=str(hub / row["image"])) for row in rows])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    given = words(hub, "somebody/tiny-llava")
    given[given.index("--data") + 1] = "hub:somebody/squares:half"
    assert main(["reward", *given]) == 0
    assert set(asked) == {("somebody/squares", "half")}
    given[given.index("--data") + 1] = "hub:somebody/circles"
    given[-1] = str(hub / "other")
    assert main(["reward", *given]) == 2
    assert ("somebody/circles", "train") in asked
    assert "hub:somebody/circles" in capsys.readouterr().err
