"""Bounds that come from data, found by a kernel of their own that runs before the attention of the hopper family.

What it finds is the same for all heads that read the same data, and to look at every key takes one warp that loads much
longer than a tile has. So one program for each tile of queries, and place of the data, writes the tile's blocks down.
"""

from __future__ import annotations

from typing import Any

from attngen.algebra import Load
from attngen.bounds import Bounds, loop_bounds
from attngen.index import Axis
from attngen.inequalities import Datum
from attngen.layout import base_of, unpacked, used_dims
from attngen.mask import Cover
from attngen.printer import Printer
from attngen.spec import AttentionSpec, Input, Tile

WARPS = 4


def data_of(cover: Cover) -> list[Datum]:
    return [each for interval in (*cover.visit, *cover.partial) for each in interval.data]


def finder(spec: AttentionSpec, cover: Cover, tile: Tile) -> tuple[Bounds, dict[str, Any]] | None:
    """The bounds in plain Triton, and what else fills the kernel that finds them; None if no data bounds the keys."""
    data = data_of(cover)
    if not data:
        return None
    printer = Printer(spec)
    bounds = loop_bounds(printer, cover, WARPS)
    sources = _sources(spec, data)
    axes = [axis for axis in spec.batch if any(place.has(axis) for x in sources for place in x.index)]
    strides = [(x.name, dim) for x in sources for dim in used_dims(x)]
    return bounds, {
        "warps": WARPS,
        "arguments": [*(f"{x.name}_ptr" for x in sources), *(f"{name}_stride_{dim}" for name, dim in strides)],
        "call": [*(x.name for x in sources), *(f"{name}.stride({dim})" for name, dim in strides)],
        "times": "".join(f" * size_{axis.name}" for axis in axes),
        "unpack": unpacked(axes),
        "place": f"({numbered(axes)})" if len(axes) > 1 else numbered(axes) or "0",
        "width": 1 << (tile.rows - 1).bit_length(),  # rows that are looked at together
        "prologue": [*(base_of(x, printer) for x in sources), *printer.prologue],
        "floor_div": printer.uses_floor_div,
    }


def _sources(spec: AttentionSpec, data: list[Datum]) -> list[Input]:
    names = {node.source for each in data for node in each.expr.walk() if isinstance(node, Load)}
    return [x for x in spec.extras if x.name in names]


def numbered(axes: list[Axis]) -> str:
    """The number of a place along ``axes``, of which the last changes fastest, from its positions; empty without axes."""
    text = ""
    for axis in axes:
        outer = f"({text})" if " " in text else text
        text = f"{outer} * size_{axis.name} + {axis.name}" if text else axis.name
    return text
