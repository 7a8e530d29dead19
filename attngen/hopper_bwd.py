"""The holes of ``hopper_bwd.py.jinja``: the gradients of a spec by Gluon, for sm_90, in one pass over the pairs.

A program holds keys and goes over queries, in the words of a mirrored spec: there ``i`` counts keys and ``j`` queries. What
the template cannot express is refused here with a reason; the portable family takes all of it.

With heads of 64 a step of 128 x 128 takes 4,900 cycles by clocks read in the kernel (H200, 16,384 tokens), of which the
tensor cores need 2,560: 550 to 670 until the gradient of the weights is there, 560 to 820 for that of the scores, 150 to
210 to hand it over, 700 to 820 for sixteen loads of the rows' numbers beside products that read shared memory, 1,130 for
exponentials. Tried in one run with what there is, at lengths of 1,024, 4,096 and 16,384, full and causal: sums added from
registers, 16 bytes a thread (6 to 17 % slower; heads of 256 1 to 11 %); those numbers loaded later (1 to 11 % slower), or
made by the products, from three more columns in 16 bits each, one after the other what is left (1 % slower to 9 % faster,
heads of 128 5 % slower to 4 % faster: what is done before the products takes longer then); exponentials in turn (2 % slower
to 5 % faster); queries' gradient before that of the keys (2 % slower to 11 % faster with heads of 128, in another run as
fast; 5 % slower to 3 % faster with 64); sums of each warpgroup handed over apart (3 % slower to 3 % faster); scores and
weights of the same step, with the left factors of both sums from registers (up to 8 % slower). With the left factor of the
keys' sum from registers beside scores of the next block there are too few of these: the assembler serialises all products,
which is up to a quarter slower.

What is done before and after the products moves 0.47 GB of 16,384 tokens, which takes 8 to 14 % of all at a length of 1,024.
Tried: sums of a few waves of heads alone, that stay in the L2 cache and that two more warps bring to memory while the next
wave is computed (4 to 12 % slower from 4,096 on, 0 to 28 % at 1,024); both kernels backwards, to find in the cache what was
touched last (no difference). Rates of both are in tests/data/hopper_bwd_h200.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

from attngen import boxes, hopper, lost, pairs_bwd
from attngen.adjoint import SCORE_GRAD
from attngen.algebra import ONE, Const, Expr, Load
from attngen.bounds import loop_bounds
from attngen.boxes import PLANE_DTYPES, WARPGROUP_ROWS, planes
from attngen.dropped import dropped_of, holes_of
from attngen.finder import data_of, finder
from attngen.gluon import DTYPES, PLACES, box_dims, gluon
from attngen.gradient import PAIR, Backward, adjoints, backward_of, mirrored, mirrored_spec
from attngen.layout import base_of, memory_order, stride_of, unpacked, used_dims
from attngen.mask import Cover, by_position, derive
from attngen.pairs_bwd import margins_of, reads_of
from attngen.printer import LOG2E, Printer, Unprintable, bare, fixed_dims
from attngen.scores import in_units, kept
from attngen.sides import Side, called_with, heads_of, launch_of, leading, mirrored_side, order_of, read_of
from attngen.spec import FEATURE, HOPPER, INNER, KEY, ROW, SCORE, AttentionSpec, Input, Tile
from attngen.words import columns_of, written

HELD = {64: 128, 128: 128, 256: 64}  # keys of a program, by the width of a head; two warpgroups have 64 each, or share 64
STEPS = {64: 128, 128: 64, 256: 64}  # queries of a step
WIDE = 256  # a head of which no thread has room for the gradients of keys and of values side by side
STAGES = 2
SHARED = 232448  # bytes of a block, on sm_90
RESERVED = 768  # of them, for barriers, and to begin where buffers may
L2_SHARE = Fraction(16, 25)  # of the cache, for what programs that run together go over; all heads at once are far slower
# Of a thread of the warpgroups that compute, of the warps that load and write, and as the kernel is launched.
REGISTERS, OTHER_REGISTERS, LIMIT = 240, 24, 168


@lru_cache(maxsize=4096)
def unsuited(spec: AttentionSpec) -> str | None:
    """Why the template cannot compute the gradients of ``spec``, if so."""
    if (reason := hopper.unfit(spec)) is not None:
        return reason
    if spec.gain != ONE and dropped_of(spec.gain) is None:
        return "weights are multiplied after softmax, not dropped alone"
    if not spec.softmax:
        return "nothing normalises its weights"
    if padded(spec) not in STEPS or _width(spec.value_dim) != padded(spec):
        return f"heads of {spec.head_dim}, {spec.value_dim} for values, are no pair of one width up to {max(STEPS)}"
    if wide(spec) and (planes(spec) or dropped_of(spec.gain) is not None):
        return "heads of that size leave no room for what is added to each pair, or for dropout"
    if _bytes(spec) > SHARED:
        return "what is added to each pair takes too much shared memory"
    plan = backward_of(spec)
    if not all(target.direct for target in (plan.query, plan.keys, plan.values)):
        return "keys and values are shared in different ways"
    return None


def cover_of(spec: AttentionSpec) -> Cover:
    """Which queries keys matter to, mirrored; by positions alone where heads that share keys have data of their own."""
    cover = derive(mirrored(spec.mask))
    shared = {axis for axis, _ in backward_of(spec).members}
    if not any(shared & node.axes for each in data_of(cover) for node in each.expr.walk() if isinstance(node, Load)):
        return cover
    return Cover(tuple(map(by_position, cover.visit)), tuple(map(by_position, cover.partial)), False)


def masks_everything(spec: AttentionSpec) -> bool:
    """Whether every block is masked, for what is loaded does not tell which need it."""
    return any(isinstance(node, Load) for node in spec.mask.walk()) and not data_of(cover_of(spec))


def padded(spec: AttentionSpec) -> int:
    """The width at which the template holds a head."""
    return _width(spec.head_dim)


def _width(features: int) -> int:
    return max(boxes.NARROWEST, 1 << (features - 1).bit_length())


def wide(spec: AttentionSpec) -> bool:
    """Whether the warpgroups share the keys: one makes their gradient, and the other that of the values."""
    return padded(spec) >= WIDE


def tiles_of(spec: AttentionSpec) -> tuple[Tile, ...]:
    """The one tile that there is for heads of this size: of a program for each tile of keys, and of programs that stay, which
    wide heads leave no room for."""
    plain = Tile(HELD[padded(spec)], STEPS[padded(spec)], 8, STAGES, HOPPER)
    return (plain,) if wide(spec) else (plain, replace(plain, persistent=True))


def keys_held(spec: AttentionSpec, tile: Tile) -> int:
    """Tiles of keys in shared memory: a program that stays loads the next one early, if there is room."""
    another = tile.rows * padded(spec) * 2
    return 2 if tile.persistent and _bytes(spec) + another <= SHARED else 1


def _grads(spec: AttentionSpec) -> int:
    """Blocks of gradients of results in shared memory."""
    return 1 if wide(spec) else STAGES


def _bytes(spec: AttentionSpec) -> int:
    """Shared memory of the kernel of the products: keys, values, queries and gradients, the gradients of scores twice (of
    wide heads the weights, too), sums, what is added to scores, and what is known of each query."""
    width, queries, keys = padded(spec), STEPS[padded(spec)], HELD[padded(spec)]
    held = 2 * width * (2 * keys + (STAGES + _grads(spec)) * queries) + 2 * 64 * 64 * 4
    exchanged = 2 * 2 * keys * queries * (1 + wide(spec))
    added = sum(keys * queries * plane.dtype.itemsize for plane in planes(spec))
    turned = mirrored_spec(spec)
    words = 2 + sum(column.words for column in columns_of(turned, *_programs(turned)))
    return held + exchanged + added + 4 * STAGES * queries * words + RESERVED


def holes(spec: AttentionSpec, tile: Tile, l2_bytes: int, sms: int) -> dict[str, Any]:
    """What fills the template. Raises ``Unprintable``."""
    if (reason := unsuited(spec)) is not None:
        raise Unprintable(reason)
    floor, spec = lost.floor(spec), lost.without(spec)
    plan = backward_of(spec)
    grad = Input("grad", spec.output, spec.out_dtype)
    side = Side("keys", spec, (spec.keys, spec.values), (spec.query, grad), plan, tile, False)
    side = mirrored_side(spec, side)
    printer = Printer(side.spec, PLACES)
    columns = columns_of(side.spec, *_programs(side.spec))
    printer.known |= {column.load: column.text for column in columns}
    score = _score(printer, side)
    dropped = holes_of(printer, side.spec.gain, by_sign=not score["chain"])
    data = written(spec, columns) if columns else None
    cover = cover_of(spec)
    bounds, found = finder(side.spec, cover, tile) or (loop_bounds(printer, cover, warps=1), None)
    if found is None and _mentions(" ".join(bounds.lines), spec):
        raise Unprintable("the queries that matter differ from head to head")
    heads = heads_of(side)
    launch = launch_of(spec, plan)
    read = _read_by(side.spec, [*score.values(), *printer.prologue])
    prologue = [gluon(line) for line in (*(base_of(x, printer) for x in read), *printer.prologue)]
    boxes = _boxes(spec, tile)
    pairs = pairs_bwd.tile_of(spec, padded(spec), SHARED - RESERVED)
    trained = pairs_bwd.kernels(plan, pairs)
    helpers = hopper.helpers(printer, " ".join(score.values()), bounds, found, data)
    once, each = parted(prologue, [axis.name for axis, _ in plan.members])
    return {
        **_program(spec, tile, sms),
        **_facts(spec, floor, plan),
        "helpers": {name: used or any(each["helpers"].get(name) for each in trained) for name, used in helpers.items()},
        "data": data,
        "margins": {name: dim for name, dim in margins_of(spec).items() if any(x.name == name for x in read)},
        **_extras_made(plan, launch, trained),
        "pairs": pairs_bwd.holes(plan, pairs, trained, boxes["box_of"]),
        **score,
        "reads_columns": bool(re.search(r"\bcols\b", " ".join((score["score"], score["chain"], score["reads"])))),
        "mentioned": bool(each) or _mentions(" ".join(score.values()), spec),
        "prologue": {"once": once, "each": each},
        "bounds": hopper.lines_of(bounds, "tl" if found else "gl"),
        "finder": found,
        "order": order_of(cover),
        "head": "source" if heads["members"] else "head",
        "group": heads,
        "dropped": dropped,
        "l2_share": l2_bytes * L2_SHARE.numerator // L2_SHARE.denominator,
        **boxes,
        **_rows(spec, plan),
        **_arguments(side, read),
        **launch,
    }


def _facts(spec: AttentionSpec, floor: float | None, plan: Backward) -> dict[str, Any]:
    """What the spec itself says. Rows whose log-sum-exp is at most ``floor``, or very large, are left to other kernels."""
    kind = DTYPES[spec.query.dtype]
    return {
        "head_dim": spec.head_dim,
        "value_dim": spec.value_dim,
        "dtype": kind,
        "short": {"gl.bfloat16": "bf16", "gl.float16": "f16"}[kind],
        "unpack_head": unpacked(spec.batch),
        "lost": plan.may_be_lost,
        "below": "" if floor is None else repr(floor),
        "highest": repr(lost.HIGHEST),
        "may_be_empty": plan.may_be_lost or spec.empty != "nan",
        "empty": spec.empty,
        "log2e": repr(LOG2E),
        "step_bytes": 2 * (spec.head_dim + spec.value_dim) + 4 * padded(spec),  # queries, gradients and sums
    }


def _program(spec: AttentionSpec, tile: Tile, sms: int) -> dict[str, Any]:
    """What a program holds, and how many there are that stay."""
    return {
        "tile": tile,
        "programs": sms,
        "keys_held": keys_held(spec, tile),
        "wide": wide(spec),
        "grads": _grads(spec),
        "block": padded(spec),
        "registers": [REGISTERS, *[OTHER_REGISTERS] * (1 if wide(spec) else 2)],
        "limit": LIMIT,
    }


def _score(printer: Printer, side: Side) -> dict[str, str]:
    """``score``, as scaled by ``times`` it is in base 2; ``keep``; and ``chain``, what the gradient of the products is, but
    for what they are scaled by when all is added up, where the gradient of the score is ``p``; empty if that is ``p``."""
    scale, shaped, _ = in_units(side.spec)
    keep = kept(printer, side.spec.mask)
    factor, rest = leading(dict(adjoints(side.spec, side.spec.score)).get(SCORE, Const(0.0)))
    if (dropped := dropped_of(side.spec.gain)) is not None:
        factor *= dropped.factor
    score = gluon(bare(printer.value(shaped, masked=True)))
    printer.known[SCORE_GRAD] = "p"
    chain = "" if rest == SCORE_GRAD else gluon(bare(printer.value(rest, masked=True)))
    return {
        "score": score,
        "reads": "\n".join(reads_of(printer.blocks(), side.plan.spec)),
        "keep": "(rows < size_i) & (cols < size_j)" + (f" & {gluon(keep)}" if keep else ""),
        "chain": chain,
        "times": f" * {scale!r}" if scale != 1 else "",
        "result_times": f" * {factor!r}" if factor != 1 else "",
    }


def _programs(turned: AttentionSpec) -> list[Expr]:
    """Whatever the warpgroups evaluate for each pair."""
    return [turned.score, turned.mask, *(grad for of, grad in adjoints(turned, turned.score) if of == SCORE)]


def _extras_made(plan: Backward, launch: dict[str, Any], trained: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the gradients beside those of the operands: which are made, by the kernels ``trained``, and what ``launch`` says of
    each."""
    sources = {each["source"] for each in trained}
    operands, extras = launch["buffers"][:3], dict(zip(launch["needs"], launch["buffers"][3:], strict=True))
    for target in plan.extras:
        if target.kind == PAIR and target.shared:  # each element is written once, not added to
            name = target.source.name
            make = f"(notes.empty if {name}.shape == {read_of(plan.spec, target)} else notes.zeros)"
            make = f"{make}({name}.shape) if need_{name} else {name}"
            extras[name] = {**extras[name], "make": make}
    gives = {name: buffer["give"] if name in sources else "None" for name, buffer in extras.items()}
    return {
        "trained": trained,
        "untrained": [name for name in extras if name not in sources],
        "made": [*operands, *(buffer for name, buffer in extras.items() if name in sources)],
        "gives": list(gives.values()),
        "zeros": [give.replace(" if", ".zero_() if") for give in gives.values()],
        "given": [b["name"] for b in operands] + [b["name"] if name in sources else "_" for name, b in extras.items()],
        "into": [b["name"] for b in operands]
        + [f"{b['name']} if need_{name} else {name}" if name in sources else name for name, b in extras.items()],
    }


