"""Site -> AttentionSpec: separate mask from score, decide what is computed and what is loaded, and give it all fixed names.

Rules for what is loaded, each kept general:

* what depends on positions alone is computed, unless it is costly and not per pair: then the graph's own tensor is loaded;
* what depends on data but not on both row and key is the graph's own small tensor, loaded with its broadcast strides;
* a costly function of ``j - i`` alone (bucketed relative bias) becomes a table with one entry per diagonal, built by the
  graph in O(N + M);
* anything else per pair is loaded from the tensor that the graph already has;
* a number that may change from call to call (a window that is an argument) is put into a tensor, and loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

import sympy as sp
import torch
from torch import fx

from attngen.algebra import Const, Dot, Expr, Int, Load, Op, Reduce, op, substitute, transform
from attngen.compat import FloorDiv, size_expr
from attngen.errors import Miss
from attngen.index import Axis, numbered
from attngen.normaliser import CHANGED
from attngen.passes import masking
from attngen.passes.bands import clamped
from attngen.passes.candidates import is_total
from attngen.passes.detect import Site
from attngen.passes.dropout import Seed
from attngen.passes.masking import CHEAP
from attngen.passes.operands import Operand
from attngen.passes.semantics import Index, dtype_of, is_inside, shape_of
from attngen.passes.strides import memory_order
from attngen.spec import BATCH_NAMES, FEATURE, INNER, KEY, ROW, SCORE, AttentionSpec, Input, batch_axes

MAX_HEAD_DIM = 512
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Table:
    """A 1-D-per-head table to be built by the graph: ``expr`` at ``j - i = diagonal - (rows - 1)``."""

    expr: Expr
    batch: tuple[Axis, ...]
    diagonal: Axis


@dataclass(frozen=True)
class Number:
    """A whole number that the graph is given, which may change from call to call and is no size of an operand."""

    symbol: sp.Symbol

    def given(self, graph: fx.Graph) -> fx.Node | None:
        """The node of the lowered ``graph`` that is this number."""
        values = ((node, node.meta.get("val")) for node in graph.nodes)
        same = (n for n, value in values if isinstance(value, torch.SymInt) and size_expr(value) == self.symbol)
        return next(same, None)


Binding = fx.Node | Table | Seed | Number


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
    split = masking.split(site)
    if isinstance(split, Miss):
        return split
    loads = _Loads(site)
    exprs = [split.score, split.mask, split.gain, *([split.whole] if split.whole is not None else []), *site.sinks]
    gain = loads.choose(split.gain)
    if loads.refused is not None:
        return replace(loads.refused, reason=CHANGED)
    chosen = [gain if e is split.gain else loads.choose(e) for e in exprs]
    if loads.refused is not None:
        return loads.refused
    names = _canonical_names(site)
    if isinstance(names, Miss):
        return names
    chosen = [_with_numbers(e, names) for e in chosen]
    slots, bindings = _slots(chosen)
    renamed = [_rename(e, names, slots) for e in chosen]
    leftover = {s for e in renamed for n in e.walk() if isinstance(n, Int) for s in n.value.free_symbols} - set(_SYMBOLS)
    if leftover:
        which = ", ".join(map(str, leftover))
        return Miss(f"it takes a number that may change from call to call ({which})", site.output.name, depth=7)
    score, mask, gain = renamed[:3]
    count = 3 + (split.whole is not None)
    spec = AttentionSpec(
        query=_input("q", site.query, names, site.batch),
        keys=_input("k", site.keys, names, site.batch),
        values=_input("v", site.values, names, site.batch),
        extras=tuple(_extra(load, slots, names) for load in slots),
        batch=tuple(names[a] for a in site.batch),  # type: ignore[misc]
        output=_output(site, names),
        head_dim=int(site.inner.extent),
        value_dim=int(site.feature.extent),
        out_dtype=site.dtype,
        score=score,
        mask=mask,
        whole=renamed[3] if split.whole is not None else None,
        redo_below=split.redo_below,
        sinks=tuple(renamed[count:]),
        empty=split.empty,
        softmax=site.softmax,
        gain=gain,
    )
    tensors = [site.query.node, site.keys.node, site.values.node, *bindings]
    for axis in (*site.batch, site.row, site.key):
        if axis.extent != 1 and (reason := _unmeasured(axis, names[axis], spec, tensors)):
            return Miss(reason, site.output.name, depth=7)
    return Specialised(spec, tuple(bindings))


def _unmeasured(axis: Axis, name: sp.Expr, spec: AttentionSpec, tensors: list[Binding]) -> str:
    """Why the size of ``axis`` cannot be read off the first input that has it as a dimension; empty if it can."""
    for source, tensor in zip(spec.inputs, tensors, strict=True):
        dim = source.dim_of(name)  # type: ignore[arg-type]
        if dim is not None:
            whole = not isinstance(tensor, fx.Node) or sp.expand(shape_of(tensor)[dim] - axis.extent) == 0
            return "" if whole else "only a part of a tensor has one dimension of the result"
    return "every operand is broadcast along one dimension of the result"


def _refuse(site: Site) -> Miss | None:
    where = site.output.name
    if site.inner.extent.is_Integer and site.inner.extent > MAX_HEAD_DIM:
        lengths = (site.row.extent, site.key.extent, site.inner.extent)
        if all(n.is_Integer for n in lengths) and max(lengths[:2]) <= lengths[2]:
            return Miss("the weights are smaller than the queries: fusing them would save nothing", where, depth=7)
    for name, axis in (("head size", site.inner), ("value head size", site.feature)):
        if not axis.extent.is_Integer:
            return Miss(f"the {name} is not a fixed number", where, depth=7)
        if axis.extent > MAX_HEAD_DIM:
            return Miss(f"the {name} is {axis.extent}; kernels go up to {MAX_HEAD_DIM}", where, depth=7)
    for operand in (site.query, site.keys, site.values):
        if operand.dtype not in FLOATS:
            return Miss(f"kernels do not compute in {str(operand.dtype).removeprefix('torch.')}", where, depth=7)
    if site.key.extent == 0 or any(size == 0 for size in shape_of(site.output)):
        return Miss("the attention is empty", where, depth=7)
    if len(site.batch) > len(BATCH_NAMES):
        return Miss(f"{len(site.batch)} batch dimensions", where, depth=7)
    return None


# ------------------------------------------------------------------------------------------------- computed or loaded



class _Loads:
    """Decides for each part of an expression of one site whether it is computed or loaded."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._held = site.reader.provenance
        self._tables: dict[Expr, Load] = {}
        self.refused: Miss | None = None

    def choose(self, expr: Expr) -> Expr:
        tabled = transform(expr, self._table)
        return transform(tabled, self._rule)

    def _rule(self, expr: Expr) -> Expr | None:
        """What ``expr`` becomes, or None to look at its parts."""
        if isinstance(expr, (Int, Const)) or expr == self._site.dot or (isinstance(expr, Op) and expr.name == "random"):
            return expr
        if isinstance(expr, Load):
            if isinstance(expr.source, Table):
                return expr
            return expr if self._plain(expr) and expr.source not in self._site.interior else self._loaded(expr)
        if not isinstance(expr, Op):
            return self._loaded(expr)
        if self._depends_on_scores(expr) or (isinstance(expr, Op) and _is_made_of_a_total(expr)):
            return None
        per_pair = [n for n in expr.walk() if isinstance(n, Load) and self._is_per_pair(n)]
        if expr.name in CHEAP and len(per_pair) < 2 and not self._reads_outside(expr):
            return None
        return self._loaded(expr)

    def _reads_outside(self, expr: Expr) -> bool:
        """A branch of ``expr`` reads at places only valid where it is chosen, and the graph has no tensor for it."""
        return any(self._lacks(part) for part in expr.children)

    def _lacks(self, part: Expr) -> bool:
        if isinstance(part, Load):
            return not isinstance(part.source, Table) and not self._plain(part)
        if part == self._site.dot or (part in self._held and is_inside(*self._held[part])):
            return False
        return isinstance(part, (Dot, Reduce)) or self._reads_outside(part)

    def _lacks_parts(self, expr: Expr) -> bool:
        """It is made of products or sums that the graph has no tensors for: as a whole it is loaded."""
        return any(isinstance(n, (Dot, Reduce)) and n not in self._held for n in expr.walk())

    def _is_per_pair(self, expr: Expr) -> bool:
        return self._site.row in expr.axes and self._site.key in expr.axes

    def _depends_on_scores(self, expr: Expr) -> bool:
        return any(node == self._site.dot for node in expr.walk())

    def _plain(self, load: Load) -> bool:
        """Read at positions that are plain index arithmetic and provably inside the tensor; a seed is."""
        if isinstance(load.source, Seed):
            return True
        if not isinstance(load.source, fx.Node) or not all(isinstance(place, Int) for place in load.index):
            return False
        return is_inside(load.source, tuple(place.value for place in load.index))  # type: ignore[attr-defined]

    def _loaded(self, expr: Expr) -> Expr:
        """The element of the graph's own tensor for ``expr``; where it has none, of the tensors for its parts."""
        if self._depends_on_scores(expr):
            return self._refuse("the score is made of more than pointwise arithmetic")
        found = self._held.get(expr)
        if found is None:
            if isinstance(expr, Op):
                return op(expr.name, *(transform(arg, self._rule) for arg in expr.args))
            return self._refuse("a value the graph has no tensor for")
        load = self._site.reader.load(*found)
        assert isinstance(load, Load)
        if load.source in self._site.interior:
            return self._refuse("the score is made of more than pointwise arithmetic")
        load = clamped(load)
        return load if self._plain(load) else self._refuse("a position that is computed from data")

    def _refuse(self, reason: str) -> Expr:
        if self.refused is None:
            self.refused = Miss(reason, self._site.output.name, depth=7)
        return Const(0.0)

    def _table(self, expr: Expr) -> Expr | None:
        """A costly per-pair value that moves only with ``j - i``."""
        row, key = self._site.row, self._site.key
        if expr in self._tables:
            return self._tables[expr]
        if not self._is_per_pair(expr) or expr.kind != "float" or self._depends_on_scores(expr):
            return None
        costly = (n for n in expr.walk() if isinstance(n, Load) or (isinstance(n, Op) and n.name not in CHEAP))
        if not any(map(self._is_per_pair, costly)):
            return None
        diagonal = numbered("diagonal", row.extent + key.extent - 1)
        moved = substitute(expr, {key: row + diagonal - (row.extent - 1)})
        if row in moved.axes or not all(isinstance(n, (Int, Const, Load, Op)) for n in moved.walk()):
            return expr if expr in self._held and self._lacks_parts(expr) else None
        batch = tuple(a for a in self._site.batch if a in moved.axes)
        index = (*(Int(a) for a in batch), Int(key - row + ROW.extent - 1))
        return self._tables.setdefault(expr, Load(Table(moved, batch, diagonal), index))


