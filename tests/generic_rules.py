"""What a generic mutant changes: each rule takes a place in a function's syntax tree and gives
other nodes that could stand there. `generic_mutants.py` runs what comes of it.

Left alone are texts that nobody computes with (docstrings, messages of errors, f-strings, types),
and where numbers lie or come from: the keywords `device` and `generator`."""

import ast
from typing import Iterator, NamedTuple

SWAPS = {
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div, ast.Add],
    ast.Div: [ast.Mult, ast.FloorDiv],
    ast.FloorDiv: [ast.Div],
    ast.Mod: [ast.FloorDiv],
    ast.Pow: [ast.Mult],
    ast.BitAnd: [ast.BitOr],
    ast.BitOr: [ast.BitAnd],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
    ast.Lt: [ast.LtE, ast.Gt, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt, ast.GtE],
    ast.Gt: [ast.GtE, ast.Lt, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt, ast.LtE],
    ast.Eq: [ast.NotEq, ast.LtE, ast.GtE],
    ast.NotEq: [ast.Eq, ast.Lt, ast.Gt],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}
PAIRS = (
    "all any, amax amin, max min, maximum minimum, sum mean, zeros ones, zeros_like ones_like, "
    "log_softmax softmax, exp log, std var, sqrt rsqrt, permutations combinations, cumsum cumprod, "
    "variance fmean, upper lower, values keys, tril triu, quantile nanquantile, argsort sort"
)
OTHER = {}  # name of a function → the one beside it
for pair in PAIRS.split(", "):
    left, right = pair.split()
    OTHER |= {left: right, right: left}
MODULES = {"torch", "F", "math", "nn", "itertools", "re"}  # no values: nothing is called on them
SYMMETRIC = {"max", "min", "maximum", "minimum"}  # the order of their arguments does not matter
VALUES = {"masked_fill", "full", "clamp", "gauss"}  # whose numbers are no axes
ALONE = {"device", "generator"}  # keywords


class Place(NamedTuple):
    "Where a node stands in its parent."

    parent: ast.AST
    field: str
    index: int | None  # in a list
    node: ast.AST

    def put(self, new: ast.AST):
        if self.index is None:
            setattr(self.parent, self.field, new)
        else:
            getattr(self.parent, self.field)[self.index] = new


def children(node: ast.AST) -> Iterator[Place]:
    for field, value in ast.iter_fields(node):
        if isinstance(value, ast.AST):
            yield Place(node, field, None, value)
        elif isinstance(value, list):
            yield from (Place(node, field, i, x) for i, x in enumerate(value) if is_node(x))


def is_node(x) -> bool:
    return isinstance(x, ast.AST)


def is_text(place: Place) -> bool:
    "Nothing that is computed with."
    node = place.node
    if isinstance(node, (ast.Raise, ast.JoinedStr)) or place.field in ("annotation", "returns"):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    return isinstance(node, ast.keyword) and node.arg in ALONE


def places(node: ast.AST) -> Iterator[Place]:
    "Everything in a function that may be changed."
    for place in children(node):
        if not is_text(place):
            yield place
            yield from places(place.node)


def operators(place: Place) -> Iterator[ast.AST]:
    "Another operator, one side alone, or the sides exchanged."
    node = place.node
    if isinstance(node, ast.BinOp):
        yield from (ast.BinOp(node.left, op(), node.right) for op in others(node.op))
        yield node.left
        yield node.right
        if not isinstance(node.op, (ast.Add, ast.Mult, ast.BitAnd)):
            yield ast.BinOp(node.right, node.op, node.left)
    elif isinstance(node, ast.BoolOp):
        yield from (ast.BoolOp(op(), node.values) for op in others(node.op))
        for i in range(len(node.values)):
            rest = node.values[:i] + node.values[i + 1 :]
            yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    elif isinstance(node, ast.UnaryOp) and not is_last(place):
        yield node.operand
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for op in comparisons(node):
            yield ast.Compare(node.left, [op()], node.comparators)


def comparisons(node: ast.Compare) -> list[type]:
    "Other operators; texts have no order."
    texts = any(isinstance(getattr(x, "value", 0), str) for x in (node.left, *node.comparators))
    found = others(node.ops[0])
    return found[:1] if texts else found


def others(operator: ast.AST) -> list[type]:
    return SWAPS.get(type(operator), [])


def constants(place: Place) -> Iterator[ast.AST]:
    "Another number, text or truth value."
    if not isinstance(place.node, ast.Constant):
        return
    old = place.node.value
    if isinstance(old, bool):
        new = [not old]
    elif isinstance(old, int):
        new = [old + 1, old - 1, 0] + [-old] * (old != 1 or not is_axis(place))
    elif isinstance(old, float):
        new = [old + 1, 2 * old, -old, 0.0]
    elif isinstance(old, str):
        new = [old + "x"]
    else:
        new = []
    yield from (ast.Constant(x) for x in dict.fromkeys(new) if repr(x) != repr(old))


def is_axis(place: Place) -> bool:
    "An axis or an index: of two, number 1 is the last one, and -1 says the same."
    if isinstance(place.parent, ast.Call):
        return called(place.parent) not in VALUES
    return isinstance(place.parent, (ast.Subscript, ast.UnaryOp))


