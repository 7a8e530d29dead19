"""Attention whose keys come in pieces, as one over all of them: memory, prefixes, global tokens, blocks.

    s = cat([q @ k1.mT, q @ k2.mT], -1); w = softmax(s, -1); w[..., :n] @ v1 + w[..., n:] @ v2
    -->  w = softmax(q @ cat([k1, k2]).mT, -1); w @ cat([v1, v2])

Either half is a law of its own, whatever lies in between: products of one tensor with several are parts of its product with
all of them, and products of neighbouring parts of one tensor, added up, are its product with what they met, joined. So masks
and biases of each piece stay where they are, in front of the ``cat``. This changes the graph that is analysed, never the one
that runs; there, keys and values are joined where the attention is replaced.

BigBird's blocks are pieces, too: those that a table lists are gathered by the graph and joined with the neighbours and with
the first and the last block, so a kernel visits what is listed and nothing else (``tests/test_big_bird.py``). The table does
not become a mask over the keys, as where they lie: a block that it lists twice, or lists beside a neighbour, counts twice
in the softmax, and whether it does is data. Joined, keys and values of blocks of n rows take ``d / n`` of what scores and
weights would, and these are made and read several times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import torch
from torch import fx

from attngen.algebra import Access, Dot
from attngen.index import Axis, numbered
from attngen.passes import effects
from attngen.passes.arrange import END, NotYet, Piece, Scribe, is_plain, layers, pieces
from attngen.passes.candidates import Marks, is_product
from attngen.passes.memory import storage
from attngen.passes.semantics import Index, Reader, TooMuch, bind, dtype_of, is_tensor, op_name, shape_of

TOO_LARGE = "its keys come in pieces, and joined they would be as large as the weights"
_KEY = Axis("joined", 2)  # along which pieces are joined, however many they are
_LONGEST = 16  # nodes between a product and the place where the pieces are joined


@dataclass(frozen=True)
class Joins:
    """``moved``: nodes, and those that hold their values now. ``refused``: products that are left in pieces, and why."""

    moved: dict[fx.Node, fx.Node] = field(default_factory=dict)
    refused: dict[fx.Node, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Product:
    """``node``, at ``axes``, sums ``shared * own`` over ``axis``: a part of a whole, with a ``size`` and a ``start``."""

    node: fx.Node
    axes: tuple[Axis, ...]
    axis: Axis
    shared: Piece
    own: Piece
    size: int
    start: int = 0


def run(graph: fx.Graph) -> Joins:
    """Join what comes in pieces, where that is smaller than the scores and weights which then need not be kept."""
    marks, found = Marks(), Joins()
    for node in graph.nodes:
        marks.add(node)
    joins = [node for node in graph.nodes if _joins_products(node, marks)]
    sums = [node for node in graph.nodes if _adds_products(node, marks)]
    if joins or sums:
        joining = _Joining(graph, marks, found)
        for end in sums:
            joining.weighted(end)
        for join in joins:
            joining.scores(join)
    return found


def _joins_products(node: fx.Node, marks: Marks) -> bool:
    return op_name(node) in ("cat", "concat") and sum(part in marks.pairs for part in bind(node)["tensors"]) > 1


def _adds_products(node: fx.Node, marks: Marks) -> bool:
    """The last of a chain of additions of products."""
    return _is_addition(node, marks) and not any(_is_addition(user, marks) for user in node.users)


def _is_addition(node: fx.Node, marks: Marks) -> bool:
    if op_name(node) != "add" or len(node.all_input_nodes) != 2 or bind(node)["alpha"] != 1:
        return False
    return all(n in marks.pairs for n in node.all_input_nodes)


class _Joining:
    """One graph while its pieces are joined."""

    def __init__(self, graph: fx.Graph, marks: Marks, found: Joins) -> None:
        self._graph, self._marks, self._found = graph, marks, found
        self._facts = effects.run(graph)
        self._reader = Reader(graph, self._facts.stale)
        written = self._facts.writes
        self._fixed = frozenset(n for n in graph.nodes if is_tensor(n) and storage(n) not in written) - self._facts.cut

    # ------------------------------------------------------------------------------------------------------ scores

    def scores(self, join: fx.Node) -> None:
        """The products that neighbouring parts of ``join`` are made of, as parts of one product."""
        parts = [(part, self._product_above(part)) for part in bind(join)["tensors"]]
        for scored, group in groupby(parts, lambda each: each[1] is not None):
            nodes = [product for _, product in group if product is not None]
            if scored and 1 < len(nodes) == len(set(nodes)) and (products := self._of_one_tensor(nodes)):
                self._join_scores(products)

    def _product_above(self, part: fx.Node) -> fx.Node | None:
        """The one product of queries and keys that ``part`` is made of."""
        found: set[fx.Node] = set()
        stack, seen = [part], set[fx.Node]()
        while stack and len(seen) < _LONGEST:
            node = stack.pop()
            seen.add(node)
            if is_product(node):
                found.add(node)
            else:
                stack += [n for n in node.all_input_nodes if n in self._marks.pairs and n not in seen]
        if len(found) != 1 or stack:
            return None
        (product,) = found
        return product if product in self._fixed and self._marks.highest(product.all_input_nodes) < 2 else None

    def _of_one_tensor(self, nodes: Sequence[fx.Node]) -> list[_Product] | None:
        """The products, if one tensor, read at one place, is multiplied with another one in each."""
        read = [list(self._scored(node)) for node in nodes]
        for first in read[0]:
            chosen = [next((p for p in each if _pattern(p) == _pattern(first)), None) for each in read]
            products = [p for p in chosen if p is not None]
            if len(products) == len(nodes):
                return products
        return None

    def _scored(self, node: fx.Node) -> Iterator[_Product]:
        """Each way to see ``node`` as the product of a tensor that many share with one that has an axis of its own."""
        for axes, axis, shared, own in self._sides(node):
            for one in pieces(self._reader, shared):
                rest = [a for a in axes if a not in one.index and a.extent != 1]
                if len(rest) != 1 or axis not in one.index:
                    continue
                for other in pieces(self._reader, own):
                    if {rest[0], axis} <= set(other.axes) <= {rest[0], *one.axes}:
                        yield _Product(node, axes, axis, one, other, int(rest[0].extent))
                        break

    def _join_scores(self, products: Sequence[_Product]) -> None:
        named = [_named_as(products[0], each) for each in products]
        first = min((each.node for each in products), key=self._facts.order.__getitem__)
        inner, shared = named[0].axis, named[0].shared
        along = [axis for axis in shared.axes if axis is not inner]
        batch = [axis for axis in along if any(axis in each.own.axes for each in named)]
        if _count([*batch, inner]) > _count(along):
            return
        scribe = Scribe(first, self._facts.order, self._fixed)
        try:
            keys = scribe.joined([each.own for each in named], [*batch, _KEY, inner], _KEY, dtype_of(first))
            queries = scribe.arranged(shared, [*along, inner], dtype_of(first))
        except NotYet:
            return
        whole = scribe.product(queries, [*along, inner], keys, [*batch, _KEY, inner], [*along, _KEY])
        start = 0
        for each in named:
            stop = END if each is named[-1] else start + each.size
            part = scribe.call(torch.ops.aten.slice.Tensor, whole, len(along), start, stop)
            part = scribe.spread(part, [*along, _KEY], each.axes)
            part.meta = dict(each.node.meta)  # the same memory, as far as those know who look at it
            each.node.replace_all_uses_with(part)
            start = stop

    # ----------------------------------------------------------------------------------------------------- weights

    def weighted(self, end: fx.Node) -> None:
        """Products of neighbouring parts of the weights, added up at ``end``, as one product."""
        chain, terms = self._chain(end)
        read = [self._of_weights(term, shape_of(end)) for term in terms]
        products = sorted((each for each in read if each is not None), key=lambda each: each.start)
        if len(products) < len(terms) or not chain or not _are_neighbours(products):
            return
        shared, out = products[0].shared, products[0].axes
        features = [axis for axis in out if axis in (a for each in products for a in each.own.axes)]
        if _count(features) > _count([axis for axis in shared.axes if axis is not _KEY]):
            self._found.refused.update(dict.fromkeys((each.node for each in products), TOO_LARGE))
            return
        scribe = Scribe(end, self._facts.order, self._fixed)
        try:
            values = scribe.joined([each.own for each in products], [*features, _KEY], _KEY, dtype_of(end))
            rows = [axis for axis in out if axis in shared.axes or axis not in features]
            weights = scribe.arranged(self._part(scribe, products), [*rows, _KEY], dtype_of(end))
        except NotYet:
            return
        whole = scribe.product(weights, [*rows, _KEY], values, [*features, _KEY], out)
        whole.meta = dict(end.meta)
        end.replace_all_uses_with(whole)
        for node in chain:
            self._graph.erase_node(node)
        self._found.moved[end] = whole

    def _part(self, scribe: Scribe, products: Sequence[_Product]) -> Piece:
        """The part of the weights that the products are made of, with the dimension that is summed over whole."""
        piece, start, last = products[0].shared, products[0].start, products[-1]
        dim = piece.index.index(_KEY)
        stop = last.start + last.size
        whole = scribe.call(torch.ops.aten.slice.Tensor, scribe.here(piece.node), dim, start, stop)
        return Piece(whole, piece.index)

    def _chain(self, end: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """The additions that lead to ``end``, each before those it adds up, and the terms; none if others see them work."""
        chain, terms, stack = [], [], [end]
        while stack:
            node = stack.pop()
            if node is end or (_is_addition(node, self._marks) and len(node.users) == 1):
                chain.append(node)
                stack += node.all_input_nodes
            else:
                terms.append(node)
        if any(effects.written(node) for node in chain):
            until, memory = self._facts.order[end], storage(end)
            names = [n for n in self._graph.nodes if is_tensor(n) and storage(n) == memory]
            others = [n for n in names if n not in chain and self._facts.order.get(n, until) < until]
            if any(n not in terms or len(n.users) > 1 for n in others):
                return [], []
        return chain, terms

    def _of_weights(self, term: fx.Node, shape: Index) -> _Product | None:
        """``term`` as the product of a part of the weights with values."""
        if shape_of(term) != shape:
            return None
        for axes, axis, shared, own in self._sides(term):
            places = [(n, i) for n, i in layers(self._reader, shared) if self._marks.level_of(n) == 3 and n in self._fixed]
            values = [piece for piece in pieces(self._reader, own) if axis in piece.axes]
            if not places or not values:
                continue
            node, index = places[-1]
            starts = [place - axis for place in index if axis in place.free_symbols]
            whole = Piece(node, tuple(_KEY if axis in place.free_symbols else place for place in index))
            if len(starts) == 1 and starts[0].is_Integer and _is_plain_but_one(whole):
                named = values[0].renamed({axis: _KEY})
                return _Product(term, axes, axis, whole, named, int(axis.extent), int(starts[0]))
        return None

    # ------------------------------------------------------------------------------------------------------ reading

    def _sides(self, node: fx.Node) -> Iterator[tuple[tuple[Axis, ...], Axis, Access, Access]]:
        """The axes of ``node``, the one that it sums over, and the two tensors that it is a product of, either way."""
        axes = tuple(numbered(f"o{d}", size) for d, size in enumerate(shape_of(node)))
        try:
            product = self._reader.at(node, axes)
        except (TooMuch, RecursionError):
            return
        if isinstance(product, Dot) and all(axis.extent.is_Integer for axis in (*axes, product.axis)):
            yield axes, product.axis, product.lhs, product.rhs
            yield axes, product.axis, product.rhs, product.lhs


def _is_plain_but_one(piece: Piece) -> bool:
    """Along all dimensions but that of ``_KEY``, of which a part is read."""
    key = piece.index.index(_KEY)
    shape = shape_of(piece.node)
    index = tuple(place for dim, place in enumerate(piece.index) if dim != key)
    return bool(shape[key].is_Integer) and is_plain(index, (*shape[:key], *shape[key + 1 :]))


def _are_neighbours(products: Sequence[_Product]) -> bool:
    """Of the same tensor, read at the same place, and each part begins where the one before ends."""
    first = products[0]
    same = all(each.shared == first.shared and each.axes == first.axes for each in products)
    return same and len(products) > 1 and all(a.start + a.size == b.start for a, b in pairwise(products))


def _pattern(product: _Product) -> tuple[object, ...]:
    """Which tensor is shared, and how it is read, whatever its axes are called."""
    index, inner = product.shared.index, product.axis
    places = ("inner" if p is inner else ("axis", p.extent) if isinstance(p, Axis) else p for p in index)
    return product.shared.node, *places


def _named_as(first: _Product, product: _Product) -> _Product:
    """``product`` with the names of axes that ``first`` has for them; the one along which they are joined is ``_KEY``."""
    names = {a: b for a, b in zip(product.shared.index, first.shared.index, strict=True) if isinstance(a, Axis)}
    ones = {axis: Axis("one", 1) for axis in product.axes if axis not in names and axis.extent == 1}
    (key,) = (axis for axis in product.axes if axis not in {**names, **ones})
    names |= {**ones, key: _KEY}
    axes = tuple(names[axis] for axis in product.axes)
    shared, own = product.shared.renamed(names), product.own.renamed(names)
    return _Product(product.node, axes, names[product.axis], shared, own, product.size)


def _count(axes: Sequence[Axis]) -> int:
    return math.prod(int(axis.extent) for axis in axes)
