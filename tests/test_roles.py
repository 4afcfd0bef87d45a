"Roles: a trunk that never moves, adapters, and copies with weights of their own."

import copy

import pytest
import torch
from small_models import SMALL, SMALL_LORA, close, shake

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.model.roles import LoRAConfig, merged
from vlmrlhf_course.model.vlm import VLM, answer, token_logprobs
from vlmrlhf_course.rl.rollout import sample, texts
from vlmrlhf_course.world.llava import build_model, build_processor


def test_reference_is_the_frozen_trunk_bit_for_bit(vlm, full):
    before = vlm.answer_logits(full)
    trunk = {k: v.clone() for k, v in vlm.model.state_dict().items()}
    vlm.add_role("actor", SMALL_LORA)
    vlm.add_role("reward", SMALL_LORA)
    assert torch.equal(vlm.answer_logits(full, "actor"), before), "a new adapter changes nothing"
    opt = torch.optim.SGD([p for p in vlm.model.parameters() if p.requires_grad], 0.5)
    for _ in range(2):
        vlm.answer_logits(full, "actor").square().sum().backward()
        opt.step()
        opt.zero_grad()
    assert torch.equal(vlm.answer_logits(full), before), "the reference moved"
    assert not torch.allclose(vlm.answer_logits(full, "actor"), before), "the actor did not learn"
    other = vlm.answer_logits(full, "reward")
    assert torch.equal(other, before), "one role learned from another's gradient"
    now = vlm.model.state_dict()
    for k, v in trunk.items():
        name = k if k in now else k.replace(".weight", ".base_layer.weight")  # under an adapter
        assert torch.equal(v, now[name]), k


@pytest.mark.parametrize(
    "first, second",
    [(SMALL_LORA, LoRAConfig(r=0)), (LoRAConfig(r=0), SMALL_LORA)],
    ids=["copy of an adapter", "adapter of a copy"],
)
def test_a_role_starts_only_from_its_own_kind(first, second):
    vlm = VLM(build_model(SMALL), build_processor(SMALL))
    vlm.add_role("reward", first)
    with pytest.raises(UserError, match="'reward' is .* cannot start from it"):
        vlm.add_role("critic", second, like="reward")
    vlm.add_role("critic", first, like="reward")


def test_who_is_no_role_does_not_speak(vlm, prompts):
    "The trunk's answers under a misspelt name would be the SFT model's, and pass for a policy's."
    vlm.add_role("actor", SMALL_LORA)
    batch = vlm.batch(prompts[:2], ["a cat ."] * 2)
    works = (
        lambda: answer(vlm, prompts[:2], role="actr"),
        lambda: sample(vlm, prompts[:2], "actr"),
        lambda: vlm.answer_logits(batch, "actr"),
        lambda: vlm.add_role("critic", SMALL_LORA, like="actr"),
    )
    for work in works:
        with pytest.raises(KeyError, match="no role 'actr'.*did you mean 'actor'.*there is actor"):
            work()
    with pytest.raises(KeyError, match="no role"), merged(vlm, "actr"):
        pass


def test_a_full_copy_has_no_adapters():
    "Not even the note of where the trunk had some."
    vlm = VLM(build_model(SMALL), build_processor(SMALL))
    for name, lora in (("actor", SMALL_LORA), ("copy", LoRAConfig(r=0))):
        vlm.add_role(name, lora)
        assert vlm.lora_layers()
    with vlm.speaking("copy"):
        assert not vlm.lora_layers()


def test_acting_is_undone_also_after_errors(vlm, full):
    vlm.add_role("a", SMALL_LORA)
    vlm.add_role("b", SMALL_LORA)
    shake(vlm, "a")
    shake(vlm, "b", seed=2)
    want = {r: vlm.answer_logits(full, r) for r in ("a", "b", None)}
    assert not torch.allclose(want["a"], want["b"]) and not torch.allclose(want["a"], want[None])
    with pytest.raises(ZeroDivisionError):
        with vlm.acting("a"):
            with vlm.acting(None):
                assert torch.equal(vlm.answer_logits(full, "b"), want["b"])
            # the outer role speaks again after the inner block
            h = vlm.language(
                inputs_embeds=vlm.embed(full),
                attention_mask=full.attention_mask,
                position_ids=full.position_ids,
            ).last_hidden_state
            assert torch.equal(h, vlm.hidden(full, "a"))
            1 / 0
    for r in want:
        assert torch.equal(vlm.answer_logits(full, r), want[r])


@pytest.mark.parametrize("cfg", [SMALL_LORA, LoRAConfig(r=0)], ids=["adapter", "copy"])
def test_role_state_round_trip(vlm, full, cfg):
    vlm.add_role("actor", cfg)
    other = copy.deepcopy(vlm)
    shake(vlm, "actor")
    assert vlm.roles["actor"].state()
    assert not torch.allclose(other.answer_logits(full, "actor"), vlm.answer_logits(full, "actor"))
    other.roles["actor"].load(vlm.roles["actor"].state())
    assert torch.equal(other.answer_logits(full, "actor"), vlm.answer_logits(full, "actor"))
    with pytest.raises(KeyError, match="actor"):
        other.roles["actor"].load({})


