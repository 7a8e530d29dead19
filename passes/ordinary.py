"""Weights that no sum normalises may be no attention at all: layers of a model, and products of three matrices.

``(q @ k.mT) @ v`` is left in the order in which the model multiplies, also where ``q @ (k.mT @ v)`` is cheaper: that sum over
the keys comes out far off if queries cancel what keys have in common (``tests/test_weights.py`` measures it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from attngen.errors import Miss
from attngen.normaliser import quotient
from attngen.passes import ranges
from attngen.passes.candidates import is_total
from attngen.passes.semantics import op_name
from attngen.passes.views import VIEWS

if TYPE_CHECKING:
    from attngen.passes.detect import Site


def run(site: Site, parameters: frozenset[fx.Node]) -> Miss | None:
    """Why the unnormalised ``site`` is no attention, or None if it is one."""
    if _is_product_of_three(site) or _is_layer(site, parameters):
        return Miss("a product with the weights of a layer, or of three matrices", site.output.name)
    return None


def _is_product_of_three(site: Site) -> bool:
    """Nothing but a factor is done to the weights: the order in which to multiply is the model's choice.

    Unless they are divided by what they add up to, or are added up for that: these are weights of an average.
    """
    factors, below, _ = quotient(site.score)
    if is_total(site.end) or any(ranges.totals(divisor) for divisor in below):
        return False
    return all(f == site.dot or site.key not in f.axes for f in (*factors, *below))


def _is_layer(site: Site, parameters: frozenset[fx.Node]) -> bool:
    """Keys or values are weights of the model: a feed-forward layer, not attention."""

    def held(node: fx.Node) -> bool:
        while node not in parameters and op_name(node) in VIEWS:
            node = node.all_input_nodes[0]
        return node in parameters

    return held(site.keys.node) or held(site.values.node)
