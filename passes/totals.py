"""Sums of weights over the keys as products with ones: each is an attention of its own.

    w / w.sum(-1, keepdim=True) @ v   -->   w / (w @ ones)[..., :1] @ v

So weights that are no exponentials may be divided by what they add up to, however that is spelt: a second kernel makes the
row's sum, and the first one loads it, as it loads any tensor. Whatever the graph does to the sum in between (adds an epsilon,
keeps it from being small, takes its absolute value) it goes on doing, in its own type, and gradients go through it. Weights
are divided before they meet the values, so nothing overflows that does not in the model. Sums of exponentials are left to
``attngen.normaliser``, which has them in the same kernel. Like ``passes.features``, this changes the graph that is analysed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx

from attngen.algebra import Dot, Expr, Op, terms
from attngen.compat import size_expr
from attngen.index import numbered
from attngen.normaliser import quotient
from attngen.passes import effects
from attngen.passes.arrange import NotYet, Scribe
from attngen.passes.candidates import Marks, is_batched, is_product
from attngen.passes.memory import storage
from attngen.passes.semantics import Reader, TooMuch, bind, dtype_of, is_tensor, op_name, shape_of
from attngen.passes.views import VIEWS

_ATEN = torch.ops.aten
_COLUMNS = 8  # of ones, all the same: sixteen bytes in 16 bits, as kernels on Hopper read them
_Made = dict[fx.Node, list[fx.Node]]


@dataclass(frozen=True)
class _Sum:
    """``node`` is ``after`` of the sum along ``dim`` of ``before`` of ``source``, added up in ``dtype``."""

    node: fx.Node
    source: fx.Node
    dim: int
    keepdim: bool
    dtype: torch.dtype
    before: Callable[[Scribe, fx.Node], fx.Node] = lambda scribe, x: x
    after: Callable[[Scribe, fx.Node, int | fx.Node], fx.Node] = lambda scribe, x, size: x


def run(graph: fx.Graph) -> _Made:
    """Write sums over pairs as products. For each node that was a sum the nodes that make it now, the last of which is it."""
    marks = Marks()
    for node in graph.nodes:
        marks.add(node)
    sums = [found for node in list(graph.nodes) if (found := _sum(node, marks)) is not None]
    if not sums:
        return {}
    facts = effects.run(graph)
    fixed = frozenset(n for n in graph.nodes if is_tensor(n) and storage(n) not in facts.writes) - facts.cut
    reader = Reader(graph, facts.stale, level=marks.level_of)
    made: _Made = {}
    for each in sums:
        wanted = each.node in facts.live - facts.cut and _normalises(each.node, marks)
        if wanted and _adds_up_weights(each, marks, reader):
            scribe = Scribe(each.node, facts.order, fixed)
            try:
                product = _product(each, scribe)
            except NotYet:
                continue
            if each.node in fixed:
                product.meta = {**each.node.meta, "val": product.meta["val"]}
            else:  # who writes to the sum knows its memory
                product = scribe.call(_ATEN.clone.default, product)
                product.meta = dict(each.node.meta)
            each.node.replace_all_uses_with(product)
            made[each.node] = scribe.made
            graph.erase_node(each.node)
    return made


def _sum(node: fx.Node, marks: Marks) -> _Sum | None:
    """``node`` as a sum of what may be weights, and are no exponentials."""
    row = _SUMS.get(op_name(node))
    inputs = [n for n in node.all_input_nodes if is_tensor(n)]
    if row is None or len(inputs) != 1 or marks.level_of(inputs[0]) not in (1, 2) or not _are_pairs(inputs[0], marks):
        return None
    found = row(node) if dtype_of(node).is_floating_point else None
    return found if found is not None and shape_of(found.source)[found.dim] != 1 else None


def _normalises(total: fx.Node, marks: Marks) -> bool:
    """What is divided by ``total``, say, goes into a product with values, or comes from one that ``total`` is not made of.

    Something made of other products may not be added on the way: then it is a norm within a model, not one of weights.
    """
    below = set(effects.ancestors(total))
    stack, seen = list(total.users), set(total.users)
    while stack:
        node = stack.pop()
        if is_product(node):
            if is_batched(node):
                return True
            continue
        if any(n in marks.pairs and n not in below and _is_of_product(n) for n in node.all_input_nodes if n not in seen):
            return True
        later = [] if _adds_products(node, marks) else [user for user in node.users if user not in seen]
        seen.update(later)
        stack.extend(later)
    return False


def _adds_products(node: fx.Node, marks: Marks) -> bool:
    """Pair by pair; a sum is no pair, nor is what else there is once for a row."""
    if op_name(node) not in ("add", "sub") or node not in marks.pairs:
        return False
    alike = [n for n in node.all_input_nodes if is_tensor(n) and shape_of(n) == shape_of(node)]
    return len(alike) > 1 and all(map(marks.level_of, alike))


def _is_of_product(node: fx.Node) -> bool:
    while op_name(node) in VIEWS:
        node = node.all_input_nodes[0]
    return is_product(node)


def _adds_up_weights(each: _Sum, marks: Marks, reader: Reader) -> bool:
    """What is added up is made of products that differ from key to key, and is no exponential."""
    index = tuple(numbered(f"o{d}", size) for d, size in enumerate(shape_of(each.source)))
    try:
        weight = reader.at(each.source, index)
    except (TooMuch, RecursionError):
        return False
    moves = any(isinstance(part, Dot) and index[each.dim] in part.axes for part in weight.walk())
    return moves and not (marks.level_of(each.source) == 2 and _is_power(weight))


def _is_power(weight: Expr) -> bool:
    """Exponentials of scores, times anything: their sum is that of a softmax. A function of an exponential is none."""
    factors, _, _ = quotient(weight)
    parts = [part for factor in factors for part in terms(factor)]
    powers = any(isinstance(part, Op) and part.name in ("exp", "exp2", "pow") and part.scored for part in parts)
    return powers or (len(parts) > len(factors) and any(map(_is_power, parts)))


def _are_pairs(node: fx.Node, marks: Marks) -> bool:
    """One number for each pair of row and key; not their products with features, or with pairs of other rows, which are
    more: added up, these are matrix products."""
    below = [n for n in node.all_input_nodes if marks.level_of(n)]
    return node in marks.pairs and (op_name(node) != "mul" or all(shape_of(n) == shape_of(node) for n in below))


def _product(each: _Sum, scribe: Scribe) -> fx.Node:
    """One column of ``matmul(source, ones)``, with the dimensions that the sum has."""
    rank = len(shape_of(each.source))
    if rank < 3:
        raise NotYet
    source = each.before(scribe, each.source)
    source = source if dtype_of(source) == each.dtype else scribe.call(_ATEN.to.dtype, source, each.dtype)
    size = _size(each, scribe)
    if each.dim != rank - 1:
        order = [d for d in range(rank) if d != each.dim]
        source = scribe.call(_ATEN.permute.default, source, [*order, each.dim])
    ones = scribe.call(
        _ATEN.ones.default, [*[1] * (rank - 2), size, _COLUMNS], dtype=each.dtype, device=source.meta["val"].device
    )
    product = scribe.call(_ATEN.matmul.default, source, ones)
    total = scribe.call(_ATEN.select.int, product, -1, 0)
    total = scribe.call(_ATEN.unsqueeze.default, total, each.dim) if each.keepdim else total
    total = each.after(scribe, total, size)
    return total if dtype_of(total) == dtype_of(each.node) else scribe.call(_ATEN.to.dtype, total, dtype_of(each.node))


def _size(each: _Sum, scribe: Scribe) -> int | fx.Node:
    """How many are summed: a number, or the node of the graph that is it."""
    size = shape_of(each.source)[each.dim]
    if size.is_Integer:
        return int(size)
    for node in each.node.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and size_expr(value) == size and scribe.is_before(node):
            return node
    raise NotYet


# ------------------------------------------------------------------------------------------------------------- spellings


def _plain(node: fx.Node) -> _Sum | None:
    args = bind(node)
    dims = args.get("dim")
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    if len(dims) != 1 or not isinstance(dims[0], int):
        return None
    source = args["self"]
    return _Sum(node, source, dims[0] % len(shape_of(source)), args["keepdim"], dtype_of(node))


def _mean(node: fx.Node) -> _Sum | None:
    """A sum in float32, where 16 bits could not hold what they hold after the division."""
    found = _plain(node)
    return found and replace(found, dtype=torch.float32, after=_over_count)


def _over_count(scribe: Scribe, total: fx.Node, size: int | fx.Node) -> fx.Node:
    return scribe.call(_ATEN.div.Tensor if isinstance(size, fx.Node) else _ATEN.div.Scalar, total, size)


def _norm(node: fx.Node) -> _Sum | None:
    """The sum of magnitudes; other norms are roots, whose gradient at zero is another one than that of a norm."""
    args = bind(node)
    found = _plain(node) if args.get("ord", args.get("p")) == 1 else None
    return found and replace(found, dtype=torch.float32, before=lambda scribe, x: scribe.call(_ATEN.abs.default, x))


def _einsum(node: fx.Node) -> _Sum | None:
    args = bind(node)
    equation, (source, *others) = args["equation"], args["tensors"]
    letters, _, kept = str(equation).replace(" ", "").partition("->")
    lost = [d for d, letter in enumerate(letters) if letter not in kept]
    if others or len(lost) != 1 or kept != letters.replace(letters[lost[0]], "") or len(set(letters)) < len(letters):
        return None
    return _Sum(node, source, lost[0], False, dtype_of(node))


_SUMS: dict[str, Callable[[fx.Node], _Sum | None]] = {
    "sum": _plain,
    "mean": _mean,
    **dict.fromkeys(("norm", "linalg_norm", "linalg_vector_norm"), _norm),
    "einsum": _einsum,
}
