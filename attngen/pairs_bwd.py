"""Kernels for gradients of what is loaded into scores for each pair, beside a Hopper backward of the operands alone.

Several heads, or batches, read the same bias, and every pair of a diagonal the same entry of a table. Added up by atomics
from each pair on its own that takes longer than all products together (on an H200 3 to 6 ms beside 3, for 64 heads of
4,096 x 4,096). So a program makes a block of pairs again, two products of five, for all heads that share it, and adds up in
registers. What it reads for that from the L2 cache takes longest, which is why blocks are as large as registers allow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from attngen.algebra import ONE, TRUE, Const, Load
from attngen.bounds import is_plain, loop_bounds
from attngen.boxes import planes
from attngen.gluon import PLACES, gluon, helpers_of
from attngen.gradient import DIAGONAL, PAIR, SCATTERED, Backward, Target, adjoints, diagonal_of, sharing
from attngen.layout import base_of, used_dims
from attngen.mask import EVERYTHING, Cover, by_position, derive
from attngen.portable_bwd import NAMES, body_of, target_of
from attngen.printer import LOG2E, Printer
from attngen.scores import in_units, score_lines
from attngen.sides import Side, called_with, heads_of, leading
from attngen.spec import HOPPER, KEY, ROW, SCORE, AttentionSpec, Input, Tile

ROWS, WIDE, NARROW = 128, 128, 64  # of two warpgroups, whose registers the sums and the two products of a block nearly fill
SLOTS = range(2, 5)  # how many pairs of factors are on their way


def tile_of(spec: AttentionSpec, block: int, shared: int) -> Tile:
    """Queries and keys of a program, with as many pairs of factors, of ``block`` features, as ``shared`` bytes hold beside
    what TMA copies for each pair. What pointers read for each pair takes as many registers as a product."""
    copied = planes(spec)
    pointers = any({ROW, KEY} <= load.axes for load in loads(spec) if load.source not in {x.name for x in copied})
    keys = NARROW if pointers else WIDE
    added = sum(ROWS * keys * plane.dtype.itemsize for plane in copied)
    fitting = (shared - added) // ((ROWS + keys) * block * spec.query.dtype.itemsize)
    return Tile(ROWS, keys, 8, min(fitting, SLOTS[-1]), HOPPER)


def loads(spec: AttentionSpec) -> list[Load]:
    return [node for part in (spec.score, spec.mask) for node in part.walk() if isinstance(node, Load) and node != SCORE]


def kernels(plan: Backward, tile: Tile) -> list[dict[str, Any]]:
    """What fills ``pairs_bwd.jinja``, for each gradient that such a kernel makes: none where weights are dropped."""
    if tile.stages not in SLOTS or plan.spec.gain != ONE:
        return []
    able = [target for target in plan.extras if target.kind in (PAIR, DIAGONAL, SCATTERED)]
    return [_kernel(plan, tile, target, members) for target in able if (members := _members(plan, target)) is not None]


def holes(plan: Backward, tile: Tile, made: list[dict[str, Any]], box_of: dict[str, list[int]]) -> dict[str, Any]:
    """What the kernels ``made`` have in common; ``box_of`` is what the backward of the operands copies at a time."""
    heights = {"q": tile.rows // 2, "grad": tile.rows // 2, "k": tile.keys, "v": tile.keys}
    boxes = {name: [*box_of[name][:-2], height, box_of[name][-1]] for name, height in heights.items()}
    boxes |= {x.name: [*box_of[x.name][:-2], tile.rows // 2, tile.keys] for x in planes(plan.spec)}
    return {
        "tile": tile,
        "boxes": boxes,
        "sides": {name: "".join(f", {side}" for side in box) for name, box in boxes.items()},
        "diagonals": any(each["target"]["kind"] == DIAGONAL for each in made),
    }


def _members(plan: Backward, target: Target) -> tuple[Any, ...] | None:
    """The batch axes along which heads read the same; None if a kernel cannot go over them."""
    members = sharing(plan.spec, target.source)
    known = [(axis, by) for axis, by in plan.members if by]
    return members if members is not None and all(not by or (axis, by) in known for axis, by in members) else None


def _kernel(plan: Backward, tile: Tile, target: Target, members: tuple[Any, ...]) -> dict[str, Any]:
    spec = plan.spec
    grad = Input("grad", spec.output, spec.out_dtype)
    side = Side("queries", spec, (spec.query, grad), (spec.keys, spec.values), plan, tile, True)
    heads = heads_of(replace(side, queries=False, plan=replace(plan, members=members)))
    printer = Printer(spec, PLACES, known=dict(NAMES))
    program = _program(printer, side, target)
    texts = " ".join([*program["reads"], *printer.prologue, program["score"], program["keep"], program["value"]])
    read = [x for x in spec.extras if f"{x.name}_base" in re.findall(r"\w+", texts)]
    shared = [axis for axis, _ in members]
    fixed = {x.name: not (shared and any(place.has(*shared) for place in x.index)) for x in planes(spec)}
    copied = [{"name": x.name, "width": x.dtype.itemsize, "fixed": fixed[x.name]} for x in planes(spec)]
    made = {name: gluon(text) if isinstance(text, str) else text for name, text in target_of(side, printer, target).items()}
    return {
        "source": target.source.name,
        "head": "source" if heads["members"] else "head",
        "heads": heads,
        "bases": [gluon(base_of(x, printer)) for x in read],
        "prologue": [gluon(line) for line in printer.prologue],
        **program,
        "target": made,
        "planes": copied,
        "moving": [plane for plane in copied if not plane["fixed"]],
        "bounds": _bounds(printer, plan),
        "helpers": helpers_of(printer, texts),
        **_arguments(spec, [*read, target.place], [f"sources_{axis.name}" for axis, by in members if by]),
    }


def _program(printer: Printer, side: Side, target: Target) -> dict[str, Any]:
    """What is evaluated for each pair: the score, whether it counts, its exponent, and what a pair adds to the gradient."""
    spec = side.spec
    scale, shaped, natural = in_units(spec)
    lines = score_lines(printer, spec, scale, shaped, natural)
    factor, _ = leading(dict(adjoints(spec, spec.score)).get(SCORE, Const(0.0)))
    body = body_of(printer, side, spec.score, factor, masked=True)
    exponent = f"scores{f' * {scale!r}' if natural or lines['times'] else ''} - gl.expand_dims(lse * {LOG2E!r}, 1)"
    return {
        "reads": reads_of(dict.fromkeys([*lines["masked_reads"], *body["reads"]]), spec),
        "score": gluon(lines["masked"]),
        "keep": gluon(lines["keep"]) if spec.mask != TRUE else "",
        "exponent": exponent,
        "value": gluon(body["extras"][target.source.name]),
    }


def reads_of(lines: Iterable[str], spec: AttentionSpec) -> list[str]:
    """Of the lines that load something for each pair, those that load by pointers, and not what TMA copies. Tables have
    margins, and are read without guards, which cost registers."""
    copied, tables = {x.name for x in planes(spec)}, margins_of(spec)
    named = {line.split("_block = ")[0]: gluon(line) for line in lines}
    kept = {name: line for name, line in named.items() if name not in copied}
    return [re.sub(r", mask=[^,]*, other=0", "", line) if name in tables else line for name, line in kept.items()]


def margins_of(spec: AttentionSpec) -> dict[str, int]:
    """Tables with an entry for each diagonal, and along which dimension."""
    return {x.name: dim for x in spec.extras if (dim := diagonal_of(x)) is not None}


def _arguments(spec: AttentionSpec, tensors: list[Input], sources: list[str]) -> dict[str, Any]:
    strides = [f"{x.name}_stride_{d}" for x in tensors for d in used_dims(x)]
    sizes = [*(f"size_{axis.name}" for axis in (*spec.batch, ROW, KEY)), *sources]
    return {
        "arguments": [*(f"{x.name}_ptr" for x in tensors), *strides],
        "arguments_call": [*(x.name for x in tensors), *map(called_with, strides)],
        "sizes": sizes,
        "unspecialised": json.dumps(sizes),
    }


def _bounds(printer: Printer, plan: Backward) -> list[str]:
    """Which keys matter to a tile of queries, as far as that is one stretch that positions alone bound."""
    visit = tuple(map(by_position, derive(plan.spec.mask).visit))
    names = {axis.name for axis in plan.spec.batch}
    for cover in (Cover(visit, (), False), Cover((EVERYTHING,), (), False)):
        bounds = loop_bounds(printer, cover, warps=4)
        if is_plain(cover) and not bounds.compares and names.isdisjoint(re.findall(r"\w+", " ".join(bounds.lines))):
            break
    return [gluon(line).replace("BLOCK_", "PAIRS_") for line in bounds.lines]
