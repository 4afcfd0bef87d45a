"Results are sealed: what belongs elsewhere, or was changed, is noticed before it is used, and every remedy works."
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SCENE, SMALL
from test_bad_inputs import edit_json, edit_record, refused, tree
from test_cli import interrupted, same_files, stop_at
from test_properties import small_ppo

from vlmrlhf_course.report import evaluate
from vlmrlhf_course.rl import ppo, rollout
from vlmrlhf_course.train import sft
from vlmrlhf_course.cli import main
from vlmrlhf_course.report.evaluate import before_after_figure, curve, first_false
from vlmrlhf_course.data.preferences import fleiss_kappa
from vlmrlhf_course.base.runs import UserError, read_jsonl
from vlmrlhf_course.model.vlm import VLM, build_model, build_processor
from vlmrlhf_course.world.scenes import describe


def smoke(verb, folder, *more): return list(map(str, [verb, "--scale", "smoke", "--out", folder, *more]))


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory):
    "The SFT stage and the pairs of seed 1."
    folder = tmp_path_factory.mktemp("other") / "run"
    assert main(smoke("preferences", folder, "--seed", 1)) == 0
    return folder


def copy_stages(source, target, *stages):
    for stage in stages:
        shutil.copytree(source / stage, target / stage)


# --- the same bits --------------------------------------------------------------------------------------------------

DROPOUT = ["--set", "reward.lora.dropout=0.3", "reward.epochs=3", "reward.fit.save_every=1"]


def test_dropout_gives_the_same_bits(smoke_run, tmp_path, capsys, monkeypatch):
    "The same command twice; once more, stopped behind a checkpoint and continued; and dropout does something."
    for name in ("a", "b", "stopped", "without"):
        copy_stages(smoke_run, tmp_path / name, "sft", "preferences")
    torch.manual_seed(4)
    assert main(smoke("reward", tmp_path / "a", *DROPOUT)) == 0
    torch.manual_seed(5)   # whatever was drawn before
    assert main(smoke("reward", tmp_path / "b", *DROPOUT)) == 0
    stop_at(monkeypatch, sft, "backward_through", 3)
    interrupted(capsys, *smoke("reward", tmp_path / "stopped", *DROPOUT))
    monkeypatch.undo()
    stop_at(monkeypatch, sft, "backward_through", 5)   # of six steps two are done
    assert main(smoke("reward", tmp_path / "stopped", *DROPOUT)) == 0
    monkeypatch.undo()
    for name in ("b", "stopped"):
        same_files(tmp_path / "a" / "reward", tmp_path / name / "reward", ["reward.safetensors", "metrics.jsonl"])
    assert main(smoke("reward", tmp_path / "without", "--set", "reward.epochs=3")) == 0
    rows = [read_jsonl(tmp_path / name / "reward" / "metrics.jsonl") for name in ("a", "without")]
    assert rows[0][-1]["loss"] != rows[1][-1]["loss"]


def test_dropout_that_is_not_used_is_said(smoke_run, tmp_path, capsys):
    copy_stages(smoke_run, tmp_path / "run", "sft", "preferences", "reward")
    assert main(smoke("ppo", tmp_path / "run", "--set", "ppo.lora.dropout=0.2")) == 0
    assert "ppo.lora.dropout is not used" in capsys.readouterr().err


# --- files of other runs --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file, verb", [
    ("sft/language/model.safetensors", "preferences"), ("sft/projector/model.safetensors", "preferences"),
    ("sft/done.json", "preferences"), ("preferences/done.json", "reward"), ("preferences/train.jsonl", "reward"),
    ("preferences/candidates-train.jsonl", "reward"), ("sft/fit-language/metrics.jsonl", "preferences")])
def test_of_another_seed(capsys, smoke_run, other_seed, tmp_path, file, verb):
    copy_stages(smoke_run, tmp_path / "run", "sft", "preferences")
    shutil.copy(other_seed / file, tmp_path / "run" / file)
    line = refused(capsys, *smoke(verb, tmp_path / "run"))
    assert str(tmp_path / "run" / file.split("/")[0]) in line


