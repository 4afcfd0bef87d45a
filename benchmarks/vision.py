"""What it buys and costs to let the vision tower learn in SFT's second stage, and how (appendix Z):
`python -m benchmarks.vision`."""

import argparse
import copy
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import save, table
from vlmrlhf_course.model.roles import LoRAConfig
from vlmrlhf_course.model.vision import Modalities, Modality
from vlmrlhf_course.model.vlm import VLM, answer
from vlmrlhf_course.train.fit import FitConfig, fit
from vlmrlhf_course.train.sft import SFTConfig, SFTTask, adapter_of, learn_part, sft_groups
from vlmrlhf_course.world.judge import judge
from vlmrlhf_course.world.pretrain import pretrained_vlm
from vlmrlhf_course.world.scenes import WorldConfig, make_prompt, sample_scenes
from vlmrlhf_course.world.source import sft_items

SLOW = Modalities(tower=Modality(rate=0.1))
STRATEGIES = {
    "V1 frozen": {},
    "V2 thawing": dict(tower_lr=3e-4),
    "V2 thawing, tower at a tenth of the rate": dict(tower_lr=3e-4, modality=SLOW),
    "LoRA in the language model alone": dict(lora=LoRAConfig()),
    "V3 LoRA in the tower, too": dict(lora=LoRAConfig(tower=True)),
}


def begun(steps: int, seed: int) -> VLM:
    "The shipped parts, and a projector that has learned to be read: stage 1."
    vlm, cfg = pretrained_vlm(seed), SFTConfig(pictures=1500)
    learn_part(vlm, "projector")
    items = sft_items(cfg, WorldConfig(), seed, faithful=True)
    with tempfile.TemporaryDirectory() as folder:
        fit(SFTTask(vlm), items, FitConfig(steps=steps, lr=1e-2), folder, "stage 1", seed=seed)
    return vlm


def tried(start: VLM, settings: dict, steps: int, seed: int, pictures: int) -> dict:
    "Stage 2 by one strategy: what it takes, and what the model is then worth."
    vlm = VLM(copy.deepcopy(start.model), start.processor)
    stage = FitConfig(steps=steps, lr=2e-3 if "lora" in settings else 7e-4)
    cfg = SFTConfig(pictures=1500, language=stage, **settings)
    items = sft_items(cfg, WorldConfig(), seed + 1000, faithful=True)
    learn_part(vlm, "language")
    role = adapter_of(vlm, cfg, "language")
    groups, before = sft_groups(vlm, cfg, "language", role), vlm.encoded
    task, started = SFTTask(vlm, role and role.name), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        fit(task, items, stage, Path(folder), "stage 2", groups=groups, seed=seed)
    seconds = time.process_time() - started
    trained = sum(p.numel() for group in groups for p in group.params)
    cost = dict(seconds=seconds, encoded=vlm.encoded - before, trained=trained)
    return cost | worth(task, pictures)


@torch.no_grad()
def worth(task: SFTTask, pictures: int) -> dict:
    "Loss of faithful descriptions of test pictures, and what its own descriptions name and invent."
    scenes = sample_scenes(pictures, "test")
    asked = [make_prompt(scene, "detail", random.Random(0)) for scene in scenes]
    batch = task.collate(asked)
    loss = float(task(batch)[0]) / task.count(batch)
    said = answer(task.vlm, asked, 1.0, 0, role=task.role)
    verdicts = [judge(text, scene) for text, scene in zip(said, scenes)]
    return dict(
        loss=loss,
        recall=statistics.fmean(v.recall for v in verdicts),
        invented=invented(verdicts),
    )


def invented(verdicts: list) -> float:
    "Share of the things that are named and are not there (CHAIR-i, Rohrbach et al. 2018)."
    false, true = (
        sum(len(getattr(v, f"{kind}_objects")) for v in verdicts) for kind in ("false", "true")
    )
    return false / max(1, false + true)


HEAD = ["stage 2", "weights that learn", "pictures encoded", "CPU seconds"]
HEAD += ["loss on test pictures", "recall", "things invented"]


def rows(result: dict) -> str:
    "The table of results: means over seeds, and in brackets the least and the most."
    lines = []
    for name, runs in result["runs"].items():
        line = [name, f"{runs[0]['trained']:,}", f"{runs[0]['encoded']:,}"]
        for key, form in (
            ("seconds", ".0f"),
            ("loss", ".3f"),
            ("recall", ".3f"),
            ("invented", ".3f"),
        ):
            seen = [run[key] for run in runs]
            mean, low, high = (format(f(seen), form) for f in (statistics.fmean, min, max))
            line.append(f"{mean} ({low} to {high})")
        lines.append(line)
    return table(HEAD, lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=60, help="steps of stage 1")
    parser.add_argument("--steps", type=int, default=60, help="of stage 2")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args(argv)
    found = {name: [] for name in STRATEGIES}
    for seed in args.seeds:
        start = begun(args.first, seed)
        for name, settings in STRATEGIES.items():
            run = tried(start, settings, args.steps, seed, args.pictures)
            found[name].append(run)
            print(seed, name, run, flush=True)
    print(rows(save("vision", dict(vars(args), runs=found))))


if __name__ == "__main__":
    main()
