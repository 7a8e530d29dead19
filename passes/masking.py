"""Take the mask out of a score: which pairs count, and what the score is where they do.

Models mask by adding or filling in a number that no score reaches. Where that number is finite, a row without any pair
left is still something (the mean of the values, usually), and the spec says how to compute such a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from attngen.algebra import (
    BOOLEAN,
    COMPARISONS,
    LOST,
    ONE,
    TRUE,
    Const,
    Expr,
    Int,
    Load,
    Op,
    negate,
    number,
    op,
    terms,
    total,
    where,
)
from attngen.errors import Miss
from attngen.index import Axis
from attngen.mask import no_row_is_empty
from attngen.normaliser import MASKING
from attngen.passes.candidates import SOFTMAX
from attngen.passes.detect import Site
from attngen.passes.dropout import is_random
from attngen.passes.ranges import may_divide_by_zero
from attngen.passes.rounding import HALF, drowns, is_rounded, opened, quick, without_idle
from attngen.passes.semantics import dtype_of, op_name

NEGLIGIBLE = 104.0  # exp(-104) is zero in float32

# Operations that cost no more than the load they replace.
CHEAP = frozenset(["float", "add", "sub", "mul", "neg", "min", "max", "relu", "abs", "where", "and", "or", "not"])
CHEAP |= {"drown", "rounded"}
CHEAP |= frozenset(COMPARISONS)

_ZERO_AT_ZERO = frozenset(["neg", "abs", "relu", "tanh"])


@dataclass(frozen=True)
class Split:
    score: Expr
    mask: Expr
    whole: Expr | None = None
    redo_below: float | None = None
    gain: Expr = ONE
    empty: str = "nan"


def split(site: Site) -> Split | Miss:
    """Take the mask out of the score: ``where(c, x, -big)`` and ``x + where(c, y, -big)`` in any nesting of sums."""
    if not site.softmax:
        return Split(*_without_zeros(without_idle(site.score), partial(may_divide_by_zero, site.reader)))
    dtype, name = dtype_of(site.dot.node), site.output.name  # type: ignore[arg-type]
    whole_score = without_idle(site.score, site.row, site.key)
    score, mask, fills = _unmask(whole_score, dtype)
    score = quick(score)
    gain, kept = _without_zeros(site.gain)
    if kept != TRUE and _conjuncts(kept) == _conjuncts(mask):  # an empty row is set to zero, whatever it was
        return Split(score, mask, gain=gain, empty="zero")
    if kept != TRUE and site.empty != "never_nan" and _may_be_nan(score, fills, site):
        return Miss("weights are set to zero that may be NaN", name, depth=7)
    if site.late_sink and _may_be_nan(score, fills, site):
        return Miss("a sink that comes after the softmax, and rows that may be NaN", name, depth=7)
    whole, redo_below = None, None
    certain = no_row_is_empty(mask, site.row, site.key) and all(drowns(fill.value, dtype) for fill in fills)
    certain = certain and not _loads_over_keys(score, site.key) and not _holds_fill(score)
    finite = [fill for fill in fills if math.isfinite(fill.value)]
    lifted = site.lifted or _by_library(site)
    if finite and not certain and site.by_log and not lifted:
        return Miss("exp(s - logsumexp(s)) of rows that may be masked throughout: what comes out is rounding", name, depth=7)
    if finite and not certain and site.early:
        return Miss("the maximum comes off before a mask is added, and rows may be masked throughout", name, depth=7)
    if finite and not certain and site.again:
        return Miss("weights of rows that may be masked throughout are masked and normalised again", name, depth=7)
    if finite and not certain and lifted:  # else nothing is left of such a row: zero over zero, as under -inf
        whole, redo_below = whole_score, max(fill.highest for fill in finite) + NEGLIGIBLE
    if whole is None and not site.sinks:
        score = _without_row_terms(score, site.key)
    return Split(score, mask, whole, redo_below, site.gain, site.empty)


def _by_library(site: Site) -> bool:
    """The library's softmax takes the maximum off, as does its logarithm."""
    names = {op_name(node) for node in site.interior}
    return bool(names & SOFTMAX) or not names & {"exp", "exp2", "pow"}


