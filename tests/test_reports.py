"""Public reports about pictures, hidden state, evaluation, folders and degenerate statistics. Those
about records, half precision and adapters stand in `test_report_records.py`,
`test_half_precision.py` and `test_border.py`."""

import base64
import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from report_models import LORA, make, pair, picture, prompts, read, refused  # noqa: F401

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.data.pairs import check_given
from vlmrlhf_course.data.prompts import (
    OPENERS,
    Opener,
    Prompt,
    open_image,
    picture_size,
    references,
)
from vlmrlhf_course.model.family import tiny_model
from vlmrlhf_course.model.vlm import answer
from vlmrlhf_course.report import evaluate
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.train.fit import FitConfig
from vlmrlhf_course.train.reward import RewardConfig, RewardModel, score_texts, train_reward
from vlmrlhf_course.world.hallucination import pope
from vlmrlhf_course.world.scenes import sample_scenes
from vlmrlhf_course.world.source import DrawnWorld

# --- transparency -----------------------------------------------------------------------------


def disc(mode="RGBA", hidden=(0, 0, 0)) -> Image.Image:
    "A black disc on a transparent ground, whose colour nobody can see."
    logo = Image.new("RGBA", (64, 64), (*hidden, 0))
    ImageDraw.Draw(logo).ellipse((16, 16, 48, 48), fill=(0, 0, 0, 255))
    return logo.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("kind", ["png", "webp", "gif", "tiff"])
def test_a_picture_is_what_a_viewer_shows(mode, kind, tmp_path):
    if (kind, mode) in (("gif", "LA"), ("gif", "P"), ("tiff", "P")):
        pytest.skip("Pillow writes no transparency there")
    seen = []
    for i, hidden in enumerate([(0, 0, 0), (250, 30, 10)]):
        path = tmp_path / f"{i}.{kind}"
        disc(mode, hidden).save(path, **(dict(lossless=True, exact=True) if kind == "webp" else {}))
        seen.append(np.asarray(open_image(str(path))).astype(int))
    assert (seen[0][0, 0] > 240).all() and (seen[0][32, 32] < 15).all()
    if mode != "P" and kind != "gif":  # palettes move the disc's colour a little
        assert (seen[0] == seen[1]).all()


def test_colours_that_stand_for_transparent(tmp_path):
    "Not a channel but one colour, as in old PNGs."
    for mode, key, other in (("RGB", (1, 2, 3), "black"), ("L", 7, 0)):
        image = Image.new(mode, (2, 1), key)
        image.putpixel((1, 0), 0 if mode == "L" else (0, 0, 0))
        image.save(tmp_path / "key.png", transparency=key)
        pixels = np.asarray(open_image(str(tmp_path / "key.png")))[0]
        assert pixels.tolist() == [[255] * 3, [0] * 3]


def test_half_transparent_and_opaque(tmp_path):
    Image.new("RGBA", (1, 1), (0, 0, 0, 51)).save(tmp_path / "a.png")
    assert open_image(str(tmp_path / "a.png")).getpixel((0, 0)) == (204,) * 3
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8))
    solid = noise.copy()
    solid.putalpha(255)
    solid.save(tmp_path / "b.png")
    assert (np.asarray(open_image(str(tmp_path / "b.png"))) == np.asarray(noise)).all()


# --- pictures in other forms ------------------------------------------------------------------


