"""The holes of ``portable_fwd.py.jinja``: plain Triton, for every GPU and for the interpreter."""

from __future__ import annotations

from typing import Any

from attngen import lost
from attngen.bounds import Bounds, loop_bounds
from attngen.layout import addresses
from attngen.mask import derive
from attngen.philox import ROUNDS
from attngen.printer import LOG2E, Printer, bare
from attngen.scores import gain_of, holes_of_spec, in_units, score_lines, sink_values, tanh_of
from attngen.spec import AttentionSpec, Tile

MIN_DOT = 16  # the smallest side of a tensor-core product


def holes(spec: AttentionSpec, tile: Tile, l2_bytes: int, sms: int) -> dict[str, Any]:
    """What fills the template. Raises ``Unprintable``."""
    cover = derive(spec.mask)
    printer = Printer(spec)
    scale, shaped, natural = in_units(spec)
    score = score_lines(printer, spec, scale, shaped, natural)
    sinks = sink_values(printer, spec.sinks, natural)
    whole, left = _whole(printer, spec), lost.floor(spec) is not None  # other kernels may leave rows to this one
    bounds = loop_bounds(printer, cover, tile.warps)
    where = addresses(spec, printer)
    common = holes_of_spec(spec, cover, l2_bytes)
    unit = [f"scale = {scale!r}  # scores times this are in base 2, as the running maximum is"] if score["times"] else []
    return {
        "tile": tile,
        "helpers": helpers_of(printer, bounds),
        "score": score,
        "whole": whole,
        "left": left,
        "prologue": [*unit, *printer.prologue],
        "bounds": bounds,
        "sink_lines": sink_lines(sinks, f" * {LOG2E!r}" if natural else ""),
        "order_comment": "Rows with most keys go first." if common["heavy_first"] else "Tiles of one head are neighbours.",
        **products_of(spec),
        **where,
        **common,
        **(_flagged(common) if left else {}),
    }


def helpers_of(printer: Printer, bounds: Bounds) -> dict[str, Any]:
    """Which functions of ``portable_helpers.jinja`` the printed text calls."""
    return {
        "tanh": tanh_of(printer.spec) if printer.uses_tanh else "",
        "floor_div": printer.uses_floor_div,
        "drowned": printer.uses_drowned,
        "rounded": printer.uses_rounded,
        "random": ROUNDS if printer.uses_random else "",
        "random_block": ROUNDS if printer.uses_random_block else "",
        "longer": bounds.compares,
    }


def products_of(spec: AttentionSpec) -> dict[str, Any]:
    """The sides of products, powers of two, and their precision."""
    block_d, block_e = (max(MIN_DOT, 1 << (n - 1).bit_length()) for n in (spec.head_dim, spec.value_dim))
    return {
        "precision": "" if spec.query.dtype.itemsize < 4 else f', input_precision="{"tf32" if spec.tf32 else "ieee"}"',
        "block_d": block_d,
        "block_e": block_e,
        "d_ragged": block_d != spec.head_dim,
        "e_ragged": block_e != spec.value_dim,
    }


def _whole(printer: Printer, spec: AttentionSpec) -> dict[str, Any] | None:
    if spec.whole is None or spec.redo_below is None:
        return None
    sinks = sink_values(printer, spec.sinks, natural=True)
    fma = spec.query.dtype.itemsize == 4 and not spec.tf32  # without stages its keys would wait in registers
    return {
        "stages": 2 if fma else 1,
        "score": bare(printer.value(spec.whole, masked=True)),
        "gain": gain_of(printer, spec, True),
        "reads": printer.blocks(),
        "below": repr(spec.redo_below),
        "sink_lines": sink_lines(sinks, f" * {LOG2E!r}"),
    }


def _flagged(common: dict[str, Any]) -> dict[str, Any]:
    """What more the kernel is called with: flags of rows, or any tensor where it computes all rows."""
    call = "out if only is None else only"
    return {"tensors": [*common["tensors"], "only_ptr"], "call_tensors": [*common["call_tensors"], call]}


def sink_lines(sinks: list[str], times: str) -> list[str]:
    lines = [f"row_max = tl.maximum(row_max, {sink})" for sink in sinks]
    for sink in sinks:
        weight = f"tl.exp2(({sink} - row_max){times})" if times else f"tl.exp2({sink} - row_max)"
        lines.append(f'row_sum = row_sum + tl.where({sink} > float("-inf"), {weight}, 0.0)')
    return lines