def _is_made_of_a_total(expr: Expr) -> bool:
    """Of a sum of weights, and numbers: what is loaded is the sum itself, and the rest is derived with the score."""
    if isinstance(expr, Dot):
        return is_total(expr.node)  # type: ignore[arg-type]
    parts = [part for part in expr.children if not isinstance(part, Const)] if isinstance(expr, Op) else []
    return bool(parts) and all(map(_is_made_of_a_total, parts))


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
            if len(unknown) == 1 and not extent.has(FloorDiv, sp.Mod, sp.Max, sp.Min):
                solved = sp.solve(extent.xreplace(names) - size, unknown[0])
                if len(solved) == 1:
                    names[unknown[0]] = solved[0]
    return names


_ARITHMETIC = {sp.Add: "add", sp.Mul: "mul", sp.Abs: "abs", sp.Max: "max", sp.Min: "min"}


def _with_numbers(expr: Expr, names: Names) -> Expr:
    """Loads numbers that no operand tells, as a graph's own tensor of one would be."""

    def rule(node: Expr) -> Expr | None:
        if isinstance(node, Load):  # places are computed from sizes alone
            return node
        if not isinstance(node, Int):
            return None
        numbers = {s for s in node.value.free_symbols if s not in names and not isinstance(s, Axis)}
        return _computed(node.value, numbers) or node

    return transform(expr, rule)


