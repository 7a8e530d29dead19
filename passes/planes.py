"""Two dimensions along which windows are taken, as one as well: what ``passes.bands`` reads windows of an image from.

    x.unfold(2, 3, 1).unfold(3, 3, 1)  -->  y = x.flatten(2, 3).unflatten(2, ...); y.unfold(2, 3, 1).unfold(3, 3, 1)

Only the graph that is analysed changes; where such an attention is replaced, the flat tensor is made.
"""

from __future__ import annotations

import torch
from torch import fx

from attngen.passes import effects
from attngen.passes.arrange import Scribe
from attngen.passes.memory import storage
from attngen.passes.semantics import bind, is_tensor, op_name, shape_of


def run(graph: fx.Graph) -> None:
    pairs = [(node, below) for node in graph.nodes if (below := _windows_of_windows(node)) is not None]
    if not pairs:
        return
    facts = effects.run(graph)
    fixed = frozenset(n for n in graph.nodes if is_tensor(n) and storage(n) not in facts.writes)
    for node, first in pairs:
        source, dims = bind(first)["self"], sorted(map(_along, (node, first)))
        sizes = [shape_of(source)[dim] for dim in dims]
        if source in fixed and dims[1] == dims[0] + 1 < len(shape_of(source)) and all(size.is_Integer for size in sizes):
            scribe = Scribe(first, facts.order, fixed)
            flat = scribe.call(torch.ops.aten.flatten.using_ints, source, *dims)
            first.replace_input_with(source, scribe.call(torch.ops.aten.unflatten.int, flat, dims[0], list(map(int, sizes))))


def _windows_of_windows(node: fx.Node) -> fx.Node | None:
    """The first ``unfold`` of two."""
    below = bind(node)["self"] if op_name(node) == "unfold" else None
    return below if below is not None and op_name(below) == "unfold" and len(below.users) == 1 else None


def _along(node: fx.Node) -> int:
    """The dimension that an ``unfold`` takes windows along, counted from the first."""
    args = bind(node)
    return int(args["dimension"]) % len(shape_of(args["self"]))
