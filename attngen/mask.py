"""From a mask expression to the key blocks a query tile must visit.

For a tile of rows ``first .. last`` and a mask ``P(i, j)``:

``visit``    covers  { j : P(i, j) for some row i }      keys outside need not be loaded
``partial``  covers  { j : not P(i, j) for some row i }  keys outside need no masking

One primitive serves both: eliminate ``i`` from each conjunction of the disjunctive normal form of ``P`` or of ``not P``. An
atom that cannot be solved for ``j`` is dropped, which only makes the cover larger: more blocks visited, more blocks masked,
never a wrong result.

What is loaded takes part as a symbol, a ``Datum``. If it is the same for all keys (a length, a position), bounds are
arithmetic with its least and largest value over the rows of the tile. If it differs from key to key (padding, document
ids), the row is eliminated all the same, by these values, and what remains is a condition on keys one by one (``among``):
a kernel looks for the first and the last key that meets it. Only what is loaded per pair is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy as sp

from attngen.algebra import TRUE, Expr, negate, substitute
from attngen.compat import FloorDiv
from attngen.index import Axis, remembered
from attngen.inequalities import Datum, datum, dnf, solve
from attngen.spec import KEY, ROW

FIRST = sp.Symbol("first", integer=True, nonnegative=True)
LAST = sp.Symbol("last", integer=True, nonnegative=True)
SIZE = KEY.extent
MAX_RUNS = 6  # stretches of keys that a kernel compares


@dataclass(frozen=True)
class Interval:
    """Keys ``low <= j < high``, or none unless every expression of ``when`` is at least zero.

    Of these keys only those count for which every expression of ``among`` is at least zero.
    """

    low: sp.Expr
    high: sp.Expr
    when: tuple[sp.Expr, ...] = ()
    among: tuple[sp.Expr, ...] = ()

    @property
    def data(self) -> list[Datum]:
        """What is loaded to know this interval, in an order that depends on the text alone."""
        found = set().union(*(e.atoms(Datum) for e in (self.low, self.high, *self.when, *self.among)))
        return sorted(found, key=lambda each: str(each.name))


@dataclass(frozen=True)
class Cover:
    """See the module docstring; ``exact`` says that nothing had to be dropped or widened."""

    visit: tuple[Interval, ...]
    partial: tuple[Interval, ...]
    exact: bool


EVERYTHING = Interval(sp.Integer(0), SIZE)


@remembered
def derive(mask: Expr) -> Cover:
    """The cover of ``mask`` over the spec's row and key axes."""
    visit, visit_exact = _eliminate_rows(mask)
    partial, partial_exact = _eliminate_rows(negate(mask))
    return Cover(visit, partial, visit_exact and partial_exact)


def by_position(interval: Interval) -> Interval:
    """The interval as far as positions alone bound it."""
    low, high = (_without_data(e) for e in (interval.low, interval.high))
    return Interval(low, high, tuple(e for e in interval.when if not e.atoms(Datum)))


def _without_data(bound: sp.Expr) -> sp.Expr:
    """``Max`` or ``Min`` over those of its arguments that are known."""
    return bound.func(*(a for a in bound.args if not a.atoms(Datum))) if bound.atoms(Datum) else bound


def grouped(intervals: tuple[Interval, ...]) -> list[tuple[Interval, ...]]:
    """Intervals that overlap or are empty, together: those from the first key on, those up to the last key; others alone."""
    heads = tuple(i for i in intervals if i.low == 0 and not i.among)
    tails = tuple(i for i in intervals if i.high == SIZE and not i.among and i not in heads)
    others = [(i,) for i in intervals if i not in heads and i not in tails]
    return [group for group in (heads, tails, *others) if group]


def heavy_first(cover: Cover) -> bool:
    """Whether tiles see more keys the later their rows are, so that the last ones are started first."""
    return any(interval.high.has(FIRST, LAST) for interval in cover.visit)


def may_be_full(cover: Cover) -> bool:
    """Some block may need no mask, and it can be told which."""
    always = any(i.low == 0 and i.high == SIZE and not i.when and not i.among for i in cover.partial)
    return not always and len(grouped(cover.partial)) <= MAX_RUNS


def _eliminate_rows(mask: Expr) -> tuple[tuple[Interval, ...], bool]:
    conjunctions = dnf(mask)
    if conjunctions is None:
        return (EVERYTHING,), False
    projected = [found for atoms, exact in conjunctions if (found := _project(atoms, exact)) is not None]
    kept: list[Interval] = []
    for interval in dict.fromkeys(interval for interval, _ in projected):
        if not any(_within(interval, other) for other in kept):
            kept = [*(other for other in kept if not _within(other, interval)), interval]
    return tuple(kept), all(exact for _, exact in projected)


def _within(inner: Interval, outer: Interval) -> bool:
    """Whatever the sizes and the data, ``outer`` holds all that ``inner`` does."""
    if not (set(outer.when) <= set(inner.when) and set(outer.among) <= set(inner.among)):
        return False
    starts, begins = sp.Max.make_args(outer.low), sp.Max.make_args(inner.low)
    stops, ends = sp.Min.make_args(outer.high), sp.Min.make_args(inner.high)
    before = all(any(_at_least(begin, start) for begin in begins) for start in starts)
    return before and all(any(_at_least(stop, end) for end in ends) for stop in stops)


