"""A spec computed with torch operators, one block of rows at a time: no tensor ever holds all pairs.

This is what a generated operator does on the CPU, what its gradient is on any device for now, and, in float64, the
reference that kernels are checked against. Gradients come from torch's own differentiation of each block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from attngen import compat
from attngen.algebra import ONE, TRUE, Expr, Int, Op, number
from attngen.compat import FloorDiv
from attngen.evaluate import Evaluator
from attngen.index import Axis
from attngen.spec import FEATURE, INNER, KEY, ROW, SCORE, AttentionSpec, Input, Total

BLOCK_ELEMENTS = 1 << 22  # of one block of scores


@dataclass(frozen=True)
class Call:
    """The inputs of one call, arranged: query [*batch, i, d], keys [*batch, j, d], values [*batch, j, e]."""

    spec: AttentionSpec
    sizes: dict[Axis, int]
    query: Tensor
    keys: Tensor
    values: Tensor
    extras: dict[str, Tensor]
    dtype: torch.dtype

    def whole(self, pairs: Tensor, rows: int) -> Tensor:
        """``pairs`` seen as ``[*batch, rows, keys]``, whatever they are the same for."""
        return torch.broadcast_to(pairs, [*(self.sizes[axis] for axis in self.spec.batch), rows, self.sizes[KEY]])

    def rows_per_block(self) -> int:
        per_row = self.sizes[KEY]
        for axis in self.spec.batch:
            per_row *= self.sizes[axis]
        return max(1, min(self.sizes[ROW], BLOCK_ELEMENTS // max(per_row, 1)))


def forward(
    spec: AttentionSpec, inputs: Sequence[Tensor], *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The output (laid out as ``spec.output``) and the log-sum-exp ``[*batch, i]`` of each row.

    ``dtype`` is the precision of the arithmetic: float32 unless an input is float64.
    """
    call = arrange(spec, inputs, dtype)
    step = call.rows_per_block()
    starts = range(0, max(call.sizes[ROW], 1), step)  # no rows make one empty block
    blocks = [_block(call, r, min(r + step, call.sizes[ROW])) for r in starts]
    out = torch.cat([block for block, _ in blocks], -2)
    lse = torch.cat([lse for _, lse in blocks], -1)
    return laid_out(call, out), lse


