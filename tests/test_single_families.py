"What single families of VLMs do differently, how the register finds them, how one is added."

import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from test_families import close, logprobs, plain, vlm_of  # noqa: F401 (a fixture)
from torch.testing import assert_close

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model import families
from vlmrlhf_course.model.family import FAMILIES, Family, family_of, tiny_model, tiny_reader
from vlmrlhf_course.model.vlm import VLM, load_vlm, save_vlm
from vlmrlhf_course.rl.rollout import sample

# these processors cannot be loaded without torchvision
LOADED = [k for k in FAMILIES if k not in ("qwen2_5_vl", "internvl")]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def check_against_its_own_pass(vlm, prompts, answers):
    "Logits of a padded batch with kept features, and of the model's own pass from pixels."
    b = vlm.batch(prompts, answers)
    ours = vlm.answer_logits(b)
    for row, prompt in enumerate(prompts):
        ids = b.answers[row, b.answer_mask[row]].tolist()
        want = vlm.model(**plain(vlm, prompt, ids)).logits[0, -len(ids) - 1 : -1]
        assert want.std() > 0.05
        assert_close(ours[row, : len(ids)], want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", LOADED)
def test_save_and_load(kind, pictures, tmp_path):
    model, processor = tiny_model(kind)
    vlm = VLM(model.requires_grad_(False), processor)
    prompt = Prompt("x", "is there a boat ?", "no .", (pictures[0], pictures[2]))
    save_vlm(vlm, tmp_path / "model")
    again = load_vlm(tmp_path / "model")
    a, b = vlm.batch([prompt], ["no ."]), again.batch([prompt], ["no ."])
    assert torch.equal(a.input_ids, b.input_ids)
    assert torch.equal(vlm.answer_logits(a), again.answer_logits(b))
    assert again.banned_ids == vlm.banned_ids


@torch.no_grad()
def test_the_first_paligemma(pictures, monkeypatch):
    "Gemma 1 reads: one mask in place of two, no cap on logits."
    paligemma = type(FAMILIES["paligemma"])
    tiny = paligemma.tiny

    def older(self, words):
        config, processor = tiny(self, words)
        text = {k: getattr(config.text_config, k) for k in tiny_reader(processor.tokenizer)}
        first = type(config)(
            vision_config=config.vision_config,
            text_config=dict(model_type="gemma", head_dim=8, **text),
            projection_dim=32,
            image_token_id=config.image_token_id,
        )
        return first, processor

    monkeypatch.setattr(paligemma, "tiny", older)
    vlm = vlm_of("paligemma")
    assert vlm.language.config.model_type == "gemma"
    short = Prompt("x", "describe the picture .", "", pictures[0])
    longer = replace(short, text="describe the picture . is there a boat ?")
    check_against_its_own_pass(vlm, [short, longer], ["a red cat .", "no ."])
    roll = sample(vlm, [short, longer] * 3, max_new_tokens=4)
    close(logprobs(vlm, roll.batch), roll.logprobs)


@pytest.mark.parametrize("kind", ["llava_next", "qwen2_5_vl", "idefics3", "internvl"])
def test_pictures_of_another_size_are_another_prompt(kind, pictures, tmp_path):
    "Tokens are kept by text and size: a larger picture needs more placeholders."
    large, small = pictures[0], str(tmp_path / "small.png")
    Image.open(large).resize((24, 24)).save(small)
    vlm = vlm_of(kind)

    def placeholders(ref):
        return vlm.prompt_ids(Prompt("x", "what ?", "", ref)).count(vlm.image_token_id)

    n = [placeholders(ref) for ref in (large, small, large)]
    assert n[0] == n[2] != n[1]
    # the prompt follows the picture that is shown
    swapped = vlm.batch([Prompt("x", "what ?", "", large)], images=[small])
    assert (swapped.input_ids == vlm.image_token_id).sum() == n[1]
    vlm.hidden(swapped)


def test_one_beginning_and_none_inside(pictures):
    "Gemma's tokenizer and its template both write <bos>."
    vlm = vlm_of("gemma3")
    tok = vlm.tokenizer
    ids = vlm.batch([Prompt("x", "what ?", "", pictures[0])], ["no ."]).input_ids[0].tolist()
    assert ids[0] == tok.bos_token_id and ids.count(tok.bos_token_id) == 1
    assert ids[-1] == tok.convert_tokens_to_ids("<end_of_turn>")


def test_paligemma_needs_a_picture():
    with pytest.raises(ValueError, match="images"):
        vlm_of("paligemma").batch([Prompt("x", "what ?", "")])


# --- the register ---------------------------------------------------------------------------------


def test_an_unknown_family_is_an_error():
    "The message names what is near, what there is, and where it says how to add one."
    config = FAMILIES["llava"].tiny(["a"])[0]
    config.model_type = "llava_nextt"
    with pytest.raises(UserError, match="did you mean 'llava_next'.*93_families") as e:
        family_of(config)
    assert ", ".join(FAMILIES) in str(e.value)


def test_every_family_is_registered_under_its_models_type():
    assert len(FAMILIES) >= 7 and list(FAMILIES) == sorted(FAMILIES)
    for kind, family in FAMILIES.items():
        assert tiny_model(kind)[0].config.model_type == kind
        assert family_of(tiny_model(kind)[0].config) is family


MODULE = """
import transformers as T
from vlmrlhf_course.model.family import SQUARE, Family, chat_template, tiny_reader, tiny_tower
from vlmrlhf_course.model.family import word_tokenizer


class VipLlava(Family, kind="vipllava"):
    "ViP-LLaVA (Cai et al. 2024): the projector reads several layers of the tower, here two."

    def width(self, config):
        return 2 * config.vision_config.hidden_size

    def tiny(self, words):
        tok = word_tokenizer(words, dict(image_token="<image>"))
        config = T.VipLlavaConfig(
            vision_config=tiny_tower(model_type="clip_vision_model"),
            text_config=tiny_reader(tok, model_type="llama"),
            image_token_id=tok.image_token_id,
            vision_feature_layers=[-1, -2],
        )
        images = T.CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE)
        return config, T.LlavaProcessor(
            images,
            tok,
            patch_size=8,
            chat_template=chat_template("<image>"),
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
"""


@pytest.fixture
def drop_in(tmp_path, monkeypatch):
    "Drop a module into the folder of families, as an export of a new notebook would."
    monkeypatch.setattr(FAMILIES, "known", dict(FAMILIES))
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])

    def drop(name, text):
        monkeypatch.delitem(sys.modules, f"{families.__name__}.{name}", raising=False)
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")

    return drop


