"A role that leaves the house: plain `transformers` and `peft` load it, and give the same logits."

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from small_models import shake
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from vlmrlhf_course.base.config import recorded
from vlmrlhf_course.base.runs import Run
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.cli import main
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.export import plain_model, save_adapter
from vlmrlhf_course.model.family import FAMILIES, tiny_model
from vlmrlhf_course.model.roles import LoRAConfig, Role
from vlmrlhf_course.model.vlm import VLM, load_vlm
from vlmrlhf_course.pipeline import made, obtain, reopen

SMALL_LORA = LoRAConfig(r=2, alpha=6)


def logits_of(vlm, role=None):
    "Of one answer about a drawn picture, and so of every family's words."
    prompt = Prompt("detail", "what is the cat ?", "red blue", "scene:beach: small red cat @4")
    with torch.no_grad():
        return vlm.answer_logits(vlm.batch([prompt], [prompt.answer]), role)


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    "A family's tiny model with two adapters and a copy, none of them like the trunk; saved, too."
    model, processor = tiny_model(request.param)
    vlm = VLM(model.requires_grad_(False), processor)
    model.save_pretrained(tmp_path / "trunk")
    for name in ("actor", "other"):
        vlm.add_role(name, SMALL_LORA)
        shake(vlm, name, seed=len(name))
    vlm.add_role("copied", LoRAConfig(r=0))
    shake(vlm, "copied", std=0.01)
    vlm.trunk = tmp_path / "trunk"
    return vlm


def test_an_adapter_is_peft_s(family, tmp_path):
    save_adapter(family, "actor", tmp_path / "adapter", family.trunk)
    model = AutoModelForImageTextToText.from_pretrained(family.trunk)
    loaded = PeftModel.from_pretrained(model, tmp_path / "adapter").get_base_model()
    theirs = VLM(loaded, family.processor)
    theirs.roles["default"] = Role("default", theirs.language)
    want = logits_of(family, "actor")
    assert_close(logits_of(theirs, "default"), want)
    assert (want - logits_of(family)).abs().max() > 1e-3
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6)


@pytest.mark.parametrize("role", ["actor", "copied", None])
def test_a_whole_model_is_transformers_s(family, tmp_path, role):
    before = logits_of(family, role)
    plain_model(family, role).save_pretrained(tmp_path / "whole")
    assert torch.equal(logits_of(family, role), before), "what is exported stays as it was"
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    theirs = VLM(model, family.processor)
    assert_close(logits_of(theirs), before)
    assert not any("lora" in name for name in theirs.model.state_dict())


def test_a_copy_is_no_adapter(family, tmp_path):
    with pytest.raises(UserError, match="--merge"):
        save_adapter(family, "copied", tmp_path / "adapter", family.trunk)
    assert not (tmp_path / "adapter").exists()


# --- the verb ---------------------------------------------------------------------------------


def export(*argv, capsys):
    status = main(["export", *map(str, argv)])
    return status, capsys.readouterr().err.strip()


@pytest.mark.parametrize("arm", ["ppo_rm", "dpo"])
def test_a_finished_arm(smoke_run, tmp_path, capsys, arm):
    "As an adapter on the run's SFT model, and as a whole: the logits that the run itself has."
    speaker = made(smoke_run / arm)
    want = logits_of(*speaker)
    assert export(smoke_run / arm, "--to", tmp_path / "a", capsys=capsys)[0] == 0
    assert export(smoke_run / arm, "--to", tmp_path / "m", "--merge", capsys=capsys)[0] == 0
    assert_close(logits_of(load_vlm(tmp_path / "m")), want)
    short = AutoModelForImageTextToText.from_pretrained(tmp_path / "a")
    theirs = VLM(short, speaker.vlm.processor)
    theirs.roles["default"] = Role("default", theirs.language)
    assert_close(logits_of(theirs, "default"), want)


def test_a_reward_model_takes_its_head_along(smoke_run, tmp_path, capsys):
    assert export(smoke_run / "reward", "--to", tmp_path / "a", capsys=capsys)[0] == 0
    with safe_open(tmp_path / "a" / "head.safetensors", "pt") as file:
        head = {name: file.get_tensor(name) for name in file.keys()}
        settings = json.loads(file.metadata()["config"])
    state = made(smoke_run / "reward").state()
    assert {"norm.shift", "norm.scale"} < set(head) < set(state)
    assert all(torch.equal(head[name], state[name]) for name in head)
    assert settings == json.loads(json.dumps(recorded(made(smoke_run / "reward").cfg)))


def test_what_cannot_be_exported_is_said(smoke_run, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    for stage, to, words in (
        (smoke_run / "rloo", tmp_path / "a", "not finished"),
        (smoke_run / "nonsense", tmp_path / "a", "no stage of that run; it has sft"),
        (smoke_run / "preferences", tmp_path / "a", "no model that speaks"),
        (tmp_path / "ppo", tmp_path / "a", "no run there"),
        (smoke_run / "dpo", mine, "holds what this package has not made"),
    ):
        status, line = export(stage, "--to", to, capsys=capsys)
        assert status == 2 and words in line and "\n" not in line
    assert not (tmp_path / "a").exists()
    assert [f.name for f in mine.iterdir()] == ["thesis.txt"]


def test_a_run_is_opened_as_it_was_made(smoke_run):
    "The same settings: or the stages' records would refuse."
    run = reopen(smoke_run)
    obtain(run, "ppo_rm")
    assert isinstance(run, Run) and run.seed == 0
    assert run.used["ppo_rm"] == run.info("ppo_rm")["uses"]["ppo_rm"]
