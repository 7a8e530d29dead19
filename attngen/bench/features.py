"""What is done to scores between the products: each as a user writes it, and as FlexAttention's functions.

A user writes whole tensors, FlexAttention one pair of positions; positions of both are those of the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attngen.bench.problems import Problem

Tensors = dict[str, Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
FARTHEST = 128  # distance from which a bucket of relative positions holds all


@dataclass(frozen=True)
class Place:
    """The pairs at hand: positions of queries ``[n, 1]`` and of keys ``[m]``, which rows these are, and loaded tensors."""

    i: Tensor
    j: Tensor
    rows: slice
    tensors: Tensors


@dataclass(frozen=True)
class Feature:
    """Neither scores nor mask: what each kind of feature starts from."""

    def tensors(self, problem: Problem, generator: torch.Generator) -> Tensors:
        """What it loads, drawn at random on the device of ``generator``."""
        return {}

    def score(self, scores: Tensor, at: Place) -> Tensor:
        return scores

    def keep(self, at: Place) -> Tensor | None:
        """Which pairs count; None for all."""
        return None

    def tables(self, problem: Problem, tensors: Tensors) -> Tensors:
        """What ``score_mod`` loads beside: looked up once, outside of FlexAttention."""
        return {}

    def score_mod(self, problem: Problem, tensors: Tensors) -> ScoreMod | None:
        """FlexAttention's spelling of ``score``; queries of its function begin at zero."""
        return None

    def mask_mod(self, problem: Problem, tensors: Tensors) -> MaskMod | None:
        """FlexAttention's spelling of ``keep``."""
        return None


def drawn(shape: tuple[int, ...], problem: Problem, generator: torch.Generator) -> Tensor:
    """Normal numbers in the dtype of ``problem``."""
    dtype: torch.dtype = getattr(torch, problem.dtype)
    return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)


# ---------------------------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True)
class Causal(Feature):
    """No key after its query."""

    def keep(self, at: Place) -> Tensor:
        return at.j <= at.i

    def mask_mod(self, problem: Problem, tensors: Tensors) -> MaskMod:
        offset = problem.offset
        return lambda b, h, i, j: j <= i + offset


@dataclass(frozen=True)
class Window(Feature):
    """Keys less than ``size`` positions away."""

    size: int

    def keep(self, at: Place) -> Tensor:
        return (at.i - at.j < self.size) & (at.j - at.i < self.size)

    def mask_mod(self, problem: Problem, tensors: Tensors) -> MaskMod:
        offset, size = problem.offset, self.size
        return lambda b, h, i, j: (i + offset - j < size) & (j - i - offset < size)


@dataclass(frozen=True)
class Prefix(Feature):
    """The first ``size`` keys for all, and no later key after its query."""

    size: int

    def keep(self, at: Place) -> Tensor:
        return (at.j < self.size) | (at.j <= at.i)

    def mask_mod(self, problem: Problem, tensors: Tensors) -> MaskMod:
        offset, size = problem.offset, self.size
        return lambda b, h, i, j: (j < size) | (j <= i + offset)


@dataclass(frozen=True)
class Documents(Feature):
    """Several documents in a sequence, cut at random places; ``documents[b, i]`` is the number of the one at ``i``."""

    count: int

    def tensors(self, problem: Problem, generator: torch.Generator) -> Tensors:
        where = generator.device
        starts = torch.zeros(problem.batch, problem.length, dtype=torch.int32, device=where)
        for row in starts:
            row[1 + torch.randperm(problem.length - 1, generator=generator, device=where)[: self.count - 1]] = 1
        return {"documents": starts.cumsum(1, dtype=torch.int32)}

    def keep(self, at: Place) -> Tensor:
        documents = at.tensors["documents"]
        return documents[:, None, at.rows, None] == documents[:, None, None, :]

    def mask_mod(self, problem: Problem, tensors: Tensors) -> MaskMod:
        documents = tensors["documents"]
        return lambda b, h, i, j: documents[b, i] == documents[b, j]