@pytest.mark.parametrize("sealed", [False, True], ids=["", "with its record"])
def test_of_another_arm(capsys, smoke_run, tmp_path, sealed):
    "The weights of `ppo_rm` in the place of those of `ppo`, also where the record comes along with other names in it."
    shutil.copytree(smoke_run, tmp_path / "run")
    shutil.copy(smoke_run / "ppo_rm" / "actor.safetensors", tmp_path / "run" / "ppo" / "actor.safetensors")
    if sealed:
        sums = json.loads((smoke_run / "ppo_rm" / "done.json").read_text())["files"]
        edit_record(tmp_path / "run" / "ppo" / "done.json", files=sums)
        shutil.copy(smoke_run / "ppo_rm" / "metrics.jsonl", tmp_path / "run" / "ppo" / "metrics.jsonl")
    line = refused(capsys, *smoke("evaluate", tmp_path / "run"))
    assert str(tmp_path / "run" / "ppo") in line and ("changed" in line or "another run" in line)


def stopped_sft(folder, seed, capsys, monkeypatch):
    "SFT, stopped behind its fourth step: the projector is done, the language model has a checkpoint."
    argv = smoke("sft", folder, "--seed", seed, "--set", "sft.projector.save_every=2", "sft.language.save_every=1")
    stop_at(monkeypatch, sft, "backward_through", 6)
    interrupted(capsys, *argv)
    monkeypatch.undo()
    return argv


@pytest.mark.parametrize("what", ["fit-language/checkpoints", "projector", "begun.json"])
def test_of_another_seed_in_the_middle(capsys, smoke_run, tmp_path, monkeypatch, what):
    "Of two runs that were stopped, one gets what is the other's; when that is moved away, it goes on to its own end."
    argv = [stopped_sft(tmp_path / str(seed), seed, capsys, monkeypatch) for seed in (0, 1)][0]
    mine, theirs = (tmp_path / str(seed) / "sft" / what for seed in (0, 1))
    shutil.rmtree(mine) if mine.is_dir() else mine.unlink()
    shutil.copytree(theirs, mine) if theirs.is_dir() else shutil.copy(theirs, mine)
    line = refused(capsys, *argv)
    assert str(tmp_path / "0" / "sft") in line and ("another run" in line or "other settings" in line)
    away = re.search(r"move (?:that folder|it|(\S+)) away", line)
    shutil.move(away[1] or (mine if mine.is_dir() else mine.parent), tmp_path / "away")
    assert main(argv) == 0
    same_files(smoke_run / "sft", tmp_path / "0" / "sft", ["language/model.safetensors", "projector/model.safetensors"])


@pytest.mark.parametrize("spoil", [lambda f: f.unlink(), lambda f: f.write_text('{"step": 0, "loss": 1.0}\n'),
                                   lambda f: f.write_text(f.read_text().replace("loss", "lost"))])
def test_metrics_that_were_lost(capsys, smoke_run, tmp_path, monkeypatch, spoil):
    "While the stage was stopped: they come back from the checkpoint, and that is said."
    argv = stopped_sft(tmp_path / "run", 0, capsys, monkeypatch)
    file = tmp_path / "run" / "sft" / "fit-language" / "metrics.jsonl"
    spoil(file)
    assert main(argv) == 0
    assert f"{file}: not as it was" in capsys.readouterr().err
    same_files(smoke_run / "sft", tmp_path / "run" / "sft", ["fit-language/metrics.jsonl"])


# --- pairs may be edited --------------------------------------------------------------------------------------------

def test_edited_pairs(capsys, smoke_run, tmp_path):
    "An edit is used, said and recorded; what was made of the pairs as they were before is not mixed with it."
    copy_stages(smoke_run, tmp_path / "run", "sft", "preferences", "reward")
    file = tmp_path / "run" / "preferences" / "train.jsonl"
    rows = file.read_text().splitlines()
    file.write_text("\r\n".join(rows) + "\r\n\r\n")
    assert main(smoke("reward", tmp_path / "run")) == 0 and "edited" not in capsys.readouterr().err, "line ends are no edit"
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


def test_one_pair(smoke_run, tmp_path):
    "It has no spread from which a scale could be taken: the reward model is made all the same, and is finite."
    copy_stages(smoke_run, tmp_path / "run", "sft", "preferences")
    file = tmp_path / "run" / "preferences" / "train.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    assert main(smoke("ppo", tmp_path / "run")) == 0


