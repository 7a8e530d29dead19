"""A problem as a user writes it in PyTorch, its inputs, and what it costs: the pairs that count, operations and bytes.

The same function is what eager and compilers are given and, in float64 and a few rows at a time, the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attngen.bench.features import Place, Tensors, drawn, features_of, masks_of
from attngen.bench.problems import Problem
from attngen.bench.terms import BOTH, FORWARD, GRADIENT

PAIRS_AT_ONCE = {"cuda": 1 << 28, "cpu": 1 << 22}  # of the reference
Spelling = Callable[..., Tensor]


@dataclass(frozen=True)
class Inputs:
    """What one call is given, laid out as the problem says, and what its features load."""

    query: Tensor
    keys: Tensor
    values: Tensor
    tensors: Tensors

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.keys, self.values

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gradients are asked for of."""
        named = {"queries": self.query, "keys": self.keys, "values": self.values, **self.tensors}
        return {name: x for name, x in named.items() if x.requires_grad}

    @property
    def trains(self) -> bool:
        """What scores load is among ``leaves``."""
        return any(x.requires_grad for x in self.tensors.values())

    def wanting(self, *, trained: bool, rows_first: bool = False) -> Inputs:
        """The same numbers as leaves that gradients are asked for of: the operands and, if ``trained``, what scores load.

        ``rows_first``: in memory, the rows of all heads come before the features of one, so that nobody has to copy them.
        """

        def leaf(x: Tensor) -> Tensor:
            return x.detach().requires_grad_(x.is_floating_point())

        def stored(x: Tensor) -> Tensor:
            return x.transpose(1, 2).contiguous().transpose(1, 2) if rows_first else x

        tensors = {name: leaf(x) for name, x in self.tensors.items()} if trained else self.tensors
        query, keys, values = (leaf(stored(x)) for x in self.operands)
        return Inputs(query, keys, values, tensors)

    def double(self) -> Inputs:
        """The same numbers in float64."""
        tensors = {name: x.double() if x.is_floating_point() else x for name, x in self.tensors.items()}
        return Inputs(self.query.double(), self.keys.double(), self.values.double(), tensors)


def inputs_of(problem: Problem, device: str, seed: int = 0) -> Inputs:
    """Normal numbers; the same on every call."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = (
        (problem.heads, problem.length, problem.head_size),
        (problem.sources, problem.keys, problem.head_size),
        (problem.sources, problem.keys, problem.width),
    )
    order = (1, 0, 2) if problem.views else (0, 1, 2)
    query, keys, values = (drawn((problem.batch, *(size[d] for d in order)), problem, generator) for size in sizes)
    tensors: Tensors = {}
    if problem.sinks:
        tensors["sinks"] = drawn((problem.heads,), problem, generator)
    for feature in features_of(problem):
        tensors.update(feature.tensors(problem, generator))
    return Inputs(query, keys, values, tensors)


def gradient_of_result(problem: Problem, inputs: Inputs, seed: int = 1) -> Tensor:
    """Normal numbers in the shape of the result; the same on every call."""
    generator = torch.Generator(inputs.query.device).manual_seed(seed)
    return drawn((*inputs.query.shape[:-1], problem.width), problem, generator)


def spelled(problem: Problem) -> Spelling:
    """``attend(query, keys, values, tensors)``: the attention of ``problem`` in plain PyTorch.

    ``first`` is the row of the first query, where only some are given.
    """
    features = features_of(problem)
    groups, offset, views = problem.heads // problem.sources, problem.offset, problem.views
    dropout = problem.dropout
    scale = problem.head_size**-0.5
    weigh = _sigmoid if problem.sigmoid else _softmax

    def attend(query: Tensor, keys: Tensor, values: Tensor, tensors: Tensors, first: int = 0) -> Tensor:
        if views:
            query, keys, values = query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        rows, count = query.shape[2], keys.shape[2]
        i = torch.arange(first, first + rows, device=query.device)[:, None] + offset
        at = Place(i, torch.arange(count, device=query.device), slice(first, first + rows), tensors)
        scores = query @ keys.transpose(-1, -2) * scale
        for feature in features:
            scores = feature.score(scores, at)
        kept = None
        for feature in features:
            keep = feature.keep(at)
            if keep is not None:
                kept = keep if kept is None else kept & keep
        weights = weigh(scores, kept, tensors).to(values.dtype)
        if dropout is not None:
            weights = torch.nn.functional.dropout(weights, dropout)
        out = weights @ values
        return out.transpose(1, 2) if views else out

    return attend


def _softmax(scores: Tensor, kept: Tensor | None, tensors: Tensors) -> Tensor:
    """Weights of a softmax; with sinks, each row has one more score whose weight is dropped."""
    keys = scores.shape[-1]
    if kept is not None:
        scores = scores.masked_fill(~kept, -math.inf)
    if "sinks" in tensors:
        sinks = tensors["sinks"].to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., :keys]


def _sigmoid(scores: Tensor, kept: Tensor | None, tensors: Tensors) -> Tensor:
    """Weights that no sum normalises; the bias makes a row's weights add up to about one."""
    weights = torch.sigmoid(scores - math.log(scores.shape[-1]))
    return weights if kept is None else weights.masked_fill(~kept, 0.0)


