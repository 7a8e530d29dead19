"""Which memory the value of a lowered node is in: nodes with the same number share it.

Nodes that were copied, see ``passes.repeats``, have the very tensor of the node they were copied from as ``meta["val"]``,
which says what theirs is like; the memory that theirs is in is told apart here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attngen import compat

MEMORY = "attngen_memory"  # the key of ``node.meta``


@dataclass(eq=False)
class Memory:
    """Memory that copied nodes are said to be in. ``tensor`` is in it, once a tensor had to be made."""

    size: int  # in bytes
    tensor: torch.Tensor | None = None

    @property
    def number(self) -> int:
        """Of no other memory: an address, as long as both are there."""
        return id(self) if self.tensor is None else compat.storage_of(self.tensor)


def storage(node: fx.Node) -> int:
    """The number of the memory that the value of ``node``, a tensor, is in."""
    memory = node.meta.get(MEMORY)
    return compat.storage_of(node.meta["val"]) if memory is None else memory.number


def values(nodes: Sequence[fx.Node]) -> list[Any]:
    """The values of distinct ``nodes`` to trace with, where each has to be a tensor of its own."""
    found: list[Any] = []
    for value in (node.meta["val"] for node in nodes):
        again = isinstance(value, torch.Tensor) and any(value is other for other in found)
        found.append(value.detach() if again else value)
    return found