@torch.no_grad()
def test_a_module_in_the_folder_is_all_that_a_new_family_takes(drop_in, pictures):
    "Found, batched, run, sampled from, and equal to the model's own pass."
    assert "vipllava" not in FAMILIES
    drop_in("for_a_test", MODULE)
    assert "vipllava" in FAMILIES
    vlm = vlm_of("vipllava")
    assert type(vlm.family).__module__ == f"{families.__name__}.for_a_test"
    one = Prompt("x", "describe the picture .", "", pictures[0])
    two = Prompt("x", "which one ?", "", (pictures[1], pictures[2]))
    none = Prompt("x", "what colour is a boat ?", "")
    check_against_its_own_pass(vlm, [one, two, none], ["a red cat .", "no .", "blue ."])
    assert vlm.features(pictures).shape == (3, 16, 64) and vlm.vision_width == 64
    roll = sample(vlm, [one, two, none] * 2, max_new_tokens=4)
    close(logprobs(vlm, roll.batch), roll.logprobs)


def test_two_families_for_one_type_are_refused(drop_in):
    "A notebook that was copied, and kept its model's name."
    copied = MODULE.replace("VipLlava(Family", "Copied(Family").replace("vipllava", "gemma3")
    drop_in("a_copy", copied)
    with pytest.raises(ValueError, match="'gemma3'.*gemma.Gemma3 and .*a_copy.Copied"):
        list(FAMILIES)


def test_a_class_without_a_type_is_not_registered():
    class Base(Family):
        "What others build on."

    assert not any(type(f) is Base for f in FAMILIES.values())
    with pytest.raises(NotImplementedError, match="Base has no tiny model"):
        Base().tiny(["a"])