# ------------------------------------------------------------------------------------------------------------ reference


def references(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The result in float64, and as eager gives it in the dtype of the inputs. With dropout the first is the mean of all
    draws, the second one of them."""
    return result_of_eager(replace(problem, dropout=None), inputs.double()), result_of_eager(problem, inputs)


def result_of_eager(problem: Problem, inputs: Inputs) -> Tensor:
    """What the plain spelling gives in the dtype of the inputs, computed a few rows at a time."""
    attend = spelled(problem)
    parts = [_rows(attend, inputs, *each, problem) for each in chunks(problem, inputs.query.device.type)]
    return torch.cat(parts, 1 if problem.views else 2)


def _rows(attend: Spelling, inputs: Inputs, first: int, last: int, problem: Problem) -> Tensor:
    query = rows(inputs.query, first, last, problem)
    return attend(query, inputs.keys, inputs.values, inputs.tensors, first=first)


def rows(x: Tensor, first: int, last: int, problem: Problem) -> Tensor:
    """Some rows of the queries, or of the result."""
    return x[:, first:last] if problem.views else x[:, :, first:last]


def chunks(problem: Problem, device: str) -> Iterator[tuple[int, int]]:
    """First and last of the rows that are computed at a time."""
    step = max(1, PAIRS_AT_ONCE[device] // (problem.batch * problem.heads * problem.keys))
    for first in range(0, problem.length, step):
        yield first, min(first + step, problem.length)


# ----------------------------------------------------------------------------------------------------------------- cost


def area(problem: Problem, inputs: Inputs) -> int:
    """Pairs of query and key that count, over all batches and heads: counted, not estimated."""
    device = inputs.query.device
    masks = masks_of(problem)
    heads = problem.batch * problem.heads
    if not masks:
        return heads * problem.length * problem.keys
    j, total = torch.arange(problem.keys, device=device), 0
    for first, last in chunks(problem, device.type):
        i = torch.arange(first, last, device=device)[:, None] + problem.offset
        at = Place(i, j, slice(first, last), inputs.tensors)
        kept = torch.ones(last - first, problem.keys, dtype=torch.bool, device=device)
        for mask in masks:
            kept = kept & mask.keep(at)
        total += int(kept.sum()) * (heads * (last - first) * problem.keys // kept.numel())
    return total


def flop(problem: Problem, pairs: int, phase: str = FORWARD) -> int:
    """Of the products, over the pairs that count: two forward, and five for the gradients, that of the scores among them."""
    size, width = problem.head_size, problem.width
    features = {FORWARD: size + width, GRADIENT: 3 * size + 2 * width, BOTH: 4 * size + 3 * width}
    return 2 * pairs * features[phase]


def traffic(problem: Problem, inputs: Inputs, phase: str = FORWARD) -> int:
    """Bytes when every input, the result and, if they are asked for, the gradient of each are moved once."""
    moved = _bytes([*inputs.operands, *inputs.tensors.values()])
    result = problem.batch * problem.heads * problem.length * problem.width * inputs.query.element_size()
    if phase == FORWARD:
        return moved + result
    return moved + _bytes(inputs.wanting(trained=problem.trained).leaves.values()) + 2 * result


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
