"The shipped weights are what `vlmrlhf pretrain` makes: recorded hashes, the first steps of both fits repeated, and stops that lose nothing."
import hashlib
import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from transformers import PreTrainedModel

from vlmrlhf_course.world import pretrain as P
from vlmrlhf_course.train import sft
from vlmrlhf_course.base.runs import read_jsonl
from vlmrlhf_course.train.sft import FitConfig, SFTTask, fit
from vlmrlhf_course.model.vlm import VLM, VLMConfig, build_model, build_processor
from vlmrlhf_course.world.scenes import sample_scenes

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

    from vlmrlhf_course.train.sft import pretrained_vlm
    vlm.model.requires_grad_(True)
    vlm.tower.load_state_dict(pretrained_vlm().tower.state_dict())
    vlm.tower.requires_grad_(False)
    items = P.language_items(sample_scenes(cfg.scenes), cfg.language.batch)
    language = first_losses(items, 3, lambda at: fit(SFTTask(vlm), at, cfg.language, tmp_path / "l", "l"), tmp_path / "l")
    assert language == pytest.approx(RECORD["language"]["losses"], rel=1e-4)


@pytest.mark.parametrize("call", range(1, 6))
def test_a_stop_while_a_part_is_written(tmp_path, monkeypatch, call):
    "Stopped while the tower, one of three rounds or the language model is written: no step is done again, and the weights are the same."
    short = FitConfig(steps=2, batch=4, micro_batch=4, save_every=1)
    cfg = P.PretrainConfig(tower_scenes=8, scenes=8, tower=short, language=short, questions=short, captions=short)
    write, step, calls, steps = PreTrainedModel.save_pretrained, sft.backward_through, [], []
    def cut(model, path, **kwargs):
        write(model, path, **kwargs)
        calls.append(path)
        if len(calls) != call: return
        (Path(path) / "model.safetensors").unlink()   # the configuration is written before the weights
        raise KeyboardInterrupt
    monkeypatch.setattr(sft, "backward_through", lambda *a, **k: [step(*a, **k), steps.append(1)][0])
    P.pretrain(tmp_path / "straight", cfg, SMALL)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", cut)
    with pytest.raises(KeyboardInterrupt): P.pretrain(tmp_path / "stopped", cfg, SMALL)
    P.pretrain(tmp_path / "stopped", cfg, SMALL)
    assert len(steps) == 2 * 8, "a fit of two steps for the tower and each of three rounds, once in either run"
    def files_of(folder): return {str(f.relative_to(folder)): f.read_bytes() for k in ("safetensors", "jsonl") for f in folder.rglob(f"*.{k}")}
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "straight") and not [*tmp_path.rglob("checkpoints"), *tmp_path.rglob(".part-*")]
    assert json.loads((tmp_path / "stopped" / "record.json").read_text()) == P.record(tmp_path / "straight")