def forms(path) -> dict:
    "A picture file in every form that data sets have."
    data = open(path, "rb").read()
    text = base64.b64encode(data).decode()
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    return {
        "data URI": f"data:image/png;base64,{text}",
        "without a type": f"data:;base64,{text}",
        "capitals": f"DATA:image/png;BASE64,{text}",
        "a parameter": f"data:image/png;charset=utf-8;base64,{text}",
        "lines": f"data:image/png;base64,{wrapped}",
        "no padding": f"data:image/png;base64,{text.rstrip('=')}",
        "url-safe": f"data:image/png;base64,{base64.urlsafe_b64encode(data).decode()}",
        "bytes": {"bytes": text, "path": None},
        "bytes and a name": {"bytes": text, "path": "was/once/here.png"},
        "bytes as numbers": {"bytes": list(data), "path": None},
        "bytes of a URI": {"bytes": f"data:image/png;base64,{text}"},
        "a list": [{"bytes": text, "path": None}],
        "two": [{"bytes": text}, path],
        "only a name": {"bytes": None, "path": path},
        "a url": {"url": f"data:image/png;base64,{text}"},
        "file URI": f"file://{path}",
        "file URI with host": f"file://localhost{path}",
        "short file URI": f"file:{path}",
    }


NAMES = list(forms(__file__))


@pytest.mark.parametrize("name", NAMES)
def test_every_form_is_the_same_picture(name, pair, tmp_path):
    vlm, want = make("qwen2_5_vl"), np.asarray(open_image(pair["image"]))
    [row] = read(tmp_path, vlm, pair | dict(image=forms(pair["image"])[name]))
    refs = references(row["image"])
    for ref in refs:
        assert (np.asarray(open_image(ref)) == want).all()
        assert picture_size(ref, 96) == want.shape[1::-1], "its own size, not that of a drawing"
    hash(row["image"])  # pairs are grouped by their pictures
    prompt = Prompt("", row["prompt"], "", row["image"])
    plain = Prompt("", row["prompt"], "", (pair["image"],) * len(refs))
    assert vlm.prompt_ids(prompt) == vlm.prompt_ids(plain)
    said = [vlm.answer_logits(vlm.batch([p], ["no ."])) for p in (prompt, plain)]
    assert torch.equal(*said)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "YCbCr"])
def test_pictures_of_pillow_and_real_bytes(mode, pair):
    image = Image.new("RGB", (6, 4), "white").convert("L" if mode == "I;16" else mode)
    image = image.convert(mode) if mode != "I;16" else Image.new("I;16", (6, 4), 2**16 - 1)
    file = io.BytesIO()
    Image.new("RGB", (6, 4), "white").save(file, "PNG")
    for form in (image, [image], file.getvalue(), {"bytes": file.getvalue()}):
        [row] = check_given([pair | dict(image=form)], "train", "Mine")
        [row] = json.loads(json.dumps([row]))
        for ref in references(row["image"]):
            assert np.asarray(open_image(ref)).min() > 250 and open_image(ref).size == (6, 4)
        assert references(Prompt("", "", "", form).image) == references(row["image"])


def test_a_camera_on_its_side(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 3)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(Prompt("", "", "", Image.open(tmp_path / "a.jpg")).image).size == (3, 4)


def broken() -> dict:
    text = base64.b64encode(os.urandom(6000)).decode()
    return {
        "bare base64": text,
        "no picture": f"data:image/png;base64,{text}",
        "no base64": f"data:image/png;base64,{'!' * 5000}",
        "no comma": "data:" + "x" * 5000,
        "empty": "data:image/png;base64,",
        "bytes that are none": {"bytes": "!" * 5000},
        "program": "data:image/svg+xml;utf8,<svg>" + " " * 5000,
        "cut": f"data:image/png;base64,{base64.b64encode(open_png()[:300]).decode()}",
        "bomb": {"bytes": base64.b64encode(bomb()).decode()},
        "elsewhere": "file://server/share/a.png",
        "nowhere": "file:///no/such/picture.png",
        "network": "https://example.org/" + "a" * 3000,
        "a dictionary": {"height": 3},
        "dictionaries": [{"bytes": None, "path": None}],
        "a list of numbers": [1, 2, 3],
        "among good ones": ["blank", f"data:,{'x' * 4000}"],
    }


