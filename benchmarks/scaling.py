"""Cost against the number of prompts and the length of answers, and memory over many iterations:
`python -m benchmarks.scaling`."""

import argparse
import json
import random
import statistics

import torch

from benchmarks.common import (
    PAID,
    RESULTS,
    Endless,
    Library,
    build,
    fresh_prompts,
    medians,
    number,
    rss,
    save,
    table,
)
from vlmrlhf_course.rl.ppo import PPOConfig
from vlmrlhf_course.rl.rollout import plan_prompts
from vlmrlhf_course.world.llava import VLMConfig


def cost(cfg: PPOConfig, rounds: int, sizes: VLMConfig | None = None) -> dict[str, float]:
    "Seconds of one iteration on new pictures, median over rounds; the first is not counted."
    policy, rm = build(cfg, sizes)
    policy.vlm.__class__ = Endless
    lib, found = Library(policy, rm), []
    for step, prompts in enumerate(fresh_prompts(cfg, cfg.answers, rounds + 1)):
        lib.iteration(prompts, step)
        found.append(lib.take())
    return medians(found[1:])


def exponent(xs, ys) -> float:
    "The power of x that y grows with: the slope of log y over log x. 1: linear."
    logs = [[torch.tensor(float(value)).log().item() for value in values] for values in (xs, ys)]
    return statistics.linear_regression(*logs).slope


def memory(cfg: PPOConfig, iterations: int, sizes: VLMConfig | None = None) -> list[float]:
    "Resident memory in MiB after each iteration of a run that draws from a pool, as `train` does."
    policy, rm = build(cfg, sizes)
    lib, pool, found = Library(policy, rm), fresh_prompts(cfg, cfg.pool, 1)[0], []
    for step in range(iterations):
        lib.iteration(plan_prompts(pool, cfg.answers, random.Random(step)), step)
        found.append(rss() / 2**20)
    return found


def drift(memory: list[float]) -> dict[str, float]:
    """Does memory grow? Slope over the second half, when all pictures of the pool were seen, and
    the growth it makes in 1000 iterations."""
    half = memory[len(memory) // 2 :]
    fit = statistics.linear_regression(range(len(half)), half)
    return dict(
        iterations=len(memory),
        start=memory[0],
        half=half[0],
        end=memory[-1],
        highest=max(memory),
        kib_per_iteration=1024 * fit.slope,
    )


def drawn(result: dict) -> str:
    "What a picture of the curves shows: a test compares the picture's own note with the results."
    return json.dumps([result["by_prompts"], result["by_length"]])


def plot(result: dict):
    "The curves, as `results/scaling.png`."
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    plot_prompts(left, result)
    plot_lengths(right, result)
    fig.tight_layout()
    note = dict(Software=None, Description=drawn(result))
    fig.savefig(RESULTS / "scaling.png", dpi=80, metadata=note)
    plt.close(fig)


def plot_prompts(ax, result: dict):
    "Seconds against the number of prompts, and what linear would be."
    n = [r["prompts"] for r in result["by_prompts"]]
    seconds = [r["all"] for r in result["by_prompts"]]
    ax.loglog(n, seconds, "o-", label="measured")
    ax.loglog(n, [seconds[0] * k / n[0] for k in n], ":", color="grey", label="linear")
    ax.set_xticks(n, n)
    ax.set_yticks(seconds, [number(x) for x in seconds])
    ax.minorticks_off()
    ax.set_xlabel("prompts in an iteration")
    ax.set_ylabel("seconds an iteration")
    ax.legend(fontsize=8)


def plot_lengths(ax, result: dict):
    "Milliseconds an answer against its length, by part of the iteration."
    parts = {"sampling": ("sample",), "scoring": ("score",), "update": ("backward", "step")}
    by_length = result["by_length"]
    heights = []
    for keys in parts.values():
        heights.append([1000 * sum(r[k] for k in keys) / result["answers"] for r in by_length])
    ax.stackplot([r["length"] for r in by_length], heights, labels=parts, alpha=0.8)
    ax.set_xlabel("tokens in an answer")
    ax.set_ylabel("ms an answer")
    ax.legend(fontsize=8, loc="upper left")


def prompts_table(result: dict) -> str:
    "Cost against the number of prompts."
    body = []
    for r in result["by_prompts"]:
        body.append([r["prompts"], number(r["all"]), number(1000 * r["all"] / r["prompts"])])
    return table(["prompts", "s per iteration", "ms per answer"], body)


def lengths_table(result: dict) -> str:
    "Cost against the length of answers."
    head = ["answer length", "s per iteration", "µs per answer token"]
    body = []
    for r in result["by_length"]:
        seconds = r["all"], r["sample"], r["score"], r["backward"] + r["step"]
        per_token = [number(1e6 * x / r["length"] / result["answers"]) for x in seconds]
        body.append([r["length"], number(r["all"]), *per_token])
    return table([*head, "sampling", "scoring", "update"], body)


def memory_table(result: dict) -> str:
    "Resident memory over many iterations."
    m = result["memory"]
    head = ["resident memory, MiB", f"after 1 of {m['iterations']} iterations", "half-way"]
    head += ["at the end", "highest", "slope of the second half, KiB an iteration"]
    figures = [f"{m[k]:.0f}" for k in ("start", "half", "end", "highest")]
    return table(head, [["", *figures, f"{m['kib_per_iteration']:.1f}"]])


def rows(result: dict) -> str:
    "The tables of README.md."
    powers = (
        f"Cost grows with the power {result['prompts_exponent']:.2f} of the number of prompts "
        f"and {result['length_exponent']:.2f} of the answers' length."
    )
    tables = [prompts_table(result), lengths_table(result), powers, memory_table(result)]
    return "\n\n".join(tables)


def main(argv=None):
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 448])
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=200)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    small = dict(reward=PAID, actor_lr=1e-9, critic_lr=1e-9)

    def config(n, length):
        sizes = dict(answers=n, minibatch=min(32, n), max_new_tokens=length)
        return PPOConfig(**sizes, **small)

    by_prompts = [dict(prompts=n, **cost(config(n, 24), args.rounds)) for n in args.prompts]
    by_length = [dict(length=a, **cost(config(args.answers, a), args.rounds)) for a in args.lengths]
    cfg = PPOConfig(answers=16, minibatch=8, pool=160, iterations=args.iterations, **small)
    result = dict(
        answers=args.answers,
        by_prompts=by_prompts,
        by_length=by_length,
        memory=drift(memory(cfg, args.iterations)),
        prompts_exponent=exponent(args.prompts, [r["all"] for r in by_prompts]),
        length_exponent=exponent(args.lengths, [r["all"] for r in by_length]),
    )
    print(rows(save("scaling", result)))
    plot(result)


if __name__ == "__main__":
    main()
