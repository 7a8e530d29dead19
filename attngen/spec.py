"""The records that pass between stages. All frozen; a spec says what is computed, never how the model spelt it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import sympy as sp
import torch

from attngen.algebra import ONE, TRUE, Expr, Int, Load
from attngen.index import Axis
from attngen.text import canonical


def _size(axis: str) -> sp.Symbol:
    return sp.Symbol(f"size_{axis}", integer=True, positive=True)


def _axis(name: str) -> Axis:
    return Axis(name, _size(name))


# The axes every spec is written in: query row, key column, query/key feature, value feature, and up to six batch axes.
ROW, KEY, INNER, FEATURE = _axis("i"), _axis("j"), _axis("d"), _axis("e")
BATCH_NAMES = ("b", "h", "g", "u", "w", "x")
_BATCH = {name: _axis(name) for name in BATCH_NAMES}

SCORE = Load("qk", (Int(ROW), Int(KEY)))  # the product of query and key, as it stands in a score expression


def batch_axes(count: int) -> tuple[Axis, ...]:
    return tuple(_BATCH[name] for name in BATCH_NAMES[:count])


@dataclass(frozen=True)
class Input:
    """A tensor the kernel reads: its element at ``index`` (one expression per dimension) for given axes."""

    name: str
    index: tuple[sp.Expr, ...]
    dtype: torch.dtype

    def dim_of(self, axis: Axis) -> int | None:
        """The dimension that is exactly ``axis``, if any."""
        return next((d for d, place in enumerate(self.index) if place == axis), None)


@dataclass(frozen=True)
class Total:
    """The extra called ``name`` holds, for each row, the sum over the keys of ``weight``, an expression like the score."""

    name: str
    weight: Expr

    def read_by(self, score: Expr) -> Load:
        return next(node for node in score.walk() if isinstance(node, Load) and node.source == self.name)


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention site computes.

    ``output[...] = sum over j of softmax(score + mask)[i, j] * values[j, e]``, or, without ``softmax``, of the score itself
    where the mask is true; with

    ``score``   expression over ``SCORE``, positions and ``extras``, in natural units
    ``mask``    truth expression; False removes the pair
    ``whole``   the score with the model's own finite fill value in place of the mask, if a row whose best remaining
                score is below ``redo_below`` must still come out as the model computes it; else None
    ``gain``    multiplies each weight after the softmax
    ``sinks``   extra logits in the denominator
    ``empty``   a row without any pair gives "nan" or "zero"; with "never_nan" so does one whose scores are NaN
    ``total``   what another kernel has added up of these weights; its gradient is part of theirs
    ``fp8``     products are of 8-bit numbers, with scales for each "block" of rows, or of rotated ones ("rotate")
    """

    query: Input
    keys: Input
    values: Input
    extras: tuple[Input, ...]
    batch: tuple[Axis, ...]
    output: tuple[Axis, ...]
    head_dim: int
    value_dim: int
    out_dtype: torch.dtype
    score: Expr = SCORE
    mask: Expr = TRUE
    whole: Expr | None = None
    redo_below: float | None = None
    sinks: tuple[Expr, ...] = ()
    empty: str = "nan"
    softmax: bool = True
    gain: Expr = ONE
    total: Total | None = None
    lse: bool = False
    tf32: bool = False
    wide: bool = False
    fp8: str = ""

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (self.query, self.keys, self.values, *self.extras)

    @cached_property
    def text(self) -> str:
        """The whole spec in one canonical paragraph: equal text, equal kernel."""
        lines = [
            *(f"{x.name}[{', '.join(map(canonical, x.index))}]: {_dtype(x.dtype)}" for x in self.inputs),
            f"out[{', '.join(a.name for a in self.output)}]: {_dtype(self.out_dtype)}",
            f"d={self.head_dim} e={self.value_dim}",
            f"score {canonical(self.score)}",
            f"mask {canonical(self.mask)}",
        ]
        if self.whole is not None:
            lines.append(f"whole {canonical(self.whole)} below {self.redo_below!r}")
        if self.gain != ONE:
            lines.append(f"gain {canonical(self.gain)}")
        lines += [f"sink {canonical(sink)}" for sink in self.sinks]
        if self.total is not None:
            lines.append(f"total {self.total.name} of {canonical(self.total.weight)}")
        flags = [name for name in ("lse", "tf32", "wide") if getattr(self, name)]
        flags += [f"fp8={self.fp8}"] if self.fp8 else []
        ending = f"empty={self.empty}" if self.softmax else "no softmax"
        return "\n".join([*lines, " ".join([ending, *flags])])

    @cached_property
    def key(self) -> str:
        return digest(self.text)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Problem:
    """The sizes of one call: batch extents, query and key lengths. ``typical`` sizes where they are symbolic."""

    batch: tuple[int, ...]
    rows: int
    keys: int
    dynamic: bool = False

    @property
    def heads(self) -> int:
        count = 1
        for extent in self.batch:
            count *= extent
        return count


PORTABLE, HOPPER = "portable", "hopper"  # the families of templates


@dataclass(frozen=True)
class Tile:
    """Block sizes of one kernel: queries and keys per block, warps (of the products) and pipeline stages.

    ``family`` says from which template. ``persistent``: programs stay on their multiprocessor and draw one tile after
    another; else there is a program for each tile.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    family: str = PORTABLE
    persistent: bool = False

    def __str__(self) -> str:
        text = f"{self.rows}x{self.keys} w{self.warps} s{self.stages}"
        return text if self.family == PORTABLE else f"{text} {self.family}{' persistent' if self.persistent else ''}"
