"""Writes the table of model types in appendix D from `model_types.yaml`: `python
tests/model_table.py`."""

import json
from collections import Counter
from pathlib import Path

import yaml

HERE = Path(__file__).parent
TYPES = yaml.safe_load((HERE / "model_types.yaml").read_text("utf-8"))
NOTEBOOK = HERE.parent / "nbs" / "93e_compare.ipynb"
CELL = "types"
RUNS = {
    "own": "a family of its own",
    "general": "the general family",
    "refused": "refused",
    "not tried": "not tried",
}


def table() -> str:
    "The cell: how many types run in which way, and a row for each type."
    counts = Counter(entry["how"] for entry in TYPES.values())
    number = {how: f"{counts[how]} {what}" for how, what in RUNS.items()}
    said = (
        f"Of {len(TYPES)} types, {number['own']} ✓, {number['general']} ✓ or (✓), "
        f"{number['refused']} "
        f"in one line, {number['not tried']}. ✓: run as a tiny random model, and equal to plain "
        "`transformers` in log-probabilities, samples and gradients (`tests/test_all_models.py`). "
        "CI installs neither torchvision nor timm, and types that need one are not run there: (✓) "
        "has the same test, where torchvision is installed. "
        "What was not tried is taken by the general family, which checks itself as it runs."
    )
    rows = ["| type | runs by | |", "|---|---|---|"]
    for kind, entry in sorted(TYPES.items()):
        note = entry.get("note", "")
        ran = ""
        if entry["how"] in ("own", "general"):
            ran = " (✓)" if note.startswith("not in CI") else " ✓"
        rows.append(f"| `{kind}` | {RUNS[entry['how']]}{ran} | {note} |")
    return "\n".join([said, "", *rows])


def cell_of(notebook: dict) -> dict:
    return next(cell for cell in notebook["cells"] if cell["id"] == CELL)


def main():
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    cell_of(notebook)["source"] = table().splitlines(True)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
