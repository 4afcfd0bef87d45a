"""The shipped weights are what `vlmrlhf pretrain` makes.

Recorded hashes, the pixels they have learned from, the first steps of both fits repeated, and
stops that lose nothing."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path

import PIL
import pytest
import torch
from conftest import SMALL
from transformers import PreTrainedModel

from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.train import fit as fitting
from vlmrlhf_course.train.fit import FitConfig, fit
from vlmrlhf_course.train.sft import SFTTask
from vlmrlhf_course.world import pretrain as P
from vlmrlhf_course.world.drawing import draw
from vlmrlhf_course.world.llava import VLMConfig, build_model, build_processor
from vlmrlhf_course.world.pretrain import pretrained_vlm
from vlmrlhf_course.world.scenes import sample_scenes

FOLDER = files("vlmrlhf_course") / "pretrained"
RECORD = json.loads((FOLDER / "record.json").read_text())
PIXELS = "e9d3c077f4f185f029321a619978a240e6c02b9de4871f06c10688f717c6c5f5"  # of 50 scenes


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Enough(Exception):
    pass


def first_losses(items_at, n, run, folder):
    "The losses of the first `n` steps of a fit."

    def at(step):
        if step == n:
            raise Enough
        return items_at(step)

    with pytest.raises(Enough):
        run(at)
    return [r["loss"] for r in read_jsonl(folder / "metrics.jsonl")]


@pytest.mark.parametrize("part", ["tower", "language"])
def test_weights_are_the_recorded_ones(part):
    weights = (FOLDER / part / "model.safetensors").read_bytes()
    assert sha256(weights) == RECORD[part]["sha256"]


@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 12,
    reason="Pillow 11 decides some edges of polygons differently",
)
def test_pictures_are_those_that_the_weights_know():
    "To the byte: a new shape, colour or place of a thing needs new weights."
    pixels = b"".join(draw(scene).tobytes() for scene in sample_scenes(50))
    assert sha256(pixels) == PIXELS


def test_first_steps_of_both_fits_repeat(tmp_path):
    """Same seed, same code, same numbers.

    A change of world, model or loop that the weights do not know of fails here."""
    cfg = P.PretrainConfig()
    torch.manual_seed(0)
    vlm = VLM(build_model(VLMConfig()), build_processor())
    task = P.TowerTask(vlm, sample_scenes(cfg.tower_scenes))
    tower = first_losses(
        P.tower_items(cfg.tower_scenes, cfg.tower.batch),
        3,
        lambda at: fit(task, at, cfg.tower, tmp_path / "t", "t"),
        tmp_path / "t",
    )
    assert tower == pytest.approx(RECORD["tower"]["losses"], rel=1e-4)

    vlm.model.requires_grad_(True)
    vlm.tower.load_state_dict(pretrained_vlm().tower.state_dict())
    vlm.tower.requires_grad_(False)
    language = first_losses(
        P.language_items(sample_scenes(cfg.scenes), cfg.language.batch),
        3,
        lambda at: fit(SFTTask(vlm), at, cfg.language, tmp_path / "l", "l"),
        tmp_path / "l",
    )
    assert language == pytest.approx(RECORD["language"]["losses"], rel=1e-4)


def test_the_projector_is_not_the_one_that_pretraining_began_with():
    "It was thrown away with what it had learned; a run that drew it again would not start anew."
    torch.manual_seed(0)
    began, vlm = VLM(build_model(VLMConfig()), build_processor()), pretrained_vlm(0)
    drawn = {name: w for name, w in began.projector.named_parameters() if w.dim() > 1}
    assert drawn
    for other in (began, pretrained_vlm(1)):
        weights = dict(other.projector.named_parameters())
        for name, w in vlm.projector.named_parameters():
            assert w.dim() == 1 or not torch.allclose(w, weights[name])
    again = pretrained_vlm(0).projector.state_dict()
    for name, w in vlm.projector.state_dict().items():
        assert torch.equal(w, again[name])


def results_of(folder):
    "Every file of weights or metrics under `folder`: its name and its bytes."
    found = [*folder.rglob("*.safetensors"), *folder.rglob("*.jsonl")]
    return {str(f.relative_to(folder)): f.read_bytes() for f in found}


@pytest.mark.parametrize("call", range(1, 6))
def test_a_stop_while_a_part_is_written(tmp_path, monkeypatch, call):
    """Stopped while the tower, one of three rounds or the language model is written.

    No step is done again, and the weights are the same."""
    short = FitConfig(steps=2, batch=4, micro_batch=4, save_every=1)
    fits = dict(tower=short, language=short, questions=short, captions=short)
    cfg = P.PretrainConfig(tower_scenes=8, scenes=8, **fits)
    write, step, calls, steps = PreTrainedModel.save_pretrained, fitting.backward_through, [], []

    def counted(*args, **kwargs):
        done = step(*args, **kwargs)
        steps.append(1)
        return done

    def cut(model, path, **kwargs):
        write(model, path, **kwargs)
        calls.append(path)
        if len(calls) == call:  # the configuration is written before the weights
            (Path(path) / "model.safetensors").unlink()
            raise KeyboardInterrupt

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    monkeypatch.setattr(fitting, "backward_through", counted)
    P.pretrain(straight, cfg, SMALL)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", cut)
    with pytest.raises(KeyboardInterrupt):
        P.pretrain(stopped, cfg, SMALL)
    P.pretrain(stopped, cfg, SMALL)
    # Two steps for the tower and for each of three rounds, once in either run.
    assert len(steps) == 2 * 8
    assert results_of(stopped) == results_of(straight)
    assert not [*tmp_path.rglob("checkpoints"), *tmp_path.rglob(".part-*")]
    assert json.loads((stopped / "record.json").read_text()) == P.record(straight)
