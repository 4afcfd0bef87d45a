"""A corpus of bad inputs. Each ends with status 2 and one line that names file, record and remedy; nothing is computed, nothing lost.

The tables say what goes in and which words must come out."""
import io
import json
import os
import re
import shutil
import struct
import zlib

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from vlmrlhf_course.base import files
from vlmrlhf_course.train import sft
from vlmrlhf_course.cli import main
from vlmrlhf_course.data.preferences import load_pairs
from vlmrlhf_course.train.reward import group_pairs, swap_pictures
from vlmrlhf_course.base.runs import UserError, read_jsonl, write_jsonl
from vlmrlhf_course.model.vlm import load_vlm, save_vlm
from vlmrlhf_course.world.scenes import Prompt, WorldConfig, open_image, sample_scenes


def refused(capsys, *argv):
    "Run a command that must be refused: status 2, one line on stderr, nothing on stdout. Returns the line."
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("vlmrlhf: ") and out == "", (lines, out)
    return lines[0]


def tree(folder): return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# --- the command line and the settings ------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, words", [
    ([], ["required", "verb", "--help"]),
    (["rum"], ["'rum'", "choose from", "run"]),
    (["ppo", "--arm", "god"], ["'god'", "gold"]),
    (["run", "--seed", "x"], ["--seed", "'x'", "whole number"]),
    (["run", "--seed", "-1"], ["--seed", "'-1'"]),
    (["run", "--seed", "99999999999999999999"], ["--seed", "2147483647"]),
    (["run", "--threads", "0"], ["--threads", "'0'", "from 1"]),
    (["run", "--threads", "two"], ["--threads", "'two'"]),
    (["run", "--seeds", "0"], ["--seeds", "'0'"]),
    (["run", "--seeds", "2.5"], ["--seeds", "'2.5'"]),
    (["run", "--fast"], ["--fast"]),
    (["sft", "--resume"], ["--resume"]),
    (["run", "--scale", "smok"], ["'smok'", "did you mean 'smoke'"]),
    (["run", "--scale", "no/such.yaml"], ["no/such.yaml"]),
    (["run", "--scale", "smoke", "--set"], ["--set"]),
    (["run", "--scale", "smoke", "--out", ""], ["--out"]),
    (["sft", "--scale", "smoke", "--out", "odd\udcffname"], ["--out", "no UTF-8"]),
    (["run", "--resume", "--scale", "smoke", "--out", "nowhere"], ["nowhere", "no run to resume", "leave out --resume"]),
    (["run", "--resume", "--scale", "smoke", "--seeds", "2", "--out", "nowhere"], ["nowhere", "no run to resume"])])
