"""What each ATen operator computes at one index: the reader of lowered graphs.

``Reader.at(node, index)`` is the element of ``node`` at a symbolic index, as an expression of ``attngen.algebra``. Views
become index arithmetic, arange becomes the index itself, softmax becomes its definition, contractions become ``Dot``.
So two spellings of one computation read the same, and an axis can never be confused with another. Operators without a
row are read through their own decomposition; where that fails too, the element is simply a load from that tensor.

The rows live in ``passes.views`` (index in, index out), ``passes.pointwise`` and ``passes.values``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy as sp
import torch
from torch import fx

from attngen import compat
from attngen.algebra import Access, Const, Dot, Expr, Int, Kind, Load, op
from attngen.compat import FloorDiv, GuardOnDataDependentSymNode
from attngen.index import ZERO, Axis, always_less, never_negative, numbered
from attngen.passes.decompose import Decomposer
from attngen.passes.holders import Holders

Index = tuple[sp.Expr, ...]
# How far one proof follows a graph. What attention in real models takes at most: 511 reads, 30 deep, of 1004 leaves.
MAX_READS, MAX_DEPTH, MAX_LENGTH = 1 << 12, 1 << 7, 1 << 14
LARGEST_STEP = 1 << 15  # from one position to the next, in whole numbers made of positions


class Unknown(Exception):
    """A row cannot say what this element is; the reader then loads it."""


class TooMuch(Exception):
    """A proof would have to follow more of the graph than attention is made of: a chain, a diamond, an unrolled loop."""


class Bound(dict[str, Any]):
    """The arguments of one operator by name. A row that asks for another one was not written for this overload."""

    def __missing__(self, name: str) -> Any:
        raise Unknown(f"an overload without {name}")


Row = Callable[["Reader", fx.Node, Bound, Index], Expr]
ViewRow = Callable[["Reader", fx.Node, Bound, Index], "tuple[fx.Node, Index]"]


def kind_of(dtype: torch.dtype) -> Kind:
    if dtype == torch.bool:
        return "bool"
    if dtype.is_complex:
        raise Unknown("complex numbers")
    return "float" if dtype.is_floating_point else "int"


def shape_of(node: fx.Node) -> Index:
    return tuple(compat.size_expr(size) for size in node.meta["val"].shape)


def dtype_of(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


NARROW = (torch.uint8, torch.int8, torch.int16)  # integers that wrap round at numbers that occur


def coarsens(source: fx.Node, node: fx.Node) -> bool:
    """A cast to an 8-bit float is there for what it loses; one to a narrow integer may lose something."""
    if dtype_of(node) in NARROW:
        return dtype_of(source) not in (torch.bool, dtype_of(node))
    return dtype_of(node).is_floating_point and dtype_of(node).itemsize < 2 <= dtype_of(source).itemsize


def op_name(node: fx.Node) -> str:
    """``aten.add.Tensor -> add``; in-place variants lose their underscore (tracing already versions their results)."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return ""
    name = node.target._schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") and node.target._schema.is_mutable else name


