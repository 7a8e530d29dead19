"""From a mask expression to the key blocks a query tile must visit, in closed form.

For a tile of rows ``first .. last`` and a mask ``P(i, j)``:

``visit``    covers  { j : P(i, j) for some row i }      keys outside need not be loaded
``partial``  covers  { j : not P(i, j) for some row i }  keys outside need no masking

One primitive serves both: eliminate ``i`` from each conjunction of the disjunctive normal form of ``P`` or of ``not P``. An
atom that cannot be solved for ``j`` (a loaded element, say) is dropped, which only makes the cover larger: more blocks
visited, more blocks masked, never a wrong result.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import sympy as sp

from attngen.algebra import COMPARISONS, FALSE, TRUE, Expr, Int, Load, Op, negate, substitute
from attngen.compat import FloorDiv
from attngen.index import Axis
from attngen.spec import KEY, ROW
from attngen.text import index_text

FIRST = sp.Symbol("first", integer=True, nonnegative=True)
LAST = sp.Symbol("last", integer=True, nonnegative=True)
SIZE = KEY.extent
MAX_CONJUNCTIONS = 64


@dataclass(frozen=True)
class Interval:
    """Keys ``low <= j < high``, or none unless every expression of ``when`` is at least zero."""

    low: sp.Expr
    high: sp.Expr
    when: tuple[sp.Expr, ...] = ()


@dataclass(frozen=True)
class Cover:
    """See the module docstring; ``exact`` says that nothing had to be dropped or widened."""

    visit: tuple[Interval, ...]
    partial: tuple[Interval, ...]
    exact: bool


EVERYTHING = Interval(sp.Integer(0), SIZE)


def derive(mask: Expr) -> Cover:
    """The cover of ``mask`` over the spec's row and key axes."""
    visit, visit_exact = _eliminate_rows(mask)
    partial, partial_exact = _eliminate_rows(negate(mask))
    return Cover(visit, partial, visit_exact and partial_exact)


def _eliminate_rows(mask: Expr) -> tuple[tuple[Interval, ...], bool]:
    conjunctions = _dnf(mask)
    if conjunctions is None:
        return (EVERYTHING,), False
    projected = [_project(atoms, exact) for atoms, exact in conjunctions]
    intervals = tuple(dict.fromkeys(interval for interval, _ in projected))
    return intervals, all(exact for _, exact in projected)


# ------------------------------------------------------------------------------------------- disjunctive normal form

Conjunction = tuple[list[sp.Expr], bool]  # atoms, each "expression >= 0"; False if an atom was dropped


def _dnf(expr: Expr) -> list[Conjunction] | None:
    if expr == TRUE:
        return [([], True)]
    if expr == FALSE:
        return []
    if isinstance(expr, Op) and expr.name == "or":
        parts = [_dnf(a) for a in expr.args]
        return _limited([c for part in parts if part is not None for c in part]) if None not in parts else None
    if isinstance(expr, Op) and expr.name == "and":
        product: list[Conjunction] | None = [([], True)]
        for arg in expr.args:
            right = _dnf(arg)
            if product is None or right is None:
                return None
            pairs = itertools.product(product, right)
            product = _limited([(a + b, exact_a and exact_b) for (a, exact_a), (b, exact_b) in pairs])
        return product
    if isinstance(expr, Op) and expr.name == "not":
        opened = negate(expr.args[0])
        return [([], False)] if opened == expr else _dnf(opened)
    return _atom(expr)


def _limited(conjunctions: list[Conjunction]) -> list[Conjunction] | None:
    return conjunctions if len(conjunctions) <= MAX_CONJUNCTIONS else None