def test_command_line(capsys, tmp_path, argv, words):
    line = refused(capsys, *argv)
    assert all(w in line for w in words), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, words", [
    ("ppo.clip=1", ["ppo", "clip=1", "(0, 1)"]),
    ("ppo.clip=0", ["clip=0", "(0, 1)"]),
    ("ppo.clip=nan", ["clip=nan", "(0, 1)"]),
    ("ppo.value_clip=-1", ["value_clip=-1"]),
    ("ppo.temperature=0", ["temperature=0", "(0, inf)"]),
    ("ppo.temperature=-0.5", ["temperature=-0.5"]),
    ("ppo.gamma=1.5", ["gamma=1.5", "(0, 1]"]),
    ("ppo.lam=1.01", ["lam=1.01", "[0, 1]"]),
    ("ppo.lam=-0.1", ["lam=-0.1"]),
    ("ppo.iterations=0", ["iterations=0", "[1, inf)"]),
    ("ppo.iterations=-5", ["iterations=-5"]),
    ("ppo.answers=0", ["answers=0"]),
    ("ppo.minibatch=0", ["minibatch=0"]),
    ("ppo.micro_batch=-1", ["micro_batch=-1"]),
    ("ppo.epochs=0", ["epochs=0"]),
    ("ppo.max_new_tokens=0", ["max_new_tokens=0"]),
    ("ppo.warmup=1.1", ["warmup=1.1", "[0, 1]"]),
    ("ppo.finish=-0.1", ["finish=-0.1"]),
    ("ppo.kl_target=0", ["kl_target=0", "(0, inf)"]),
    ("ppo.kl_target=-1", ["kl_target=-1"]),
    ("ppo.kl_emergency=0", ["kl_emergency=0"]),
    ("ppo.beta=-0.1", ["beta=-0.1"]),
    ("ppo.actor_lr=-1e-3", ["actor_lr=-0.001"]),
    ("ppo.actor_lr=inf", ["actor_lr=inf"]),
    ("ppo.grad_clip=0", ["grad_clip=0"]),
    ("ppo.no_eos=nan", ["no_eos=nan"]),
    ("ppo.save_every=0", ["save_every=0"]),
    ("gold.eval_every=0", ["gold", "eval_every=0"]),
    ("ppo.answers=5000", ["5000", "pool"]),
    ("ppo.kinds={}", ["ppo.kinds is empty"]),
    ("ppo.kinds.poem=1", ["kinds.poem", "give some of detail"]),
    ("ppo.kinds.breif=1", ["did you mean 'brief'"]),
    ("ppo.kinds.text=1", ["kinds.text"]),
    ("ppo.kinds.detail=-1", ["kinds.detail=-1"]),
    ("ppo.kinds=[detail]", ["ppo"]),
    ("ppo.penalty.weight=-1", ["weight=-1"]),
    ("ppo.penalty.object=2", ["object=2", "(-inf, 0]"]),
    ("ppo.lora.r=-1", ["r=-1"]),
    ("ppo.lora.dropout=1", ["dropout=1", "[0, 1)"]),
    ("ppo.reward=rn", ["reward='rn'", "did you mean 'rm'"]),
    ("ppo.reward_model=rewrad", ["rewrad"]),
    ("sft.pictures=0", ["pictures=0"]),
    ("sft.language.steps=-1", ["sft", "steps=-1", "[1, inf)"]),
    ("sft.language.batch=0", ["batch=0"]),
    ("sft.projector.warmup=2", ["warmup=2"]),
    ("sft.projector.clip=0", ["clip=0"]),
    ("sft.projector.lr=nan", ["lr=nan"]),
    ("sft.language.weight_decay=-1", ["weight_decay=-1"]),
    ("sft.language.save_every=0", ["save_every=0"]),
    ("sft.kinds.detail=inf", ["kinds.detail=inf"]),
    ("preferences.prompts=0", ["prompts=0"]),
    ("preferences.temperatures=[]", ["temperatures"]),
    ("preferences.temperatures=[1.0]", ["a pair needs two"]),
    ("preferences.temperatures=[1.0,-1.0]", ["temperatures=-1"]),
    ("preferences.annotators=1", ["annotators=1", "[2, inf)"]),
    ("preferences.noise=-1", ["noise=-1"]),
    ("preferences.max_similarity=2", ["max_similarity=2"]),
    ("reward.epochs=0", ["epochs=0"]),
    ("reward.margin=-1", ["margin=-1"]),
    ("reward.prompts=-3", ["prompts=-3"]),
    ("reward.pooling=lst", ["did you mean 'last'"]),
    ("evaluate.scenes=1", ["scenes=1", "[2, inf)"]),
    ("evaluate.best_of=0", ["best_of=0"]),
    ("world.pair=1.5", ["pair=1.5", "[0, 1]"]),
    ("world.min_groups=4", ["min_groups=4"]),
    ("world.max_groups=8", ["max_groups=8", "count to nine"]),
    ("world.omit=nan", ["omit=nan"]),
    ("ppo=3", ["--set ppo=3", "section.key=value"]),
    ("ppo.clip", ["section.key=value"]),
    ("ppo.clip=", ["ppo"]),
    ("ppo.clip=wide", ["ppo", "wide"]),
    ("ppo.clpi=.1", ["ppo.clpi", "did you mean 'clip'"]),
    ("pppo.clip=.1", ["'pppo'", "did you mean 'ppo'"]),
    ("ppo.lora=3", ["ppo"]),
    ("sft.projector=[]", ["--set", "sft.projector"]),
    ("sft.language=[1,[2,3]]", ["--set", "sft.language"]),
    ("ppo.penalty.count_power=1e4", ["count_power=10000"]),
    ("ppo.iterations=2.5", ["ppo", "2.5"])])
def test_settings(capsys, tmp_path, change, words):
    line = refused(capsys, "sft", "--scale", "smoke", "--out", tmp_path / "out", "--set", change)
    assert all(w in line for w in words), line
    assert not (tmp_path / "out").exists(), "something was written before the settings were checked"


@pytest.mark.parametrize("text, words", [
    (b"ppo: {clip: [\n", ["mine.yaml"]), (b"- ppo\n", ["mine.yaml"]), (b"ppo: 3\n", ["mine.yaml", "ppo"]), (b"\xff\xfe", ["mine.yaml"]), (b"3\n", ["mine.yaml"]),
    (b"ppo: {clip: 7}\n", ["clip=7"])])