def test_a_role_can_start_like_another(vlm, full):
    vlm.add_role("reward", SMALL_LORA)
    shake(vlm, "reward")
    vlm.add_role("critic", SMALL_LORA, like="reward")
    assert torch.equal(vlm.answer_logits(full, "critic"), vlm.answer_logits(full, "reward"))
    shake(vlm, "critic", seed=5)
    assert not torch.allclose(vlm.answer_logits(full, "critic"), vlm.answer_logits(full, "reward"))


class TestCopy:
    "Roles with weights of their own: LoRAConfig(r=0)."

    def test_learns_alone(self, vlm, full):
        before = vlm.answer_logits(full)
        vlm.add_role("actor", LoRAConfig(r=0))
        vlm.add_role("critic", LoRAConfig(r=0), like="actor")
        assert torch.equal(vlm.answer_logits(full, "actor"), before)
        opt = torch.optim.SGD(vlm.roles["actor"].trained(), 1e-3)
        vlm.answer_logits(full, "actor").square().sum().backward()
        opt.step()
        assert not torch.allclose(vlm.answer_logits(full, "actor"), before)
        assert torch.equal(vlm.answer_logits(full), before)
        assert torch.equal(vlm.answer_logits(full, "critic"), before)
        assert all(p.grad is None for p in vlm.model.parameters())

    def test_starts_from_the_trunk_also_where_adapters_are(self, vlm, full):
        """A reward model with an adapter, an actor with weights of its own:
        the actor must begin as the reference."""
        before = vlm.answer_logits(full)
        vlm.add_role("reward", SMALL_LORA)
        shake(vlm, "reward")
        vlm.add_role("actor", LoRAConfig(r=0))
        close(vlm.answer_logits(full, "actor"), before)

    def test_sampling_speaks_with_the_copy(self, vlm, prompts):
        vlm.add_role("actor", LoRAConfig(r=0))
        shake(vlm, "actor")
        roll = sample(vlm, prompts, "actor", max_new_tokens=5, seed=2)
        z, mask = vlm.rule_out(vlm.answer_logits(roll.batch, "actor")), roll.batch.answer_mask
        close(token_logprobs(z, roll.batch.answers)[mask], roll.logprobs[mask])

    def test_generate_speaks_with_the_copy(self, vlm, prompts):
        "`answer` (generate) and `sample` must hear the same role."
        vlm.add_role("actor", LoRAConfig(r=0))
        shake(vlm, "actor")
        said = answer(vlm, prompts[:2], 0.0, role="actor", max_new_tokens=6)
        trunk = answer(vlm, prompts[:2], 0.0, max_new_tokens=6)
        roll = sample(vlm, prompts[:2], "actor", temperature=1e-6, max_new_tokens=6)
        assert said == texts(vlm, roll) != trunk


def test_generate_speaks_with_the_adapter(vlm, prompts):
    vlm.add_role("actor", SMALL_LORA)
    shake(vlm, "actor")
    said = answer(vlm, prompts, 0.0, role="actor", max_new_tokens=6)
    trunk = answer(vlm, prompts, 0.0, max_new_tokens=6)
    by_actor, by_trunk = (
        texts(vlm, sample(vlm, prompts, role, temperature=1e-6, max_new_tokens=6))
        for role in ("actor", None)
    )
    assert said == by_actor
    assert trunk == by_trunk != said


def test_merged_weights(vlm, full):
    """Inside the block the trunk speaks as the role; after it
    every weight is back to the bit, also after an error."""
    vlm.add_role("actor", SMALL_LORA)
    vlm.add_role("copy", LoRAConfig(r=0))
    vlm.add_role("other", SMALL_LORA)
    shake(vlm, "actor")
    shake(vlm, "other", seed=3)
    before = {k: w.clone() for k, w in vlm.model.state_dict().items()}
    want = vlm.answer_logits(full, "actor").detach()
    with pytest.raises(ZeroDivisionError):
        with merged(vlm, "actor") as role:
            assert role is None
            assert not torch.allclose(want, vlm.answer_logits(full, "other"))
            close(vlm.answer_logits(full, role).detach(), want)
            1 / 0
    assert all(torch.equal(w, before[k]) for k, w in vlm.model.state_dict().items())
    for other in (None, "copy"):
        with merged(vlm, other) as role:
            assert role == other
            assert all(torch.equal(w, before[k]) for k, w in vlm.model.state_dict().items())
    vlm.model.bfloat16()
    with merged(vlm, "actor") as role:
        assert role == "actor", "the sum would be rounded"
