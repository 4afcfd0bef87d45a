"What sees may learn, too: a tower that thaws, and parts that learn each in their own way."

import math
from dataclasses import replace

import pytest
import torch
from report_models import full, make, prompts, shake  # noqa: F401 (fixture)
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close

from vlmrlhf_course.base.config import build_config, recorded
from vlmrlhf_course.base.launch import make_accelerator
from vlmrlhf_course.base.metrics import log_rows
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.model.groups import clip_groups, part_norms, resting
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vision import (
    PARTS,
    Modalities,
    Modality,
    by_modality,
)
from vlmrlhf_course.model.vlm import load_vlm
from vlmrlhf_course.rl.grpo import GRPOConfig
from vlmrlhf_course.rl.ppo import PPOConfig
from vlmrlhf_course.train.dpo import DPOConfig
from vlmrlhf_course.train.fit import FitConfig, fit
from vlmrlhf_course.train.reward import RewardConfig
from vlmrlhf_course.train.sft import (
    SFTConfig,
    SFTTask,
    adapter_of,
    fit_part,
    learn_part,
    sft_groups,
)

EYES = LoRAConfig(r=2, alpha=4, tower=True)


def said(vlm, prompts, role=None):
    "Logits where the answers' tokens are predicted."
    batch = full(vlm, prompts)
    return vlm.answer_logits(batch, role)[batch.answer_mask]


def reached(weights):
    return all(w.grad is not None and bool(w.grad.abs().sum() > 0) for w in weights)


THAW = dict(language=FitConfig(steps=10, lr=1e-4, micro_batch=1), tower_lr=1e-4)


def thawed(prompts, folder, stop=None, **changes):
    "A model in stage 2 of SFT for ten steps, with its groups, and the pictures encoded by each."
    torch.manual_seed(0)
    vlm, cfg = make(), SFTConfig(**THAW | changes)
    learn_part(vlm, "language")
    groups, encoded = sft_groups(vlm, cfg, "language"), []

    def looked(done):
        encoded.append(vlm.encoded)
        return stop == done

    task = SFTTask(vlm)
    fit(task, lambda step: prompts, cfg.language, folder, "sft", looked, groups=groups, clear=False)
    return vlm, groups, encoded


def test_gradients_appear_exactly_when_they_should(prompts, tmp_path):
    "The tower's last layer from step 3 on, all of it from step 7; features are kept until step 3."
    seen = []

    def note(optimizer, args, kwargs):
        groups = optimizer.param_groups
        seen.append([any(p.grad is not None for p in g["params"]) for g in groups])

    handle = register_optimizer_step_pre_hook(note)
    vlm, groups, encoded = thawed(prompts, tmp_path)
    handle.remove()
    assert len(groups) == 3, "the rest, and two layers, the first of them first"
    assert seen == [[True, step >= 7, step >= 3] for step in range(10)]
    assert encoded == [2, 2, 2, *range(4, 18, 2)]
    rows = log_rows(tmp_path / "metrics.jsonl")
    assert [row["grad_norm_tower"] > 0 for row in rows] == [step >= 3 for step in range(10)]
    assert all(row["grad_norm_projector"] > 0 < row["grad_norm_language"] for row in rows)
    parts = [rows[9][f"grad_norm_{name}"] for name in PARTS]
    assert math.hypot(*parts) == pytest.approx(rows[9]["grad_norm"], rel=1e-4)
    assert all(p.requires_grad for g in groups for p in g.params)


def test_a_layer_that_rests_is_not_touched(prompts, tmp_path):
    "By no step, and not by weight decay; and the two shares can be moved."
    vlm, groups, encoded = thawed(prompts, tmp_path, stop=4, thaw=(0.2, 1.0))
    fresh = make()
    first, last = (layers.state_dict() for layers in vlm.tower.encoder.layers)
    old_first, old_last = (layers.state_dict() for layers in fresh.tower.encoder.layers)
    assert all(torch.equal(first[k], old_first[k]) for k in first)
    assert not any(torch.equal(last[k], old_last[k]) for k in last if "k_proj.bias" not in k)
    assert encoded == [2, 2, 4, 6]


