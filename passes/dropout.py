"""Dropout of attention weights: a factor of each weight, made of its place and of a seed that the graph draws in each run.

A model's own random numbers exist only as a tensor of all pairs. In their place the graph draws one number, on the device and
by an operator that compilers, checkpoints and CUDA graphs know as random; a weight is kept or not by what Philox makes of
that number and of the weight's place. Forward, backward and any tiling then agree, and each run draws anew.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import sympy as sp
import torch
from torch import fx

from attngen.algebra import Const, Expr, Int, Load, Op, integer, op, where
from attngen.index import ZERO
from attngen.passes.semantics import Index, bind, op_name
from attngen.philox import BITS

DROPOUTS = frozenset(["dropout", "native_dropout"])
SEEDS = 2**63 - 1  # of them one is drawn


@dataclass(frozen=True)
class Seed:
    """A number that the graph draws in place of the random numbers of the dropout ``node``, itself in the graph or part of
    the operator ``whole`` of it."""

    node: fx.Node
    whole: fx.Node


def factor(seed: Hashable, p: float, index: Index, shape: Index) -> Expr:
    """What dropout with probability ``p`` multiplies the element at ``index`` of a tensor of ``shape`` by."""
    if p == 1:
        return Const(0.0)
    threshold = min(round(p * 2**BITS), 2**BITS - 1)
    bits = op("random", Load(seed, (), "int"), *_counter(index, shape))
    return where(op("ge", bits, integer(threshold)), Const(1 / (1 - p)), Const(0.0))


def _counter(index: Index, shape: Index) -> tuple[Expr, ...]:
    """Four numbers that no other place has: the last dimensions, all before them in one.

    The first two differ within a block, and the last are the same for all of it, which spares kernels some of the rounds.
    """
    outer = ZERO
    for place, size in zip(index[:-3], shape[:-3], strict=True):
        outer = sp.expand(outer * size + place)
    inner = [*index[-3:][::-1], ZERO, ZERO, ZERO][:3]
    return tuple(map(Int, (*inner, outer)))


def seeds(*exprs: Expr) -> list[Seed]:
    """The seeds that the expressions depend on, in order."""
    sources = [node.source for expr in exprs for node in expr.walk() if isinstance(node, Load)]
    return list(dict.fromkeys(source for source in sources if isinstance(source, Seed)))


def is_random(expr: Expr) -> bool:
    """Made of random bits."""
    return any(isinstance(node, Op) and node.name == "random" for node in expr.walk())


def drops(node: fx.Node) -> bool:
    """A dropout that sets something to zero."""
    return op_name(node) in DROPOUTS and draws(node)


def draws(node: fx.Node) -> bool:
    """Takes random numbers: tagged as able to, and not told to keep everything."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    arguments = bind(node)
    keeps_all = arguments.get("dropout_p", arguments.get("p")) == 0 or arguments.get("train") is False
    return not keeps_all
