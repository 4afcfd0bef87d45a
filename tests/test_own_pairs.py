"A source that brings pairs which people have made: nothing is sampled, ranked or made up."

import json
import shutil
from pathlib import Path

import pytest

from vlmrlhf_course.base.runs import Run
from vlmrlhf_course.base.settings import UserError
from vlmrlhf_course.pipeline import obtain, with_source
from vlmrlhf_course.report.record import reward_figures
from vlmrlhf_course.world.source import DrawnWorld


class Labelled(DrawnWorld):
    "The drawn world with pairs of its own; nobody knows which of them are right."

    def __init__(self, pairs):
        super().__init__()
        self.own = pairs

    def pairs(self, split):
        return self.own[split]

    def rank(self, *args):
        raise AssertionError("pairs are there: nothing is to be ranked")


@pytest.fixture
def run(smoke_run, tmp_path):
    "A run whose SFT model is made, and whose source brings the pairs of another run."
    shutil.copytree(smoke_run / "sft", tmp_path / "run" / "sft")
    pairs = {}
    for split in ("train", "validation"):
        lines = (smoke_run / "preferences" / f"{split}.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        pairs[split] = [{k: v for k, v in row.items() if k != "gold"} for row in rows]
    run = with_source(Run(tmp_path / "run", "smoke"))
    run.source = Labelled(pairs)
    return run


def test_pairs_of_people_are_taken_as_they_are(run):
    assert obtain(run, "preferences") == (run.source.own["train"], run.source.own["validation"])
    info = run.info("preferences")["train"]
    assert "kappa" not in info and 0 <= info["longer"] <= 1


def test_what_nobody_knows_is_not_in_the_report(run):
    obtain(run, "reward")
    assert set(run.info("reward")["pair_accuracy"]) == {"labels"}
    figures = reward_figures(run)
    assert set(figures) == {"pair_accuracy", "image_ablated", "text_ablated"}


def test_rankings_with_ties_are_refused_in_a_line(run):
    run.source.own = dict.fromkeys(("train", "validation"))

    def tied(prompts, answers, cfg, seed):
        about = dict(kind="detail", image=None, prompt="", answer="", scores=[0, 0])
        return [dict(id=0, answers=["a .", "b ."], rankings=[[0, 0], [0, 0]], **about)]

    run.source.rank = tied
    with pytest.raises(UserError, match="rank without ties"):
        obtain(run, "preferences")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda row: row.pop("rejected"), "no 'rejected'"),
        (lambda row: row.update(image=Path("cat.png")), "cannot be written as JSON"),
        (lambda row: row.update(image="no/such.png"), "no/such.png"),
        (lambda row: row.update(chosen=" "), "empty answer"),
        (lambda row: row.update(rejected=row["chosen"]), "chosen equals rejected"),
        (lambda row: row.update(weight=float("nan")), "weight is not a finite number"),
    ],
)
def test_a_bad_pair_is_found_before_anything_is_written(run, change, words):
    "Sealed, it could never be read again; and the message must say whose pair it is."
    row = run.source.own["validation"][1] = dict(run.source.own["validation"][1])
    good = dict(row)
    change(row)
    line = f"Labelled.pairs.'validation'., number 1: .*{words}.*mend that pair, or leave it out"
    with pytest.raises(UserError, match=line) as e:
        obtain(run, "preferences")
    assert "\n" not in str(e.value)
    assert not list(run.path("preferences").glob("*.jsonl"))
    run.source.own["validation"][1] = good
    assert obtain(run, "preferences")[1][1] == good, "the mended pair is taken"


def test_a_source_without_pairs_says_none(run):
    run.source.own["train"] = []
    with pytest.raises(UserError, match="Labelled.pairs.'train'.: no pairs; give some; or None"):
        obtain(run, "preferences")
