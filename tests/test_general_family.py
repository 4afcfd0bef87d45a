"""The general family: any class of models that has no family of its own, against the plain forward
pass of transformers from pixels. Here it takes the place of families that have one, whose own tests
say what is right; `test_all_models.py` does the same for types that have none."""

import pytest
import torch
from test_families import answered, close, logprobs, plain, vlm_of  # noqa: F401

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.family import FAMILIES, family_of
from vlmrlhf_course.model.vlm import answer, token_logprobs
from vlmrlhf_course.rl.rollout import sample

KINDS = [kind for kind in FAMILIES if kind != "paligemma"]  # its types say what is an answer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def prompts(pictures):
    "One picture, two of different sizes, none."
    a, b, c = pictures
    return [
        Prompt("x", "describe the picture .", "a red cat .", a),
        Prompt("x", "which of the two pictures is the one ?", "yes .", (b, c)),
        Prompt("x", "what colour is a boat ?", "blue ."),
    ]


def general(kind):
    "A family's tiny model, run by the general family."
    vlm = vlm_of(kind)
    vlm.family = FAMILIES.found() and FAMILIES.general()
    # it never says a mark around a picture either; here both may say the same
    vlm.family.placeholders = FAMILIES[kind].placeholders
    return vlm


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_the_own_family_says(kind, prompts):
    "Log-probabilities, sampled ones, and greedy answers."
    own, vlm = vlm_of(kind), general(kind)
    close(logprobs(vlm, answered(vlm, prompts)), logprobs(own, answered(own, prompts)))
    roll = sample(vlm, prompts * 2, None, 0.7, max_new_tokens=6, seed=2)
    again = own.batch(prompts * 2, [a[m].tolist() for a, m in zip(roll.batch.answers, real(roll))])
    want = token_logprobs(own.rule_out(own.answer_logits(again)), again.answers, 0.7)
    close(roll.logprobs[real(roll)], want[again.answer_mask])
    assert answer(vlm, prompts, 0.0, max_new_tokens=5) == answer(
        own, prompts, 0.0, max_new_tokens=5
    )


def real(roll):
    return roll.batch.answer_mask


@pytest.mark.parametrize("kind, why", [("florence2", "decoder"), ("pi0", "robot")])
def test_what_cannot_be_right_is_refused_in_one_line(kind, why):
    config = FAMILIES["llava"].tiny(["a"])[0]
    config.model_type, config.is_encoder_decoder = kind, kind == "florence2"
    with pytest.raises(UserError, match=f"{kind}.*cannot be trained here.*{why}") as e:
        family_of(config)
    assert "\n" not in str(e.value)


@torch.no_grad()
def test_logits_that_are_changed_in_an_unknown_way_are_refused(prompts):
    vlm = general("llava")

    def cube(module, args, out):
        out["logits"] = out.logits**3
        return out

    vlm.model.register_forward_hook(cube)
    with pytest.raises(UserError, match="change their logits"):
        vlm.hidden(answered(vlm, prompts))


def test_an_input_for_each_token_that_is_not_known_is_refused(prompts):
    vlm = general("llava")
    b = answered(vlm, prompts[:1])
    b.pictures.inputs[0]["depths"] = b.pictures.inputs[0]["attention_mask"]
    with pytest.raises(UserError, match="'depths' for each token"):
        vlm.hidden(b)


@torch.no_grad()
def test_a_cache_that_says_something_else_is_not_used(prompts):
    "Positions that are wrong while sampling: seen at the first answer, and done without."
    vlm = general("llava")
    prepare = vlm.model.prepare_inputs_for_generation

    def shifted(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        if inputs["input_ids"].shape[1] == 1:
            inputs["position_ids"] = inputs["position_ids"] + 7
        return inputs

    vlm.model.prepare_inputs_for_generation = shifted
    roll = sample(vlm, prompts, max_new_tokens=5, seed=1)
    assert vlm.family.cached is False
    close(logprobs(vlm, roll.batch), roll.logprobs)
    honest = general("llava")
    sample(honest, prompts, max_new_tokens=5, seed=1)
    assert honest.family.cached is True
