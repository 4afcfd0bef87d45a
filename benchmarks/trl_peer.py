"""TRL 1.16 beside the library: DPO, and GRPO and RLOO beside our PPO.

Run `python -m benchmarks.trl_peer` where TRL is installed.

The same tiny LLaVA, the same prompts and pairs, answers of one length, the same number of answers
and of optimiser steps, one thread, one process, in turn. TRL may train an adapter (as we do) or all
weights (faster at this size). Its reward is a cheap function; ours runs a reward model, and PPO
trains a critic besides."""

import argparse
import statistics
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.trl_side import LENGTHS, dpo_trainer, in_turn, online_trainer, their_model

WANTED = "1.16.0"
LABELS = dict(
    head="PPO, critic on the reward model's states",
    adapter="PPO, critic with an adapter of its own",
)
# method, our critic, does TRL train an adapter, fixed length, epochs (TRL's `num_iterations`, 1 by
# default there, 3 here)
ONLINE = [
    ("GRPO", "head", True, True, 1),
    ("GRPO", "head", True, False, 1),
    ("GRPO", "head", True, True, 3),
    ("GRPO", "head", True, False, 3),
    ("GRPO", "head", False, False, 3),
    ("GRPO", "adapter", True, False, 3),
    ("RLOO", "head", True, False, 1),
    ("RLOO", "head", True, False, 3),
]
HEAD = [
    "TRL",
    "epochs",
    "TRL trains",
    "ours",
    "tokens an answer (TRL, ours)",
    "pictures encoded (TRL, ours)",
    "TRL",
    "ours",
    "ours / TRL",
]


def missing() -> str | None:
    "What keeps this from running, in one line."
    try:
        have = version("trl")
    except PackageNotFoundError:
        have = None
    if have == WANTED:
        return None
    remedy = f"in an environment of its own: pip install -c constraints.txt trl=={WANTED}"
    return f"benchmarks.trl_peer: needs TRL {WANTED}, found {have or 'none'}; {remedy}"


# --- side by side -----------------------------------------------------------------------------