@pytest.mark.parametrize("at", [2, 5])
def test_a_run_that_thaws_goes_on_exactly(prompts, tmp_path, at):
    "From a checkpoint before the tower has learned, and from one after that."
    changes = dict(language=replace(THAW["language"], save_every=at))
    whole, _, _ = thawed(prompts, tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        thawed(prompts, tmp_path / "cut", stop=Stop(at + 1), **changes)
    cut, _, _ = thawed(prompts, tmp_path / "cut", **changes)
    pairs = zip(whole.model.state_dict().values(), cut.model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)


class Stop:
    "Is equal to no number of steps; at one it ends everything."

    def __init__(self, step):
        self.step = step

    def __eq__(self, done):
        if done == self.step:
            raise KeyboardInterrupt
        return False


def test_staged_unfreezing_beside_adapters(prompts):
    "LoRA in the language model, and the tower itself: both learn, each as its schedule says."
    vlm, cfg = make(), SFTConfig(**THAW, lora=LoRAConfig(r=2))
    learn_part(vlm, "language")
    role = adapter_of(vlm, cfg, "language")
    groups = sft_groups(vlm, cfg, "language", role)
    assert [id(p) for p in groups[0].params] == [id(p) for p in role.trained()]
    with resting(groups, 9):
        loss, _ = SFTTask(vlm, "sft")(SFTTask(vlm).collate(prompts))
        loss.backward()
    assert reached(role.trained()[1::2]) and any(p.grad is not None for p in groups[1].params)
    assert all(p.grad is None for p in vlm.projector.parameters())


def test_each_part_at_its_own_rate_and_limit(prompts):
    vlm = make()
    role = vlm.add_role("actor", EYES)
    settings = Modalities(tower=Modality(rate=0.5, clip=2.0, weight=3.0))
    tower, language = by_modality(vlm, [role.group(0.1, lambda step: 0.25)], settings)
    assert {id(p) for p in tower.params} == {id(p) for p in role.tower_weights()}
    assert (tower.peak, tower.clip, tower.weight) == (0.05, 2.0, 3.0)
    assert (language.peak, language.clip, language.weight) == (0.1, 0.0, 1.0)
    assert tower.schedule(0) == language.schedule(0) == 0.25
    for group, size in ((tower, 4.0), (language, 5.0)):
        for p in group.params:
            p.grad = torch.full_like(p, size / sum(q.numel() for q in group.params) ** 0.5)
    norms = part_norms([tower, language])
    assert norms == pytest.approx(dict(grad_norm_tower=4.0, grad_norm_language=5.0))
    norm = clip_groups(make_accelerator(), [tower, language], 1.0)
    assert norm == pytest.approx(math.hypot(12.0, 5.0)), "weighed, and not yet clipped"
    assert part_norms([tower]) == pytest.approx(dict(grad_norm_tower=2.0))
    assert part_norms([language]) == pytest.approx(dict(grad_norm_language=1.0))


def test_defaults_are_one_group_and_silent(prompts, tmp_path):
    "Where no tower learns and nothing is set: the very groups, and no new figure."
    vlm = make()
    learn_part(vlm, "language")
    groups = sft_groups(vlm, SFTConfig(), "language")
    assert len(groups) == 1 and not groups[0].parts and part_norms(groups) == {}
    asked = SFTConfig(modality=Modalities(language=Modality(rate=0.5)))
    assert len(sft_groups(vlm, asked, "language")) == 2
    assert len(sft_groups(vlm, asked, "projector")) == 1, "stage 1 has one part"
    with pytest.raises(UserError, match="modality.tower: .* does not learn here; .*language"):
        sft_groups(vlm, SFTConfig(modality=Modalities(tower=Modality(clip=1.0))), "language")


@pytest.mark.parametrize("cls", [SFTConfig, RewardConfig, DPOConfig, PPOConfig, GRPOConfig])
def test_settings_of_parts(cls):
    "By name, in every stage; a record knows of them where they were set."
    assert not {"modality", "thaw"} & recorded(cls()).keys()
    cfg = build_config(cls, dict(modality=dict(tower=dict(rate=0.1))), "x")
    assert cfg.modality.tower == Modality(rate=0.1) and cfg.modality.language == Modality()
    assert recorded(cfg)["modality"]["tower"]["rate"] == 0.1
    with pytest.raises(UserError, match="rate=0"):
        build_config(cls, dict(modality=dict(language=dict(rate=0.0))), "x")
    with pytest.raises(UserError, match="x.modality.eyes.*keys are language, projector, tower"):
        build_config(cls, dict(modality=dict(eyes=dict(rate=0.1))), "x")


@pytest.mark.parametrize(
    "values, said",
    [
        (dict(thaw=[0.5, 0.2]), "the last layer comes first"),
        (dict(thaw=[0.5, 1.2]), "give a number in"),
        (dict(tower_lr=0.1, lora=dict(r=2, tower=True)), "the tower learns, or adapters in it"),
    ],
)
def test_plans_that_cannot_be(values, said):
    with pytest.raises(UserError, match=said):
        build_config(SFTConfig, values, "sft")
    assert build_config(SFTConfig, dict(thaw=[0.1, 0.2]), "sft").thaw == (0.1, 0.2)


def test_dropout_of_sft_adapters_drops(prompts, tmp_path):
    "It used to be ignored: a new adapter stood still."
    found = []
    for dropout in (0.0, 0.9):
        vlm = make()
        source, stage = Shown(prompts), replace(THAW["language"], steps=3, lr=0.1)
        cfg = SFTConfig(language=stage, lora=replace(EYES, dropout=dropout))
        learn_part(vlm, "language")
        torch.manual_seed(0)
        fit_part(vlm, source, cfg, tmp_path / str(dropout) / "language", 0, "x")
        rows = log_rows(tmp_path / str(dropout) / "fit-language" / "metrics.jsonl")
        found.append([row["loss"] for row in rows])
        assert rows[2]["grad_norm_tower"] > 0
        whole = load_vlm(tmp_path / str(dropout) / "language")
        vlm.model.eval()
        with torch.no_grad():
            want = said(vlm, prompts, "sft")
            assert_close(said(whole, prompts), want, rtol=1e-3, atol=1e-3)
    assert found[0][0] == found[1][0] and found[0][2] != found[1][2]


class Shown:
    "A source of demonstrations."

    def __init__(self, prompts):
        self.asked = prompts

    def demonstrations(self, cfg, seed, faithful):
        return lambda step: self.asked
