"""Attention specs by name, built straight from the records: what every kernel test runs on.

A ``Case`` is a spec, the sizes it is tried at, and the tile that tests use. ``CASES`` holds one for each thing that a
kernel can be asked to do; the names are the ids of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy as sp
import torch

from attngen.algebra import Const, Expr, Int, Load, integer, op, to_float, where
from attngen.compat import FloorDiv
from attngen.index import Axis
from attngen.passes import dropout
from attngen.spec import FEATURE, INNER, KEY, ROW, SCORE, AttentionSpec, Input, Problem, Tile, Total, batch_axes

B, H = batch_axes(2)
ZERO = sp.Integer(0)
HALF = torch.float16
TILE = Tile(64, 32, 4, 2)
LOWEST = torch.finfo(torch.float32).min
# Bytes of stack per thread: with long tiles a few are cheaper than a smaller tile, as timings on Hopper have it.
WORTH_IT = 64

CAUSAL = op("le", Int(KEY), Int(ROW))
BOTTOM_RIGHT = op("le", Int(KEY), Int(ROW + KEY.extent - ROW.extent))
STRICTLY_CAUSAL = op("lt", Int(KEY), Int(ROW))  # the first row sees no key


@dataclass(frozen=True)
class Case:
    name: str
    spec: AttentionSpec
    tile: Tile = TILE
    batch: tuple[int, ...] = (2, 2)
    cross: int = 0  # how many keys there are beyond the query length

    def problem(self, rows: int) -> Problem:
        """``rows`` queries (or the one that a spec without a query dimension has)."""
        has_rows = self.spec.query.dim_of(ROW) is not None
        return Problem(self.batch, rows if has_rows else 1, rows + self.cross)


def scaled(factor: float, score: Expr = SCORE) -> Expr:
    return op("mul", score, Const(factor))


def plus(*parts: Expr) -> Expr:
    result, *rest = parts
    for part in rest:
        result = op("add", result, part)
    return result


def window(width: int) -> Expr:
    return op("and", CAUSAL, op("gt", Int(KEY), Int(ROW - width)))


def softcap(cap: float, score: Expr) -> Expr:
    return scaled(cap, op("tanh", op("div", score, Const(cap))))


def attention(
    *,
    dtype: torch.dtype = HALF,
    head_dim: int = 64,
    value_dim: int | None = None,
    groups: int = 1,
    batch: tuple[Axis, ...] = (B, H),
    output: tuple[Axis, ...] | None = None,
    score: Expr | None = None,
    extras: dict[str, tuple[torch.dtype, tuple[sp.Expr, ...]]] | None = None,
    **changes: object,
) -> AttentionSpec:
    """A spec over ``[*batch, rows, head_dim]`` operands; ``groups`` query heads share one key head."""
    lead = tuple(FloorDiv(a, groups) if a is H and groups > 1 else a for a in batch)
    spec = AttentionSpec(
        query=Input("q", (*batch, ROW, INNER), dtype),
        keys=Input("k", (*lead, KEY, INNER), dtype),
        values=Input("v", (*lead, KEY, FEATURE), dtype),
        extras=tuple(Input(name, index, kind) for name, (kind, index) in (extras or {}).items()),
        batch=batch,
        output=output or (*batch, ROW, FEATURE),
        head_dim=head_dim,
        value_dim=value_dim or head_dim,
        out_dtype=dtype,
        score=scaled(head_dim**-0.5) if score is None else score,
    )
    return replace(spec, **changes)  # type: ignore[arg-type]


def loaded(name: str, *index: sp.Expr, kind: str = "float") -> Load:
    return Load(name, tuple(Int(sp.sympify(place)) for place in index), kind)


def dropped(p: float, *outer: sp.Expr) -> Expr:
    """Dropout with the seed ``t0`` of weights ``[*outer, i, j]``."""
    return dropout.factor("t0", p, (*outer, ROW, KEY), tuple(axis.extent for axis in (*outer, ROW, KEY)))  # type: ignore[attr-defined]


QK = scaled(0.125)
SLOPE, BIAS = loaded("t0", H), loaded("t0", ZERO, H, ROW, KEY)
DIAGONAL = KEY - ROW + ROW.extent - 1
PADDING = loaded("t0", B, KEY, kind="bool")
SEED = {"t0": (torch.int64, ())}
SLOPES = {"t0": (torch.float32, (H,))}
DENSE = {"t0": (HALF, (ZERO, H, ROW, KEY))}
TABLE = {"t0": (torch.float32, (H, DIAGONAL))}
HIDDEN = {"t0": (torch.int64, (B, KEY))}
FAR_DOWN = op("mul", to_float(loaded("t0", B, KEY, kind="int")), Const(-40000.0))  # no mask but in 16 bits
BOOLEANS = {"t0": (torch.bool, (B, KEY))}
LENGTHS = {"t0": (torch.int64, (B,))}
DOCUMENTS = {"t0": (torch.int64, (B, ROW)), "t1": (torch.int64, (B, KEY))}
SAME_DOCUMENT = op("eq", loaded("t0", B, ROW, kind="int"), loaded("t1", B, KEY, kind="int"))
ALIBI = plus(QK, op("mul", SLOPE, to_float(Int(KEY))))
ALIBI_DISTANCE = plus(QK, op("mul", SLOPE, to_float(op("neg", op("abs", Int(ROW - KEY))))))
STREAMING = op("or", window(32), op("and", CAUSAL, op("lt", Int(KEY), integer(4))))
CHUNKS = op("and", CAUSAL, op("eq", Int(FloorDiv(ROW, 48)), Int(FloorDiv(KEY, 48))))
DILATED = op("and", CAUSAL, op("eq", Int(sp.Mod(ROW - KEY, 3)), integer(0)))
BESIDE = op("ge", Int(FloorDiv(ROW - KEY, 32)), integer(-1))  # keys up to the end of the next block of 32
# All pairs but those of the first query or key have a bias per group of four keys; the others read what does not count.
BESIDE_THE_FIRST = op("and", op("ge", Int(ROW), integer(1)), op("ge", Int(KEY), integer(1)))
GROUPED = (B, H, sp.Max(0, ROW - 1), FloorDiv(sp.Max(0, KEY - 1), 4))
PREFIX = op("or", CAUSAL, op("lt", Int(KEY), integer(40)))
POSITIVE = op("max", QK, Const(0.0))
SQUARED, ROW_SUM = op("mul", POSITIVE, POSITIVE), plus(loaded("t0", B, H, ROW, ZERO), Const(1e-6))
OVER_ITS_SUM = {"extras": {"t0": (HALF, (B, H, ROW, ZERO))}, "mask": CAUSAL, "softmax": False}


def filled(score: Expr, mask: Expr, fill: float) -> dict[str, object]:
    """The fields of a spec whose masked pairs get ``fill``, where that could show."""
    return {"score": score, "mask": mask, "whole": where(mask, score, Const(fill)), "redo_below": fill + 104.0}


def _added(score: Expr, mask: Expr, fill: float) -> dict[str, object]:
    """The same for a fill value that is added to the score."""
    whole = plus(score, where(mask, Const(0.0), Const(fill)))
    return {"score": score, "mask": mask, "whole": whole, "redo_below": fill + 104.0}


def _added_in_half(score: Expr, mask: Expr) -> dict[str, object]:
    """The same for the lowest number of fp16, added in that type."""
    found = _added(score, mask, torch.finfo(HALF).min)
    return {**found, "whole": op("rounded", found["whole"], Const(-32768.0)), "redo_below": -30000.0}  # type: ignore[arg-type]


CASES = (
    Case("dense", attention()),
    Case("dense_lse", attention(lse=True)),
    Case("dense_bf16", attention(dtype=torch.bfloat16)),
    Case("dense_fp32", attention(dtype=torch.float32), tile=Tile(64, 32, 8, 2)),
    Case("unscaled", attention(score=SCORE)),
    Case("negative_scale", attention(score=scaled(-0.125))),
    Case("wide", attention(wide=True, mask=CAUSAL)),
    Case("heads_last", attention(mask=CAUSAL, output=(B, ROW, H, FEATURE))),
    Case("no_batch", attention(batch=()), batch=()),
    Case("one_batch", attention(batch=(B,), mask=CAUSAL), batch=(3,)),
    Case("head_40", attention(head_dim=40, mask=CAUSAL)),
    Case("head_80", attention(head_dim=80)),
    Case("head_96", attention(head_dim=96, mask=CAUSAL, lse=True)),
    Case("head_256", attention(head_dim=256, mask=CAUSAL), tile=Tile(64, 32, 8, 2)),
    Case("head_512", attention(head_dim=512), tile=Tile(32, 32, 8, 1)),
    Case("head_192_value_128", attention(head_dim=192, value_dim=128, mask=CAUSAL), tile=Tile(64, 32, 8, 2)),
    Case("value_24", attention(value_dim=24)),
    Case("head_8_fp32", attention(head_dim=8, dtype=torch.float32), tile=Tile(64, 32, 8, 2)),
    Case("causal", attention(mask=CAUSAL)),
    Case("causal_lse", attention(mask=CAUSAL, lse=True)),
    Case("causal_bf16", attention(mask=CAUSAL, dtype=torch.bfloat16, head_dim=128), tile=Tile(128, 64, 8, 3)),
    Case("causal_bottom_right", attention(mask=BOTTOM_RIGHT), cross=37),
    Case("cross", attention(), cross=61),
    Case("grouped", attention(groups=4, mask=CAUSAL), batch=(1, 8)),
    Case("window", attention(mask=window(40))),
    Case("window_symmetric", attention(mask=op("le", op("abs", Int(ROW - KEY)), integer(24)))),
    Case("softcap_window", attention(mask=window(40), score=softcap(50.0, QK))),
    Case("softcap_fp32", attention(dtype=torch.float32, score=softcap(30.0, QK)), tile=Tile(64, 32, 8, 2)),
    Case("streaming", attention(mask=STREAMING)),
    Case("chunks", attention(mask=CHUNKS)),
    Case("dilated", attention(mask=DILATED)),
    Case("blocks_beside", attention(mask=BESIDE)),
    Case("prefix", attention(mask=PREFIX)),
    Case("alibi", attention(mask=CAUSAL, score=ALIBI, extras=SLOPES)),
    Case("alibi_distance", attention(score=ALIBI_DISTANCE, extras=SLOPES)),
    Case("bias", attention(score=plus(QK, BIAS), extras=DENSE)),
    Case(
        "bias_beside_the_first",
        attention(score=where(BESIDE_THE_FIRST, plus(QK, loaded("t0", *GROUPED)), QK), extras={"t0": (HALF, GROUPED)}),
    ),
    Case("padding_in_half", attention(score=plus(QK, op("drown", FAR_DOWN, Const(-32768.0))), extras=HIDDEN, lse=True)),
    Case("mask_added_in_half", attention(score=plus(QK, op("drown", BIAS, Const(-32768.0))), extras=DENSE)),
    Case("table_cross", attention(score=plus(SCORE, loaded("t0", H, DIAGONAL)), extras=TABLE), cross=29),
    Case("temperature", attention(score=op("mul", SCORE, SLOPE), extras=SLOPES)),
    Case("padding", attention(mask=PADDING, extras=BOOLEANS)),
    Case("padding_causal", attention(mask=op("and", CAUSAL, PADDING), extras=BOOLEANS, lse=True)),
    Case("lengths", attention(mask=op("lt", Int(KEY), loaded("t0", B, kind="int")), extras=LENGTHS)),
    Case("documents", attention(mask=op("and", CAUSAL, SAME_DOCUMENT), extras=DOCUMENTS)),
    Case("sinks", attention(mask=window(40), sinks=(SLOPE,), extras=SLOPES, lse=True)),
    Case(
        "sinks_by_query",
        attention(sinks=(loaded("t0", B, H, ROW),), extras={"t0": (torch.float32, (B, H, ROW))}, mask=CAUSAL, lse=True),
    ),
    Case("softmax_plus_one", attention(sinks=(Const(0.0),))),
    Case("empty_rows_nan", attention(mask=STRICTLY_CAUSAL)),
    Case("empty_rows_zero", attention(mask=STRICTLY_CAUSAL, empty="zero", lse=True)),
    Case("rows_never_nan", attention(mask=STRICTLY_CAUSAL, empty="never_nan", lse=True)),
    Case("fill_shows", attention(**filled(QK, STRICTLY_CAUSAL, -10000.0), lse=True), tile=Tile(64, 64, 8, 2)),
    Case("fill_lowest", attention(**filled(QK, STRICTLY_CAUSAL, LOWEST))),
    Case("fill_added", attention(**_added(QK, STRICTLY_CAUSAL, LOWEST), lse=True)),
    Case("fill_added_in_half", attention(**_added_in_half(QK, STRICTLY_CAUSAL), lse=True)),
    Case("fill_shows_padding", attention(**filled(QK, PADDING, -1e9), extras=BOOLEANS)),
    Case("sigmoid", attention(score=op("sigmoid", plus(QK, Const(-4.0))), softmax=False, lse=True)),
    Case("squared_relu", attention(score=op("mul", POSITIVE, POSITIVE), mask=CAUSAL, softmax=False)),
    Case("own_sum", attention(score=op("div", SQUARED, ROW_SUM), total=Total("t0", SQUARED), **OVER_ITS_SUM, lse=True)),
    Case("decay", attention(score=op("mul", QK, loaded("t0", H, DIAGONAL)), extras=TABLE, mask=CAUSAL, softmax=False)),
    Case("no_softmax", attention(mask=window(40), softmax=False, dtype=torch.bfloat16)),
    Case("head_gain", attention(gain=SLOPE, extras=SLOPES)),
    Case("pair_gain", attention(gain=loaded("t0", ZERO, H, ROW, KEY), extras=DENSE, mask=CAUSAL, lse=True)),
    Case("signed", attention(score=op("abs", QK), gain=where(op("gt", QK, Const(0.0)), Const(1.0), Const(-1.0)))),
    Case("dropped", attention(gain=dropped(0.3, B, H), extras=SEED, lse=True)),
    Case("dropped_causal", attention(gain=dropped(0.1, B, H), extras=SEED, mask=CAUSAL, groups=2), batch=(1, 4)),
    Case("dropped_one_batch", attention(gain=dropped(0.5, B), extras=SEED, batch=(B,), wide=True), batch=(3,)),
    Case(
        "dropped_one_query",
        attention(
            query=Input("q", (B, H, ZERO, INNER), HALF),
            gain=dropout.factor("t0", 0.3, (B, H, ZERO, KEY), (B.extent, H.extent, sp.Integer(1), KEY.extent)),  # type: ignore[attr-defined]
            extras=SEED,
        ),
        cross=80,
    ),
    Case(
        "dropped_fill_shows",
        attention(**filled(QK, STRICTLY_CAUSAL, -10000.0), gain=dropped(0.2, B, H), extras=SEED),
        tile=Tile(64, 64, 8, 2),
    ),
    Case("multi_query", attention(batch=(H,), keys=Input("k", (KEY, INNER), HALF), mask=CAUSAL), batch=(3,)),
    Case(
        "one_query",
        attention(query=Input("q", (B, H, ZERO, INNER), HALF), mask=PADDING, extras=BOOLEANS),
        cross=80,
    ),
)

BY_NAME = {case.name: case for case in CASES}

# Their kernels are of the same head size and type as others, and made of lines that stand in those (``test_emit`` looks).
ALIKE = (
    "dense_lse", "unscaled", "causal_lse", "cross", "window", "padding", "empty_rows_nan", "dropped_causal",
)  # fmt: skip
FOR_OLDEST = (  # call all that any kernel calls: those that are run with the oldest Triton
    "dense_bf16", "dense_fp32", "wide", "head_40", "grouped", "window_symmetric", "softcap_window", "streaming", "dilated",
    "bias", "mask_added_in_half", "table_cross", "padding_causal", "lengths", "documents", "sinks_by_query", "fill_shows",
    "fill_added_in_half", "decay", "dropped",
)  # fmt: skip
DISTINCT = tuple(case for case in CASES if case.name not in ALIKE)  # for compilers, to which numbers are all the same
