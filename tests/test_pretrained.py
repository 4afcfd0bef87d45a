"The shipped weights are what `vlmrlhf pretrain` makes: recorded hashes, and the first steps of both fits repeated."
import hashlib
import json
from importlib.resources import files

import pytest
import torch

from vlmrlhf_course import pretrain as P
from vlmrlhf_course.runs import read_jsonl
from vlmrlhf_course.sft import SFTTask, fit
from vlmrlhf_course.vlm import VLM, VLMConfig, build_model, build_processor
from vlmrlhf_course.world import sample_scenes

FOLDER = files("vlmrlhf_course") / "pretrained"
RECORD = json.loads((FOLDER / "record.json").read_text())


class Enough(Exception):
    pass


def first_losses(items_at, n, run, folder):
    "The losses of the first `n` steps of a fit."
    def at(step):
        if step == n: raise Enough
        return items_at(step)
    with pytest.raises(Enough): run(at)
    return [r["loss"] for r in read_jsonl(folder / "metrics.jsonl")]


@pytest.mark.parametrize("part", ["tower", "language"])
def test_weights_are_the_recorded_ones(part):
    assert hashlib.sha256((FOLDER / part / "model.safetensors").read_bytes()).hexdigest() == RECORD[part]["sha256"]


def test_first_steps_of_both_fits_repeat(tmp_path):
    "Same seed, same code, same numbers: a change of world, model or loop that the weights do not know of fails here."
    cfg = P.PretrainConfig()
    torch.manual_seed(0)
    vlm = VLM(build_model(VLMConfig()), build_processor())
    task = P.TowerTask(vlm, sample_scenes(cfg.tower_scenes))
    tower = first_losses(P.tower_items(cfg.tower_scenes, cfg.tower.batch), 3, lambda at: fit(task, at, cfg.tower, tmp_path / "t", "t"), tmp_path / "t")
    assert tower == pytest.approx(RECORD["tower"]["losses"], rel=1e-4)

    from vlmrlhf_course.sft import pretrained_vlm
    vlm.model.requires_grad_(True)
    vlm.tower.load_state_dict(pretrained_vlm().tower.state_dict())
    vlm.tower.requires_grad_(False)
    items = P.language_items(sample_scenes(cfg.scenes), cfg.language.batch)
    language = first_losses(items, 3, lambda at: fit(SFTTask(vlm), at, cfg.language, tmp_path / "l", "l"), tmp_path / "l")
    assert language == pytest.approx(RECORD["language"]["losses"], rel=1e-4)