def _atom(expr: Expr) -> list[Conjunction]:
    """A comparison of integers as one or two inequalities; anything else is dropped."""
    if not (isinstance(expr, Op) and all(isinstance(a, Int) for a in expr.args)):
        return [([], False)]
    left, right = (a.value for a in expr.args)  # type: ignore[attr-defined]
    gap = right - left
    inequalities = {
        "le": [[gap]],
        "lt": [[gap - 1]],
        "ge": [[-gap]],
        "gt": [[-gap - 1]],
        "eq": [[gap, -gap]],
        "ne": [[gap - 1], [-gap - 1]],
    }.get(expr.name)
    if inequalities is None:
        return [([], False)]
    return [c for atoms in inequalities for c in _without_abs(atoms)]


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


# --------------------------------------------------------------------------------------------------------- projection


def _project(atoms: list[sp.Expr], exact: bool) -> tuple[Interval, bool]:
    """The keys for which some row of the tile satisfies all atoms; a superset where they cannot be solved together."""
    lows: list[sp.Expr] = []
    highs: list[sp.Expr] = []
    first, last, when = [FIRST], [LAST], []
    for atom in atoms:
        if not atom.has(ROW) and not atom.has(KEY):
            when.append(atom)
            continue
        side, bound = _solve(atom, KEY if atom.has(KEY) else ROW)
        if side is None:
            exact = False
        elif atom.has(KEY):
            (lows if side == "low" else highs).append(bound)
        else:
            (first if side == "low" else last).append(bound)
    begin, end = sp.Max(*first), sp.Min(*last)
    if len(first) + len(last) > 2:
        when.append(end - begin)
    low, low_directions = _extreme(lows, begin, end, lowest=True)
    high, high_directions = _extreme(highs, begin, end, lowest=False)
    directions = low_directions | high_directions
    exact = exact and None not in directions and len(directions - {0}) <= 1
    return Interval(sp.Max(0, *low), sp.Min(SIZE, *(h + 1 for h in high)), tuple(when)), exact


def _extreme(
    bounds: list[sp.Expr], begin: sp.Expr, end: sp.Expr, *, lowest: bool
) -> tuple[list[sp.Expr], set[int | None]]:
    """Each bound at the row of the tile where it is loosest; bounds that are not monotone in the row are dropped."""
    loosest: list[sp.Expr] = []
    directions: set[int | None] = set()
    for bound in bounds:
        direction = _direction(bound, ROW)
        directions.add(direction)
        if direction is not None:
            row = begin if (direction > 0) == lowest else end
            loosest.append(bound if direction == 0 else bound.xreplace({ROW: row}))
    return loosest, directions


def _direction(expr: sp.Expr, symbol: sp.Symbol) -> int | None:
    """1, -1 or 0 if ``expr`` never falls, never rises or does not change with ``symbol``; None if unknown."""
    if not expr.has(symbol):
        return 0
    if expr == symbol:
        return 1
    if isinstance(expr, (sp.Add, sp.Max, sp.Min)):
        directions = {_direction(a, symbol) for a in expr.args} - {0}
        return directions.pop() if len(directions) == 1 else None
    if isinstance(expr, sp.Mul):
        factor, rest = expr.as_independent(symbol, as_Add=False)
        inner = _direction(rest, symbol) if factor != 1 else None
        if inner is None or not (factor.is_nonnegative or factor.is_nonpositive):
            return None
        return inner if factor.is_nonnegative else -inner
    if isinstance(expr, FloorDiv) and expr.args[1].is_positive:
        return _direction(expr.args[0], symbol)
    return None


def _solve(atom: sp.Expr, symbol: Axis) -> tuple[str | None, sp.Expr]:
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
        return _solve(sp.expand(atom), symbol)
    return None, sp.S.Zero


def _floor_div(expr: sp.Expr, divisor: sp.Expr) -> sp.Expr:
    return expr if divisor == 1 else FloorDiv(expr, divisor)


def _ceil_div(expr: sp.Expr, divisor: sp.Expr) -> sp.Expr:
    return expr if divisor == 1 else -FloorDiv(-expr, divisor)


# -------------------------------------------------------------------------------------------------------- no empty row


