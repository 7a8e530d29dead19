"""What a backward computes and where it puts it: one record per gradient, and what is left to do with torch.

Two kernels share the work. One holds queries and goes over keys; it makes the gradient of the queries. The other holds
keys, goes over queries, and makes those of keys and values, summed over all heads that read them. Whatever else was loaded
into the scores has its gradient made on the way, by the kernel that sees all of it: per pair, or reduced along a row or a
column. What is left are sums over heads and the like, of vectors, which torch does here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import sympy as sp
import torch
from torch import Tensor

from attngen import blockwise, compat
from attngen.adjoint import SCORE_GRAD, TOTAL_GRAD, WEIGHT_GRAD, gradients
from attngen.algebra import TRUE, Const, Expr, Int, Load, op, substitute, transform
from attngen.compat import FloorDiv
from attngen.evaluate import Evaluator
from attngen.index import Axis
from attngen.mask import no_row_is_empty
from attngen.scores import loads_over_keys
from attngen.spec import FEATURE, INNER, KEY, ROW, SCORE, AttentionSpec, Input

INEXACT = -1e5  # a log-sum-exp below this has lost the number of keys that it is the sum over

PAIR, DIAGONAL, SCATTERED, ROWS, KEYS, HEAD = "pair", "diagonal", "scattered", "rows", "keys", "head"


@dataclass(frozen=True)
class Target:
    """Where the gradient of ``source`` is put: a buffer read like ``place``; ``kind`` says what it is reduced to.

    ``shared``: several programs add to one element. ``direct``: the buffer is the gradient, but for its type. ``dense``:
    every position is written.
    """

    source: Input
    place: Input
    kind: str = PAIR
    shared: bool = False
    direct: bool = True
    dense: bool = True


@dataclass(frozen=True)
class Redo:
    """What rows are computed by whose log-sum-exp is at most ``below``: there it does not tell the weights any more."""

    score: Expr
    below: float


@dataclass(frozen=True)
class Backward:
    """The gradients of a spec. ``members``: how many values of a batch axis read the same keys and values, by axis:
    0 for an axis along which keys do not change, else what the axis is divided by."""

    spec: AttentionSpec
    query: Target
    keys: Target
    values: Target
    extras: tuple[Target, ...]
    members: tuple[tuple[Axis, int], ...]
    redo: Redo | None
    may_be_lost: bool  # rows without a key, whose results are NaN

    @property
    def targets(self) -> tuple[Target, ...]:
        return (self.query, self.keys, self.values, *self.extras)


@lru_cache(maxsize=4096)
def backward_of(spec: AttentionSpec) -> Backward:
    """Raises ``Unprintable`` if an operation of the score has no known derivative."""
    members = _members(spec)
    axes = (*spec.batch, KEY)
    kept = dict(members) if members is not None else {}
    direct = members is not None
    lost = spec.softmax and spec.empty == "nan" and spec.whole is None and not no_row_is_empty(spec.mask, ROW, KEY)
    return Backward(
        spec,
        _operand(spec.query, (*spec.batch, ROW, INNER), set(spec.batch)),
        _operand(spec.keys, (*axes, INNER), set(spec.batch) - kept.keys(), direct),
        _operand(spec.values, (*axes, FEATURE), set(spec.batch) - kept.keys(), direct),
        tuple(_extra(spec, source) for source in spec.extras if _wants(spec, source)),
        members or (),
        _redo(spec),
        lost,
    )


def _operand(source: Input, axes: tuple[Axis, ...], own: set[Axis], direct: bool = True) -> Target:
    """Straight into the gradient, if each program has elements of its own; else a buffer that is summed afterwards."""
    named = f"d{source.name}"
    if direct and own <= {place for place in source.index if isinstance(place, Axis)}:
        return Target(source, replace(source, name=named))
    return Target(source, Input(named, axes, torch.float32), direct=False)


def _members(spec: AttentionSpec) -> tuple[tuple[Axis, int], ...] | None:
    """The batch axes along which programs share keys and values; None if these two are shared in different ways."""
    found = [sharing(spec, source) for source in (spec.keys, spec.values)]
    return found[0] if found[0] == found[1] else None


def sharing(spec: AttentionSpec, source: Input) -> tuple[tuple[Axis, int], ...] | None:
    """The batch axes along which ``source`` is read alike, each with 0, or with what the axis is divided by; None if it is
    read in another way."""
    shared = []
    for axis in spec.batch:
        places = [place for place in source.index if place.has(axis)]
        if places == [axis]:
            continue
        if not places:
            shared.append((axis, 0))
        elif len(places) == 1 and (by := _divisor(places[0], axis)):
            shared.append((axis, by))
        else:
            return None
    return tuple(shared)


def _divisor(place: sp.Expr, axis: Axis) -> int:
    by = place.args[1] if isinstance(place, FloorDiv) and place.args[0] == axis else None
    return int(by) if by is not None and by.is_Integer else 0


# -------------------------------------------------------------------------------------------------------------- extras


def _wants(spec: AttentionSpec, source: Input) -> bool:
    loads = {load.source for load, _ in adjoints(spec, spec.score)}
    return source.dtype.is_floating_point and source.name in loads


def adjoints(spec: AttentionSpec, score: Expr) -> list[tuple[Load, Expr]]:
    """What ``score`` and the spec's gain load, and the gradient of each. What a total would get goes to its weights: the two
    parts of their gradient may nearly cancel, so they are added up before anything is multiplied with them."""
    found = gradients(score, SCORE_GRAD)
    others = gradients(spec.gain, WEIGHT_GRAD)
    if spec.total is not None:  # weights without softmax, which have no gain
        found = {load: grad for load, grad in found.items() if load.source != spec.total.name}
        others = gradients(spec.total.weight, TOTAL_GRAD)
    for load, grad in others.items():
        found[load] = op("add", found[load], grad) if load in found else grad
    return list(found.items())


def of_total(spec: AttentionSpec) -> Expr:
    """What each pair adds to the gradient of the row's total."""
    assert spec.total is not None
    return gradients(spec.score, SCORE_GRAD)[spec.total.read_by(spec.score)]


