"""Mutants that nobody chose: an operator, a constant, a comparison, a dropped `detach`, `clamp` or
sign somewhere in the library. `python tests/mutants.py --random 100 --seed 0` runs them.

Each is tried by the test files that name its function, then by those that name anything else of its
module. A test that fails or breaks has noticed it; in the end all tests that noticed anything run
once on the library as it is, and where one fails there, too, it has noticed nothing. Who survives
is printed with its line: it is equivalent, and named as such in `equivalent_mutants.yaml`, or a
test is missing."""

import ast
import random
import re
from pathlib import Path
from typing import Iterator, NamedTuple

import yaml
from forks import PACKAGE, TESTS, Job, run_all, warm_up

ROOMS = ("data", "model", "rl", "train", "world")
FILES = ("report/evaluate.py", "base/metrics.py")
REVIEWED = TESTS / "equivalent_mutants.yaml"
SWAPS = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.And: "or",
    ast.Or: "and",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}
SIGNS = "+ - * / < <= > >= == != and or & |".split()
LIMIT = 1800  # seconds by the clock: whole files of tests run on each
DROPPED = ("detach", "clamp", "clamp_", "abs", "sqrt", "float", "eval", "sort")


class Change(NamedTuple):
    module: Path  # relative to the package
    function: str  # `name` or `class.name`
    line: int  # from 1
    what: str
    text: str  # the module with the change

    @property
    def name(self) -> str:
        return f"{self.module}: {self.function}: {self.what}"


def functions_of(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    "Functions and methods of a module, by name."
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


class Source:
    "A module's text, in bytes: `ast` counts columns in UTF-8."

    def __init__(self, text: str):
        self.raw = text.encode()
        lines = self.raw.splitlines(keepends=True)
        self.starts = [sum(map(len, lines[:i])) for i in range(len(lines) + 1)]

    def start(self, node: ast.AST) -> int:
        return self.starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.AST) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def changed(self, start: int, end: int, new: str) -> str:
        return (self.raw[:start] + new.encode() + self.raw[end:]).decode()

    def sign(self, left: ast.AST, right: ast.AST) -> tuple[int, int, str] | None:
        "Where the operator between two operands stands."
        between = self.raw[self.end(left) : self.start(right)].decode()
        found = re.search(r"(?<![\w<>=!*/])(and|or|[<>=!]=|[-+*/<>&|])(?![\w=*/])", between)
        if not found or found[1] not in SIGNS:
            return None
        start = self.end(left) + len(between[: found.start(1)].encode())
        return start, start + len(found[1]), found[1]


def swapped(source: Source, node: ast.AST) -> Iterator[tuple[str, str]]:
    "Another operator: what was done, and the text."
    if isinstance(node, ast.BinOp):
        places = [(node.op, node.left, node.right)]
    elif isinstance(node, ast.Compare):
        places = [(node.ops[0], node.left, node.comparators[0])]
    elif isinstance(node, ast.BoolOp):
        places = [(node.op, node.values[0], node.values[1])]
    else:
        places = []
    for operator, left, right in places:
        new, where = SWAPS.get(type(operator)), source.sign(left, right)
        if new and where:
            start, end, old = where
            yield f"{old} → {new}", source.changed(start, end, new)


def constants(source: Source, node: ast.AST) -> Iterator[tuple[str, str]]:
    "Another number, or the other truth value."
    if not isinstance(node, ast.Constant) or node.value is None:
        return
    old = node.value
    if isinstance(old, bool):
        new = not old
    elif isinstance(old, int):
        new = old + 1
    elif isinstance(old, float):
        new = old * 1.5 if old else 0.5
    else:
        return
    start, end = source.start(node), source.end(node)
    yield f"{old} → {new}", source.changed(start, end, repr(new))


def dropped(source: Source, node: ast.AST) -> Iterator[tuple[str, str]]:
    "A method, a sign or a `not` left out."
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in DROPPED:
            start, end = source.end(node.func.value), source.end(node)
            yield f"without .{node.func.attr}()", source.changed(start, end, "")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        start, end = source.start(node), source.start(node.operand)
        yield "without its sign", source.changed(start, end, "")


def nodes_of(node: ast.AST) -> Iterator[ast.AST]:
    "A statement and what is in it, without texts and the raising of errors."
    if isinstance(node, (ast.Raise, ast.JoinedStr)):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from nodes_of(child)


