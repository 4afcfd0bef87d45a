"""What a fault in a file of pairs costs (chapter 14): pictures of other pairs, and rows held out in
the place of pictures. `python -m benchmarks.own_pairs`; not about speed."""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

from benchmarks.common import save, table
from vlmrlhf_course.base.records import read_jsonl
from vlmrlhf_course.data.prompts import open_image
from vlmrlhf_course.model.export import save_plain
from vlmrlhf_course.pipeline import course_run, obtain, own_run, speaker_of
from vlmrlhf_course.train.reward import pair_accuracy
from vlmrlhf_course.world.judge import judge, summarise
from vlmrlhf_course.world.source import scene_of

RECIPE = """
reward: {epochs: EPOCHS, fit: {lr: 2.0e-3, batch: 12, micro_batch: 12}}
ppo: {iterations: 12, answers: 96, minibatch: 48, micro_batch: 24, actor_lr: 1.5e-3,
      critic_lr: 4.0e-3, kl_target: 2, max_new_tokens: 72, eval_every: 6}
"""
SHIFTED = {  # column → its figure
    "agrees with people": "accuracy",
    "with exchanged pictures": "swapped",
    "reward at the end": "reward",
    "false mentions (CHAIR_i)": "chair_i",
    "recall": "recall",
}
LEAK = {"training pairs": "train", "validation pairs": "validation", "new pictures": "new"}


class Desk:
    "A folder with a checkpoint and pictures; files of pairs come beside them."

    def __init__(self, folder: Path):
        self.folder, self.world = folder, course_run()
        save_plain(obtain(self.world, "sft"), None, folder / "model")
        self.pairs, _ = obtain(self.world, "preferences")
        names = dict.fromkeys(pair["image"] for pair in self.pairs)
        self.names = {scene: f"pictures/{i}.png" for i, scene in enumerate(names)}
        (folder / "pictures").mkdir()
        for scene, name in self.names.items():
            open_image(scene, 96).save(folder / name)

    def row(self, pair: dict, before: str = "") -> dict:
        said = {key: before + pair[key] for key in ("chosen", "rejected")}
        return dict(image=self.names[pair["image"]], question=pair["prompt"]) | said

    def write(self, name: str, rows: list[dict]) -> str:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / f"{name}.jsonl").write_text(text, "utf-8")
        return str(self.folder / f"{name}.jsonl")

    def run(self, name: str, data: str, seed: int, epochs: float, **more):
        recipe = self.folder / f"{name}.yaml"
        section = f"data: {json.dumps(more)}\n" if more else ""
        recipe.write_text(RECIPE.replace("EPOCHS", str(epochs)) + section, "utf-8")
        return own_run(self.folder / name, self.folder / "model", data, str(recipe), seed=seed)


def truth(desk: Desk, run, stage: str) -> dict[str, float]:
    "False mentions and recall of a stage's answers about pictures that no file holds."
    vlm, role = speaker_of(obtain(run, stage))[0]
    asked = desk.world.source.prompts("test", 200, dict(detail=1.0), "chapter 14")
    said = vlm.answer(asked, seed=1, role=role)
    found = summarise([judge(text, scene_of(p)) for text, p in zip(said, asked)])
    return {key: found[key] for key in ("chair_i", "recall")}


def shifted(desk: Desk, seed: int) -> dict[str, dict]:
    "A run on 2,000 pairs, and one on the same with each picture in the next one's place."
    rows = [desk.row(pair) for pair in desk.pairs[:2000]]
    shown = list(dict.fromkeys(row["image"] for row in rows))
    following = dict(zip(shown, shown[1:] + shown[:1]))
    files = dict(right=rows, shifted=[row | dict(image=following[row["image"]]) for row in rows])
    found = {}
    for name, content in files.items():
        run = desk.run(f"{name}-{seed}", desk.write(f"{name}-{seed}", content), seed, 1.5)
        obtain(run, "ppo")
        info = run.info("reward")
        rewards = [row["reward"] for row in read_jsonl(run.path("ppo") / "metrics.jsonl")]
        figures = dict(accuracy=info["pair_accuracy"]["labels"], reward=rewards[-1])
        figures["swapped"] = info["image_swapped"]["labels"]
        found[name] = figures | truth(desk, run, "ppo")
        found["start"] = truth(desk, run, "sft")
    return found


def leak(desk: Desk, seed: int) -> dict[str, dict]:
    "Each pair twice, with other first words; rows held out at random, or pictures."
    rng = random.Random(seed)
    twice = [desk.row(pair, before) for before in ("", "here ") for pair in desk.pairs[:700]]
    rows = rng.sample(twice, len(twice))
    shown = list(dict.fromkeys(row["image"] for row in twice))
    kept = set(rng.sample(shown, len(shown) // 10))
    by_picture = [[r for r in twice if (r["image"] in kept) == held] for held in (False, True)]
    new = desk.write("new", [desk.row(pair) for pair in desk.pairs[2000:2400]])
    found = {}
    for name, (train, held_out) in dict(rows=(rows[140:], rows[:140]), pictures=by_picture).items():
        paths = [desk.write(f"{name}-{seed}-{i}", part) for i, part in enumerate((train, held_out))]
        run = desk.run(f"leak-{name}-{seed}", paths[0], seed, 8, validation=paths[1], test=new)
        rm, info = obtain(run, "reward"), run.info("reward")
        figures = dict(train=info["train"], validation=info["pair_accuracy"])
        figures["new"] = pair_accuracy(rm, run.source.test_pairs())
        found[name] = {key: value["labels"] for key, value in figures.items()}
    return found


def spread(results: list[dict], name: str, key: str) -> str:
    "Mean over seeds, and the lowest and highest of them."
    values = [result[name][key] for result in results if key in result.get(name, {})]
    if not values:
        return ""
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def shifted_table(result: dict) -> str:
    names = dict(start="before PPO", right="the file", shifted="pictures of other pairs")
    lines = []
    for name, text in names.items():
        figures = [spread(result["shifted"], name, key) for key in SHIFTED.values()]
        lines.append([text, *figures])
    return table(["learned from", *SHIFTED], lines)


def leak_table(result: dict) -> str:
    names = dict(rows="rows, at random", pictures="pictures, with all their rows")
    lines = []
    for name, text in names.items():
        figures = [spread(result["leak"], name, key) for key in LEAK.values()]
        lines.append([text, *figures])
    return table(["held out", *LEAK], lines)


def rows(result: dict) -> str:
    return f"{shifted_table(result)}\n\n{leak_table(result)}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(Path(folder))
        found = dict(
            shifted=[shifted(desk, seed) for seed in range(args.seeds)],
            leak=[leak(desk, seed) for seed in range(args.seeds)],
        )
    print(rows(save("own_pairs", found)))


if __name__ == "__main__":
    main()