def _computed(value: sp.Expr, numbers: set[sp.Symbol]) -> Expr | None:
    """``value`` with the ``numbers`` loaded; None where it is made of them in another way than kernels compute."""
    if value in numbers:
        return Load(Number(value), (), "int")
    if not value.free_symbols & numbers:
        return Int(value)
    name = _ARITHMETIC.get(value.func)
    if name is None:
        return None
    known = [arg for arg in value.args if not arg.free_symbols & numbers] if name in ("add", "mul") else []
    parts = [_computed(arg, numbers) for arg in value.args if arg not in known]
    if any(part is None for part in parts):
        return None
    first = [Int(value.func(*known))] if known else []
    return reduce(partial(op, name), [*first, *parts]) if len(first + parts) > 1 else op(name, *parts)  # type: ignore[arg-type]


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


def _input(name: str, operand: Operand, names: Names, batch: Sequence[Axis]) -> Input:
    """An operand. A dimension of one element, where every place is zero, is that of a batch axis of one that has no other:
    a batch of one has the kernels of any batch then, and each of its programs gradients of its own."""
    moving = {axis for place in operand.index for axis in place.atoms(Axis)}
    ones = iter([axis for axis in batch if axis.extent == 1 and axis not in moving])
    places = zip(operand.index, shape_of(operand.node), strict=True)
    index = [next(ones, place) if place == 0 and size == 1 else place for place, size in places]
    return Input(name, _renamed_index(tuple(index), names), operand.dtype)


def _output(site: Site, names: Names) -> tuple[Axis, ...]:
    """The dimensions as they lie in memory. Where the result has none for rows, which kernels count, that comes first."""
    axes = [site.axes[d] for d in memory_order(site.output)]
    return tuple(names[axis] for axis in (axes if site.row in axes else [site.row, *axes]))  # type: ignore[misc]


def _extra(load: Load, slots: dict[Load, str], names: Names) -> Input:
    index = tuple(place.value for place in _places(load, names))  # type: ignore[attr-defined]
    if isinstance(load.source, (Seed, Number)):
        return Input(slots[load], index, torch.int64)
    dtype = torch.float32 if isinstance(load.source, Table) else dtype_of(load.source)  # type: ignore[arg-type]
    return Input(slots[load], index, dtype)