def test_answers_that_are_all_alike(capsys, smoke_run, tmp_path):
    "No two annotators can disagree then: a line that says so, and what to do."
    copy_stages(smoke_run, tmp_path / "run", "sft")
    line = refused(capsys, *smoke("preferences", tmp_path / "run", "--set", "preferences.temperatures=[0,0]"))
    assert "two different answers" in line and "temperatures" in line
    with pytest.raises(ValueError, match="nobody"):
        fleiss_kappa([])
    shutil.rmtree(tmp_path / "run" / "preferences")
    assert main(smoke("preferences", tmp_path / "run")) == 0, "the advice works"


# --- the report -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(smoke_run, tmp_path_factory):
    "A finished run, to be damaged and mended."
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(smoke_run, folder)
    return folder


@pytest.mark.parametrize("name", ["report.json", "report.html", "before_after.png"])
def test_a_lost_report_is_made_again(capsys, smoke_run, finished, name):
    (finished / name).unlink()
    assert main(smoke("run", finished)) == 0
    assert f"{finished / name} is gone: made again" in capsys.readouterr().err
    same_files(smoke_run, finished, {"report.html", "before_after.png"})
    reports = [json.loads((f / "report.json").read_text()) for f in (smoke_run, finished)]
    assert [r.pop("run")["seed"] for r in reports] == [0, 0] and reports[0] == reports[1]


def numbers_swapped(file):
    report = json.loads(file.read_text())
    report["sft"]["chair_i"] = 0.
    file.write_text(json.dumps(report))


CHANGES = [("report.json", lambda f: f.write_text(text)) for text in ("3", "null", "[]", "{}", '{"run": 1}', '{"run": {}}', "", "[" * 99_999)]
CHANGES += [("report.json", numbers_swapped), ("report.html", lambda f: f.write_text(f.read_text()[:100])),
            ("before_after.png", lambda f: f.write_bytes(b"x"))]


@pytest.mark.parametrize("name, spoil", CHANGES)
def test_a_changed_report_is_not_shown(capsys, smoke_run, finished, name, spoil):
    spoil(finished / name)
    line = refused(capsys, *smoke("run", finished))
    assert name in line and "delete" in line
    shutil.copy(smoke_run / name, finished / name)


@pytest.mark.parametrize("what", [3, {}, dict(seconds="x"), dict(seconds=1)])
def test_what_a_run_has_cost_may_be_missing(capsys, finished, what):
    "It is the one thing in a report that is not sealed: two runs of one command differ in it."
    edit_json(finished / "report.json", run=what)
    assert main(smoke("run", finished)) == 0 and "chair_i" in capsys.readouterr().out


# --- remedies -------------------------------------------------------------------------------------------------------

SPOILT = {
    "sft/language/model.safetensors": lambda f: f.write_bytes(f.read_bytes()[:-1]), "sft/done.json": lambda f: f.write_text("{"),
    "preferences/candidates-validation.jsonl": lambda f: f.unlink(), "preferences/done.json": lambda f: edit_json(f, files=None),
    "reward/reward.safetensors": lambda f: f.unlink(), "preferences/validation.jsonl": lambda f: f.unlink(),
    "ppo/metrics.jsonl": lambda f: f.write_text(""), "hacked/done.json": lambda f: edit_json(f, uses=dict(seed=7)),
    "gold/actor.safetensors": lambda f: f.write_bytes(b"x"), "evaluate/done.json": lambda f: f.write_text("[]"),
    "report.json": lambda f: f.write_text("3"), "report.html": lambda f: f.write_text("3"), "config.yaml": lambda f: f.write_text("a: 1"),
    "run.json": lambda f: f.write_text("{}")}


def follow(line: str):
    "Do what a message says: remove the folder, or the files, that it wants moved away or deleted."
    found = re.search(r"(?:delete|move(?: the folder)?) (/.+?)(?: away|, and|, or|:)", line)
    named = found[1].split(", ") if found else [re.match(r"vlmrlhf: (/\S+?):", line)[1]]
    assert "move" in line or "delete" in line, line
    for path in map(Path, named):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("file", SPOILT)
def test_every_remedy_works(capsys, smoke_run, tmp_path, file):
    "What is spoilt is said, and following the advice, literally and as often as it is given, leads to the whole run again."
    shutil.copytree(smoke_run, tmp_path / "run")
    SPOILT[file](tmp_path / "run" / file)
    for tries in range(3):
        capsys.readouterr()
        status = main(smoke("evaluate", tmp_path / "run"))
        if status == 0:
            break
        said = capsys.readouterr().err.splitlines()
        assert status == 2, said
        follow(said[-1])
    assert status == 0 and (tries or file in ("report.json", "report.html", "evaluate/done.json"))
    assert (tmp_path / "run" / "report.html").read_bytes() == (smoke_run / "report.html").read_bytes()