def no_row_is_empty(mask: Expr, row: Axis, key: Axis) -> bool:
    """Proved: every row keeps at least one key, whatever the tensors hold. Tries the diagonal and both ends."""
    gap = sp.expand(key.extent - row.extent)
    candidates = [sp.S.Zero, key.extent - 1]
    if gap.is_nonnegative:
        candidates += [row, row + gap]
    return any(substitute(mask, {key: place}) == TRUE for place in candidates)


# ------------------------------------------------------------------------------------------------------------- reading


def describe(mask: Expr) -> str | None:
    """The mask in the field's words (``causal & window(4096)``), or None if it has no such name."""
    if mask == TRUE:
        return ""
    parts = mask.args if isinstance(mask, Op) and mask.name == "and" else (mask,)
    low: sp.Expr | None = None
    high: sp.Expr | None = None
    others: list[str] = []
    for part in parts:
        conjunctions = _atom(part)
        atoms = conjunctions[0][0] if len(conjunctions) == 1 and conjunctions[0][1] else None
        bounds = [_band(atom) for atom in atoms] if atoms else [None]
        if None in bounds:
            name = _named(part)
            if name is None:
                return None
            others.append(name)
            continue
        for side, offset in bounds:  # type: ignore[misc]
            low, high = (offset, high) if side == "low" else (low, offset)
    return " & ".join([*_band_names(low, high), *others])


def _band(atom: sp.Expr) -> tuple[str, sp.Expr] | None:
    """``j <= i + c`` or ``j >= i + c``."""
    side, bound = _solve(atom, KEY) if atom.has(KEY) else (None, sp.S.Zero)
    if side is None or not bound.has(ROW) or sp.expand(bound - ROW).has(ROW):
        return None
    return side, sp.expand(bound - ROW)


def _band_names(low: sp.Expr | None, high: sp.Expr | None) -> list[str]:
    if low is not None and high is not None and sp.expand(low + high) == 0 and high != 0:
        return [f"window(±{index_text(high)})"]
    if low is not None and high is None:
        return [f"anticausal{'' if low == 0 else f'(offset {index_text(low)})'}"]
    names = []
    if high is not None:
        names.append("causal" if high == 0 else f"causal(offset {index_text(high)})")
    if low is not None and high is not None:
        names.append(f"window({index_text(1 - low + high)})")
    return names


def _named(part: Expr) -> str | None:
    """A part that is no band: by what it looks at."""
    if isinstance(part, Op) and part.name == "or":
        names = [describe(choice) for choice in part.args]
        return None if None in names else f"({' | '.join(map(str, names))})"
    loads = [node for node in part.walk() if isinstance(node, Load)]
    if not loads:
        return _named_position(part)
    if any(ROW in load.axes and KEY in load.axes for load in loads):
        return None
    row, key = (any(axis in load.axes for load in loads) for axis in (ROW, KEY))
    if KEY not in part.axes:
        return "query padding"
    if isinstance(part, Op) and part.name in COMPARISONS and row and key:
        return "documents" if part.name == "eq" else "causal(loaded positions)"
    if isinstance(part, Op) and part.name in COMPARISONS and not key:
        return "causal(loaded positions)"
    return "padding" if ROW not in part.axes else None


def _named_position(part: Expr) -> str | None:
    if not (isinstance(part, Op) and all(isinstance(a, Int) for a in part.args)):
        return None
    left, right = (a.value for a in part.args)  # type: ignore[attr-defined]
    if part.name == "eq" and isinstance(left, FloorDiv) and isinstance(right, FloorDiv):
        return f"chunks({left.args[1]})" if left.args[1] == right.args[1] else None
    conjunctions = _atom(part)
    atoms = conjunctions[0][0] if len(conjunctions) == 1 else []
    if len(atoms) == 1 and atoms[0].has(KEY) and not atoms[0].has(ROW):
        side, bound = _solve(atoms[0], KEY)
        return {"high": f"prefix({index_text(bound + 1)})", "low": f"from({index_text(bound)})"}.get(str(side))
    return None
