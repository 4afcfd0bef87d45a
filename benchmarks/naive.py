"""The textbook pipeline (`textbook.py`) against the library: `python -m benchmarks.naive`.

Before anything is timed, both sides score the same answers, and every figure and the gradient must
agree."""

import argparse

import torch

from benchmarks.common import (
    PAID,
    Library,
    TowerCount,
    build,
    fresh_prompts,
    medians,
    number,
    save,
    shake,
    table,
)
from benchmarks.textbook import Naive, check
from vlmrlhf_course.rl.ppo import PPOConfig
from vlmrlhf_course.world.llava import VLMConfig


def compare(
    cfg: PPOConfig, rounds: int, sizes: VLMConfig | None = None, atol: float = 2e-4
) -> dict:
    """Check, then time both sides in turn, each round on pictures that neither has seen. The first
    round is not counted."""
    policy, rm = build(cfg, sizes)
    shake(policy, rm)
    lib, naive = Library(policy, rm), Naive(policy, rm, cfg)
    first, *sets = fresh_prompts(cfg, cfg.answers, rounds + 2)
    differences = check(lib, naive, first[:18], atol)
    tower = TowerCount(policy.vlm)
    ours, theirs = [], []
    for step, prompts in enumerate(sets, 1):
        before = tower.images
        lib.take()
        exp = lib.iteration(prompts, step)
        images, tokens = tower.images - before, int(exp.batch.answer_mask.sum())
        ours.append(lib.take() | dict(tokens=tokens, images=images))
        unique = len({p.image for p in prompts if p.image})
        assert images == unique, "the library encodes each picture once while the tower is frozen"

        before = naive.encoded
        naive.clock.take()
        said = naive.iteration(prompts, step)
        images, tokens = naive.encoded - before, sum(e["answer"].shape[1] for e in said)
        theirs.append(naive.clock.take() | dict(tokens=tokens, images=images))
    timings = dict(library=medians(ours[1:]), naive=medians(theirs[1:]))
    sides = [describe(name, t, cfg) for name, t in timings.items()]
    ratios = sorted(n["all"] / o["all"] for n, o in zip(theirs[1:], ours[1:]))
    return dict(
        critic=cfg.critic,
        epochs=cfg.epochs,
        differences=differences,
        sides=sides,
        ratios=ratios,
        ratio=ratios[len(ratios) // 2],
    )


def describe(name: str, t: dict, cfg: PPOConfig) -> dict:
    "A side's figures, in ms an answer."
    n = cfg.answers
    update = t["update"] if name == "naive" else t["backward"] + t["step"]
    return dict(
        side=name,
        critic=cfg.critic,
        epochs=cfg.epochs,
        answers_per_s=n / t["all"],
        sample=t["sample"] * (1000 / n),
        score=t["score"] * (1000 / n),
        update=update * (1000 / n),
        all=1000 * t["all"] / n,
        tokens=t["tokens"] / n,
        images=t["images"] / n,
    )


LABELS = {
    ("library", "head"): "library, critic on the reward model's states",
    ("naive", "head"): "textbook, the same critic as a model of its own",
    ("library", "adapter"): "library, critic with an adapter of its own",
    ("naive", "adapter"): "textbook, critic a model of its own",
}
COLUMNS = {  # of a side's figures → their headings
    "sample": "sampling",
    "score": "scoring",
    "update": "update",
    "all": "all",
    "answers_per_s": "answers/s",
    "tokens": "tokens per answer",
    "images": "images encoded per answer",
}


def rows(result: dict) -> str:
    "The table of README.md."
    head = ["ms per answer", "epochs", *COLUMNS.values(), "textbook / library"]
    body = []
    for part in result["critics"]:
        for side in part["sides"]:
            label = LABELS[side["side"], part["critic"]]
            ratio = f"{part['ratio']:.1f}" if side["side"] == "naive" else ""
            body.append([label, part["epochs"], *(number(side[k]) for k in COLUMNS), ratio])
    return table(head, body)


def main(argv=None):
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--answers", type=int, default=120)
    parser.add_argument("--group", type=int, default=3, help="answers to a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    parts = []
    for critic, epochs in (("head", 1), ("head", 3), ("adapter", 3)):
        cfg = PPOConfig(
            reward=PAID,
            critic=critic,
            epochs=epochs,
            answers=args.answers,
            answers_per_prompt=args.group,
            minibatch=args.answers // 2,
            micro_batch=args.answers // 4,
            actor_lr=1e-9,  # ~0, so that answers stay as long as they are
            critic_lr=1e-9,
        )
        parts.append(compare(cfg, args.rounds))
    result = dict(answers=args.answers, group=args.group, rounds=args.rounds, critics=parts)
    result["sides"] = [side for part in parts for side in part["sides"]]
    print(rows(save("naive", result)))


if __name__ == "__main__":
    main()
