"""Find attention by what it computes: a contraction of values with weights made of another contraction, pair by pair.

The weights are a softmax of scores in most models, but any function of one pair will do (sigmoid, squared ReLU, decay).

One forward sweep marks where such a pattern could be; each candidate is then proved or given a ``Miss``. The proof works
on element expressions (``passes.semantics``), so layouts, views, casts and spellings play no part in it; dimensions are
axes, and an axis either is the key axis everywhere or the match fails.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import reduce

import sympy as sp
import torch
from torch import fx

from attngen import compat
from attngen.algebra import Access, Dot, Expr, Load, op, transform
from attngen.errors import Miss
from attngen.index import Axis
from attngen.normaliser import Normalised, quotient, softmax, unnormalised
from attngen.passes import effects
from attngen.passes.candidates import ATTENTION, Marks, divided, is_candidate, is_product, weighs_pairs
from attngen.passes.decompose import Decomposer
from attngen.passes.lower import Lowered
from attngen.passes.operands import Operand, peel
from attngen.passes.semantics import Reader, bind, dtype_of, op_name
from attngen.passes.sinks import sinks
from attngen.passes.views import VIEWS


@dataclass(frozen=True)
class Site:
    """One proved attention. ``output`` is the node to replace; its dimensions are ``axes``, in order. It is the result,
    complete at ``end``, or a view of it.

    ``score`` is what the softmax sees, over ``dot`` (the product of query and key) and anything else the graph adds; where
    there is no ``softmax``, it is the weight itself. ``gain`` multiplies the weights after the softmax.
    ``interior`` are the nodes between the two contractions, which nobody else reads.
    """

    output: fx.Node
    end: fx.Node
    axes: tuple[Axis, ...]
    batch: tuple[Axis, ...]
    row: Axis
    key: Axis
    inner: Axis
    feature: Axis
    query: Operand
    keys: Operand
    values: Operand
    dot: Dot
    score: Expr
    sinks: tuple[Expr, ...]
    zero_if_empty: bool
    softmax: bool
    gain: Expr
    late_sink: bool
    reader: Reader = field(repr=False, compare=False)
    interior: frozenset[fx.Node] = field(repr=False, compare=False)


def run(lowered: Lowered) -> list[Site | Miss]:
    """Every proved site and every near miss of the graph, in program order."""
    facts = effects.run(lowered.graph)
    marks = Marks()
    decompose = Decomposer()
    found: list[tuple[Site | Miss, bool]] = []
    for node in lowered.graph.nodes:
        marks.add(node)
        if node not in facts.live or not is_product(node):
            continue
        near = is_candidate(node, marks)
        if not (near or weighs_pairs(node, marks)):
            continue
        proof = _prove(node, lowered, facts, decompose)
        if isinstance(proof, Site):
            marks.settle(proof.output)
        found.append((proof, near))
    proofs = _undisturbed([proof for proof, _ in found], facts)
    # What is not near is an ordinary product, no miss.
    return [proof for proof, (_, near) in zip(proofs, found, strict=True) if near or isinstance(proof, Site)]


def _undisturbed(found: list[Site | Miss], facts: effects.Effects) -> list[Site | Miss]:
    """Without the sites that somebody looks into. Those that are left may look into each other: they go together."""
    while True:
        sites = [each for each in found if isinstance(each, Site)]
        disturbed = {id(site): effects.undisturbed(site, sites, facts) for site in sites}
        found = [each if (miss := disturbed.get(id(each))) is None else miss for each in found]
        if len(sites) == sum(isinstance(each, Site) for each in found):
            return found


# ------------------------------------------------------------------------------------------------------------- proof

_DROPOUT = "the attention weights are dropped at random"


def _prove(node: fx.Node, lowered: Lowered, facts: effects.Effects, decompose: Decomposer) -> Site | Miss:
    if op_name(node) == ATTENTION and bind(node)["dropout_p"]:
        return Miss(_DROPOUT, node.name, depth=1)
    reader = Reader(lowered.graph, facts.stale, decompose, facts.overwritten(node))
    misses = []
    for end in filter(None, (divided(node), node)):
        for output, axes in sinks(end, lowered, reader, facts):
            proof = _prove_output(reader, end, output, axes, lowered.parameters)
            if isinstance(proof, Site):
                if _fix_head_sizes(proof):
                    return _prove(node, lowered, facts, decompose)
                return proof
            misses.append(proof)
    deepest = max(misses, key=lambda miss: miss.depth)
    return deepest if deepest.node else replace(deepest, node=node.name)


@dataclass(frozen=True)
class _Sides:
    """The product of weights and values over ``key``, as ``output`` at ``axes`` holds it; it is complete at ``node``."""

    node: fx.Node
    output: fx.Node
    axes: tuple[Axis, ...]
    key: Axis
    weights: Access
    values: Access


def _prove_output(
    reader: Reader, node: fx.Node, output: fx.Node, axes: tuple[Axis, ...], parameters: frozenset[fx.Node]
) -> Site | Miss:
    result = reader.at(output, axes)
    above, below, _ = quotient(result)
    products = [factor for factor in above if isinstance(factor, Dot)]
    if len(products) != 1:
        if any(isinstance(n, Dot) for n in result.walk()):
            return Miss("the product with the values has something added to it", node.name)
        return Miss("the product with the values is not one sum of products", node.name)
    (product,) = products
    outside = reduce(lambda e, f: op("mul", e, f), [f for f in above if f is not product], Operand.ONE)
    outside = reduce(lambda e, f: op("div", e, f), below, outside)
    misses = []
    for weights, values in ((product.lhs, product.rhs), (product.rhs, product.lhs)):
        proof = _prove_sides(reader, _Sides(node, output, axes, product.axis, weights, values), outside)
        if isinstance(proof, Site):
            if proof.softmax or not (_is_product_of_three(proof) or _is_layer(proof, parameters)):
                return proof
            proof = Miss("a product with the weights of a layer, or of three matrices", node.name)
        misses.append(proof)
    return max(misses, key=lambda miss: miss.depth)


def _is_product_of_three(site: Site) -> bool:
    """Nothing but a factor is done to the weights: the order in which to multiply is the model's choice."""
    factors, below, _ = quotient(site.score)
    return all(f == site.dot or site.key not in f.axes for f in (*factors, *below))


