"""TRL 1.16 beside the library: DPO, and GRPO and RLOO beside our PPO. `python -m benchmarks.trl_peer`, where TRL is installed.

The same tiny LLaVA, the same prompts and pairs, answers of one length, the same number of answers and of optimiser steps, one
thread, one process, in turn. TRL may train an adapter (as we do) or all weights (faster at this size). Its reward is a cheap
function; ours runs a reward model, and PPO trains a critic besides."""
import argparse
import statistics
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version

import torch

WANTED = "1.16.0"


def missing() -> str | None:
    "What keeps this from running, in one line."
    try: have = version("trl")
    except PackageNotFoundError: have = None
    if have == WANTED: return None
    remedy = f"in an environment of its own: pip install -c constraints.txt trl=={WANTED}"
    return f"benchmarks.trl_peer: needs TRL {WANTED}, found {have or 'none'}; {remedy}"


# --- TRL's side ---------------------------------------------------------------------------------------------------------------

def settings(folder, **more) -> dict:
    "Settings of a TRL trainer that only trains: nothing saved, logged or checkpointed."
    return dict(output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True, learning_rate=1e-9, max_grad_norm=1., seed=0, optim="adamw_torch_fused", **more)


def adapter():
    "The adapter that the library trains: rank 16 on every linear layer of the language model."
    from peft import LoraConfig
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0., target_modules=r".*language_model.*(q|k|v|o|gate|up|down)_proj")


def chat(prompt): return [{"role": "user", "content": prompt.text}]


def picture(prompt):
    from vlmrlhf_course.world.scenes import open_image
    return open_image(prompt.image)


def preference_rows(pairs):
    from vlmrlhf_course.world.scenes import open_image
    def says(text): return [{"role": "assistant", "content": text}]
    return [dict(prompt=[{"role": "user", "content": r["prompt"]}], chosen=says(r["chosen"]), rejected=says(r["rejected"]),
                 images=[open_image(r["image"])]) for r in pairs]


def few_repeats(completions, **kwargs) -> list[float]:
    "A reward that costs nothing: the share of different words."
    words = [c[0]["content"].split() for c in completions]
    LENGTHS.extend(len(ids) for ids in kwargs["completion_ids"])
    return [len(set(w)) / max(1, len(w)) for w in words]


LENGTHS = []   # of TRL's answers, in tokens


def dpo_trainer(folder, model, processor, pairs, size: int, steps: int, lora: bool):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    args = DPOConfig(**settings(folder), max_length=None, beta=.3, per_device_train_batch_size=size, max_steps=steps)
    return DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(preference_rows(pairs)), processing_class=processor,
                      peft_config=adapter() if lora else None)


def online_trainer(kind: str, folder, model, processor, prompts, cfg, steps: int, lora: bool, fixed: bool):
    "GRPO or RLOO with KL, the library's temperature, epochs and minibatches; `fixed`: every answer has the largest length."
    from datasets import Dataset
    import trl
    rows = [dict(prompt=chat(p), images=[picture(p)]) for p in prompts]
    args = dict(settings(folder), per_device_train_batch_size=cfg.minibatch, steps_per_generation=cfg.answers // cfg.minibatch,
                num_iterations=cfg.epochs, num_generations=cfg.answers_per_prompt,
                max_completion_length=cfg.max_new_tokens, generation_kwargs=dict(min_new_tokens=cfg.max_new_tokens if fixed else 1),
                temperature=cfg.temperature, beta=.05, shuffle_dataset=False, max_steps=steps)
    config, trainer = (trl.GRPOConfig, trl.GRPOTrainer) if kind == "GRPO" else (trl.RLOOConfig, trl.RLOOTrainer)
    return trainer(model=model, args=config(**args), reward_funcs=few_repeats, train_dataset=Dataset.from_list(rows),
                   processing_class=processor, peft_config=adapter() if lora else None)


def in_turn(trainer, steps_a_round: int, ours) -> list[tuple[float, float]]:
    "Train with TRL; after each round of its steps do a round of ours. Seconds of both, round by round: loading data counts on both sides."
    from transformers import TrainerCallback
    from benchmarks.common import Clock
    clock, rounds = Clock(), []

    class Turn(TrainerCallback):
        mark = None
        def on_train_begin(self, *args, **kwargs): self.mark = clock.now()
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % steps_a_round: return
            theirs = clock.now() - self.mark
            start = clock.now()
            ours(len(rounds))
            rounds.append((theirs, clock.now() - start))
            self.mark = clock.now()

    trainer.add_callback(Turn())
    trainer.train()
    return rounds