def open_png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((40, 40), 50).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (2**13 + 1, 2**13)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("name", broken())
def test_what_is_no_picture_is_said_in_a_line(name, pair, tmp_path):
    refused(tmp_path, None, pair, pair | dict(image=broken()[name]))
    with pytest.raises(UserError) as e:
        check_given([pair | dict(image=broken()[name])], "train", "Mine")
    assert len(str(e.value)) < 600 and "\n" not in str(e.value)


# --- hidden state -----------------------------------------------------------------------------

WISHES = dict(
    repetition_penalty=1.5,
    no_repeat_ngram_size=2,
    min_p=0.5,
    top_k=2,
    top_p=0.3,
    typical_p=0.2,
    epsilon_cutoff=0.2,
    min_new_tokens=9,
    bad_words_ids=[[9], [10], [11]],
    forced_eos_token_id=5,
    temperature=0.1,
    num_beams=3,
    do_sample=False,
    max_length=3,
    renormalize_logits=True,
    begin_suppress_tokens=[9, 10, 11, 12, 13],
)


@pytest.mark.parametrize("wish", WISHES)
def test_a_checkpoint_s_wishes_do_not_reach_answers(wish, prompts):
    a, b = make(), make()
    setattr(b.model.generation_config, wish, WISHES[wish])
    config = b.model.generation_config
    for t in (0.0, 1.0):
        said = [answer(v, prompts * 4, t, max_new_tokens=12) for v in (a, b)]
        assert said[0] == said[1]
    assert torch.equal(*(sample(v, prompts, max_new_tokens=9).logprobs for v in (a, b)))
    assert b.model.generation_config is config, "and it has its settings back"


def test_a_model_in_training_mode(prompts):
    "Dropout would make two passes of one policy differ."
    model, processor = tiny_model("llava")
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    from vlmrlhf_course.model.vlm import VLM

    vlm = VLM(model.train().requires_grad_(False), processor)
    batch = vlm.batch(prompts, ["no .", "a cat ."])
    assert torch.equal(vlm.answer_logits(batch), vlm.answer_logits(batch))


def write(path, colour, size=(40, 40)):
    Image.new("RGB", size, colour).save(path)


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_picture_that_is_written_anew(form, tmp_path):
    "Under the same name, of the same size; and of another size, so that its prompt changes."
    vlm, path = make("qwen2_5_vl"), tmp_path / "same.bmp"
    ref = form.format(path)
    seen, lengths = [], []
    for colour, size in (("blue", (40, 40)), ("red", (40, 40)), ("red", (32, 16))):
        write(path, colour, size)
        seen.append(vlm.features([ref]).clone())
        lengths.append(len(vlm.prompt_ids(Prompt("", "what ?", "", ref))))
        fresh = make("qwen2_5_vl")
        assert torch.equal(fresh.features([ref]), seen[-1])
        assert (
            vlm.answer_logits(vlm.batch([Prompt("", "what ?", "", ref)], ["no ."])).isfinite().all()
        )
    assert not torch.equal(seen[0], seen[1]) and lengths[0] == lengths[1] != lengths[2]
    encoded = vlm.encoded
    vlm.features([ref])
    assert vlm.encoded == encoded, "what has not changed is not encoded again"


def test_a_bad_picture_that_was_mended_and_a_good_one_that_broke(pair, tmp_path):
    path = tmp_path / "mine.png"
    row = pair | dict(image=str(path))
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="not a picture"):
        read(tmp_path, None, row)
    write(path, "red")
    assert len(read(tmp_path, None, row)) == 1
    path.write_bytes(b"no picture, again")
    with pytest.raises(UserError, match="not a picture"):
        read(tmp_path, None, row)


def test_an_opener_that_was_replaced(monkeypatch):
    vlm = make()
    for colour in ("red", "blue"):
        draw = Opener(str, lambda word, size, colour=colour: Image.new("RGB", (size, size), colour))
        monkeypatch.setitem(OPENERS, "mine", draw)
        want = make().features(["mine:x"])
        assert torch.equal(vlm.features(["mine:x"]), want)


