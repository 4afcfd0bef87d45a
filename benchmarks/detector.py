"""What a detector of which quality buys PPO (chapter 6c): `python -m benchmarks.detector RUN`, on a
run whose reward models are trained. Not about speed."""

import argparse
from pathlib import Path

from benchmarks.common import save, table
from vlmrlhf_course.base.runs import Run
from vlmrlhf_course.pipeline import obtain, with_source
from vlmrlhf_course.report.evaluate import figures, speak

# labelled pictures → steps of training; 0: no detector, the reward model alone
QUALITIES = {0: 0, 50: 50, 200: 100, 1000: 300, 2000: 600}
COLUMNS = dict(
    precision="things it finds that are there",
    recall="things there that it finds",
    chair_i="false mentions (CHAIR_i)",
    attribute_error="wrong attributes",
    said="recall",
    true_score="true score (0–10)",
)


def overrides(pictures: int, steps: int) -> tuple[str, list[str]]:
    "An arm that is paid by a detector of this quality: its name, and what configures both."
    arm, eyes = f"ppo_seen_{pictures}", f"detector_{pictures}"
    sets = [f"{arm}.kind=ppo", f"{arm}.reward.rm=1"]
    if pictures:
        sets += [f"{arm}.reward.penalty=1", f"{arm}.detector={eyes}", f"{eyes}.kind=detector"]
        sets += [f"{eyes}.pictures={pictures}", f"{eyes}.fit.steps={steps}"]
    return arm, sets


def measure(run: Run, arm: str, pictures: int, scenes: int) -> dict[str, float]:
    "How good the detector is on new pictures, and what the policy says that it paid."
    vlm, role = obtain(run, arm)
    prompts = run.source.prompts("test", scenes, dict(detail=1.0), run.seed)
    said, kl = speak(vlm, prompts, role)
    found = figures(run.source, prompts, said, obtain(run, "reward"), kl)
    row = dict(said=found["recall"])
    row |= {key: found[key] for key in ("chair_i", "attribute_error", "true_score")}
    if pictures:
        quality = run.info(f"detector_{pictures}")["validation"]
        row |= {key: quality[key]["things"] for key in ("precision", "recall")}
    return row


def rows(result: dict) -> str:
    "The table of results."
    lines = []
    for name, row in result["qualities"].items():
        shown = [f"{row[key]:.3f}" if key in row else "" for key in COLUMNS]
        lines.append([f"{name} pictures" if name != "0" else "no detector", *shown])
    return table(["detector learned from", *COLUMNS.values()], lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--scale", default="tiny", help="the one that it was made with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=300)
    args = parser.parse_args(argv)
    arms = {pictures: overrides(pictures, steps) for pictures, steps in QUALITIES.items()}
    sets = [line for _, lines in arms.values() for line in lines]
    run = with_source(Run(args.run, args.scale, sets, seed=args.seed))
    found = {}
    for pictures, (arm, _) in arms.items():
        found[str(pictures)] = measure(run, arm, pictures, args.scenes)
        print(pictures, found[str(pictures)], flush=True)
    how = dict(scale=args.scale, seed=args.seed, scenes=args.scenes)
    print(rows(save("detector", how | dict(qualities=found))))


if __name__ == "__main__":
    main()
