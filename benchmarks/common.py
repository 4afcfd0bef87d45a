"What the benchmarks share: a model, one PPO iteration of the library, spans of time, results and tables."
import json
import os
import platform
import resource
import statistics
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from transformers.utils import logging

from vlmrlhf_course.model.packing import pack, packing_size
from vlmrlhf_course.rl.ppo import ActorCritic, PPOConfig, PPOTask, make_experience, minibatches, ppo_optimizer, seed_of
from vlmrlhf_course.data.preferences import sample_prompts
from vlmrlhf_course.train.reward import RewardConfig, RewardModel
from vlmrlhf_course.rl.rollout import sample
from vlmrlhf_course.base.runs import keep_memory, make_accelerator
from vlmrlhf_course.train.sft import backward_through, pretrained_vlm
from vlmrlhf_course.model.vlm import VLM, VLMConfig, build_model, build_processor

RESULTS = Path(__file__).parent / "results"
logging.disable_progress_bar()
keep_memory()   # as the command does


# --- the model --------------------------------------------------------------------------------------------------------

class Endless(VLM):
    "Never says EOS: every answer has the length that is asked for."
    @property
    def banned_ids(self): return sorted({*super().banned_ids, self.eos_id})


def build(
    cfg: PPOConfig,
    sizes: VLMConfig | None = None,   # random weights of these sizes; default: the package's pretrained parts
    vlm: VLM | None = None,           # … or this model
    seed: int = 0,
):
    "A policy and its reward model. What they were trained on does not change what an iteration costs, so they were not."
    torch.manual_seed(seed)
    if vlm is None: vlm = pretrained_vlm(seed) if sizes is None else VLM(build_model(sizes), build_processor(sizes))
    vlm.model.requires_grad_(False)
    rm = RewardModel(vlm, RewardConfig(lora=cfg.lora)).requires_grad_(False)
    policy = ActorCritic(rm, cfg)
    policy.train_roles()
    return policy, rm


@torch.no_grad()
def shake(policy: ActorCritic, rm: RewardModel, std: float = .02, seed: int = 1):
    "Move adapters and heads off their start, where every role says the same and every value is 0: equality must mean something."
    gen = torch.Generator().manual_seed(seed)
    def move(p): p.add_(torch.randn(p.shape, generator=gen).to(p) * std)
    for role in ("actor", "reward", "critic"):
        for name, p in policy.vlm.role_state(role).items():
            if "lora_A" not in name: move(p)
    for p in [*rm.head.parameters(), *policy.value.parameters()]: move(p)


def fresh_prompts(cfg: PPOConfig, n: int, rounds: int, seed: int = 0) -> list[list]:
    "For each round the prompts of `n` answers, about pictures that no other round shows."
    n //= cfg.answers_per_prompt
    prompts = sample_prompts(n * rounds, "train", cfg.kinds, f"benchmark/{seed}")
    return [[p for p in prompts[i * n:(i + 1) * n] for _ in range(cfg.answers_per_prompt)] for i in range(rounds)]


class TowerCount:
    "Counts the pictures that pass a model's tower, and keeps what last entered the projector."
    def __init__(self, vlm: VLM):
        self.images, self.features = 0, None
        vlm.tower.register_forward_hook(self.count)
        vlm.projector.register_forward_pre_hook(self.keep)

    def count(self, module, args, output): self.images += len(output.last_hidden_state)
    def keep(self, module, args): self.features = args[0]


# --- one iteration of the library ---------------------------------------------------------------------------------------

class Library:
    "PPO's iteration, step by step as in `train_ppo`, with a clock on each part."
    def __init__(self, policy: ActorCritic, rm: RewardModel, cfg: PPOConfig, seed: int = 0):
        self.policy, self.rm, self.cfg, self.seed, self.clock = policy, rm, cfg, seed, Clock(policy.vlm.device)
        self.accelerator = make_accelerator()
        self.params = [p for group in policy.role_groups() for p in group]
        self.task, self.optimizer = self.accelerator.prepare(PPOTask(policy, cfg), ppo_optimizer(policy, cfg))

    def experience(self, prompts, step: int):
        "Encode, sample, score."
        vlm, cfg = self.policy.vlm, self.cfg
        with self.clock("encode"): vlm.features([p.image for p in prompts if p.image])
        with self.clock("sample"): roll = sample(vlm, prompts, "actor", cfg.temperature, cfg.max_new_tokens, seed_of(self.seed, step, 0))
        with self.clock("score"): exp, info = make_experience(self.policy, self.rm, roll, cfg, cfg.beta, step)
        return roll, exp, info

    def groups(self, roll, step: int):
        "The minibatches of every epoch."
        return list(minibatches(roll.batch.lengths, self.cfg, f"{self.seed}/{step}", asked=roll.batch.asked))

    def update(self, exp, group):
        "One optimiser step on some rows."
        with self.clock("backward"):
            loss, _ = backward_through(self.task, [(exp, int(i)) for i in group], self.cfg.at_once, self.accelerator, shard=False)
        with self.clock("step"):
            self.accelerator.clip_grad_norm_(self.params, self.cfg.grad_clip)
            self.optimizer.step(); self.optimizer.zero_grad()
        return loss

    def iteration(self, prompts, step: int):
        with self.clock("all"):
            roll, exp, info = self.experience(prompts, step)
            for group in self.groups(roll, step): self.update(exp, group)
        return roll, exp, info


