"The notebooks as documents and as the source of the package."
import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPO

NOTEBOOKS = sorted((REPO / "nbs").glob("*.ipynb"))
MODULES = sorted(p for p in (REPO / "vlmrlhf_course").rglob("*.py") if not p.name.startswith("_"))
BASE = "settings files launch checkpoints runs".split()   # under every chapter: nothing about RLHF
CHAPTERS = "scenes vlm sft preferences reward hallucination advantages kl rollout ppo evaluate dpo".split()


def cells(path, kind=None): return [c for c in json.loads(path.read_text("utf-8"))["cells"] if kind in (None, c["cell_type"])]
def source(cell): return "".join(cell["source"])


def test_there_is_a_notebook_for_every_module():
    "A glob that finds nothing would make every test below pass."
    exported = [name for p in NOTEBOOKS for c in cells(p, "code") for name in re.findall(r"^#\| default_exp ([\w.]+)$", source(c), re.M)]
    assert len(set(exported)) == len(exported)
    there = {".".join(p.relative_to(REPO / "vlmrlhf_course").with_suffix("").parts) for p in MODULES}
    assert {*exported} == there and {p.stem for p in MODULES} >= {*BASE, *CHAPTERS, "cli", "pretrain"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestNotebook:
    def test_format(self, path):
        nb = json.loads(path.read_text("utf-8"))
        assert nb["nbformat"] == 4 and nb["cells"]
        ids = [c["id"] for c in nb["cells"]]
        assert len(set(ids)) == len(ids), f"ids used twice: {sorted({i for i in ids if ids.count(i) > 1})}"
        assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", i) for i in ids)

    def test_opens_with_title_and_subtitle(self, path):
        lines = source(cells(path)[0]).splitlines()
        assert lines[0].startswith("# ") and any(line.startswith("> ") for line in lines)

    def test_size(self, path):
        assert len(cells(path)) <= 60
        words = sum(len(source(c).split()) for c in cells(path, "markdown"))
        assert words <= 3500, f"{words} words of prose"

    def test_cells_fit_a_screen(self, path):
        long = {c["id"]: n for c in cells(path, "code") if (n := len(source(c).rstrip().splitlines())) > 40}
        assert not long, f"cells over 40 lines: {long}"

    def test_no_errors_in_outputs(self, path):
        bad = [c["id"] for c in cells(path, "code") for o in c["outputs"] if o["output_type"] == "error"]
        assert not bad, f"cells that failed: {bad}"

    def test_was_executed(self, path): assert any(c["outputs"] for c in cells(path, "code")), "no cell has an output"


def test_export_is_in_step(tmp_path):
    "Exporting the notebooks again gives the package, byte for byte."
    shutil.copytree(REPO / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*", "_*"))
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    (tmp_path / "vlmrlhf_course").mkdir()
    shutil.copy(REPO / "vlmrlhf_course" / "__init__.py", tmp_path / "vlmrlhf_course")
    done = subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    def modules(root): return {str(p.relative_to(root)): p.read_bytes() for p in (root / "vlmrlhf_course").rglob("*.py")}
    new, old = modules(tmp_path), modules(REPO)
    assert new.keys() == old.keys()
    assert not (stale := [name for name in old if new[name] != old[name]]), f"run nbdev-export: {stale}"


ROOMS = {p.parent.name for p in MODULES} - {"vlmrlhf_course"}


def imports_of(tree):
    "Names of the course's modules that a module imports, anywhere in it."
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "vlmrlhf_course"):
            last = (node.module or "").split(".")[-1]
            if last in ("", "vlmrlhf_course", *ROOMS): yield from (alias.name for alias in node.names)
            else: yield last
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[-1] for a in node.names if a.name.startswith("vlmrlhf_course."))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
class TestModule:
    def test_imports_only_what_came_before(self, path):
        if path.stem in BASE: allowed = set(BASE[:BASE.index(path.stem)])
        elif path.stem == "packing": allowed = set()
        elif path.stem == "families": allowed = {*BASE}
        elif path.stem in CHAPTERS: allowed = {*BASE, "families", "packing", *CHAPTERS[:CHAPTERS.index(path.stem)]}
        else: allowed = {*BASE, *CHAPTERS, "pretrain", "cli"} - {path.stem}
        assert (used := set(imports_of(ast.parse(path.read_text())))) <= allowed, f"{path.stem} imports {sorted(used - allowed)}"

    def test_length(self, path): assert (n := len(path.read_text().splitlines())) <= 400, f"{n} lines"

    def test_functions_are_short(self, path):
        defs = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        long = {n.name: n.end_lineno - n.lineno + 1 for n in defs if n.end_lineno - n.lineno + 1 > 40}
        assert not long, f"over 40 lines: {long}"

    def test_exports_have_docstrings(self, path):
        tree = ast.parse(path.read_text())
        public = ast.literal_eval(next(n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__").value)
        bare = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in public and not ast.get_docstring(n)]
        assert ast.get_docstring(tree)
        assert len(bare) <= 2, f"no docstring: {bare}"   # one-liners may speak for themselves


def test_the_import_reader_sees_every_form():
    code = ("from .vlm import VLM\nfrom vlmrlhf_course.rl import ppo, kl\nimport vlmrlhf_course.train.sft\ndef f():\n"
            " from vlmrlhf_course.world.scenes import Scene\n from . import runs\n from ..data.preferences import label\n from vlmrlhf_course import cli")
    assert set(imports_of(ast.parse(code))) == {"vlm", "ppo", "kl", "sft", "scenes", "runs", "preferences", "cli"}
