"""Roles at the library's border: models that bring an adapter, saved models that have roles, tied
weights."""

import copy

import pytest
import torch
import transformers as T
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from report_models import COPY, DEVICE, LORA, full, make, prompts, shake  # noqa: F401 (fixture)
from torch.testing import assert_close

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.model.export import plain_model
from vlmrlhf_course.model.family import FAMILIES, tiny_model
from vlmrlhf_course.model.groups import make_optimizer
from vlmrlhf_course.model.roles import merged
from vlmrlhf_course.model.vlm import VLM, answer, load_vlm, save_vlm
from vlmrlhf_course.rl.rollout import sample, texts

SOME = ["q_proj", "v_proj", "down_proj"]


def near(a, b):
    assert_close(a, b, atol=2e-5, rtol=1e-4)


# --- a model that brings an adapter -----------------------------------------------------------


def tuned(kind="llava", name="sft", **more):
    "A model with a random adapter that is on, its processor, and what it says, by itself."
    model, processor = tiny_model(kind)
    config = LoraConfig(r=4, target_modules=SOME, init_lora_weights=False, **more)
    torch.manual_seed(1)
    model.add_adapter(config, name)
    model.set_adapter(name)
    return model.to(DEVICE), processor


def merged_by_peft(model, processor):
    "The same model as one that never had an adapter."
    plain = copy.deepcopy(model)
    for path, layer in list(plain.named_modules()):
        if hasattr(layer, "merge") and hasattr(layer, "base_layer"):
            layer.merge()
            plain.set_submodule(path, layer.get_base_layer())
    return VLM(plain.requires_grad_(False), processor)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("more", [{}, dict(use_dora=True)], ids=["lora", "dora"])
def test_the_trunk_is_what_was_handed_in(kind, more, prompts, tmp_path):
    model, processor = tuned(kind, **more)
    other = merged_by_peft(model, processor)
    vlm = VLM(model, processor)
    batch = full(vlm, prompts)
    with torch.no_grad():
        want = other.answer_logits(batch)
        for role, lora in (("actor", LORA), ("copied", COPY)):
            vlm.add_role(role, lora)
            near(vlm.answer_logits(batch, role), want)
        near(vlm.answer_logits(batch), want)
        shake(vlm, "actor")
        spoken = vlm.answer_logits(batch, "actor")
        assert (spoken - want).abs().max() > 1e-2
        with merged(vlm, "actor") as role:
            near(vlm.answer_logits(batch, role), spoken)
        near(vlm.answer_logits(batch), want)
        if loads(kind):
            save_vlm(vlm, tmp_path / "saved")
            near(load_vlm(tmp_path / "saved").answer_logits(batch), want)
        if not more:  # W's length is another with an actor on it: DoRA has no sum to fold into
            near(VLM(plain_model(vlm, "actor"), processor).answer_logits(batch), spoken)
    how = dict(temperature=1.0, max_new_tokens=5)
    assert answer(vlm, prompts, **how) == answer(other, prompts, **how)


def loads(kind) -> bool:
    return kind not in ("qwen2_5_vl", "internvl")


def test_only_the_new_role_learns(prompts):
    vlm = VLM(*tuned())
    before = {n: p.clone() for n, p in vlm.model.named_parameters() if ".sft." in n}
    vlm.add_role("actor", LORA)
    assert before and not any(
        p.requires_grad for n, p in vlm.model.named_parameters() if n in before
    )
    optimizer = make_optimizer([vlm.roles["actor"].group(0.1)], (0.9, 0.95))
    vlm.answer_logits(full(vlm, prompts), "actor").square().sum().backward()
    optimizer.step()
    now = dict(vlm.model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in before.items())


def test_an_adapter_that_is_off_stays_off(prompts):
    model, processor = tuned()
    model.disable_adapters()
    vlm, plain = VLM(model, processor), make()
    vlm.add_role("actor", LORA)
    near(vlm.answer_logits(full(vlm, prompts)), plain.answer_logits(full(plain, prompts)))


def test_two_of_them_and_one_on_the_projector(prompts):
    model, processor = tuned()
    torch.manual_seed(2)
    more = LoraConfig(r=2, target_modules=["linear_1"], init_lora_weights=False)
    model.add_adapter(more, "seen")
    model.set_adapter(["sft", "seen"])
    other, vlm = merged_by_peft(model, processor), VLM(model, processor)
    vlm.add_role("actor", LORA)
    batch = full(vlm, prompts)
    near(vlm.answer_logits(batch), other.answer_logits(batch))
    near(VLM(plain_model(vlm, None), processor).answer_logits(batch), vlm.answer_logits(batch))


