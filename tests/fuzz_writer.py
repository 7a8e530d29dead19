"""Choices that are recorded and replayed, and a writer of graphs that knows the shape of everything it wrote."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

Node = fx.Node


class Draw:
    """Choices, drawn and recorded; or replayed, and zero past the end of the record."""

    def __init__(self, seed: int | None = None, choices: Sequence[int] = ()) -> None:
        self._random = None if seed is None else random.Random(seed)
        self._left = list(choices)[::-1]
        self.made: list[int] = []

    def below(self, count: int) -> int:
        if self._random is not None:
            choice = self._random.randrange(count)
        else:
            choice = min(self._left.pop(), count - 1) if self._left else 0
        self.made.append(choice)
        return choice

    def one(self, options: Sequence[Any]) -> Any:
        return options[self.below(len(options))]

    def chance(self, percent: int) -> bool:
        return self.below(100) >= 100 - percent


class Writer:
    """Writes a graph node by node, and computes each value on the way, so that shapes are known.

    ``half`` are the 16-bit types to use. Nodes whose value is not their argument itself have ``meta["new"]``.
    """

    def __init__(self, draw: Draw, half: Sequence[torch.dtype]) -> None:
        self.draw = draw
        self.half = half
        self.graph = fx.Graph()
        self.inputs: dict[Node, Tensor] = {}
        self._values: dict[Node, Any] = {}
        self._generator = torch.Generator().manual_seed(draw.below(1000))

    def __call__(self, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        known_args, known = fx.node.map_arg((args, kwargs), self._values.__getitem__)  # type: ignore[misc]
        if isinstance(target, str):
            value = getattr(known_args[0], target)(*known_args[1:], **known)
            node = self.graph.call_method(target, args, kwargs)
        else:
            value = target(*known_args, **known)
            node = self.graph.call_function(target, args, kwargs)
        self._values[node] = value
        node.meta["new"] = value is not known_args[0] if known_args else True
        return node

    def part(self, node: Node, *index: Any) -> Node:
        return self(operator.getitem, node, index if len(index) > 1 else index[0])

    def shape(self, node: Node) -> tuple[int, ...]:
        return tuple(self._values[node].shape)

    def dtype(self, node: Node) -> torch.dtype:
        dtype: torch.dtype = self._values[node].dtype
        return dtype

    def given(self, value: Tensor) -> Node:
        """A new input of the graph, after the others and before everything else."""
        with self.graph.inserting_after(next(reversed(self.inputs), None)):
            node = self.graph.placeholder(f"x{len(self.inputs)}")
        self.inputs[node] = value
        self._values[node] = value.clone()
        return node

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Node:
        return self.given((torch.randn(shape, generator=self._generator) * scale).to(dtype))

    def whole(self, *shape: int, below: int) -> Node:
        return self.given(torch.randint(0, below, shape, generator=self._generator))

    def truth(self, *shape: int, share: float) -> Node:
        return self.given(torch.rand(shape, generator=self._generator) < share)
