"""One operator as a small graph of simpler ones, for operators that ``passes.semantics`` has no row for.

Composite operators bring their own definition; the rest use torch's registered decompositions. Attention itself is
written out below, once, with the exact meaning of each argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from attngen import compat
from attngen.passes import memory


@dataclass(frozen=True)
class Inlined:
    """A decomposition: its result node, and the outer node behind each of its placeholders."""

    result: fx.Node
    arguments: dict[fx.Node, fx.Node]


class Decomposer:
    """Decomposes nodes of one graph. Nodes that differ in their values alone are traced once.

    ``fixed`` counts the traces that asked a symbolic size for its number, as ``math.sqrt`` does: it is that number since.
    """

    def __init__(self) -> None:
        self._traced: dict[str, fx.Graph | None] = {}
        self.fixed = 0

    def __call__(self, node: fx.Node) -> Inlined | None:
        """``node`` as a graph of simpler operators, its own to keep, or None if torch knows none."""
        definition = _definition(node.target)
        if definition is None:
            return None
        outer = list(node.all_input_nodes)
        key = _signature(node, outer)
        if key not in self._traced:
            before = _symbols(outer)
            self._traced[key] = _trace(node, outer, definition)
            self.fixed += _symbols(outer) != before
        known = self._traced[key]
        if known is None:
            return None
        graph = fx.Graph()
        result = graph.graph_copy(known, {})
        if not isinstance(result, fx.Node) or result.target is node.target:
            return None
        return Inlined(result, dict(zip(graph.find_nodes(op="placeholder"), outer, strict=True)))


def _signature(node: fx.Node, outer: list[fx.Node]) -> str:
    """All that a trace of ``node`` depends on: operator, numbers, and the types and layouts of its inputs."""
    arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{outer.index(n)}")  # type: ignore[return-value]
    values = [n.meta["val"] for n in outer]
    layouts = [(v.shape, v.stride(), v.dtype, v.device) if isinstance(v, Tensor) else v for v in values]
    return f"{node.target} {arguments} {layouts}"


def _symbols(nodes: list[fx.Node]) -> set[sp.Basic]:
    """What the sizes of tensors are made of that are no numbers."""
    shapes = [n.meta["val"].shape for n in nodes if isinstance(n.meta["val"], Tensor)]
    return {symbol for shape in shapes for size in shape for symbol in compat.size_expr(size).free_symbols}


def _trace(node: fx.Node, outer: list[fx.Node], definition: Callable[..., Any]) -> fx.Graph | None:
    values = memory.values(outer)

    def body(*inputs: Any) -> Any:
        inner = dict(zip(outer, inputs, strict=True))
        args, kwargs = tree_map_only(fx.Node, inner.__getitem__, (list(node.args), dict(node.kwargs)))
        return definition(*args, **kwargs)

    whole = node.target in _WRITTEN_OUT  # before dispatch, composite operators would be recorded as themselves
    mode = next((v.fake_mode for v in values if isinstance(v, compat.FakeTensor)), None)
    if mode is None:
        return None
    try:
        with mode, compat.enable_python_dispatcher(), compat.tracing(None), torch.no_grad():
            trace = compat.make_fx(body, pre_dispatch=whole, tracing_mode="real", _allow_non_fake_inputs=True)
            graph = trace(*values).graph
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    return None if any(map(_writes_behind, graph.nodes)) else graph


def _writes_behind(node: fx.Node) -> bool:
    """``node`` writes to memory that other nodes have another name for: they are not what was written there."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return False
    schema = [a for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    targets = [target for target in map(given.get, (a.name for a in schema)) if isinstance(target, fx.Node)]
    return any(_is_view(each) for target in targets for each in (target, *target.users))


def _is_view(node: fx.Node) -> bool:
    returned = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return any(value.alias_info is not None and not value.alias_info.is_write for value in returned)


def _definition(target: Any) -> Callable[..., Any] | None:
    if target in _WRITTEN_OUT:
        return _WRITTEN_OUT[target]
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if target._can_decompose():
        return target.decompose
    from torch._decomp import decomposition_table

    return decomposition_table.get(target)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``: causal aligns top-left, an empty row gives zeros, heads may be grouped."""
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scores = torch.matmul(query, key.transpose(-2, -1)) * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
    if is_causal:
        rows = torch.arange(query.size(-2), device=query.device).unsqueeze(1)
        keep = torch.arange(key.size(-2), device=query.device) <= rows
        scores = scores.masked_fill(~keep, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.float()  # not rounded to the dtype of the query
    weights = torch.ops.aten._safe_softmax(scores, -1).to(value.dtype)
    return torch.matmul(torch.nn.functional.dropout(weights, dropout_p), value)


_WRITTEN_OUT: dict[Any, Callable[..., Any]] = {torch.ops.aten.scaled_dot_product_attention.default: attention}
