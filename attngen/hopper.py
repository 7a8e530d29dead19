"""The holes of ``hopper_fwd.py.jinja``: Gluon, for sm_90, where one warp loads by TMA and warpgroups compute.

What the template cannot express is refused here with a reason; the portable family takes all of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from attngen.algebra import ONE
from attngen.bounds import Bounds, is_plain, loop_bounds
from attngen.gluon import DTYPES, box_dims, gluon, helpers_of
from attngen.index import Axis
from attngen.layout import base_of, unpacked, used_dims
from attngen.mask import derive
from attngen.printer import LOG2E, Places, Printer, Unprintable, bare, fixed_dims
from attngen.scores import holes_of_spec, in_units, kept, sink_values
from attngen.spec import FEATURE, INNER, KEY, ROW, AttentionSpec, Input, Tile

WARPGROUP_ROWS = 64
MAX_SIDE = 256  # of a box that TMA copies, and of a product
MAX_RANK = 5
OUT_WIDTH = 128  # features of a row that wait in shared memory to be written
_PLANE_DTYPES = {**DTYPES, torch.float32: "gl.float32"}
_PLACES = Places(row="rows", key="cols", row_beside="", key_beside="", key_float="col_floats")


# Of a thread of the warpgroups that compute, of the warp that loads, and as the kernel is launched.
_REGISTERS = {2: (232, 40, 168), 3: (160, 32, 128)}


def registers(tile: Tile) -> int:
    """Registers of a thread that computes."""
    return _REGISTERS[tile.rows // WARPGROUP_ROWS][0]


def padded(features: int) -> int:
    """The width at which the template holds so many features: the narrowest that its swizzled buffers have."""
    return max(WARPGROUP_ROWS, 1 << (features - 1).bit_length())


def queries_held(spec: AttentionSpec, tile: Tile) -> int:
    """Tiles of queries in shared memory: a program that stays loads the next one early, if there is room."""
    return 2 if tile.persistent and padded(spec.head_dim) <= OUT_WIDTH and not planes(spec) else 1


def planes(spec: AttentionSpec) -> tuple[Input, ...]:
    """Inputs of the score that have a number for each pair, which TMA copies block by block."""
    return tuple(x for x in spec.extras if x.dim_of(KEY) is not None and any(place.has(ROW) for place in x.index))


@lru_cache(maxsize=4096)  # identical sites share it, and what it derives of the mask
def unsuited(spec: AttentionSpec) -> str | None:
    """Why the template cannot compute ``spec``, if so."""
    if (reason := unfit(spec)) is not None:
        return reason
    if spec.whole is not None:
        return "rows may have to be computed again with the model's own fill value"
    if spec.gain != ONE:
        return "weights are multiplied after softmax"
    if any(sink.axes & {ROW, KEY} for sink in spec.sinks):
        return "its sinks differ from row to row"
    cover = derive(spec.mask)
    if not is_plain(cover) or any(interval.data for interval in (*cover.visit, *cover.partial)):
        return "the keys that matter are known from data, or come in more than one stretch"
    return None


def unfit(spec: AttentionSpec) -> str | None:
    """Why TMA and warpgroups cannot take its operands, if so."""
    if any(x.dtype not in DTYPES for x in (spec.query, spec.keys, spec.values)) or spec.out_dtype not in DTYPES:
        return "TMA and warpgroups take 16-bit operands"
    if len({x.dtype for x in (spec.query, spec.keys, spec.values)}) > 1 or spec.out_dtype != spec.query.dtype:
        return "its operands are of different types"
    if spec.head_dim % 8 or spec.value_dim % 8 or max(spec.head_dim, spec.value_dim) > MAX_SIDE:
        return f"a head size of {spec.head_dim}, {spec.value_dim} for values, is not a multiple of 8 up to {MAX_SIDE}"
    return _unaddressable(spec)


def _unaddressable(spec: AttentionSpec) -> str | None:
    if spec.output[-1] != FEATURE:
        return "features of the result are not neighbours"
    if any(x.dtype not in _PLANE_DTYPES for x in planes(spec)):
        return "a mask is loaded for each pair"
    for source, row, feature in _operands(spec):
        if source.dim_of(row) is None or source.dim_of(feature) is None:
            return f"{source.name} is read at more than plain positions"
        if len(box_dims(source, row, feature)) > MAX_RANK:
            return f"{source.name} has more than {MAX_RANK} dimensions"
    return None


def _operands(spec: AttentionSpec) -> list[tuple[Input, Any, Any]]:
    out = Input("out", spec.output, spec.out_dtype)
    loaded = [(plane, ROW, KEY) for plane in planes(spec)]
    return [(spec.query, ROW, INNER), (spec.keys, KEY, INNER), (spec.values, KEY, FEATURE), *loaded, (out, ROW, FEATURE)]


def misaligned(spec: AttentionSpec, layouts: Sequence[tuple[Sequence[int], int]]) -> str | None:
    """Why TMA cannot address operands with such (strides, offset), in elements, if so; of all inputs, in order."""
    copied = {source.name: (source, row, feature) for source, row, feature in _operands(spec)}
    for each, (strides, offset) in zip(spec.inputs, layouts, strict=True):
        if each.name not in copied:
            continue
        *outer, last = box_dims(*copied[each.name])
        unit = 16 // each.dtype.itemsize
        if strides[last] != 1:
            return f"elements of {each.name} that belong side by side are not"
        if offset % unit or any(strides[dim] % unit or strides[dim] <= 0 for dim in outer):
            return f"rows of {each.name} do not begin at multiples of 16 bytes"
    return None


# -------------------------------------------------------------------------------------------------------------- holes


def holes(spec: AttentionSpec, tile: Tile, l2_bytes: int, sms: int) -> dict[str, Any]:
    """What fills the template. Raises ``Unprintable``."""
    if (reason := unsuited(spec)) is not None:
        raise Unprintable(reason)
    groups = tile.rows // WARPGROUP_ROWS
    block_d, block_e = padded(spec.head_dim), padded(spec.value_dim)
    printer = Printer(spec, _PLACES)
    cover = derive(spec.mask)
    scale, shaped, natural = in_units(spec)
    score = _score(printer, spec, shaped)
    score["natural"], score["times"] = natural, f" * {scale!r}" if scale != 1 and not natural else ""
    sinks = sink_values(printer, spec.sinks, natural)
    bounds = loop_bounds(printer, cover, warps=1)
    common = holes_of_spec(spec, cover, l2_bytes)
    extras = _extras(spec)
    prologue = [*(base_of(x, printer) for x in _pointed(spec)), *printer.prologue]
    names = [line.split(" = ")[0] for line in prologue]
    outer = [a.name for a in spec.batch]
    blocks = [f"{x.name}_block" for x in planes(spec)]
    told = _mentioned([*blocks, *names, *outer, *extras["strides"], *(f"size_{name}" for name in outer)], score)
    return {
        "tile": tile,
        "groups": groups,
        "queries": queries_held(spec, tile),
        "overlap": groups == 2,
        "halvings": (tile.keys // 8).bit_length() - 1,
        "programs": sms,
        "block_d": block_d,
        "block_e": block_e,
        "helpers": helpers_of(printer, score["together"]),
        "score": score,
        "sinks": [sink for sink in sinks if sink.isidentifier()],
        "sink_lines": _sink_lines(sinks, f" * {LOG2E!r}" if natural else ""),
        "unpack_head": unpacked(_order(spec)),
        "head_number": _head_number(spec),
        "sharing": " * ".join(f"size_{a.name}" for a in _order(spec) if not _plane_varies(spec, a)) or "1",
        "planes": [x.name for x in planes(spec)],
        "widths": {x.name: x.dtype.itemsize for x in planes(spec)},
        "prologue": list(map(gluon, prologue)),
        "unpacks": bool(prologue) or not set(told).isdisjoint(outer),
        "values": told,
        "extras": [*extras["pointers"], *extras["strides"]],
        "extra_strides": extras["call"],
        "extra_names": [x.name for x in _pointed(spec)],
        "gluon_dtype": DTYPES[spec.query.dtype],
        "out_parts": max(1, block_e // OUT_WIDTH),
        **_boxes(spec, tile, printer, block_d, block_e),
        **common,
        "heads": common["heads_python"],
        "unspecialised": json.dumps([*common["sizes"], "tiles", "heads_per_group"]),
        "partitions": _partitions(groups),
        "bounds": _bounds(bounds),
    }


def _partitions(groups: int) -> dict[str, Any]:
    """Of all but the first warpgroup, which gets the registers that the others leave."""
    computes, loads, limit = _REGISTERS[groups]
    return {"warps": [*[4] * (groups - 1), 1], "registers": [*[computes] * (groups - 1), loads], "limit": limit}


def _bounds(bounds: Bounds) -> dict[str, Any]:
    lines = list(map(gluon, bounds.lines))
    uses_last = any(re.search(r"\blast\b", line) for line in lines)
    return {"lines": lines, "has_full": bounds.has_full, "uses_last": uses_last}


def _score(printer: Printer, spec: AttentionSpec, shaped: Any) -> dict[str, Any]:
    text = gluon(bare(printer.value(shaped, masked=True)))
    copied = tuple(f"{x.name}_block = " for x in planes(spec))
    reads = [gluon(line) for line in printer.blocks() if not line.startswith(copied or "no line")]
    keep = gluon(kept(printer, spec.mask))
    keep_reads = list(map(gluon, printer.blocks()))
    together = " ".join([text, *reads, keep, *keep_reads])
    plain = text == "qk" and not reads
    return {
        "any": not plain,
        "text": text,
        "reads": reads,
        "keep": f"(cols < size_j) & {keep}" if keep else "cols < size_j",
        "keep_reads": keep_reads,
        "key_float": not plain and "col_floats" in text,
        "together": together,
        "guarded": any("col_ok" in line for line in reads),
        "row_guarded": any("row_ok" in line for line in reads),
    }


def _mentioned(names: list[str], score: dict[str, Any]) -> list[str]:
    words = set(re.findall(r"\w+", score["together"]))
    return [name for name in names if name in words]


def _sink_lines(sinks: list[str], times: str) -> list[str]:
    """Extra logits join a row when it is finished: all that is summed up is scaled once more."""
    if not sinks:
        return []
    weights = [f"gl.exp2(({sink} - shift){times})" for sink in sinks]
    return [
        "best = row_max",
        *(f"best = gl.maximum(best, {sink})" for sink in sinks),
        'shift = gl.where(best == float("-inf"), 0.0, best)',
        f"rescale = gl.exp2((row_max - shift){times})",
        f"row_sum = row_sum * rescale + {' + '.join(weights)}",
        "row_max = best",
    ]


def _pointed(spec: AttentionSpec) -> list[Input]:
    """Inputs that are loaded by pointers."""
    return [x for x in spec.extras if x not in planes(spec)]


def _extras(spec: AttentionSpec) -> dict[str, list[str]]:
    extras = _pointed(spec)
    pairs = [(x, dim) for x in extras for dim in used_dims(x)]
    return {
        "pointers": [f"{x.name}_ptr" for x in extras],
        "strides": [f"{x.name}_stride_{dim}" for x, dim in pairs],
        "call": [f"{x.name}.stride({dim})" for x, dim in pairs],
    }


def _plane_varies(spec: AttentionSpec, axis: Axis) -> bool:
    return any(place.has(axis) for x in planes(spec) for place in x.index)


def _order(spec: AttentionSpec) -> list[Axis]:
    """Batch axes as heads are counted: neighbours read the same planes."""
    return sorted(spec.batch, key=lambda axis: not _plane_varies(spec, axis)) if planes(spec) else list(spec.batch)


def _head_number(spec: AttentionSpec) -> str:
    """The place of a head among all, from its positions."""
    text = ""
    for axis in spec.batch:
        outer = f"({text})" if " " in text else text
        text = f"{outer} * size_{axis.name} + {axis.name}" if text else axis.name
    return text or "head"


def _boxes(spec: AttentionSpec, tile: Tile, printer: Printer, block_d: int, block_e: int) -> dict[str, Any]:
    """What TMA copies for each operand: which dimensions, how much of them, and from where."""
    shapes = {
        "q": (WARPGROUP_ROWS, block_d), "k": (tile.keys, block_d), "v": (tile.keys, block_e),
        **{x.name: (WARPGROUP_ROWS, tile.keys) for x in planes(spec)}, "out": (WARPGROUP_ROWS, min(block_e, OUT_WIDTH)),
    }  # fmt: skip
    rows = {"k": "key", "v": "key"}
    operands = dict(zip(shapes, _operands(spec), strict=True))
    outer = {name: [printer.index(place) for _, place in fixed_dims(source)] for name, (source, _, _) in operands.items()}
    ends = {"q": "0", "k": "0", "v": "0", "out": "feature"}
    boxes = {name: [*[1] * len(outer[name]), *shape] for name, shape in shapes.items()}
    return {
        "dims": {operands[name][0].name: box_dims(*operands[name]) for name in shapes},
        "box_of": {operands[name][0].name: box for name, box in boxes.items()},
        "gluon_dtypes": {operands[name][0].name: _PLANE_DTYPES[operands[name][0].dtype] for name in shapes},
        "boxes": {name: "".join(f", {side}" for side in box) for name, box in boxes.items()},
        "places": {name: ", ".join([*outer[name], rows.get(name, "row"), ends.get(name, "key")]) for name in shapes},
    }