def changes_of(file: Path) -> Iterator[Change]:
    "Every change of a module's functions."
    yield from changes_in(file.read_text("utf-8"), file.relative_to(PACKAGE))


def changes_in(text: str, module: Path) -> Iterator[Change]:
    "Every change of the functions in a text."
    source = Source(text)
    for name, function in functions_of(ast.parse(text)):
        for statement in function.body:
            for node in nodes_of(statement):
                for kind in (swapped, constants, dropped):
                    for what, new in kind(source, node):
                        where = f"{what} in `{text.splitlines()[node.lineno - 1].strip()}`"
                        yield Change(module, name, node.lineno, where, new)


def every_change() -> list[Change]:
    "Of all core modules, each of which still compiles."
    files = [f for room in ROOMS for f in sorted((PACKAGE / room).glob("[!_]*.py"))]
    files += [PACKAGE / name for name in FILES]
    found = [change for file in files for change in changes_of(file)]
    return [change for change in found if compiles(change.text)]


def compiles(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def reviewed() -> set[str]:
    "Names of changes that change nothing that anybody could notice."
    return set(yaml.safe_load(REVIEWED.read_text("utf-8")) or ()) if REVIEWED.is_file() else set()


def draw(n: int, seed: int) -> list[Change]:
    "`n` changes, drawn without those that were reviewed."
    known = reviewed()
    pool = [change for change in every_change() if change.name not in known]
    return random.Random(seed).sample(pool, n)


def test_files(words: set[str]) -> list[str]:
    "The test files in which one of the words stands, most of them first."
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(words)))})\b")
    counts = {f.name: len(pattern.findall(f.read_text("utf-8"))) for f in TESTS.glob("test_*.py")}
    return sorted((f for f, count in counts.items() if count), key=lambda f: -counts[f])


def rounds_of(change: Change) -> list[list[str]]:
    "Files that name the function; and files that name anything else of its module."
    own = set(change.function.split(".")) - {"__init__", "__call__", "forward", "state_dict"}
    tree = ast.parse((PACKAGE / change.module).read_text("utf-8"))
    names = {getattr(node, "name", None) for node in tree.body} - {None}
    near = test_files(own) if own else []
    far = [f for f in test_files(names | {change.module.stem}) if f not in near]
    return [files for files in (near, far) if files]


def job(change: Change, files: list[str]) -> Job:
    return Job(" ".join(files), change.name, change.module, change.text)


def noticed_by(what: str, log: str) -> str | None:
    "`file` or `file -k test` of what failed, or broke, on a mutant; None where nothing did."
    found = re.search(r"^(?:FAILED|ERROR) (?:.*/)?(test_\w+\.py)(?:::(?:\w+::)?(\w+))?", log, re.M)
    if what == "SURVIVED" or not found:
        return None
    file, test = found.groups()
    return f"{file} -k {test}" if test else file


def run_random(n: int, seed: int, jobs: int) -> dict:
    "Draw changes and try them on the tests. Prints who survives; returns what there is to record."
    warm_up()
    left = {change.name: (change, rounds_of(change)) for change in draw(n, seed)}
    changes = {name: change for name, (change, _) in left.items()}
    noticed = {}  # mutant → the test that noticed it
    for turn in (0, 1):
        work = [job(c, rounds[turn]) for c, rounds in left.values() if len(rounds) > turn]

        def report(done, what, by, seconds, log):
            test = noticed_by(what, log)
            hung = what == "killed" and not test
            print(f"{what:8} {seconds:5.1f} s  {done.name[:110]}  {test or by}", flush=True)
            if test or hung:
                noticed[done.name] = test
                del left[done.name]

        run_all(work, jobs, report, LIMIT)
    sick = failing(set(noticed.values()) - {None}, jobs)
    survivors = [*left, *(name for name, test in noticed.items() if test in sick)]
    for name in survivors:
        change = changes[name]
        print(f"SURVIVED {change.module}:{change.line}: {change.function}: {change.what}")
    return dict(mutants=n, seed=seed, noticed=n - len(survivors))


def failing(tests: set[str], jobs: int) -> set[str]:
    "Those that fail on the library as it is."
    sick = set()

    def report(done, what, by, seconds, log):
        if what != "SURVIVED":
            print(f"fails without any mutant: {done.tests}", flush=True)
            sick.add(done.tests)

    run_all([Job(test) for test in sorted(tests)], jobs, report, LIMIT)
    return sick