def _extra(spec: AttentionSpec, source: Input) -> Target:
    places, name = source.index, f"d{source.name}"
    rows, keys = (any(place.has(axis) for place in places) for axis in (ROW, KEY))
    if rows and keys:
        return _per_pair(spec, source, name)
    if keys:
        return Target(source, Input(name, (*spec.batch, KEY), torch.float32), KEYS, direct=False)
    if rows:
        return Target(source, Input(name, (*spec.batch, ROW), torch.float32), ROWS, direct=False)
    return Target(source, Input(name, (*spec.batch,), torch.float32), HEAD, direct=False)


def _per_pair(spec: AttentionSpec, source: Input, name: str) -> Target:
    plain = {place for place in source.index if isinstance(place, Axis)}
    if plain >= {ROW, KEY, *spec.batch} and len(source.index) == len(plain):
        return Target(source, replace(source, name=name), PAIR, dense=spec.mask == TRUE)
    moving = [place for place in source.index if place.has(ROW, KEY)]
    place = Input(name, source.index, torch.float32)
    if len(moving) == 2 and plain >= {ROW, KEY}:
        return Target(source, place, PAIR, shared=True)
    return Target(source, place, SCATTERED if diagonal_of(source) is None else DIAGONAL, shared=True)


def diagonal_of(source: Input) -> int | None:
    """The dimension along which ``source`` has an entry for each diagonal, keys minus queries, if it is such a table."""
    moving = [dim for dim, place in enumerate(source.index) if place.has(ROW, KEY)]
    if len(moving) == 1 and not sp.expand(source.index[moving[0]] - KEY + ROW).has(ROW, KEY):
        return moving[0]
    return None


def _redo(spec: AttentionSpec) -> Redo | None:
    if not spec.softmax:
        return None
    if spec.whole is not None and spec.redo_below is not None:
        return Redo(spec.whole, spec.redo_below)
    if loads_over_keys(spec.score):
        masked = op("where", spec.mask, spec.score, Const(float("-inf"))) if spec.mask != TRUE else spec.score
        return Redo(masked, INEXACT)
    return None


# ------------------------------------------------------------------------------------------------------------ mirrored

_SWAP = {ROW: KEY, KEY: ROW, ROW.extent: KEY.extent, KEY.extent: ROW.extent}
_OWN = {each.source: each for each in (SCORE, SCORE_GRAD, WEIGHT_GRAD)}


def mirrored(expr: Expr) -> Expr:
    """``expr`` with rows and keys exchanged, for a kernel whose rows are keys."""

    def own(node: Expr) -> Expr | None:
        return _OWN.get(node.source) if isinstance(node, Load) else None

    return transform(substitute(expr, _SWAP), own)


def mirrored_input(source: Input) -> Input:
    return replace(source, index=tuple(place.xreplace(_SWAP) for place in source.index))


def mirrored_spec(spec: AttentionSpec) -> AttentionSpec:
    """The score program of ``spec`` with rows and keys exchanged, and its operands with it."""
    return replace(
        spec,
        score=mirrored(spec.score),
        mask=mirrored(spec.mask),
        gain=mirrored(spec.gain),
        total=spec.total and replace(spec.total, weight=mirrored(spec.total.weight)),
        query=mirrored_input(spec.keys),
        keys=mirrored_input(spec.query),
        values=mirrored_input(spec.values),
        extras=tuple(map(mirrored_input, spec.extras)),
    )


