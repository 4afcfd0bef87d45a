"""What the benchmarks share: a model, a clock on the library's iteration, results and tables."""

import json
import os
import platform
import re
import resource
import statistics
import time
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from transformers.utils import logging

from vlmrlhf_course.base.launch import keep_memory
from vlmrlhf_course.base.metrics import seed_of
from vlmrlhf_course.model.packing import pack, packing_size
from vlmrlhf_course.model.roles import Role
from vlmrlhf_course.model.vlm import VLM
from vlmrlhf_course.rl import loop
from vlmrlhf_course.rl.algorithm import Experience
from vlmrlhf_course.rl.ppo import PPO, PPOConfig
from vlmrlhf_course.rl.rewards import Judges, Scores
from vlmrlhf_course.train.reward import RewardConfig, RewardModel
from vlmrlhf_course.world.llava import VLMConfig, build_model, build_processor
from vlmrlhf_course.world.pretrain import pretrained_vlm
from vlmrlhf_course.world.source import DrawnWorld, sample_prompts

RESULTS = Path(__file__).parent / "results"
logging.disable_progress_bar()
keep_memory()  # as the command does
PAID = dict(rm=1.0, penalty=1.0)  # the rewards of the arm `ppo`


# --- the model --------------------------------------------------------------------------------


class Endless(VLM):
    "Never says EOS: every answer has the length that is asked for."

    @property
    def banned_ids(self):
        return sorted({*super().banned_ids, self.eos_id})


def build(
    cfg: PPOConfig,
    # random weights of these sizes; default: the package's pretrained parts …
    sizes: VLMConfig | None = None,
    vlm: VLM | None = None,  # … or this model
    seed: int = 0,
):
    """A policy and its reward model. What they were trained on does not change what an iteration
    costs, so they were not."""
    torch.manual_seed(seed)
    if vlm is None and sizes is None:
        vlm = pretrained_vlm(seed)
    elif vlm is None:
        vlm = VLM(build_model(sizes), build_processor(sizes))
    vlm.model.requires_grad_(False)
    rm = RewardModel(vlm, RewardConfig(lora=cfg.lora)).requires_grad_(False)
    policy = PPO(rm, cfg)
    policy.learn()
    return policy, rm


@torch.no_grad()
def shake(policy: PPO, rm: RewardModel, std: float = 0.02, seed: int = 1):
    """Move adapters and heads off their start, where every role says the same and every value is 0:
    equality must mean something."""
    gen = torch.Generator().manual_seed(seed)
    for role in (policy.actor, rm.role, policy.critic):
        learned = {p.data_ptr() for p in role.trained()}  # not the critic's units
        for path, p in role.state().items():
            if "lora_A" not in path and p.data_ptr() in learned:
                p.add_(torch.randn(p.shape, generator=gen).to(p) * std)


def fresh_prompts(cfg: PPOConfig, n: int, rounds: int, seed: int = 0) -> list[list]:
    "For each round the prompts of `n` answers, about pictures that no other round shows."
    n //= cfg.answers_per_prompt
    prompts = sample_prompts(n * rounds, "train", cfg.kinds, f"benchmark/{seed}")
    repeated = [p for p in prompts for _ in range(cfg.answers_per_prompt)]
    size = n * cfg.answers_per_prompt
    return [repeated[i * size : (i + 1) * size] for i in range(rounds)]


class TowerCount:
    "Counts the pictures that pass a model's tower, and keeps what last entered the projector."

    def __init__(self, vlm: VLM, model=None):
        "`model`: another than the VLM's own, of its family."
        self.images, self.features, model = 0, None, model or vlm.model
        vlm.family.part(model, "tower").register_forward_hook(self.count)
        vlm.family.part(model, "projector").register_forward_pre_hook(self.keep)

    def count(self, module, args, output):
        self.images += len(output.last_hidden_state)

    def keep(self, module, args):
        self.features = args[0]


# --- one iteration of the library -------------------------------------------------------------


