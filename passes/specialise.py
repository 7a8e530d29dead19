"""Site -> AttentionSpec: separate mask from score, decide what is computed and what is loaded, and give it all fixed names.

Rules for what is loaded, each kept general:

* what depends on positions alone is computed, unless it is costly and not per pair: then the graph's own tensor is loaded;
* what depends on data but not on both row and key is the graph's own small tensor, loaded with its broadcast strides;
* a costly function of ``j - i`` alone (bucketed relative bias) becomes a table with one entry per diagonal, built by the
  graph in O(N + M);
* anything else per pair is loaded from the tensor that the graph already has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy as sp
import torch
from torch import fx

from attngen.algebra import (
    COMPARISONS,
    TRUE,
    Const,
    Dot,
    Expr,
    Int,
    Load,
    Op,
    negate,
    number,
    op,
    substitute,
    terms,
    total,
    transform,
)
from attngen.errors import Miss
from attngen.index import Axis, always_less, never_negative
from attngen.mask import no_row_is_empty
from attngen.passes.detect import Site
from attngen.passes.operands import Operand
from attngen.passes.semantics import Index, dtype_of, shape_of
from attngen.spec import BATCH_NAMES, FEATURE, INNER, KEY, ROW, SCORE, AttentionSpec, Input, batch_axes

MAX_HEAD_DIM = 256
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
NEGLIGIBLE = 104.0  # exp(-104) is zero in float32
MASKING = -1e3  # a fill value below this is treated as a mask; rows where that could show are computed again
HUGE = -1e30  # no score that means anything is below this


@dataclass(frozen=True)
class Table:
    """A 1-D-per-head table to be built by the graph: ``expr`` at ``j - i = diagonal - (rows - 1)``."""

    expr: Expr
    batch: tuple[Axis, ...]
    diagonal: Axis


Binding = fx.Node | Table


@dataclass(frozen=True)
class Specialised:
    """A spec, and for each of its extras the graph value to pass for it."""

    spec: AttentionSpec
    bindings: tuple[Binding, ...]


def run(site: Site) -> Specialised | Miss:
    """The spec of a proved site, or why no kernel computes it."""
    refused = _refuse(site)
    if refused is not None:
        return refused
    split = _split(site)
    loads = _Loads(site)
    exprs = [split.score, split.mask, *([split.whole] if split.whole is not None else []), *site.sinks]
    chosen = [loads.choose(e) for e in exprs]
    if loads.refused is not None:
        return loads.refused
    names = _canonical_names(site)
    if isinstance(names, Miss):
        return names
    slots, bindings = _slots(chosen)
    renamed = [_rename(e, names, slots) for e in chosen]
    leftover = {s for e in renamed for n in e.walk() if isinstance(n, Int) for s in n.value.free_symbols} - set(_SYMBOLS)
    if leftover:
        return Miss(f"a size that no operand has ({', '.join(map(str, leftover))})", site.output.name, depth=7)
    score, mask = renamed[:2]
    count = 2 + (split.whole is not None)
    spec = AttentionSpec(
        query=_input("q", site.query, names),
        keys=_input("k", site.keys, names),
        values=_input("v", site.values, names),
        extras=tuple(_extra(load, slots, names) for load in slots),
        batch=tuple(names[a] for a in site.batch),  # type: ignore[misc]
        output=tuple(names[a] for a in site.axes),  # type: ignore[misc]
        head_dim=int(site.inner.extent),
        value_dim=int(site.feature.extent),
        out_dtype=dtype_of(site.output),
        score=score,
        mask=mask,
        whole=renamed[2] if split.whole is not None else None,
        redo_below=split.redo_below,
        sinks=tuple(renamed[count:]),
        empty="zero" if site.zero_if_empty else "nan",
    )
    return Specialised(spec, tuple(bindings))


def _refuse(site: Site) -> Miss | None:
    where = site.output.name
    for name, axis in (("head size", site.inner), ("value head size", site.feature)):
        if not axis.extent.is_Integer:
            return Miss(f"the {name} is not a fixed number", where, depth=7)
        if axis.extent > MAX_HEAD_DIM:
            return Miss(f"the {name} is {axis.extent}; kernels go up to {MAX_HEAD_DIM}", where, depth=7)
    for operand in (site.query, site.keys, site.values):
        if operand.dtype not in FLOATS:
            return Miss(f"kernels do not compute in {str(operand.dtype).removeprefix('torch.')}", where, depth=7)
    if any(size == 0 for size in shape_of(site.output)):
        return Miss("the attention is empty", where, depth=7)
    if len(site.batch) > len(BATCH_NAMES):
        return Miss(f"{len(site.batch)} batch dimensions", where, depth=7)
    return None


# ---------------------------------------------------------------------------------------------------- mask and score


@dataclass(frozen=True)
class _Split:
    score: Expr
    mask: Expr
    whole: Expr | None
    redo_below: float | None


def _split(site: Site) -> _Split:
    """Take the mask out of the score: ``where(c, x, -big)`` and ``x + where(c, y, -big)`` in any nesting of sums."""
    score, mask, fills = _unmask(site.score)
    finite = [fill for fill in fills if math.isfinite(fill)]
    whole, redo_below = None, None
    if finite and not (max(finite) <= HUGE and no_row_is_empty(mask, site.row, site.key)):
        whole, redo_below = site.score, max(finite) + NEGLIGIBLE
    if whole is None and not site.sinks:
        score = _without_row_terms(score, site.key)
    return _Split(score, mask, whole, redo_below)


def _unmask(score: Expr) -> tuple[Expr, Expr, list[float]]:
    mask, fills = TRUE, []
    kept = []
    for term in _summands(score):
        while (found := _masked(term)) is not None:
            condition, term, fill = found
            mask, fills = op("and", mask, condition), [*fills, fill]
        if fills and len(_summands(term)) > 1:
            inner, inner_mask, inner_fills = _unmask(term)
            term, mask, fills = inner, op("and", mask, inner_mask), [*fills, *inner_fills]
        kept.append(term)
    return (total(kept) if fills else score), mask, fills


def _summands(expr: Expr) -> list[Expr]:
    if isinstance(expr, Op) and expr.name == "add":
        return [t for a in expr.args for t in _summands(a)]
    return [expr]


def _masked(expr: Expr) -> tuple[Expr, Expr, float] | None:
    if not (isinstance(expr, Op) and expr.name == "where"):
        return None
    condition, yes, no = expr.args
    for keep, kept, fill in ((condition, yes, number(no)), (negate(condition), no, number(yes))):
        if fill is not None and fill <= MASKING:
            return keep, kept, fill
    return None


def _without_row_terms(score: Expr, key: Axis) -> Expr:
    """Softmax ignores what is the same for all keys. Only terms that are finite whatever the data may be dropped."""
    parts = terms(score)
    kept = [t for t in parts if key in t.axes or not _surely_finite(t)]
    return total(kept) if len(kept) < len(parts) else score


def _surely_finite(expr: Expr) -> bool:
    if isinstance(expr, Const):
        return math.isfinite(expr.value) and abs(expr.value) < -HUGE
    if isinstance(expr, Int):
        return True
    return isinstance(expr, Op) and expr.name in _CHEAP and all(_surely_finite(a) for a in expr.args)


# ------------------------------------------------------------------------------------------------- computed or loaded

_CHEAP = frozenset(["float", "add", "sub", "mul", "neg", "min", "max", "abs", "where", "and", "or", "not", *COMPARISONS])


class _Loads:
    """Decides for each part of an expression of one site whether it is computed or loaded."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.refused: Miss | None = None

    def choose(self, expr: Expr) -> Expr:
        tabled = transform(expr, self._table)
        return transform(tabled, self._rule)

    def _rule(self, expr: Expr) -> Expr | None:
        """What ``expr`` becomes, or None to look at its parts."""
        if isinstance(expr, (Int, Const)) or expr == self._site.dot:
            return expr
        if isinstance(expr, Load):
            return expr if isinstance(expr.source, Table) or self._plain(expr) else self._loaded(expr)
        if not isinstance(expr, Op):
            return self._loaded(expr)
        if self._depends_on_scores(expr):
            return None
        per_pair = [n for n in expr.walk() if isinstance(n, Load) and self._is_per_pair(n)]
        return None if expr.name in _CHEAP and len(per_pair) < 2 else self._loaded(expr)

    def _is_per_pair(self, expr: Expr) -> bool:
        return self._site.row in expr.axes and self._site.key in expr.axes

    def _depends_on_scores(self, expr: Expr) -> bool:
        return any(node == self._site.dot for node in expr.walk())

    def _plain(self, load: Load) -> bool:
        """Read at positions that are plain index arithmetic and provably inside the tensor."""
        if not isinstance(load.source, fx.Node):
            return False
        for place, size in zip(load.index, shape_of(load.source), strict=True):
            if not isinstance(place, Int) or not (never_negative(place.value) and always_less(place.value, size)):
                return False
        return True

    def _loaded(self, expr: Expr) -> Expr:
        """The element of the graph's own tensor for ``expr``; where it has none, of the tensors for its parts."""
        if self._depends_on_scores(expr):
            return self._refuse("the score is made of more than pointwise arithmetic")
        found = self._site.reader.provenance.get(expr)
        if found is None:
            if isinstance(expr, Op):
                return op(expr.name, *(transform(arg, self._rule) for arg in expr.args))
            return self._refuse("a value the graph has no tensor for")
        load = self._site.reader.load(*found)
        assert isinstance(load, Load)
        return load if self._plain(load) else self._refuse("a position that is computed from data")

    def _refuse(self, reason: str) -> Expr:
        self.refused = self.refused or Miss(reason, self._site.output.name, depth=7)
        return Const(0.0)

    def _table(self, expr: Expr) -> Expr | None:
        """A costly per-pair value that moves only with ``j - i``."""
        row, key = self._site.row, self._site.key
        if not self._is_per_pair(expr) or expr.kind != "float" or self._depends_on_scores(expr):
            return None
        if not any(isinstance(n, Load) or isinstance(n, Op) and n.name not in _CHEAP for n in expr.walk()):
            return None
        diagonal = Axis("r", row.extent + key.extent - 1)
        moved = substitute(expr, {key: row + diagonal - (row.extent - 1)})
        if row in moved.axes or not all(isinstance(n, (Int, Const, Load, Op)) for n in moved.walk()):
            return None
        batch = tuple(a for a in self._site.batch if a in moved.axes)
        index = (*(Int(a) for a in batch), Int(key - row + ROW.extent - 1))
        return Load(Table(moved, batch, diagonal), index)