# --- time, memory, machine ------------------------------------------------------------------------------------------------

class Clock:
    """Adds up seconds under names: `with clock('sample'): …`.

    On a CPU these are CPU seconds of this process: with one thread and no waiting they are what a wall clock shows on an idle
    machine, and other people's processes do not count. On a GPU they are wall-clock seconds, synchronised."""
    def __init__(self, device="cpu"): self.spans, self.cuda = {}, torch.device(device).type == "cuda"

    def now(self) -> float:
        if not self.cuda: return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, name):
        start = self.now()
        yield
        self.spans[name] = self.spans.get(name, 0.) + self.now() - start

    def take(self) -> dict[str, float]:
        "What has gathered; the clock starts anew."
        spans, self.spans = self.spans, {}
        return spans


def medians(rounds: list[dict[str, float]]) -> dict[str, float]: return {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}


def matmul_rate(dtype=torch.float32, device="cpu", n: int = 1536, repeats: int = 5) -> float:
    "FLOP/s of large matrix products on this machine, now: the best of a few, as nothing can be faster."
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, clock = 0., Clock(device)
    for _ in range(repeats + 1):
        with clock("t"): a @ b
        best = max(best, 2 * n ** 3 / clock.take()["t"])
    return best


def rss() -> int:
    "Resident memory of this process in bytes, now."
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def machine() -> dict:
    "Where and with what a figure was measured."
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
                platform.processor())
    if torch.cuda.is_available(): name = torch.cuda.get_device_name()
    return dict(machine=name, threads=torch.get_num_threads(), python=platform.python_version(), date=time.strftime("%Y-%m-%d"),
                load=round(os.getloadavg()[0], 1), **{k: version(k) for k in ("torch", "transformers", "peft")})


# --- FLOPs -----------------------------------------------------------------------------------------------------------------

def update_flops(policy: ActorCritic, batch, kind: str = "head") -> float:
    """FLOPs that one forward and backward pass over a batch needs: real tokens only, attention over what came before only, prompts of
    several answers once where the library packs them.

    A frozen weight costs 2 (forward) + 2 (gradient of its input); a trained one 2 more (its own gradient). The inputs of the
    first layer need no gradient, as nothing below it is trained."""
    size = packing_size(batch, policy.vlm.width) if policy.vlm.family.packs(policy.vlm.model.config) else 1
    answers, rows = int(batch.answer_mask.sum()), batch if size == 1 else pack(batch, size)[0]
    tokens = int(rows.attention_mask.sum())
    pairs = float((rows.attention_mask.sum(1).double() ** 2).sum() / 2 if rows.sees is None else rows.sees.sum())
    total = 0.
    for role in ("actor", "critic") if kind == "adapter" else ("actor",):
        for name, layer in policy.vlm.language.named_modules():
            if not hasattr(layer, "lora_A"): continue
            first = name.split(".")[1] == "0" and name.endswith(("q_proj", "k_proj", "v_proj"))
            weight, a, b = layer.get_base_layer().weight, layer.lora_A[role].weight, layer.lora_B[role].weight
            total += tokens * (weight.numel() * (2 if first else 4) + a.numel() * (4 if first else 6) + b.numel() * 6)
        text = policy.vlm.model.config.get_text_config()
        width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        total += pairs * width * 4 * 3 * text.num_hidden_layers   # QKᵀ and AV, of who sees whom; backward twice that
    total += answers * policy.vlm.model.get_output_embeddings().weight.numel() * 4
    return total + 6 * (answers + len(batch)) * sum(p.numel() for p in policy.value.parameters())


# --- results ---------------------------------------------------------------------------------------------------------------

def save(name: str, result: dict) -> dict:
    "Write `results/name.json`, and print it a line a side."
    result = dict(benchmark=name, **machine(), **result)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for side in result.get("sides", []): print(json.dumps(dict(benchmark=name, **side)))
    return result


def table(head: list[str], rows: list[list]) -> str:
    "A markdown table."
    rows = [[str(c) for c in row] for row in [head, *rows]]
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))) + " |" for r in rows]
    return "\n".join([lines[0], "|" + "|".join(("-" * (w + 1) + (":" if i else "-")) for i, w in enumerate(widths)) + "|", *lines[1:]])


def number(x: float) -> str:
    "Three significant figures."
    if x == 0: return "0"
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}" if abs(x) >= 1 else f"{x:.3f}"
