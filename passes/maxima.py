"""What attention over pieces of the keys takes off its exponents: running maxima, and their guards where a row has no key.

A maximum of -inf makes NaN of a row, whatever other pieces hold. So where pieces become one softmax, each maximum is proved
to be more: it is over a piece of which every row keeps a key, or over a number too, or there is a guard.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from attngen.algebra import (
    BOOLEAN,
    FALSE,
    TRUE,
    Const,
    Expr,
    Load,
    Op,
    Reduce,
    integer,
    negate,
    number,
    op,
    substitute,
    terms,
    transform,
)
from attngen.guards import LOST
from attngen.index import Axis, numbered
from attngen.mask import no_row_is_empty

_FINITE = frozenset(["float", "add", "sub", "mul", "neg", "min", "max", "relu", "abs", "where"])
LOWEST = torch.finfo(torch.float32).min  # no score is less, but -inf


@dataclass
class Shifts:
    """The maxima that exponents are taken relative to. ``guarded``: those of them that are taken for zero where -inf."""

    found: set[Expr] = field(default_factory=set)
    guarded: set[Expr] = field(default_factory=set)
    sums: set[Expr] = field(default_factory=set)  # that are guarded against being zero

    def opened(self, expr: Expr) -> Expr:
        """``where(m == -inf, 0, m) --> m`` in what is taken off exponents."""

        def rule(node: Expr) -> Expr | None:
            if not (isinstance(node, Op) and node.name == "sub" and (shift := _guarded(node.args[1])) is not None):
                return None
            self.guarded.add(self.opened(shift))
            return op("sub", self.opened(node.args[0]), self.opened(shift))

        return transform(expr, rule)

    def unguarded(self, divisor: Expr) -> Expr:
        """``max(z, c)``, ``z + c``, ``where(z == 0, c, z) --> z``: to be proved needless but where ``z`` is zero."""
        known = _without_guard(divisor)
        self.sums |= set() if known is None else {known}
        return divisor if known is None else known

    def note(self, exprs: Iterable[Expr]) -> None:
        """Find all maxima that exponents have as terms."""
        powers = {node for expr in exprs for node in expr.walk() if isinstance(node, Op) and node.name == "exp"}
        for term in {term for power in powers for term in terms(power.args[0])}:  # type: ignore[attr-defined]
            shift = negated(term) or term
            if any(isinstance(node, Reduce) and node.name == "max" for node in shift.walk()):
                self.found.add(shift)

    def whatever_is_loaded(self) -> bool:
        """No maximum is -inf: of a row without any key, nothing is added up."""
        return bool(self.found) and all(_is_above(shift, _is_start, self.guarded) for shift in self.found)

    def by_position(self) -> bool:
        """No maximum is -inf, by what the masks say that are made of positions."""
        return all(_is_above(shift, lambda e: _is_start(e) or _has_a_key(e), self.guarded) for shift in self.found)

    def has_keys(self) -> bool:
        """Each maximum is over some key that is not masked, so that the sum of what is relative to it is not zero."""
        return self.start <= LOWEST and all(_is_above(shift, _has_a_key, set()) for shift in self.found)

    @property
    def start(self) -> float:
        """The largest number that a maximum is over. From a score that is far lower, the exponential is zero."""
        numbers = [number(leaf) for shift in self.found for leaf in leaves(shift)]
        return max((value for value in numbers if value is not None), default=-math.inf)

    def are_needless(self, monomials: Callable[[Expr], list[frozenset[tuple[Expr, int]]]]) -> bool:
        """No guard changes a sum of such exponentials: it is zero, or one and more, as its largest term is one."""
        powers = [[dict(power) for power in monomials(whole)] for whole in self.sums]
        if powers and self.start > LOWEST:
            return False
        return all(any(_is_largest(shift, each) for shift in self.found) for each in powers)

    def makes_zeros(self) -> bool:
        """A row without any key is zero over a guard. Else zero over zero."""
        return bool(self.sums) and self.whatever_is_loaded()


def _without_guard(divisor: Expr) -> Expr | None:
    if not isinstance(divisor, Op):
        return None
    if divisor.name == "where":
        condition, yes, no = divisor.args
        for guard, whole, name in ((yes, no, "eq"), (no, yes, "ne")):
            if number(guard) and condition in (Op(name, (whole, Const(0.0))), Op(name, (whole, integer(0)))):
                return whole
        return None
    limits = [value for arg in divisor.args if (value := number(arg)) is not None]
    highest = {"max": 1.0, "add": LOST}.get(divisor.name, 0.0)
    if len(limits) != 1 or not 0 < limits[0] < highest:
        return None
    return next(arg for arg in divisor.args if number(arg) is None)


def _is_largest(shift: Expr, powers: list[dict[Expr, int]]) -> bool:
    """All of ``powers`` are relative to ``shift``, which is the maximum over all of them."""
    (less,) = terms(shift, -1.0)[:1]
    over = [leaf for leaf in leaves(shift) if isinstance(leaf, Reduce)]
    bodies = [Counter(terms(substitute(leaf.body, {leaf.axis: numbered("merged", leaf.axis.extent)}))) for leaf in over]
    return all(Counter(power) - Counter([less]) in bodies and power.get(less) == 1 for power in powers)


def _guarded(expr: Expr) -> Expr | None:
    """``where(m == -inf, 0, m) --> m``"""
    if not (isinstance(expr, Op) and expr.name == "where"):
        return None
    condition, yes, no = expr.args
    for shift, other, name in ((no, yes, "eq"), (yes, no, "ne")):
        tests = Op(name, (shift, Const(-math.inf))), Op(name, (Op("abs", (shift,)), Const(math.inf)))
        if number(other) == 0 and (condition in tests or negate(condition) in tests):
            return shift
    return None


def negated(term: Expr) -> Expr | None:
    """``-x --> x``"""
    negative = isinstance(term, Op) and term.name == "mul" and term.args[1] == Const(-1.0)
    return term.args[0] if isinstance(term, Op) and negative else None


def is_zero(expr: Expr) -> bool:
    """``0 * exp(x - max(..., x, ...))``, however often: what is added up before the first piece."""
    if number(expr) == 0:
        return True
    if not (isinstance(expr, Op) and expr.name == "mul"):
        return False
    return any(is_zero(a) and (is_share(b) or is_zero(b)) for a, b in (expr.args, expr.args[::-1]))


def is_share(expr: Expr) -> bool:
    """The exponential of something less a maximum over it: at most one."""
    power = expr.args[0] if isinstance(expr, Op) and expr.name == "exp" else None
    if not (isinstance(power, Op) and power.name == "sub"):
        return False
    part, whole = power.args
    return isinstance(whole, Op) and whole.name == "max" and part in whole.args


def _is_above(shift: Expr, proved: Callable[[Expr], bool], guarded: set[Expr]) -> bool:
    """``shift`` is guarded, or no less than a leaf that is ``proved`` not to be -inf."""
    return shift in guarded or any(map(proved, leaves(shift)))


def _is_start(leaf: Expr) -> bool:
    """What a running maximum begins with, other than -inf."""
    value = number(leaf)
    return value is not None and math.isfinite(value)


def may_be_anything(score: Expr, key: Axis) -> bool:
    """A number that is loaded for each key, or computed from one that is other than by sums and products."""
    loads = [node for node in score.walk() if isinstance(node, Load) and key in node.axes and node.kind != "bool"]
    if isinstance(score, Op) and score.name not in _FINITE:
        return bool(loads) and score.name not in BOOLEAN
    return isinstance(score, Load) and score.kind == "float" and bool(loads)


def leaves(shift: Expr) -> list[Expr]:
    return [e for arg in shift.args for e in leaves(arg)] if isinstance(shift, Op) and shift.name == "max" else [shift]


def _has_a_key(shift: Expr) -> bool:
    if not (isinstance(shift, Reduce) and shift.name == "max"):
        return False
    kept = _kept(shift.body, shift.axis)
    rows: list[Axis] = [axis for axis in kept.axes if axis is not shift.axis] or [shift.axis]
    return any(no_row_is_empty(kept, row, shift.axis) for row in rows)


def _kept(score: Expr, key: Axis) -> Expr:
    """Where no number of the graph makes ``score`` -inf. Of what is loaded for each key nothing is known."""
    if may_be_anything(score, key):
        return FALSE
    if isinstance(score, Op) and score.name == "where":
        condition, *branches = score.args
        yes, no = (_kept(branch, key) for branch in branches)
        if yes == no:
            return yes
        return op("or", op("and", condition, yes), op("and", negate(condition), no))
    if isinstance(score, Op) and score.name not in BOOLEAN:
        return op("and", *(_kept(arg, key) for arg in score.args))
    return FALSE if number(score) == -math.inf else TRUE
