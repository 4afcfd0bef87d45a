"""Model folders that are no whole model: one line that names the folder and what to do."""

import os
import shutil

import pytest
import torch
from commands import edit_json, edit_weights, refused, smoke
from picture_files import BAD_PICTURES
from test_bad_records import BAD_RECORDS
from transformers import LlamaConfig, LlamaForCausalLM

from vlmrlhf_course.base.checkpoints import load_tensors
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.model.vlm import load_vlm, save_vlm
from vlmrlhf_course.world import pretrain as pretrain_module


def text_only(folder):
    "A language model without eyes in the place of the VLM."
    shutil.rmtree(folder)
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8)
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)


def no_image_token(folder):
    "A tokenizer that does not know the image token."
    file = folder / "tokenizer.json"
    text = file.read_text().replace('"<image>": 3', '"<picture>": 999')
    file.write_text(text.replace('"id": 3,', '"id": 999,'))


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def gone(name):
    return lambda folder: (folder / name).unlink()


def unknown_type(folder):
    edit_json(folder / "config.json", model_type="perceptron")


def head(edit):
    "Spoil the output head: `edit(tensor)`, or leave it out where that is None."

    def edited(tensors):
        others = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
        heads = {name: tensor for name, tensor in tensors.items() if "lm_head" in name}
        return others | {name: edit(tensor) for name, tensor in heads.items() if edit}

    return lambda folder: edit_weights(folder / "model.safetensors", edited)


def three_rows(tensor):
    return tensor[:3].clone()


def not_a_number(tensor):
    return tensor * float("nan")


BAD_MODELS = {  # what becomes of the folder, and the words that must be said
    "config empty": (write("config.json", "{}"), []),
    "config no JSON": (write("config.json", "{"), []),
    "config empty file": (write("config.json", ""), []),
    "text only": (text_only, []),
    "config of something unknown": (unknown_type, ["perceptron"]),
    "no weights": (gone("model.safetensors"), []),
    "weights cut": (cut("model.safetensors", 1000), []),
    "weights empty": (cut("model.safetensors", 0), []),
    "weights text": (write("model.safetensors", "hello"), []),
    "weights missing": (head(None), ["lm_head", "missing"]),
    "weights of another size": (head(three_rows), []),
    "weights NaN": (head(not_a_number), ["lm_head", "not finite"]),
    "no tokenizer": (gone("tokenizer.json"), ["processor"]),
    "tokenizer cut": (cut("tokenizer.json", 100), ["processor"]),
    "no processor": (gone("processor_config.json"), ["processor"]),
    "no image token": (no_image_token, ["image"]),
}


def without_the_first(file):
    edit_weights(file, lambda tensors: dict(list(tensors.items())[1:]))


def all_nan(file):
    edit_weights(file, lambda tensors: {k: not_a_number(v) for k, v in tensors.items()})


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
        with pytest.raises(UserError) as e:
            load_vlm(tmp_path / "model")
        assert str(e.value).startswith(str(tmp_path / "model")), e.value
        assert "\n" not in str(e.value), e.value
        assert "give" in str(e.value) or "take" in str(e.value), e.value
        assert all(w in str(e.value) for w in words), e.value

    @pytest.mark.parametrize("path", ["", "nowhere", "file"])
    def test_is_no_folder(self, tmp_path, path):
        (tmp_path / "file").write_text("")
        with pytest.raises(FileNotFoundError, match="config.json"):
            load_vlm(tmp_path / path)

    @pytest.mark.parametrize("part", ["tower", "language"])
    @pytest.mark.parametrize(
        "spoil, words",
        [
            (lambda f: os.truncate(f, 1000), "cannot be read"),
            (without_the_first, "is missing"),
            (all_nan, "is not finite"),
        ],
    )
    def test_pretrained_parts(self, capsys, tmp_path, monkeypatch, part, spoil, words):
        "The package's own weights, damaged: one line, before anything is trained."
        shutil.copytree(
            pretrain_module.files("vlmrlhf_course") / "pretrained", tmp_path / "pretrained"
        )
        spoil(tmp_path / "pretrained" / part / "model.safetensors")
        monkeypatch.setattr(pretrain_module, "files", lambda package: tmp_path)
        line = refused(capsys, *smoke("sft", tmp_path / "run"))
        assert f"{tmp_path / 'pretrained' / part}: " in line and words in line, line

    def test_in_a_run(self, capsys, smoke_run, tmp_path):
        shutil.copytree(smoke_run / "sft", tmp_path / "run" / "sft")
        file = tmp_path / "run" / "sft" / "language" / "model.safetensors"
        size = file.stat().st_size
        os.truncate(file, 1000)
        line = refused(capsys, *smoke("preferences", tmp_path / "run"))
        sizes = f"{file.name} has 1000 bytes instead of {size}"
        assert f"{file.parent.parent}: language: {sizes}" in line
        assert "put the file back, or delete" in line


def test_nothing_in_a_bad_file_reaches_torch_load(tmp_path):
    "Weights are safetensors: a pickle in their place is refused, not executed."

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save(Evil(), tmp_path / "reward.safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_tensors(tmp_path / "reward.safetensors")
    assert not (tmp_path / "executed").exists()


def test_the_corpus_is_large():
    "Kinds of bad pictures, records and models, without those that differ in a value only."
    assert len(BAD_PICTURES) + len(BAD_RECORDS) + len(BAD_MODELS) >= 60
