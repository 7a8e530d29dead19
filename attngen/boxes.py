"""What the hopper family copies by TMA: a box at a time, heads in pieces.

Blocks of Triton's are powers of two wide. A head that is none is held in pieces that are, its binary digits, each with a
box and a buffer of its own: 192 features are 128 and 64. A product over the features of queries and keys adds up over the
pieces; values and results have one product for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attngen.gluon import DTYPES, box_dims
from attngen.printer import Printer, fixed_dims
from attngen.spec import FEATURE, INNER, KEY, ROW, AttentionSpec, Input, Tile

WARPGROUP_ROWS = 64
NARROWEST = 64  # features of a head that is one piece
DEPTH = 16  # of one instruction that multiplies: pieces are multiples of it
# Pieces of a head: those of queries and keys share one result. Values have one for each, in registers: three were compiled,
# and products then wait for each other (Triton 3.9). A head of more pieces is held in the next size that has so few.
MAX_PIECES, MAX_RESULTS = 3, 2
OUT_WIDTH = 128  # features of a row that wait in shared memory to be written; half of that for heads in pieces
PLANE_DTYPES = {**DTYPES, torch.float32: "gl.float32"}


@dataclass(frozen=True)
class Piece:
    """Features ``start .. start + width`` of a head, ``part`` of which wait together to be written. What belongs to it
    has ``suffix`` in its name."""

    start: int
    width: int
    part: int = 0

    @property
    def suffix(self) -> str:
        return f"_{self.start}" if self.start else ""


def widths(features: int, most: int) -> list[int]:
    """Of the pieces in which so many features are held, widest first."""
    whole = max(NARROWEST, -(-features // DEPTH) * DEPTH)
    while whole.bit_count() > most:
        whole += whole & -whole
    return [1 << place for place in reversed(range(whole.bit_length())) if whole >> place & 1]


def pieces(spec: AttentionSpec) -> list[Piece]:
    """Of the features of queries and keys."""
    each = widths(spec.head_dim, 1 if spec.fp8 else MAX_PIECES)
    return [Piece(sum(each[:k]), width) for k, width in enumerate(each)]


def results(spec: AttentionSpec) -> list[Piece]:
    """Of the features of values. Where either head is in pieces, less of a row waits: its buffers fill the rest."""
    each = widths(spec.value_dim, 1 if spec.fp8 else MAX_RESULTS)
    waiting = OUT_WIDTH if len(each) == len(pieces(spec)) == 1 else OUT_WIDTH // 2
    return [Piece(sum(each[:k]), width, min(width, max(waiting, width // 2))) for k, width in enumerate(each)]


def held(each: list[Piece]) -> int:
    """The features that pieces have room for."""
    return sum(piece.width for piece in each)


def planes(spec: AttentionSpec) -> tuple[Input, ...]:
    """Inputs of the score that have a number for each pair, which TMA copies block by block."""
    return tuple(x for x in spec.extras if x.dim_of(KEY) is not None and any(place.has(ROW) for place in x.index))


def operands(spec: AttentionSpec) -> list[tuple[Input, Any, Any]]:
    """What is copied, with what its rows and its neighbours are."""
    out = Input("out", spec.output, spec.out_dtype)
    loaded = [(plane, ROW, KEY) for plane in planes(spec)]
    return [(spec.query, ROW, INNER), (spec.keys, KEY, INNER), (spec.values, KEY, FEATURE), *loaded, (out, ROW, FEATURE)]


def holes(spec: AttentionSpec, tile: Tile, printer: Printer) -> dict[str, Any]:
    """What TMA copies for each operand: which dimensions, how much of them, and from where."""
    inner, features = pieces(spec), results(spec)
    shapes = {
        "q": (WARPGROUP_ROWS, {f"q{p.suffix}": p.width for p in inner}),
        "k": (tile.keys, {f"k{p.suffix}": p.width for p in inner}),
        "v": (tile.keys, {f"v{p.suffix}": p.width for p in features}),
        **{x.name: (WARPGROUP_ROWS, {x.name: tile.keys}) for x in planes(spec)},
        "out": (WARPGROUP_ROWS, {f"out{p.suffix}": p.part for p in features}),
    }
    dims, boxes, places = {}, [], {}
    for (role, (rows, wide)), operand in zip(shapes.items(), operands(spec), strict=True):
        source, row, _ = operand
        outer = [printer.index(place) for _, place in fixed_dims(source)]
        dims[source.name] = box_dims(*operand)
        at = {"k": "key", "v": "value_key"}.get(role, "key" if row == KEY else "row")
        places[role] = ", ".join([*outer, at])
        boxes += [
            {
                "name": name,
                "tensor": source.name,
                "box": [*[1] * len(outer), rows, width],
                "dtype": PLANE_DTYPES[source.dtype],
            }
            for name, width in wide.items()
        ]
    loaded = [name for role in "qkv" for name in shapes[role][1]]
    return {
        "d_pieces": inner,
        "e_pieces": features,
        "dims": dims,
        "boxes": boxes,
        "sides": {box["name"]: "".join(f", {side}" for side in box["box"]) for box in boxes},
        "places": places,
        "loaded": loaded,
        "written": list(shapes["out"][1]),
    }
