"Where a run is watched changes nothing of it, and a service that is away says so before the start."

import sys

import pytest
from own_data import checkpoint, lines, recipe, squares

from vlmrlhf_course.cli import main

SERVICE = """
class Run:
    def __init__(self, **how):
        self.file = open(f"{how['dir']}/{how['name'].replace('/', '+')}.{how['group']}", "a")

    def define_metric(self, name, step_metric):
        pass

    def log(self, figures):
        if project_of[self] == "breaks":
            raise OSError("the line is dead")
        assert all(isinstance(x, (int, float)) for x in figures.values())
        print(sorted(figures), file=self.file)

    def finish(self):
        self.file.close()


def init(project, name, group, dir, reinit):
    if project == "away" or (project == "leaves" and name != "reward"):
        raise ConnectionError("no route to the service")
    run = Run(name=name, group=group, dir=dir)
    project_of[run] = project
    return run


project_of = {}
"""


@pytest.fixture
def words(tmp_path, monkeypatch):
    "Arguments of a command; a package called wandb is there."
    checkpoint("llava", tmp_path / "model")
    lines(squares(40, tmp_path / "pictures"), tmp_path / "pairs.jsonl")
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "wandb.py").write_text(SERVICE)
    monkeypatch.syspath_prepend(tmp_path / "installed")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    found = ["reward", "--model", tmp_path / "model", "--data", tmp_path / "pairs.jsonl"]
    return [*map(str, [*found, "--config", recipe(tmp_path), "--out", tmp_path / "run"])]


def test_a_run_is_watched_and_its_record_does_not_say_so(words, tmp_path, capsys):
    folder = tmp_path / "run" / "reward"
    assert main([*words, "--set", "log.wandb=pictures", "log.tensorboard=false"]) == 0
    rows = (folder / "reward.run").read_text().splitlines()
    assert len(rows) == len((folder / "metrics.jsonl").read_text().splitlines()) > 1
    assert all("'loss'" in row and "'step'" in row for row in rows)
    assert not (folder / "tensorboard").exists()
    before = (folder / "done.json").read_bytes()
    assert b"wandb" not in before
    assert main(words) == 0, "watched elsewhere, it is the same run"
    assert (folder / "done.json").read_bytes() == before
    assert len((folder / "reward.run").read_text().splitlines()) == len(rows)


def test_a_service_that_is_away(words, tmp_path, capsys):
    assert main([*words, "--set", "log.wandb=away"]) == 2
    said = capsys.readouterr().err
    assert "log.wandb=away" in said and "no route to the service" in said
    assert "WANDB_MODE=offline" in said


def test_a_package_that_is_not_there(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*words, "--set", "log.wandb=pictures"]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run" / "reward").exists(), "before anything is computed"


def test_boards_have_no_say_in_the_drawn_world_either(capsys, tmp_path):
    words = ["sft", "--scale", "smoke", "--out", str(tmp_path / "run")]
    assert main([*words, "--set", "log.tensorboards=false"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("project, said", [("leaves", "goes on without it"), ("breaks", "is dead")])
def test_a_service_that_leaves_does_not_stop_a_run(words, tmp_path, capsys, project, said):
    "After the first stage, or in the middle of one: it is said, and the files are written."
    assert main([*words, "--set", f"log.wandb={project}"]) == 0
    argv = ["ppo", *words[1:], "--set", f"log.wandb={project}"]
    assert main(argv) == 0
    assert said in capsys.readouterr().err
    assert (tmp_path / "run" / "ppo" / "done.json").is_file()
