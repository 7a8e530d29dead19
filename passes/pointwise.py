"""Rows for pointwise operators: an operator name, the arguments it combines, and the algebra operation it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from attngen.algebra import (
    COMPARISONS,
    LOST,
    Const,
    Dot,
    Expr,
    Load,
    Op,
    Reduce,
    integer,
    negate,
    number,
    op,
    to_bool,
    to_float,
    to_int,
    where,
)
from attngen.passes.semantics import Bound, Index, Reader, Row, Unknown, coarsens, dtype_of, kind_of

HALF = (torch.float16, torch.bfloat16)
LOWEST = torch.finfo(torch.float32).min


def _plain(name: str, *names: str) -> Row:
    """The operation ``name`` on the named arguments, in the kind of the result."""

    def row(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
        if any(n not in args for n in names) or (name == "pow" and kind_of(dtype_of(node)) != "float"):
            raise Unknown(f"another overload of {name}")
        values = [reader.operand(args[n], index) for n in names]
        return op(name, *_promoted(node, values))

    return row


def _promoted(node: fx.Node, values: list[Expr]) -> list[Expr]:
    return [to_float(v) for v in values] if kind_of(dtype_of(node)) == "float" else values


def _scaled_sum(sign: str, minuend: str = "self", subtrahend: str = "other") -> Row:
    """``self ± alpha * other``."""

    def row(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
        left, right = _promoted(node, [reader.operand(args[n], index) for n in (minuend, subtrahend)])
        alpha = reader.operand(args.get("alpha", 1), index)
        right = op("mul", right, alpha) if alpha != integer(1) else right
        return _sum_in_half(sign, left, right, dtype_of(node)) if dtype_of(node) in HALF else op(sign, left, right)

    return row


def _sum_in_half(sign: str, left: Expr, right: Expr, dtype: torch.dtype) -> Expr:
    """A sum that the model rounds to 16 bits. Masks in it are made to leave nothing of a score in float32 either.

    fp16 scores plus -65504 are -65504, all of them; a kernel adds in float32, where they would keep their differences.
    """
    scored = [any(isinstance(n, Dot) for n in side.walk()) for side in (left, right)]
    if sign == "sub" and scored[0]:
        sign, right = "add", op("neg", right)
    if any(_may_lift(side, dtype) for side in (left, right)):
        return op(sign, left, right)
    return op(sign, *(_drowning(side, dtype, loads=any(scored)) for side in (left, right)))


def _may_lift(term: Expr, dtype: torch.dtype) -> bool:
    """A fill with its sign changed, as in ``s - s.detach()``: it takes back another, which must stay where it is for that."""
    changes = [n for n in term.walk() if isinstance(n, Op) and (n.name in ("neg", "sub") or _is_negative_factor(n))]
    choices = [n for change in changes for n in change.walk() if isinstance(n, Op) and n.name == "where"]
    return any(drowns(number(branch), dtype) for choice in choices for branch in choice.args[1:])


def _is_negative_factor(node: Op) -> bool:
    return node.name == "mul" and any((number(a) or 0) < 0 for a in node.args)


def _drowning(term: Expr, dtype: torch.dtype, *, loads: bool) -> Expr:
    """``term`` with its masking fills so low that they drown scores in float32, and so with what it ``loads``."""
    if isinstance(term, Op) and term.name == "where":
        condition, *branches = term.args
        return where(condition, *(_drowning_fill(branch, dtype, loads=loads) for branch in branches))
    if not loads or not _is_loaded(term):
        return term
    if isinstance(term, Op) and term.name == "add" and any(isinstance(a, Op) and a.name == "where" for a in term.args):
        return op("add", *(_drowning(part, dtype, loads=loads) for part in term.args))  # the mask in it must stay visible
    return op("drown", term, Const(-LOST / torch.finfo(dtype).eps))


def _drowning_fill(branch: Expr, dtype: torch.dtype, *, loads: bool) -> Expr:
    fill = number(branch)
    if fill is None:
        return _drowning(branch, dtype, loads=loads)
    if fill == -math.inf or not drowns(fill, dtype):
        return branch
    if 2 * fill < torch.finfo(dtype).min:
        return Const(LOWEST)  # two of them are -inf there, and here
    # Where float32 numbers are as far apart as the model's are at the fill: of two fills the lower one stays so.
    return Const(max(fill * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps, LOWEST))


def _is_loaded(term: Expr) -> bool:
    """Made of loaded numbers, and not of scores."""
    parts = term.walk()
    return any(isinstance(n, Load) for n in parts) and not any(isinstance(n, (Dot, Reduce)) for n in parts)


def drowns(fill: float | None, dtype: torch.dtype) -> bool:
    """Nothing of a score is left beside the negative ``fill`` in this type: what it holds there is not meant."""
    return fill is not None and -fill * torch.finfo(dtype).eps >= LOST


def _divide(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    left, right = (reader.operand(args[n], index) for n in ("self", "other"))
    mode = args.get("rounding_mode")
    if mode is None:
        return op("div", to_float(left), to_float(right))
    if mode == "floor" and left.kind == right.kind == "int":
        return op("floordiv", left, right)
    raise Unknown(f"division rounded by {mode}")


def _floor_divide(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    return _divide(reader, node, Bound(args, rounding_mode="floor"), index)


def _remainder(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    left, right = (reader.operand(args[n], index) for n in ("self", "other"))
    if not left.kind == right.kind == "int":
        raise Unknown("a remainder of floats")
    return op("mod", left, right)


def _cast(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    value = reader.operand(args["self"], index)
    if coarsens(args["self"], node):
        raise Unknown("a cast that changes values")
    return {"bool": to_bool, "int": to_int, "float": to_float}[kind_of(dtype_of(node))](value)


def _copied(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    """What is written over a tensor, in its type."""
    return _cast(reader, node, Bound(self=args["src"]), index)


def _where(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    if "self" not in args:
        raise Unknown("where with one argument lists positions")
    condition = to_bool(reader.operand(args["condition"], index))
    return where(condition, *_promoted(node, [reader.operand(args[n], index) for n in ("self", "other")]))


def _masked_fill(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    condition = to_bool(reader.operand(args["mask"], index))
    filled, kept = _promoted(node, [reader.operand(args[n], index) for n in ("value", "self")])
    return where(condition, filled, kept)


def _logical(name: str, *names: str) -> Row:
    """A truth-valued operation; the bitwise spelling means the same on truth values and something else on integers."""

    def row(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
        if kind_of(dtype_of(node)) != "bool":
            raise Unknown("bitwise arithmetic on integers")
        return op(name, *(to_bool(reader.operand(args[n], index)) for n in names))

    return row


def _exclusive_or(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    if kind_of(dtype_of(node)) != "bool":
        raise Unknown("bitwise arithmetic on integers")
    left, right = (to_bool(reader.operand(args[n], index)) for n in ("self", "other"))
    return op("or", op("and", left, negate(right)), op("and", negate(left), right))


def _clamp(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    value = reader.operand(args["self"], index)
    for name, bound in (("max", args.get("min")), ("min", args.get("max"))):
        if bound is not None:
            value = op(name, *_promoted(node, [value, reader.operand(bound, index)]))
    return value


def _unary(build: Callable[[Expr], Expr]) -> Row:
    def row(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
        return build(to_float(reader.operand(args["self"], index)))

    return row


def _kept_kind(name: str) -> Row:
    def row(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
        return op(name, reader.operand(args["self"], index))

    return row


_ZERO, _ONE = Const(0.0), Const(1.0)
_FUNCTIONS = ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "tanh", "sigmoid", "erf", "sin", "cos", "floor")

POINTWISE: dict[str, Row] = {
    **{name: _unary(lambda x, name=name: op(name, x)) for name in _FUNCTIONS},  # type: ignore[misc]
    **{name: _plain(name, "self", "other") for name in COMPARISONS},
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    "copy": _copied,
    "expm1": _unary(lambda x: op("sub", op("exp", x), _ONE)),
    "log1p": _unary(lambda x: op("log", op("add", x, _ONE))),
    "reciprocal": _unary(lambda x: op("div", _ONE, x)),
    "sign": _unary(lambda x: where(op("gt", x, _ZERO), _ONE, where(op("lt", x, _ZERO), Const(-1.0), op("mul", x, _ZERO)))),
    "square": _unary(lambda x: op("mul", x, x)),
    "add": _scaled_sum("add"),
    "sub": _scaled_sum("sub"),
    "rsub": _scaled_sum("sub", "other", "self"),
    "mul": _plain("mul", "self", "other"),
    "div": _divide,
    "true_divide": _divide,
    "floor_divide": _floor_divide,
    "remainder": _remainder,
    "pow": _plain("pow", "self", "exponent"),
    "maximum": _plain("max", "self", "other"),
    "minimum": _plain("min", "self", "other"),
    "max": _plain("max", "self", "other"),
    "min": _plain("min", "self", "other"),
    "neg": _kept_kind("neg"),
    "abs": _kept_kind("abs"),
    "relu": _unary(lambda x: op("max", x, Const(0.0))),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "where": _where,
    "masked_fill": _masked_fill,
    "logical_and": _logical("and", "self", "other"),
    "logical_or": _logical("or", "self", "other"),
    "logical_not": _logical("not", "self"),
    "logical_xor": _exclusive_or,
    "bitwise_and": _logical("and", "self", "other"),
    "bitwise_or": _logical("or", "self", "other"),
    "bitwise_not": _logical("not", "self"),
    "bitwise_xor": _exclusive_or,
    "__and__": _logical("and", "self", "other"),
    "__or__": _logical("or", "self", "other"),
    "__xor__": _exclusive_or,
    "isnan": _unary(lambda x: op("isnan", x)),
    "isinf": _unary(lambda x: op("eq", op("abs", x), Const(math.inf))),
}
