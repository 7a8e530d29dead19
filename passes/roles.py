"""Which dimension of a product of weights and values counts queries, and which the features of the values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attngen.algebra import Access
from attngen.errors import Miss
from attngen.index import ONE, Axis, never_negative, numbered


@dataclass(frozen=True)
class Sides:
    """The product of weights and values over ``key``, as ``output`` at ``axes`` holds it; it is complete at ``node``."""

    node: fx.Node
    output: fx.Node
    axes: tuple[Axis, ...]
    key: Axis
    weights: Access
    values: Access


def roles_of(sides: Sides, query: Access, keys: Access, inner: Axis) -> tuple[Axis, Axis] | Miss:
    """Which dimension of the output counts queries, and which counts the features of the values."""
    node, axes, key, weights, values = sides.node, sides.axes, sides.key, sides.weights, sides.values
    features = [a for a in axes if a in values.axes and a not in weights.axes]
    if len(features) != 1:
        return Miss("the values have no feature dimension of their own", node.name, depth=4)
    own = [a for a in axes if a in query.axes and a not in keys.axes and a not in values.axes]
    # A row may be missing when there is one query: then its dimension has extent one and every side reads it at zero.
    own = own or [a for a in axes if a.extent == 1 and a not in keys.axes | values.axes and a is not features[0]][-1:]
    if not own and _has_its_own_keys(query, keys, key, inner):
        return numbered("row", ONE), features[0]
    if not own:
        return Miss("no dimension counts the queries alone", node.name, depth=4)
    order = [a for place in weights.index for a in axes if a in place.axes]
    row = max(own, key=lambda a: order.index(a) if a in order else -1)
    if row in keys.axes or row in values.axes:
        return Miss("keys or values differ from query to query", node.name, depth=4)
    return row, features[0]


def _has_its_own_keys(query: Access, keys: Access, key: Axis, inner: Axis) -> bool:
    """One query for each set of keys, as in decoding; with so few keys that fusing would save nothing, it does not count."""
    return keys.axes - {key, inner} <= query.axes and not never_negative(inner.extent - key.extent)