def test_scale_file(capsys, tmp_path, text, words):
    (tmp_path / "mine.yaml").write_bytes(text)
    line = refused(capsys, "run", "--scale", tmp_path / "mine.yaml", "--out", tmp_path / "out")
    assert all(w in line for w in words) and not (tmp_path / "out").exists(), line


@pytest.mark.parametrize("text, words", [
    (b"[course\n", ["settings.ini"]), (b"[course]\nsacle = tiny\n", ["did you mean 'scale'"]), (b"[course]\nseed = x\n", ["seed", "whole number"]),
    (b"[course]\nseed = -4\n", ["seed=-4"]), (b"[corse]\nseed = 1\n", ["corse"]), (b"[course]\nscale = smok\n", ["did you mean 'smoke'"]),
    (b"[course]\nseed = 1\nseed = 2\n", ["settings.ini", "seed"]), (b"\xff\xfe[course]", ["settings.ini"])])
def test_settings_file(capsys, tmp_path, text, words):
    (tmp_path / "settings.ini").write_bytes(text)
    line = refused(capsys, "run", "--out", "out")
    assert all(w in line for w in words) and not (tmp_path / "out").exists(), line


def test_more_scenes_than_there_are():
    "A wish that cannot be fulfilled is refused, not searched for ever."
    few = WorldConfig(min_groups=1, max_groups=1, pair=0.)
    with pytest.raises(UserError, match="scenes of split 'test' wanted"): sample_scenes(2000, "test", 0, few)
    with pytest.raises(UserError, match="'tset'"): sample_scenes(1, "tset")


# --- pictures -------------------------------------------------------------------------------------------------------

def png(width, height, data=b""):
    "A PNG file of our own making, which may lie."
    def chunk(name, body): return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b""))


def encoded(image, kind, **settings):
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


NOISE = Image.effect_noise((64, 64), 50).convert("RGB")
BAD_PICTURES = {
    "empty.png": b"", "text.png": b"hello", "zero.png": png(0, 0), "zero-wide.png": png(0, 5), "bomb.png": png(60_000, 60_000, b"0" * 100),
    "cut.png": encoded(NOISE, "PNG")[:600], "cut.jpg": encoded(NOISE, "JPEG")[:600], "header-only.png": encoded(NOISE, "PNG")[:40],
    "damaged.png": encoded(NOISE, "PNG")[:200] + b"x" * 60 + encoded(NOISE, "PNG")[260:], "cut.gif": encoded(NOISE, "GIF")[:100]}
GOOD_PICTURES = {   # bytes, and the colour that must come out
    "cmyk.jpg": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    "animated.gif": (encoded(Image.new("RGB", (8, 8), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")]), (255, 0, 0)),
    "grey.png": (encoded(Image.new("L", (8, 8), 99), "PNG"), (99, 99, 99)),
    "black-and-white.png": (encoded(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255)),
    "palette.png": (encoded(Image.new("RGB", (8, 8), "red").convert("P"), "PNG"), (255, 0, 0)),
    "transparent.png": (encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 128)), "PNG"), (255, 0, 0)),
    **{f"16-bit-{v}.png": (encoded(Image.new("I;16", (8, 8), 257 * v), "PNG"), (v, v, v)) for v in (0, 50, 200, 255)},
    "16-bit.tiff": (encoded(Image.new("I;16B", (8, 8), 257 * 99), "TIFF"), (99, 99, 99)),
    "16-bit.pgm": (encoded(Image.new("I", (8, 8), 257 * 99), "PPM"), (99, 99, 99))}


@pytest.mark.parametrize("name", [*BAD_PICTURES, "missing.png", "folder", "nul\0.png", "http://example.org/cat.png", "scene:moon: small red cat @4",
                                  "scene:beach: small red cat @9", "scene:beach: small red dragon @4"])
def test_bad_picture(tmp_path, name):
    (tmp_path / "folder").mkdir()
    ref = name if ":" in name else str(tmp_path / name)
    if name in BAD_PICTURES: (tmp_path / name).write_bytes(BAD_PICTURES[name])
    with pytest.raises(UserError) as e: open_image(ref)
    assert str(e.value).startswith(f"{ref}: not a picture") and "give a picture file" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", GOOD_PICTURES)
