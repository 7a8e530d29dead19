"""Dropout in the kernels of the hopper family, in the simulator: with the mask of the spec, whatever else there is."""

from __future__ import annotations

import math

import pytest
import torch
from specs import CAUSAL, SEED, B, H, attention, dropped, loaded, plus, scaled, softcap, window
from test_hopper_backward import right as right_gradients

from attngen.algebra import TRUE, Const, Expr, Int, op, to_float, where
from attngen.dropped import dropped_of
from attngen.hopper_bwd import unsuited
from attngen.spec import KEY, ROW, AttentionSpec, Problem

BF16 = torch.bfloat16
RATE = 0.3
MASKS = {"full": TRUE, "causal": CAUSAL, "window": window(70)}


def dropping(head_dim: int, **changes: object) -> AttentionSpec:
    extras = {**SEED, **changes.pop("extras", {})}  # type: ignore[dict-item]
    fields = {"dtype": BF16, "gain": dropped(RATE, B, H), "extras": extras, **changes}
    return attention(head_dim=head_dim, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_of_ragged_lengths_and_groups(head_dim: int, groups: int, mask: str) -> None:
    spec = dropping(head_dim, groups=groups, mask=MASKS[mask])
    for rows, keys in ((150, 150), (5, 300) if mask != "window" else (130, 170)):
        right_gradients(spec, Problem((2, 4), rows, keys))


def programs(head_dim: int) -> dict[str, AttentionSpec]:
    qk, bias = scaled(1 / math.sqrt(head_dim)), loaded("t1", B, H, ROW, KEY)
    linear = plus(qk, op("mul", loaded("t1", H), to_float(Int(KEY))))
    return {
        "softcap": dropping(head_dim, score=softcap(20.0, qk), mask=CAUSAL),
        "bias": dropping(head_dim, score=plus(qk, bias), extras={"t1": (BF16, (B, H, ROW, KEY))}),
        "alibi": dropping(head_dim, score=linear, extras={"t1": (torch.float32, (H,))}, groups=2),
        "padding": dropping(head_dim, mask=loaded("t1", B, KEY, kind="bool"), extras={"t1": (torch.bool, (B, KEY))}),
    }


@pytest.mark.parametrize("name", programs(64))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_beside_programs_of_scores(head_dim: int, name: str) -> None:
    right_gradients(programs(head_dim)[name], Problem((1, 4), 136, 144))


def turned(gain: Expr) -> Expr:
    """The same of weights that are numbered by key first."""
    places = {ROW: KEY, KEY: ROW}
    bits = gain.children[0].children[0]
    seed, first, second, *others = bits.children
    assert isinstance(first, Int) and isinstance(second, Int)
    first, second = (Int(each.value.xreplace(places)) for each in (first, second))
    return where(op("ge", op("random", seed, first, second, *others), gain.children[0].children[1]), *gain.children[1:])


def test_weights_that_are_numbered_by_key_first() -> None:
    right_gradients(dropping(64, gain=turned(dropped(RATE, B, H))), Problem((1, 2), 150, 130))


def test_what_dropout_makes_is_told_from_other_gains() -> None:
    gain = dropped(RATE, B, H)
    found = dropped_of(gain)
    assert found is not None and found.factor == 1 / (1 - RATE) and found.threshold == round(RATE * 2**31)
    negative = dropped_of(op("mul", gain, Const(-0.5)))
    assert negative is not None and negative.factor == -0.5 / (1 - RATE) and negative.bits == found.bits
    within_rows = dropped(RATE, B, ROW, KEY, H)  # its counter changes within a block beyond its first two numbers
    others = (Const(2.0), loaded("t0", H), op("mul", gain, loaded("t1", H)), within_rows)
    assert [dropped_of(each) for each in others] == [None] * 4
    assert dropped_of(op("add", gain, Const(1.0))) is None


def test_a_factor_that_is_negative() -> None:
    spec = dropping(64, gain=op("mul", dropped(RATE, B, H), Const(-0.5)))
    assert unsuited(spec) is None
    right_gradients(spec, Problem((1, 2), 100, 130))
