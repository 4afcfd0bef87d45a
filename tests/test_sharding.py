"Two processes that share out what they hold, by DeepSpeed, against two that do not, and one."

import json
import os
import random
import shutil
import socket
import time
from dataclasses import fields
from unittest import mock

import pytest
import torch
from small_models import SMALL, SMALL_LORA, small_ppo

from vlmrlhf_course.base import sharding
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.base.sharding import LaunchConfig, deepspeed_config, meeting, shared_out_as
from vlmrlhf_course.data.pairs import group_pairs
from vlmrlhf_course.model.memory import Limits
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.rl import loop
from vlmrlhf_course.rl.algorithm import RLConfig
from vlmrlhf_course.rl.grpo import GRPO, GRPOConfig
from vlmrlhf_course.rl.loop import train
from vlmrlhf_course.train import fit as fit_room
from vlmrlhf_course.train.dpo import DPOConfig, DPOTask
from vlmrlhf_course.train.fit import FitConfig, fit
from vlmrlhf_course.train.reward import RewardConfig, RewardModel, RewardTask
from vlmrlhf_course.train.sft import SFTTask
from vlmrlhf_course.world.llava import build_model, build_processor
from vlmrlhf_course.world.scenes import make_prompt, sample_scenes

WAYS = {
    "ddp": LaunchConfig(),
    "zero 1": LaunchConfig(zero=1),
    "zero 2": LaunchConfig(zero=2),
    "offload": LaunchConfig(zero=2, offload=True),
    "zero 3": LaunchConfig(zero=3),
}
FIT = FitConfig(steps=4, lr=1e-3, batch=6, micro_batch=2, clip=0.05, save_every=2)
FITTED = ("sft", "reward", "dpo")


def small_vlm():
    torch.manual_seed(1)
    vlm = VLM(build_model(SMALL), build_processor(SMALL))
    vlm.model.requires_grad_(False)
    return vlm


def demonstrations():
    "Six, of which two have no picture: the projector has nothing to do with them."
    rng = random.Random(3)
    kinds = ("detail", "exists", "text", "text", "colour", "detail")
    return [make_prompt(s, k, rng) for s, k in zip(sample_scenes(6, seed="tests"), kinds)]


def pairs():
    rows = []
    for i, p in enumerate(demonstrations()):
        row = dict(image=p.image, prompt=p.text, chosen=p.answer)
        rows += [row | dict(rejected=text) for text in ("a cat .", "nothing .")[: 1 + i % 2]]
    return group_pairs(rows)


def fit_task(name):
    "A task with its items; what rests is shared out where that is asked for."
    vlm = small_vlm()
    if name == "sft":
        for part in (vlm.projector, vlm.language, vlm.model.lm_head):
            part.requires_grad_(True)
        return SFTTask(vlm), demonstrations()
    vlm.share_out()
    torch.manual_seed(2)
    if name == "dpo":
        return DPOTask(vlm, DPOConfig(lora=SMALL_LORA)), pairs()
    return RewardTask(RewardModel(vlm, RewardConfig(lora=SMALL_LORA))), pairs()


def fitted(name, folder, stop=None):
    "Weights after some steps."
    task, items = fit_task(name)
    fit(task, lambda step: items[step:] + items[:step], FIT, folder, "", stop=stop, clear=False)
    return {n: p.detach() for n, p in task.named_parameters() if p.requires_grad}


RUNS = dict(
    ppo={},
    critic=dict(critic="adapter", answers=8, minibatch=4, answers_per_prompt=2),
    grpo=dict(answers=8, minibatch=4, answers_per_prompt=2),
    emergency=dict(kl_emergency=0.01, iterations=4, answers=8, minibatch=4, actor_lr=3e-3),
    broken={},
    half={},
)


def policy(name, folder, rank=0):
    "Weights after a few iterations, and the figures of each."
    vlm = small_vlm()
    if name == "half":
        vlm.model.to(torch.bfloat16)
        vlm.limits = Limits(gradient_checkpointing=True)
    vlm.share_out()
    actor, scores, pool = small_ppo(vlm, **RUNS[name])
    if name == "grpo":
        shared = {f.name: getattr(actor.cfg, f.name) for f in fields(RLConfig)}
        actor = GRPO(scores.judges.rm, GRPOConfig(**shared), "grpo")
    if name == "broken" and rank == 1:
        break_once(actor)
    train(actor, scores, pool, pool[:2], folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {n: p.detach() for n, p in actor.named_parameters() if p.requires_grad}, rows


def break_once(actor):
    "The second update of one process has a loss that is no number."
    calls, loss = [], actor.loss

    def broken(exp):
        calls.append(1)
        found, metrics = loss(exp)
        return found * (float("nan") if len(calls) == 2 else 1.0), metrics

    actor.loss = broken


def gentle(groups, betas, weight_decay=0.0):
    "AdamW whose steps do not blow up rounding: a gradient of 1e-7 is no reason for a whole step."
    rates = [dict(params=g.params, lr=g.peak) for g in groups]
    return torch.optim.AdamW(rates, betas=betas, weight_decay=weight_decay, eps=0.01, fused=True)


def process(rank, folder, port):
    "What each of two processes does, under each way."
    torch.set_num_threads(1)
    out = {}
    with meeting(rank, 2, port), mock.patch.multiple(fit_room, make_optimizer=gentle):
        with mock.patch.multiple(loop, make_optimizer=gentle):
            for way, cfg in WAYS.items():
                with shared_out_as(cfg):
                    out |= {(way, *k): v for k, v in all_of(folder / cfg_name(way), way, rank)}
    torch.save(out, folder / f"{rank}.pt")


def cfg_name(way):
    return way.replace(" ", "-")


def all_of(folder, way, rank):
    "What a way of sharing leads to, by task."
    few = way in ("zero 1", "offload")  # what they do otherwise than stage 2 is little
    for name in FITTED[:1] if few else FITTED:
        yield (name,), fitted(name, folder / name)
    interrupted(folder / "cut")
    yield ("resumed",), fitted("sft", folder / "cut")
    for name in ("broken",) if few else RUNS:
        weights, rows = policy(name, folder / name, rank)
        yield from (((name,), weights), ((name, "rows"), rows))


def interrupted(folder):
    "A run that a crash ends after its third step: its last checkpoint knows two."
    fitted("sft", folder, stop=lambda done: done == 3)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "What both processes found, by way and task; and the folder of their runs."
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    how = dict(join=False, start_method=os.environ.get("VLMRLHF_START", "spawn"))
    started = torch.multiprocessing.start_processes(process, (folder, port), 2, **how)
    end = time.time() + 900
    try:
        while not started.join(1):
            if time.time() > end:
                return "two processes wait for each other"
    except Exception as e:
        return str(e)
    finally:
        for p in started.processes:
            p.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)], folder


