"One process or two (gloo, on the CPU): the same loss, the same gradients, the same weights."

import os
import random
import socket
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import SMALL, SMALL_LORA, experience_of, reward_model, shake, small_ppo
from torch import nn

from vlmrlhf_course.base.launch import make_accelerator
from vlmrlhf_course.data.pairs import group_pairs
from vlmrlhf_course.model.groups import ParamGroup
from vlmrlhf_course.model.vlm import VLM, token_logprobs
from vlmrlhf_course.rl.loop import train
from vlmrlhf_course.rl.ppo import PPO, PPOConfig
from vlmrlhf_course.rl.rollout import Rollout
from vlmrlhf_course.train.fit import FitConfig, backward_through, fit, learning
from vlmrlhf_course.train.reward import RewardTask
from vlmrlhf_course.train.sft import SFTTask
from vlmrlhf_course.world.llava import build_model, build_processor
from vlmrlhf_course.world.scenes import make_prompt, sample_scenes


def problem(name, reduce=lambda x: x, rank=0, world=1):
    "A task with its items; everything is built from seeds, so that each process builds the same."
    torch.manual_seed(0)
    rng, vlm = random.Random(3), VLM(build_model(SMALL).double(), build_processor(SMALL))
    vlm.model.requires_grad_(False)
    kinds = ("detail", "exists", "text", "brief", "colour", "detail")
    prompts = [make_prompt(s, k, rng) for s, k in zip(sample_scenes(6, seed="tests"), kinds)]
    if name in ("sft", "uneven"):
        for part in (vlm.projector, vlm.language, vlm.model.lm_head):
            part.requires_grad_(True)
        if name == "uneven":
            prompts = prompts[:3]  # of three items and two processes, one has one more
        return SFTTask(vlm), prompts
    if name == "seeing":  # one of the prompts has no picture: of its part no gradient comes there
        vlm.add_role("sft", replace(SMALL_LORA, tower=True))
        vlm.model.double()
        shake(vlm, "sft")
        return SFTTask(vlm, "sft"), prompts
    rm = reward_model(vlm, "token")
    if name == "reward":
        rm.head.requires_grad_(True)
        rows = []
        for i, p in enumerate(prompts):
            row = dict(image=p.image, prompt=p.text, chosen=p.answer)
            rows.append(row | dict(rejected="a cat .", weight=0.5))
            if i % 2:
                rows.append(row | dict(rejected="nothing .", weight=1.5))
        return RewardTask(rm), group_pairs(rows)
    policy = PPO(rm, PPOConfig(lora=SMALL_LORA)).double()
    for p in policy.critic.head.parameters():
        nn.init.normal_(p, std=0.3)
    policy.learn()
    mine = prompts[rank::world]
    b = vlm.batch(mine, [p.answer for p in mine])
    with torch.no_grad():
        old = token_logprobs(vlm.rule_out(vlm.answer_logits(b, "actor")), b.answers) * b.answer_mask
    ended = torch.tensor([len(p.answer.split()) < 20 for p in mine])
    exp, _ = experience_of(policy, rm, Rollout(mine, b, old, ended, 1.0), reduce=reduce)
    shake(vlm, "actor", std=0.02, seed=11)  # the policy has moved since it sampled
    return policy, [(exp, i) for i in range(len(mine))]


def gradients(name, micro_batch):
    "Loss and gradients of a global batch, as this process sees them."
    accelerator = make_accelerator()
    task, items = problem(
        name,
        lambda x: accelerator.reduce(x, "sum"),
        accelerator.process_index,
        accelerator.num_processes,
    )
    task = accelerator.prepare(task)
    loss, _ = backward_through(task, items, micro_batch, accelerator, shard=name != "ppo")
    params = accelerator.unwrap_model(task).named_parameters()
    return loss, {n: p.grad for n, p in params if p.grad is not None}


def fitted(folder, thaw=False):
    "Weights after three steps of the training loop; the tower learns from the second on."
    task, items = problem("sft")
    cfg, groups = FitConfig(steps=3, lr=1e-3, batch=6, micro_batch=2), None
    if thaw:
        groups = [learning(task, cfg)]
        tower = [*task.vlm.tower.requires_grad_(True).parameters()]
        groups.append(ParamGroup(tower, 1e-3, lambda step: float(step > 0)))
    fit(task, lambda step: items[step:] + items[:step], cfg, folder, "", groups=groups)
    return {n: p.detach() for n, p in task.named_parameters()}