def is_last(place: Place) -> bool:
    "The axis, or the index, -1."
    return ast.unparse(place.node) == "-1" and is_axis(place)


def conditions(place: Place) -> Iterator[ast.AST]:
    "A condition forced, or turned round."
    tested = place.field == "test" and isinstance(place.parent, (ast.If, ast.While, ast.IfExp))
    if tested or (place.field == "ifs" and isinstance(place.parent, ast.comprehension)):
        yield ast.Constant(True)
        yield ast.Constant(False)
        yield ast.UnaryOp(ast.Not(), place.node)


def calls(place: Place) -> Iterator[ast.AST]:
    "A call left out, of its neighbour, or with its arguments exchanged or left out."
    call = place.node
    if not isinstance(call, ast.Call):
        return
    yield from kept_of(call)
    name = called(call)
    if name in OTHER:
        yield ast.Call(renamed(call.func, OTHER[name]), call.args, call.keywords)
    for i in range(len(call.args) - 1 if name not in SYMMETRIC else 0):
        args = [*call.args[:i], call.args[i + 1], call.args[i], *call.args[i + 2 :]]
        yield ast.Call(call.func, args, call.keywords)
    if call.args:
        yield ast.Call(call.func, call.args[:-1], call.keywords)
    if name == "clamp" and len(call.args) == 2:
        yield ast.Call(call.func, [ast.Constant(None), call.args[1]], [])
    yield from keywords(call)


def kept_of(call: ast.Call) -> Iterator[ast.AST]:
    "What a method is called on, or an argument alone."
    receiver = getattr(call.func, "value", None)
    if receiver is not None and getattr(receiver, "id", "") not in MODULES:
        yield receiver
    yield from (x for x in call.args if not isinstance(x, ast.Starred))


def called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def renamed(func: ast.AST, name: str) -> ast.AST:
    "The same module's, or object's, other function."
    if isinstance(func, ast.Name):
        return ast.Name(name, ast.Load())
    return ast.Attribute(func.value, name, ast.Load())


def keywords(call: ast.Call) -> Iterator[ast.AST]:
    "A keyword left out; the other bound."
    for i, word in enumerate(call.keywords):
        rest = call.keywords[:i] + call.keywords[i + 1 :]
        if word.arg not in ALONE:
            yield ast.Call(call.func, call.args, rest)
        if word.arg in ("min", "max"):
            other = ast.keyword(OTHER[word.arg], word.value)
            yield ast.Call(call.func, call.args, [*rest, other])


def cuts(place: Place) -> Iterator[ast.AST]:
    "A slice without one of its ends, or from the other end."
    node = place.node
    if not isinstance(node, ast.Slice):
        return
    if node.lower is not None:
        yield ast.Slice(None, node.upper, node.step)
    if node.upper is not None:
        yield ast.Slice(node.lower, None, node.step)
    one = ast.Constant(1)
    written = ast.unparse(node)
    if written == "1:":
        yield ast.Slice(None, ast.UnaryOp(ast.USub(), one), None)
    if written == ":-1":
        yield ast.Slice(one, None, None)


def orders(place: Place) -> Iterator[ast.AST]:
    "A pair the other way round."
    node = place.node
    if isinstance(node, ast.Tuple) and len(node.elts) == 2 and isinstance(node.ctx, ast.Load):
        yield ast.Tuple(node.elts[::-1], ast.Load())


def statements(place: Place) -> Iterator[ast.AST]:
    "A statement left out; a sum that is begun anew; a loop without its first or its last."
    node = place.node
    if not isinstance(node, ast.stmt) or isinstance(node, ast.FunctionDef):
        return
    yield ast.Pass()
    if isinstance(node, ast.AugAssign):
        yield ast.Assign([node.target], node.value, lineno=node.lineno)
        yield from (ast.AugAssign(node.target, op(), node.value) for op in others(node.op))
    if isinstance(node, ast.For):
        for ends in (ast.Constant(1), None), (None, ast.UnaryOp(ast.USub(), ast.Constant(1))):
            items = ast.Call(ast.Name("list", ast.Load()), [node.iter], [])
            cut = ast.Subscript(items, ast.Slice(*ends), ast.Load())
            yield ast.For(node.target, cut, node.body, node.orelse, lineno=node.lineno)


def defaults(place: Place) -> Iterator[ast.AST]:
    "None instead of a default."
    given = isinstance(place.parent, ast.arguments) and place.field in ("defaults", "kw_defaults")
    if given and getattr(place.node, "value", place.node) is not None:
        yield ast.Constant(None)


RULES = (
    operators,
    constants,
    conditions,
    calls,
    cuts,
    orders,
    statements,
    defaults,
)


def texts(function: ast.FunctionDef) -> Iterator[str]:
    "The function with one change, for each change that there is; each text once."
    before, seen = ast.unparse(function), set()
    for place in list(places(function)):
        for rule in RULES:
            for new in list(rule(place)):
                place.put(new)
                text = ast.unparse(ast.fix_missing_locations(function))
                place.put(place.node)
                if text != before and text not in seen:
                    seen.add(text)
                    yield text