PARTS = {  # of an iteration → the function of the library that is it
    "collect": (loop, "collect"),
    "sample": (loop, "try_sample"),
    "judge": (Scores, "__call__"),
    "update": (loop, "update"),
    "backward": (loop, "backward_through"),
}


class Library:
    """`rl.loop.iteration`, as `rl.loop.train` calls it, with a clock on its parts.

    `returned` holds what each part returned last."""

    def __init__(self, policy: PPO, rm: RewardModel, seed: int = 0):
        self.policy, self.rm, self.cfg, self.seed = policy, rm, policy.cfg, seed
        self.clock, self.returned = Clock(policy.vlm.device), {}
        judges = Judges(rm, DrawnWorld(), self.cfg.penalty, DrawnWorld())
        self.scores = Scores(judges, self.cfg.reward, self.cfg.no_eos)
        self.learner = loop.Learner.of(policy, self.scores, "benchmark")

    @contextmanager
    def watched(self):
        "Within this block every part of the library's iteration is timed."
        with ExitStack() as patches:
            for name, (place, function) in PARTS.items():
                watch = self.watch(name, getattr(place, function))
                patches.enter_context(patch.object(place, function, watch))
            yield

    def watch(self, name: str, function):
        "The same function, timed under a name."

        @wraps(function)
        def watched(*args, **kwargs):
            with self.clock(name):
                self.returned[name] = function(*args, **kwargs)
            return self.returned[name]

        return watched

    def take(self) -> dict[str, float]:
        "Seconds since the last call. No part lies within another, but for `judge` in `score`."
        t = dict.fromkeys(("encode", "all", *PARTS), 0.0) | self.clock.take()
        score, step = t.pop("collect") - t["sample"], t.pop("update") - t["backward"]
        return t | dict(score=score, step=step)

    def experience(self, prompts, step: int) -> tuple[Experience, torch.Tensor]:
        "Sample and score, as an iteration does: an experience, and the answers' scores (B,)."
        seed = seed_of(self.seed, step, 0)
        with self.watched():
            exp, _ = loop.collect(self.policy, self.scores, prompts, self.cfg.beta, step, seed)
        return exp, self.returned["judge"][0]

    def groups(self, exp: Experience, step: int) -> list[list[int]]:
        "The minibatches of every epoch."
        return list(loop.minibatches(exp, self.cfg, f"{self.seed}/{step}"))

    def update(self, exp: Experience, rows: list[int]):
        "One optimiser step on some rows."
        with self.watched():
            loop.update(self.learner, exp, rows, 0)

    def iteration(self, prompts, step: int) -> Experience:
        """One iteration. Pictures are encoded first, so that this is timed apart: sampling then
        finds them. Raises RuntimeError where updates were left out."""
        self.returned.clear()  # nothing of the last iteration takes room in this one
        with self.watched(), self.clock("all"):
            with self.clock("encode"):
                self.policy.vlm.features([p.image for p in prompts if p.image])
            figures = loop.iteration(self.learner, prompts, step, self.seed)
        if figures["emergency"] or figures["skipped"]:
            raise RuntimeError("updates were left out: what was timed is no whole iteration")
        return self.returned["collect"][0]


# --- time, memory, machine --------------------------------------------------------------------


class Clock:
    """Adds up seconds under names: `with clock('sample'): …`.

    On a CPU these are CPU seconds of this process: with one thread and no waiting they are what a
    wall clock shows on an idle machine, and other people's processes do not count. On a GPU they
    are wall-clock seconds, synchronised."""

    def __init__(self, device="cpu"):
        self.spans, self.cuda = {}, torch.device(device).type == "cuda"

    def now(self) -> float:
        if not self.cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, name):
        start = self.now()
        yield
        self.spans[name] = self.spans.get(name, 0.0) + self.now() - start

    def take(self) -> dict[str, float]:
        "What has gathered; the clock starts anew."
        spans, self.spans = self.spans, {}
        return spans


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}