def test_a_wrapped_model(prompts):
    "peft's own class around the model."
    model, processor = tiny_model("llava")
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(target_modules=SOME, init_lora_weights=False))
    other = VLM(copy.deepcopy(wrapped).merge_and_unload().requires_grad_(False), processor)
    vlm = VLM(wrapped, processor)
    vlm.add_role("actor", LORA)
    batch = full(vlm, prompts)
    near(vlm.answer_logits(batch), other.answer_logits(batch))
    said = texts(vlm, sample(vlm, prompts, "actor", max_new_tokens=5))
    assert said == texts(other, sample(other, prompts, max_new_tokens=5))


STRANGE = {
    "another kind": IA3Config(target_modules=SOME, feedforward_modules=["down_proj"]),
    "saved modules": LoraConfig(target_modules=SOME, modules_to_save=["lm_head"]),
    "soft prompts": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_roles_cannot_stand_on_is_refused(name):
    model, processor = tiny_model("llava")
    sizes = model.config.text_config
    model.config.hidden_size, model.config.num_attention_heads = sizes.hidden_size, 4
    model.config.num_hidden_layers = sizes.num_hidden_layers
    wrapped = get_peft_model(model, STRANGE[name])
    with pytest.raises(UserError, match="brings an adapter .*merge_and_unload") as e:
        VLM(wrapped, processor)
    assert "\n" not in str(e.value)


def test_a_merged_adapter_and_a_name_that_is_taken():
    model, processor = tuned(name="actor")
    with pytest.raises(UserError, match="call the role otherwise"):
        VLM(model, processor).add_role("actor", LORA)
    model, processor = tuned()
    for layer in model.modules():
        if hasattr(layer, "merge") and hasattr(layer, "base_layer"):
            layer.merge()
    with pytest.raises(UserError, match="merge_and_unload"):
        VLM(model, processor)


# --- saving a model that has roles ------------------------------------------------------------


@pytest.mark.parametrize("kind", list(filter(loads, FAMILIES)))
def test_a_saved_model_is_the_trunk(kind, prompts, tmp_path, capsys):
    vlm = make(kind)
    for role, lora in (("actor", LORA), ("other", LORA), ("copied", COPY)):
        vlm.add_role(role, lora)
        shake(vlm, role)
    batch = full(vlm, prompts)
    with torch.no_grad():
        want, spoken = vlm.answer_logits(batch), vlm.answer_logits(batch, "actor")
        save_vlm(vlm, tmp_path / "saved")
        assert "without its roles (actor, other, copied)" in capsys.readouterr().err
        again = load_vlm(tmp_path / "saved")
        assert_close(again.answer_logits(full(again, prompts)), want)
        assert torch.equal(vlm.answer_logits(batch, "actor"), spoken), "what is saved stays"
        again.add_role("actor", LORA).load(vlm.roles["actor"].state())
        assert_close(again.answer_logits(batch, "actor"), spoken)


# --- weights that are tied --------------------------------------------------------------------


def tied(kind):
    "A family's tiny model whose output layer is its word embeddings."
    config, processor = FAMILIES[kind].tiny(["a", "red", "cat", "no", "."])
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = True
    torch.manual_seed(0)
    model = T.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    return VLM(model.requires_grad_(False), processor)


def is_tied(language, head) -> bool:
    return language.get_input_embeddings().weight is head.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_copy_is_tied_as_the_trunk_is(kind, dtype, prompts, tmp_path):
    vlm = tied(kind)
    vlm.model.to(dtype)
    assert is_tied(vlm.language, vlm.model.get_output_embeddings())
    vlm.add_role("before", LORA)
    actor = vlm.add_role("actor", COPY)
    vlm.add_role("critic", COPY, like="actor")
    assert is_tied(*actor.copy) and is_tied(*vlm.roles["critic"].copy)
    assert len({id(w) for w in actor.trained()}) == len(actor.trained())
    before = actor.copy[1].weight.clone()
    optimizer = make_optimizer([actor.group(0.01)], (0.9, 0.95))
    batch = full(vlm, prompts)
    vlm.answer_logits(batch, "actor").square().sum().backward()
    optimizer.step()
    assert is_tied(*actor.copy) and not torch.equal(actor.copy[1].weight, before)
    want = vlm.answer_logits(batch, "actor").detach()
    fresh = vlm.add_role("fresh", COPY)
    fresh.load(actor.snapshot())
    assert is_tied(*fresh.copy) and torch.equal(vlm.answer_logits(batch, "fresh"), want)
    plain_model(vlm, "actor").save_pretrained(tmp_path / "whole")
    model = type(vlm.model).from_pretrained(tmp_path / "whole").requires_grad_(False)
    again = VLM(model, vlm.processor)
    assert is_tied(again.language, again.model.get_output_embeddings())
    loose = dict(atol=0.05, rtol=0.05) if dtype != torch.float32 else {}
    assert_close(again.answer_logits(batch), want, **loose)


def test_an_untied_copy_stays_untied():
    vlm = make()
    assert not is_tied(*vlm.add_role("actor", COPY).copy)