# --------------------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Softcap(Feature):
    """Scores bounded smoothly by ``cap``."""

    cap: float

    def score(self, scores: Tensor, at: Place) -> Tensor:
        return self.cap * torch.tanh(scores / self.cap)

    def score_mod(self, problem: Problem, tensors: Tensors) -> ScoreMod:
        cap = self.cap
        return lambda score, b, h, i, j: cap * torch.tanh(score / cap)


@dataclass(frozen=True)
class Alibi(Feature):
    """A slope for each head, times the distance, in float32."""

    def tensors(self, problem: Problem, generator: torch.Generator) -> Tensors:
        heads = torch.arange(1, problem.heads + 1, device=generator.device)
        return {"slopes": torch.exp2(-8.0 * heads / problem.heads)}

    def score(self, scores: Tensor, at: Place) -> Tensor:
        return scores + at.tensors["slopes"][:, None, None] * (at.j - at.i)

    def score_mod(self, problem: Problem, tensors: Tensors) -> ScoreMod:
        slopes, offset = tensors["slopes"], problem.offset
        return lambda score, b, h, i, j: score + slopes[h] * (j - i - offset)


@dataclass(frozen=True)
class Bias(Feature):
    """A bias tensor for all pairs of each head."""

    def tensors(self, problem: Problem, generator: torch.Generator) -> Tensors:
        shape = (1, problem.heads, problem.length, problem.keys)
        return {"bias": drawn(shape, problem, generator)}

    def score(self, scores: Tensor, at: Place) -> Tensor:
        return scores + at.tensors["bias"][:, :, at.rows]

    def score_mod(self, problem: Problem, tensors: Tensors) -> ScoreMod:
        bias = tensors["bias"]
        return lambda score, b, h, i, j: score + bias[0, h, i, j]


@dataclass(frozen=True)
class Buckets(Feature):
    """A learnt bias for each head and bucket of distance, with wider buckets farther away (T5)."""

    count: int

    def tensors(self, problem: Problem, generator: torch.Generator) -> Tensors:
        return {"buckets": drawn((self.count, problem.heads), problem, generator)}

    def score(self, scores: Tensor, at: Place) -> Tensor:
        values = at.tensors["buckets"][self._bucket(at.j - at.i)]
        return scores + values.permute(2, 0, 1)

    def tables(self, problem: Problem, tensors: Tensors) -> Tensors:
        table, reach = tensors["buckets"], problem.keys - 1
        distances = torch.arange(-reach, reach + 1, device=table.device)
        return {"by_distance": table[self._bucket(distances)].T.contiguous()}

    def score_mod(self, problem: Problem, tensors: Tensors) -> ScoreMod:
        by_distance, offset, reach = tensors["by_distance"], problem.offset, problem.keys - 1
        return lambda score, b, h, i, j: score + by_distance[h, j - i - offset + reach]

    def _bucket(self, distance: Tensor) -> Tensor:
        """Half a position keeps every distance off the borders of buckets, where the rounding of a logarithm decides."""
        half = self.count // 2
        near = half // 2
        size = distance.abs()
        far = near + (torch.log((size + 0.5) / near) / math.log(FARTHEST / near) * (half - near)).long()
        bucket = torch.where(size < near, size, far.clamp(max=half - 1))
        return torch.where(distance > 0, bucket + half, bucket)


def features_of(problem: Problem) -> tuple[Feature, ...]:
    """What is done to the scores of ``problem``, in order; masks last."""
    made = (
        Softcap(problem.softcap) if problem.softcap else None,
        Alibi() if problem.alibi else None,
        Bias() if problem.bias else None,
        Buckets(problem.buckets) if problem.buckets else None,
        Causal() if problem.causal else None,
        Window(problem.window) if problem.window else None,
        Prefix(problem.prefix) if problem.prefix else None,
        Documents(problem.documents) if problem.documents else None,
    )
    return tuple(feature for feature in made if feature is not None)


def masks_of(problem: Problem) -> tuple[Causal | Window | Prefix | Documents, ...]:
    """Those features that leave pairs out."""
    return tuple(f for f in features_of(problem) if isinstance(f, (Causal, Window, Prefix, Documents)))
