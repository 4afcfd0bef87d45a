"The table of model types in appendix D: what it says of each type is so."

import json
import logging
import re

import pytest
import torch
from conftest import REPO
from model_table import NOTEBOOK, TYPES, cell_of, table
from other_models import tiny_other
from other_specs import AT_WORK, OTHERS, TORCHVISION
from PIL import Image
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.data.prompts import Prompt
from vlmrlhf_course.model.families.general import refusal
from vlmrlhf_course.model.family import FAMILIES, family_of
from vlmrlhf_course.model.vlm import VLM

logging.getLogger("transformers").setLevel(logging.ERROR)


def kinds(how):
    return {kind for kind, entry in TYPES.items() if entry["how"] == how}


def test_it_names_every_type_that_transformers_knows():
    assert {*TYPES} == {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    assert {entry["how"] for entry in TYPES.values()} == {"own", "general", "refused", "not tried"}


def test_what_runs_is_run_by_the_tests():
    assert kinds("own") == {*FAMILIES}
    assert kinds("general") == {*OTHERS, *TORCHVISION} and not {*OTHERS} & {*FAMILIES}
    for kind in TORCHVISION:
        assert TYPES[kind]["note"] == "not in CI: tested where torchvision is installed"
    needy = {kind for kind, entry in TYPES.items() if re.search("timm|torchvision", str(entry))}
    assert all(TYPES[kind]["note"].startswith("not in CI: ") for kind in needy) and len(needy) > 20
    rows = {line.split("`")[1]: line for line in table().splitlines() if line.startswith("| `")}
    assert all("(✓)" in rows[kind] for kind in TORCHVISION)
    assert {kind for kind, row in rows.items() if " ✓ " in row} == {*FAMILIES, *OTHERS} - {
        *TORCHVISION
    }
    assert len(kinds("own") | {*OTHERS}) >= 36


@pytest.mark.parametrize("kind", sorted(kinds("refused") - {*AT_WORK}))
def test_what_is_refused_is_refused_with_that_line(kind):
    config = FAMILIES["llava"].tiny(["a"])[0]
    config.model_type, default = kind, CONFIG_MAPPING[kind]
    config.is_encoder_decoder = default.is_encoder_decoder or TYPES[kind]["note"] == refusal(
        type("_", (), dict(is_encoder_decoder=True))
    )
    with pytest.raises(UserError) as e:
        family_of(config)
    assert str(e.value).endswith(f": {TYPES[kind]['note']}") and "\n" not in str(e.value)


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(AT_WORK))
def test_what_cannot_be_right_is_refused_at_its_first_pass(kind, tmp_path):
    assert TYPES[kind]["how"] == "refused"
    vlm = VLM(*tiny_other(kind))
    file = str(tmp_path / "picture.png")
    Image.linear_gradient("L").convert("RGB").resize((48, 48)).save(file)
    batch = vlm.batch([Prompt("x", "what ?", "", file)], ["no ."])
    with pytest.raises(UserError, match=f"'{kind}' cannot be trained here") as e:
        vlm.answer_logits(batch)
    assert "\n" not in str(e.value)


def test_the_appendix_shows_the_table():
    shown = "".join(cell_of(json.loads(NOTEBOOK.read_text("utf-8")))["source"])
    assert shown == table(), "run python tests/model_table.py"


def test_readme_counts_what_the_table_says():
    run = kinds("own") | kinds("general") - {*TORCHVISION}
    text = (REPO / "README.md").read_text("utf-8")
    assert f"{len(run)} of the {len(TYPES)} types are run in CI" in text
    assert f"{len(TORCHVISION)} more have the same test where torchvision is installed" in text