# --- evaluation -------------------------------------------------------------------------------

SPELLED = [
    ("yes .", "no ."),
    ("Yes.", "No."),
    ("Yes, there is a boat.", "No, there is not."),
    (" yes", " no"),
    ("YES", "NO"),
    ("**Yes**", "**No**"),
    ("_yes_", "_no_"),
    ('"Yes"', '"No"'),
    ("Answer: yes", "Answer: no"),
    ("The answer is yes.", "The answer is no."),
    ("- yes", "- no"),
    ("yes\n", "no\n"),
    ("ＹＥＳ", "ＮＯ"),
    ("Yes!", "No!"),
    ("yes;there", "no;none"),
]


@pytest.mark.parametrize("yes, no", SPELLED)
def test_yes_and_no_however_they_are_spelled(yes, no, monkeypatch):
    replies = {"yes .": yes, "no .": no}
    monkeypatch.setattr(evaluate, "answer", lambda vlm, q, *a, **k: [replies[p.answer] for p in q])
    found = pope(None, sample_scenes(8, "test"))
    assert found["accuracy"] == found["answered"] == 1 and found["yes_rate"] == 0.5
    world = DrawnWorld()
    for q in world.quiz(list(world.prompts("test", 6, dict(detail=1.0), 0))):
        assert not world.judge(q, replies[q.answer]).false_objects
        wrong = dict(zip(replies, reversed(replies.values())))[q.answer]
        assert world.judge(q, wrong).false_objects


@pytest.mark.parametrize("reply", ["none", "nothing", "yesterday", "maybe", "", "Noah", "I know"])
def test_what_is_neither(reply):
    assert evaluate.yes_or_no(evaluate.without_preface(reply)) is None


def test_claims_however_they_are_spelled():
    world = DrawnWorld()
    for prompt in world.prompts("test", 30, dict(detail=1.0, brief=1.0), 0):
        said = prompt.answer
        want = world.judge(prompt, said)
        others = [said.upper(), said.replace(" .", "."), said.replace(" .", "!").title()]
        others.append(f"**{said.replace(' .', '.')}**")
        assert all(world.judge(prompt, other) == want for other in others)
        assert world.truth(prompt, others[1]) == world.truth(prompt, said)
    scene = prompt.image
    there = {t.noun for t in sample_scenes(1)[0].things}
    about = Prompt("detail", "describe the picture .", "", f"scene:{sample_scenes(1)[0]}")
    found = world.judge(about, ", ".join(f"{noun}s" for noun in there))
    assert scene and set(found.true_objects) == there and not found.false_objects


# --- degenerate statistics --------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layer", "batch", "tanh", "none"])
@pytest.mark.parametrize("kind", ["token", "scalar"])
@pytest.mark.parametrize("rows", [1, 2, 3], ids=["one pair", "twice the same", "one answer"])
def test_a_reward_model_of_hardly_any_pairs(norm, kind, rows, prompts, pair, tmp_path):
    "The first check that everybody makes: overfit one pair."
    pairs = [pair] * min(rows, 2)
    if rows == 3:
        pairs = [pair, pair | dict(chosen=pair["rejected"], rejected=pair["chosen"])]
    how = dict(lora=LORA, norm=norm, granularity=kind, epochs=3)
    rm = RewardModel(make(), RewardConfig(fit=FitConfig(lr=1e-3, batch=1, micro_batch=1), **how))
    train_reward(rm, pairs, rm.cfg, tmp_path / "fit")
    assert score_texts(rm, prompts, ["a red cat .", "no ."]).isfinite().all()
    logged = [json.loads(line) for line in open(tmp_path / "fit" / "metrics.jsonl")]
    assert all(np.isfinite(row["loss"]) and np.isfinite(row["spread"]) for row in logged)