def _conjuncts(condition: Expr) -> frozenset[Expr]:
    return frozenset(condition.args if isinstance(condition, Op) and condition.name == "and" else [condition])


def _may_be_nan(score: Expr, fills: list[_Fill], site: Site) -> bool:
    """Some row may be -inf throughout: all of it masked, or by what is loaded."""
    dtype = dtype_of(site.dot.node)  # type: ignore[arg-type]
    overflow = _may_overflow(fills, dtype)
    infinite = [fill.kept for fill in fills if math.isinf(fill.value) or (overflow and fill.highest > fill.value)]
    masked = bool(infinite) and not no_row_is_empty(op("and", *infinite), site.row, site.key)
    left = any(isinstance(n, Const) and math.isinf(n.value) for n in score.walk())
    return _loads_over_keys(score, site.key) or masked or left


def _loads_over_keys(score: Expr, key: Axis) -> bool:
    """Something loaded may mask every key that the constants keep: a number; what only chooses between others may not."""
    if isinstance(score, Load):
        return score.kind != "bool" and key in score.axes
    if not isinstance(score, Op) or score.name in BOOLEAN:
        return False
    return any(_loads_over_keys(arg, key) for arg in score.args[score.name == "where" :])


def _without_zeros(weight: Expr, may_be_nan: Callable[[Expr], bool] = lambda factor: False) -> tuple[Expr, Expr]:
    """A weight that no sum normalises, where it is not zero; and the mask that says where. Times what ``may_be_nan``, or be
    infinite, it may be other than zero everywhere."""
    if isinstance(weight, Op) and weight.name in ("mul", "div") and not may_be_nan(weight):
        left, kept = _without_zeros(weight.args[0])
        right, also = _without_zeros(weight.args[1]) if weight.name == "mul" else (weight.args[1], TRUE)
        return op(weight.name, left, right), op("and", kept, also)
    if isinstance(weight, Op) and weight.name in _ZERO_AT_ZERO:
        inner, mask = _without_zeros(weight.args[0])
        return op(weight.name, inner), mask
    if (chosen := _chosen(weight, 0.0)) is not None:
        inner, mask = _without_zeros(chosen[1], may_be_nan)
        return inner, op("and", chosen[0], mask)
    if isinstance(weight, Op) and weight.name == "exp" and (chosen := _chosen(weight.args[0], -math.inf)) is not None:
        inner, mask = _without_zeros(op("exp", chosen[1]))
        return inner, op("and", chosen[0], mask)
    return weight, TRUE


def _chosen(expr: Expr, other: float) -> tuple[Expr, Expr] | None:
    """When ``expr`` is not the number ``other``, and what it is then. What dropout chooses multiplies NaN too: it is none."""
    if not (isinstance(expr, Op) and expr.name == "where") or is_random(expr.args[0]):
        return None
    condition, yes, no = expr.args
    choices = ((condition, yes, no), (negate(condition), no, yes))
    return next(((keep, kept) for keep, kept, rest in choices if number(rest) == other), None)


@dataclass(frozen=True)
class _Fill:
    """What a score that is not ``kept`` is made of: ``value``, and never over ``highest`` with whatever is added to it."""

    value: float
    highest: float
    kept: Expr


def _may_overflow(fills: list[_Fill], dtype: torch.dtype) -> bool:
    """All of them added up, and a score, may be -inf in 16 bits: in fp16 the lowest number less 16 is, and twice in any."""
    limits = torch.finfo(dtype)
    lowest = sum(fill.value for fill in fills if math.isfinite(fill.value)) - LOST
    return dtype in HALF and lowest < limits.min * (1 + limits.eps / 4)