def _at_least(left: sp.Expr, right: sp.Expr) -> bool:
    return left == right or bool((left - right).is_nonnegative)


# --------------------------------------------------------------------------------------------------------- projection


def _project(atoms: list[sp.Expr], exact: bool) -> tuple[Interval, bool] | None:
    """The keys for which some row of the tile satisfies all atoms, or more where they cannot be solved together; None if
    no row ever does."""
    lows: list[sp.Expr] = []
    highs: list[sp.Expr] = []
    first, last = [FIRST], [LAST]
    when: list[sp.Expr] = []
    among: list[sp.Expr] = []
    for atom in atoms:
        target = _target(atom)
        if target is None:
            loose = _loosened(atom)
            exact = exact and loose == atom and not _by_key(atom)
            if loose is not None:
                (among if _by_key(atom) else when).append(loose)
            continue
        side, bound = solve(atom, target)
        if side is None:
            exact = False
        elif target is KEY:
            (lows if side == "low" else highs).append(bound)
        else:
            (first if side == "low" else last).append(bound)
    distances = _distances(lows, highs)
    if any(distance.is_negative for distance in distances):
        return None
    begin, end = _largest(*first), _smallest(*last)
    if len(first) + len(last) > 2:
        when.append(end - begin)
    low, low_directions = _extreme(lows, begin, end, lowest=True)
    high, high_directions = _extreme(highs, begin, end, lowest=False)
    directions = low_directions | high_directions
    exact = exact and None not in directions and len(directions - {0}) <= 1
    conditions = tuple(dict.fromkeys([*when, *(d for d in distances if not d.is_nonnegative)]))
    begin, end = _largest(sp.S.Zero, *low), _smallest(SIZE, *(h + 1 for h in high))
    return Interval(begin, end, conditions, tuple(dict.fromkeys(among))), exact


def _largest(*args: sp.Expr) -> sp.Expr:
    return _extremum(sp.Max, frozenset(args))


def _smallest(*args: sp.Expr) -> sp.Expr:
    return _extremum(sp.Min, frozenset(args))


@remembered
def _extremum(of: type[sp.Expr], args: frozenset[sp.Expr]) -> sp.Expr:
    return of(*args)  # sympy takes milliseconds, and the conjunctions of one mask ask for few different ones


def _target(atom: sp.Expr) -> Axis | None:
    """What to solve ``atom`` for; None for a condition on the tile, or on keys one by one."""
    if _by_key(atom):
        return None
    if atom.has(KEY):
        return KEY
    return ROW if atom.has(ROW) and not _by_row(atom) else None


def _by_key(expr: sp.Expr) -> bool:
    return any(each.role == "key" for each in expr.atoms(Datum))


def _by_row(expr: sp.Expr) -> list[Datum]:
    return sorted((each for each in expr.atoms(Datum) if each.role == "row"), key=lambda each: str(each.name))


def _loosened(atom: sp.Expr) -> sp.Expr | None:
    """What some row of the tile needs to make ``atom`` at least zero: the atom where it is largest in each of its parts."""
    ends: dict[sp.Symbol, tuple[sp.Symbol, sp.Symbol]] = {each: _ends(each) for each in _by_row(atom)}
    if atom.has(ROW):
        ends[ROW] = (FIRST, LAST)
    directions = {part: _direction(sp.expand(atom), part) for part in ends}
    if None in directions.values():
        return None
    return atom.xreplace({part: ends[part][direction > 0] for part, direction in directions.items()})  # type: ignore[operator]


def _ends(each: Datum) -> tuple[Datum, Datum]:
    return datum(each.expr, "least"), datum(each.expr, "most")


def _distances(lows: list[sp.Expr], highs: list[sp.Expr]) -> list[sp.Expr]:
    """From low to high bounds, where that is the same in all rows: no row has a key where one is negative."""
    pairs = [sp.expand(high - low) for low in lows for high in highs]
    return [distance for distance in pairs if not distance.has(ROW) and not _by_row(distance)]


def _extreme(
    bounds: list[sp.Expr], begin: sp.Expr, end: sp.Expr, *, lowest: bool
) -> tuple[list[sp.Expr], set[int | None]]:
    """Each bound at the row of the tile where it is loosest; bounds that are not monotone in the row are dropped."""
    loosest: list[sp.Expr] = []
    directions: set[int | None] = set()
    for bound in bounds:
        ends: dict[sp.Symbol, tuple[sp.Expr, sp.Expr]] = {ROW: (begin, end), **{d: _ends(d) for d in _by_row(bound)}}
        found = {part: _direction(bound, part) for part in ends}
        directions |= {found[ROW], *(None for part in ends if part is not ROW)}
        if None not in found.values():
            loosest.append(bound.xreplace({p: ends[p][(d < 0) == lowest] for p, d in found.items()}))  # type: ignore[operator]
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


# -------------------------------------------------------------------------------------------------------- no empty row


def no_row_is_empty(mask: Expr, row: Axis, key: Axis) -> bool:
    """Proved: every row keeps at least one key, whatever the tensors hold. Tries the diagonal and both ends."""
    gap = sp.expand(key.extent - row.extent)
    candidates = [sp.S.Zero, key.extent - 1]
    if gap.is_nonnegative:
        candidates += [row, row + gap]
    return any(substitute(mask, {key: place}) == TRUE for place in candidates)
