"""Find attention by what it computes: a contraction of values with weights that a softmax made of another contraction.

One forward sweep marks where such a pattern could be; each candidate is then proved or given a ``Miss``. The proof works
on element expressions (``passes.semantics``), so layouts, views, casts and spellings play no part in it; dimensions are
axes, and an axis either is the key axis everywhere or the match fails.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace

import sympy as sp
import torch
from torch import fx

from attngen import compat
from attngen.algebra import Access, Dot, Expr, Load, op, transform
from attngen.compat import FloorDiv
from attngen.errors import Miss
from attngen.index import Axis, numbered
from attngen.normaliser import Softmax, softmax
from attngen.passes import effects
from attngen.passes.decompose import Decomposer
from attngen.passes.lower import Lowered
from attngen.passes.operands import Operand, peel
from attngen.passes.pointwise import POINTWISE
from attngen.passes.semantics import Reader, bind, dtype_of, op_name, shape_of
from attngen.passes.values import is_contraction
from attngen.passes.views import VIEWS


@dataclass(frozen=True)
class Site:
    """One proved attention. ``output`` is the node to replace; its dimensions are ``axes``, in order.

    ``score`` is what the softmax sees, over ``dot`` (the product of query and key) and anything else the graph adds.
    ``interior`` are the nodes between the two contractions, which nobody else reads.
    """

    output: fx.Node
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
    reader: Reader = field(repr=False, compare=False)
    interior: frozenset[fx.Node] = field(repr=False, compare=False)


def run(lowered: Lowered) -> list[Site | Miss]:
    """Every proved site and every near miss of the graph, in program order."""
    facts = effects.run(lowered.graph)
    marks = _mark(lowered.graph)
    decompose = Decomposer()
    found: list[Site | Miss] = []
    for node in lowered.graph.nodes:
        if node in facts.live and _is_candidate(node, marks):
            found.append(_prove(node, lowered, facts, decompose))
    return found


# -------------------------------------------------------------------------------------------------------- candidates

_SOFTMAX = frozenset(["softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "logsumexp"])
_JOINS = frozenset(["cat", "amax", "max", "constant_pad_nd", "tril", "triu"])
# What people put between softmax and values, or scores and softmax, and no kernel computes: worth a ``Miss``.
_CHANGES = frozenset(["layer_norm", "rms_norm", "nan_to_num", "roll", "cumsum", "scatter", "gather", "topk"])
_ATTENTION = "scaled_dot_product_attention"
_DROPOUT = "the attention weights are dropped at random"


def _mark(graph: fx.Graph) -> dict[fx.Node, int]:
    """How far each node got: 1 follows a contraction, 2 an exponential after it, 3 a normaliser after that."""
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:
        name = op_name(node)
        before = max((level.get(n, 0) for n in node.all_input_nodes), default=0)
        if is_contraction(node) and name != "sum":
            level[node] = 1
        elif before == 0:
            continue
        elif name in _SOFTMAX:
            level[node] = 3
        elif name in ("exp", "exp2"):
            level[node] = max(before, 2)
        elif name == "sum":
            level[node] = 3 if before >= 2 else 1
        elif name in VIEWS or name in POINTWISE or name in _JOINS | _CHANGES or node.target is operator.getitem:
            level[node] = before
    return level


def _is_candidate(node: fx.Node, marks: dict[fx.Node, int]) -> bool:
    if op_name(node) == _ATTENTION:
        return True
    if op_name(node) == "sum" and not any(op_name(n) == "mul" for n in node.all_input_nodes):
        return False
    return is_contraction(node) and any(marks.get(n, 0) == 3 for n in node.all_input_nodes)


# ------------------------------------------------------------------------------------------------------------- proof


def _prove(node: fx.Node, lowered: Lowered, facts: effects.Effects, decompose: Decomposer) -> Site | Miss:
    if op_name(node) == _ATTENTION and bind(node)["dropout_p"]:
        return Miss(_DROPOUT, node.name, depth=1)
    reader = Reader(lowered.graph, facts.stale, decompose)
    misses = []
    for output, axes in _sinks(node, lowered, reader, facts):
        proof = _prove_output(reader, node, output, axes)
        if isinstance(proof, Site):
            if _fix_head_sizes(proof):
                return _prove(node, lowered, facts, decompose)
            disturbed = effects.undisturbed(proof, node, facts)
            return proof if disturbed is None else disturbed
        misses.append(proof)
    deepest = max(misses, key=lambda miss: miss.depth)
    return deepest if deepest.node else replace(deepest, node=node.name)


def _prove_output(reader: Reader, node: fx.Node, output: fx.Node, axes: tuple[Axis, ...]) -> Site | Miss:
    result = reader.at(output, axes)
    if not isinstance(result, Dot):
        if any(isinstance(n, Dot) for n in result.walk()):
            return Miss("the product with the values has something added to it", node.name)
        return Miss("the product with the values is not one sum of products", node.name)
    misses = []
    for weights, values in ((result.lhs, result.rhs), (result.rhs, result.lhs)):
        proof = _prove_sides(reader, node, output, axes, result.axis, weights, values)
        if isinstance(proof, Site):
            return proof
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
    return any(isinstance(n, Load) and op_name(n.source) == "dropout" for n in expr.walk())  # type: ignore[arg-type]


def _prove_sides(
    reader: Reader,
    node: fx.Node,
    output: fx.Node,
    axes: tuple[Axis, ...],
    key: Axis,
    weights: Access,
    values: Access,
) -> Site | Miss:
    weight = reader.at(weights.source, _plain(weights))  # type: ignore[arg-type]
    normalised = softmax(weight, key)
    if isinstance(normalised, str) and _drops(weight):
        return Miss(_DROPOUT, node.name, depth=2)
    if isinstance(normalised, str):
        return Miss(normalised, node.name, depth=1 if any(isinstance(n, Dot) for n in weight.walk()) else 0)
    dot = _score_dot(normalised, key)
    if isinstance(dot, Miss):
        return dot
    query, keys = (dot.lhs, dot.rhs) if key in dot.rhs.axes else (dot.rhs, dot.lhs)
    roles = _roles(node, axes, key, query, keys, weights, values)
    if isinstance(roles, Miss):
        return roles
    row, feature = roles
    operands = _operands(reader, node, output, dot, query, keys, values, row, key, feature)
    if isinstance(operands, Miss):
        return operands
    q, k, v = operands
    score = transform(normalised.score, lambda e: _scaled(dot, q, k) if e == dot else None)
    interior = _interior(dot, node)
    if any(operand.node in interior for operand in operands):
        return Miss("an operand is computed from the scores", node.name, depth=5)
    batch = tuple(a for a in axes if a not in (row, feature))
    return Site(
        output, axes, batch, row, key, dot.axis, feature, q, k, v, dot, score,
        normalised.sinks, normalised.zero_if_empty, reader, interior,
    )  # fmt: skip


def _plain(access: Access) -> tuple[sp.Expr, ...]:
    return tuple(place.value for place in access.index)  # type: ignore[attr-defined]


def _scaled(dot: Dot, *operands: Operand) -> Expr:
    """Scales found on the operands belong to the score."""
    result: Expr = dot
    for operand in operands:
        result = op("mul", result, operand.factor)
    return result


def _score_dot(normalised: Softmax, key: Axis) -> Dot | Miss:
    """The contraction of query and key: exactly one side of it moves with the key axis."""
    dots = [e for e in normalised.score.walk() if isinstance(e, Dot) and (key in e.lhs.axes) != (key in e.rhs.axes)]
    dots = [e for e in dots if _other_side(e, key).axes - {e.axis}] or dots
    if not dots:
        reason = "the softmax is not over a product of queries and keys"
        return Miss(_DROPOUT if _drops(normalised.score) else reason, depth=2)
    if len(dots) > 1:
        return Miss(f"the scores are made of {len(dots)} products", str(dots[1].node), depth=3)
    return dots[0]


def _other_side(dot: Dot, key: Axis) -> Access:
    return dot.rhs if key in dot.lhs.axes else dot.lhs


def _roles(
    node: fx.Node, axes: tuple[Axis, ...], key: Axis, query: Access, keys: Access, weights: Access, values: Access
) -> tuple[Axis, Axis] | Miss:
    """Which dimension of the output counts queries, and which counts the features of the values."""
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
    reader: Reader, node: fx.Node, output: fx.Node, dot: Dot, query: Access, keys: Access, values: Access,
    row: Axis, key: Axis, feature: Axis,
) -> tuple[Operand, Operand, Operand] | Miss:  # fmt: skip
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


def _sinks(
    node: fx.Node, lowered: Lowered, reader: Reader, facts: effects.Effects
) -> list[tuple[fx.Node, tuple[Axis, ...]]]:
    """The result, and the views and copies of it that only it feeds, as long as its dimensions stay whole; last first.

    So the kernel writes the layout the model wants next, and the copies in between disappear.
    """
    sinks = [(node, _fresh(node))]
    output = node
    while len(output.users) == 1:
        (user,) = output.users
        if op_name(user) not in VIEWS or not _same_size(user, node) or not lowered.origins.get(user):
            break
        if (user in facts.cut) != (node in facts.cut):
            break
        axes = _fresh(user)
        place = _trace_back(reader, user, axes, node)
        if place is None or not _whole(place, axes):
            break
        output = user
        sinks.append((output, axes))
    return sinks[::-1]


def _fresh(node: fx.Node) -> tuple[Axis, ...]:
    return tuple(numbered(f"o{d}", size) for d, size in enumerate(shape_of(node)))


def _same_size(user: fx.Node, node: fx.Node) -> bool:
    sizes = [sp.Mul(*shape_of(n)) for n in (user, node)]
    return sp.expand(sizes[0] - sizes[1]) == 0 and dtype_of(user) == dtype_of(node)


def _trace_back(
    reader: Reader, user: fx.Node, index: tuple[sp.Expr, ...], node: fx.Node
) -> tuple[sp.Expr, ...] | None:
    while user is not node:
        step = reader.view(user, index)
        if step is None:
            return None
        user, index = step
    return index


def _whole(place: tuple[sp.Expr, ...], axes: tuple[Axis, ...]) -> bool:
    """No dimension of the source is cut apart, and none is read with a step or an offset."""
    if any(p.has(FloorDiv, sp.Mod) for p in place):
        return False
    used = [s for p in place for s in p.free_symbols if isinstance(s, Axis)]
    return len(used) == len(set(used)) and all(p.subs(dict.fromkeys(axes, 0)) == 0 for p in place)


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

