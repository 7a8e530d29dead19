"""Plan -> kernel source. Choices are made here, in Python; templates only say where the pieces go."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2

import attngen
from attngen.algebra import ONE, TRUE, Const, Expr, Load, Op, number, op, terms, total
from attngen.bounds import loop_bounds
from attngen.errors import Miss
from attngen.layout import addresses, arguments
from attngen.mask import FIRST, LAST, derive
from attngen.printer import LOG2E, Printer, Unprintable, bare
from attngen.spec import KEY, ROW, SCORE, AttentionSpec, Tile, digest

TEMPLATE = "portable_fwd.py.jinja"
MIN_DOT = 16  # the smallest side of a tensor-core product
MASKING = 1e5  # a number beyond this masks; in base 2 it would lose digits that the exponential needs


@dataclass(frozen=True)
class Kernel:
    """The text of one generated module. ``name`` is unique to its content, apart from the header."""

    spec: AttentionSpec
    tile: Tile
    source: str
    name: str


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attngen.templates", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["listed"] = _listed
    return environment


def _listed(names: list[str], indent: int) -> str:
    """A comma-separated list, broken into lines."""
    return textwrap.fill(", ".join(names) + ",", 116 - indent).replace("\n", "\n" + " " * indent)


@cache
def template_digest(template: str) -> str:
    return digest(files("attngen.templates").joinpath(template).read_text())


def emit(spec: AttentionSpec, tile: Tile, *, notes: tuple[str, ...] = (), l2_bytes: int = 50 << 20) -> Kernel | Miss:
    """The kernel module for ``spec`` with ``tile``, or a ``Miss`` if the templates cannot express it.

    ``notes`` are lines for the header (predicted traffic, where the choice came from); they do not change the name.
    """
    try:
        holes = _holes(spec, tile, l2_bytes)
    except Unprintable as problem:
        return Miss(str(problem))
    template = _environment().get_template(TEMPLATE)
    body = template.render(holes, header="")
    name = f"fwd_{digest(body)}"
    header = _header(spec, tile, notes)
    return Kernel(spec, tile, template.render(holes, header=header), name)


def _header(spec: AttentionSpec, tile: Tile, notes: tuple[str, ...]) -> str:
    lines = [
        "Attention, forward: one fused kernel.",
        "",
        *(f"    {line}" for line in spec.text.splitlines()),
        "",
        f"Tile: {tile.rows} queries x {tile.keys} keys, {tile.warps} warps, {tile.stages} stages.",
        *notes,
        f"Written by attngen {attngen.__version__} from {TEMPLATE} ({template_digest(TEMPLATE)}).",
    ]
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------------------------- holes


def _holes(spec: AttentionSpec, tile: Tile, l2_bytes: int) -> dict[str, Any]:
    cover = derive(spec.mask)
    printer = Printer(spec)
    natural = not spec.softmax or loads_over_keys(spec.score)
    scale, shaped = (LOG2E, spec.score) if natural else scaled_score(spec.score)
    score = _score(printer, spec, scale, shaped, natural)
    sinks = _sinks(printer, [s if natural else op("mul", s, Const(LOG2E)) for s in spec.sinks])
    whole = _whole(printer, spec)
    bounds = loop_bounds(printer, cover, tile.warps)
    heavy_first = any(i.high.has(FIRST, LAST) for i in cover.visit)
    unit = [f"scale = {scale!r}  # scores times this are in base 2, as the running maximum is"] if score["times"] else []
    where = addresses(spec, printer)
    block_d, block_e = (max(MIN_DOT, 1 << (n - 1).bit_length()) for n in (spec.head_dim, spec.value_dim))
    return {
        "tile": tile,
        "helpers": {
            "tanh": _tanh(spec) if printer.uses_tanh else "",
            "floor_div": printer.uses_floor_div,
            "drowned": printer.uses_drowned,
            "rounded": printer.uses_rounded,
            "longer": bounds.compares,
        },
        "score": score,
        "whole": whole,
        "prologue": [*unit, *printer.prologue],
        "bounds": bounds,
        "sink_lines": _sink_lines(sinks, f" * {LOG2E!r}" if natural else ""),
        "heavy_first": heavy_first,
        "order_comment": "Rows with most keys go first." if heavy_first else "Tiles of one head are neighbours.",
        "softmax": spec.softmax,
        "empty": spec.empty,
        "lse": spec.lse,
        "log2e": repr(LOG2E),
        "ln2": repr(1 / LOG2E),
        "precision": "" if spec.query.dtype.itemsize < 4 else f', input_precision="{"tf32" if spec.tf32 else "ieee"}"',
        "block_d": block_d,
        "block_e": block_e,
        "d_ragged": block_d != spec.head_dim,
        "e_ragged": block_e != spec.value_dim,
        "head_dim": spec.head_dim,
        "value_dim": spec.value_dim,
        **where,
        **arguments(spec, heavy_first),
        "l2_half": l2_bytes // 2,
        "kv_bytes_per_key": spec.head_dim * spec.keys.dtype.itemsize + spec.value_dim * spec.values.dtype.itemsize,
    }


def scaled_score(score: Expr) -> tuple[float, Expr]:
    """``score * log2(e) = scale * shaped`` with ``scale > 0``, chosen so that the raw product needs no multiplication.

    The maximum is then taken before scaling, and scaling becomes part of the exponent's fused multiply-add.
    """
    parts = terms(score)
    factors = [_coefficient(part) for part in parts]
    linear = [f for part, f in zip(parts, factors, strict=True) if f is not None and _strip(part) == SCORE]
    if len(linear) == 1 and linear[0] > 0:
        scale = linear[0] * LOG2E
    elif len(parts) == 1 and factors[0] is not None and factors[0] > 0:
        scale = factors[0] * LOG2E
    else:
        scale = LOG2E
    return scale, total(terms(score, LOG2E / scale)) if scale != 1 else score


def _coefficient(part: Expr) -> float | None:
    if isinstance(part, Op) and part.name == "mul":
        value = number(part.args[1])
        return value if value is not None else number(part.args[0])
    return 1.0


def _strip(part: Expr) -> Expr:
    if isinstance(part, Op) and part.name == "mul":
        return part.args[0] if number(part.args[1]) is not None else part.args[1]
    return part


def loads_over_keys(score: Expr) -> bool:
    """Whether a term that changes from key to key, or is added per query, may be the lowest of its type, as masks are.

    Such a score stays in natural units, where that number is still finite, and is scaled after the maximum is taken
    off: a row with nothing else must come out as the mean of the values, as it does in eager.
    """
    for part in terms(score):
        nodes = part.walk()
        axes = {KEY} if SCORE in nodes else {ROW, KEY}
        if any(axes & node.axes and _may_be_lowest(node) for node in nodes):
            return True
    return False


def _may_be_lowest(node: Expr) -> bool:
    """A float that is loaded, or something made with a number that no score reaches."""
    if isinstance(node, Op):
        return node.name in ("drown", "rounded") or any(MASKING < abs(number(a) or 0) < math.inf for a in node.args)
    return isinstance(node, Load) and node != SCORE and node.kind == "float"


def _keep(printer: Printer, mask: Expr) -> str:
    """The mask as text; empty if it keeps everything."""
    if mask == TRUE:
        return ""
    text = printer.value(mask, masked=True)
    return bare(text) if isinstance(mask, Op) and mask.name == "and" else text


def _score(printer: Printer, spec: AttentionSpec, scale: float, shaped: Expr, natural: bool) -> dict[str, Any]:
    scaled = scale != 1 and not natural
    full, gain, full_reads = bare(printer.value(shaped, masked=False)), _gain(printer, spec, False), printer.blocks()
    masked, keep = bare(printer.value(shaped, masked=True)), _keep(printer, spec.mask)
    return {
        "gain": gain,
        "masked_gain": _gain(printer, spec, True),
        "full": full,
        "full_reads": full_reads,
        "masked": masked,
        "masked_reads": printer.blocks(),
        "keep": keep,
        "times": " * scale" if scaled else "",
        "natural": natural,
        "may_be_infinite": any(isinstance(n, Load) and n != SCORE for n in spec.score.walk()),
    }


def _gain(printer: Printer, spec: AttentionSpec, masked: bool) -> str:
    """Weights times this go into the product; empty if it is one."""
    return "" if spec.gain == ONE else " * " + printer.value(spec.gain, masked=masked)


def _whole(printer: Printer, spec: AttentionSpec) -> dict[str, Any] | None:
    if spec.whole is None or spec.redo_below is None:
        return None
    sinks = _sinks(printer, list(spec.sinks))
    fma = spec.query.dtype.itemsize == 4 and not spec.tf32  # without stages its keys would wait in registers
    return {
        "stages": 2 if fma else 1,
        "score": bare(printer.value(spec.whole, masked=True)),
        "gain": _gain(printer, spec, True),
        "reads": printer.blocks(),
        "below": repr(spec.redo_below),
        "sink_lines": _sink_lines(sinks, f" * {LOG2E!r}"),
    }


def _sinks(printer: Printer, sinks: list[Expr]) -> list[str]:
    """Sinks as variables: one number for all rows of a program, or one for each."""
    if any(KEY in sink.axes for sink in sinks):
        raise Unprintable("a sink that differs from key to key")
    texts = [printer.hoisted(sink) for sink in sinks]
    return [f"tl.reshape({t}, [BLOCK_I])" if ROW in s.axes else t for s, t in zip(sinks, texts, strict=True)]


def _sink_lines(sinks: list[str], times: str) -> list[str]:
    lines = [f"row_max = tl.maximum(row_max, {sink})" for sink in sinks]
    for sink in sinks:
        weight = f"tl.exp2(({sink} - row_max){times})" if times else f"tl.exp2({sink} - row_max)"
        lines.append(f'row_sum = row_sum + tl.where({sink} > float("-inf"), {weight}, 0.0)')
    return lines


def _tanh(spec: AttentionSpec) -> str:
    return "approx" if spec.query.dtype.itemsize < 4 else "exact"
