"""Evaluate an expression of the algebra with torch: the reference meaning of every node.

Axes are bound to integer tensors that broadcast against each other (one leading dimension per bound axis of a sum), so
the same code gives one block of scores, a whole table, or every element of a small tensor. Differentiable where torch is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, cast

import sympy as sp
import torch
from torch import Tensor

from attngen.algebra import LOST, Const, Dot, Expr, Int, Load, Op, Reduce, limited
from attngen.compat import FloorDiv
from attngen.philox import random

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "div_or_zero": lambda a, b: torch.where(b == 0, torch.zeros_like(a), a / b),
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "mod": torch.remainder,
    "neg": torch.neg,
    "abs": torch.abs,
    "relu": torch.relu,
    "min": torch.minimum,
    "max": torch.maximum,
    "pow": torch.pow,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "log2": torch.log2,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "floor": torch.floor,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
    "and": lambda *a: reduce(torch.logical_and, a),
    "or": lambda *a: reduce(torch.logical_or, a),
    "not": torch.logical_not,
    "isnan": torch.isnan,
    "where": torch.where,
    "trunc": lambda x: x.to(torch.int64),
    "random": random,
}


def _drown(term: Tensor, limit: Tensor) -> Tensor:
    """``term``; from ``limit`` down, moved to where numbers are ``LOST`` apart, so that a score added to it is lost.

    In fp16 numbers are that far apart below -32768, so that sums are rounded exactly as in the model.
    """
    return torch.where(term <= limit, term - 1.5 * LOST / torch.finfo(term.dtype).eps, term)


def _rounded(score: Tensor, limit: Tensor) -> Tensor:
    """``score``; where numbers of its 16-bit type, known by ``limit``, are ``LOST`` apart, rounded to that type."""
    half = next(dtype for dtype in (torch.float16, torch.bfloat16) if torch.finfo(dtype).eps * -limit == LOST)
    kept = score.to(half).to(score.dtype)
    return torch.where(kept.abs() >= -limit, kept, score)


FUNCTIONS["drown"] = _drown
FUNCTIONS["rounded"] = _rounded


class Evaluator:
    """Evaluates expressions at given positions.

    ``positions`` binds axes and sizes to integer tensors or ints; ``load`` gives the tensor behind a ``Load``;
    ``known`` gives the value of whole subexpressions. A contraction is summed up element by element.
    """

    def __init__(
        self,
        positions: Mapping[sp.Symbol, Tensor | int],
        load: Callable[[Any], Tensor],
        *,
        known: Mapping[Expr, Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self._positions = dict(positions)
        self._load = load
        self._dtype = dtype
        self._device = torch.device(device)
        self._memo: dict[Expr, Tensor] = dict(known or {})

    def __call__(self, expr: Expr) -> Tensor:
        if expr not in self._memo:
            self._memo[expr] = self._evaluate(expr)
        return self._memo[expr]

    def know(self, expr: Expr, value: Tensor) -> None:
        """``expr`` is ``value`` in all that is not evaluated yet."""
        self._memo[expr] = value

    def _evaluate(self, expr: Expr) -> Tensor:
        if isinstance(expr, Int):
            value = self.integer(expr.value)
            return value if isinstance(value, Tensor) else torch.full((), value, device=self._device)
        if isinstance(expr, Const):
            dtype = torch.bool if expr.kind == "bool" else self._dtype
            return torch.full((), expr.value, dtype=dtype, device=self._device)  # traces, as torch.tensor would not
        if isinstance(expr, Load):
            return self._loaded(expr)
        if isinstance(expr, Dot):
            return self._contraction(expr)
        if isinstance(expr, Reduce):
            values = self._unrolled(expr.axis)(expr.body)
            values = torch.broadcast_to(values, (int(expr.axis.extent), *values.shape[1:]))
            return values.sum(0) if expr.name == "sum" else values.amax(0)
        assert isinstance(expr, Op), expr
        if expr.name in ("min", "max") and (limit := limited(expr)) is not None:
            return self(limit[0]).clamp(**{"max" if expr.name == "min" else "min": limit[1]})
        args = [self(arg) for arg in expr.args]
        if expr.name == "float":
            return args[0].to(self._dtype)
        return FUNCTIONS[expr.name](*args)  # type: ignore[no-any-return]

    def _loaded(self, expr: Load) -> Tensor:
        tensor = self._load(expr.source)
        # A branch that is not selected may look outside the tensor; what it reads there never counts.
        value = tensor
        for place in reversed(range(len(expr.index))):  # numbers first: a tracer cannot index by a tensor of one number
            if (fixed := _fixed(expr.index[place])) is not None:
                value = value.select(place, min(max(fixed, 0), tensor.shape[place] - 1))
        moving = [place for place in expr.index if _fixed(place) is None]
        places = tuple(self(p).clamp(0, max(n - 1, 0)) for p, n in zip(moving, value.shape, strict=True))
        value = value[tuple(torch.broadcast_tensors(*places))] if places else value
        return value.to(self._dtype) if expr.kind == "float" else value

    def _contraction(self, expr: Dot) -> Tensor:
        inner = self._unrolled(expr.axis)
        left, right = (inner._loaded(Load(side.source, side.index)) for side in (expr.lhs, expr.rhs))
        return (left * right).sum(0)

    def _unrolled(self, axis: sp.Symbol) -> Evaluator:
        """The same positions with ``axis`` running over a new leading dimension."""
        rank = max((p.dim() for p in self._positions.values() if isinstance(p, Tensor)), default=0)
        values = torch.arange(int(axis.extent), device=self._device).reshape(-1, *[1] * rank)  # type: ignore[attr-defined]
        positions = {**self._positions, axis: values}
        return Evaluator(positions, self._load, dtype=self._dtype, device=self._device)

    def integer(self, expr: sp.Expr) -> Tensor | int:
        """The value of an index expression."""
        if expr.is_Integer:
            return int(expr)
        if expr.is_Symbol:
            return self._positions[expr]
        args = [self.integer(arg) for arg in expr.args]
        if isinstance(expr, sp.Add):
            return reduce(lambda a, b: a + b, args)
        if isinstance(expr, sp.Mul):
            return reduce(lambda a, b: a * b, args)
        if isinstance(expr, sp.Pow) and expr.exp.is_Integer and expr.exp.is_positive:
            return args[0] ** int(expr.exp)
        if isinstance(expr, FloorDiv):
            return args[0] // args[1]
        if isinstance(expr, sp.Mod):
            return args[0] % args[1]
        if isinstance(expr, sp.Abs):
            return args[0].abs() if isinstance(args[0], Tensor) else abs(args[0])
        if isinstance(expr, (sp.Max, sp.Min)):
            return reduce(_larger if isinstance(expr, sp.Max) else _smaller, args)
        raise NotImplementedError(f"{expr} in an index")


def _fixed(place: Expr) -> int | None:
    """The number that an index always is, if it is one."""
    return int(place.value) if isinstance(place, Int) and place.value.is_Integer else None


def _larger(a: Tensor | int, b: Tensor | int) -> Tensor | int:
    """The maximum; numbers stay numbers, which a tracer must not see as constant tensors."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a.clamp(min=b) if isinstance(a, Tensor) else b.clamp(min=a)  # type: ignore[union-attr]
    return cast("Tensor | int", torch.sym_max(a, b))


def _smaller(a: Tensor | int, b: Tensor | int) -> Tensor | int:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a.clamp(max=b) if isinstance(a, Tensor) else b.clamp(max=a)  # type: ignore[union-attr]
    return cast("Tensor | int", torch.sym_min(a, b))
