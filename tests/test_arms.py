"Which stages are made next, where several processes make them: those that have all they need."

from types import SimpleNamespace

import pytest

from vlmrlhf_course import arms as module
from vlmrlhf_course.arms import Arms

NEEDS = {
    "sft": set(),
    "preferences": {"sft"},
    "reward": {"sft", "preferences"},
    "second": {"sft", "preferences"},
    "dpo": {"sft", "preferences"},
    "ppo": {"sft", "preferences", "reward", "second"},
}


@pytest.fixture
def arms(tmp_path, monkeypatch):
    "Of a run in which nothing is made; who is started is noted, and never ends."
    run = SimpleNamespace(path=lambda name: tmp_path / name, used={name: {} for name in NEEDS})
    run.used["ppo"] = dict(iterations=24)
    child = SimpleNamespace(poll=lambda: None)
    monkeypatch.setattr(module, "_start_arm", lambda *args: child)
    return Arms(run, dict.fromkeys(NEEDS, "verb"), NEEDS, [])


def make(arms, name):
    (arms.run.path(name)).mkdir()
    (arms.run.path(name) / "done.json").write_text("{}")


def test_a_stage_is_ready_when_all_is_there_that_it_needs(arms):
    assert arms.ready() == ["sft"] and arms.total == 24 and len(arms.logs) == 1
    make(arms, "sft")
    assert arms.ready() == ["sft", "preferences"]
    make(arms, "preferences")
    make(arms, "reward")
    assert "ppo" not in arms.ready(), "it needs the second one, too"
    make(arms, "second")
    assert "ppo" in arms.ready()


def test_what_one_takes_no_other_makes(arms):
    common = ["sft", "preferences", "reward", "second"]
    assert arms.take(common) == "sft" and arms.take(common) is None
    make(arms, "sft")
    assert arms.take(common) == "preferences"
    make(arms, "preferences")
    arms.start(1)
    assert list(arms.running) == ["reward"] and arms.take(common) == "second"
    arms.start(1)  # no more than one at once
    assert list(arms.running) == ["reward"]
    arms.start(2)
    assert list(arms.running) == ["reward", "dpo"] and arms.waiting == ["ppo"]


def test_what_is_there_is_not_made_again(tmp_path):
    run = SimpleNamespace(path=lambda name: tmp_path / name, used={name: {} for name in NEEDS})
    for name in ("sft", "preferences"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "done.json").write_text("{}")
    arms = Arms(run, dict.fromkeys(NEEDS, "verb"), NEEDS, [])
    assert arms.ready() == ["reward", "second", "dpo"]
