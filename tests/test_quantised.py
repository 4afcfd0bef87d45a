"A trunk in four bits: adapters learn beside it, the first ratio is 1, and what is exported is \
what was trained."

import copy
import json

import pytest
import torch
from other_models import tiny_other
from other_specs import OTHERS
from own_data import checkpoint, lines, recipe, squares
from peft import PeftModel
from report_models import LORA, full, make, prompts, shake  # noqa: F401 (fixture)
from safetensors.torch import load_file
from test_half_precision import ratio_error
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from vlmrlhf_course.base.checkpoints import Checkpoints
from vlmrlhf_course.base.launch import make_accelerator
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.cli import main
from vlmrlhf_course.model import quantised
from vlmrlhf_course.model.export import save_adapter, save_plain
from vlmrlhf_course.model.quantised import is_quantised
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vlm import VLM, load_vlm, save_vlm
from vlmrlhf_course.own import ModelConfig, load_checkpoint
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.train.reward import RewardConfig, RewardModel
from vlmrlhf_course.train.sft import learn_part

KINDS = ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "aya_vision"]  # the last: the general family


@pytest.fixture(scope="module", params=KINDS)
def packed(request, tmp_path_factory):
    "A model that was saved in bfloat16, loaded in four bits."
    kind, folder = request.param, tmp_path_factory.mktemp("packed")
    if kind in OTHERS:
        model, processor = tiny_other(kind)
        save_vlm(VLM(model.to(torch.bfloat16), processor), folder)
    else:
        save_vlm(make(kind, torch.bfloat16), folder)
    return load_checkpoint(ModelConfig(str(folder), quantisation="nf4")), folder


def acting(packed, name, cfg=LORA):
    "A model of its own with a role that has been shaken."
    vlm = load_checkpoint(ModelConfig(str(packed[1]), quantisation="nf4"))
    vlm.add_role(name, cfg)
    shake(vlm, name, 0.1 if cfg.r else 0.01)
    return vlm


def test_the_language_model_alone_is_packed(packed):
    vlm, _ = packed
    inside = [m for m in vlm.language.modules() if isinstance(m, torch.nn.Linear)]
    assert inside and all(map(is_quantised, inside))
    assert sum(map(is_quantised, vlm.model.modules())) == len(inside)


@pytest.mark.parametrize("lora", [LORA, LoRAConfig(r=0)], ids=["adapter", "copy"])
def test_the_first_ratio_is_1(packed, lora, prompts):  # noqa: F811
    "Alone, and in other company than when it was sampled; trunk and role."
    vlm = acting(packed, "actor", lora)
    for role in (None, "actor"):
        roll = sample(vlm, prompts * 3, role, max_new_tokens=6, seed=3)
        assert ratio_error(vlm, roll, role) < 1e-3
    for weight in vlm.roles["actor"].trained():
        assert weight.dtype == torch.float32 and weight.requires_grad


