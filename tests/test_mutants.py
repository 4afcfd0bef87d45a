"The table of mutants fits the sources, and the long proofs were run."

import json

import pytest
from conftest import REPO
from mutants import MUTANTS, mutate
from stage_table import groups_of, run_of


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_each_mutant_still_matches_its_source(mutant):
    "`python tests/mutants.py` is too slow for every day; that its snippets are there is not."
    assert mutate(mutant)


def test_the_long_proofs_are_recorded():
    """`make proof` was run on the mutants that are there
    now, and on thirty kills: tests/proofs.json."""
    proofs = json.loads((REPO / "tests" / "proofs.json").read_text("utf-8"))
    assert proofs["mutants"]["killed"] == len(MUTANTS) and not proofs["mutants"]["SURVIVED"]
    kill = proofs["kill"]
    assert kill["kills"] >= 30 and kill["while_a_checkpoint_was_written"] > 0
    assert kill["stages"].keys() == groups_of(run_of("smoke", [])).keys() == kill["hit"].keys()
    assert {"ppo_rm", "ppo_detector", "oracle", "grpo", "rloo", "dpo"} <= set(
        kill["stages"]["arms"]
    )