def _is_layer(site: Site, parameters: frozenset[fx.Node]) -> bool:
    """Keys or values are weights of the model: a feed-forward layer, not attention."""

    def held(node: fx.Node) -> bool:
        while node not in parameters and op_name(node) in VIEWS:
            node = node.all_input_nodes[0]
        return node in parameters

    return held(site.keys.node) or held(site.values.node)


def _fix_head_sizes(site: Site) -> bool:
    """Guard on head sizes that the program could be called with others of: kernels are made for one. True if any."""
    found = False
    for operand, axis in ((site.query, site.inner), (site.values, site.feature)):
        sizes = operand.node.meta["val"].shape
        for place, size in zip(operand.index, sizes, strict=True):
            if place == axis and isinstance(size, torch.SymInt) and not compat.size_expr(size).is_Integer:
                int(size)
                found = found or bool(compat.size_expr(size).is_Integer)
    return found


def _drops(expr: Expr) -> bool:
    """Some of ``expr`` is set to zero at random."""
    return any(isinstance(n, Load) and op_name(n.source) == "dropout" for n in expr.walk())  # type: ignore[arg-type]


def _prove_sides(reader: Reader, sides: _Sides, outside: Expr) -> Site | Miss:
    """``outside`` multiplies the product: the division by a sum that other spellings do before it."""
    weights, key, node = sides.weights, sides.key, sides.node.name
    weight = op("mul", reader.at(weights.source, _plain(weights)), outside)  # type: ignore[arg-type]
    if (plain := unnormalised(weight)) is not None:
        proof = _prove_normalised(reader, sides, outside, plain)
        return replace(proof, depth=0) if isinstance(proof, Miss) else proof
    normalised = softmax(weight, key)
    if isinstance(normalised, str) and _drops(weight):
        return Miss(_DROPOUT, node, depth=2)
    if isinstance(normalised, str):
        return Miss(normalised, node, depth=1 if any(isinstance(n, Dot) for n in weight.walk()) else 0)
    return _prove_normalised(reader, sides, outside, normalised)


def _prove_normalised(reader: Reader, sides: _Sides, outside: Expr, normalised: Normalised) -> Site | Miss:
    dots = _score_dots(reader, normalised, sides.key)
    if isinstance(dots, Miss):
        return dots
    misses = []
    for dot in dots:  # the graph's own tensor is loaded for the others
        proof = _prove_scores(reader, sides, normalised, dot)
        if isinstance(proof, Site):
            differs = proof.feature in outside.axes
            return Miss("the result is divided by something per feature", depth=4) if differs else proof
        of_layer = op_name(dot.node) in ("linear", "addmm")  # type: ignore[arg-type]
        misses.append(replace(proof, reason="the softmax is over what a layer gives, not a product") if of_layer else proof)
    return max(misses, key=lambda miss: miss.depth)


