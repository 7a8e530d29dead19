"""Cut one attention out of a lowered graph: the nodes between its operands and its result, and what they read."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from attngen.passes.semantics import op_name
from attngen.passes.values import is_contraction

_POWERS = frozenset(["softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "exp", "exp2"])


def product_of(node: fx.Node) -> fx.Node:
    """The product with the values that a miss at ``node`` is about: the first that weights lead to, from there on."""
    below = [n for n in _descendants(node) if is_contraction(n)]
    return next((n for n in below if _is_weighted(n)), below[0] if below else node)


def _is_weighted(node: fx.Node) -> bool:
    """A product whose input comes from an exponential, or attention as a whole."""
    if op_name(node) == "scaled_dot_product_attention":
        return True
    stack, seen = list(node.all_input_nodes), set[fx.Node]()
    while stack:
        above = stack.pop()
        if op_name(above) in _POWERS:
            return True
        if above not in seen and not is_contraction(above):
            seen.add(above)
            stack.extend(above.all_input_nodes)
    return False


def _descendants(node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and what is computed from it, in program order."""
    below = {node}
    while node.op != "output":
        if node in below or any(n in below for n in node.all_input_nodes):
            below.add(node)
            yield node
        node = node.next