def of(two):
    "What they found; a test that asks for it fails where they did."
    assert not isinstance(two, str), two
    return two


def far(a, b):
    "The largest difference, as a share of the largest weight."
    assert a.keys() == b.keys() and any(x.any() for x in a.values())
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp(min=1e-9)) for n in a)


def test_all_tasks_were_done(two):
    (a, b), _ = of(two)
    assert a.keys() == b.keys() and len(a) > 40


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("way", WAYS)
def test_fitted_weights_are_those_of_one_process(two, tmp_path, way, name):
    (a, _), _ = of(two)
    if (way, name) in a:
        with mock.patch.object(fit_room, "make_optimizer", gentle):
            assert far(a[way, name], fitted(name, tmp_path)) < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_both_processes_have_the_same_weights(two, way):
    (a, b), _ = of(two)
    for key in [key for key in a if key[0] == way and key[-1] != "rows"]:
        assert far(a[key], b[key]) == 0, key


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_goes_on_ends_with_the_same_bits(two, way):
    (a, _), _ = of(two)
    assert far(a[way, "resumed"], a[way, "sft"]) == 0


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "ddp"])
def test_policies_are_those_of_processes_that_share_nothing(two, way, name):
    "Losses, KL, weights; the step that is no number and the emergency are met by both."
    (a, _), _ = of(two)
    if (way, name) not in a:
        return
    assert far(a[way, name], a["ddp", name]) < 1e-4
    mine, theirs = (a[w, name, "rows"] for w in (way, "ddp"))
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys()
        for figure in ("kl", "loss", "grad_norm", "value_loss", "explained_variance"):
            want = other.get(figure, 0.0)
            assert one.get(figure, 0.0) == pytest.approx(want, rel=1e-4, abs=1e-6), figure
        assert (one["emergency"], one["skipped"]) == (other["emergency"], other["skipped"])


@pytest.mark.parametrize("way", WAYS)
def test_accidents_happen(two, way):
    "Else the test above compares nothing."
    (a, _), _ = of(two)
    assert [row["skipped"] for row in a[way, "broken", "rows"]] == [1, 1]
    if (way, "emergency") in a:
        assert sum(row["emergency"] for row in a[way, "emergency", "rows"]) == 1


@pytest.mark.parametrize("way", WAYS)
def test_one_process_goes_on_where_two_were_cut_off(two, tmp_path, way):
    "A checkpoint does not know how many processes wrote it, nor what they shared out."
    _, folder = of(two)
    shutil.copytree(folder / cfg_name(way) / "cut", tmp_path / "cut")
    last = tmp_path / "cut" / "checkpoints" / "step-4"
    shutil.rmtree(last)
    with mock.patch.object(fit_room, "make_optimizer", gentle):
        alone = fitted("sft", tmp_path / "one")
        went_on = fitted("sft", tmp_path / "cut")
    assert far(went_on, alone) < 1e-5
    rows = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1, 2, 3]


def test_stage_three_shares_the_trunk_out_and_no_more():
    "Refusals, without a second process: each names the setting and the remedy."
    vlm = small_vlm()
    with mock.patch.object(sharding, "_now", LaunchConfig(zero=3)):
        vlm.language.requires_grad_(True)
        with pytest.raises(UserError, match="launch.zero=3.*learns.*set launch.zero to 2"):
            vlm.share_out()
        vlm.language.requires_grad_(False)
        next(iter(vlm.language.layers)).double()
        with pytest.raises(UserError, match="float64.*set launch.zero to 2"):
            vlm.share_out()
    vars(vlm.language)["_shared_out"] = object()
    with pytest.raises(UserError, match="lora.r=0.*set launch.zero to 2"):
        vlm.add_role("copy", LoRAConfig(r=0))


def test_what_deepspeed_is_told(tmp_path):
    "Its own class reads every stage's settings, and its own clipping is off."
    from deepspeed.runtime.config import DeepSpeedConfig

    for zero in (1, 2, 3):
        for offload in (False, True):
            told = deepspeed_config(zero, offload)
            read = DeepSpeedConfig(told)
            assert read.zero_config.stage == zero and read.gradient_clipping == 0.0
            assert (read.zero_config.offload_optimizer is not None) == offload


def test_without_deepspeed_there_is_a_remedy(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sharding.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="deepspeed is not installed; pip install"):
        with shared_out_as(LaunchConfig(zero=2)):
            pass