# -------------------------------------------------------------------------------------------------------- what is left


def suits(plan: Backward, inputs: Sequence[Tensor]) -> bool:
    """Whether the kernels can take such inputs: all groups of heads that share keys are of one size."""
    grouped = [(axis, by) for axis, by in plan.members if by]
    sizes = blockwise.sizes_of(plan.spec, inputs) if grouped else {}
    return not any(sizes[axis] % by for axis, by in grouped)


def finish(
    plan: Backward,
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    buffers: Sequence[Tensor | None],
    lse: Tensor,
    delta: Tensor,
) -> list[Tensor | None]:
    """The gradient of each needed input, from the buffers of ``plan.targets`` that the kernels filled.

    A buffer is None where no gradient is needed. ``lse`` and ``delta`` (the product of a row's result and its gradient) are
    those of the queries, ``[*batch, i]``.
    """
    spec = plan.spec
    made = {target.source.name: (target, buffer) for target, buffer in zip(plan.targets, buffers, strict=True)}
    grads: list[Tensor | None] = []
    for source, tensor, wanted in zip(spec.inputs, inputs, needed, strict=True):
        if not wanted:
            grads.append(None)
            continue
        target, buffer = made.get(source.name, (None, None))
        parts = [] if target is None or buffer is None else [_gathered(spec, target, buffer, tensor, inputs)]
        parts += _of_sinks(spec, source, inputs, lse, delta)
        grads.append(sum(parts[1:], parts[0]).to(tensor.dtype) if parts else torch.zeros_like(tensor))
    return grads


def _gathered(spec: AttentionSpec, target: Target, buffer: Tensor, tensor: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The gradient of ``tensor`` from that of what was read of it, per position of ``target.place``."""
    if target.direct or target.shared:
        return buffer
    sizes = blockwise.sizes_of(spec, inputs)
    leaf = tensor.detach().float().requires_grad_()
    axes = target.place.index
    with compat.differentiable():
        if target.kind == PAIR:
            read = blockwise.arranged(target.source, leaf, axes, sizes)
        else:
            read = _evaluated(spec, {target.source.name: leaf}, sizes)(_load(target.source))
            read = _without_others(read, (*spec.batch, ROW, KEY), axes)
        read = torch.broadcast_to(read, buffer.shape)
    (grad,) = torch.autograd.grad(read, leaf, buffer)
    return grad


def _without_others(read: Tensor, axes: tuple[Axis, ...], kept: tuple[sp.Expr, ...]) -> Tensor:
    """``read``, which broadcasts over ``axes``, without the dimensions of those that are not kept: they are one."""
    read = read.reshape([*[1] * (len(axes) - read.dim()), *read.shape])
    return read.squeeze([k for k, axis in enumerate(axes) if axis not in kept])


def _load(source: Input) -> Load:
    return Load(source.name, tuple(Int(place) for place in source.index))


def _evaluated(spec: AttentionSpec, tensors: dict[str, Tensor], sizes: dict[Axis, int]) -> Evaluator:
    """Over ``[*batch, i, j]``, for what does not depend on both ``i`` and ``j``."""
    device = next(iter(tensors.values())).device
    count = len(spec.batch) + 2
    positions: dict[sp.Symbol, Tensor | int] = {}
    for place, axis in enumerate((*spec.batch, ROW, KEY)):
        shape = [1] * count
        shape[place] = -1
        positions[axis] = torch.arange(sizes[axis], device=device).reshape(shape)
    positions.update({axis.extent: size for axis, size in sizes.items()})
    return Evaluator(positions, tensors.__getitem__, dtype=torch.float32, device=device)


def _of_sinks(
    spec: AttentionSpec, source: Input, inputs: Sequence[Tensor], lse: Tensor, delta: Tensor
) -> list[Tensor]:
    """A sink takes a share of each row's weight and gives nothing for it."""
    name = source.name
    sinks = [sink for sink in spec.sinks if any(isinstance(n, Load) and n.source == name for n in sink.walk())]
    if not sinks:
        return []
    sizes = blockwise.sizes_of(spec, inputs)
    tensors = {x.name: t.detach() for x, t in zip(spec.inputs[3:], inputs[3:], strict=True)}
    leaf = tensors[name].requires_grad_()
    parts: list[Tensor] = []
    for sink in sinks:
        with compat.differentiable():
            value = _evaluated(spec, tensors, sizes)(sink)
            value = torch.broadcast_to(value, [*lse.shape, 1])
        share = -torch.exp(value.detach() - lse.unsqueeze(-1)) * delta.unsqueeze(-1)
        share = torch.where(value.detach() == -torch.inf, 0.0, share)
        parts += torch.autograd.grad(value, leaf, share.to(value.dtype))
    return parts
