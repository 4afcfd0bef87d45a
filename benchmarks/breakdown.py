"""Where the time of a PPO iteration goes, and how near its update comes to the machine's rate of
matrix products: `python -m benchmarks.breakdown`."""

import argparse
from dataclasses import replace
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from benchmarks.common import (
    PAID,
    Clock,
    Library,
    build,
    fresh_prompts,
    matmul_rate,
    medians,
    number,
    save,
    table,
    update_flops,
)
from vlmrlhf_course.model.vlm import answer, token_logprobs
from vlmrlhf_course.rl import loop, rollout
from vlmrlhf_course.rl.algorithm import Experience
from vlmrlhf_course.rl.ppo import PPOConfig
from vlmrlhf_course.rl.rollout import Rollout, padding_share
from vlmrlhf_course.world.llava import VLMConfig

# --- an iteration, part by part ---------------------------------------------------------------


def parts(cfg: PPOConfig, rounds: int, sizes: VLMConfig | None = None) -> dict[str, float]:
    "Seconds of each part, median over rounds on new pictures; the first round is not counted."
    policy, rm = build(cfg, sizes)
    lib, found = Library(policy, rm), []
    for step, prompts in enumerate(fresh_prompts(cfg, cfg.answers, rounds + 1)):
        lib.iteration(prompts, step)
        found.append(lib.take())
    t = medians(found[1:])
    named = {
        "encoding pictures (drawing included)": t["encode"],
        "sampling": t["sample"],
        "scoring: reference, reward model, values, advantages": t["score"] - t["judge"],
        "judging texts (true score, penalty)": t["judge"],
        "update: forward and backward": t["backward"],
        "update: clipping and optimiser": t["step"],
    }
    return named | {"rest": t["all"] - sum(named.values()), "all": t["all"]}


# --- ways to keep keys and values -------------------------------------------------------------


class Reserved(DynamicLayer):
    """A cache layer in memory that is reserved once: a new token is written into it, not joined to
    a copy of all that is there."""

    def reserve(self, x):
        "Room for what is there and for the longest answer."
        rows, heads, length, size = x.shape
        return x.new_empty(rows, heads, length + PPOConfig.max_new_tokens, size)

    def update(self, keys, values, *args, **kwargs):
        n = self.keys.shape[-2] if self.is_initialized else 0
        if not n:
            self.lazy_initialization(keys, values)
            self.room = [self.reserve(x) for x in (keys, values)]
        end = n + keys.shape[-2]
        for room, x in zip(self.room, (keys, values)):
            room[:, :, n:end] = x
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        n = self.keys.shape[-2]
        self.room = [room[indices] for room in self.room]
        self.keys, self.values = (room[:, :, :n] for room in self.room)


