"""The notebooks as documents and as the source of the package.

What a line, a file and a room may hold stands in `test_structure.py`."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO
from test_structure import MODULES, NAMES, NOTEBOOKS


def cells(path: Path, kind: str | None = None) -> list[dict]:
    "The cells of a notebook, or those of a kind."
    every = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in every if kind in (None, cell["cell_type"])]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def exported_by(path: Path) -> list[str]:
    "The modules that a notebook names as its own: room.name, or room.package.name."
    text = "\n".join(source(cell) for cell in cells(path, "code"))
    return re.findall(r"^#\| default_exp ([\w.]+)$", text, re.M)


# --- notebooks and modules ------------------------------------------------------------------------


def test_there_is_a_notebook_for_every_module():
    "Each module comes from one notebook; a notebook makes one module, or none."
    exported = {path.stem: exported_by(path) for path in NOTEBOOKS}
    assert not {stem: names for stem, names in exported.items() if len(names) > 1}
    names = [name for found in exported.values() for name in found]
    assert sorted(names) == sorted(NAMES)


def test_the_course_is_there():
    "A glob that finds nothing would make every test here pass."
    chapters = (
        "world.scenes model.vlm train.sft data.preferences train.reward world.hallucination "
        "rl.advantages rl.kl rl.rollout rl.ppo report.evaluate train.dpo rl.grpo"
    )
    others = (
        "base.settings base.files base.launch base.checkpoints base.runs cli world.pretrain "
        "model.families.qwen"
    )
    assert {*NAMES} >= {*chapters.split(), *others.split()}


def test_export_is_in_step(tmp_path):
    "Exporting the notebooks again gives the package, byte for byte."
    shutil.copytree(REPO / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*", "_*"))
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    (tmp_path / "vlmrlhf_course").mkdir()
    shutil.copy(REPO / "vlmrlhf_course" / "__init__.py", tmp_path / "vlmrlhf_course")
    done = subprocess.run(
        [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    new, old = texts_of(tmp_path), texts_of(REPO)
    assert new.keys() == old.keys()
    stale = [name for name in old if new[name] != old[name]]
    assert not stale, f"run nbdev-export: {stale}"


def texts_of(root: Path) -> dict[str, bytes]:
    "What stands in the package's files."
    files = (root / "vlmrlhf_course").rglob("*.py")
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


# --- each notebook --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_format(self, path):
        nb = json.loads(path.read_text("utf-8"))
        assert nb["nbformat"] == 4 and nb["cells"]
        ids = [cell["id"] for cell in nb["cells"]]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        assert not twice, f"ids used twice: {twice}"
        assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)

    def test_opens_with_title_and_subtitle(self, path):
        lines = source(cells(path)[0]).splitlines()
        assert lines[0].startswith("# ") and any(line.startswith("> ") for line in lines)

    def test_size(self, path):
        assert len(cells(path)) <= 60
        words = sum(len(source(cell).split()) for cell in cells(path, "markdown"))
        assert words <= 3500, f"{words} words of prose"

    def test_cells_fit_a_screen(self, path):
        lines = {c["id"]: len(source(c).rstrip().splitlines()) for c in cells(path, "code")}
        long = {name: n for name, n in lines.items() if n > 40}
        assert not long, f"cells over 40 lines: {long}"

    def test_no_errors_in_outputs(self, path):
        outputs = {cell["id"]: cell["outputs"] for cell in cells(path, "code")}
        bad = [name for name, out in outputs.items() if any(map(is_error, out))]
        assert not bad, f"cells that failed: {bad}"

    def test_was_executed(self, path):
        assert any(cell["outputs"] for cell in cells(path, "code")), "no cell has an output"


def is_error(output: dict) -> bool:
    return output["output_type"] == "error"


# --- each module ----------------------------------------------------------------------------------


def public_names(tree: ast.Module) -> list[str]:
    "The list that nbdev writes into a module."
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError("no __all__")


def is_definition(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPO)))
class TestModule:
    def test_functions_are_short(self, path):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if is_definition(node)]
        functions = [node for node in nodes if not isinstance(node, ast.ClassDef)]
        lines = [(node.end_lineno - node.lineno + 1, node.name) for node in functions]
        long = [(n, name) for n, name in lines if n > 40]  # a list: names may occur twice
        assert not long, f"over 40 lines: {long}"

    def test_exports_have_docstrings(self, path):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree)
        public = public_names(tree)
        ours = [node for node in tree.body if is_definition(node) and node.name in public]
        bare = [node.name for node in ours if not ast.get_docstring(node)]
        assert len(bare) <= 2, f"no docstring: {bare}"  # one-liners may speak for themselves
