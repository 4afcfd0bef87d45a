"""The test cells of a notebook, as tests that `mutants.py` can name: `cells.py -k 87_wire`.

They run with the names of the module that the notebook exports, mutant and all. Not collected by
itself, since `nbdev-test` runs these cells, too."""

import importlib

import pytest
from test_structure import NOTEBOOKS, code_cells, python_of

OWN = (
    "own",
    "data.own",
    "data.files",
    "data.known",
    "data.examine",
    "data.prompts",
    "model.layout",
)
ROOMS = ("classroom", "grading", *OWN)  # whose notebooks need nothing but a moment
EXPORTS = "#| default_exp "


def module_of(path) -> str:
    "The module that a notebook exports; empty where that is of another room."
    first = [source for _, source in code_cells(path) if source.startswith(EXPORTS)]
    name = first[0].removeprefix(EXPORTS).strip() if first else ""
    return name if name.startswith(ROOMS) else ""


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if module_of(p)], ids=lambda p: p.stem)
def test_cells(path):
    module = importlib.import_module(f"vlmrlhf_course.{module_of(path)}")
    space = dict(vars(module))
    for cell, source in code_cells(path):
        if not source.startswith("#|"):
            exec(compile(python_of(source), f"{path.name}#{cell}", "exec"), space)
