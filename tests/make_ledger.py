"""Write tests/ledger.json from a run's report.json: the numbers that README.md may quote.  python tests/make_ledger.py runs/tiny-seed-0/report.json"""
import json
import sys
from pathlib import Path

ROWS = ("sft", "sft_blank", "best_of_n", "ppo_rm", "ppo", "gold")
COLUMNS = ("chair_i", "recall", "attribute_error", "relation_error", "facts", "length", "true_score", "kl")


def ledger(report: dict) -> dict[str, str]:
    "Name → the number as it is printed."
    cells = {f"{row}.{col}": f"{report[row][col]:.3f}" if report[row][col] < 1 else f"{report[row][col]:.1f}" for row in ROWS for col in COLUMNS}
    rm = {f"reward_model.{k}": f"{v:.3f}" for k, v in report["reward_model"].items()}
    return cells | rm


if __name__ == "__main__":
    report = json.loads(Path(sys.argv[1]).read_text())
    Path(__file__).with_name("ledger.json").write_text(json.dumps(ledger(report), indent=1) + "\n")
