"""What scores and masks load for each query, as 32-bit words that a kernel writes down before the products of a backward.

A program of the hopper backward holds keys, and every thread has some of each of the queries of a block: by pointers it would
load every value of the block, and hold addresses for that. So the words of a block come by TMA, with its queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attngen.algebra import Expr, Load
from attngen.gluon import gluon
from attngen.gradient import mirrored
from attngen.layout import base_of, used_dims
from attngen.printer import Places, Printer
from attngen.spec import KEY, ROW, AttentionSpec

_PLACES = Places(row="rows", row_beside="")


@dataclass(frozen=True)
class Column:
    """A value for each query. ``load`` is in mirrored words, where queries are keys; ``first`` is the number of its word."""

    load: Load
    words: int
    first: int

    @property
    def text(self) -> str:
        """The value for the queries of a block, ``[1, BLOCK_J]``, of whose words the first is number ``place``."""
        word = f"word(data_smem, place + {self.first})"
        if self.load.kind == "bool":
            return f"({word} != 0)"
        if self.load.kind == "float":
            return f"{word}.to(tl.float32, bitcast=True)"
        return word if self.words == 1 else f"whole({word}, word(data_smem, place + {self.first + 1}))"

    def stored(self, value: str) -> list[str]:
        """Its words, where ``value`` is the variable of the kernel that writes them."""
        if self.load.kind == "float":
            return [f"{value}.to(gl.int32, bitcast=True)"]
        low = f"{value}.to(gl.int32)"
        return [low] if self.words == 1 else [low, f"({value} >> 32).to(gl.int32)"]


def columns_of(turned: AttentionSpec, *exprs: Expr) -> tuple[Column, ...]:
    """What ``exprs`` of a mirrored spec load for each query."""
    found = dict.fromkeys(node for e in exprs for node in e.walk() if isinstance(node, Load) and KEY in node.axes)
    widths = {x.name: x.dtype.itemsize for x in turned.extras}
    columns: list[Column] = []
    for load in found:
        if load.source in widths and ROW not in load.axes:
            words = 2 if load.kind == "int" and widths[load.source] == 8 else 1
            columns.append(Column(load, words, sum(each.words for each in columns)))
    return tuple(columns)


def written(spec: AttentionSpec, columns: tuple[Column, ...]) -> dict[str, Any]:
    """How the kernel that goes over the queries writes the words of ``columns``; it goes by the words of ``spec`` itself."""
    printer = Printer(spec, _PLACES)
    values = [printer.hoisted(mirrored(column.load)) for column in columns]
    names = {column.load.source for column in columns}
    sources = [x for x in spec.extras if x.name in names]
    strides = [(x.name, dim) for x in sources for dim in used_dims(x)]
    lines = [*(base_of(x, printer) for x in sources), *printer.prologue]
    return {
        "count": sum(column.words for column in columns),
        "whole": any(column.words > 1 for column in columns),
        "lines": list(map(gluon, lines)),
        "words": [word for column, value in zip(columns, values, strict=True) for word in column.stored(value)],
        "arguments": [*(f"{x.name}_ptr" for x in sources), *(f"{name}_stride_{dim}" for name, dim in strides)],
        "call": [*(x.name for x in sources), *(f"{name}.stride({dim})" for name, dim in strides)],
        "sizes": ["size_j"] if any("size_j" in line for line in lines) else [],  # beside those of a row
        "floor_div": printer.uses_floor_div,
    }