def test_unusual_picture_is_simply_read(tmp_path, name):
    data, colour = GOOD_PICTURES[name]
    (tmp_path / name).write_bytes(data)
    image = open_image(str(tmp_path / name))
    assert image.mode == "RGB" and image.size == (8, 8) and all(abs(a - b) < 4 for a, b in zip(image.getpixel((3, 3)), colour))


@pytest.mark.parametrize("orientation, corner", [*enumerate([(0, 0), (1, 0), (1, 1), (0, 1)] * 2, 1)])
def test_pictures_stand_upright(tmp_path, orientation, corner):
    "Cameras write pictures as the sensor lay. Where the first stored pixel belongs, and whether rows are columns: EXIF 2.3, tag 274."
    stored, exif = Image.new("RGB", (6, 4), "blue"), Image.Exif()
    stored.putpixel((0, 0), (255, 0, 0))
    exif[274] = orientation
    stored.save(tmp_path / "camera.png", exif=exif)
    image = open_image(str(tmp_path / "camera.png"))
    assert image.size == ((6, 4) if orientation < 5 else (4, 6))
    assert image.getpixel((corner[0] * (image.width - 1), corner[1] * (image.height - 1))) == (255, 0, 0)


# --- preference data ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run_with_pairs(smoke_run, tmp_path_factory):
    "A run that has got as far as its pairs, and the pairs' lines."
    folder = tmp_path_factory.mktemp("pairs") / "run"
    for stage in ("sft", "preferences"): shutil.copytree(smoke_run / stage, folder / stage)
    return folder, (folder / "preferences" / "train.jsonl").read_text().splitlines()


def change(**values): return lambda line: json.dumps(json.loads(line) | values)
def without(key): return lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != key})


BAD_RECORDS = {
    "cut": (lambda line: line[:-9], ["not JSON"]), "no object": (lambda line: "[1, 2]", ["no 'image'"]), "no value": (lambda line: '{"image": }', ["not JSON"]),
    "two on a line": (lambda line: line + line, ["not JSON"]), "deep": (lambda line: "[" * 100_000, ["not JSON"]),
    "no image": (without("image"), ["no 'image'"]), "no prompt": (without("prompt"), ["no 'prompt'"]), "no chosen": (without("chosen"), ["no 'chosen'"]),
    "no rejected": (without("rejected"), ["no 'rejected'"]),
    "chosen a number": (change(chosen=3), ["chosen is not text"]), "chosen null": (change(chosen=None), ["chosen is not text"]),
    "rejected a list": (change(rejected=["a cat ."]), ["rejected is not text"]), "prompt a number": (change(prompt=1), ["prompt is not text"]),
    "image a number": (change(image=7), ["image is neither"]), "image empty": (change(image=""), ["image is neither"]),
    "images none": (change(image=[]), ["image is neither"]), "images with a number": (change(image=["blank", 7]), ["image is neither"]),
    "images with a gap": (change(image=["blank", None]), ["image is neither"]), "images in images": (change(image=[["blank"]]), ["image is neither"]),
    "images, one missing": (change(image=["blank", "/no/such/picture.png"]), ["/no/such/picture.png", "No such file"]),
    "equal": (change(chosen="a cat .", rejected="a  cat ."), ["chosen equals rejected"]), "empty": (change(rejected=" "), ["empty answer"]),
    "cut off": (change(chosen="a small red"), ["chosen is cut off"]),
    "weight nan": (change(weight=float("nan")), ["weight is not a finite number"]), "weight inf": (change(weight=float("inf")), ["weight is not a finite number"]),
    "weight huge": (lambda line: re.sub(r'"weight": [^,}]+', '"weight": 1e999', line), ["weight is not a finite number"]),
    "weight text": (change(weight="much"), ["weight is not a finite number"]), "weight negative": (change(weight=-1), ["weight is not positive"]),
    "weight zero": (change(weight=0), ["weight is not positive"]),
    "long prompt": (change(prompt="red " * 10_000), ["tokens", "at most 512", "shorten"]), "long answer": (change(chosen="red " * 600 + "."), ["tokens", "at most 512"]),
    "no such picture": (change(image="/no/such/picture.png"), ["/no/such/picture.png", "No such file"]),
    "folder": (change(image="/tmp"), ["/tmp", "directory"]),
    "bad scene": (change(image="scene:moon: small red cat @4"), ["scene:moon", "unknown place"]),
    **{f"picture {name}": (name, [name, "not a picture"]) for name in ("cut.png", "bomb.png", "zero.png", "damaged.png", "empty.png")}}


