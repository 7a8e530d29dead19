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
from attngen.normaliser import OWN_SUM, Normalised, quotient, softmax, summands, unnormalised
from attngen.passes import bands, dropout, effects, heads, ordinary, ranges, results, sliding
from attngen.passes.candidates import Marks, divided, is_candidate, is_product, is_total, weighs_pairs
from attngen.passes.decompose import Decomposer
from attngen.passes.lower import Lowered
from attngen.passes.operands import NOT_WHOLE, Operand, peel
from attngen.passes.roles import Sides, roles_of
from attngen.passes.semantics import Reader, TooMuch, dtype_of, op_name


@dataclass(frozen=True)
class Site:
    """One proved attention. ``output`` is the node to replace; its dimensions are ``axes``, in order. It is the result,
    complete at ``end``, or a view of it. A ``row`` that is none of them has one query.

    ``score`` is what the softmax sees, over ``dot`` (the product of query and key) and anything else the graph adds; where
    there is no ``softmax``, it is the weight itself. ``gain`` multiplies the weights after the softmax.
    ``interior`` are the nodes between the two contractions, which nobody else reads. ``dtype`` is that of the result.
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
    empty: str
    softmax: bool
    gain: Expr
    late_sink: bool
    lifted: bool
    early: bool
    by_log: bool
    again: bool
    dtype: torch.dtype
    reader: Reader = field(repr=False, compare=False)
    interior: frozenset[fx.Node] = field(repr=False, compare=False)


Terms = tuple[Site, ...]  # attentions over the same values, whose sum the output is; one in most models


def run(lowered: Lowered) -> list[Terms | Miss]:
    """What is proved and every near miss of the graph, in the order of the results: what is loaded is replaced before."""
    facts = effects.run(lowered.graph)
    marks = Marks()
    decompose = Decomposer()
    found: list[tuple[fx.Node, Terms | Miss, bool]] = []
    for node in lowered.graph.nodes:
        marks.add(node)
        if node not in facts.live or not is_product(node):
            continue
        near = is_candidate(node, marks)
        if not (near or weighs_pairs(node, marks)):
            continue
        proof = _prove(node, lowered, facts, decompose, marks)
        if not isinstance(proof, Miss):
            if proof[0].output in marks.settled:  # by the product that it divides; this one is of the sum below the line
                continue
            marks.settle(proof[0].output)
        found.append((node, proof, near))
    found.sort(key=lambda each: facts.order[each[0] if isinstance(each[1], Miss) else each[1][0].output])
    proofs = _undisturbed([proof for _, proof, _ in found], facts)
    inside = frozenset[fx.Node]().union(*(each[0].interior for each in proofs if not isinstance(each, Miss)))
    return [proof for proof, (node, _, near) in zip(proofs, found, strict=True) if _is_told(proof, near, node in inside)]


def _is_told(proof: Terms | Miss, near: bool, inside: bool) -> bool:
    """What is not near is an ordinary product, no miss; nor is a sum of weights ``inside`` an attention."""
    return not isinstance(proof, Miss) or (near and not inside) or proof.reason in _BY_SUM


def _undisturbed(found: list[Terms | Miss], facts: effects.Effects) -> list[Terms | Miss]:
    """Without the sites that somebody looks into. Those that are left may look into each other: they go together. Sums of
    weights that nothing else is made of are sums like any others."""
    while True:
        sites = [each[0] for each in found if not isinstance(each, Miss)]  # terms of one sum share their interior
        weighed = {site.dot.node for site in sites if not is_total(site.end)}
        disturbed = {site.output: Miss(_ADDED_UP) for site in sites if site.dot.node not in weighed}
        disturbed |= {site.output: miss for site in sites if (miss := effects.undisturbed(site, sites, facts)) is not None}
        found = [each if isinstance(each, Miss) else disturbed.get(each[0].output, each) for each in found]
        if len(sites) == sum(not isinstance(each, Miss) for each in found):
            return found


# ------------------------------------------------------------------------------------------------------------- proof

_DROPOUT = "the attention weights are dropped at random"
_DROPPED_SCORES = "the scores are dropped at random"
EITHER_SIGN = "the weights are divided by their sum, but may be of either sign: it may be next to nothing beside them"
_ADDED_UP = "scores are added up, and no values with them"
_BY_SUM = (OWN_SUM, EITHER_SIGN)
_TOO_MUCH = "more is computed between the two products than a proof follows"
_OF_PARTS = "the scores are put together from parts of one product"
_IN_PLACE = "the scores are put together in place, piece by piece"
_FROM_SCORES = "an operand is computed from the scores"


def _prove(node: fx.Node, lowered: Lowered, facts: effects.Effects, decompose: Decomposer, marks: Marks) -> Terms | Miss:
    if node in lowered.refused:
        return Miss(lowered.refused[node], node.name, depth=1)
    known = decompose.fixed
    try:
        proof = _proof(node, lowered, facts, decompose, marks)
    except (TooMuch, RecursionError):
        return Miss(_TOO_MUCH, node.name, depth=1)
    if decompose.fixed > known:  # of one size, the proof has seen both the symbol and the number
        return _prove(node, lowered, facts, decompose, marks)
    return proof


def _proof(node: fx.Node, lowered: Lowered, facts: effects.Effects, decompose: Decomposer, marks: Marks) -> Terms | Miss:
    reader = Reader(lowered.graph, facts.stale, decompose, lambda n, since: facts.overwritten(n, since, node), marks.level_of)
    misses: list[Miss] = []
    for end in (node,) if is_total(node) else filter(None, (divided(node), node)):
        if any(miss.reason in _BY_SUM for miss in misses):  # the weights are read by that sum
            break
        for output, axes in results.run(end, lowered, reader, facts):
            proof = _prove_output(reader, end, output, axes, lowered.parameters)
            if isinstance(proof, Miss):
                misses.append(proof)
                continue
            if any(_fix_head_sizes(site) for site in proof):
                return _proof(node, lowered, facts, decompose, marks)
            inside = proof[0].interior - {site.dot.node for site in proof}
            mixed = heads.mixed(reader, end) if any(map(heads.may_mix, inside)) else None
            if mixed is None:
                return proof
            misses.append(mixed)
    if (mixed := heads.mixed(reader, node)) is not None:
        return mixed
    deepest = max(misses, key=lambda miss: miss.depth)
    return deepest if deepest.node else replace(deepest, node=node.name)


def _prove_output(
    reader: Reader, node: fx.Node, output: fx.Node, axes: tuple[Axis, ...], parameters: frozenset[fx.Node]
) -> Terms | Miss:
    result = reader.at(output, axes)
    above, below, _ = quotient(result)
    products = [factor for factor in above if isinstance(factor, Dot)]
    if len(products) != 1:
        if result.scored:
            return Miss("the product with the values has something added to it", node.name)
        return Miss("the product with the values is not one sum of products", node.name)
    (product,) = products
    outside = reduce(lambda e, f: op("mul", e, f), [f for f in above if f is not product], Operand.ONE)
    outside = reduce(lambda e, f: op("div", e, f), below, outside)
    misses = []
    for weights, values in ((product.lhs, product.rhs), (product.rhs, product.lhs)):
        proof = _prove_sides(reader, Sides(node, output, axes, product.axis, weights, values), outside)
        if not isinstance(proof, Miss):
            refused = None if proof[0].softmax else ordinary.run(proof[0], parameters)
            if refused is None:
                return proof
            proof = refused
        misses.append(proof)
    return max(misses, key=lambda miss: miss.depth)


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
    return any(isinstance(n, Load) and isinstance(n.source, fx.Node) and dropout.drops(n.source) for n in expr.walk())


def _prove_sides(reader: Reader, sides: Sides, outside: Expr) -> Terms | Miss:
    """``outside`` multiplies the product: the division by a sum that other spellings do before it."""
    sides = sliding.without_zeros(reader, sides)
    weights, key, node = sides.weights, sides.key, sides.node.name
    weight = op("mul", reader.at(weights.source, _plain(weights)), outside)  # type: ignore[arg-type]
    if ranges.cancels(reader, weight):
        return Miss(EITHER_SIGN, node, depth=7)
    if (plain := unnormalised(weight)) is not None:
        proof = _prove_normalised(reader, sides, outside, plain)
        return replace(proof, depth=0) if isinstance(proof, Miss) else (proof,)
    normalised = softmax(weight, key)
    if isinstance(normalised, Normalised):
        proof = _prove_normalised(reader, sides, outside, normalised)
        return proof if isinstance(proof, Miss) else (proof,)
    if _drops(weight):
        return Miss(_DROPOUT, node, depth=2)
    if len(parts := summands(weight, key)) > 1:
        return _prove_sum(reader, sides, outside, [softmax(part, key) for part in parts])
    if key.extent == 1:
        return Miss("there is only one key", node, depth=1)
    scored = weight.scored
    return Miss(normalised, node, depth=7 if scored and normalised == OWN_SUM else int(scored))


def _prove_sum(reader: Reader, sides: Sides, outside: Expr, parts: list[Normalised | str]) -> Terms | Miss:
    """``(w1 + w2) @ v = w1 @ v + w2 @ v``, where each is a softmax; else none of them gains.

    The terms may be larger than their sum, so they are not rounded to 16 bits before it.
    """
    normalised = [part for part in parts if isinstance(part, Normalised)]
    if len(normalised) < len(parts):
        return Miss("something is added to the attention weights", sides.node.name, depth=1)
    proofs = [_prove_normalised(reader, sides, outside, part) for part in normalised]
    misses = [proof for proof in proofs if isinstance(proof, Miss)]
    if misses:
        return max(misses, key=lambda miss: miss.depth)
    sites = [proof for proof in proofs if isinstance(proof, Site)]
    inside = frozenset[fx.Node]().union(*(site.interior for site in sites))
    if any(operand.node in inside for site in sites for operand in (site.query, site.keys, site.values)):
        return Miss(_FROM_SCORES, sides.node.name, depth=5)
    dtype = torch.promote_types(dtype_of(sides.output), torch.float32)
    return tuple(replace(site, interior=inside, dtype=dtype) for site in sites)


def _prove_normalised(reader: Reader, sides: Sides, outside: Expr, normalised: Normalised) -> Site | Miss:
    sides, normalised = sliding.over_shared_keys(reader, sides, normalised)
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
    closest = max(misses, key=lambda miss: miss.depth)
    parted = closest.reason == NOT_WHOLE and sliding.in_parts(normalised.score, sides.key)
    return replace(closest, reason=_OF_PARTS) if parted else closest


def _prove_scores(reader: Reader, sides: Sides, normalised: Normalised, dot: Dot) -> Site | Miss:
    shared = bands.run(reader, sides, normalised, dot)
    proof = None if shared is None else _prove_pairs(reader, *shared)
    return proof if isinstance(proof, Site) else _prove_pairs(reader, sides, normalised, dot)


def _prove_pairs(reader: Reader, sides: Sides, normalised: Normalised, dot: Dot) -> Site | Miss:
    key, axes = sides.key, sides.axes
    query, keys = (dot.lhs, dot.rhs) if key in dot.rhs.axes else (dot.rhs, dot.lhs)
    roles = roles_of(sides, query, keys, dot.axis)
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
    interior = effects.between(dot.node, sides.node, without=is_total)  # type: ignore[arg-type]
    if any(operand.node in interior for operand in operands):
        return Miss(_FROM_SCORES, sides.node.name, depth=5)
    if dropout.seeds(score, *normalised.sinks):
        return Miss(_DROPPED_SCORES, sides.node.name, depth=5)
    if any(seed.whole not in (*interior, sides.node) for seed in dropout.seeds(gain)):
        return Miss(_DROPOUT, sides.node.name, depth=5)
    batch = tuple(a for a in axes if a not in (row, feature))
    return Site(
        sides.output, sides.node, axes, batch, row, key, dot.axis, feature, q, k, v, dot, score,
        normalised.sinks, normalised.empty, normalised.softmax, gain, normalised.late_sink,
        normalised.lifted, normalised.early, normalised.by_log, normalised.again, dtype_of(sides.output), reader, interior,
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
        sources = [n.source for n in normalised.score.walk() if isinstance(n, Load) and isinstance(n.source, fx.Node)]
        if any(reader.is_stale(source) or source.target is effects.updated for source in sources):
            reason = _IN_PLACE
        return Miss(_DROPPED_SCORES if _drops(normalised.score) else reason, depth=2)
    if len(dots) > 1 and not normalised.softmax:
        return Miss(f"the weights are made of {len(dots)} products", str(dots[1].node), depth=3)
    return sorted(dots, key=lambda e: -int(e.axis.extent) if e.axis.extent.is_Integer else 0)


def _other_side(dot: Dot, key: Axis) -> Access:
    return dot.rhs if key in dot.lhs.axes else dot.lhs


def _operands(
    reader: Reader, sides: Sides, dot: Dot, query: Access, keys: Access, row: Axis, feature: Axis
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
