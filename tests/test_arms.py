"Which stages are made next, where several processes make them: those that have all they need."

from types import SimpleNamespace

import pytest

from vlmrlhf_course import arms as module
from vlmrlhf_course.arms import Arms
from vlmrlhf_course.base.metrics import progress

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


@pytest.fixture
def seen(monkeypatch):
    "Somebody looks at the bars."
    for name in ("IN_TEST", "VLMRLHF_QUIET"):
        monkeypatch.delenv(name, raising=False)


def make(arms, name):
    (arms.run.path(name)).mkdir()
    (arms.run.path(name) / "done.json").write_text("{}")


def test_a_stage_is_ready_when_all_is_there_that_it_needs(arms):
    assert arms.ready() == ["sft"]
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


def test_one_bar_names_what_is_made_and_how_much_there_is(arms, seen, monkeypatch, capsys):
    "Of what has no iterations, such as DPO alone, there is a total, too."
    monkeypatch.setattr(module.time, "sleep", lambda seconds: step())
    arms.waiting, arms.sizes = ["dpo", "ppo"], dict(dpo=1, ppo=24)
    for name in NEEDS["ppo"]:
        make(arms, name)
    rounds = iter(range(3))

    def step():
        at = next(rounds, None)
        if at == 0:
            arms.run.path("ppo").mkdir()
            (arms.run.path("ppo") / "metrics.jsonl").write_text("{}\n" * 7)
            assert list(map(arms.made, arms.sizes)) == [0, 7]
        if at == 1:
            make(arms, "dpo")
            del arms.running["dpo"]
        if at == 2:
            (arms.run.path("ppo") / "done.json").write_text("{}")
            arms.running.clear()

    arms.finish(2)
    said = capsys.readouterr().err
    assert "training: dpo, ppo:" in said and "8/25" in said and "25/25" in said


@pytest.mark.parametrize("items", [range(0), []])
def test_no_bar_where_nothing_is_to_be_done(items, seen, capsys):
    assert list(progress(items, "training", "step")) == []
    assert not capsys.readouterr().err


def test_a_bar_goes_on_where_the_work_does(seen, capsys):
    assert list(progress(range(8, 10), "training: ppo", "iteration")) == [8, 9]
    said = capsys.readouterr().err
    assert "8/10" in said and "10/10" in said and "iteration" in said and "0/2" not in said
