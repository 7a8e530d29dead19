"""The score program of a spec as kernel text: what both template families put around the products."""

from __future__ import annotations

import math
from typing import Any

from attngen.algebra import ONE, TRUE, Const, Expr, Load, Op, number, op, terms, total
from attngen.layout import arguments
from attngen.mask import Cover, heavy_first
from attngen.printer import LOG2E, Printer, Unprintable, bare
from attngen.spec import KEY, ROW, SCORE, AttentionSpec

MASKING = 1e5  # a number beyond this masks; in base 2 it would lose digits that the exponential needs


def holes_of_spec(spec: AttentionSpec, cover: Cover, l2_bytes: int) -> dict[str, Any]:
    """What any forward template is filled with, whatever its tile."""
    first = heavy_first(cover)
    return {
        "heavy_first": first,
        "softmax": spec.softmax,
        "empty": spec.empty,
        "lse": spec.lse,
        "log2e": repr(LOG2E),
        "ln2": repr(1 / LOG2E),
        "head_dim": spec.head_dim,
        "value_dim": spec.value_dim,
        **arguments(spec, first),
        "l2_half": l2_bytes // 2,
        "kv_bytes_per_key": spec.head_dim * spec.keys.dtype.itemsize + spec.value_dim * spec.values.dtype.itemsize,
    }


def in_units(spec: AttentionSpec, *, leaves_rows: bool = False) -> tuple[float, Expr, bool]:
    """The scale and the score that it is taken off, as in ``scaled_score``; True if scores stay in natural units.

    They need not where rows are left to others whose scores are finite in these units alone.
    """
    natural = not spec.softmax or (loads_over_keys(spec.score) and not leaves_rows)
    return (LOG2E, spec.score, True) if natural else (*scaled_score(spec.score), False)


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


def score_lines(printer: Printer, spec: AttentionSpec, scale: float, shaped: Expr, natural: bool) -> dict[str, Any]:
    scaled = scale != 1 and not natural
    full, gain, full_reads = bare(printer.value(shaped, masked=False)), gain_of(printer, spec, False), printer.blocks()
    masked, keep = bare(printer.value(shaped, masked=True)), kept(printer, spec.mask)
    return {
        "gain": gain,
        "masked_gain": gain_of(printer, spec, True),
        "full": full,
        "full_reads": full_reads,
        "masked": masked,
        "masked_reads": printer.blocks(),
        "keep": keep,
        "times": " * scale" if scaled else "",
        "natural": natural,
        "may_be_infinite": any(isinstance(n, Load) and n != SCORE for n in spec.score.walk()),
    }


def kept(printer: Printer, mask: Expr) -> str:
    """The mask as text; empty if it keeps everything."""
    if mask == TRUE:
        return ""
    text = printer.value(mask, masked=True)
    return bare(text) if isinstance(mask, Op) and mask.name == "and" else text


def gain_of(printer: Printer, spec: AttentionSpec, masked: bool) -> str:
    """Weights times this go into the product; empty if it is one."""
    return "" if spec.gain == ONE else " * " + printer.value(spec.gain, masked=masked)


def sink_values(printer: Printer, sinks: tuple[Expr, ...], natural: bool) -> list[str]:
    """Sinks as variables, in the units of the scores: one number for all rows of a program, or one for each."""
    sinks = sinks if natural else tuple(op("mul", sink, Const(LOG2E)) for sink in sinks)
    if any(KEY in sink.axes for sink in sinks):
        raise Unprintable("a sink that differs from key to key")
    texts = [printer.hoisted(sink) for sink in sinks]
    return [f"tl.reshape({t}, [BLOCK_I])" if ROW in s.axes else t for s, t in zip(sinks, texts, strict=True)]


def tanh_of(spec: AttentionSpec) -> str:
    return "approx" if spec.query.dtype.itemsize < 4 else "exact"