PPO_RUNS = {
    "an answer to a prompt": {},
    "two answers to a prompt": dict(answers=8, minibatch=4, answers_per_prompt=2),
}
TASKS = [(name, micro) for name in ("sft", "reward", "ppo", "uneven", "seeing") for micro in (1, 3)]


def process(rank, folder, port):
    "What each of two processes does."
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    out = {f"{name}-{micro}": gradients(name, micro) for name, micro in TASKS}
    out["fit"] = 0.0, fitted(folder / "fit")
    out["thaw"] = 0.0, fitted(folder / "thaw", thaw=True)
    for name, changes in PPO_RUNS.items():
        vlm = VLM(build_model(SMALL), build_processor(SMALL))
        policy, scores, pool = small_ppo(vlm, **changes)
        train(policy, scores, pool, pool[:2], folder / name)
        out[name] = 0.0, {n: p.detach() for n, p in policy.named_parameters() if p.requires_grad}
    torch.save(out, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Loss and gradients, by task, of both processes."
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = torch.multiprocessing.start_processes(
        process,
        (folder, port),
        2,
        join=False,
        start_method=os.environ.get("VLMRLHF_START", "spawn"),
    )
    end = time.time() + 300
    try:
        while not started.join(1):
            assert time.time() < end, "two processes wait for each other"
    finally:
        for p in started.processes:
            p.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def same(a, b, tolerance=1e-5):
    assert a.keys() == b.keys() and any(x.any() for x in a.values())
    for name in a:
        gap, largest = float((a[name] - b[name]).abs().max()), float(b[name].abs().max())
        assert gap <= tolerance * largest + 1e-12, name


@pytest.mark.parametrize("name, micro", TASKS)
def test_gradients_of_two_processes_are_those_of_one(two, name, micro):
    _, want = gradients(name, 6)
    for rank in two:
        same(rank[f"{name}-{micro}"][1], want)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "uneven", "seeing"])
def test_the_loss_of_two_processes_is_that_of_one(two, name):
    for rank in two:
        assert rank[f"{name}-3"][0] == pytest.approx(gradients(name, 6)[0], rel=1e-5)


@pytest.mark.parametrize("name", ["fit", "thaw"])
def test_weights_after_training_on_two_processes_are_those_of_one(two, tmp_path, name):
    want = fitted(tmp_path, thaw=name == "thaw")
    for rank in two:
        same(rank[name][1], want)


@pytest.mark.parametrize("name", PPO_RUNS)
def test_ppo_on_two_processes_keeps_them_alike(two, name):
    a, b = (rank[name][1] for rank in two)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any("lora_B" in k and v.any() for k, v in a.items()), "nothing was learned"


class OneOf:
    "An accelerator as process `rank` of `world` sees it, the others left out."

    def __init__(self, rank, world):
        self.process_index, self.num_processes = rank, world
        self.device, self.passes, self.synced = "cpu", 0, []

    def unwrap_model(self, task):
        return task

    def no_sync(self, task):
        return nullcontext()

    def reduce(self, x, how):
        return x

    def gather(self, x):
        return x

    def backward(self, loss):
        self.passes += 1
        self.synced.append(self.sync_gradients)


class Counting(nn.Module):
    def collate(self, items):
        return items

    def count(self, batch):
        return len(batch)

    def forward(self, batch):
        return torch.zeros(()), {}


@given(st.integers(1, 30), st.integers(1, 6), st.integers(2, 4))
def test_every_process_exchanges_gradients_equally_often(size, micro_batch, world):
    """DDP exchanges gradients in a backward pass: where the numbers of passes differ, the run
    hangs. DeepSpeed steps in each that is marked."""
    passes = []
    for rank in range(world):
        me = OneOf(rank, world)
        backward_through(Counting(), list(range(size)), micro_batch, me)
        passes.append(me.passes)
        assert me.synced == [False] * (me.passes - 1) + [True]
    assert len(set(passes)) == 1
