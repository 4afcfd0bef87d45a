"""Public reports about records: a pair is laid out as training will lay it out, and whatever breaks
there is that record's fault, by file and line. Tokens that are not ours; length in tokens."""

import pytest
import torch
from report_models import LORA, make, pair, picture, prompts, read, refused, shake  # noqa: F401
from torch.testing import assert_close

from vlmrlhf_course.data.pairs import check_given, load_pairs
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.family import FAMILIES
from vlmrlhf_course.report.evaluate import likelihood
from vlmrlhf_course.train.dpo import DPOConfig, DPOTask
from vlmrlhf_course.train.reward import RewardConfig, RewardModel, RewardTask
from vlmrlhf_course.train.sft import SFTTask

MARKS = {
    "gemma3": ["<start_of_image>"],
    "qwen2_5_vl": ["<|vision_start|><|image_pad|><|vision_end|>"],
    "internvl": ["<img><IMG_CONTEXT></img>"],
}


# --- marks of pictures in the question --------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_mark_where_the_picture_comes_first(kind, prompts, pair, tmp_path):
    "As LLaVA's data write it, or in the family's own way: the same prompt as without."
    vlm = make(kind)
    want = vlm.prompt_ids(prompts[0])
    for mark in ["<image>", vlm.processor.image_token, *MARKS.get(kind, [])]:
        for text in (f"{mark}\n{pair['prompt']}", f"{mark}{pair['prompt']}"):
            [row] = read(tmp_path, vlm, pair | dict(prompt=text))
            ids = vlm.prompt_ids(Prompt("", row["prompt"], "", row["image"]))
            assert ids == want, text
    assert (
        vlm.answer_logits(vlm.batch([Prompt("", text, "", pair["image"])], ["no ."]))
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_marks_say_where_pictures_belong(kind, prompts, pair, tmp_path):
    vlm = make(kind)
    both = [p.image for p in prompts]
    text = "which of <image> and <image> is the one ?"
    [row] = read(tmp_path, vlm, pair | dict(prompt=text, image=both))
    prompt = Prompt("", row["prompt"], "", row["image"])
    assert vlm.answer_logits(vlm.batch([prompt], ["no ."])).isfinite().all()
    if kind != "paligemma":  # it reads all pictures before the question
        first = vlm.prompt_ids(Prompt("", text.replace("<image>", ""), "", row["image"]))
        assert len(vlm.prompt_ids(prompt)) == len(first) and vlm.prompt_ids(prompt) != first


@pytest.mark.parametrize("kind", FAMILIES)
def test_marks_and_pictures_that_do_not_fit(kind, prompts, pair, tmp_path):
    vlm = make(kind)
    mark, both = vlm.processor.image_token, [p.image for p in prompts]
    token = vlm.tokenizer.convert_ids_to_tokens(vlm.image_token_id)  # what a mark becomes
    bad = [
        dict(prompt=f"{mark}{mark} what ?"),
        dict(prompt="<image>\n<image> what ?"),
        dict(prompt="<image> what ?", image=both),
        dict(prompt="<image> what ?", image=None),
        dict(chosen=f"a {token} ."),
        dict(rejected=f"a {token} ."),
    ]
    for change in bad:
        refused(tmp_path, vlm, pair, pair | change)


def test_a_film_is_refused(pair, tmp_path):
    line = refused(tmp_path, make("qwen2_5_vl"), pair, pair | dict(prompt="<|video_pad|> what ?"))
    assert "video_pad" in line


# --- pictures that a processor does not take --------------------------------------------------


@pytest.mark.parametrize("size", [(500, 2), (2, 500)])
def test_a_strip(size, pair, tmp_path):
    strip = picture(tmp_path, *size)
    bad = pair | dict(image=strip)
    line = refused(tmp_path, make("qwen2_5_vl"), pair, bad)
    assert "aspect ratio" in line
    several = pair | dict(image=[pair["image"], strip])
    refused(tmp_path, make("qwen2_5_vl"), pair, several)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (300, 3), (2, 2), (700, 500)])
