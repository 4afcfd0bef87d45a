"""A preference set of real shape: drawn pairs in three public formats, with their pictures.

python tests/drawn_sets.py FOLDER [N] writes N (2000) of each."""

import io
import json
import random
import sys
from pathlib import Path

from datasets import Dataset, Features, Image, Value

from vlmrlhf_course.data.prompts import open_image
from vlmrlhf_course.world.scenes import WorldConfig, careless
from vlmrlhf_course.world.source import sample_prompts

KINDS = dict(detail=0.6, brief=0.1, exists=0.1, colour=0.1, relation=0.1)
SIDE = 32  # pixels: small enough for tiny towers


def pairs(n: int, seed: int = 0) -> list[dict]:
    "What a careful and a careless person say about drawn scenes."
    found, rng = [], random.Random(seed)
    for prompt in sample_prompts(3 * n, "train", KINDS, seed):
        said = careless(prompt, rng, WorldConfig()).answer
        if said != prompt.answer and len(found) < n:
            about = dict(image=prompt.image, prompt=prompt.text)
            found.append(about | dict(chosen=prompt.answer, rejected=said))
    assert len(found) == n
    return found


def png(ref: str) -> bytes:
    file = io.BytesIO()
    open_image(ref, SIDE).save(file, "PNG")
    return file.getvalue()


def rlhf_v(rows: list[dict], folder: Path) -> Path:
    "Parquet like openbmb/RLHF-V-Dataset: pictures inside, texts as JSON in a column."
    records = []
    for i, row in enumerate(rows):
        text = dict(question=row["prompt"], chosen=row["chosen"], rejected=row["rejected"])
        about = dict(ds_name="drawn", origin_dataset="drawn", origin_split="train", idx=i)
        picture = dict(bytes=png(row["image"]), path=None)
        about |= dict(image=picture, image_path=f"{i}.png")
        records.append(about | dict(text=json.dumps(text)))
    texts = ("ds_name", "origin_dataset", "origin_split", "image_path", "text")
    types = dict.fromkeys(texts, Value("string")) | dict(idx=Value("int64"), image=Image())
    Dataset.from_list(records, Features(types)).to_parquet(folder / "rlhf-v.parquet")
    return folder / "rlhf-v.parquet"


def trl(rows: list[dict], folder: Path) -> Path:
    "JSONL with messages, as TRL writes them."
    lines = []
    for i, row in enumerate(rows):
        asked = [dict(type="image"), dict(type="text", text=row["prompt"])]
        record = dict(images=[picture(row, i, folder)], prompt=[dict(role="user", content=asked)])
        for key in ("chosen", "rejected"):
            content = [dict(type="text", text=row[key])]
            record[key] = [dict(role="assistant", content=content)]
        lines.append(json.dumps(record))
    (folder / "trl.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "trl.jsonl"


def llava(rows: list[dict], folder: Path) -> Path:
    "A JSON list like LLaVA-Human-Preference-10K: conversations, two outputs and a choice."
    records = []
    for i, row in enumerate(rows):
        better = 1 + i % 2
        asked = {"from": "human", "value": f"<image>\n{row['prompt']}"}
        record = dict(id=i, image=picture(row, i, folder), preference=better)
        record["conversations"] = [asked, {"from": "gpt", "value": ""}]
        for number, key in ((better, "chosen"), (3 - better, "rejected")):
            record[f"output_{number}"] = {"from": "llava", "value": row[key]}
        records.append(record)
    (folder / "llava.json").write_text(json.dumps(records), "utf-8")
    return folder / "llava.json"


def picture(row: dict, i: int, folder: Path) -> str:
    "The name of a picture beside the file, drawn if it is not there yet."
    file = folder / "pictures" / f"{i}.png"
    if not file.exists():
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_bytes(png(row["image"]))
    return f"pictures/{i}.png"


SETS = {"rlhf-v": rlhf_v, "trl-preference": trl, "llava-preference": llava}


def main(folder: str, n: str = "2000"):
    Path(folder).mkdir(parents=True, exist_ok=True)
    rows = pairs(int(n))
    for name, write in SETS.items():
        print(f"{name}: {write(rows, Path(folder))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
