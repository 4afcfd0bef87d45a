"One process or two (gloo, on the CPU): the same loss, the same gradients, the same weights."
import os
import random
import socket
import time
from contextlib import nullcontext

import pytest
import torch
from conftest import SMALL, shake
from hypothesis import given
from hypothesis import strategies as st
from test_model import SMALL_LORA, reward_model
from test_properties import small_ppo
from torch import nn

from vlmrlhf_course.rl.ppo import ActorCritic, PPOConfig, PPOTask, make_experience, train_ppo
from vlmrlhf_course.train.reward import RewardTask, group_pairs
from vlmrlhf_course.rl.rollout import Rollout
from vlmrlhf_course.base.runs import make_accelerator
from vlmrlhf_course.train.sft import FitConfig, SFTTask, backward_through, fit
from vlmrlhf_course.model.vlm import VLM, build_model, build_processor, token_logprobs
from vlmrlhf_course.world.scenes import make_prompt, sample_scenes


def problem(name, reduce=lambda x: x, rank=0, world=1):
    "A task with its items; everything is built from seeds, so that each process builds the same."
    torch.manual_seed(0)
    rng, vlm = random.Random(3), VLM(build_model(SMALL).double(), build_processor(SMALL))
    vlm.model.requires_grad_(False)
    kinds = ("detail", "exists", "text", "brief", "colour", "detail")
    prompts = [make_prompt(s, k, rng) for s, k in zip(sample_scenes(6, seed="tests"), kinds)]
    if name in ("sft", "uneven"):
        for part in (vlm.projector, vlm.language, vlm.model.lm_head): part.requires_grad_(True)
        return SFTTask(vlm), prompts if name == "sft" else prompts[:3]   # of three items and two processes, one has one more
    rm = reward_model(vlm, "token")
    if name == "reward":
        rm.head.requires_grad_(True)
        return RewardTask(rm), group_pairs([dict(image=p.image, prompt=p.text, chosen=p.answer, rejected=r, weight=w)
                                            for i, p in enumerate(prompts) for r, w in (("a cat .", .5), ("nothing .", 1.5))[:1 + i % 2]])
    cfg = PPOConfig(reward="rm", lora=SMALL_LORA)
    policy = ActorCritic(rm, cfg).double()
    for p in policy.value.parameters(): nn.init.normal_(p, std=.3)
    policy.train_roles()
    mine = prompts[rank::world]
    b = vlm.batch(mine, [p.answer for p in mine])
    with torch.no_grad(): old = token_logprobs(vlm.rule_out(vlm.answer_logits(b, "actor")), b.answers) * b.answer_mask
    ended = torch.tensor([len(p.answer.split()) < 20 for p in mine])
    exp, _ = make_experience(policy, rm, Rollout(mine, b, old, ended, 1.), cfg, .1, reduce=reduce)
    shake(vlm, "actor", std=.02, seed=11)   # the policy has moved since it sampled
    return PPOTask(policy, cfg), [(exp, i) for i in range(len(mine))]


def gradients(name, micro_batch):
    "Loss and gradients of a global batch, as this process sees them."
    accelerator = make_accelerator()
    task, items = problem(name, lambda x: accelerator.reduce(x, "sum"), accelerator.process_index, accelerator.num_processes)
    task = accelerator.prepare(task)
    loss, _ = backward_through(task, items, micro_batch, accelerator, shard=name != "ppo")
    return loss, {n: p.grad for n, p in accelerator.unwrap_model(task).named_parameters() if p.grad is not None}


def fitted(folder):
    "Weights after three steps of the training loop."
    task, items = problem("sft")
    fit(task, lambda step: items[step:] + items[:step], FitConfig(steps=3, lr=1e-3, batch=6, micro_batch=2), folder, "")
    return {n: p.detach() for n, p in task.named_parameters()}


PPO_RUNS = {"an answer to a prompt": {}, "two answers to a prompt": dict(answers=8, minibatch=4, answers_per_prompt=2)}
TASKS = [(name, micro) for name in ("sft", "reward", "ppo", "uneven") for micro in (1, 3)]


def process(rank, folder, port):
    "What each of two processes does."
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    out = {f"{name}-{micro}": gradients(name, micro) for name, micro in TASKS}
    out["fit"] = 0., fitted(folder / "fit")
    for name, changes in PPO_RUNS.items():
        policy, rm, cfg, pool = small_ppo(VLM(build_model(SMALL), build_processor(SMALL)), **changes)
        train_ppo(policy, rm, pool, pool[:2], cfg, folder / name)
        out[name] = 0., {n: p.detach() for n, p in policy.named_parameters() if p.requires_grad}
    torch.save(out, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Loss and gradients, by task, of both processes."
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    started, end = torch.multiprocessing.start_processes(process, (folder, port), 2, join=False,
                                                            start_method=os.environ.get("VLMRLHF_START", "spawn")), time.time() + 300
    try:
        while not started.join(1): assert time.time() < end, "two processes wait for each other"
    finally:
        for p in started.processes: p.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def same(a, b, tolerance=1e-5):
    assert a.keys() == b.keys() and any(x.any() for x in a.values())
    for name in a: assert float((a[name] - b[name]).abs().max()) <= tolerance * float(b[name].abs().max()) + 1e-12, name


@pytest.mark.parametrize("name, micro", TASKS)
def test_gradients_of_two_processes_are_those_of_one(two, name, micro):
    _, want = gradients(name, 6)
    for rank in two: same(rank[f"{name}-{micro}"][1], want)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "uneven"])
def test_the_loss_of_two_processes_is_that_of_one(two, name):
    for rank in two: assert rank[f"{name}-3"][0] == pytest.approx(gradients(name, 6)[0], rel=1e-5)


def test_weights_after_training_on_two_processes_are_those_of_one(two, tmp_path):
    want = fitted(tmp_path)
    for rank in two: same(rank["fit"][1], want)


@pytest.mark.parametrize("name", PPO_RUNS)
def test_ppo_on_two_processes_keeps_them_alike(two, name):
    a, b = (rank[name][1] for rank in two)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any("lora_B" in k and v.any() for k, v in a.items()), "nothing was learned"


class OneOf:
    "An accelerator as process `rank` of `world` sees it, the others left out."
    def __init__(self, rank, world): self.process_index, self.num_processes, self.device, self.passes, self.synced = rank, world, "cpu", 0, []
    def unwrap_model(self, task): return task
    def no_sync(self, task): return nullcontext()
    def reduce(self, x, how): return x
    def gather(self, x): return x
    def backward(self, loss): self.passes, self.synced = self.passes + 1, [*self.synced, self.sync_gradients]


class Counting(nn.Module):
    def collate(self, items): return items
    def count(self, batch): return len(batch)
    def forward(self, batch): return torch.zeros(()), {}


@given(st.integers(1, 30), st.integers(1, 6), st.integers(2, 4))
def test_every_process_exchanges_gradients_equally_often(size, micro_batch, world):
    "DDP exchanges gradients in a backward pass: where the numbers of passes differ, the run hangs. DeepSpeed steps in each that is marked."
    passes = []
    for rank in range(world):
        backward_through(Counting(), list(range(size)), micro_batch, me := OneOf(rank, world))
        passes.append(me.passes)
        assert me.synced == [False] * (me.passes - 1) + [True]
    assert len(set(passes)) == 1