# ------------------------------------------------------------------------------------------------------- fixed names

_SYMBOLS = [s for a in (ROW, KEY, INNER, FEATURE, *batch_axes(len(BATCH_NAMES))) for s in (a, a.extent)]
Names = dict[sp.Symbol, sp.Expr]


def _canonical_names(site: Site) -> Names | Miss:
    """Site axes to spec axes, and size symbols of the graph to sizes of spec axes, solved where they are sums."""
    names: Names = {site.row: ROW, site.key: KEY, site.inner: INNER, site.feature: FEATURE}
    names.update(zip(site.batch, batch_axes(len(site.batch)), strict=True))
    pending = [(axis.extent, new.extent) for axis, new in names.items()]  # type: ignore[attr-defined]
    for _ in pending:
        for extent, size in pending:
            unknown = [s for s in extent.free_symbols if s not in names]
            if len(unknown) == 1:
                solved = sp.solve(extent.xreplace(names) - size, unknown[0])
                if len(solved) == 1:
                    names[unknown[0]] = solved[0]
    return names


def _slots(exprs: list[Expr]) -> tuple[dict[Load, str], list[Binding]]:
    """One input per loaded tensor and index pattern, numbered by first appearance."""
    slots: dict[Load, str] = {}
    for expr in exprs:
        for node in expr.walk():
            if isinstance(node, Load) and node not in slots:
                slots[node] = f"t{len(slots)}"
    return slots, [load.source for load in slots]  # type: ignore[misc]


def _rename(expr: Expr, names: Names, slots: dict[Load, str]) -> Expr:
    def rule(node: Expr) -> Expr | None:
        if isinstance(node, Dot):
            return SCORE
        if isinstance(node, Load):
            return Load(slots[node], _places(node, names), node.kind)
        return Int(sp.expand(node.value.xreplace(names))) if isinstance(node, Int) else None

    return transform(expr, rule)


def _places(load: Load, names: Names) -> tuple[Expr, ...]:
    return tuple(Int(sp.expand(place.value.xreplace(names))) for place in load.index)  # type: ignore[attr-defined]


def _renamed_index(index: Index, names: Names) -> Index:
    return tuple(sp.expand(place.xreplace(names)) for place in index)


def _input(name: str, operand: Operand, names: Names) -> Input:
    return Input(name, _renamed_index(operand.index, names), operand.dtype)


def _extra(load: Load, slots: dict[Load, str], names: Names) -> Input:
    index = tuple(place.value for place in _places(load, names))  # type: ignore[attr-defined]
    dtype = torch.float32 if isinstance(load.source, Table) else dtype_of(load.source)  # type: ignore[arg-type]
    return Input(slots[load], index, dtype)

