"""What an observed tensor is known to come from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

Chain = tuple[str, ...]
Marked = dict[int, Chain]
LONGEST = 14


@dataclass(frozen=True)
class Marks:
    """Where a tensor came from.

    ``scores``: contractions, with the operators since. ``exps``: exponentials of them; ``totals``: those that were summed
    up. ``logsums``: contractions under a logsumexp. ``logs``: log-softmaxes. ``weights``: normalised.
    ``late``: exponentials that were multiplied with values before they were divided by their total.
    ``product``: the two factors that were multiplied, if nothing but views and casts happened since.
    ``learned``: made of parameters alone.
    """

    scores: Marked = field(default_factory=dict)
    exps: Marked = field(default_factory=dict)
    totals: frozenset[int] = frozenset()
    logsums: frozenset[int] = frozenset()
    logs: Marked = field(default_factory=dict)
    weights: Marked = field(default_factory=dict)
    late: Marked = field(default_factory=dict)
    product: tuple[Factor, Factor] | None = None
    learned: bool = False


@dataclass(frozen=True)
class Factor:
    marks: Marks
    shape: tuple[int, ...]
    rank: int


NOTHING = Marks()


def longer(marked: Marked, name: str) -> Marked:
    return {number: (*chain, name)[-LONGEST:] for number, chain in marked.items()}


def joined(parts: list[Marked], name: str) -> Marked:
    joined: Marked = {}
    for part in parts:
        for number, chain in part.items():
            if number not in joined or len(chain) < len(joined[number]):
                joined[number] = chain
    return longer(joined, name)


def union(first: Marks, second: Marks) -> Marks:
    return replace(
        first,
        scores=second.scores | first.scores,
        exps=second.exps | first.exps,
        totals=first.totals | second.totals,
        logsums=first.logsums | second.logsums,
        logs=second.logs | first.logs,
        weights=second.weights | first.weights,
        late=second.late | first.late,
    )


def factor_of(tensor: Tensor, marks: Marks, output: Tensor) -> Factor:
    return Factor(marks, tuple(tensor.shape), output.dim())


def extent(factor: Factor, dim: int, product: Tensor) -> int:
    """Of a factor along a dimension of the product; -1 where views since then hide it."""
    if factor.rank != product.dim():
        return -1
    place = dim - (factor.rank - len(factor.shape))
    return factor.shape[place] if place >= 0 else 1


def covers(tensor: Tensor, output: Tensor, moved: bool) -> bool:
    """The tensor is not stretched: weights that are become gates, not attention."""
    return moved or tensor.numel() >= output.numel()
