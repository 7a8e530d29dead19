"""Rows for pointwise operators: an operator name, the arguments it combines, and the algebra operation it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from attngen.algebra import (
    COMPARISONS,
    Const,
    Dot,
    Expr,
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
from attngen.normaliser import MASKING
from attngen.passes.rounding import HALF, in_half, in_type
from attngen.passes.semantics import (
    NARROW,
    Bound,
    Index,
    Reader,
    Row,
    Unknown,
    bind,
    coarsens,
    dtype_of,
    is_tensor,
    kind_of,
    op_name,
    shape_of,
)


def _plain(name: str, *names: str) -> Row:
    """The operation ``name`` on the named arguments, in the kind of the result."""

    def row(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
        if any(n not in args for n in names) or (name == "pow" and kind_of(dtype_of(node)) != "float"):
            raise Unknown(f"another overload of {name}")
        values = [reader.operand(args[n], index) for n in names]
        return op(name, *_promoted(node, values))

    return row


# Operators whose result is one of their arguments, element by element.
_CHOICES = frozenset(["where", "masked_fill", "index_put", "maximum", "minimum", "max", "min", "clamp"])
_CHOICES |= frozenset(["clamp_min", "clamp_max", "to", "_to_copy", "type_as", "copy"])


def may_wrap(node: fx.Node) -> bool:
    """``node`` computes narrow integers, or chooses among numbers that may be none of them: -1 is 255 there."""
    if dtype_of(node) not in NARROW:
        return False
    return op_name(node) not in _CHOICES or not all(_fits(value, dtype_of(node)) for value in bind(node).values())


def _fits(value: object, dtype: torch.dtype) -> bool:
    if isinstance(value, fx.Node):
        return is_tensor(value) and dtype_of(value) in (torch.bool, dtype)
    return not isinstance(value, (int, float)) or torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def _promoted(node: fx.Node, values: list[Expr]) -> list[Expr]:
    return [to_float(v) for v in values] if kind_of(dtype_of(node)) == "float" else values


def _scaled_sum(sign: str, minuend: str = "self", subtrahend: str = "other") -> Row:
    """``self ± alpha * other``."""

    def row(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
        left, right = _promoted(node, [reader.operand(args[n], index) for n in (minuend, subtrahend)])
        alpha = reader.operand(args.get("alpha", 1), index)
        right = op("mul", right, alpha) if alpha != integer(1) else right
        return in_half(sign, left, right, dtype_of(node)) if dtype_of(node) in HALF else op(sign, left, right)

    return row


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
    return _choice(node, condition, *(reader.operand(args[n], index) for n in ("self", "other")))


def _masked_fill(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    condition = to_bool(reader.operand(args["mask"], index))
    return _choice(node, condition, *(reader.operand(args[n], index) for n in ("value", "self")))


def _put(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    """``x[mask] = number``: the dimensions of one mask, and one number for all that it chooses."""
    chosen = [(dim, mask) for dim, mask in enumerate(args["indices"]) if mask is not None]
    ((first, mask), *others), value = chosen, args["values"]
    if others or args["accumulate"] or kind_of(dtype_of(mask)) != "bool" or any(size != 1 for size in shape_of(value)):
        raise Unknown("a write to listed places")
    condition = reader.at(mask, index[first : first + len(shape_of(mask))])
    return _choice(node, condition, reader.operand(value, index), reader.operand(args["self"], index))


def _choice(node: fx.Node, condition: Expr, *branches: Expr) -> Expr:
    """Numbers are what they are in the type of the result: two masks of -1e9 in bfloat16 must be equal to the last bit."""
    dtype = dtype_of(node)
    if kind_of(dtype) == "bool":
        return where(condition, *map(to_bool, branches))
    yes, no = (in_type(branch, dtype) for branch in _promoted(node, list(branches)))
    return where(condition, yes, no)


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


def _larger(name: str) -> Row:
    """Of two tensors, which share a gradient where they are equal; a limit that is a number takes nothing of it. Scores are
    equal to no limit as low as those of masks."""

    def row(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
        left, right = (reader.operand(value, index) for value in (args["self"], args["other"]))
        result = op(name, left, right)
        limit, value = (left, right) if number(left) is not None else (right, left)
        nodes = value.walk() if result.kind == "float" and abs(number(limit) or 0.0) < -MASKING else []
        if number(limit) is None or not any(isinstance(n, Dot) for n in nodes) or any(isinstance(n, Reduce) for n in nodes):
            return result
        mean = op("mul", op("add", value, limit), Const(0.5))
        return where(op("eq", value, limit), mean, result)

    return row


def _unary(build: Callable[[Expr], Expr]) -> Row:
    def row(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
        return build(to_float(reader.operand(args["self"], index)))

    return row


def _kept_kind(name: str) -> Row:
    def row(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
        return op(name, reader.operand(args["self"], index))

    return row


def _nan_to_num(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    """Of attention weights, whose NaN become zeros. Others are there, as tensors."""
    if not reader.weighs(node) or args["nan"]:
        raise Unknown("numbers in place of those that are none")
    value, limits = to_float(reader.operand(args["self"], index)), torch.finfo(dtype_of(node))
    named = (("neginf", limits.min), ("posinf", limits.max))
    lowest, highest = (Const(float(limit if args[name] is None else args[name])) for name, limit in named)
    return where(op("isnan", value), _ZERO, op("min", op("max", value, lowest), highest))


def _log_add_exp(reader: Reader, node: fx.Node, args: Bound, index: Index) -> Expr:
    """Of what attention weights add up to. Others are there, as tensors."""
    if not reader.weighs(node):
        raise Unknown("exponentials that may be infinite")
    powers = [op("exp", to_float(reader.operand(args[name], index))) for name in ("self", "other")]
    return op("log", op("add", *powers))


def _log_sigmoid(value: Expr) -> Expr:
    """``min(x, 0) - log(1 + exp(-abs(x)))``: no exponential of a large number."""
    small = op("exp", op("neg", op("abs", value)))
    return op("sub", op("min", value, _ZERO), op("log", op("add", small, _ONE)))


_ZERO, _ONE = Const(0.0), Const(1.0)
_FUNCTIONS = ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "tanh", "sigmoid", "erf", "sin", "cos", "floor")

POINTWISE: dict[str, Row] = {
    **{name: _unary(lambda x, name=name: op(name, x)) for name in _FUNCTIONS},  # type: ignore[misc]
    **{name: _plain(name, "self", "other") for name in COMPARISONS},
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    "copy": _copied,
    "expm1": _unary(lambda x: op("sub", op("exp", x), _ONE)),
    "log1p": _unary(lambda x: op("log", op("add", x, _ONE))),
    "log_sigmoid": _unary(_log_sigmoid),
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
    "maximum": _larger("max"),
    "minimum": _larger("min"),
    "max": _larger("max"),
    "min": _larger("min"),
    "neg": _kept_kind("neg"),
    "abs": _kept_kind("abs"),
    "relu": _unary(lambda x: op("relu", x)),
    "relu6": _unary(lambda x: op("min", op("relu", x), Const(6.0))),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "where": _where,
    "logaddexp": _log_add_exp,
    "nan_to_num": _nan_to_num,
    "masked_fill": _masked_fill,
    "index_put": _put,
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
