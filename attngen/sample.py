"""Tensors like recorded ones, as code: random floating point, and small integers and truth values as they were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attngen import compat

READ = 1 << 20  # elements of a recorded tensor that are looked at
RUNS = 48  # runs of equal numbers that are written down
FEW = 4  # distinct numbers of a recorded tensor in floating point that is a mask

HELPERS = {
    "laid_out": '''\
def laid_out(values, strides):
    """The same values in memory with these strides."""
    stored = [1 if stride == 0 else size for size, stride in zip(values.shape, strides)]
    held = torch.empty_strided(stored, strides, dtype=values.dtype, device=values.device)
    return held.copy_(values[tuple(slice(size) for size in stored)]).expand(values.shape)
''',
    "runs": '''\
def runs(shape, values, counts, dtype):
    """Each of the values as often as its count says, in order."""
    return torch.tensor(values, dtype=dtype).repeat_interleave(torch.tensor(counts)).reshape(shape).to(DEVICE)
''',
}


def helpers(texts: Sequence[str]) -> list[str]:
    """The functions that the texts call."""
    return [code for name, code in HELPERS.items() if any(f"{name}(" in text for text in texts)]


def text(like: Tensor, recorded: Any = None) -> str:
    """An expression for a tensor of the shape, strides and dtype of ``like``; ``recorded`` is what it was, if known."""
    shape = tuple(compat.hint(size) for size in like.shape)
    strides = tuple(compat.hint(stride) for stride in like.stride())
    values = _recorded(recorded, shape, like.dtype) or _random(recorded, shape, like.dtype)
    dense = torch.empty(shape, device="meta").stride()
    apart = any(n > 1 and s != d for n, s, d in zip(shape, strides, dense, strict=True))
    return f"laid_out({values}, {strides})" if apart and not _overlaps(shape, strides) else values


def _recorded(value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """The values themselves, if they are known and short to write."""
    if not _is_known(value, shape):
        return ""
    flat = value.detach().cpu().flatten()
    if dtype.is_floating_point and (isinstance(value, torch.nn.Parameter) or _distinct(flat) > FEW) and flat.numel() > 1:
        return ""
    values, counts = torch.unique_consecutive(flat, return_counts=True)
    if len(values) == 1:
        return f"torch.full({shape}, {_number(values[0].item())}, dtype={dtype}, device=DEVICE)"
    if len(values) > RUNS:
        return _counting(flat, shape, dtype)
    listed = ", ".join(_number(v) for v in values.tolist())
    return f"runs({shape}, [{listed}], {counts.tolist()}, {dtype})"


def _counting(flat: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Positions: each row counts up by one from the same number."""
    length, first = shape[-1], int(flat[0])
    if dtype.is_floating_point or dtype == torch.bool:
        return ""
    row = torch.arange(first, first + length, dtype=dtype)
    if not torch.equal(flat.reshape(-1, length), row.expand(flat.numel() // length, length)):
        return ""
    return f"torch.arange({first}, {first + length}, dtype={dtype}, device=DEVICE).repeat({(*shape[:-1], 1)})"


def _random(value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return f"(torch.rand({shape}, generator=generator) < 0.75).to(DEVICE)"
    if dtype.is_floating_point or dtype.is_complex:
        return f"torch.randn({shape}, generator=generator).to(DEVICE, {dtype})"
    known = _is_known(value, shape)
    low, high = (int(value.min()), int(value.max())) if known else (0, 1)
    return f"torch.randint({low}, {high + 1}, {shape}, generator=generator).to(DEVICE, {dtype})"


def _is_known(value: Any, shape: tuple[int, ...]) -> bool:
    if not isinstance(value, Tensor) or isinstance(value, compat.FakeTensor) or value.device.type == "meta":
        return False
    return tuple(value.shape) == shape and 0 < value.numel() <= READ


def _distinct(flat: Tensor) -> int:
    return int(torch.unique(flat).numel())


def _number(value: float | bool) -> str:
    return repr(value) if isinstance(value, bool) or math.isfinite(value) else f'float("{value}")'


def _overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Two positions may be one place in memory, not counting dimensions of stride zero."""
    reach = 0
    for stride, size in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n > 1 and s):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