# --- side by side -----------------------------------------------------------------------------------------------------------------

def their_model(folder):
    "The LLaVA in `folder`, its tower frozen as ours is."
    from transformers import LlavaForConditionalGeneration
    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa")
    model.model.vision_tower.requires_grad_(False)
    return model


def compare_online(kind: str, folder, cfg, rounds: int, lora: bool, fixed: bool):
    """PPO beside GRPO or RLOO: (their seconds, ours) for each round of `cfg.answers` answers; pictures encoded and tokens an answer,
    theirs and ours. Ours answers the same prompts as often."""
    from benchmarks.common import Endless, Library, TowerCount, build, fresh_prompts
    from vlmrlhf_course.model.vlm import VLM, load_vlm
    policy, rm = build(cfg, vlm=load_vlm(folder))
    if fixed: policy.vlm.__class__ = Endless
    lib, prompts = Library(policy, rm, cfg), fresh_prompts(cfg, cfg.answers, rounds + 1)
    steps, model = cfg.epochs * (cfg.answers // cfg.minibatch), their_model(folder)
    trainer = online_trainer(kind, folder / "out", model, load_vlm(folder).processor, [p for r in prompts for p in r[::cfg.answers_per_prompt]], cfg,
                             steps * (rounds + 1), lora, fixed)
    towers, lengths = [TowerCount(VLM(model, policy.vlm.processor)), TowerCount(policy.vlm)], []
    LENGTHS.clear()
    def ours(step): lengths.extend(lib.iteration(prompts[step], step)[0].batch.lengths.tolist())
    found, n = in_turn(trainer, steps, ours), cfg.answers * (rounds + 1)
    assert len(found) == rounds + 1 and trainer.state.global_step == steps * (rounds + 1) and len(lengths) == len(LENGTHS) == n
    assert not fixed or {*lengths, *LENGTHS} == {cfg.max_new_tokens}
    return found[1:], [t.images / n for t in towers], [sum(x) / n for x in (LENGTHS, lengths)]


def compare_dpo(folder, size: int, steps: int, lora: bool):
    "DPO on the same pairs, step by step: (their seconds, ours); pictures encoded a pair, theirs and ours."
    import random
    from benchmarks.common import TowerCount, fresh_prompts
    from vlmrlhf_course.train.dpo import DPOTask
    from vlmrlhf_course.rl.ppo import PPOConfig
    from vlmrlhf_course.base.runs import make_accelerator
    from vlmrlhf_course.train.sft import backward_through, careless
    from vlmrlhf_course.model.vlm import VLM, load_vlm
    prompts, rng = fresh_prompts(PPOConfig(), size * (steps + 1), 1)[0], random.Random(0)
    pairs = [dict(image=p.image, prompt=p.text, chosen=p.answer, rejected=careless(p, rng).answer) for p in prompts]
    model, vlm = their_model(folder), load_vlm(folder)
    vlm.model.requires_grad_(False)
    vlm.add_role("dpo")
    params = [p for p in vlm.model.parameters() if p.requires_grad]
    accelerator = make_accelerator()
    task, optimizer = accelerator.prepare(DPOTask(vlm, .3), torch.optim.AdamW(params, 1e-9, fused=True))

    def ours(step):
        backward_through(task, [[r] for r in pairs[step * size:(step + 1) * size]], size, accelerator)
        accelerator.clip_grad_norm_(params, 1.)
        optimizer.step(); optimizer.zero_grad()

    towers = [TowerCount(VLM(model, vlm.processor)), TowerCount(vlm)]
    found = in_turn(dpo_trainer(folder / "out", model, load_vlm(folder).processor, pairs, size, steps + 1, lora), 1, ours)
    assert len(found) == steps + 1
    return found[1:], [t.images / len(pairs) for t in towers]


def summary(method: str, found, images, tokens, unit: str, n: int, ours: str, lora: bool, epochs: int | None = None) -> dict:
    "Both sides' rates, and the median of the rounds' ratios."
    theirs, mine = (statistics.median(x) for x in zip(*found))
    ratios = sorted(t / m for t, m in found)
    return dict(method=method, epochs=epochs, trained="adapter" if lora else "language model", unit=unit, ours=ours, tokens=tokens, images=images,
                trl_per_s=n / theirs, ours_per_s=n / mine, ratios=ratios, ratio=statistics.median(ratios))


def rows(result: dict) -> str:
    "The table of README.md."
    from benchmarks.common import number, table
    head = ["TRL", "epochs", "TRL trains", "ours", "tokens an answer (TRL, ours)", "pictures encoded (TRL, ours)", "TRL", "ours", "ours / TRL"]
    def two(x): return f"{x[0]:.1f}, {x[1]:.1f}" if x else "the same"
    body = table(head, [[p["method"], p["epochs"] or "", p["trained"], p["ours"], two(p["tokens"]), ", ".join(number(x) for x in p["images"]),
                         f"{number(p['trl_per_s'])} {p['unit']}/s", f"{number(p['ours_per_s'])} {p['unit']}/s",
                         f"{p['ratio']:.2f}"] for p in result["pairs"]])
    def named(wanted): return "; ".join(f"{p['method']}, {p['epochs']} epoch{'s' * (p['epochs'] > 1)}, {p['tokens'][0]:.0f} tokens ({p['ratio']:.2f})" for p in result["pairs"]
                                        if p["tokens"] and p["trained"] == "adapter" and p["ours"] == LABELS["head"] and wanted(p["ratio"])) or "none"
    return f"{body}\n\nTwice TRL's rate or more, adapter against adapter: {named(lambda r: r >= 2)}. Less: {named(lambda r: r < 2)}."


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=128)
    parser.add_argument("--group", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=16, help="pairs a DPO step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=["DPO", "GRPO", "RLOO"])
    args = parser.parse_args(argv)
    if line := missing():
        print(line, file=sys.stderr)
        return 2
    import pathlib
    from benchmarks.common import save
    from vlmrlhf_course.rl.ppo import PPOConfig
    from vlmrlhf_course.train.sft import pretrained_vlm
    from vlmrlhf_course.model.vlm import save_vlm
    torch.set_num_threads(1)
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder) / "llava"
        save_vlm(pretrained_vlm(), folder)
        for lora in (True, False) if "DPO" in args.methods else ():
            found, images = compare_dpo(folder, args.pairs, 4 * args.rounds, lora)
            pairs.append(summary("DPO", found, images, None, "pairs", args.pairs, "DPO", lora))
        for kind, critic, lora, fixed, epochs in [p for p in ONLINE if p[0] in args.methods]:
            cfg = PPOConfig(reward="rm", critic=critic, epochs=epochs, answers=args.answers, answers_per_prompt=args.group,
                            minibatch=args.answers // 2, micro_batch=args.answers // 2,
                            max_new_tokens=args.new_tokens if fixed else PPOConfig.max_new_tokens, actor_lr=1e-9, critic_lr=1e-9)
            found, images, tokens = compare_online(kind, folder, cfg, args.rounds, lora, fixed)
            pairs.append(summary(kind, found, images, tokens, "answers", args.answers, LABELS[critic], lora, epochs))
    sides = [dict(side=side, method=p["method"] if side == "trl" else p["ours"], beside=p["method"],
                  trained=p["trained"] if side == "trl" else "adapter",
                  tokens=p["tokens"] and p["tokens"][side == "ours"],
                  **{f"{p['unit']}_per_s": p[f"{side}_per_s"]}) for p in pairs for side in ("trl", "ours")]
    result = dict(trl=version("trl"), answers=args.answers, group=args.group, new_tokens=args.new_tokens, rounds=args.rounds, pairs=pairs, sides=sides)
    print(rows(save("trl_peer", result)))
    return 0


LABELS = dict(head="PPO, critic on the reward model's states", adapter="PPO, critic with an adapter of its own")
# method, our critic, does TRL train an adapter, fixed length, epochs (TRL's `num_iterations`, 1 by default there, 3 here)
ONLINE = [("GRPO", "head", True, True, 1), ("GRPO", "head", True, False, 1), ("GRPO", "head", True, True, 3), ("GRPO", "head", True, False, 3),
          ("GRPO", "head", False, False, 3), ("GRPO", "adapter", True, False, 3), ("RLOO", "head", True, False, 1), ("RLOO", "head", True, False, 3)]


if __name__ == "__main__": sys.exit(main())
