"""Rows of scores that a mask leaves nothing of, which the hopper families leave to portable kernels behind them.

What is loaded for pairs may be a mask: numbers so low that nothing of a score is left beside them in 16 bits (``drown``), or
in natural units alone finite. In a row that has any other score such pairs weigh nothing, whatever exactly they are; so no
pair need be looked at for them, and scores are scaled to base 2 as all others. A row that has nothing else shows in its
maximum.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from attngen.algebra import Expr, Op, number, transform
from attngen.scores import MASKING, loads_over_keys
from attngen.spec import AttentionSpec

HIGHEST = 1e36  # rows whose best score is beyond it, or below its negative, are left to others: in base 2 they may overflow


@lru_cache(maxsize=4096)
def floor(spec: AttentionSpec) -> float | None:
    """Rows whose best score is no better than that are left to a portable kernel; None where all rows are computed."""
    if not spec.softmax or spec.fp8:
        return None
    floors = [] if spec.redo_below is None else [spec.redo_below]
    if loads_over_keys(spec.score):
        limits = (number(node.args[1]) for node in spec.score.walk() if _drowns(node))  # type: ignore[attr-defined]
        floors += [-MASKING, *(limit / 2 for limit in limits if limit is not None)]
    return max([*floors, -HIGHEST]) if floors else None


@lru_cache(maxsize=4096)
def without(spec: AttentionSpec) -> AttentionSpec:
    """What is computed of the other rows."""
    return spec if floor(spec) is None else replace(spec, score=transform(spec.score, _plain))


def _plain(expr: Expr) -> Expr | None:
    return transform(expr.args[0], _plain) if _drowns(expr) else None  # type: ignore[attr-defined]


def _drowns(expr: Expr) -> bool:
    return isinstance(expr, Op) and expr.name == "drown"
