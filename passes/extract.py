"""Cut one attention out of a lowered graph: the nodes between its operands and its result, and what they read."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from attngen.passes import effects
from attngen.passes.candidates import ATTENTION, SOFTMAX, divided
from attngen.passes.detect import Site
from attngen.passes.lower import Lowered
from attngen.passes.memory import storage
from attngen.passes.pointwise import POINTWISE
from attngen.passes.semantics import op_name
from attngen.passes.values import CONTRACTIONS, VALUES, is_contraction
from attngen.passes.views import PARTS, VIEWS

_POWERS = SOFTMAX | {"exp", "exp2"}
_PRODUCTS = CONTRACTIONS - {"sum", "linear", ATTENTION}
# What masks and biases are made of. Anything else beside the way from scores to result is read as a tensor.
_CHEAP = (frozenset(VIEWS) | frozenset(PARTS) | frozenset(POINTWISE) | frozenset(VALUES)) - CONTRACTIONS | {"sum"}
_PASSED = frozenset([*VIEWS, "mul", "div"])  # how an operand is spelt, not what it is


@dataclass(frozen=True)
class Region:
    """``nodes`` in program order compute ``outputs`` (the result first) from ``inputs``.

    ``operands`` are query, keys and values among the inputs, where these can be told.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...] = ()


def of_sites(sites: Sequence[Site], loaded: Sequence[fx.Node], lowered: Lowered) -> Region:
    """The region of what was proved, the terms of one output. ``loaded`` are the tensors that kernels would read beside
    the operands."""
    stops = [*(operand.node for site in sites for operand in (site.query, site.keys, site.values)), *loaded]
    scores = {site.dot.node for site in sites if isinstance(site.dot.node, fx.Node)}
    return replace(_cut(sites[0].output, stops, scores, lowered, ()), operands=tuple(stops[:3]))


def of_miss(end: fx.Node, blamed: fx.Node | None, lowered: Lowered) -> Region:
    """The region of what is not proved: from ``end``, the product with the values, back to what looks like operands.

    ``blamed`` belongs to it too if it is a write in place, wherever it stands.
    """
    end = divided(end) or end
    scores = set() if op_name(end) == ATTENTION else _score_products(end)
    products = [*scores, end if op_name(end) in {*_PRODUCTS, ATTENTION} else product_of(end)]
    operands = [source for product in products for source in _operand_sources(product)]
    stops = [_behind_layout(source) for source in operands if source not in _descended(scores, end)]
    extra = (blamed,) if blamed is not None and effects.written(blamed) else ()
    region = _cut(end, list(dict.fromkeys(stops)), scores, lowered, extra)
    return replace(region, operands=tuple(stops)) if len(stops) == 3 else region


def product_of(node: fx.Node) -> fx.Node:
    """The product with the values that a miss at ``node`` is about: the first that weights lead to, from there on."""
    below = [n for n in _descendants(node) if is_contraction(n)]
    return next((n for n in below if _is_weighted(n)), below[0] if below else node)


# ------------------------------------------------------------------------------------------------------------------ cut


def _cut(
    end: fx.Node, stops: Sequence[fx.Node], scores: Collection[fx.Node], lowered: Lowered, extra: Sequence[fx.Node]
) -> Region:
    facts = effects.run(lowered.graph)
    path = _descended(scores, end)
    nodes = _reached([end, *extra], set(stops), path)
    if writes := _writes(nodes, stops, end, facts):
        stops = [_first_alias(stop) if _is_written(stop, writes) else stop for stop in stops]
        nodes = _reached([end, *extra, *writes], set(stops), path)
    readers = [user for node in nodes & path - {end} for user in node.users if user in facts.live and user not in nodes]
    returned = [node for node in nodes & path for user in node.users if user.op == "output" and node is not end]
    computed = [user for user in dict.fromkeys(readers) if user.op != "output"]
    inside = nodes | set(computed)
    inputs = {n for node in inside for n in node.all_input_nodes if n not in inside and _is_value(n)}
    order = facts.order
    first = [stop for stop in dict.fromkeys(stops) if stop in inputs]
    rest = sorted(inputs - set(first), key=order.__getitem__)
    outputs = (end, *sorted({*computed, *returned}, key=order.__getitem__))
    return Region(tuple(sorted(inside, key=order.__getitem__)), (*first, *rest), outputs)