def _unmask(score: Expr, dtype: torch.dtype, *, alone: bool = True) -> tuple[Expr, Expr, list[_Fill]]:
    """The score without its mask, the mask, and the fills. Not ``alone``: something is added to the score later."""
    mask: Expr = TRUE
    fills: list[_Fill] = []
    kept = []
    parts = _summands(score)
    alone = alone and len(parts) == 1
    for term in parts:
        while (found := _masked(term)) is not None and (alone or drowns(found[2], dtype)):
            condition, term, fill = found
            mask, fills = op("and", mask, condition), [*fills, _Fill(fill, fill if alone else fill / 2, condition)]
        if fills and len(_summands(term)) > 1:
            inner, inner_mask, inner_fills = _unmask(term, dtype, alone=alone)
            term, mask, fills = inner, op("and", mask, inner_mask), [*fills, *inner_fills]
        kept.append(term)
    if len(kept) > 1 and any(map(_holds_fill, kept)):
        return score, TRUE, []
    return (total(kept) if fills else score), mask, fills


def _holds_fill(term: Expr) -> bool:
    """A number as large as masks are, in some place: added to a fill, as in ``s - s.detach()``, it may cancel it."""
    choices = [node for node in term.walk() if isinstance(node, Op) and node.name == "where"]
    numbers = [number(part) for part in (term, *(branch for choice in choices for branch in choice.args[1:]))]
    return any(value is not None and abs(value) >= -MASKING for value in numbers)


def _summands(expr: Expr) -> list[Expr]:
    """The terms of a sum, some of which are masks; sums of no masks stay whole, for the graph may have them as tensors."""
    inside = opened(expr) if is_rounded(expr) else expr
    if not (isinstance(inside, Op) and inside.name in ("add", "sub")):
        return [expr]
    left, right = inside.args
    parts = [*_summands(left), *(_summands(right) if inside.name == "add" else terms(right, -1.0))]
    return parts if any(_masked(part) for part in parts) else [expr]


def _masked(expr: Expr) -> tuple[Expr, Expr, float] | None:
    """When a score counts, what it is then, and the number that it is otherwise; also of a multiple of such a score."""
    if isinstance(expr, Op) and expr.name in ("mul", "div"):
        inner, scale = expr.args
        found, by = _masked(inner), number(scale)
        if found is None or by is None or not 0 < by < math.inf:
            return None
        scaled = found[2] * by if expr.name == "mul" else found[2] / by
        return (found[0], op(expr.name, found[1], scale), scaled) if scaled <= MASKING else None
    if not (isinstance(expr, Op) and expr.name == "where"):
        return None
    condition, yes, no = expr.args
    for keep, kept, fill in ((condition, yes, number(no)), (negate(condition), no, number(yes))):
        if fill is not None and fill <= MASKING:
            return keep, kept, fill
    loads = any(isinstance(part, Load) for part in expr.walk())  # of which the graph may only have the whole
    return None if loads else _masked_by_branch(condition, yes, no)


def _masked_by_branch(condition: Expr, yes: Expr, no: Expr) -> tuple[Expr, Expr, float] | None:
    """A choice of scores that are masked alike, at least one: a mask that is opened, or closed, piece by piece."""
    found = [_masked(branch) for branch in (yes, no)]
    fills = {each[2] for each in found if each is not None}
    if len(fills) != 1:
        return None
    (here, score), (there, other) = (each[:2] if each else (TRUE, e) for each, e in zip(found, (yes, no), strict=True))
    if here != TRUE and there != TRUE:
        here, there = op("and", condition, here), op("and", negate(condition), there)
    elif here == TRUE:
        here = condition
    else:
        there = negate(condition)
    return op("or", here, there), where(condition, score, other), fills.pop()


def _without_row_terms(score: Expr, key: Axis) -> Expr:
    """Softmax ignores what is the same for all keys. Only terms that drown no score, whatever the data, may be dropped."""
    parts = terms(score)
    kept = [t for t in parts if key in t.axes or not _surely_small(t)]
    return total(kept) if len(kept) < len(parts) else score


def _surely_small(expr: Expr) -> bool:
    if isinstance(expr, Const):
        return abs(expr.value) < -MASKING  # false for NaN
    if isinstance(expr, Int):
        return True
    return isinstance(expr, Op) and expr.name in CHEAP and all(_surely_small(a) for a in expr.args)