def _prove_scores(reader: Reader, sides: _Sides, normalised: Normalised, dot: Dot) -> Site | Miss:
    key, axes = sides.key, sides.axes
    query, keys = (dot.lhs, dot.rhs) if key in dot.rhs.axes else (dot.rhs, dot.lhs)
    roles = _roles(sides, query, keys)
    if isinstance(roles, Miss):
        return roles
    row, feature = roles
    operands = _operands(reader, sides, dot, query, keys, row, feature)
    if isinstance(operands, Miss):
        return operands
    q, k, v = operands
    score, gain = (
        transform(e, lambda part: _scaled(dot, q, k) if part == dot else None) for e in (normalised.score, normalised.gain)
    )
    interior = _interior(dot, sides.node)
    if any(operand.node in interior for operand in operands):
        return Miss("an operand is computed from the scores", sides.node.name, depth=5)
    batch = tuple(a for a in axes if a not in (row, feature))
    return Site(
        sides.output, sides.node, axes, batch, row, key, dot.axis, feature, q, k, v, dot, score,
        normalised.sinks, normalised.zero_if_empty, normalised.softmax, gain, normalised.late_sink, reader, interior,
    )  # fmt: skip


def _plain(access: Access) -> tuple[sp.Expr, ...]:
    return tuple(place.value for place in access.index)  # type: ignore[attr-defined]


def _scaled(dot: Dot, *operands: Operand) -> Expr:
    """Scales found on the operands belong to the score."""
    result: Expr = dot
    for operand in operands:
        result = op("mul", result, operand.factor)
    return result


def _score_dots(reader: Reader, normalised: Normalised, key: Axis) -> list[Dot] | Miss:
    """The contractions of query and key, longest first: exactly one side of each moves with the key axis."""
    found = dict.fromkeys(e for e in normalised.score.walk() if isinstance(e, Dot))
    dots = [e for e in found if (key in e.lhs.axes) != (key in e.rhs.axes)]
    dots = [e for e in dots if _other_side(e, key).axes - {e.axis}] or dots
    if not dots:
        reason = "the softmax is not over a product of queries and keys"
        if any(isinstance(n, Load) and reader.is_stale(n.source) for n in normalised.score.walk()):  # type: ignore[arg-type]
            reason = "the scores are put together in place, piece by piece"
        return Miss(_DROPOUT if _drops(normalised.score) else reason, depth=2)
    if len(dots) > 1 and not normalised.softmax:
        return Miss(f"the weights are made of {len(dots)} products", str(dots[1].node), depth=3)
    return sorted(dots, key=lambda e: -int(e.axis.extent) if e.axis.extent.is_Integer else 0)


def _other_side(dot: Dot, key: Axis) -> Access:
    return dot.rhs if key in dot.lhs.axes else dot.lhs


def _roles(sides: _Sides, query: Access, keys: Access) -> tuple[Axis, Axis] | Miss:
    """Which dimension of the output counts queries, and which counts the features of the values."""
    node, axes, weights, values = sides.node, sides.axes, sides.weights, sides.values
    features = [a for a in axes if a in values.axes and a not in weights.axes]
    if len(features) != 1:
        return Miss("the values have no feature dimension of their own", node.name, depth=4)
    own = [a for a in axes if a in query.axes and a not in keys.axes and a not in values.axes]
    # A row may be missing when there is one query: then its dimension has extent one and every side reads it at zero.
    own = own or [a for a in axes if a.extent == 1 and a not in keys.axes | values.axes and a is not features[0]][-1:]
    if not own:
        return Miss("no dimension counts the queries alone", node.name, depth=4)
    order = [a for place in weights.index for a in axes if a in place.axes]
    row = max(own, key=lambda a: order.index(a) if a in order else -1)
    if row in keys.axes or row in values.axes:
        return Miss("keys or values differ from query to query", node.name, depth=4)
    return row, features[0]


def _operands(
    reader: Reader, sides: _Sides, dot: Dot, query: Access, keys: Access, row: Axis, feature: Axis
) -> tuple[Operand, Operand, Operand] | Miss:
    key, values, output = sides.key, sides.values, sides.output
    score_dtype = dtype_of(dot.node)  # type: ignore[arg-type]
    q = peel(reader, query, (row, dot.axis), score_dtype, direct=True)
    k = peel(reader, keys, (key, dot.axis), score_dtype)
    v = peel(reader, values, (key, feature), dtype_of(output))
    for operand in (q, k, v):
        if isinstance(operand, Miss):
            return operand
    assert isinstance(q, Operand) and isinstance(k, Operand) and isinstance(v, Operand)
    if key in v.factor.axes or v.factor.axes or v.factor != Operand.ONE:
        v = peel(reader, values, (key, feature), dtype_of(output), scaled=False)
    return (q, k, v) if isinstance(v, Operand) else v


def _interior(dot: Dot, node: fx.Node) -> frozenset[fx.Node]:
    """Nodes on a path from the score contraction to the value contraction."""
    start = dot.node
    assert isinstance(start, fx.Node)
    below = {start}
    current = start
    while current is not node:
        current = current.next
        if any(i in below for i in current.all_input_nodes):
            below.add(current)
    inside: set[fx.Node] = set()
    stack = [n for n in node.all_input_nodes if n in below]
    while stack:
        current = stack.pop()
        if current not in inside:
            inside.add(current)
            stack.extend(n for n in current.all_input_nodes if n in below)
    return frozenset(inside)

