"Folders that others have published, with and without torchvision; and what is saved again."

import importlib.util
import json

import pytest
import torch
from own_data import checkpoint
from report_models import make, prompts  # noqa: F401 (fixture)

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.model import family
from vlmrlhf_course.model.family import FAMILIES, tiny_model
from vlmrlhf_course.model.vlm import VLM, load_vlm, save_vlm


@pytest.mark.parametrize("old", [True, False], ids=["preprocessor_config", "as saved"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_published_folder_loads(kind, old, prompts, tmp_path):
    "Also without torchvision, which processors of films need; and what was loaded can be saved."
    model, processor = tiny_model(kind)
    folder = tmp_path / "published"
    model.save_pretrained(folder)
    if old and hasattr(processor, "video_processor"):
        processor.tokenizer.save_pretrained(folder)
        kept = processor.image_processor.to_dict()
        name = kept["image_processor_type"].removesuffix("Pil")
        kept |= dict(image_processor_type=name, processor_class=type(processor).__name__)
        (folder / "preprocessor_config.json").write_text(json.dumps(kept))
        (folder / "chat_template.jinja").write_text(processor.chat_template)
        if kind == "internvl":
            rest = dict(image_seq_length=4, processor_class="InternVLProcessor")
            (folder / "processor_config.json").write_text(json.dumps(rest))
    else:
        processor.save_pretrained(folder)
    vlm, want = load_vlm(folder), make(kind)
    batch = want.batch(prompts, ["a red cat .", "no ."])
    save_vlm(vlm, tmp_path / "again")
    for loaded in (vlm, load_vlm(tmp_path / "again")):
        assert loaded.prompt_ids(prompts[0]) == want.prompt_ids(prompts[0])
        ours = loaded.batch(prompts, ["a red cat .", "no ."])
        with torch.no_grad():
            torch.testing.assert_close(loaded.answer_logits(ours), want.answer_logits(batch))


def test_a_folder_that_knows_nothing_about_films(prompts, tmp_path, monkeypatch):
    "As it is where torchvision is installed now, and was not when the folder was saved."
    model, processor = tiny_model("qwen2_5_vl")
    save_vlm(VLM(model, processor), tmp_path / "saved")
    find = importlib.util.find_spec
    there = lambda name, *more: name == "torchvision" or find(name, *more)  # noqa: E731
    monkeypatch.setattr(family.importlib.util, "find_spec", there)

    def refuse(*args, **how):
        raise OSError("Can't load video processor for the folder")

    monkeypatch.setattr(family.T.AutoProcessor, "from_pretrained", refuse)
    loaded, want = load_vlm(tmp_path / "saved"), make("qwen2_5_vl")
    assert loaded.prompt_ids(prompts[0]) == want.prompt_ids(prompts[0])
    monkeypatch.setattr(family.importlib.util, "find_spec", find)
    with pytest.raises(UserError, match="Can't load video processor"):
        load_vlm(checkpoint("llava", tmp_path / "llava"))
