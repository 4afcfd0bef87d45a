"Checkpoints hold what learns, and not the trunk that it learns on."

import pytest
import torch
from report_models import COPY, LORA, make, prompts  # noqa: F401 (fixture)
from safetensors.torch import load_file, save_file
from small_models import small_ppo

from vlmrlhf_course.base.files import seal
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.rl import loop
from vlmrlhf_course.train.dpo import DPOConfig, DPOTask
from vlmrlhf_course.train.fit import FitConfig, fit
from vlmrlhf_course.train.reward import RewardConfig, RewardModel, RewardTask
from vlmrlhf_course.train.sft import SFTTask, learn_part
from vlmrlhf_course.world.llava import build_model, build_processor

HOW = dict(steps=4, batch=2, micro_batch=2, save_every=2, lr=1e-2)


def group(prompts):
    said = dict(chosen="a red cat .", rejected="no .")
    return [dict(image=p.image, prompt=p.text) | said for p in prompts[:1]]


def reward(prompts, **more):
    return RewardTask(RewardModel(make(dtype=torch.bfloat16), RewardConfig(lora=LORA, **more))), [
        group(prompts)
    ] * 2


def tasks(prompts):
    "Task and items, of each kind of what learns."
    vlm = make()
    learn_part(vlm, "projector")
    return dict(
        adapter=lambda: reward(prompts),
        batch_norm=lambda: reward(prompts, granularity="scalar", norm="batch"),
        dpo=lambda: (DPOTask(make(), DPOConfig(lora=LORA)), [group(prompts)] * 2),
        copy=lambda: (DPOTask(make(), DPOConfig(lora=COPY)), [group(prompts)] * 2),
        projector=lambda: (SFTTask(vlm), prompts),
    )


def built(kind, prompts, seed=0):
    torch.manual_seed(seed)
    return tasks(prompts)[kind]()


def state_of(task):
    return {name: x.clone() for name, x in task.state_dict().items()}


def stopped(step):
    "A `stop` that is a crash."

    def stop(done):
        if done == step:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("kind", ["adapter", "batch_norm", "dpo", "copy", "projector"])
def test_a_fit_goes_on_from_what_has_learned(kind, prompts, tmp_path):
    "Bit for bit as if nothing had happened, on a trunk that was loaded anew."
    task, items = built(kind, prompts)
    fit(task.train(), lambda step: items, FitConfig(**HOW), tmp_path / "whole", "x")
    want = state_of(task)
    task, items = built(kind, prompts)
    with pytest.raises(KeyboardInterrupt):
        how = (lambda step: items, FitConfig(**HOW), tmp_path / "cut", "x", stopped(3))
        fit(task.train(), *how)
    file = tmp_path / "cut" / "checkpoints" / "step-2" / "model.safetensors"
    saved, trained = load_file(file), {n for n, p in task.named_parameters() if p.requires_grad}
    buffers = {name for name, _ in task.named_buffers()}
    assert trained <= {*saved} | buffers and {*saved} <= trained | buffers
    again, items = built(kind, prompts, seed=1 if kind != "copy" else 0)
    fit(again.train(), lambda step: items, FitConfig(**HOW), tmp_path / "cut", "x")
    for name, x in again.state_dict().items():
        assert torch.equal(x, want[name]), name


def test_ppo_saves_no_trunk(tmp_path):
    vlm = VLM(build_model().requires_grad_(False), build_processor())
    policy, scores, pool = small_ppo(vlm, save_every=1, critic="adapter")
    asked = (policy, scores, pool, pool[:4], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        loop.train(*asked, observers=(lambda step, **figures: stopped(1)(step),))
    saved = load_file(tmp_path / "checkpoints" / "step-1" / "model.safetensors")
    assert any(".lora_A.actor." in n for n in saved) and any("head" in n for n in saved)
    assert any(".lora_A.actor_critic." in n for n in saved)
    learned = sum(p.numel() for g in policy.groups() for p in g.params)
    assert sum(x.numel() for x in saved.values()) < 1.01 * learned, "and little else"
    learns = [p for g in policy.groups() for p in g.params]
    before = [p.clone() for p in learns]
    for p in learns:
        p.data.zero_()
    assert loop.train(*asked)
    assert all(torch.equal(p, old) for p, old in zip(learns, before)), "the same second iteration"


@pytest.mark.parametrize("wrong", ["missing", "too much"])
def test_what_does_not_fit_is_said(wrong, prompts, tmp_path):
    task, items = built("dpo", prompts)
    how = FitConfig(**HOW)
    with pytest.raises(KeyboardInterrupt):
        fit(task, lambda step: items, how, tmp_path, "x", stopped(3))
    place = tmp_path / "checkpoints" / "step-2"
    saved = load_file(place / "model.safetensors")
    if wrong == "missing":
        saved.pop(next(iter(saved)))
    else:
        saved["of_nobody"] = torch.zeros(1)
    save_file(saved, place / "model.safetensors")
    (place / "manifest.json").unlink()
    seal(place, "")
    with pytest.raises(UserError, match="is missing, or too much.*move"):
        fit(task, lambda step: items, how, tmp_path, "x")


def test_a_checkpoint_with_its_trunk_is_read_as_well(prompts, tmp_path, monkeypatch):
    "Such as an older version has written."
    monkeypatch.setattr("vlmrlhf_course.base.checkpoints._leave_out", lambda *args: None)
    task, items = built("dpo", prompts)
    with pytest.raises(KeyboardInterrupt):
        fit(task, lambda step: items, FitConfig(**HOW), tmp_path, "x", stopped(3))
    fit(task, lambda step: items, FitConfig(**HOW), tmp_path, "x")