# --- no longer numbers ----------------------------------------------------------------------------------------------

def spoil_once(policy, calls, at):
    "From its call number `at` on, one weight of the actor is no number, until it is restored."
    def before(vlm, *args):
        calls.append(1)
        if len(calls) == at:
            with torch.no_grad():
                next(p for n, p in policy.named_parameters() if "lora_B" in n and ".actor." in n).fill_(float("nan"))
        return original(vlm, *args)
    original = rollout.sample
    return before


def small(**changes): return small_ppo(VLM(build_model(SMALL), build_processor(SMALL)), **changes)


def test_a_policy_that_cannot_be_sampled_is_rolled_back(tmp_path, monkeypatch):
    "It counts as an emergency: the last good weights, a lower rate, no update; then the run goes on."
    policy, rm, cfg, pool = small(iterations=4, eval_every=4)
    monkeypatch.setattr(rollout, "sample", spoil_once(policy, [], 3))
    state = ppo.train_ppo(policy, rm, pool, pool[:2], cfg, tmp_path / "ppo")
    rows = read_jsonl(tmp_path / "ppo" / "metrics.jsonl")
    assert [r["emergency"] for r in rows] == [False, False, True, False] and state.emergencies == 1
    assert "loss" not in rows[2] and rows[2]["kl"] != rows[2]["kl"] and state.lr_scale == pytest.approx(.1)
    assert all(p.isfinite().all() for p in policy.parameters())
    assert [r["step"] for r in curve(tmp_path / "ppo" / "metrics.jsonl")] == [0, 1, 3]


def test_a_policy_that_cannot_be_validated_is_not_the_best(tmp_path, monkeypatch):
    policy, rm, cfg, pool = small(iterations=2, eval_every=1, keep="best")
    monkeypatch.setattr(rollout, "sample", spoil_once(policy, [], 4))   # sampled, validated, sampled, validated
    state = ppo.train_ppo(policy, rm, pool, pool[:2], cfg, tmp_path / "ppo")
    rows = read_jsonl(tmp_path / "ppo" / "metrics.jsonl")
    assert rows[1]["validation"] != rows[1]["validation"] and state.best == rows[0]["validation"]
    assert all(p.isfinite().all() for p in policy.parameters())


def test_never_finite_ends_with_a_line(tmp_path, monkeypatch):
    def never(*args): raise FloatingPointError
    policy, rm, cfg, pool = small(iterations=9)
    monkeypatch.setattr(rollout, "sample", never)
    with pytest.raises(UserError, match="KL nan was not below kl_emergency"):
        ppo.train_ppo(policy, rm, pool, pool[:2], cfg, tmp_path / "ppo")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sampling_notices(vlm, prompts, value):
    "Whatever is not finite in the logits."
    vlm.model.lm_head.weight.data[7] = value
    with pytest.raises(FloatingPointError):
        rollout.sample(vlm, prompts)
    assert rollout.try_sample(vlm, prompts) is None


def test_figures_that_are_no_numbers(vlm, monkeypatch):
    monkeypatch.setattr(evaluate, "score_texts", lambda *a: torch.tensor([float("nan")]))
    with pytest.raises(UserError, match="reward is nan"):
        evaluate.figures([SCENE], [describe(SCENE)], None)


def test_nothing_false_to_show():
    "Good news: then just the first pictures are shown."
    assert first_false([describe(SCENE)] * 4, [SCENE] * 4, 3) == [0, 1, 2] and first_false([], [], 3) == []
    before_after_figure([SCENE], {"a:": [describe(SCENE)]})
    assert first_false([describe(SCENE), "a blue fish ."], [SCENE] * 2, 3) == [1]


def test_a_refused_command_changes_nothing(capsys, smoke_run, tmp_path):
    "Settings that are not those of a stage that is done, or begun, are refused before anything is made."
    copy_stages(smoke_run, tmp_path / "run", "sft", "preferences", "reward", "ppo")
    assert main(smoke("sft", tmp_path / "run")) == 0   # writes the run's own record
    before = tree(tmp_path / "run")
    line = refused(capsys, *smoke("run", tmp_path / "run", "--set", "ppo.clip=0.1"))
    assert "ppo.clip" in line and tree(tmp_path / "run") == before
