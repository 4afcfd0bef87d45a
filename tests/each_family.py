"""Every family on every public format, by one command each, at seconds' scale.

python tests/each_family.py FOLDER [PART…] writes `table.md` there; a PART picks pairs by a piece of
`family/format`."""

import itertools
import json
import sys
import time
from pathlib import Path

from drawn_sets import SETS, pairs
from own_data import SECONDS, recipe
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from vlmrlhf_course.cli import main
from vlmrlhf_course.model.family import FAMILIES, tiny_model
from vlmrlhf_course.model.vlm import VLM, save_vlm

N = 160  # pairs of each file
MORE = SECONDS.replace("reward: {epochs: 4,", "reward: {epochs: 6,")  # there is much to learn
ROW = "| {name} | {format} | {accuracy:.2f} | {pixels:.2f} | {loads} | {seconds:.0f} s |"
HEAD = "| family | format | pair accuracy | pictures exchanged | exported policy loads | time |"


def checkpoint(kind: str, rows: list[dict], folder: Path) -> Path:
    "A tiny model that knows the words of some pairs, saved by plain libraries."
    said = " ".join(row[key] for row in rows for key in ("prompt", "chosen", "rejected"))
    words = sorted({*said.split(), "user", "assistant", ":"})
    if not folder.exists():
        save_vlm(VLM(*tiny_model(kind, words)), folder)
    return folder


def tried(kind: str, format: str, rows: list[dict], folder: Path) -> dict:
    "What comes of `vlmrlhf run` and `export` for one family and one format."
    started, out = time.time(), folder / f"{kind}-{format}"
    model = checkpoint(kind, rows, folder / kind)
    files = {name: write for name, write in SETS.items() if name == format}
    data = files[format](rows, folder)
    given = ["--model", model, "--data", data, "--config", recipe(folder, MORE), "--out", out]
    assert main(list(map(str, ["run", *given]))) == 0, "run"
    assert main(["export", f"{out}/ppo", "--to", f"{out}/adapter"]) == 0, "export"
    assert main(["export", f"{out}/ppo", "--to", f"{out}/merged", "--merge"]) == 0, "merge"
    trunk = AutoModelForImageTextToText.from_pretrained(model)
    PeftModel.from_pretrained(trunk, f"{out}/adapter")
    _, info = AutoModelForImageTextToText.from_pretrained(f"{out}/merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    done = json.loads((out / "reward" / "done.json").read_text("utf-8"))
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert {"reward", "kl", "wins"} <= report["ppo"].keys()
    accuracy = done["pair_accuracy"]["labels"], done["image_ablated"]["labels"]
    loads, seconds = "peft, whole", time.time() - started
    found = dict(accuracy=accuracy[0], pixels=accuracy[1], loads=loads, seconds=seconds)
    return found | dict(name=kind, format=format)


def table(folder: Path, wanted: tuple[str, ...] = ("",), n: int = N) -> list[dict]:
    "One row for each pair that is wanted; the file grows while they are made."
    folder.mkdir(parents=True, exist_ok=True)
    rows, found = pairs(n), []
    lines = [HEAD, "|---|---|---|---|---|---|"]
    for kind, format in itertools.product(FAMILIES, SETS):
        if any(part in f"{kind}/{format}" for part in wanted):
            found.append(tried(kind, format, rows, folder))
            lines.append(ROW.format(**found[-1]))
            (folder / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
    return found


if __name__ == "__main__":
    table(Path(sys.argv[1]), tuple(sys.argv[2:]) or ("",))
    print((Path(sys.argv[1]) / "table.md").read_text("utf-8"))
