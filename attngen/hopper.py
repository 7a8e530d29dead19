"""The holes of ``hopper_fwd.py.jinja``: Gluon, for sm_90, where one warp loads by TMA and warpgroups compute.

What the template cannot express is refused here with a reason; the portable family takes all of it.

Heads of 64 wait for what is done between the products. By clocks read in the kernel (H100, tiles of 128 x 128), of the 2,100
cycles that a step of two warpgroups takes, products hold a warpgroup for 360 to 720, its maxima take 270 to 460 and its
exponentials 780 to 980, where the special function unit needs 512. So exponentials are what warpgroups do in turn, behind a
branch that the assembler moves nothing across: 2 to 11 % faster than turns of products, or none with three warpgroups (16,384
tokens in sequences of 1,024 to 16,384, full and causal), and 4 to 19 % in 8 bits with heads of 128. Tried, and none was
faster: exponentials in halves or quarters whose sums and roundings come under the next ones (1 to 7 % slower with three
warpgroups); no scaling of results by one (up to 3 % slower; 4 to 7 % for heads of 128); four warpgroups of 64 keys (3 to 13 %
slower, as fast where causal); waiting for values after the exponentials (5 to 12 % slower); weights through shared memory (8
to 11 % slower); weights rounded by integers (1 to 7 % slower) or cut off (as fast); keys and values handed back by named
barriers, for which warps need not meet (0 to 6 % slower).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from attngen import boxes, dropped, fp8, lost
from attngen.algebra import ONE, Load
from attngen.bounds import Bounds, loop_bounds
from attngen.boxes import PLANE_DTYPES, WARPGROUP_ROWS, operands, planes
from attngen.finder import finder, numbered
from attngen.gluon import DTYPES, box_dims, gluon, helpers_of
from attngen.index import Axis
from attngen.layout import base_of, unpacked, used_dims
from attngen.mask import derive
from attngen.printer import LOG2E, Places, Printer, Unprintable, bare
from attngen.scores import holes_of_spec, in_units, kept, sink_values
from attngen.spec import FEATURE, HOPPER, KEY, ROW, AttentionSpec, Input, Tile

MAX_SIDE = 256  # of a box that TMA copies, and of a product
MAX_RANK = 5
# Bytes of a head up to which exponentials take longer than the two products, and up to which turns pay at all.
EXPONENTIALS_LONGER, MOST_ALTERNATING = 128, 256
PAIRS = {torch.float16: "f16x2", torch.bfloat16: "bf16x2"}  # two of them in one word, as PTX has it
PART = 32  # columns of a block that are masked together, where the mask is loaded
_PLACES = Places(row="rows", key="cols", row_beside="", key_beside="", key_float="col_floats")


# Of a thread of the warpgroups that compute, of the warp that loads, and as the kernel is launched.
_REGISTERS = {2: (240, 24, 168), 3: (160, 32, 128)}


def registers(tile: Tile) -> int:
    """Registers of a thread that computes."""
    return _REGISTERS[tile.rows // WARPGROUP_ROWS][0]


def queries_held(spec: AttentionSpec, tile: Tile) -> int:
    """Tiles of queries in shared memory: a program that stays loads the next one early, if there is room."""
    return 2 if tile.persistent and boxes.held(boxes.pieces(spec)) <= 128 and not planes(spec) else 1


def leaves_rows(spec: AttentionSpec, tile: Tile) -> bool:
    """Whether a portable kernel has to be launched behind that of ``tile``, for rows that masks leave nothing of."""
    return tile.family == HOPPER and lost.floor(spec) is not None


@lru_cache(maxsize=4096)  # identical sites share it, and what it derives of the mask
def unsuited(spec: AttentionSpec) -> str | None:
    """Why the template cannot compute ``spec``, if so."""
    if (reason := unfit(spec)) is not None:
        return reason
    if spec.gain != ONE and dropped.dropped_of(spec.gain) is None:
        return "weights are multiplied after softmax, not dropped alone"
    if spec.gain != ONE and (spec.fp8 or not spec.softmax):
        return "weights are dropped in 8 bits" if spec.fp8 else "weights are dropped that nothing normalises"
    if any(sink.axes & {ROW, KEY} for sink in spec.sinks):
        return "its sinks differ from row to row"
    return fp8.unsuited(spec) if spec.fp8 else None


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
    copied = {x.name for x in planes(spec)}
    in_mask = any(isinstance(node, Load) and node.source in copied for node in spec.mask.walk())
    if in_mask or any(x.dtype not in PLANE_DTYPES for x in planes(spec)):
        return "a mask is loaded for each pair"
    for source, row, feature in operands(spec):
        if source.dim_of(row) is None or source.dim_of(feature) is None:
            return f"{source.name} is read at more than plain positions"
        if len(box_dims(source, row, feature)) > MAX_RANK:
            return f"{source.name} has more than {MAX_RANK} dimensions"
    return None


def misaligned(spec: AttentionSpec, layouts: Sequence[tuple[Sequence[int], Sequence[int], int]]) -> str | None:
    """Why TMA cannot address operands with such (shape, strides, offset), in elements, if so; of all inputs, in order."""
    copied = {source.name: (source, row, feature) for source, row, feature in operands(spec)}
    if spec.fp8:  # what is copied of these is dense
        copied = {x.name: copied[x.name] for x in planes(spec)}
    for each, (shape, strides, offset) in zip(spec.inputs, layouts, strict=True):
        if each.name not in copied:
            continue
        *outer, last = box_dims(*copied[each.name])
        unit = 16 // each.dtype.itemsize
        if strides[last] != 1:
            return f"elements of {each.name} that belong side by side are not"
        if offset % unit or any(shape[d] != 1 and (strides[d] % unit or strides[d] <= 0) for d in outer):
            return f"rows of {each.name} do not begin at multiples of 16 bytes"
    return None


# -------------------------------------------------------------------------------------------------------------- holes


def holes(spec: AttentionSpec, tile: Tile, l2_bytes: int, sms: int) -> dict[str, Any]:
    """What fills the template. Raises ``Unprintable``."""
    if (reason := unsuited(spec)) is not None:
        raise Unprintable(reason)
    floor, spec = lost.floor(spec), lost.without(spec)
    groups = tile.rows // WARPGROUP_ROWS
    block_d, block_e = (boxes.held(each) for each in (boxes.pieces(spec), boxes.results(spec)))
    printer = Printer(spec, _PLACES)
    cover = derive(spec.mask)
    scale, shaped, natural = in_units(spec, leaves_rows=floor is not None)
    score = _score(printer, spec, shaped)
    score["natural"], score["times"] = natural, f" * {scale!r}" if scale != 1 and not natural else ""
    score["folds"] = bool(spec.fp8) and not score["any"] and not natural  # the scales of 8-bit operands, into that of scores
    sinks = sink_values(printer, spec.sinks, natural)
    bounds, found = finder(spec, cover, tile) or (loop_bounds(printer, cover, warps=1), None)
    common = holes_of_spec(spec, cover, l2_bytes)
    copied = boxes.holes(spec, tile, printer)
    eighths = fp8.holes(spec, tile, copied, printer)
    extras = _extras(spec)
    dropping = dropped.holes_of(printer, spec.gain)
    prologue = [*(base_of(x, printer) for x in _pointed(spec)), *printer.prologue]
    names = [line.split(" = ")[0] for line in prologue]
    outer = [a.name for a in spec.batch]
    blocks = [f"{x.name}_block" for x in planes(spec)]
    passed = [*blocks, *names, *outer, *extras["strides"], *(f"size_{name}" for name in outer)]
    told = _mentioned(passed, score["together"])
    score |= {"told": _mentioned(passed, score["masking"]), "rows": _mentioned(["rows", *printer.by_row()], score["masking"])}
    return {
        "tile": tile,
        "groups": groups,
        "queries": queries_held(spec, tile),
        "overlap": groups == 2,
        "in_turn": _in_turn(spec, groups, block_d * eighths["width"]),
        "halvings": (tile.keys // 8).bit_length() - 1,
        "programs": sms,
        "block_d": block_d,
        "block_e": block_e,
        "helpers": helpers(printer, score["together"], bounds, found),
        "finder": found,
        "score": score,
        "dropped": dropping,
        "lowest": 'float("-inf")' if floor is None else repr(floor * LOG2E),
        "highest": repr(lost.HIGHEST),
        "below": "" if floor is None else repr(floor),
        "sinks": [sink for sink in sinks if sink.isidentifier()],
        "sink_lines": _sink_lines(sinks, f" * {LOG2E!r}" if natural else ""),
        "unpack_head": unpacked(_order(spec)),
        "head_number": numbered(list(spec.batch)) or "head",
        "sharing": " * ".join(f"size_{a.name}" for a in _order(spec) if not _plane_varies(spec, a)) or "1",
        "planes": [x.name for x in planes(spec)],
        "widths": {x.name: x.dtype.itemsize for x in planes(spec)},
        "widened": [x.name for x in planes(spec) if x.dtype == torch.bfloat16],
        "prologue": list(map(gluon, prologue)),
        "unpacks": bool(prologue) or bool(spec.fp8) or not set(told).isdisjoint(outer),
        "values": told,
        "extras": [*extras["pointers"], *extras["strides"]],
        "extra_strides": extras["call"],
        "extra_names": [x.name for x in _pointed(spec)],
        "gluon_dtype": DTYPES[spec.query.dtype],
        "pair": PAIRS[spec.query.dtype],
        **copied,
        "accs": [f"acc{e.suffix}" for e in copied["e_pieces"]],
        "weighted": [f"weighted{e.suffix}" for e in copied["e_pieces"]],
        **common, **eighths,
        "heads": common["heads_python"],
        "unspecialised": json.dumps([*common["sizes"], "tiles", "heads_per_group", *eighths["scale_strides"]]),
        "partitions": _partitions(groups),
        "bounds": {**lines_of(bounds, "tl" if found else "gl"), "words": 16 if bounds.has_gap else 8},
    }


def _in_turn(spec: AttentionSpec, groups: int, row_bytes: int) -> str:
    """What warpgroups do one after the other: what takes longer, the other under it."""
    if spec.softmax and row_bytes <= EXPONENTIALS_LONGER:
        return "exponentials"
    return "products" if groups == 2 and row_bytes <= MOST_ALTERNATING else ""


def _partitions(groups: int) -> dict[str, Any]:
    """Of all but the first warpgroup, which gets the registers that the others leave."""
    computes, loads, limit = _REGISTERS[groups]
    return {"warps": [*[4] * (groups - 1), 1], "registers": [*[computes] * (groups - 1), loads], "limit": limit}


def lines_of(bounds: Bounds, language: str) -> dict[str, Any]:
    """``language`` is that of the kernel whose lines they are: one in plain Triton that finds them, or where a tile opens."""
    lines = list(bounds.lines) if language == "tl" else list(map(gluon, bounds.lines))
    uses_last = any(re.search(r"\blast\b", line) for line in lines)
    flags = {"has_full": bounds.has_full, "has_gap": bounds.has_gap, "uses_last": uses_last}
    return {"lines": lines, "language": language, **flags}


def _score(printer: Printer, spec: AttentionSpec, shaped: Any) -> dict[str, Any]:
    text = gluon(bare(printer.value(shaped, masked=True)))
    copied = tuple(f"{x.name}_block = " for x in planes(spec))
    reads = [gluon(line) for line in printer.blocks() if not line.startswith(copied or "no line")]
    keep = gluon(kept(printer, spec.mask))
    keep_reads = list(map(gluon, printer.blocks()))
    masking = " ".join([keep, *keep_reads])
    together = " ".join([text, *reads, masking])
    plain = text == "qk" and not reads
    return {
        "any": not plain,
        "text": text,
        "reads": reads,
        "keep": f"(cols < size_j) & {keep}" if keep else "cols < size_j",
        "keep_reads": keep_reads,
        "keep_values": any(isinstance(node, Load) and KEY in node.axes for node in spec.mask.walk()),
        "part": PART,
        "masking": masking,
        "key_float": not plain and "col_floats" in text,
        "together": together,
        "guarded": any("col_ok" in line for line in reads),
        "row_guarded": any("row_ok" in line for line in reads),
    }


def _mentioned(names: list[str], text: str) -> list[str]:
    words = set(re.findall(r"\w+", text))
    return [name for name in names if name in words]


def helpers(printer: Printer, text: str, bounds: Bounds, *others: dict[str, Any] | None) -> dict[str, bool]:
    """Which functions the printed ``text`` calls, the bounds, and ``others`` of the file's kernels, where there are such."""
    made = helpers_of(printer, text)
    divides = made["floor_div"] or any(other is not None and other["floor_div"] for other in others)
    return {**made, "floor_div": divides, "longer": bounds.compares}


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