def test_odd_sizes_are_read_or_refused(kind, size, pair, tmp_path):
    "Never an exception of a library; and what is read can be trained on."
    vlm = make(kind)
    odd = pair | dict(image=picture(tmp_path, *size))
    if len(read(tmp_path, vlm, pair, odd, skipped={})) == 1:
        refused(tmp_path, vlm, pair, odd)
    else:
        batch = vlm.batch([Prompt("", odd["prompt"], "", odd["image"])], ["no ."])
        assert vlm.answer_logits(batch).isfinite().all()


def test_any_exception_is_the_record_s(pair, tmp_path, monkeypatch):
    "Of the tokenizer, of the processor, of the template; in one line."
    vlm = make()
    for name in ("answer_ids", "prompt_ids"):
        real = getattr(vlm, name)

        def broken(x, real=real):
            if "boat" in (x if isinstance(x, str) else x.text):
                raise RuntimeError("deep\ninside " * 50)
            return real(x)

        with monkeypatch.context() as m:
            m.setattr(vlm, name, broken, raising=False)
            key = "chosen" if name == "answer_ids" else "prompt"
            good = pair | dict(rejected="a red .")
            assert "deep inside" in refused(tmp_path, vlm, good, good | {key: "a boat ."})


def test_a_family_without_text_alone(pair, tmp_path):
    "PaliGemma's processor wants a picture."
    refused(tmp_path, make("paligemma"), pair, pair | dict(image=None))


# --- tokens that are not ours -----------------------------------------------------------------


GIVEN = {
    "unknown": "a red cat and zebra .",
    "unknown, six": "a red cat and " + "zebra " * 6 + ".",
    "unknown, all": "zebras graze",
    "written-out end": "a red <eos> cat .",
    "written-out padding": "a red <pad> cat <pad> .",
    "written-out unknown": "a <unk> cat .",
    "other scripts": "一只猫坐在垫子上。",
}


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "gemma3", "idefics3"])
@pytest.mark.parametrize("said", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_losses_of_given_text_see_the_policy(kind, said, side, pair, tmp_path):
    vlm = make(kind)
    rows = read(tmp_path, vlm, pair | {side: said})
    task = DPOTask(vlm, DPOConfig(lora=LORA))
    shake(vlm, "dpo")
    loss, figures = task(task.collate([rows]))
    assert loss.isfinite() and abs(loss - 0.6931) > 1e-4
    assert figures["chosen"] != 0 and figures["rejected"] != 0
    assert all(abs(x) < 1e3 for x in figures.values())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in task.role.trained())
    rm = RewardModel(vlm, RewardConfig(lora=LORA))
    assert RewardTask(rm)(RewardTask(rm).collate([rows]))[0].isfinite()
    prompt = Prompt("", pair["prompt"], said, pair["image"])
    assert SFTTask(vlm)(SFTTask(vlm).collate([prompt]))[0].isfinite()
    with torch.no_grad():
        assert -1e3 < likelihood(vlm, [prompt], [said]) < 0


def test_what_is_sampled_stays_banned(prompts):
    vlm = make()
    batch = vlm.batch(prompts, ["a zebra .", "no ."])
    with torch.no_grad():
        logits = vlm.answer_logits(batch)
    ours, given = vlm.rule_out(logits), vlm.rule_out(logits, batch.answers)
    assert (ours.softmax(-1)[..., vlm.banned_ids] == 0).all()
    unknown = batch.answers == vlm.unk_id
    assert torch.equal(given[unknown], logits[unknown]) and unknown.sum() == 1
    real = batch.answer_mask & ~unknown
    assert torch.equal(given[real], ours[real]), "elsewhere not a digit changes"


def test_answers_that_the_model_cannot_tell_apart(pair, tmp_path):
    bad = pair | dict(chosen="a zebra .", rejected="a giraffe .")
    assert "same tokens" in refused(tmp_path, make(), pair, bad)