def _read_by(spec: AttentionSpec, texts: list[str]) -> list[Input]:
    """The inputs that lines of a kernel load by pointers."""
    words = set(re.findall(r"\w+", " ".join(texts)))
    return [x for x in spec.extras if f"{x.name}_base" in words]


def parted(lines: list[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Assignments that depend on none of ``names``, and those that do, if only through one another."""
    once: list[str] = []
    each: list[str] = []
    moving = set(names)
    for line in lines:
        target, value = line.split(" = ", 1)
        depends = not moving.isdisjoint(re.findall(r"\w+", value))
        moving |= {target} if depends else set()
        (each if depends else once).append(line)
    return once, each


def _mentions(text: str, spec: AttentionSpec) -> bool:
    """Whether ``text`` speaks of a position along a batch axis."""
    return not {axis.name for axis in spec.batch}.isdisjoint(re.findall(r"\w+", text))


def _boxes(spec: AttentionSpec, tile: Tile) -> dict[str, Any]:
    """What TMA copies of each operand: which dimensions, how much of them, and from where."""
    printer = Printer(spec)
    grad = Input("grad", spec.output, spec.out_dtype)
    operands = (
        (spec.query, ROW, INNER, tile.keys, "row"), (spec.keys, KEY, INNER, WARPGROUP_ROWS, "key"),
        (spec.values, KEY, FEATURE, WARPGROUP_ROWS, "key"), (grad, ROW, FEATURE, tile.keys, "row"),
        *((plane, ROW, KEY, tile.keys, "row") for plane in planes(spec)),
    )  # fmt: skip
    boxes, places, dims, orders = {}, {}, {}, {}
    for source, row, feature, count, place in operands:
        outer = [printer.index(at) for _, at in fixed_dims(source)]
        boxes[source.name] = [*[1] * len(outer), count, WARPGROUP_ROWS if feature == KEY else padded(spec)]
        places[source.name] = ", ".join([*outer, place, "key" if feature == KEY else "0"])
        dims[source.name] = box_dims(source, row, feature)
        orders[source.name] = tuple(memory_order(spec, source))
    return {
        "planes": [x.name for x in planes(spec)],
        "widths": {x.name: x.dtype.itemsize for x in planes(spec)},
        "dtypes": {x.name: PLANE_DTYPES[x.dtype] for x in planes(spec)},
        "orders": orders,
        "dims": dims,
        "box_of": boxes,
        "boxes": {name: "".join(f", {side}" for side in box) for name, box in boxes.items()},
        "places": {**places, "dk": places["k"], "dv": places["v"]},
    }


def _rows(spec: AttentionSpec, plan: Backward) -> dict[str, Any]:
    """Addresses of what is done row by row, before and after the products."""
    printer = Printer(spec)
    out, grad = (Input(name, spec.output, spec.out_dtype) for name in ("out", "grad"))
    query = plan.query.place
    sizes = [f"size_{axis.name}" for axis in (*spec.batch, ROW)]
    strides = [f"{name}_stride_{dim}" for name in ("out", "grad") for dim in range(len(spec.output))]
    query_strides = [f"{query.name}_stride_{dim}" for dim in used_dims(query)]
    return {
        "at": {
            x.name: {"base": gluon(base_of(x, printer)), "row": stride_of(x, ROW), "inner": stride_of(x, inner)}
            for x, inner in ((out, FEATURE), (grad, FEATURE), (query, INNER))
        },
        "row_strides": strides,
        "row_strides_call": [called_with(name) for name in strides],
        "query_strides": query_strides,
        "query_strides_call": [called_with(name) for name in query_strides],
        "row_sizes": sizes,
    }


def _arguments(side: Side, extras: list[Input]) -> dict[str, Any]:
    """What the kernel of the products is called with, beside tensors that TMA copies."""
    spec = side.plan.spec
    strides = [f"{x.name}_stride_{dim}" for x in extras for dim in used_dims(x)]
    outer = [f"size_{axis.name}" for axis in spec.batch]
    sources = [f"sources_{axis.name}" for axis, by in side.plan.members if by]
    sizes = [*outer, "size_i", "size_j", *sources]
    return {
        "extras": [*(f"{x.name}_ptr" for x in extras), *strides],
        "extras_call": [*(x.name for x in extras), *map(called_with, strides)],
        "sizes": sizes,
        "sizes_call": [*outer, "size_j", "size_i", *sources],
        "unspecialised": json.dumps([*sizes, "heads", "heads_per_group"]),
    }
