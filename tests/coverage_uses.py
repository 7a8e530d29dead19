"""What observed tensors are made of: which sites have a part in a result, and which are computed for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Uses:
    """For each tensor the sites that it is made of, by number; what a program decides by counts as used."""

    def __init__(self) -> None:
        self._of: Any = WeakTensorKeyDictionary()
        self._memory: dict[int, frozenset[int]] = {}
        self._alive: list[Tensor] = []
        self._decided: frozenset[int] = frozenset()

    def add(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], finished: Iterable[int]) -> None:
        """One operator: what it reads, what it gives, and the sites that it finishes."""
        made = self._united(inputs) | frozenset(finished)
        if not outputs:
            self._decided |= made
        if not made:
            return
        for output in outputs:
            self._of[output] = made
            if any(output is tensor for tensor in inputs):  # written in place: other names of this memory show it too
                key = output.untyped_storage()._cdata
                self._memory[key] = self._memory.get(key, frozenset()) | made
                self._alive.append(output)

    def of(self, results: Sequence[Tensor]) -> frozenset[int]:
        """The sites that have a part in any of the results, or in a decision."""
        return self._decided | self._united(results)

    def _united(self, tensors: Sequence[Tensor]) -> frozenset[int]:
        parts = [self._of.get(tensor, frozenset()) for tensor in tensors]
        if self._memory:
            parts += [self._memory.get(tensor.untyped_storage()._cdata, frozenset()) for tensor in tensors]
        return frozenset[int]().union(*parts)
