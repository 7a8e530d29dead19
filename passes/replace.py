"""Put the operator of a site into the captured graph, in place of the value it computes.

Only the site's own output is redirected; what nobody needs any more is erased, everything else stays as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx

from attngen.algebra import Load
from attngen.errors import Miss
from attngen.passes import effects
from attngen.passes.detect import Site
from attngen.passes.dropout import Seed
from attngen.passes.graphs import NotHere, Writer, is_pure, opened, sizes_of
from attngen.passes.lower import Lowered
from attngen.passes.memory import storage
from attngen.passes.semantics import dtype_of
from attngen.passes.specialise import Number, Specialised, Table
from attngen.passes.strides import memory_order
from attngen.spec import AttentionSpec

# Export checks types of values in the graph. They are what they were traced as, and need no check if nobody reads them.
_CHECK = torch.ops.aten._assert_tensor_metadata.default


@dataclass(frozen=True)
class Placed:
    """A site that can be replaced. ``anchor`` is the captured node that computes it, alone or among other things.

    ``copied``: the backward keeps the result, which somebody may write to; what is passed on is a copy of it. ``detached``:
    no gradients go through it. ``kept``: what is loaded, but is written to by then; each with that write.
    """

    site: Site
    specialised: Specialised
    anchor: fx.Node
    copied: bool
    detached: bool = False
    kept: tuple[tuple[fx.Node, fx.Node], ...] = ()


def place(
    site: Site, specialised: Specialised, lowered: Lowered, facts: effects.Effects, *, training: bool
) -> Placed | Miss:
    """Find the captured node to replace, and check that the inputs still hold then what they held before."""
    anchor = next(iter(lowered.origins.get(site.output, [])), None) or lowered.parent(site.output)
    if anchor is None:
        return Miss("no captured node computes the attention", site.output.name, depth=8)
    inputs = [site.query.node, site.keys.node, site.values.node]
    for binding in specialised.bindings:
        inputs += [binding] if isinstance(binding, fx.Node) else _sources(binding)
    loaded = [binding for binding in specialised.bindings if isinstance(binding, fx.Node)]
    kept = {node: write for node in loaded if (write := _write(node, site, facts, training=training)) is not None}
    for node in inputs:
        for since in site.reader.readers.get(node, [node]) if node not in kept else ():
            if (disturbed := effects.written_between([node], since, site.output, facts)) is not None:
                return disturbed
    read_later = [node for node in inputs if node not in kept]
    if training and (rewritten := effects.written_after(read_later, site.output, facts)) is not None:
        return rewritten
    differentiable = _differentiable(inputs, lowered) if training else []
    detached = bool(differentiable) and effects.passes_nothing_on(differentiable, site, facts)
    if not detached and (cut := effects.cut_between(differentiable, site, facts)) is not None:
        return cut
    fate = effects.fate(site.output)
    if fate.writer is not None and fate.by_layout and not site.output.meta["val"].is_contiguous():
        return Miss("the result is written in place, and shares memory in its own layout only", fate.writer.name, depth=8)
    copied = training and (fate.returned or fate.writer is not None)
    return Placed(site, specialised, anchor, copied, detached, tuple(kept.items()))


def _write(node: fx.Node, site: Site, facts: effects.Effects, *, training: bool) -> fx.Node | None:
    """The first write to what scores and masks load, after it is read; only up to the result, if no backward needs it.

    A copy is made before: it is small, as the length of a cache is, which counts up once the mask is made. Memory that is
    written in pieces is left as it is.
    """
    if node in site.reader.readers:
        return None
    last = len(facts.order) if training else facts.order[site.output]
    return next((w for w in facts.writes.get(storage(node), ()) if facts.order[node] < facts.order[w] <= last), None)


def _differentiable(nodes: list[fx.Node], lowered: Lowered) -> list[fx.Node]:
    """Those of the lowered ``nodes`` that may depend on something that gradients are asked for."""
    return [node for node in nodes if any(_asked_for(below, lowered) for below in effects.ancestors(node))]


def _asked_for(node: fx.Node, lowered: Lowered) -> bool:
    if node.op != "placeholder":
        return False
    captured = next(iter(lowered.origins.get(node, [])), None)
    value = captured.meta.get("example_value") if captured is not None else None
    return bool(getattr(value, "requires_grad", True))


def _sources(made: Table | Seed | Number) -> list[fx.Node]:
    """What the graph makes it of."""
    if not isinstance(made, Table):
        return []
    return [node.source for node in made.expr.walk() if hasattr(node, "source")]  # type: ignore[misc]


def run(terms: Sequence[Placed], lowered: Lowered, targets: Sequence[Any]) -> Miss | None:
    """Replace the output of the sites ``terms`` by the sum of calls of ``targets``, operators over the inputs of each spec.

    None if that worked.
    """
    site = terms[0].site
    try:
        if not lowered.origins.get(site.output):
            opened(terms[0].anchor, lowered)
    except NotHere as reason:
        return Miss(str(reason), site.output.name, depth=8)
    anchor = lowered.origins[site.output][0]
    writer = Writer(lowered, anchor)
    try:
        calls = [_call(placed, target, writer) for placed, target in zip(terms, targets, strict=True)]
        call = reduce(lambda one, other: writer.call(torch.ops.aten.add.Tensor, (one, other)), calls)
        if site.dtype != dtype_of(site.output):
            call = writer.call(torch.ops.aten.to.dtype, (call, dtype_of(site.output)))
        if terms[0].copied and len(terms) == 1:  # a sum is kept by nobody
            call = writer.call(torch.ops.attngen.copied.default, (call,))
        if site.row not in site.axes:
            call = writer.call(torch.ops.aten.squeeze.dim, (call, 0))
        order = memory_order(site.output)
        if order != tuple(range(len(order))):
            call = writer.call(torch.ops.aten.permute.default, (call, [order.index(d) for d in range(len(order))]))
    except NotHere as reason:
        writer.take_back()
        return Miss(str(reason), site.output.name, depth=8)
    except BaseException:
        writer.take_back()
        raise
    call.meta = dict(anchor.meta)
    anchor.replace_all_uses_with(call, propagate_meta=False)
    lowered.origins[site.output].insert(0, call)  # where a later site finds it
    bindings = [binding for placed in terms for binding in placed.specialised.bindings]
    _erase(anchor, lowered, {binding.whole for binding in bindings if isinstance(binding, Seed)})
    return None


def _call(placed: Placed, target: Any, writer: Writer) -> fx.Node:
    call = writer.call(target, tuple(_arguments(placed, writer)))
    call = writer.call(operator.getitem, (call, 0)) if placed.specialised.spec.lse else call
    return writer.call(torch.ops.aten.detach.default, (call,)) if placed.detached else call


def _arguments(placed: Placed, writer: Writer) -> list[fx.Node]:
    site = placed.site
    arguments = []
    for operand in (site.query, site.keys, site.values):
        node = writer.value(operand.node)
        arguments.append(writer.cast(node, operand.node.meta["val"], operand.dtype))
    sizes = sizes_of([site.query.node, site.keys.node, site.values.node])
    spec = placed.specialised.spec
    kept = dict(placed.kept)
    for source, binding in zip(spec.extras, placed.specialised.bindings, strict=True):
        if isinstance(binding, Table):
            arguments.append(writer.table(binding, sizes, like=site.query.node))
        elif isinstance(binding, Seed):
            arguments.append(writer.seed(binding, like=site.query.node))
        elif isinstance(binding, Number):
            arguments.append(writer.number(binding, like=site.query.node))
        else:
            value = writer.kept(binding, kept[binding]) if binding in kept else writer.value(binding)
            passed_on = spec.total is not None and spec.total.name == source.name  # its gradient, to what it is the sum of
            cut = spec.lse and source.dtype.is_floating_point and (passed_on or _is_only_compared(spec, source.name))
            arguments.append(writer.call(torch.ops.aten.detach.default, (value,)) if cut else value)
    return arguments


def _is_only_compared(spec: AttentionSpec, name: str) -> bool:
    """Nothing is computed from it but conditions: it has no gradient, not even zeros."""
    stack = [spec.score, spec.gain, *spec.sinks, *([spec.whole] if spec.whole is not None else [])]
    while stack:
        expr = stack.pop()
        if isinstance(expr, Load) and expr.source == name:
            return False
        stack += [child for child in expr.children if child.kind != "bool"]
    return True


def _erase(node: fx.Node, lowered: Lowered, redrawn: set[fx.Node]) -> None:
    """Erase ``node`` and all that only it needed, as far as that has no effect but its value.

    ``redrawn`` are lowered nodes whose random numbers somebody else draws now.
    """
    held = {captured for origins in lowered.origins.values() for captured in origins}
    stack, erased = [node], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in erased or node.op in ("placeholder", "output") or node not in lowered.emitted:
            continue
        if any(user.target is not _CHECK for user in node.users):
            continue
        idle = all(is_pure(each) or each in redrawn for each in lowered.emitted[node])
        if node.op != "get_attr" and not (_has_value(node, held) and idle):
            continue
        below = node.all_input_nodes
        for check in list(node.users):
            node.graph.erase_node(check)
        node.graph.erase_node(node)
        erased.add(node)
        stack.extend(below)


def _has_value(node: fx.Node, held: set[fx.Node]) -> bool:
    """Computes a tensor, and is not there for what it does besides (entering autocast, checking something)."""
    return node in held or node.meta.get("example_value", node.meta.get("val")) is not None or "tensor_meta" in node.meta
