"""The score algebra: one element of a tensor as an expression over positions and loaded elements.

An expression says what a value *is* at a symbolic position, whatever chain of views, casts and pointwise ops computed it.
Six node kinds suffice:

``Int``     integer arithmetic on positions (a sympy expression over axes and sizes)
``Const``   a float or bool literal
``Load``    one element of a tensor that is read from memory
``Dot``     a contraction of two tensors over one axis
``Reduce``  a sum or maximum over a bound axis
``Op``      a pointwise operation, a row of ``OPS``

Float casts between widths do not appear: an expression is what the program means, rounding belongs to kernels and budgets.
Constructors fold what they can prove and nothing else; ``tests/test_algebra.py`` checks each fold against numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, reduce
from typing import Any

import sympy as sp

from attngen.index import Axis, always_less, floordiv, modulo, never_negative, recombine

Kind = str  # "bool" | "int" | "float"


class Expr:
    """Base of the six node kinds: immutable, hashed once, compared by structure."""

    kind: Kind

    @cached_property
    def _hash(self) -> int:
        return hash((type(self), *(getattr(self, field.name) for field in fields(self))))  # type: ignore[arg-type]

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other) or hash(self) != hash(other):
            return False
        return all(getattr(self, f.name) == getattr(other, f.name) for f in fields(self))  # type: ignore[arg-type]

    @property
    def children(self) -> tuple[Expr, ...]:
        return ()

    @cached_property
    def axes(self) -> frozenset[Axis]:
        """The free axes: those whose value changes the element."""
        return frozenset().union(*(child.axes for child in self.children))

    @cached_property
    def scored(self) -> bool:
        """Whether a product is part of it."""
        return any(child.scored for child in self.children)

    @cached_property
    def length(self) -> int:
        """How many leaves it has when it is written out as a tree, as most functions read it."""
        return sum(child.length for child in self.children) or 1

    def walk(self) -> list[Expr]:
        """Every distinct node of the expression, parents before children."""
        seen: dict[Expr, None] = {}
        stack: list[Expr] = [self]
        while stack:
            node = stack.pop()
            if node not in seen:
                seen[node] = None
                stack.extend(reversed(node.children))
        return list(seen)


@dataclass(frozen=True, eq=False)
class Int(Expr):
    value: sp.Expr

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        return "int"

    @cached_property
    def axes(self) -> frozenset[Axis]:  # type: ignore[override]
        return frozenset(self.value.atoms(Axis))


@dataclass(frozen=True, eq=False)
class Const(Expr):
    value: float | bool

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        return "bool" if isinstance(self.value, bool) else "float"

    @cached_property
    def _hash(self) -> int:  # type: ignore[override]
        return hash((type(self.value), self.value))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Const) and self.kind == other.kind and self.value == other.value


@dataclass(frozen=True, eq=False)
class Load(Expr):
    """``source[index]``; ``source`` is a graph node while detecting and a slot number in a spec."""

    source: Hashable
    index: tuple[Expr, ...]
    kind: Kind = "float"

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.index


@dataclass(frozen=True, eq=False)
class Access(Expr):
    """One operand of a contraction: a tensor and where it is read. Not a value yet."""

    source: Hashable
    index: tuple[Expr, ...]
    kind: Kind = "float"

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.index


@dataclass(frozen=True, eq=False)
class Dot(Expr):
    """``sum over axis of lhs * rhs``; ``node`` is where the graph computes it."""

    lhs: Access
    rhs: Access
    axis: Axis
    node: Hashable = None
    kind: Kind = "float"

    @cached_property
    def scored(self) -> bool:
        return True

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.lhs, self.rhs)

    @cached_property
    def axes(self) -> frozenset[Axis]:  # type: ignore[override]
        return (self.lhs.axes | self.rhs.axes) - {self.axis}


@dataclass(frozen=True, eq=False)
class Reduce(Expr):
    """``name`` ("sum" or "max") of ``body`` over all values of ``axis``."""

    name: str
    axis: Axis
    body: Expr
    kind: Kind = "float"

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.body,)

    @cached_property
    def axes(self) -> frozenset[Axis]:  # type: ignore[override]
        return self.body.axes - {self.axis}


@dataclass(frozen=True, eq=False)
class Op(Expr):
    name: str
    args: tuple[Expr, ...]

    @cached_property
    def kind(self) -> Kind:  # type: ignore[override]
        if self.name in BOOLEAN:
            return "bool"
        if self.name in INTEGER:
            return "int"
        if self.name == "where":
            return self.args[1].kind
        return "int" if self.name in POLYMORPHIC and all(a.kind == "int" for a in self.args) else "float"

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.args


LOST = 32.0  # scores are small: added to a number whose neighbours are that far away, they leave hardly a trace

COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
BOOLEAN = frozenset([*COMPARISONS, "and", "or", "not", "isnan"])
INTEGER = frozenset(["trunc", "random"])
POLYMORPHIC = frozenset(["add", "sub", "mul", "neg", "abs", "min", "max", "floordiv", "mod"])

EXACT = 2**24  # up to there every whole number is a float32
TRUE, FALSE, ONE = Const(True), Const(False), Const(1.0)


def integer(value: sp.Expr | int) -> Int:
    return Int(sp.sympify(value))


def number(expr: Expr) -> float | None:
    """The value of a compile-time number, or None."""
    if isinstance(expr, Const) and not isinstance(expr.value, bool):
        return expr.value
    if isinstance(expr, Int) and expr.value.is_Integer:
        return float(expr.value)
    return None


def limited(expr: Expr) -> tuple[Expr, float] | None:
    """What is kept from a number on, or up to one, and that number: where it is equal to it, all of a gradient is its own."""
    if not isinstance(expr, Op) or expr.kind != "float":
        return None
    if expr.name == "relu":
        return expr.args[0], 0.0
    values = [number(arg) for arg in expr.args]
    found = [(arg, limit) for arg, limit in zip(expr.args, reversed(values), strict=True) if limit is not None]
    return found[0] if expr.name in ("min", "max") and len(found) == 1 else None


# ---------------------------------------------------------------------------------------------- folding constructors

_FOLD: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": abs,
    "relu": lambda a: max(a, 0.0),
    "min": min,
    "max": max,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "tanh": math.tanh,
    "pow": lambda a, b: a**b,
    "float": float,
}
_INT_FOLD: dict[str, Callable[..., sp.Expr]] = {
    "add": lambda a, b: recombine(a + b),
    "sub": lambda a, b: recombine(a - b),
    "mul": lambda a, b: sp.expand(a * b),
    "neg": lambda a: sp.expand(-a),
    "abs": lambda a: a if never_negative(a) else (-a if never_negative(-a) else sp.Abs(a)),
    "min": lambda a, b: a if never_negative(b - a) else (b if never_negative(a - b) else sp.Min(a, b)),
    "max": lambda a, b: b if never_negative(b - a) else (a if never_negative(a - b) else sp.Max(a, b)),
    "floordiv": floordiv,
    "mod": modulo,
}
_DIVIDES = frozenset(["floordiv", "mod"])


def op(name: str, *args: Expr) -> Expr:
    """``Op(name, args)``, folded where the result is provable."""
    if name in COMPARISONS:
        return compare(name, *args)
    if name in _CONSTRUCTORS:
        return _CONSTRUCTORS[name](*args)
    args = tuple(map(as_number, args))
    if all(isinstance(a, Int) for a in args) and name in _INT_FOLD:
        divisor_known = name not in _DIVIDES or args[1].value.is_positive  # type: ignore[attr-defined]
        if divisor_known:
            return Int(_INT_FOLD[name](*(a.value for a in args)))  # type: ignore[attr-defined]
    if folded := _fold_numbers(name, args):
        return folded
    if (whole := _fold_whole(name, args)) is not None:
        return whole
    if (simpler := _unit_laws(name, args)) is not None:
        return simpler
    if (pushed := _push_into_where(name, args)) is not None:
        return pushed
    return Op(name, args)


def as_number(expr: Expr) -> Expr:
    """A bool used in arithmetic counts as 0 or 1."""
    return where(expr, integer(1), integer(0)) if expr.kind == "bool" else expr


def _fold_numbers(name: str, args: tuple[Expr, ...]) -> Expr | None:
    values = [number(a) for a in args]
    if name not in _FOLD or any(v is None for v in values):
        return None
    try:
        return Const(float(_FOLD[name](*values)))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


def _fold_whole(name: str, args: tuple[Expr, ...]) -> Expr | None:
    """Whole numbers in floats stay whole: ``1.0 * float(j + 1) - 1.0 -> float(j)``, so that what positions decide is seen."""
    if name not in ("add", "sub", "mul"):
        return None
    values = [_whole(a) for a in args]
    if any(v is None for v in values):
        return None
    return to_float(Int(_INT_FOLD[name](*values)))


def _whole(expr: Expr) -> sp.Expr | None:
    if isinstance(expr, Op) and expr.name == "float":
        expr = expr.args[0]
    if isinstance(expr, Int):
        return expr.value
    value = number(expr)
    exact = value is not None and abs(value) < EXACT and value == int(value)
    return sp.Integer(int(value)) if exact and value is not None else None


def _unit_laws(name: str, args: tuple[Expr, ...]) -> Expr | None:
    """``x*1, x+0, x-0, x/1 -> x`` and ``0+x -> x``; ``x*0`` stays, for x may be infinite."""
    if len(args) != 2:
        return None
    left, right = (number(a) for a in args)
    unit = {"mul": 1.0, "div": 1.0, "add": 0.0, "sub": 0.0}.get(name)
    if unit is None:
        return None
    if right == unit and args[0].kind == "float":
        return args[0]
    if left == unit and name in ("mul", "add") and args[1].kind == "float":
        return args[1]
    return None


def _push_into_where(name: str, args: tuple[Expr, ...]) -> Expr | None:
    """``f(where(c, x, y), k) -> where(c, f(x, k), f(y, k))`` when x, y and k are numbers."""
    choices = [a for a in args if isinstance(a, Op) and a.name == "where"]
    if len(choices) != 1 or name == "where":
        return None
    condition, *branches = choices[0].args
    others = [a for a in args if a is not choices[0]]
    if any(number(x) is None for x in (*branches, *others)):
        return None
    new = [op(name, *(branch if a is choices[0] else a for a in args)) for branch in branches]
    return where(condition, *new)


_FLIP = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}
_PYTHON: dict[str, Callable[[float, float], bool]] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


def compare(name: str, left: Expr, right: Expr) -> Expr:
    """A comparison, decided where the spans of both sides decide it."""
    if left.kind == right.kind == "bool" and name in ("eq", "ne"):
        return _compare_bools(name, left, right)
    left, right = as_number(left), as_number(right)
    if isinstance(left, Int) and isinstance(right, Int):
        verdict = _decide(name, left.value, right.value)
        return Op(name, (left, right)) if verdict is None else Const(verdict)
    a, b = number(left), number(right)
    if a is not None and b is not None:
        return Const(_PYTHON[name](a, b))
    for choice, other, relation in ((left, b, name), (right, a, _FLIP[name])):
        if isinstance(choice, Op) and choice.name == "where" and other is not None:
            yes, no = (number(branch) for branch in choice.args[1:])
            if yes is not None and no is not None:
                outcomes = (Const(_PYTHON[relation](yes, other)), Const(_PYTHON[relation](no, other)))
                return where(choice.args[0], *outcomes)
    return Op(name, (left, right))


def _compare_bools(name: str, left: Expr, right: Expr) -> Expr:
    for known, other in ((left, right), (right, left)):
        if isinstance(known, Const):
            return other if known.value == (name == "eq") else negate(other)
    if left == right:
        return Const(name == "eq")
    both = op("or", op("and", left, right), op("and", negate(left), negate(right)))
    return both if name == "eq" else negate(both)


def _decide(name: str, left: sp.Expr, right: sp.Expr) -> bool | None:
    if name in ("gt", "ge"):
        return _decide(_FLIP[name], right, left)
    if name == "lt":
        return True if always_less(left, right) else (False if never_negative(left - right) else None)
    if name == "le":
        return True if never_negative(right - left) else (False if always_less(right, left) else None)
    if sp.expand(left - right) == 0:
        return name == "eq"
    if always_less(left, right) or always_less(right, left):
        return name == "ne"
    return None


_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


def negate(expr: Expr) -> Expr:
    """Logical not; comparisons of integers flip (floats do not: NaN)."""
    if isinstance(expr, Const):
        return Const(not expr.value)
    if isinstance(expr, Op):
        if expr.name == "not":
            return expr.args[0]
        if expr.name in ("and", "or"):
            dual = "or" if expr.name == "and" else "and"
            return op(dual, *(negate(a) for a in expr.args))
        if expr.name in _NEGATED and all(a.kind == "int" for a in expr.args):
            return Op(_NEGATED[expr.name], expr.args)
    return Op("not", (expr,))


def _junction(name: str) -> Callable[..., Expr]:
    absorbing, neutral = (FALSE, TRUE) if name == "and" else (TRUE, FALSE)

    def build(*args: Expr) -> Expr:
        flat: dict[Expr, None] = {}
        for arg in args:
            arg = arg if arg.kind == "bool" else compare("ne", arg, integer(0))
            parts = arg.args if isinstance(arg, Op) and arg.name == name else (arg,)
            flat.update(dict.fromkeys(parts))
        if absorbing in flat or any(negate(part) in flat for part in flat):
            return absorbing
        flat.pop(neutral, None)
        terms = tuple(flat)
        return Op(name, terms) if len(terms) > 1 else (terms[0] if terms else neutral)

    return build


def where(condition: Expr, yes: Expr, no: Expr) -> Expr:
    """``yes if condition else no``, folded where the branches agree wherever the condition could matter."""
    if isinstance(condition, Const):
        return yes if condition.value else no
    if yes.kind == no.kind == "bool":
        return op("or", op("and", condition, yes), op("and", negate(condition), no))
    yes, no = _same_kind(_chosen(as_number(yes), condition, 1), _chosen(as_number(no), condition, 2))
    if yes == no or _agree_at_boundary(condition, yes, no):
        return no
    return Op("where", (condition, yes, no))


def _chosen(branch: Expr, condition: Expr, place: int) -> Expr:
    """``where(c, where(c, x, y), z) -> where(c, x, z)``, and the same for the other branch."""
    while isinstance(branch, Op) and branch.name == "where" and branch.args[0] == condition:
        branch = branch.args[place]
    return branch


def _same_kind(left: Expr, right: Expr) -> tuple[Expr, Expr]:
    if left.kind == right.kind:
        return left, right
    return to_float(left), to_float(right)


def _agree_at_boundary(condition: Expr, yes: Expr, no: Expr) -> bool:
    """``where(x < 1, f(0), f(x)) -> f(x)`` for x >= 0: the condition pins x to one value, and there both agree."""
    if not (isinstance(condition, Op) and condition.name in ("lt", "le", "eq")):
        return False
    left, right = condition.args
    if not (isinstance(left, Int) and isinstance(left.value, Axis) and isinstance(right, Int)):
        return False
    highest = right.value - 1 if condition.name == "lt" else right.value
    pinned = highest == 0 or condition.name == "eq"
    return pinned and substitute(yes, {left.value: highest}) == substitute(no, {left.value: highest})


def to_float(expr: Expr) -> Expr:
    if expr.kind == "float":
        return expr
    if (value := number(expr)) is not None:
        return Const(value)
    if expr.kind == "bool":
        return where(expr, Const(1.0), Const(0.0))
    if isinstance(expr, Op) and expr.name == "where" and all(number(a) is not None for a in expr.args[1:]):
        return where(expr.args[0], *(to_float(a) for a in expr.args[1:]))
    return Op("float", (expr,))


def to_bool(expr: Expr) -> Expr:
    return expr if expr.kind == "bool" else compare("ne", expr, integer(0) if expr.kind == "int" else Const(0.0))


def to_int(expr: Expr) -> Expr:
    """Rounds a float toward zero, as a cast to an integer type does."""
    if expr.kind == "float":
        value = number(expr)
        return integer(int(value)) if value is not None and math.isfinite(value) else Op("trunc", (expr,))
    return as_number(expr)


def power(base: Expr, exponent: Expr) -> Expr:
    """``base ** exponent`` in operations that kernels have, where the exponent or a positive base is a number."""
    base, exponent = as_number(base), as_number(exponent)
    value, known = number(exponent), number(base)
    if folded := _fold_numbers("pow", (base, exponent)):
        return folded
    if value in (1.0, 2.0, 3.0):
        return reduce(lambda e, f: op("mul", e, f), [base] * int(value))
    if value in (0.5, -0.5):
        return op("sqrt" if value > 0 else "rsqrt", base)
    if known is not None and known > 0:
        return op("exp2", op("mul", to_float(exponent), Const(math.log2(known))))
    return Op("pow", (base, exponent))


_CONSTRUCTORS: dict[str, Callable[..., Expr]] = {
    "pow": power,
    "and": _junction("and"),
    "or": _junction("or"),
    "not": lambda x: negate(to_bool(x)),
    "where": where,
    "float": to_float,
    "trunc": to_int,
}


# ---------------------------------------------------------------------------------------------------------- rewriting


def rebuild(expr: Expr, children: tuple[Expr, ...]) -> Expr:
    """The same node over other children, folded again."""
    if isinstance(expr, Op):
        return op(expr.name, *children)
    if isinstance(expr, Load):
        return Load(expr.source, children, expr.kind)
    if isinstance(expr, Access):
        return Access(expr.source, children)
    if isinstance(expr, Dot):
        left, right = children
        return Dot(left, right, expr.axis, expr.node)  # type: ignore[arg-type]
    if isinstance(expr, Reduce):
        return Reduce(expr.name, expr.axis, children[0])
    return expr


def transform(expr: Expr, rule: Callable[[Expr], Expr | None]) -> Expr:
    """Top-down rewriting: where ``rule`` answers, its answer stands; elsewhere the children are rewritten."""
    memo: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if node not in memo:
            replaced = rule(node)
            if replaced is None:
                children = tuple(visit(child) for child in node.children)
                replaced = node if children == node.children else rebuild(node, children)
            memo[node] = replaced
        return memo[node]

    return visit(expr)


def substitute(expr: Expr, values: Mapping[Any, sp.Expr]) -> Expr:
    """Replace axes or size symbols by other integer expressions, everywhere that they are free and at once."""
    plain = dict(values)

    def rule(node: Expr) -> Expr | None:
        if isinstance(node, (Dot, Reduce)) and node.axis in plain:
            others = {symbol: value for symbol, value in plain.items() if symbol != node.axis}
            return rebuild(node, tuple(substitute(child, others) for child in node.children))
        if isinstance(node, Int):
            return Int(node.value.xreplace(plain)) if node.value.free_symbols & plain.keys() else node
        return None

    return transform(expr, rule)


def terms(expr: Expr, sign: float = 1.0) -> list[Expr]:
    """The summands of a float sum; a negated summand is multiplied by -1, a scaled sum is distributed."""
    if isinstance(expr, Op) and expr.name in ("add", "sub"):
        flip = -sign if expr.name == "sub" else sign
        return terms(expr.args[0], sign) + terms(expr.args[1], flip)
    if isinstance(expr, Op) and expr.name == "neg":
        return terms(expr.args[0], -sign)
    if isinstance(expr, Op) and expr.name in ("mul", "div"):
        left, right = expr.args
        if (factor := number(right)) is not None and factor != 0:
            return terms(left, sign * (factor if expr.name == "mul" else 1 / factor))
        if expr.name == "mul" and (factor := number(left)) is not None:
            return terms(right, sign * factor)
    if isinstance(expr, Op) and expr.name == "float" and isinstance(expr.args[0], Int):
        parts = sp.Add.make_args(sp.expand(expr.args[0].value))
        return [_scaled(to_float(Int(part)), sign) for part in parts]
    return [_scaled(expr, sign)]


def _scaled(expr: Expr, factor: float) -> Expr:
    one = math.isclose(factor, 1, rel_tol=1e-15)  # a number times its own reciprocal may be off by a rounding
    return expr if one else op("mul", expr, Const(factor))


def total(parts: list[Expr]) -> Expr:
    """The sum of ``parts``; 0.0 for none."""
    result: Expr = Const(0.0)
    for part in parts:
        result = op("add", result, part)
    return result
