"""Write tests/ledger.json, README.md's tables and the figures that chapters quote from `vlmrlhf run --seeds 3`: the report of seed 0, and the spread over all.

    python tests/make_ledger.py runs/tiny-seed-0"""
import json
import re
import statistics
import sys
from pathlib import Path

REPO = Path(__file__).parent.parent
ROWS = {"sft": "SFT", "sft_greedy": "SFT, temperature 0", "sft_blank": "SFT, picture blanked", "best_of_n": "best of 8, by the reward model",
        "ppo_rm": "PPO on the reward model", "ppo": "**PPO on reward model + penalty**", "ppo_greedy": "the same, temperature 0",
        "gold": "PPO on the exact score (what a perfect judge would give)"}
COLUMNS = {"chair_i": "false mentions (CHAIR_i)", "recall": "recall of true things", "attribute_error": "wrong attributes",
           "relation_error": "wrong relations", "facts": "true facts per answer", "length": "words", "true_score": "true score (0–10)",
           "kl": "KL (nats)"}
REWARD_MODEL = {"pair_accuracy": "agrees with the annotators", "pair_accuracy_gold": "agrees with the truth",
                "image_ablated": "… with the picture blanked", "text_ablated": "… with the question removed",
                "kappa": "annotators among themselves (Fleiss' kappa)"}


SPREAD = {"sft": "SFT", "best_of_n": "best of 8, by the reward model", "ppo_rm": "PPO on the reward model", "ppo": "**PPO on reward model + penalty**",
          "gold": "PPO on the exact score (what a perfect judge would give)"}


def shown(value: float) -> str: return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def ledger(report: dict) -> dict[str, str]:
    "Name → the number as it is printed."
    cells = {f"{row}.{col}": shown(report[row][col]) for row in ROWS for col in COLUMNS}
    return cells | {f"reward_model.{k}": f"{report['reward_model'][k]:.3f}" for k in REWARD_MODEL}


def over_seeds(reports: list[dict]) -> dict[str, str]:
    "Mean and standard deviation over runs, and how far false mentions fall in the mean and in each run."
    def pm(xs): return f"{statistics.fmean(xs):.3f} ± {statistics.stdev(xs):.3f}"
    found = {f"seeds.{row}.{col}": pm([r[row][col] for r in reports]) for row in SPREAD for col in ("chair_i", "recall", "attribute_error")}
    for row in [*SPREAD][1:]:
        found[f"seeds.{row}.fall"] = ", ".join(f"{1 - r[row]['chair_i'] / r['sft']['chair_i']:.0%}" for r in reports)
    return found


def tables(numbers: dict[str, str]) -> str:
    "The README's tables."
    lines = ["| 300 held-out pictures | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(numbers[f"{row}.{col}"] for col in COLUMNS) + " |" for row, name in ROWS.items()]
    lines += ["", "| three seeds, mean ± standard deviation | false mentions | recall | wrong attributes | false mentions less than SFT's, by seed |",
              "|---" * 5 + "|"]
    for row, name in SPREAD.items():
        cells = [numbers.get(f"seeds.{row}.{col}", "") for col in ("chair_i", "recall", "attribute_error", "fall")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| reward model | on held-out pairs |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {numbers[f'reward_model.{key}']} |" for key, name in REWARD_MODEL.items()])


if __name__ == "__main__":
    reports = [json.loads(file.read_text("utf-8")) for file in sorted(Path(sys.argv[1]).glob("seed-*/report.json"))]
    numbers = ledger(reports[0]) | over_seeds(reports)
    (REPO / "tests" / "ledger.json").write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", "utf-8")
    readme = REPO / "README.md"
    new = f"<!-- table -->\n{tables(numbers)}\n<!-- /table -->"
    readme.write_text(re.sub(r"<!-- table -->.*?<!-- /table -->", lambda m: new, readme.read_text("utf-8"), flags=re.S), "utf-8")
    for chapter in (REPO / "nbs").glob("*.ipynb"):   # `0.123<!--ppo.chair_i-->`
        text = chapter.read_text("utf-8")
        quoted = re.sub(r"[\d.]+<!--([\w.]+)-->", lambda m: f"{numbers[m[1]]}<!--{m[1]}-->" if m[1] in numbers else m[0], text)
        if quoted != text: chapter.write_text(quoted, "utf-8")
