"""What a Gluon kernel holds in registers, for the simulator: blocks of numbers as numpy arrays, and what is done to them.

Types narrower than 32 bits are float32 whose values have been rounded. Whole numbers may have more bits than on a GPU.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

NARROW = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float8e4nv": torch.float8_e4m3fn}
LARGEST = 448.0  # of 8-bit numbers, as which larger ones are rounded to on a GPU


class Block(np.ndarray):
    """Values in registers."""

    type = types.SimpleNamespace(layout=None)

    def to(self, dtype: Any, bitcast: bool = False) -> Block:
        return block(reinterpreted(self, dtype) if bitcast else rounded(self, dtype))

    def permute(self, order: Sequence[int]) -> Block:
        return block(self.transpose(order))

    def split(self) -> tuple[Block, Block]:
        return block(self[..., 0]), block(self[..., 1])


class Scalar(int):
    """A whole number that is the same for all threads."""

    def to(self, dtype: Any) -> Any:
        return float(self) if dtype == "float32" else self


def _closed(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def apply(*args: Any) -> Any:
        result = plain(*args)
        return Scalar(result) if type(result) is int else result

    return apply


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "neg"):
    setattr(Scalar, f"__{_name}__", _closed(f"__{_name}__"))


def block(values: Any) -> Block:
    return np.asarray(values).view(Block)


def reinterpreted(values: np.ndarray, dtype: str) -> np.ndarray:
    """The same bits: as floats, which are in 32 bits here, or as whole numbers, which may be in more."""
    if dtype == "bfloat16":
        return (np.asarray(values, np.int32) << 16).view(np.float32)
    bits = np.asarray(values, np.int32) if dtype == "float32" else np.ascontiguousarray(values)
    found = bits.view(dtype)
    return found if found.dtype.kind == "i" else found.astype(np.float32)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype in NARROW:  # products of such numbers are exact in 32 bits
        return torch.from_numpy(np.array(values, np.float32)).to(NARROW[dtype]).float().numpy()
    return np.asarray(values).astype(dtype)


def numeric(call: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*values: Any) -> Any:
        result = call(*values)
        if np.ndim(result):
            return block(result)
        return Scalar(result) if np.asarray(result).dtype.kind in "iu" else float(result)

    return apply


def exp2(values: Any) -> Any:
    return np.exp2(np.asarray(values, np.float32))


def reduced(call: Callable[..., Any]) -> Callable[..., Any]:
    def apply(values: Block, axis: int | None = None) -> Any:
        found = call(np.asarray(values), axis=axis)
        if found.ndim:
            return block(found)
        return Scalar(found) if found.dtype.kind in "iu" else found[()]

    return apply


def bits_of(values: np.ndarray, dtype: str) -> np.ndarray:
    """Those of 16-bit floats, from below in 32."""
    kind = getattr(torch, dtype)
    found = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(kind).view(torch.int16)
    return found.numpy().astype(np.int32) & 0xFFFF


def of_bits(words: np.ndarray, dtype: str) -> Block:
    found = torch.from_numpy(words.astype(np.int16)).view(getattr(torch, dtype))
    return block(found.float().numpy())


def largest_pairs(left: np.ndarray, right: np.ndarray, dtype: str) -> Block:
    """Of each two 16-bit floats that share a word with others the larger one, or NaN."""
    halves = [np.maximum(of_bits(left >> part, dtype), of_bits(right >> part, dtype)) for part in (0, 16)]
    low, high = (bits_of(each, dtype) for each in halves)
    return block(low | high << 16)


def bytes_of(values: np.ndarray) -> np.ndarray:
    """The bits of 8-bit floats."""
    found = torch.from_numpy(np.array(values, np.float32)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    return found.numpy().astype(np.int64)


def of_bytes(words: np.ndarray) -> Block:
    found = torch.from_numpy((words & 0xFF).astype(np.uint8)).view(torch.float8_e4m3fn)
    return block(found.float().numpy())


def where(condition: Any, yes: Any, no: Any) -> Any:
    found = np.where(condition, yes, no)
    if not found.ndim:
        return Scalar(found) if found.dtype.kind in "iu" else found[()]
    return block(found.astype(np.float32) if found.dtype.kind == "f" else found)