class TestRecords:
    @pytest.mark.parametrize("name", BAD_RECORDS)
    def test_names_file_line_and_remedy(self, capsys, run_with_pairs, tmp_path, name):
        (folder, lines), (spoil, words) = run_with_pairs, BAD_RECORDS[name]
        if isinstance(spoil, str):
            (tmp_path / spoil).write_bytes(BAD_PICTURES[spoil])
            spoil = change(image=str(tmp_path / spoil))
        file = folder / "preferences" / "train.jsonl"
        file.write_text("\n".join([*lines[:2], spoil(lines[2]), *lines[3:], ""]))
        before = tree(folder)
        line = refused(capsys, "reward", "--scale", "smoke", "--out", folder)
        assert f"{file}, line 3: " in line and "mend or delete the line" in line and "--skip-bad" in line and all(w in line for w in words), line
        after = tree(folder)
        assert {k: after[k] for k in before} == before and "reward/done.json" not in after

    @pytest.mark.parametrize("data, words", [(b"\xff\xfe\x00", ["not UTF-8"]), (b"", ["no pairs"]), (None, ["no such file"])])
    def test_whole_file(self, capsys, run_with_pairs, data, words):
        folder, _ = run_with_pairs
        file = folder / "preferences" / "train.jsonl"
        if data is None: file.unlink()
        else: file.write_bytes(data)
        line = refused(capsys, "reward", "--scale", "smoke", "--out", folder)
        assert str(file) in line and all(w in line for w in words), line

    def test_what_editors_do_is_harmless(self, tmp_path, run_with_pairs):
        "A byte-order mark, empty lines, Windows line ends, rare separators inside strings."
        rows = [json.loads(line) for line in run_with_pairs[1][:3]]
        rows[0]["note"] = "one\u2028two"
        text = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\r\n\r\n"
        (tmp_path / "pairs.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert load_pairs(tmp_path / "pairs.jsonl") == rows

    def test_unusual_pictures_are_learned_from(self, vlm, tmp_path):
        for name, (data, _) in GOOD_PICTURES.items(): (tmp_path / name).write_bytes(data)
        rows = [dict(image=str(tmp_path / name), prompt="describe the picture .", chosen="a red cat .", rejected="a blue cat .") for name in GOOD_PICTURES]
        write_jsonl(tmp_path / "pairs.jsonl", rows)
        assert load_pairs(tmp_path / "pairs.jsonl", vlm) == rows
        assert vlm.features([r["image"] for r in rows]).isfinite().all()


    def test_several_pictures(self, vlm, tmp_path):
        "A list in the file is a tuple in the pair, so that pairs can be grouped by their pictures."
        row = dict(image=["blank", "scene:beach: small red cat @4"], prompt="describe the picture .", chosen="a red cat .", rejected="a blue cat .")
        write_jsonl(tmp_path / "pairs.jsonl", [row, row | dict(rejected="a cup ."), row | dict(image=row["image"][::-1]), row | dict(image=None)])
        rows = load_pairs(tmp_path / "pairs.jsonl", vlm)
        assert [r["image"] for r in rows] == [tuple(row["image"])] * 2 + [tuple(row["image"][::-1]), None]
        assert list(map(len, group_pairs(rows))) == [2, 1, 1] and swap_pictures(rows)[0]["image"] == rows[2]["image"]
        assert vlm.batch([Prompt("", r["prompt"], "", r["image"]) for r in rows]).pictures.counts.tolist() == [2, 2, 2, 0]


class TestSkipBad:
    def test_good_records_are_kept_and_bad_ones_counted(self, capsys, run_with_pairs, tmp_path):
        "Three bad records among the good: the reward model is, bit for bit, the one that the good ones alone give."
        folder, lines = run_with_pairs
        bad = [lines[0][:-9], change(weight=float("nan"))(lines[1]), change(image="/no/such/picture.png")(lines[2])]
        good = "\n".join(lines)
        for name, text in (("good", good), ("mixed", "\n".join([bad[0], *lines[:5], bad[1], bad[2], *lines[5:]]))):
            shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("reward"))
            (tmp_path / name / "preferences" / "train.jsonl").write_text(text)
        assert main(["reward", "--scale", "smoke", "--out", str(tmp_path / "good")]) == 0
        capsys.readouterr()
        assert main(["reward", "--scale", "smoke", "--out", str(tmp_path / "mixed"), "--skip-bad"]) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        file = tmp_path / "mixed" / "preferences" / "train.jsonl"
        assert len(said) == 1 and f"skipped 3 of {len(lines) + 3} records; {file}, line 1: not JSON" in said[0], said
        done = json.loads((tmp_path / "mixed" / "reward" / "done.json").read_text())
        assert done["skipped"]["records"] == 3 and "line 1: not JSON" in done["skipped"]["first"]
        a, b = (tmp_path / name / "reward" / "reward.safetensors" for name in ("good", "mixed"))
        assert a.read_bytes() == b.read_bytes()
        assert "skipped" not in json.loads((tmp_path / "good" / "reward" / "done.json").read_text())

    def test_nothing_good_is_left(self, capsys, run_with_pairs, tmp_path):
        folder, lines = run_with_pairs
        file = folder / "preferences" / "train.jsonl"
        file.write_text("\n".join(line[:-9] for line in lines))
        line = refused(capsys, "reward", "--scale", "smoke", "--out", folder, "--skip-bad")
        assert f"{file}, line 1: not JSON" in line and "no other record is good" in line

    def test_only_pairs_are_skipped(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"stap": 1}\n')
        with pytest.raises(UserError, match="line 2") as e: read_jsonl(tmp_path / "metrics.jsonl", ("step",))
        assert "--skip-bad" not in str(e.value)