def caches(cfg: PPOConfig, rounds: int, sizes: VLMConfig | None = None) -> dict[str, float]:
    """Seconds an answer of sampling, by how the loop keeps keys and values, and of `generate`. All
    ways of the loop must say the same."""
    policy, _ = build(cfg, sizes)
    vlm, clock, found = policy.vlm, Clock(), []
    text = vlm.model.config.get_text_config()

    def reserved():
        return Cache(layer_class_to_replicate=Reserved)

    def static():
        return StaticCache(text, text.max_position_embeddings // 4)

    kept = dict(drop=2.0)  # more than all rows: none is dropped
    ways = {
        "cache appended, done rows dropped (the library)": (DynamicCache, {}),
        "cache reserved, done rows dropped": (reserved, {}),
        "cache appended, all rows kept": (DynamicCache, kept),
        "transformers' StaticCache, all rows kept": (static, kept),
    }
    asked = "actor", cfg.temperature, cfg.max_new_tokens
    for step, prompts in enumerate(fresh_prompts(cfg, cfg.answers, rounds + 1)):
        vlm.features([p.image for p in prompts])
        said = {}
        for name, (make, how) in ways.items():
            with patch.object(rollout, "DynamicCache", make), clock(name):
                roll = rollout.sample(vlm, prompts, *asked, seed=step, **how)
            first = said.setdefault(str(how), roll.batch.answers)
            assert torch.equal(first, roll.batch.answers), name
        with clock("transformers' generate"):
            answer(vlm, prompts, cfg.temperature, step, cfg.max_new_tokens, role="actor")
        found.append({k: t / cfg.answers for k, t in clock.take().items()})
    return medians(found[1:])


# --- the update against matrix products -------------------------------------------------------


@torch.no_grad()
def given_answers(lib: Library, prompts) -> Rollout:
    """A rollout whose answers are the careful ones: the same tokens whatever the model's size and
    weights."""
    vlm = lib.policy.vlm
    b = vlm.batch(prompts, [p.answer for p in prompts])
    logits = vlm.rule_out(vlm.answer_logits(b, "actor"))
    logprobs = token_logprobs(logits, b.answers) * b.answer_mask
    ended = torch.ones(len(b), dtype=torch.bool, device=vlm.device)
    return Rollout(prompts, b, logprobs, ended, lib.cfg.temperature)


def epoch_of(
    cfg: PPOConfig, sizes: VLMConfig | None
) -> tuple[Library, Experience, list[list[int]]]:
    "An iteration just before its first update: library, experience, minibatches of one epoch."
    policy, rm = build(cfg, sizes)
    lib = Library(policy, rm)
    prompts = fresh_prompts(cfg, cfg.answers, 1)[0]
    roll = given_answers(lib, prompts)
    with patch.object(loop, "try_sample", lambda *args, **kwargs: roll):
        exp, _ = lib.experience(prompts, 0)
    return lib, exp, list(loop.minibatches(exp, replace(cfg, epochs=1), "breakdown"))


def update_rate(cfg: PPOConfig, sizes: VLMConfig | None, repeats: int) -> dict:
    "FLOP/s of an epoch of updates, beside large matrix products timed in between. Medians."
    lib, exp, groups = epoch_of(cfg, sizes)
    batches = [exp.batch.rows(torch.tensor(g)) for g in groups]
    flops = sum(update_flops(lib.policy, batch) for batch in batches)
    found = []
    for _ in range(repeats + 1):
        lib.take()
        for g in groups:
            lib.update(exp, g)
        t = lib.take()
        seconds = t["backward"] + t["step"]
        rate, peak = flops / seconds, matmul_rate(device=lib.policy.vlm.device)
        rates = dict(gflop_per_s=rate / 1e9, matmul_gflop_per_s=peak / 1e9, ratio=rate / peak)
        found.append(dict(ms=1000 * seconds / cfg.answers) | rates)
    micro = []
    for g in groups:
        micro += torch.tensor(g).split(cfg.micro_batch)
    padding = padding_share(exp.batch.attention_mask.sum(1), micro)
    return dict(
        width=lib.policy.vlm.width,
        minibatch=cfg.minibatch,
        micro_batch=cfg.micro_batch,
        mflop=flops / cfg.answers / 1e6,
        padding=padding,
        **medians(found[1:]),
    )


REST = "the rest: dispatch, autograd, Python"
COPIES = (*"copy cat clone fill zero empty slice contiguous stack".split(),)
COPIES += ("index", "masked", "scatter", "gather")
ELEMENT_WISE = (*"mul add sub div neg silu mean sum pow rsqrt exp log softmax sigmoid".split(),)
ELEMENT_WISE += ("tanh", "clamp", "maximum", "where", "native_layer_norm", "cos", "sin")
OPS = {  # a kind → how the names of its operations begin
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("scaled_dot_product",),
    "optimiser": ("fused_adam", "foreach", "Optimizer", "linalg_vector_norm"),
    "copies and memory": COPIES,
    "element-wise, norms, softmax": ELEMENT_WISE,
}


def op_shares(cfg: PPOConfig, sizes: VLMConfig | None = None) -> dict[str, float]:
    "Share of an epoch's time that each kind of operation takes, by torch's profiler."
    lib, exp, groups = epoch_of(cfg, sizes)
    lib.update(exp, groups[0])
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        for g in groups:
            lib.update(exp, g)
    out = dict.fromkeys([*OPS, REST], 0.0)
    for event in prof.key_averages():
        out[kind_of(event.key)] += event.self_cpu_time_total
    total = sum(out.values())
    return {k: v / total for k, v in out.items()}


def kind_of(op: str) -> str:
    "Which kind an operation of the profiler belongs to."
    name = op.removeprefix("aten::").lstrip("_")
    if name in OPS["matrix products"]:
        return "matrix products"
    if not op.startswith(("aten::", "Optimizer")):
        return REST
    for kind, starts in OPS.items():
        if kind != "matrix products" and name.startswith(starts):
            return kind
    return REST


# --- tables -----------------------------------------------------------------------------------


def parts_table(result: dict) -> str:
    "Where the time of an iteration goes."
    whole, n = result["parts"]["all"], result["answers"]
    body = [[k, number(1000 * v / n), f"{v / whole:.0%}"] for k, v in result["parts"].items()]
    return table(["part of an iteration", "ms per answer", "share"], body)


def cache_table(result: dict) -> str:
    "Ways to keep keys and values."
    body = [[name, number(1000 * seconds)] for name, seconds in result["caches"].items()]
    return table(["sampling", "ms per answer"], body)


def rows(result: dict) -> str:
    "The tables of README.md."
    first, ways = parts_table(result), cache_table(result)

    def line(r):
        figures = [number(r[k]) for k in ("mflop", "ms", "gflop_per_s", "matmul_gflop_per_s")]
        sizes = [r["width"], r["minibatch"], r["micro_batch"]]
        return [*sizes, f"{r['padding']:.0%}", *figures, f"{r['ratio']:.0%}"]

    head = [
        "width",
        "minibatch",
        "micro-batch",
        "padding",
        "MFLOP an answer",
        "ms an answer",
        "GFLOP/s",
        "large products, GFLOP/s",
        "ratio",
    ]
    second = table(head, [line(r) for r in result["by_batch"] + result["by_width"]])
    shares = [[kind, f"{share:.0%}"] for kind, share in result["ops"].items()]
    third = table(["kind of operation in an update", "share of its time"], shares)
    return "\n\n".join([first, ways, second, third])


def main(argv=None):
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--answers", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--micro-batches", type=int, nargs="*", default=[4, 8, 16, 20, 32, 64])
    parser.add_argument("--widths", type=int, nargs="+", default=[48, 192, 384, 768])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    small = dict(reward=PAID, epochs=1, actor_lr=1e-9, critic_lr=1e-9)
    cfg = PPOConfig(answers=args.answers, minibatch=min(64, args.answers), **small)
    at_once = [replace(cfg, micro_batch=m) for m in args.micro_batches]
    by_batch = [update_rate(c, None, args.rounds) for c in at_once]
    fewer = max(2, args.rounds // 2)
    by_width = [update_rate(cfg, VLMConfig(width=w), fewer) for w in args.widths]
    result = dict(
        answers=cfg.answers,
        rounds=args.rounds,
        parts=parts(cfg, args.rounds),
        caches=caches(cfg, args.rounds),
        by_batch=by_batch,
        by_width=by_width,
        ops=op_shares(cfg),
    )
    print(rows(save("breakdown", result)))


if __name__ == "__main__":
    main()