def compare_online(kind: str, folder, cfg, rounds: int, lora: bool, fixed: bool):
    """PPO beside GRPO or RLOO: (their seconds, ours) for each round of `cfg.answers` answers;
    pictures encoded and tokens an answer, theirs and ours. Ours answers the same prompts as
    often."""
    from benchmarks.common import Endless, Library, TowerCount, build, fresh_prompts
    from vlmrlhf_course.model.vlm import load_vlm

    policy, rm = build(cfg, vlm=load_vlm(folder))
    if fixed:
        policy.vlm.__class__ = Endless
    lib, prompts = Library(policy, rm), fresh_prompts(cfg, cfg.answers, rounds + 1)
    steps, model = cfg.epochs * (cfg.answers // cfg.minibatch), their_model(folder)
    all_steps, processor = steps * (rounds + 1), load_vlm(folder).processor
    asked = [p for answers in prompts for p in answers[:: cfg.answers_per_prompt]]
    out = folder / "out"
    trainer = online_trainer(kind, out, model, processor, asked, cfg, all_steps, lora, fixed)
    towers, lengths = [TowerCount(policy.vlm, model), TowerCount(policy.vlm)], []
    LENGTHS.clear()

    def ours(step):
        exp = lib.iteration(prompts[step], step)
        lengths.extend(exp.batch.lengths.tolist())

    found, n = in_turn(trainer, steps, ours), cfg.answers * (rounds + 1)
    assert len(found) == rounds + 1
    assert trainer.state.global_step == all_steps
    assert len(lengths) == len(LENGTHS) == n
    assert not fixed or {*lengths, *LENGTHS} == {cfg.max_new_tokens}
    return found[1:], [t.images / n for t in towers], [sum(x) / n for x in (LENGTHS, lengths)]


def compare_dpo(folder, size: int, steps: int, lora: bool):
    """DPO on the same pairs, step by step: (their seconds, ours); pictures encoded a pair, theirs
    and ours."""
    import random

    from benchmarks.common import TowerCount, fresh_prompts
    from vlmrlhf_course.base.launch import make_accelerator
    from vlmrlhf_course.model.vlm import load_vlm
    from vlmrlhf_course.rl.ppo import PPOConfig
    from vlmrlhf_course.train.dpo import DPOConfig, DPOTask
    from vlmrlhf_course.train.fit import backward_through
    from vlmrlhf_course.world.scenes import careless

    prompts, rng = fresh_prompts(PPOConfig(), size * (steps + 1), 1)[0], random.Random(0)
    pairs = []
    for p in prompts:
        rejected = careless(p, rng).answer
        pairs.append(dict(image=p.image, prompt=p.text, chosen=p.answer, rejected=rejected))
    model, vlm = their_model(folder), load_vlm(folder)
    vlm.model.requires_grad_(False)
    task, accelerator = DPOTask(vlm, DPOConfig(beta=0.3)), make_accelerator()
    params = task.role.trained()
    task, optimizer = accelerator.prepare(task, torch.optim.AdamW(params, 1e-9, fused=True))

    def ours(step):
        rows = [[pair] for pair in pairs[step * size : (step + 1) * size]]
        backward_through(task, rows, size, accelerator)
        accelerator.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    towers = [TowerCount(vlm, model), TowerCount(vlm)]
    processor = load_vlm(folder).processor
    trainer = dpo_trainer(folder / "out", model, processor, pairs, size, steps + 1, lora)
    found = in_turn(trainer, 1, ours)
    assert len(found) == steps + 1
    return found[1:], [t.images / len(pairs) for t in towers]


def summary(
    method: str,
    found,
    images,
    tokens,
    unit: str,
    n: int,
    ours: str,
    lora: bool,
    epochs: int | None = None,
) -> dict:
    "Both sides' rates, and the median of the rounds' ratios."
    theirs, mine = (statistics.median(x) for x in zip(*found))
    ratios = sorted(t / m for t, m in found)
    return dict(
        method=method,
        epochs=epochs,
        trained="adapter" if lora else "language model",
        unit=unit,
        ours=ours,
        tokens=tokens,
        images=images,
        trl_per_s=n / theirs,
        ours_per_s=n / mine,
        ratios=ratios,
        ratio=statistics.median(ratios),
    )


def rows(result: dict) -> str:
    "The table of README.md."
    from benchmarks.common import number, table

    body = []
    for p in result["pairs"]:
        tokens = "{:.1f}, {:.1f}".format(*p["tokens"]) if p["tokens"] else "the same"
        images = ", ".join(number(x) for x in p["images"])
        rates = [f"{number(p[rate])} {p['unit']}/s" for rate in ("trl_per_s", "ours_per_s")]
        first = [p["method"], p["epochs"] or "", p["trained"], p["ours"], tokens, images]
        body.append([*first, *rates, f"{p['ratio']:.2f}"])
    twice = named(result["pairs"], lambda ratio: ratio >= 2)
    less = named(result["pairs"], lambda ratio: ratio < 2)
    said = f"Twice TRL's rate or more, adapter against adapter: {twice}. Less: {less}."
    return f"{table(HEAD, body)}\n\n{said}"


def named(pairs: list[dict], wanted) -> str:
    "The comparisons of adapter against adapter whose ratio is wanted, in words."
    found = []
    for p in pairs:
        if p["tokens"] and p["trained"] == "adapter" and wanted(p["ratio"]):
            epochs = f"{p['epochs']} epoch{'s' * (p['epochs'] > 1)}"
            critic = "" if p["ours"] == LABELS["head"] else ", against a critic of its own"
            tokens = f"{p['tokens'][0]:.0f} tokens{critic}"
            found.append(f"{p['method']}, {epochs}, {tokens} ({p['ratio']:.2f})")
    return "; ".join(found) or "none"


def one_side(side: str, p: dict) -> dict:
    "TRL's figures of a comparison, or ours."
    theirs = side == "trl"
    return dict(
        side=side,
        method=p["method"] if theirs else p["ours"],
        beside=p["method"],
        trained=p["trained"] if theirs else "adapter",
        tokens=p["tokens"] and p["tokens"][0 if theirs else 1],
        **{f"{p['unit']}_per_s": p[f"{side}_per_s"]},
    )


def measure(folder, args) -> list[dict]:
    "Every comparison that was asked for, with the LLaVA in `folder`."
    from vlmrlhf_course.rl.ppo import PPOConfig

    pairs = []
    if "DPO" in args.methods:
        for lora in (True, False):
            found, images = compare_dpo(folder, args.pairs, 4 * args.rounds, lora)
            pairs.append(summary("DPO", found, images, None, "pairs", args.pairs, "DPO", lora))
    for kind, critic, lora, fixed, epochs in ONLINE:
        if kind not in args.methods:
            continue
        cfg = PPOConfig(
            reward=dict(rm=1.0),
            critic=critic,
            epochs=epochs,
            answers=args.answers,
            answers_per_prompt=args.group,
            minibatch=args.answers // 2,
            micro_batch=args.answers // 2,
            max_new_tokens=args.new_tokens if fixed else PPOConfig.max_new_tokens,
            actor_lr=1e-9,
            critic_lr=1e-9,
        )
        found, images, tokens = compare_online(kind, folder, cfg, args.rounds, lora, fixed)
        what = "answers", args.answers, LABELS[critic], lora, epochs
        pairs.append(summary(kind, found, images, tokens, *what))
    return pairs


def main(argv=None) -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--answers", type=int, default=128)
    parser.add_argument("--group", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=16, help="pairs a DPO step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=["DPO", "GRPO", "RLOO"])
    args = parser.parse_args(argv)
    line = missing()
    if line:
        print(line, file=sys.stderr)
        return 2
    from benchmarks.common import save
    from vlmrlhf_course.model.vlm import save_vlm
    from vlmrlhf_course.world.pretrain import pretrained_vlm

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "llava"
        save_vlm(pretrained_vlm(), folder)
        pairs = measure(folder, args)
    sides = [one_side(side, p) for p in pairs for side in ("trl", "ours")]
    asked = dict(answers=args.answers, group=args.group, new_tokens=args.new_tokens)
    result = dict(trl=version("trl"), **asked, rounds=args.rounds, pairs=pairs, sides=sides)
    print(rows(save("trl_peer", result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