# --- models ---------------------------------------------------------------------------------------------------------

def edit_json(file, **values): file.write_text(json.dumps(json.loads(file.read_text()) | values))
def edit_record(file, **values):
    "Change a stage's record, and renew the sum in it."
    record = json.loads(file.read_text()) | values
    file.write_text(json.dumps(record | dict(sum=files.sum_of(record))))


def edit_weights(file, edit):
    with safe_open(file, "pt") as f: header = f.metadata()
    save_file(edit(load_file(file)), file, metadata=header)


def text_only(folder):
    shutil.rmtree(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(folder)


def no_image_token(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"<image>": 3', '"<picture>": 999').replace('"id": 3,', '"id": 999,'))


BAD_MODELS = {
    "config empty": (lambda f: (f / "config.json").write_text("{}"), []), "config no JSON": (lambda f: (f / "config.json").write_text("{"), []),
    "config empty file": (lambda f: (f / "config.json").write_text(""), []), "text only": (text_only, []),
    "config of something unknown": (lambda f: edit_json(f / "config.json", model_type="perceptron"), ["perceptron"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), []),
    "weights cut": (lambda f: os.truncate(f / "model.safetensors", 1000), []), "weights empty": (lambda f: os.truncate(f / "model.safetensors", 0), []),
    "weights text": (lambda f: (f / "model.safetensors").write_text("hello"), []),
    "weights missing": (lambda f: edit_weights(f / "model.safetensors", lambda w: {k: v for k, v in w.items() if "lm_head" not in k}), ["lm_head", "missing"]),
    "weights of another size": (lambda f: edit_weights(f / "model.safetensors", lambda w: {k: v[:3].clone() if "lm_head" in k else v for k, v in w.items()}), []),
    "weights NaN": (lambda f: edit_weights(f / "model.safetensors", lambda w: {k: v * float("nan") if "lm_head" in k else v for k, v in w.items()}), ["lm_head", "not finite"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["processor"]), "tokenizer cut": (lambda f: os.truncate(f / "tokenizer.json", 100), ["processor"]),
    "no processor": (lambda f: (f / "processor_config.json").unlink(), ["processor"]), "no image token": (no_image_token, ["image"])}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, _base):
    "A whole model."
    folder = tmp_path_factory.mktemp("model") / "good"
    save_vlm(_base, folder)
    return folder


class TestModels:
    @pytest.mark.parametrize("name", BAD_MODELS)
    def test_is_no_whole_vlm(self, capsys, saved, tmp_path, name):
        spoil, words = BAD_MODELS[name]
        shutil.copytree(saved, tmp_path / "model")
        load_vlm(tmp_path / "model")
        spoil(tmp_path / "model")
        capsys.readouterr()
        with pytest.raises(UserError) as e: load_vlm(tmp_path / "model")
        assert str(e.value).startswith(str(tmp_path / "model")) and "\n" not in str(e.value) and ("give" in str(e.value) or "take" in str(e.value)), e.value
        assert all(w in str(e.value) for w in words), e.value

    @pytest.mark.parametrize("path", ["", "nowhere", "file"])
    def test_is_no_folder(self, tmp_path, path):
        (tmp_path / "file").write_text("")
        with pytest.raises(FileNotFoundError, match="config.json"): load_vlm(tmp_path / path)

    @pytest.mark.parametrize("part", ["tower", "language"])
    @pytest.mark.parametrize("spoil, words", [
        (lambda f: os.truncate(f, 1000), "cannot be read"), (lambda f: edit_weights(f, lambda w: dict(list(w.items())[1:])), "is missing"),
        (lambda f: edit_weights(f, lambda w: {k: v * float("nan") for k, v in w.items()}), "is not finite")])
    def test_pretrained_parts(self, capsys, tmp_path, monkeypatch, part, spoil, words):
        "The package's own weights, damaged: one line, before anything is trained."
        shutil.copytree(sft.files("vlmrlhf_course") / "pretrained", tmp_path / "pretrained")
        spoil(tmp_path / "pretrained" / part / "model.safetensors")
        monkeypatch.setattr(sft, "files", lambda package: tmp_path)
        line = refused(capsys, "sft", "--scale", "smoke", "--out", tmp_path / "run")
        assert f"{tmp_path / 'pretrained' / part}: " in line and words in line, line

    def test_in_a_run(self, capsys, smoke_run, tmp_path):
        shutil.copytree(smoke_run / "sft", tmp_path / "run" / "sft")
        file = tmp_path / "run" / "sft" / "language" / "model.safetensors"
        size = file.stat().st_size
        os.truncate(file, 1000)
        line = refused(capsys, "preferences", "--scale", "smoke", "--out", tmp_path / "run")
        assert f"{file.parent.parent}: language: {file.name} has 1000 bytes instead of {size}" in line and "put the file back, or delete" in line


# --- folders and records of a run -----------------------------------------------------------------------------------

class TestFolders:
    @pytest.mark.parametrize("verb", ["run", "sft"])
    def test_out_is_a_file(self, capsys, tmp_path, verb):
        (tmp_path / "file").write_text("mine")
        assert str(tmp_path / "file") in refused(capsys, verb, "--scale", "smoke", "--out", tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"

    def test_out_cannot_be_written(self, capsys, tmp_path):
        folder = tmp_path / "locked"
        folder.mkdir()
        folder.chmod(0o500)
        if os.access(folder, os.W_OK): folder = "/proc/nowhere"   # root may write everywhere but here
        assert f"{folder}" in (line := refused(capsys, "run", "--scale", "smoke", "--out", folder)) and "--out" in line

    def test_stage_folder_is_a_file(self, capsys, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "sft").write_text("mine")
        assert str(tmp_path / "run" / "sft") in refused(capsys, "sft", "--scale", "smoke", "--out", tmp_path / "run")

    @pytest.mark.parametrize("record", ["done.json", "begun.json"])
    @pytest.mark.parametrize("text, words", [("{", ["cannot be read"]), ("", ["cannot be read"]), ("[]", ["not the record"]), ("{}", ["not the record"]),
                                             ('{"uses": 3}', ["not the record"]), ('{"uses": {"seed": 0}}', ["other settings"]), ("\0", ["cannot be read"])])
    def test_foreign_record(self, capsys, tmp_path, record, text, words):
        file = tmp_path / "run" / "sft" / record
        file.parent.mkdir(parents=True)
        file.write_text(text)
        line = refused(capsys, "sft", "--scale", "smoke", "--out", tmp_path / "run")
        assert str(file.parent) in line and "delete" in line and all(w in line for w in words), line
        assert file.read_text() == text

    def test_begun_with_other_settings(self, capsys, tmp_path, monkeypatch):
        "A stage that was stopped is not continued with other settings: its checkpoints belong to the old ones."
        def stop(*a, **k): raise KeyboardInterrupt
        monkeypatch.setattr(sft, "train_sft", stop)
        argv = ["sft", "--scale", "smoke", "--out", str(tmp_path / "run")]
        assert main(argv) == 130
        line = refused(capsys, *argv, "--set", "sft.language.lr=0.5")
        assert "sft.language" in line and "other settings" in line and "--out" in line
        assert main(argv) == 130, "and with its own it goes on"


@pytest.fixture(scope="module")
def spoiled(smoke_run, tmp_path_factory):
    "A finished run, to be damaged and mended."
    folder = tmp_path_factory.mktemp("spoiled") / "run"
    shutil.copytree(smoke_run, folder)
    return folder


# A file of a stage, what becomes of it, the verb that finds it, and what that says where somebody has renewed the seal.
DAMAGE = [
    ("hacked/metrics.jsonl", lambda f: f.write_text('{"step": 0\n{"step": 1}\n'), "evaluate", ["line 1", "not JSON"]),
    ("hacked/metrics.jsonl", lambda f: f.write_text('{"step": 0}\n'), "evaluate", ["line 1", "no 'kl'"]),
    ("ppo/metrics.jsonl", lambda f: f.unlink(), "evaluate", ["is missing"]),
    ("reward/reward.safetensors", lambda f: os.truncate(f, 1000), "evaluate", ["cannot be read"]),
    ("reward/reward.safetensors", lambda f: f.unlink(), "evaluate", ["is missing"]),
    ("reward/reward.safetensors", lambda f: edit_weights(f, lambda w: {k: v * float("nan") for k, v in w.items()}), "ppo", ["not finite"]),
    ("reward/reward.safetensors", lambda f: edit_weights(f, lambda w: {k: v for k, v in w.items() if "head" not in k}), "ppo", ["cannot be read"]),
    ("ppo/actor.safetensors", lambda f: edit_weights(f, lambda w: dict(list(w.items())[1:])), "ppo", ["do not fit"]),
    ("ppo/actor.safetensors", lambda f: edit_weights(f, lambda w: {k: v[:1].clone() for k, v in w.items()}), "ppo", ["cannot be read"]),
    ("ppo/actor.safetensors", lambda f: f.write_bytes(b""), "ppo", ["cannot be read"])]


class TestDamagedRun:
    def refused(self, capsys, smoke_run, spoiled, file, verb, words):
        "The line names the place and every word; then all is mended."
        line = refused(capsys, verb, "--scale", "smoke", "--out", spoiled)
        at = spoiled / file
        assert all(w in line for w in words) and (str(at) in line or str(at.parent) in line) and "delete" in line, line
        for name in {file, f"{at.parent.name}/done.json"} if at.parent != spoiled else {file}: shutil.copy(smoke_run / name, spoiled / name)

    @pytest.mark.parametrize("file, spoil, verb, words", DAMAGE)
    def test_by_its_seal(self, capsys, smoke_run, spoiled, file, spoil, verb, words):
        spoil(spoiled / file)
        stage, name = file.split("/")
        self.refused(capsys, smoke_run, spoiled, file, verb, [name, f"put the file back, or delete {spoiled / stage}"])

    @pytest.mark.parametrize("file, spoil, verb, words", DAMAGE)
    def test_by_what_is_in_it(self, capsys, smoke_run, spoiled, file, spoil, verb, words):
        "Whoever changes a file can change its seal."
        spoil(at := spoiled / file)
        if at.is_file():
            record = at.with_name("done.json")
            edit_record(record, files=json.loads(record.read_text())["files"] | {at.name: files.digest(at)})
        self.refused(capsys, smoke_run, spoiled, file, verb, words)

    @pytest.mark.parametrize("file, spoil, verb, words", [
        ("report.json", lambda f: f.write_text("{"), "run", ["not what this run wrote", "delete it"]),
        ("preferences/done.json", lambda f: edit_json(f, uses=dict(seed=5)), "reward", ["preferences", "other settings"]),
        ("reward/done.json", lambda f: edit_json(f, pair_accuracy=dict(labels=.999, gold=.999)), "evaluate", ["done.json: has changed"]),
        ("preferences/done.json", lambda f: edit_json(f, files=3), "reward", ["no list of the stage's files"])])
    def test_records(self, capsys, smoke_run, spoiled, file, spoil, verb, words):
        spoil(spoiled / file)
        self.refused(capsys, smoke_run, spoiled, file, verb, words)

    def test_and_afterwards_it_is_whole(self, smoke_run, spoiled):
        "None of the refusals changed anything else."
        assert tree(smoke_run) == tree(spoiled)


def test_the_corpus_is_large():
    "Kinds of bad input in this file, without those that differ in a value only."
    assert len(BAD_PICTURES) + len(BAD_RECORDS) + len(BAD_MODELS) >= 60


def test_nothing_in_a_bad_file_reaches_torch_load(tmp_path):
    "Weights are safetensors: a pickle in their place is refused, not executed."
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "executed"),)
    from vlmrlhf_course.base.runs import load_tensors
    torch.save(Evil(), tmp_path / "reward.safetensors")
    with pytest.raises(UserError, match="cannot be read"): load_tensors(tmp_path / "reward.safetensors")
    assert not (tmp_path / "executed").exists()
