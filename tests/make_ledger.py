"""Write tests/ledger.json, README.md's tables and the figures that chapters quote.

They come from `vlmrlhf run --seeds 3`: the report of seed 0, and the spread over all.

python tests/make_ledger.py runs/tiny-seed-0    # from its reports
python tests/make_ledger.py                     # README.md alone, from the ledger as it is"""

import json
import re
import statistics
import sys
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vlmrlhf_course.base.config import arms_layer
from vlmrlhf_course.report.page import row_names

REPO = Path(__file__).parent.parent
LEDGER, README = REPO / "tests" / "ledger.json", REPO / "README.md"
PICTURE = REPO / "nbs" / "before_after.png"
ARMS = "dpo grpo ppo_rm ppo_detector oracle".split()
SHOWN = "sft sft_greedy sft_blank sft_cooled best_of_n".split()
SHOWN += [row for arm in ARMS for row in (arm, f"{arm}_greedy")]
COLUMNS = {
    "chair_i": "false mentions (CHAIR_i)",
    "repeats": "repeats",
    "recall": "recall of true things",
    "attribute_error": "wrong attributes",
    "relation_error": "wrong relations",
    "facts": "true facts per answer",
    "length": "words",
    "true_score": "true score (0–10)",
    "kl": "KL (nats)",
    "pope_accuracy": "POPE accuracy",
    "pope_yes_rate": "POPE yes-rate",
    "novel_chair_i": "false mentions, unseen combinations",
    "novel_recall": "recall, unseen combinations",
    "iterations": "iterations",
}
SPREAD_COLUMNS = {
    "chair_i": "false mentions",
    "recall": "recall",
    "pope_accuracy": "POPE accuracy",
    "novel_chair_i": "false mentions, unseen combinations",
    "fall": "false mentions less than SFT's, by seed",
    "below": "the same as a difference, by seed (± half the 95 % interval over pictures)",
}
SEEDS = "three seeds, mean ± standard deviation"
REWARD_MODEL = {
    "pair_accuracy": "agrees with the annotators",
    "pair_accuracy_gold": "agrees with the truth",
    "image_ablated": "… with the picture blanked",
    "text_ablated": "… with the question removed",
    "kappa": "annotators among themselves (Fleiss' kappa)",
}


def names() -> dict[str, str]:
    "Rows as the report calls them; the headline in bold, and of best of n how many."
    layers = arms_layer()
    evaluate = layers["evaluate"]
    headline = evaluate["headline"]
    called = row_names({arm: layers[arm]["label"] for arm in evaluate["arms"]})
    bold = {headline: f"**{called[headline]}**"}
    return called | bold | dict(best_of_n="best of 8, by the reward model")


def shown(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def ledger(report: dict) -> dict[str, str]:
    "Name → the number as it is printed; what a row does not have (SFT no iterations) is no entry."
    cells = {}
    for row in SHOWN:
        known = [col for col in COLUMNS if col in report[row]]
        cells |= {f"{row}.{col}": shown(report[row][col]) for col in known}
    return cells | {f"reward_model.{k}": f"{report['reward_model'][k]:.3f}" for k in REWARD_MODEL}


def over_seeds(reports: list[dict]) -> dict[str, str]:
    """Mean and standard deviation over runs, and how far false mentions fall in each run: of a
    greedy row against SFT's greedy answers, of any other against those at temperature 1."""
    found = {}
    for row in SHOWN:
        for col in [col for col in SPREAD_COLUMNS if col not in ("fall", "below")]:
            values = [report[row][col] for report in reports]
            mean, std = statistics.fmean(values), statistics.stdev(values)
            found[f"seeds.{row}.{col}"] = f"{mean:.3f} ± {std:.3f}"
            found[f"mean.{row}.{col}"] = f"{mean:.3f}"
    for row in [row for row in SHOWN if row not in ("sft", "sft_greedy", "sft_blank")]:
        base = "sft_greedy" if row.endswith("_greedy") else "sft"
        falls = [1 - report[row]["chair_i"] / report[base]["chair_i"] for report in reports]
        found[f"seeds.{row}.fall"] = ", ".join(f"{fall:.0%}" for fall in falls)
        found[f"seeds.{row}.below"] = ", ".join(below(report[row]) for report in reports)
    return found


def below(row: dict) -> str:
    "How far CHAIR_i is below SFT's at the same temperature, over the same pictures."
    low, high = row["intervals"]["below_sft"]
    return f"{row['below_sft']:.3f} ± {(high - low) / 2:.3f}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    "Lines of a table in Markdown."
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def tables(numbers: dict[str, str]) -> str:
    "The README's tables."
    called = names()
    one = [[called[row], *(numbers.get(f"{row}.{col}", "") for col in COLUMNS)] for row in SHOWN]
    many = []
    for row in SHOWN:
        cells = [numbers.get(f"seeds.{row}.{col}", "") for col in SPREAD_COLUMNS]
        many.append([called[row], *cells])
    judge = [[name, numbers[f"reward_model.{key}"]] for key, name in REWARD_MODEL.items()]
    lines = table(["300 held-out pictures", *COLUMNS.values()], one)
    lines += ["", *table([SEEDS, *SPREAD_COLUMNS.values()], many)]
    lines += ["", *table(["reward model", "on held-out pairs"], judge)]
    return "\n".join(lines)


def write_readme(numbers: dict[str, str]):
    "Put the tables between their marks."
    new = f"<!-- table -->\n{tables(numbers)}\n<!-- /table -->"
    old, marks = README.read_text("utf-8"), r"<!-- table -->.*?<!-- /table -->"
    README.write_text(re.sub(marks, lambda m: new, old, flags=re.S), "utf-8")


def write_chapters(numbers: dict[str, str]):
    "Renew what chapters quote as `0.123<!--ppo.chair_i-->`."

    def renewed(quote):
        name = quote[1]
        return f"{numbers[name]}<!--{name}-->" if name in numbers else quote[0]

    for chapter in (REPO / "nbs").glob("*.ipynb"):
        text = chapter.read_text("utf-8")
        quoted = re.sub(r"[\d.]+<!--([\w.]+)-->", renewed, text)
        if quoted != text:
            chapter.write_text(quoted, "utf-8")


def picture_of(numbers: dict[str, str]) -> str:
    "What the README's picture shows: whose answers, and how often they are false in that run."
    headline = arms_layer()["evaluate"]["headline"]
    return f"SFT {numbers['sft.chair_i']}, {headline} {numbers[f'{headline}.chair_i']}, seed 0"


def take_picture(file: Path, numbers: dict[str, str]):
    "Copy a run's picture for the README, with a note of what it shows."
    note = PngInfo()
    note.add_text("Description", picture_of(numbers))
    with Image.open(file) as picture:
        picture.save(PICTURE, pnginfo=note)


def measure(folder: Path) -> dict[str, str]:
    "The ledger of a folder of runs, which is written, too."
    files = sorted(folder.glob("seed-*/report.json"))
    reports = [json.loads(file.read_text("utf-8")) for file in files]
    numbers = ledger(reports[0]) | over_seeds(reports)
    take_picture(files[0].with_name("before_after.png"), numbers)
    LEDGER.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return numbers


if __name__ == "__main__":
    given = sys.argv[1:]
    numbers = measure(Path(given[0])) if given else json.loads(LEDGER.read_text("utf-8"))
    write_readme(numbers)
    write_chapters(numbers)
