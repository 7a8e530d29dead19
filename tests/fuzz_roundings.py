"""Eager without some of its roundings: a kernel keeps in float32 what a graph of 16-bit types rounds on the way.

What each stretch of nodes rounds to 16 bits is left in float32, everything else is rounded as eager rounds it. Each of these
is as right as eager, and nothing but roundings tells them apart: fills, masks and what overflows elsewhere stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx


class Exact(fx.Interpreter):
    """A graph in float64: whatever is asked for in a floating type comes in that."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        kept = n.args and isinstance(n.args[0], fx.Node) and result is self.env.get(n.args[0])
        return result.clone() if kept and n.meta.get("new") else result  # a cast that copied there must copy here

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        return fx.node.map_aggregate(super().fetch_args_kwargs_from_env(n), _in_double)  # type: ignore[arg-type]

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_method("double" if target in ("float", "half", "bfloat16") else target, args, kwargs)


def _in_double(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


class Rounded(Exact):
    """A graph in float64 whose values are rounded to ``types``, in the memory they lie in, as soon as they are computed.

    Gradients pass roundings as they pass those of eager: unchanged.
    """

    def __init__(self, gm: fx.GraphModule, types: dict[fx.Node, torch.dtype]) -> None:
        super().__init__(gm)
        self._types = types

    def run_node(self, n: fx.Node) -> Any:
        given = [self.env[arg] for arg in n.all_input_nodes]
        result = super().run_node(n)
        written = n.args[0] if n.args and isinstance(n.args[0], fx.Node) else None
        value = self.env[written] if result is None and written else result  # ``x[i] = y`` gives None
        if n in self._types and (value is self.env.get(written) or not _shares(value, given)):
            value.data.copy_(value.data.to(self._types[n]))
        return result


def _shares(value: Tensor, given: Sequence[Any]) -> bool:
    memory = value.untyped_storage().data_ptr()
    return any(isinstance(x, Tensor) and x.untyped_storage().data_ptr() == memory for x in given)


class _Types(fx.Interpreter):
    """Notes the floating type of what each node computes or writes."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.seen: dict[fx.Node, torch.dtype] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        value = self.env[n.args[0]] if result is None and n.args and isinstance(n.args[0], fx.Node) else result
        if n.op.startswith("call") and isinstance(value, Tensor) and value.is_floating_point():
            self.seen[n] = value.dtype
        return result


def with_fewer(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> list[Rounded]:
    """``gm`` for inputs in float64, each time with another stretch of its roundings to 16 bits left out."""
    types = _Types(gm)
    with torch.no_grad():
        types.run(*(x.clone() for x in inputs))
    coarse = [node for node, dtype in types.seen.items() if dtype.itemsize == 2]
    stretches = [coarse[a:b] for a in range(len(coarse)) for b in range(a + 1, len(coarse) + 1)]
    return [Rounded(gm, {**types.seen, **dict.fromkeys(each, torch.float32)}) for each in stretches]