def backward(
    spec: AttentionSpec, inputs: Sequence[Tensor], grad: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of each needed input for ``grad``, that of the output. Forward is computed again per block."""
    leaves = [x.detach().requires_grad_(n and x.is_floating_point()) for x, n in zip(inputs, needed, strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    with compat.differentiable():
        call = arrange(spec, leaves)
    sums = [torch.zeros(leaf.shape, dtype=call.dtype, device=leaf.device) for leaf in wanted]
    grad = _back_to_batch(call, grad)
    step = call.rows_per_block()
    for first in range(0, call.sizes[ROW], step):
        last = min(first + step, call.sizes[ROW])
        with compat.differentiable():
            call = arrange(spec, leaves)
            out, _ = _block(call, first, last)
            grads = torch.autograd.grad(out, wanted, grad[..., first:last, :].to(out.dtype), allow_unused=True)
        for total, part in zip(sums, grads, strict=True):
            if part is not None:
                total += part
    done = iter(sums)
    return [next(done).to(leaf.dtype) if leaf.requires_grad else None for leaf in leaves]


# ----------------------------------------------------------------------------------------------------------- one block


def _block(call: Call, first: int, last: int) -> tuple[Tensor, Tensor]:
    spec = call.spec
    qk = call.query[..., first:last, :] @ call.keys.transpose(-1, -2)
    evaluate = evaluator(call, first, last, qk)
    scores = evaluate(spec.score)
    if not spec.softmax:
        return _weighed(call, evaluate, scores, last - first)
    if spec.mask != TRUE:
        scores = scores.masked_fill(~evaluate(spec.mask), -torch.inf)
    scores = call.whole(scores, last - first)
    no_keys = call.sizes[KEY] == 0
    if spec.whole is not None and spec.redo_below is not None and not no_keys:
        again = scores.amax(-1, keepdim=True) < spec.redo_below
        if bool(again.any()):
            scores = torch.where(again, evaluate(spec.whole), scores)
    shift = scores.new_full((*scores.shape[:-1], 1), -torch.inf) if no_keys else scores.detach().amax(-1, keepdim=True)
    sinks = [torch.broadcast_to(evaluate(s), shift.shape) for s in spec.sinks]
    for sink in sinks:
        shift = torch.maximum(shift, sink.detach())
    shift = torch.where(shift == -torch.inf, 0.0, shift)
    weights = torch.exp(scores - shift)
    total = weights.sum(-1, keepdim=True)
    for sink in sinks:
        total = total + torch.exp(sink - shift)
    if spec.gain != ONE:
        weights = weights * evaluate(spec.gain)
    zero = total.isnan() if spec.empty == "never_nan" else None
    if zero is not None:  # then the row adds nothing to the gradient of the values either
        weights = torch.where(zero, 0.0, weights)
    values = weights @ call.values
    safe = torch.where(total == 0 if zero is None else (total == 0) | zero, 1.0, total)
    out = torch.where(total == 0, values if spec.empty != "nan" or no_keys else torch.nan, values / safe)
    if zero is not None:
        out = torch.where(zero, 0.0, out)
    return out, (shift + torch.log(total)).squeeze(-1)


def _weighed(call: Call, evaluate: Evaluator, weights: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Weights that no sum normalises; zeros in place of the log-sum-exp."""
    if call.spec.mask != TRUE:
        weights = torch.where(evaluate(call.spec.mask), weights, 0.0)
    weights = call.whole(weights, rows)
    return weights @ call.values, weights.new_zeros(weights.shape[:-1])


def evaluator(call: Call, first: int, last: int, qk: Tensor) -> Evaluator:
    """Evaluates over ``[*batch, i, j]`` for the rows ``first .. last``, whose products of query and key are ``qk``."""
    device = qk.device
    count = len(call.spec.batch)
    positions: dict[sp.Symbol, Tensor | int] = {
        ROW: torch.arange(first, last, device=device).unsqueeze(-1),
        KEY: torch.arange(call.sizes[KEY], device=device),
    }
    for place, axis in enumerate(call.spec.batch):
        shape = [1] * (count + 2)
        shape[place] = -1
        positions[axis] = torch.arange(call.sizes[axis], device=device).reshape(shape)
    positions.update({axis.extent: size for axis, size in call.sizes.items()})
    known: dict[Expr, Tensor] = {SCORE: qk}
    evaluate = Evaluator(positions, call.extras.__getitem__, known=known, dtype=call.dtype, device=device)
    if call.spec.total is not None and any(x.requires_grad for x in (qk, *call.extras.values())):
        _pass_on(call, call.spec.total, evaluate, last - first)
    return evaluate


def _pass_on(call: Call, total: Total, evaluate: Evaluator, rows: int) -> None:
    """From here on what the score reads of the total passes its gradient on to the weights that it is the sum of."""
    weights = evaluate(total.weight)
    if call.spec.mask != TRUE:
        weights = torch.where(evaluate(call.spec.mask), weights, 0.0)
    made = call.whole(weights, rows).sum(-1, keepdim=True)
    load = total.read_by(call.spec.score)
    known = torch.broadcast_to(evaluate(load), made.shape)
    evaluate.know(load, _Known.apply(made, known))  # type: ignore[no-untyped-call]


class _Known(torch.autograd.Function):
    """What was ``made``, as it is ``known``: rounded. Its gradient is in proportion, or it would not cancel theirs."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, known: Tensor) -> Tensor:
        ctx.save_for_backward(made, known)
        return known.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        made, known = ctx.saved_tensors
        return grad * torch.where(made == 0, 1.0, known / made), None


# ------------------------------------------------------------------------------------------------------- arrangement


def sizes_of(spec: AttentionSpec, inputs: Sequence[Tensor]) -> dict[Axis, int]:
    """The extent of every axis, read off the inputs; one for an axis that no input has as a dimension."""
    sizes = {INNER: spec.head_dim, FEATURE: spec.value_dim}
    for axis in (*spec.batch, ROW, KEY):
        if not any(place.has(axis) for source in spec.inputs for place in source.index):
            sizes[axis] = 1
        for source, tensor in zip(spec.inputs, inputs, strict=True):
            dim = source.dim_of(axis)
            if dim is not None:
                sizes[axis] = tensor.shape[dim]
                break
    return sizes


def arrange(spec: AttentionSpec, inputs: Sequence[Tensor], dtype: torch.dtype | None = None) -> Call:
    """The inputs of one call with its operands in ``dtype``: float32 unless an input is float64."""
    sizes = sizes_of(spec, inputs)
    if dtype is None:
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    pairs = list(zip(spec.inputs, inputs, strict=True))
    sides = ((ROW, INNER), (KEY, INNER), (KEY, FEATURE))
    q, k, v = (
        arranged(source, tensor, (*spec.batch, *axes), sizes).to(dtype)
        for (source, tensor), axes in zip(pairs, sides, strict=False)
    )
    return Call(spec, sizes, q, k, v, {source.name: tensor for source, tensor in pairs[3:]}, dtype)


def arranged(source: Input, tensor: Tensor, axes: tuple[Axis, ...], sizes: dict[Axis, int]) -> Tensor:
    """``tensor`` with one dimension per axis of ``axes``, in that order; of size one where it does not change."""
    labels: list[Axis | None] = []
    for dim in reversed(range(len(source.index))):
        place = source.index[dim]
        if place.is_Integer:
            tensor = tensor.select(dim, int(place))
            continue
        axis = next(iter(place.atoms(Axis)))
        tensor = _along(tensor, dim, place, axis, sizes)
        labels.insert(0, axis)
    present = [axis for axis in axes if axis in labels]
    tensor = tensor.permute([labels.index(axis) for axis in present])
    for place, axis in enumerate(axes):
        if axis not in present:
            tensor = tensor.unsqueeze(place)
    return tensor


def _along(tensor: Tensor, dim: int, place: sp.Expr, axis: Axis, sizes: dict[Axis, int]) -> Tensor:
    """``tensor`` read along ``dim`` at ``place``, an expression of ``axis``."""
    if place == axis:
        return tensor if tensor.shape[dim] <= sizes[axis] else tensor.narrow(dim, 0, sizes[axis])
    times, rest = divmod(sizes[axis], tensor.shape[dim]) if sizes[axis] else (1, 0)
    if rest == 0 and place == FloorDiv(axis, times):
        return tensor.repeat_interleave(times, dim)
    if place.atoms(Axis) != {axis}:
        raise NotImplementedError(f"an operand read at {place}")
    known: dict[sp.Symbol, Any] = {each.extent: size for each, size in sizes.items()}  # type: ignore[misc]
    known[axis] = torch.arange(sizes[axis], device=tensor.device)
    positions = Evaluator(known, lambda _: tensor).integer(place)
    return tensor.index_select(dim, torch.as_tensor(positions, device=tensor.device))


def laid_out(call: Call, out: Tensor) -> Tensor:
    """``out`` [*batch, i, e] in the dtype of the spec and in the order of its output."""
    order = (*call.spec.batch, ROW, FEATURE)
    full = torch.broadcast_to(out, [call.sizes[axis] for axis in order])
    return (
        full.permute([order.index(axis) for axis in call.spec.output]).to(call.spec.out_dtype, copy=True).contiguous()
    )


def _back_to_batch(call: Call, grad: Tensor) -> Tensor:
    order = (*call.spec.batch, ROW, FEATURE)
    return grad.permute([call.spec.output.index(axis) for axis in order])


# ------------------------------------------------------------------------------------------------------ library route


@dataclass(frozen=True)
class Plain:
    """What ``F.scaled_dot_product_attention`` needs to compute a spec."""

    scale: float
    causal: bool


def plain(spec: AttentionSpec) -> Plain | None:
    """The arguments with which torch's own attention computes ``spec``, if it can."""
    scale = _scale(spec.score)
    causal = spec.mask == Op("le", (Int(KEY), Int(ROW)))
    changed = not spec.softmax or spec.gain != ONE or spec.sinks or spec.whole is not None
    narrower = any(torch.promote_types(x.dtype, spec.out_dtype) != spec.out_dtype for x in spec.inputs)
    if scale is None or changed or narrower or not (causal or spec.mask == TRUE):
        return None
    if causal and scale <= 0:  # on a CPU the -inf of masked pairs is scaled too
        return None
    return Plain(scale, causal)


def _scale(score: Expr) -> float | None:
    if score == SCORE:
        return 1.0
    if isinstance(score, Op) and score.name == "mul" and score.args[0] == SCORE:
        return number(score.args[1])
    return None


def library(spec: AttentionSpec, how: Plain, inputs: Sequence[Tensor]) -> Tensor:
    """``spec`` through ``F.scaled_dot_product_attention``."""
    sizes = sizes_of(spec, inputs)
    order = (*spec.batch, ROW, FEATURE)
    lead = [sizes[axis] for axis in spec.batch]
    sides = ((ROW, INNER), (KEY, INNER), (KEY, FEATURE))
    q, k, v = (
        torch.broadcast_to(
            arranged(source, tensor, (*spec.batch, *axes), sizes), [*lead, *(sizes[a] for a in axes)]
        ).to(spec.out_dtype)
        for source, tensor, axes in zip(spec.inputs, inputs, sides, strict=False)
    )
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=how.causal, scale=how.scale)
    return out.permute([order.index(axis) for axis in spec.output]).contiguous()