def bind(node: fx.Node) -> Bound:
    """The node's arguments by the names of the operator's schema, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    bound = Bound({argument.name: argument.default_value for argument in schema if argument.has_default_value()})
    bound.update(zip((argument.name for argument in schema), node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def is_tensor(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def is_inside(node: fx.Node, index: Index) -> bool:
    """``index`` is provably within the tensor. A dimension of size one is read at zero, whatever the index says."""
    pairs = zip(index, shape_of(node), strict=True)
    return all(size == 1 or (never_negative(place) and always_less(place, size)) for place, size in pairs)


def _may_exceed(value: sp.Expr) -> bool:
    """A kernel counts positions in 32 bits: a multiple of one that is too large wraps round there, or in the graph."""
    return any(abs(part.as_coeff_Mul()[0]) >= LARGEST_STEP and part.atoms(Axis) for part in value.atoms(sp.Mul))


def _clumsiness(node: fx.Node, index: Index) -> tuple[bool, bool]:
    return not is_inside(node, index), any(place.has(FloorDiv, sp.Mod) for place in index)


class Reader:
    """Reads elements of one lowered graph; ``stale`` nodes changed in place later and are only ever loaded, and what is
    ``overwritten`` between a node and the site is no place to load from what it read. ``level``: how far a node got, as
    ``passes.candidates`` counts. ``readers``: for what is written to in pieces, the nodes that read it as it is from then on.

    Each site has a reader of its own, so that equal sites are read over the very same axes; readers of one graph share
    ``decompose``. Reading raises ``TooMuch`` beyond the limits, so that no proof takes longer than a fixed time.
    """

    def __init__(
        self,
        graph: fx.Graph,
        stale: frozenset[fx.Node] = frozenset(),
        decompose: Decomposer | None = None,
        overwritten: Callable[[fx.Node, fx.Node], bool] = lambda name, since: False,
        level: Callable[[fx.Node], int] = lambda node: 0,
    ) -> None:
        self.graph = graph
        self._decompose = decompose or Decomposer()
        self._stale = stale
        self._overwritten = overwritten
        self._level = level
        self._memo: dict[tuple[fx.Node, Index], Expr] = {}
        self._depth = 0
        self._inlined: dict[fx.Node, fx.Node | None] = {}
        self._outer: dict[fx.Node, fx.Node] = {}
        self._home: dict[fx.Graph, fx.Node] = {}
        self._bound: dict[tuple[fx.Node, str], Axis] = {}
        self._below: list[tuple[fx.Node, Index]] = []  # read for the element that is being read
        self._origins: dict[tuple[fx.Node, Index], tuple[fx.Node, Index]] = {}
        self.provenance = Holders()
        self.readers: dict[fx.Node, list[fx.Node]] = {}

    def at(self, node: fx.Node, index: Index) -> Expr:
        """The element of ``node`` at ``index``."""
        key = (node, index)
        if key not in self._memo:
            around, self._below = self._below, []
            try:
                expr = self._memo[key] = self._read_or_load(node, index)
                self._origins[key] = next((self._origins[k] for k in self._below if self._memo[k] == expr), key)
            finally:
                self._below = around
            if node.graph is self.graph and is_tensor(node) and not self._overwritten(node, node):
                self.provenance.note(expr, key, _clumsiness(node, index), self._origins[key])
        self._below.append(key)
        return self._memo[key]

    def _read_or_load(self, node: fx.Node, index: Index) -> Expr:
        if self._depth == MAX_DEPTH or len(self._memo) == MAX_READS:
            raise TooMuch
        self._depth += 1
        try:
            expr = self._read(node, index)
            if isinstance(expr, Int) and _may_exceed(expr.value):
                raise Unknown("whole numbers that may need more than 32 bits")
        except Unknown:
            expr = self.load(node, index)
        finally:
            self._depth -= 1
        if expr.length > MAX_LENGTH:
            raise TooMuch
        return expr

    def load(self, node: fx.Node, index: Index) -> Expr:
        """The element as a load; dimensions of size one are read at zero, whatever the index says.

        What exists only inside a decomposition cannot be loaded: then the operator as a whole is.
        """
        node = self.resolve(node)
        if node.graph is not self.graph or not is_tensor(node):
            raise Unknown("an inner value of a decomposition, or not a tensor")
        shape = shape_of(node)
        places = tuple(Int(ZERO if size == 1 else place) for size, place in zip(shape, index, strict=True))
        return Load(node, places, kind_of(dtype_of(node)))

    def is_stale(self, node: fx.Node) -> bool:
        return node in self._stale

    def weighs(self, node: fx.Node) -> bool:
        """``node`` makes attention weights of others; so does what operators do inside, for all that reads it."""
        return node.graph is not self.graph or self._level(node) == 3

    def level(self, node: fx.Node) -> int:
        """1: ``node`` is made of products, 2: of exponentials of these, 3: of weights."""
        node = self.resolve(node)
        if node.graph is self.graph:
            return self._level(node)
        return max(map(self.level, node.all_input_nodes), default=0)

    def resolve(self, node: fx.Node) -> fx.Node:
        """The node of the graph itself that a placeholder inside a decomposition stands for."""
        while node in self._outer:
            node = self._outer[node]
        return node

    def whole(self, node: fx.Node) -> fx.Node:
        """The node of the graph itself whose decomposition ``node`` is part of."""
        while node.graph is not self.graph:
            node = self._home[node.graph]
        return node

    def view(self, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
        """Where ``node[index]`` is read if the node only rearranges, copies or re-types one tensor."""
        from attngen.passes.views import VIEWS

        node = self.resolve(node)
        if node in self._stale or node.op != "call_function":
            return None
        if node.target is operator.getitem:
            return self._view_of_part(node, index)
        row = VIEWS.get(op_name(node))
        try:
            return None if row is None or self.reads_passing(node) else row(self, node, bind(node), index)
        except Unknown:
            return None

    def reads_passing(self, node: fx.Node) -> bool:
        """``node`` is made of what stands there only for the moment: memory written to in pieces, or a literal tensor.

        The value is then what the node itself holds. What an operator is given it reads once, whatever it does inside.
        """
        below = [self.resolve(n) for n in node.all_input_nodes]
        given = node.graph is not self.graph and self.whole(node)
        passing = [n for n in below if n in self._stale and given not in self.readers.get(n, ())]
        return bool(passing) or any(n.op == "get_attr" for n in below)

    def _note_what_stays(self, node: fx.Node) -> None:
        """What ``node`` reads of memory that is written in pieces can be loaded at the site: the pieces are there by now."""
        for name in map(self.resolve, node.all_input_nodes):
            if name in self._stale:
                if self._overwritten(name, self.whole(node)):
                    raise Unknown("an operand is written to in pieces")
                self.readers.setdefault(name, []).append(self.whole(node))

    def _view_of_part(self, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
        from attngen.passes.views import PARTS

        parent, part = node.args
        row = PARTS.get(op_name(parent)) if isinstance(parent, fx.Node) else None  # type: ignore[arg-type]
        if row is None or self.reads_passing(parent):  # type: ignore[arg-type]
            return None
        return row(self, parent, bind(parent), index, part)  # type: ignore[arg-type]

    def _read(self, node: fx.Node, index: Index) -> Expr:
        from attngen.passes.effects import updated
        from attngen.passes.pieces import after_write
        from attngen.passes.pointwise import POINTWISE, may_wrap
        from attngen.passes.values import VALUES

        node = self.resolve(node)
        if isinstance(value := node.meta.get("val"), torch.SymInt):
            return Int(compat.size_expr(value))
        if isinstance(value, torch.SymFloat):
            return Const(_fixed(value))
        if node.op != "call_function" or node in self._stale:
            return self.load(node, index)
        if (source := self.view(node, index)) is not None:
            return self.at(*source)
        if node.target is operator.getitem:
            return self._read_part(node, index)
        if node.target is updated:
            return after_write(self, node, index)
        name = op_name(node)
        self._note_what_stays(node)
        if name in POINTWISE:
            if may_wrap(node) or any(self.resolve(n).op == "get_attr" for n in node.all_input_nodes):
                raise Unknown("a literal tensor stands there only for the moment; narrow integers may wrap round")
            return POINTWISE[name](self, node, bind(node), index)
        if name in VALUES:
            return VALUES[name](self, node, bind(node), index)
        return self._read_inlined(node, index)

    def _read_part(self, node: fx.Node, index: Index) -> Expr:
        from attngen.passes.values import PART_VALUES

        parent, part = node.args
        row = PART_VALUES.get((op_name(parent), part))  # type: ignore[arg-type]
        if row is None:
            raise Unknown
        self._note_what_stays(parent)  # type: ignore[arg-type]
        return row(self, parent, bind(parent), index)  # type: ignore[arg-type]

    def _read_inlined(self, node: fx.Node, index: Index) -> Expr:
        if node not in self._inlined:
            inner = self._decompose(node)
            if inner is not None:
                self._outer.update(inner.arguments)
                self._home[inner.result.graph] = node
            self._inlined[node] = None if inner is None else inner.result
        result = self._inlined[node]
        if result is None:
            raise Unknown
        return self.at(result, index)

    def operand(self, value: Any, index: Index) -> Expr:
        """An argument of a pointwise operator at the index of its result: broadcast if a tensor, literal if a number."""
        if isinstance(value, fx.Node):
            if not is_tensor(value):
                return self.at(value, ())
            return self.at(value, broadcast(index, shape_of(value)))
        if isinstance(value, bool):
            return Const(value)
        if isinstance(value, int):
            return Int(sp.Integer(value))
        if isinstance(value, float):
            return Const(value)
        raise Unknown(f"an argument of type {type(value).__name__}")

    def bound(self, node: fx.Node, extent: sp.Expr, name: str = "r") -> Axis:
        """The axis that ``node`` sums over: the same each time, so that two readings of one sum compare equal."""
        if (node, name) not in self._bound:
            self._bound[node, name] = numbered(name, extent, len(self._bound))
        return self._bound[node, name]

    def access(self, node: fx.Node, index: Index) -> Access:
        """One side of a contraction: the tensor itself, not yet looked into."""
        return Access(self.resolve(node), tuple(map(Int, index)))

    def dot(self, node: fx.Node, lhs: tuple[fx.Node, Index], rhs: tuple[fx.Node, Index], axis: Axis) -> Expr:
        if axis.extent == 1:
            sides = [self.at(side, tuple(place.xreplace({axis: ZERO}) for place in index)) for side, index in (lhs, rhs)]
            if any(isinstance(side, Const) for side in sides):  # a mask laid out by the product that lays out scores
                return op("mul", *sides)
        return Dot(self.access(*lhs), self.access(*rhs), axis, self.whole(node))


def _fixed(value: torch.SymFloat) -> float:
    """A number that the program could be called with another value of: guarded, so that then it is compiled again."""
    try:
        return float(value)
    except GuardOnDataDependentSymNode:
        raise Unknown("a number that depends on data") from None


def broadcast(index: Index, shape: Index) -> Index:
    """The index into a tensor of ``shape`` that takes part in a result read at ``index``."""
    tail = index[len(index) - len(shape) :]
    return tuple(ZERO if size == 1 else place for size, place in zip(shape, tail, strict=True))


def size_arg(value: Any) -> sp.Expr:
    """An integer argument of an operator: a number, a SymInt, or the node of one."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise Unknown(f"a size of type {type(value).__name__}")
    return compat.size_expr(value)
