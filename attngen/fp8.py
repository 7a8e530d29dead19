"""Attention whose products are of 8-bit numbers (e4m3): what that changes of the hopper family, and what it may cost.

A kernel of its own writes queries, keys and values in 8 bits before the attention reads them; groups of 64 queries and blocks
of keys share a scale. Those of queries and keys are one factor of all scores of a step, which the exponent's fused
multiply-add takes as it takes the softmax's own. Results are in units of the values that are added next: the factor that a
new maximum asks for moves them there. So scales cost nothing for each pair.

Products of sm_90 take 8-bit operands with neighbours along what is summed up, so values are written feature by feature. A
thread of a product takes four weights side by side of a row, and the product before left it two and two: values lie in an
order of keys (``templates/fp8_weights.jinja``) in which no weight has to move.

With "rotate", features of queries and keys are multiplied by a random-sign Hadamard matrix, which no score notices. An
outlier, whose error is as large as itself, becomes many small numbers (arXiv 2307.13304; for attention arXiv 2407.08608).

Rounding to e4m3 loses up to 2**-4 of a number. Tensor cores add such products up in about 14 bits (arXiv 2412.19437), far
less of a loss over the features of a head or the keys of a block. But what each addition cuts off is towards zero: of a sum
that grew steadily over 16,384 keys 18 % was missing on an H200 (heads of 256; tests/test_gpu_fp8.py). So each block is
multiplied ``apart`` and added to the result in float32, by the multiplication that moves it: 0.003 % was missing (heads of
128). That takes as many registers again as results have; where there are not so many (``_apart``) tensor cores add all keys
up, if these are few.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attngen.algebra import TRUE, Op
from attngen.printer import Printer, fixed_dims
from attngen.scores import scaled_score
from attngen.spec import SCORE, AttentionSpec, Tile

OFF, BLOCK, ROTATE = "off", "block", "rotate"
DTYPE = "gl.float8e4nv"
DEPTH = 32  # of one instruction that multiplies 8-bit numbers; of others it is 16
LARGEST = 448.0  # of e4m3
SPREAD = 8  # weights of at most one are times 2 to this in 8 bits: numbers below 2**-6 have fewer digits
LEAST = 2.0**-50  # that a scale is made for: products of two must not vanish in float32
SMALLEST_HEAD = 64
COMPARISONS = ("le", "lt", "ge", "gt")
MOST_ADDED = 1024  # keys that tensor cores add up: what is cut off grows with their number, to about 1 %
MOST_APART = 128  # features of results that registers of two warpgroups have room for twice
GROUP_ROWS = 64  # queries of a warpgroup, which share a scale
TURN = 128  # features that are rotated together, or all of a smaller head
WARPS = 8  # of the kernel that writes operands in 8 bits
_USUAL: dict[str, Any] = {
    "fp8": False, "apart": False, "depth": 16, "width": 2, "scales": [], "scale_values": [], "scale_strides": [],
    "quantised": [], "unaddressed": ("out",),
}  # fmt: skip


def unsuited(spec: AttentionSpec) -> str | None:
    """Why products of 8-bit numbers cannot take the place of those in ``spec``, if so, beside what the family cannot take."""
    if not spec.softmax:
        return "weights that are not normalised may be of any size"
    if spec.lse:
        return "gradients are asked for"
    if spec.whole is not None:
        return "rows may have to be computed again with the model's own fill value"
    if min(spec.head_dim, spec.value_dim) < SMALLEST_HEAD:
        return f"heads have fewer than {SMALLEST_HEAD} features"
    return None


# ------------------------------------------------------------------------------------------------------------- in torch


def rounded(x: Tensor) -> Tensor:
    """``x`` as 8 bits tell it, with a scale for each head: what a plain model would multiply."""
    scale = x.abs().amax((-2, -1), keepdim=True).clamp_min(LEAST) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def weighed(weights: Tensor) -> Tensor:
    """Normalised ``weights`` whose exponentials have been rounded to 8 bits, the largest of a row being one."""
    largest = weights.amax(-1, keepdim=True)
    exponentials = (weights / largest * 2**SPREAD).to(torch.float8_e4m3fn).to(weights.dtype)
    return torch.where(weights > 0, exponentials * (largest * 2**-SPREAD), weights)


# ---------------------------------------------------------------------------------------------------------------- holes


def holes(spec: AttentionSpec, tile: Tile, copied: dict[str, Any], printer: Printer) -> dict[str, Any]:
    """What fills the parts of the template that are about 8-bit numbers, in place of what ``copied`` says of 16-bit ones."""
    if not spec.fp8:
        return _USUAL
    operands = {"q": spec.query, "k": spec.keys, "v": spec.values}
    outer = {name: [printer.index(place) for _, place in fixed_dims(source)] for name, source in operands.items()}
    dims = [(name, dim) for name, texts in outer.items() for dim in range(len(texts))]
    strides = [f"{name}_scale_stride_{dim}" for name, dim in dims]
    boxes = [_coded(box) if box["tensor"] in operands else box for box in copied["boxes"]]
    return {
        "fp8": True,
        "depth": DEPTH,
        "width": 1,
        "kv_bytes_per_key": copied["d_pieces"][0].width + copied["e_pieces"][0].width,
        "apart": _apart(spec, tile, copied["e_pieces"][0].width),
        "rotated": spec.fp8 == ROTATE,
        "turn": TURN,
        "largest": LARGEST,
        "inverse_largest": repr(1 / LARGEST),
        "least": repr(LEAST),
        "spread": float(SPREAD),
        "boxes": boxes,
        "dims": {**copied["dims"], **{f"{name}_codes": list(range(len(texts) + 2)) for name, texts in outer.items()}},
        "sides": {box["name"]: "".join(f", {side}" for side in box["box"]) for box in boxes},
        "places": {**copied["places"], "v": ", ".join([*outer["v"], "0, value_key"])},
        "scale_places": {
            name: " + ".join(f"({text}) * {name}_scale_stride_{dim}" for dim, text in enumerate(texts)) or "0"
            for name, texts in outer.items()
        },
        "scale_strides": strides,
        "scales": [*(f"{name}_scale_ptr" for name in operands), *strides],
        "scale_values": [*(f"{name}_scale" for name in operands), *(f"{name}_scale.stride({dim})" for name, dim in dims)],
        "quantised": [_quantised(name, spec, tile, copied) for name in operands],
        "unaddressed": ("out", *operands, *(f"{name}_codes" for name in operands)),
    }


def inexact(spec: AttentionSpec, tile: Tile, features: int, keys: int) -> str | None:
    """Why a kernel of that tile loses too much of a sum over so many keys, if so; ``features`` of a result's first part."""
    if not spec.fp8 or keys <= MOST_ADDED or _apart(spec, tile, features):
        return None
    return f"would add up {keys} keys in tensor cores, which lose too much of 8-bit products of more than {MOST_ADDED}"


