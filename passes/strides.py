"""In which order a result lies in memory: where its readers rely on strides it must stay as the model had it.

``view`` works on some strides and fails on others, and a caller sees the strides of what is returned. All other readers
take any layout, and dense in the order of the dimensions suits them best: a reshape that follows is then free.
"""

from __future__ import annotations

import operator

from torch import fx

from attngen import compat
from attngen.passes.semantics import op_name
from attngen.passes.views import FREE, PARTS

_BY_STRIDES = frozenset(["view", "view_as", "_unsafe_view", "as_strided", "unflatten"])
_PASSED_ON = (FREE | PARTS.keys() | {"expand", "expand_as", "broadcast_to"}) - _BY_STRIDES


def memory_order(result: fx.Node) -> tuple[int, ...]:
    """The dimensions of ``result`` from the outermost in memory to the innermost."""
    value = result.meta["val"]
    sizes, strides = ([compat.hint(n) for n in numbers] for numbers in (value.shape, value.stride()))
    in_order = tuple(range(len(sizes)))
    order = tuple(sorted(in_order, key=lambda d: (-strides[d], d)))
    return order if _is_dense(order, sizes, strides) and _strides_matter(result) else in_order


def _is_dense(order: tuple[int, ...], sizes: list[int], strides: list[int]) -> bool:
    expected = 1
    for d in reversed(order):
        if sizes[d] != 1 and strides[d] != expected:
            return False
        expected *= sizes[d]
    return True


def _strides_matter(result: fx.Node) -> bool:
    """Some reader of the result, or of what only rearranges its strides, works by them."""
    found, stack = {result}, [result]
    while stack:
        for user in stack.pop().users:
            name = op_name(user)
            if user.op == "output" or name in _BY_STRIDES:
                return True
            if user not in found and (name in _PASSED_ON or user.target is operator.getitem):
                found.add(user)
                stack.append(user)
    return False
