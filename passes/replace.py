"""Put the operator of a site into the captured graph, in place of the value it computes.

Only the site's own output is redirected; what nobody needs any more is erased, everything else stays as it was.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from attngen.errors import Miss
from attngen.passes import effects
from attngen.passes.detect import Site
from attngen.passes.graphs import NotHere, Writer, is_pure, sizes_of
from attngen.passes.lower import Lowered
from attngen.passes.specialise import Specialised, Table


@dataclass(frozen=True)
class Placed:
    """Where a site can be replaced: the captured node whose value it computes."""

    site: Site
    specialised: Specialised
    anchor: fx.Node


def place(site: Site, specialised: Specialised, lowered: Lowered, facts: effects.Effects) -> Placed | Miss:
    """Find the captured node to replace, and check that the inputs still hold then what they held before."""
    origins = lowered.origins.get(site.output, [])
    if not origins:
        return Miss("the attention is only part of a larger captured call", site.output.name, depth=8)
    inputs = [site.query.node, site.keys.node, site.values.node]
    for binding in specialised.bindings:
        inputs += _sources(binding) if isinstance(binding, Table) else [binding]
    for node in inputs:
        disturbed = effects.written_between([node], node, site.output, facts)
        if disturbed is not None:
            return disturbed
    return Placed(site, specialised, origins[0])


def _sources(table: Table) -> list[fx.Node]:
    return [node.source for node in table.expr.walk() if hasattr(node, "source")]  # type: ignore[misc]


def run(placed: Placed, lowered: Lowered, target: Any) -> Miss | None:
    """Replace the site by a call of ``target``, an operator over the inputs of the spec. None if that worked."""
    writer = Writer(lowered, placed.anchor)
    try:
        call = writer.call(target, tuple(_arguments(placed, writer)))
        if placed.specialised.spec.lse:
            call = writer.call(operator.getitem, (call, 0))
    except NotHere as reason:
        writer.take_back()
        return Miss(str(reason), placed.site.output.name, depth=8)
    except BaseException:
        writer.take_back()
        raise
    call.meta = dict(placed.anchor.meta)
    placed.anchor.replace_all_uses_with(call, propagate_meta=False)
    _erase(placed.anchor, lowered)
    return None


def _arguments(placed: Placed, writer: Writer) -> list[fx.Node]:
    site = placed.site
    arguments = []
    for operand in (site.query, site.keys, site.values):
        node = writer.value(operand.node)
        arguments.append(writer.cast(node, operand.node.meta["val"], operand.dtype))
    sizes = sizes_of([site.query.node, site.keys.node, site.values.node])
    for binding in placed.specialised.bindings:
        arguments.append(writer.table(binding, sizes) if isinstance(binding, Table) else writer.value(binding))
    return arguments


def _erase(node: fx.Node, lowered: Lowered) -> None:
    """Erase ``node`` and all that only it needed, as far as that has no effect but its value."""
    stack = [node]
    while stack:
        node = stack.pop()
        if node.users or node.op in ("placeholder", "output") or node not in lowered.emitted:
            continue
        if node.op != "get_attr" and not (_has_value(node) and all(map(is_pure, lowered.emitted[node]))):
            continue
        below = node.all_input_nodes
        node.graph.erase_node(node)
        stack.extend(below)


def _has_value(node: fx.Node) -> bool:
    """Computes a tensor, and is not there for what it does besides (entering autocast, checking something)."""
    return node.meta.get("example_value", node.meta.get("val")) is not None or "tensor_meta" in node.meta
