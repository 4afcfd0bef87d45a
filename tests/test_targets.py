"Adapters on some layers by name; and records that do not know of it where nobody has asked."

from dataclasses import fields

import pytest
import torch
from peft import PeftModel
from report_models import LORA, full, make, prompts, shake  # noqa: F401 (fixture)
from torch.testing import assert_close

from vlmrlhf_course.base.config import LATER, build_config, recorded
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.model.export import plain_model, save_adapter
from vlmrlhf_course.model.family import FAMILIES
from vlmrlhf_course.model.roles import LoRAConfig, Role, merged
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.rl.ppo import PPOConfig
from vlmrlhf_course.rl.rollout import sample, texts

SOME = LoRAConfig(r=2, alpha=4, targets=("q_proj", "v_proj"))


@pytest.mark.parametrize("kind", FAMILIES)
def test_two_roles_on_different_layers(kind, prompts, tmp_path):
    vlm = make(kind)
    vlm.model.save_pretrained(tmp_path / "trunk")
    vlm.add_role("some", SOME)
    vlm.add_role("all", LORA)
    shake(vlm, "some")
    batch = full(vlm, prompts)
    names = {path.rpartition(".")[2] for path in vlm.roles["some"].layers()}
    assert names == {"q_proj", "v_proj"} < {p.rpartition(".")[2] for p in vlm.roles["all"].layers()}
    with torch.no_grad():
        trunk, want = vlm.answer_logits(batch), vlm.answer_logits(batch, "some")
        assert (want - trunk).abs().max() > 1e-3
        assert torch.equal(vlm.answer_logits(batch, "all"), trunk), "the other one is new"
        with merged(vlm, "some") as role:
            assert_close(vlm.answer_logits(batch, role), want, atol=1e-5, rtol=1e-4)
    assert texts(vlm, sample(vlm, prompts, "some", max_new_tokens=5))
    vlm.answer_logits(batch, "some").square().sum().backward()
    assert all(w.grad is not None for w in vlm.roles["some"].trained())
    assert all(w.grad is None for w in vlm.roles["all"].trained())
    other = make(kind)
    other.add_role("some", SOME).load(vlm.roles["some"].state())
    assert_close(other.answer_logits(batch, "some"), want)
    whole = VLM(plain_model(vlm, "some"), vlm.processor)
    assert_close(whole.answer_logits(batch), want, atol=1e-5, rtol=1e-4)
    save_adapter(vlm, "some", tmp_path / "adapter", tmp_path / "trunk")
    model = type(vlm.model).from_pretrained(tmp_path / "trunk")
    model = PeftModel.from_pretrained(model, tmp_path / "adapter").get_base_model()
    loaded = VLM(model.requires_grad_(False), vlm.processor)
    loaded.roles["default"] = Role("default", loaded.language)
    assert_close(loaded.answer_logits(batch, "default"), want)


@pytest.mark.parametrize("before", [False, True])
def test_a_name_that_no_layer_has(before):
    vlm = make()
    if before:
        vlm.add_role("actor", LORA)
    with pytest.raises(UserError, match="no layer 'q_prj'.*q_proj.*; there is down_proj"):
        vlm.add_role("other", LoRAConfig(targets=("v_proj", "q_prj")))


def test_records_name_it_where_it_was_set():
    plain, some = build_config(PPOConfig, {}, "ppo"), dict(lora=dict(targets=["q_proj"]))
    assert recorded(plain)["lora"] == dict(r=16, alpha=32, dropout=0.0)
    assert recorded(build_config(PPOConfig, some, "ppo"))["lora"]["targets"] == ("q_proj",)
    later = {f.name for f in fields(PPOConfig) if f.metadata == LATER}
    assert later == {"modality"}, "what records name only where it is set"
    assert set(recorded(plain)) == {f.name for f in fields(PPOConfig)} - later
