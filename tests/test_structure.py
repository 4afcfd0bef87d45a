"""The house: data flows one way, a line of code knows its room, and a learner can read it.

Rooms and lines are counted here, so that CONTRIBUTING.md need not be believed."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

PACKAGE = REPO / "vlmrlhf_course"
# A module imports from rooms before its own, and from its own room without circles.
ROOMS = "base data model train rl report world own scale pipeline classroom".split()
ROOMS += "grading arms verbs cli".split()
MAY_NAME_THE_WORLD = ("world", "pipeline", "classroom")  # who may name the drawn world
NOTEBOOKS = sorted((REPO / "nbs").glob("*.ipynb"))
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if not p.name.startswith("_"))
SCRIPTS = sorted([*(REPO / "tests").glob("*.py"), *(REPO / "benchmarks").glob("*.py")])


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


NAMES = {name_of(path): path for path in MODULES}


def room_of(name: str) -> str:
    return name.split(".")[0]


def code_cells(path: Path) -> list[tuple[str, str]]:
    "(id, source) of the code cells of a notebook."
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [(c["id"], "".join(c["source"])) for c in cells if c["cell_type"] == "code"]


def python_of(source: str) -> str:
    "A cell without notebook magic."
    lines = source.splitlines()
    return "\n".join("" if line.startswith(("%", "!")) else line for line in lines)


def sources():
    "(where, text) of every piece of Python here: modules, tests, benchmarks, code cells."
    for path in (*MODULES, *SCRIPTS):
        yield str(path.relative_to(REPO)), path.read_text("utf-8")
    for path in NOTEBOOKS:
        for cell, source in code_cells(path):
            yield f"{path.stem}#{cell}", python_of(source)


def imports_of(name: str, tree: ast.AST) -> set[str]:
    "Modules of the package that a module imports, anywhere in it."
    here, found = ["vlmrlhf_course", *name.split(".")[:-1]], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = here[: len(here) - node.level + 1]
                base = ".".join([*up, node.module] if node.module else up)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    ours = {f.removeprefix("vlmrlhf_course.") for f in found if f.startswith("vlmrlhf_course.")}
    return ours & set(NAMES)


GRAPH = {name: imports_of(name, ast.parse(path.read_text())) for name, path in NAMES.items()}


# --- rooms --------------------------------------------------------------------------------


def test_the_import_reader_sees_every_form():
    code = (
        "from .vlm import VLM\nfrom vlmrlhf_course.rl import ppo\nimport vlmrlhf_course.train.sft\n"
        "def f():\n from ..data.pairs import load_pairs\n from vlmrlhf_course.base import runs as r"
    )
    wanted = {"model.vlm", "rl.ppo", "train.sft", "data.pairs", "base.runs"}
    assert imports_of("model.roles", ast.parse(code)) == wanted


def test_every_module_has_a_room():
    assert {room_of(name) for name in NAMES} == set(ROOMS)


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_one_way(name):
    at = ROOMS.index(room_of(name))
    up = [other for other in GRAPH[name] if ROOMS.index(room_of(other)) > at]
    assert not up, f"{name} imports {up}: rooms are {ROOMS}"


def test_no_circles():
    "Take away what imports nothing that is left; a circle is what remains."
    left = {name: set(used) for name, used in GRAPH.items()}
    while free := [name for name, used in left.items() if not used & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


@pytest.mark.parametrize("name", [n for n in NAMES if room_of(n) not in MAY_NAME_THE_WORLD])
def test_the_drawn_world_is_named_only_where_it_may_be(name):
    tree = ast.parse(NAMES[name].read_text())
    lazily = {"cli": {"world.pretrain"}}.get(name, set())  # the command that makes its parts
    assert {n for n in GRAPH[name] if room_of(n) == "world"} <= lazily
    docs = {ast.get_docstring(n, clean=False) for n in ast.walk(tree) if is_documented(n)}
    said = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    said = [text for text in said if isinstance(text, str) and text not in docs]
    assert not [text for text in said if "scene:" in text]


def is_documented(node) -> bool:
    return isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))


# --- names --------------------------------------------------------------------------------


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def is_registered(node) -> bool:
    "Does its definition hand it over: to a register, by a decorator or a keyword of the class?"
    handed = [d for d in getattr(node, "decorator_list", []) if isinstance(d, ast.Call)]
    handed = [d for d in handed if getattr(d.func, "id", "") != "dataclass"]
    return bool(handed or getattr(node, "keywords", []))


def shown_words() -> set[str]:
    "What the cells of the chapters name that are not exported."
    cells = [source for path in NOTEBOOKS for _, source in code_cells(path)]
    return set().union(*(words_of(s) for s in cells if not s.startswith("#| export")))


def test_nothing_is_exported_without_a_caller_or_a_chapter():
    "Each name is used by another definition of the package, or by a cell that is not exported."
    used, exported = shown_words(), {}
    for name, path in NAMES.items():
        for node in ast.parse(path.read_text()).body:
            own = getattr(node, "name", None)
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                exported[name] = ast.literal_eval(node.value)
            elif not isinstance(node, (ast.Import, ast.ImportFrom)):
                used |= words_of(ast.unparse(node)) - ({own} if not is_registered(node) else set())
    dead = {name: sorted(set(names) - used) for name, names in exported.items()}
    assert not {name: names for name, names in dead.items() if names}


def test_the_version_stands_in_one_place():
    import vlmrlhf_course

    places = [REPO / "pyproject.toml", REPO / "settings.ini", *MODULES]
    found = [p.name for p in places if f'"{vlmrlhf_course.__version__}"' in p.read_text("utf-8")]
    assert not found, "the version is in vlmrlhf_course/__init__.py alone"


# --- lines --------------------------------------------------------------------------------


def test_lines_fit_a_page():
    "100 columns, in package, tests, benchmarks and code cells."
    wide = {}
    for where, text in sources():
        lines = [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 100]
        if lines and where != "vlmrlhf_course/_modidx.py":
            wide[where] = lines
    wide = {w: n for w, n in wide.items() if not only_generated(w, n)}
    assert not wide


def only_generated(where: str, lines: list[int]) -> bool:
    "nbdev writes `__all__`, and knows no columns."
    if not where.startswith("vlmrlhf_course/"):
        return False
    text = (REPO / where).read_text().splitlines()
    start = next((i for i, line in enumerate(text) if line.startswith("__all__")), 0)
    end = next((i for i, line in enumerate(text[start:], start) if line.endswith("]")), 0)
    return all(start <= n - 1 <= end for n in lines)


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda p: str(p.relative_to(REPO)))
def test_files_are_short(path):
    assert (n := len(path.read_text("utf-8").splitlines())) <= 400, f"{n} lines"


def lines_of_code(function: ast.FunctionDef, text: str) -> int:
    "Without signature, docstring, comments and empty lines."
    body = function.body[1:] if ast.get_docstring(function) else function.body
    if not body:
        return 0
    lines = text.splitlines()[body[0].lineno - 1 : function.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_are_short(path):
    text = path.read_text("utf-8")
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    long = {f.name: n for f in functions if (n := lines_of_code(f, text)) > 25}
    assert not long


def faults_of(tree: ast.AST):
    "What a learner has to unfold: (line, what)."
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple):
            yield node.lineno, "a tuple as a statement"
        if isinstance(node, ast.IfExp):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.IfExp)]
            if len(inner) > 1:
                yield node.lineno, "a conditional expression in another"
        loops = getattr(node, "generators", [])
        if len(loops) > 1 and any(loop.ifs for loop in loops):
            yield node.lineno, "a comprehension with two loops and a condition"


def test_no_line_has_to_be_unfolded():
    found = {where: list(faults_of(ast.parse(text))) for where, text in sources()}
    assert not {where: faults for where, faults in found.items() if faults}


def ruff(*words):
    command = [sys.executable, "-m", "ruff", *words, "--no-cache"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_formatter_has_nothing_to_say():
    ruff("format", "--check", "nbs", "tests", "benchmarks")


def test_no_name_is_unknown_or_imported_in_vain():
    "F811 is left out: a test's argument has its fixture's name."
    ruff("check", "--select=F", "--ignore=F811", "vlmrlhf_course", "tests", "benchmarks")


def test_a_module_imports_its_own_package_relatively():
    "nbdev makes it so, but not where an import goes over several lines."
    for path in MODULES:
        for node in ast.parse(path.read_text("utf-8")).body:
            absolute = isinstance(node, ast.ImportFrom) and node.level == 0
            assert not (absolute and node.module.startswith("vlmrlhf_course")), path.name


def test_nothing_is_defined_twice():
    "Such as by two hands that move one function; methods that are patched in belong to a class."
    for path in MODULES:
        bodies = ast.parse(path.read_text("utf-8")).body
        named = [x for x in bodies if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
        plain = [x.name for x in named if "patch" not in map(ast.unparse, x.decorator_list)]
        assert len(plain) == len({*plain}), f"{path.name}: {sorted(plain)}"


def named_in(node: ast.stmt) -> set[str]:
    "The names that a statement gives to its module."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.ImportFrom):
        return {name.asname or name.name for name in node.names}
    stored = (n for n in ast.walk(node) if isinstance(n, ast.Name))
    return {n.id for n in stored if isinstance(n.ctx, ast.Store)}


def test_what_scripts_take_from_each_other_is_there():
    "A fixture that moved fails at import, which pytest says after a quarter of an hour."
    trees = {path.stem: ast.parse(path.read_text("utf-8")) for path in SCRIPTS}
    given = {name: set().union(*map(named_in, tree.body)) for name, tree in trees.items()}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in given:
                missing = {n.name for n in node.names} - given[node.module]
                assert not missing, f"{name}.py takes {missing} from {node.module}.py"