@pytest.mark.parametrize("key", ["prompt", "chosen", "rejected"])
def test_a_token_beyond_the_embedding(key, pair, tmp_path):
    "A tokenizer that has grown, and a model that has not."
    vlm = make()
    vlm.tokenizer.add_tokens(["giraffe"])
    bad = pair | {key: "a giraffe ."}
    assert "resize its embeddings" in refused(tmp_path, vlm, pair, bad)


@pytest.mark.parametrize("key", ["chosen", "rejected"])
def test_both_answers_are_measured_in_tokens(key, pair, tmp_path):
    vlm, word = make(), "x" * 40
    vlm.tokenizer.add_tokens([word])
    vlm.model.resize_token_embeddings(len(vlm.tokenizer), mean_resizing=False)
    most = vlm.model.config.get_text_config().max_position_embeddings
    other = dict(chosen="rejected", rejected="chosen")[key]
    bad = pair | {key: "a " * most + ".", other: f"{word} " * 60 + "."}
    assert len(bad[key]) < len(bad[other])
    assert f"at most {most}" in refused(tmp_path, vlm, pair, bad)


def test_the_longest_that_is_read(pair, tmp_path):
    "To the token: EOS counts, and special tokens of a tokenizer do not."
    vlm = make()
    most = vlm.model.config.get_text_config().max_position_embeddings
    asked = len(vlm.prompt_ids(Prompt("", pair["prompt"], "", pair["image"])))
    fits = pair | dict(chosen="a " * (most - asked - 1))
    assert len(read(tmp_path, vlm, fits)) == 1
    refused(tmp_path, vlm, pair, pair | dict(chosen="a " * (most - asked)))
    batch = vlm.batch([Prompt("", pair["prompt"], "", pair["image"])], [fits["chosen"]])
    assert batch.input_ids.shape[1] == most and vlm.answer_logits(batch).isfinite().all()


def test_a_tokenizer_that_pads_or_cuts_by_itself(prompts):
    "What its file asks for does not reach an answer."
    vlm = make()
    want = vlm.answer_ids("a red cat .")
    vlm.tokenizer.backend_tokenizer.enable_padding(length=9)
    vlm.tokenizer.backend_tokenizer.enable_truncation(2)
    assert vlm.answer_ids("a red cat .") == want


# --- endings ----------------------------------------------------------------------------------

COMPLETE = """yes|B|42|The sign says "stop."|a cat (on a mat.)|一只猫坐在垫子上。|Un chat…|- a cat
- a boat|यह एक बिल्ली है।|Yes!|3.5 kg|{"box": [1, 2]}|**cat**|“Stop”|¿un gato?|هل هذه قطة؟|猫"""


@pytest.mark.parametrize("said", COMPLETE.split("|"))
def test_complete_answers_of_other_people(said, pair, tmp_path):
    row = pair | dict(chosen=said)
    assert read(tmp_path, None, row) == [row] == check_given([row], "train", "Mine")
    swapped = pair | dict(rejected=said)
    assert load_pairs(tmp_path / "pairs.jsonl") and read(tmp_path, None, swapped) == [swapped]


def test_the_same_pair_gives_the_same_digits(pair):
    "DPO's figures where no given token is banned: as with the ban everywhere."
    vlm = make()
    task = DPOTask(vlm, DPOConfig(lora=LORA))
    shake(vlm, "dpo")
    batch, *_ = task.collate([[pair]])
    with torch.no_grad():
        banned = vlm.rule_out(vlm.answer_logits(batch, "dpo")).log_softmax(-1)
        said = banned.gather(-1, batch.answers.unsqueeze(-1)).squeeze(-1)
        want = torch.where(batch.answer_mask, said, 0).sum(1)
        assert_close(task.logprobs(batch, "dpo"), want, atol=0, rtol=0)