def _reached(ends: Sequence[fx.Node], stops: Collection[fx.Node], path: Collection[fx.Node]) -> set[fx.Node]:
    """What ``ends`` are computed from, as far as it is on ``path`` or cheap to compute, without ``stops``."""
    found: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node in found or node in stops or node.op != "call_function" or not _is_value(node):
            continue
        if node in path or node in ends or _is_cheap(node):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _is_cheap(node: fx.Node) -> bool:
    """Also what positions alone decide, and whatever is an integer or a truth value: random ones could not stand for it."""
    discrete = _is_tensor(node) and not node.meta["val"].dtype.is_floating_point
    if discrete or op_name(node) in _CHEAP or node.target in (operator.getitem, effects.updated):
        return True
    return not any(above.op in ("placeholder", "get_attr") for above in effects.ancestors(node))


def _is_value(node: fx.Node) -> bool:
    """A tensor, or several; sizes are written as numbers."""
    return not isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def _writes(nodes: set[fx.Node], stops: Sequence[fx.Node], end: fx.Node, facts: effects.Effects) -> list[fx.Node]:
    """Writes in place, between the first of ``nodes`` and ``end``, to memory of ``nodes`` or of what they start from."""
    first = min(facts.order[node] for node in nodes)
    found = [write for node in filter(_is_tensor, {*nodes, *stops}) for write in facts.writes.get(storage(node), ())]
    return [write for write in dict.fromkeys(found) if first < facts.order[write] <= facts.order[end]]


def _is_written(node: fx.Node, writes: Sequence[fx.Node]) -> bool:
    return any(storage(node) == storage(target) for write in writes for target in effects.written(write))


def _first_alias(node: fx.Node) -> fx.Node:
    """The first node with the memory of ``node``: a write through one name is seen through the others."""
    return next(n for n in node.graph.nodes if _is_tensor(n) and storage(n) == storage(node))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


# ----------------------------------------------------------------------------------------------------------- of a miss


def _score_products(end: fx.Node) -> set[fx.Node]:
    """The products above ``end`` that its weights are made of: no other product lies between."""
    found: set[fx.Node] = set()
    stack, seen = [n for n in end.all_input_nodes if _above_power(n)], {end}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if op_name(node) in _PRODUCTS:
            found.add(node)
        elif op_name(node) != "linear":
            stack.extend(node.all_input_nodes)
    return found


def _operand_sources(product: fx.Node) -> list[fx.Node]:
    """The tensors that a product multiplies (not the mask of a library call, nor what is added)."""
    factors = [n for n in product.all_input_nodes if _is_tensor(n)]
    if op_name(product) == ATTENTION:
        return factors[:3]
    return factors[1:] if op_name(product) in ("baddbmm", "addmm") else factors


def _behind_layout(node: fx.Node) -> fx.Node:
    """``node`` without the views, casts and scales that belong to how the product is spelt."""
    while op_name(node) in _PASSED and node.op == "call_function":
        tensors = [n for n in node.all_input_nodes if _is_tensor(n)]
        if len(tensors) != 1:
            break
        (node,) = tensors
    return node


def _is_weighted(node: fx.Node) -> bool:
    """A product whose input comes from an exponential, or attention as a whole."""
    return op_name(node) == ATTENTION or any(_above_power(n) for n in node.all_input_nodes)


def _above_power(node: fx.Node) -> bool:
    """An exponential made ``node``, with no product in between."""
    stack, seen = [node], set[fx.Node]()
    while stack:
        above = stack.pop()
        if op_name(above) in _POWERS:
            return True
        if above not in seen and op_name(above) not in CONTRACTIONS - {"sum"}:
            seen.add(above)
            stack.extend(above.all_input_nodes)
    return False


def _descended(starts: Collection[fx.Node], end: fx.Node) -> set[fx.Node]:
    """``starts``, ``end``, and what is computed from ``starts`` before ``end``."""
    below = {*starts, end}
    if starts:
        node = next(n for n in end.graph.nodes if n in starts)
        while node is not end:
            if any(n in below for n in node.all_input_nodes):
                below.add(node)
            node = node.next
    return below


def _descendants(node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and what is computed from it, in program order."""
    below = {node}
    while node.op != "output":
        if node in below or any(n in below for n in node.all_input_nodes):
            below.add(node)
            yield node
        node = node.next
