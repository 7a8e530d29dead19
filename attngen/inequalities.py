"""A truth expression over row and key as inequalities: its disjunctive normal form, and one solved for a position."""

from __future__ import annotations

import itertools

import sympy as sp

from attngen.algebra import FALSE, TRUE, Expr, Int, Op, negate, number
from attngen.compat import FloorDiv
from attngen.index import Axis, remembered
from attngen.spec import KEY, ROW
from attngen.text import canonical

MAX_CONJUNCTIONS = 64


class Datum(sp.Dummy):
    """The integer (or truth value, 0 or 1) of ``expr``, which is loaded; ``role`` says what it differs over.

    "one": nothing within a tile; "row", "key": the rows, the keys; "least", "most": its extremes over the tile's rows.
    """

    __slots__ = ("expr", "role")
    expr: Expr
    role: str


@remembered
def datum(expr: Expr, role: str) -> Datum:
    """The same object for the same value."""
    symbol: Datum = Datum(f"{role} {canonical(expr)}", integer=True)
    symbol.expr, symbol.role = expr, role
    return symbol


# ------------------------------------------------------------------------------------------- disjunctive normal form

Conjunction = tuple[list[sp.Expr], bool]  # atoms, each "expression >= 0"; False if an atom was dropped


def dnf(expr: Expr) -> list[Conjunction] | None:
    """The conjunctions of which any makes ``expr`` true; None if they are too many."""
    if expr == TRUE:
        return [([], True)]
    if expr == FALSE:
        return []
    if isinstance(expr, Op) and expr.name == "or":
        parts = [dnf(a) for a in expr.args]
        return _limited([c for part in parts if part is not None for c in part]) if None not in parts else None
    if isinstance(expr, Op) and expr.name == "and":
        product: list[Conjunction] | None = [([], True)]
        for arg in expr.args:
            right = dnf(arg)
            if product is None or right is None:
                return None
            pairs = itertools.product(product, right)
            product = _limited([(list(dict.fromkeys([*a, *b])), exact_a and exact_b) for (a, exact_a), (b, exact_b) in pairs])
        return product
    if isinstance(expr, Op) and expr.name == "not":
        opened = negate(expr.args[0])
        return inequalities(expr) if opened == expr else dnf(opened)
    return inequalities(expr)


def _limited(conjunctions: list[Conjunction]) -> list[Conjunction] | None:
    return conjunctions if len(conjunctions) <= MAX_CONJUNCTIONS else None


def inequalities(expr: Expr) -> list[Conjunction]:
    """A comparison of integers as one or two inequalities, any other truth value as one; dropped if it differs per pair."""
    inverted = isinstance(expr, Op) and expr.name == "not"
    inside = expr.args[0] if isinstance(expr, Op) and inverted else expr
    compared = None if inverted else _compared(expr)
    if compared is not None:
        return [c for atoms in compared for c in _without_abs(atoms)]
    if isinstance(inside, Op) and inside.name in ("eq", "gt", "ge") and all(a.kind == "int" for a in inside.args):
        inside, inverted = negate(inside), not inverted  # one variable for a comparison and its opposite
    value = _loaded(inside)
    if value is None:
        return [([], False)]
    return [([-value if inverted else value - 1], True)]


def _compared(expr: Expr) -> list[list[sp.Expr]] | None:
    """Inequalities, any of whose groups makes a comparison of integers true; None if it is none that depends on rows."""
    if not (isinstance(expr, Op) and all(a.kind == "int" for a in expr.args)):
        return None
    sides = [_arithmetic(a) for a in expr.args]
    if len(sides) != 2 or sides[0] is None or sides[1] is None:
        return None
    gap = sides[1] - sides[0]
    roles = {each.role for each in gap.atoms(Datum)}
    if "key" in roles and "row" not in roles and not gap.has(ROW):
        return None  # a condition on keys as it stands
    return {
        "le": [[gap]],
        "lt": [[gap - 1]],
        "ge": [[-gap]],
        "gt": [[-gap - 1]],
        "eq": [[gap, -gap]],
        "ne": [[gap - 1], [-gap - 1]],
    }.get(expr.name)


def _arithmetic(expr: Expr) -> sp.Expr | None:
    """An integer expression as arithmetic over positions and data."""
    if isinstance(expr, Int):
        return expr.value
    if isinstance(expr, Op) and expr.name in ("add", "sub", "neg", "mul"):
        args = [_arithmetic(a) for a in expr.args]
        linear = expr.name != "mul" or any(number(a) is not None for a in expr.args)
        if linear and all(a is not None for a in args):
            return _LINEAR[expr.name](*args)
    return _loaded(expr)


_LINEAR = {"add": sp.Add, "sub": lambda a, b: a - b, "neg": lambda a: -a, "mul": sp.Mul}


def _loaded(expr: Expr) -> Datum | None:
    if expr.kind == "float" or {ROW, KEY} <= expr.axes:
        return None
    return datum(expr, "row" if ROW in expr.axes else "key" if KEY in expr.axes else "one")


def _without_abs(atoms: list[sp.Expr]) -> list[Conjunction]:
    """``c - |x| >= 0`` is ``c - x >= 0`` and ``c + x >= 0``; ``|x| - c >= 0`` is ``x - c >= 0`` or ``-x - c >= 0``."""
    cases: list[list[sp.Expr]] = [[]]
    for atom in atoms:
        atom = sp.expand(atom)
        found = sorted(atom.atoms(sp.Abs), key=str)
        if len(found) != 1:
            cases = [[*case, atom] for case in cases]
            continue
        inside, weight = found[0].args[0], atom.coeff(found[0])
        signed = [sp.expand(atom - weight * found[0] + weight * sign * inside) for sign in (1, -1)]
        if weight.is_negative:
            cases = [[*case, *signed] for case in cases]
        else:
            cases = [[*case, choice] for case in cases for choice in signed]
    return [(case, True) for case in cases]


# ------------------------------------------------------------------------------------------------------------ solving


def solve(atom: sp.Expr, symbol: Axis) -> tuple[str | None, sp.Expr]:
    """``atom >= 0`` as ``symbol >= bound`` ("low") or ``symbol <= bound`` ("high"); (None, 0) if that cannot be said."""
    moving = [t for t in sp.Add.make_args(sp.expand(atom)) if t.has(symbol)]
    rest = sp.expand(atom) - sp.Add(*moving)
    if len(moving) != 1:
        return None, sp.S.Zero
    weight, target = moving[0].as_independent(symbol, as_Add=False)
    if not weight.is_Integer:
        return None, sp.S.Zero
    if weight > 0:
        return _invert(target, "low", _ceil_div(-rest, weight), symbol)
    return _invert(target, "high", _floor_div(rest, -weight), symbol)


def _invert(target: sp.Expr, side: str, bound: sp.Expr, symbol: Axis) -> tuple[str | None, sp.Expr]:
    if target == symbol:
        return side, bound
    if isinstance(target, FloorDiv) and target.args[1].is_positive and not target.args[1].has(symbol):
        inside, divisor = target.args
        atom = inside - divisor * bound if side == "low" else divisor * bound + divisor - 1 - inside
        return solve(sp.expand(atom), symbol)
    return None, sp.S.Zero


def _floor_div(expr: sp.Expr, divisor: sp.Expr) -> sp.Expr:
    return expr if divisor == 1 else FloorDiv(expr, divisor)


def _ceil_div(expr: sp.Expr, divisor: sp.Expr) -> sp.Expr:
    return expr if divisor == 1 else -FloorDiv(-expr, divisor)