def _apart(spec: AttentionSpec, tile: Tile, features: int) -> bool:
    """Whether registers have room for the results of a block beside those of all: where two warpgroups take nothing but
    products, scaled and with no more of a mask than one comparison. All else was compiled, and spills some."""
    plain = not spec.extras and scaled_score(spec.score)[1] == SCORE
    bare = spec.mask == TRUE or (isinstance(spec.mask, Op) and spec.mask.name in COMPARISONS)
    return tile.rows == 2 * GROUP_ROWS and features <= MOST_APART and plain and bare


def _coded(box: dict[str, Any]) -> dict[str, Any]:
    """The box of an operand in 8 bits; of values, neighbours are keys."""
    *outer, rows, width = box["box"]
    sides = (width, rows) if box["tensor"] == "v" else (rows, width)
    return {**box, "tensor": f"{box['tensor']}_codes", "box": [*outer, *sides], "dtype": DTYPE}


def _quantised(name: str, spec: AttentionSpec, tile: Tile, copied: dict[str, Any]) -> dict[str, Any]:
    """What ``quantising`` is called with for an operand. Tiles have groups of queries past the end, with scales too."""
    of_queries = f"triton.cdiv(size_i, {tile.rows}) * {tile.rows // GROUP_ROWS}"
    return {
        "name": name,
        "dims": copied["dims"][name],
        "rows": GROUP_ROWS if name == "q" else tile.keys,
        "blocks": of_queries if name == "q" else f"triton.cdiv(size_j, {tile.keys})",
        "held": copied["e_pieces" if name == "v" else "d_pieces"][0].width,
        "rotated": spec.fp8 == ROTATE and name != "v",
        "by_feature": name == "v",
        "warps": WARPS,
    }