def matmul_rate(dtype=torch.float32, device="cpu", n: int = 1536, repeats: int = 5) -> float:
    """FLOP/s of large matrix products on this machine, now: the best of a few, as nothing can be
    faster."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, clock = 0.0, Clock(device)
    for _ in range(repeats + 1):
        with clock("t"):
            a @ b
        best = max(best, 2 * n**3 / clock.take()["t"])
    return best


def rss() -> int:
    "Resident memory of this process in bytes, now."
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def machine() -> dict:
    "Where and with what a figure was measured."
    name = platform.processor()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        said = re.search(r"^model name\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M)
        name = said[1].strip() if said else name
    return dict(
        machine=name,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        date=time.strftime("%Y-%m-%d"),
        load=round(os.getloadavg()[0], 1),
        **{k: version(k) for k in ("torch", "transformers", "peft")},
    )


# --- FLOPs ------------------------------------------------------------------------------------


def update_flops(policy: PPO, batch) -> float:
    """FLOPs that one forward and backward pass over a batch needs: real tokens only, attention over
    what came before only, prompts of several answers once where the library packs them.

    A frozen weight costs 2 (forward) + 2 (gradient of its input); a trained one 2 more (its own
    gradient). The inputs of the first layer need no gradient, as nothing below it is trained."""
    vlm, value = policy.vlm, policy.critic.head
    size = packing_size(batch, vlm.width) if vlm.family.packs(vlm.model.config) else 1
    rows = batch if size == 1 else pack(batch, size)[0]
    answers, tokens = int(batch.answer_mask.sum()), int(rows.attention_mask.sum())
    if rows.attends is None:
        pairs = float((rows.attention_mask.sum(1).double() ** 2).sum() / 2)
    else:
        pairs = float(rows.attends.sum())
    passes = [policy.actor]
    if policy.cfg.critic == "adapter":
        passes.append(policy.critic)
    total = 0.0
    for role in passes:
        total += tokens * linear_flops(vlm, role) + pairs * attention_flops(vlm)
    total += answers * vlm.model.get_output_embeddings().weight.numel() * 4
    return total + 6 * (answers + len(batch)) * sum(p.numel() for p in value.parameters())


def linear_flops(vlm: VLM, role: Role) -> int:
    "FLOPs of a token in the linear layers of the language model and a role's adapter."
    total = 0
    for name, layer in vlm.language.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        first = name.split(".")[1] == "0" and name.endswith(("q_proj", "k_proj", "v_proj"))
        weight = layer.get_base_layer().weight
        a, b = layer.lora_A[role.name].weight, layer.lora_B[role.name].weight
        total += weight.numel() * (2 if first else 4)
        total += a.numel() * (4 if first else 6) + b.numel() * 6
    return total


def attention_flops(vlm: VLM) -> int:
    "FLOPs of a pair of tokens of which one sees the other: QKᵀ and AV; backward twice that."
    text = vlm.model.config.get_text_config()
    usual = text.hidden_size // text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or usual
    return text.num_attention_heads * head_dim * 4 * 3 * text.num_hidden_layers


# --- results ----------------------------------------------------------------------------------


def save(name: str, result: dict) -> dict:
    "Write `results/name.json`, and print it a line a side."
    result = dict(benchmark=name, **machine(), **result)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for side in result.get("sides", []):
        print(json.dumps(dict(benchmark=name, **side)))
    return result


def table(head: list[str], rows: list[list]) -> str:
    "A markdown table."
    rows = [[str(c) for c in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *cells])} |")
    rules = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    lines.insert(1, f"|{'|'.join(rules)}|")
    return "\n".join(lines)


def number(x: float) -> str:
    "Three significant figures."
    if x == 0:
        return "0"
    for least, digits in ((100, 0), (10, 1), (1, 2)):
        if abs(x) >= least:
            return f"{x:.{digits}f}"
    return f"{x:.3f}"
