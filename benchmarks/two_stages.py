"""What SFT's first stage is worth, and which of its differences does it (chapter 3b):
`python -m benchmarks.two_stages`."""

import argparse
import random
import statistics
import tempfile

from benchmarks.common import save, table
from vlmrlhf_course.model.vlm import answer
from vlmrlhf_course.train.fit import FitConfig, fit
from vlmrlhf_course.train.sft import SFTConfig, SFTTask, learn_part
from vlmrlhf_course.world.judge import judge
from vlmrlhf_course.world.pretrain import pretrained_vlm
from vlmrlhf_course.world.scenes import WorldConfig, make_prompt, sample_scenes
from vlmrlhf_course.world.source import sft_items

HIGH, LOW = 1e-2, 7e-4  # the rates of stage 1 and of stage 2
# (what learns, faithful captions?, rate) in the first half of the steps; the second half is stage 2
SECOND = ("language", False, LOW)
FIRST = {
    "stage 2 from the start": SECOND,
    "stage 1": ("projector", True, HIGH),
    "stage 1 on stage 2's data": ("projector", False, HIGH),
    "stage 1 at stage 2's rate": ("projector", True, LOW),
    "stage 2 on stage 1's data": ("language", True, LOW),
    "stage 2 at stage 1's rate": ("language", False, HIGH),
}


def trained(first: tuple, steps: int, seed: int):
    "The shipped parts and a new projector, after two halves of so many steps."
    vlm, cfg = pretrained_vlm(seed), SFTConfig(pictures=1500)
    for half, (part, faithful, rate) in enumerate((first, SECOND)):
        learn_part(vlm, part)
        items = sft_items(cfg, WorldConfig(), 2 * seed + half, faithful=faithful)
        with tempfile.TemporaryDirectory() as folder:
            fit(SFTTask(vlm), items, FitConfig(steps=steps, lr=rate), folder, "half", seed=seed)
    return vlm


def recall(vlm, pictures: int) -> float:
    "Share of the things in test pictures that a description names, at temperature 1."
    scenes = sample_scenes(pictures, "test")
    asked = [make_prompt(scene, "detail", random.Random(0)) for scene in scenes]
    said = answer(vlm, asked, 1.0, 0)
    return statistics.fmean(judge(text, s).recall for text, s in zip(said, scenes))


def rows(result: dict) -> str:
    "The table of results."
    head = ["first half", *(f"seed {seed}" for seed in result["seeds"]), "mean"]
    lines = []
    for name, recalls in result["recall"].items():
        lines.append([name, *(f"{x:.2f}" for x in [*recalls, statistics.fmean(recalls)])])
    return table(head, lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="of each half")
    parser.add_argument("--pictures", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args(argv)
    found = {}
    for name, first in FIRST.items():
        models = (trained(first, args.steps, seed) for seed in args.seeds)
        found[name] = [recall(vlm, args.pictures) for vlm in models]
        print(name, found[name], flush=True)
    print(rows(save("two_stages", dict(vars(args), recall=found))))


if __name__ == "__main__":
    main()