def test_gradients_are_those_of_the_plain_model(packed, prompts):  # noqa: F811
    "The same trunk unpacked, with the same adapter."
    vlm = acting(packed, "actor")
    plain = acting(packed, "actor")
    plain.roles["actor"].load(vlm.roles["actor"].state())
    for path, layer in list(plain.model.named_modules()):
        if path.endswith("base_layer") and is_quantised(layer):
            plain.model.set_submodule(path, quantised.plain_linear(layer))
    for one in (vlm, plain):
        one.answer_logits(full(one, prompts), "actor").sin().sum().backward()
    pairs = zip(vlm.roles["actor"].trained(), plain.roles["actor"].trained(), strict=True)
    for a, b in pairs:
        assert a.grad.abs().sum() > 0
        assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_what_is_exported_is_what_was_trained(packed, prompts, tmp_path):  # noqa: F811
    "Merged: a plain folder in bfloat16. As an adapter: peft's, beside the packed trunk."
    vlm = acting(packed, "actor")
    batch = full(vlm, prompts)
    save_plain(vlm, "actor", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    again = load_vlm(tmp_path / "merged")
    save_adapter(vlm, "actor", tmp_path / "adapter", packed[1])
    beside = load_checkpoint(ModelConfig(str(packed[1]), quantisation="nf4"))
    beside = VLM(PeftModel.from_pretrained(beside.model, tmp_path / "adapter"), beside.processor)
    with torch.no_grad():
        want = vlm.answer_logits(batch, "actor")
        assert_close(again.answer_logits(batch), want, rtol=0, atol=0.05)  # rounded once, to bf16
        assert_close(beside.answer_logits(batch), want, rtol=1e-5, atol=1e-5)
        start = vlm.answer_logits(batch)
    assert (want - start).abs().max() > 0.2, "the adapter says something"


def test_saved_as_it_is_and_loaded(packed, prompts, tmp_path):  # noqa: F811
    "A folder that comes packed by bitsandbytes is taken as it is."
    vlm, _ = packed
    save_vlm(vlm, tmp_path / "again")
    again = load_vlm(tmp_path / "again")
    with torch.no_grad():
        batch = full(vlm, prompts)
        assert torch.equal(again.answer_logits(batch), vlm.answer_logits(batch))


@pytest.fixture
def folder(tmp_path):
    save_vlm(make("llava", torch.bfloat16), tmp_path / "model")
    return tmp_path / "model"


def test_packed_weights_do_not_learn(folder):
    "Nor may an adapter that SFT would merge: what it has learned is rounded away by packing."
    vlm = load_checkpoint(ModelConfig(str(folder), quantisation="nf4"))
    with pytest.raises(UserError, match="train sft without it, in a run of its own"):
        learn_part(vlm, "language")


def test_training_goes_on_from_a_checkpoint(folder, tmp_path):
    "Which holds what learns, and none of the packed weights' scales."
    vlm = load_checkpoint(ModelConfig(str(folder), quantisation="nf4"))
    rm = RewardModel(vlm, RewardConfig(lora=LORA))
    vlm.model.requires_grad_(False)
    for p in rm.role.trained():
        p.requires_grad_(True)
    accelerator = make_accelerator()
    task = accelerator.prepare(rm)
    saved = Checkpoints(tmp_path / "checkpoints", accelerator)
    saved.save(1, [])
    kept = load_file(tmp_path / "checkpoints" / "step-1" / "model.safetensors")
    assert any("lora_" in name for name in kept)
    assert not any("base_layer" in name or "absmax" in name for name in kept)
    was = {name: p.clone() for name, p in task.named_parameters() if p.requires_grad}
    for p in rm.role.trained():
        p.data += 1
    assert saved.load() == 1
    assert all(torch.equal(p, was[n]) for n, p in task.named_parameters() if n in was)


def test_without_the_package(folder, monkeypatch):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'vlmrlhf_course\[quantised\]'"):
        load_checkpoint(ModelConfig(str(folder), quantisation="nf4"))


@pytest.mark.parametrize(
    "how",
    [
        dict(quant_method="gptq", bits=4),
        dict(quant_method="awq", bits=4),
        dict(quant_method="bitsandbytes", load_in_8bit=True),
        dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        dict(quant_method="compressed-tensors"),
        dict(bits=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["whole", "text_config"])
def test_other_kinds_of_packing_are_refused(folder, how, where):
    config = folder / "config.json"
    values = json.loads(config.read_text())
    part = values if where == "whole" else values[where]
    part["quantization_config"] = how
    config.write_text(json.dumps(values))
    method = how.get("quant_method", "unknown")
    with pytest.raises(UserError, match=rf"come packed \({method}\); give the checkpoint"):
        load_vlm(folder)
    with pytest.raises(ValueError, match="quantisation='int8': give one of none, nf4"):
        ModelConfig(str(folder), quantisation="int8")


def test_a_run(tmp_path, capsys):
    "From pairs: adapters alone learn, and a plain folder comes out."
    checkpoint("llava", tmp_path / "model")
    lines(squares(40, tmp_path / "pictures"), tmp_path / "pairs.jsonl")
    words = ["--model", tmp_path / "model", "--data", tmp_path / "pairs.jsonl"]
    words += ["--config", recipe(tmp_path), "--out", tmp_path / "run"]
    words += ["--set", "model.quantisation=nf4"]
    assert main(["run", *map(str, words)]) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["ppo"]["reward"]
    target = tmp_path / "exported"
    assert main(["export", str(tmp_path / "run" / "ppo"), "--to", str(target), "--merge"]) == 0
    model, info = AutoModelForImageTextToText.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not any(map(is_quantised, model.modules()))
    # another precision is another start: nothing of the run is taken for it
    words[-1] = "model.quantisation=none"
    assert main(["reward", *map(str, words)]) == 2
    assert "quantisation" in capsys.readouterr().err


def test_what_is_packed_can_be_copied(folder):
    vlm = load_checkpoint(ModelConfig(str(folder), quantisation="nf4"))
    again = copy.deepcopy(vlm.model)
    for (_, a), (_, b) in zip(vlm.model.named_parameters(), again.named_parameters(), strict=True):
        assert a.data_ptr() != b.data_ptr() and torch.equal(a, b)
