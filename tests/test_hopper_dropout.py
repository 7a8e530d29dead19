"""Dropout in the kernels of the hopper family, in the simulator: with the mask of the spec, whatever else there is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from specs import CAUSAL, SEED, B, H, attention, dropped, loaded, plus, scaled, softcap, window
from test_hopper import GRID, NARROW, PERSISTENT, THREE_GROUPS, right, run, written
from test_hopper_backward import right as right_gradients

from attngen import hopper, hopper_bwd
from attngen.algebra import TRUE, Const, Expr, Int, op, to_float, where
from attngen.dropped import dropped_of
from attngen.spec import KEY, ROW, AttentionSpec, Problem, Tile
from attngen.verify import reference, sample_inputs

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
def test_results_of_ragged_lengths_and_groups(head_dim: int, groups: int, mask: str) -> None:
    spec = dropping(head_dim, groups=groups, mask=MASKS[mask], lse=True)
    for tile, rows, keys in ((PERSISTENT, 300, 300), (GRID, 150, 130)):
        right(spec, tile, sample_inputs(spec, Problem((1, 4), rows, keys)))


@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_results_of_heads_of_other_sizes(head_dim: int) -> None:
    spec = dropping(head_dim, mask=CAUSAL)
    inputs = sample_inputs(spec, Problem((1, 2), 210, 210))
    for tile in (NARROW, THREE_GROUPS) if head_dim == 64 else (NARROW,):
        right(spec, tile, inputs)


@pytest.mark.parametrize("tile", [PERSISTENT, NARROW], ids=str)
def test_exactly_the_weights_of_the_spec_are_dropped(tile: Tile) -> None:
    """Identity in place of values shows the mask that a kernel draws."""
    spec = dropping(64, mask=CAUSAL)
    q, identity = torch.zeros(2, 2, 64, 64, dtype=BF16), torch.eye(64, dtype=BF16).expand(2, 2, 64, 64).contiguous()
    inputs = [q, q, identity, torch.tensor(2**62 + 2**33 + 7)]
    (found,) = run(written(spec, tile), inputs)
    expected, _ = reference(spec, inputs)
    assert torch.equal(found != 0, expected != 0)
    assert 0.2 < (expected != 0).double().mean() < 0.5


def test_rows_that_see_nothing_and_sinks() -> None:
    sinks = dropping(64, mask=window(40), sinks=(loaded("t1", H),), extras={"t1": (torch.float32, (H,))}, lse=True)
    nothing = dropping(64, mask=op("lt", Int(KEY), Int(ROW)), empty="zero", lse=True)
    for spec in (sinks, nothing):
        right(spec, PERSISTENT, sample_inputs(spec, Problem((1, 2), 200, 200)))


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
def test_programs_of_scores(head_dim: int, name: str) -> None:
    spec, problem = programs(head_dim)[name], Problem((1, 4), 136, 144)
    right(spec, PERSISTENT, sample_inputs(spec, problem))
    right_gradients(spec, problem)


def turned(gain: Expr) -> Expr:
    """The same of weights that are numbered by key first."""
    places = {ROW: KEY, KEY: ROW}
    bits = gain.children[0].children[0]
    seed, first, second, *others = bits.children
    assert isinstance(first, Int) and isinstance(second, Int)
    first, second = (Int(each.value.xreplace(places)) for each in (first, second))
    return where(op("ge", op("random", seed, first, second, *others), gain.children[0].children[1]), *gain.children[1:])


def test_weights_that_are_numbered_by_key_first() -> None:
    spec, problem = dropping(64, gain=turned(dropped(RATE, B, H))), Problem((1, 2), 150, 130)
    right(spec, PERSISTENT, sample_inputs(spec, problem))
    right_gradients(spec, problem)


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
    right(spec, PERSISTENT, sample_inputs(spec, Problem((1, 2), 100, 130)))
    right_gradients(spec, Problem((1, 2), 100, 130))
    nothing = replace(spec, mask=op("lt", Int(KEY), Int(ROW)), empty="never_nan")
    right(nothing, PERSISTENT, sample_inputs(nothing, Problem((1, 2), 100, 130)))
    right_gradients(nothing, Problem((1, 2), 100, 130))


def test_other_gains_are_refused() -> None:
    gain = op("mul", dropped(RATE, B, H), loaded("t1", H))
    refused = {
        "not dropped alone": dropping(64, gain=gain, extras={"t1": (torch.float32, (H,))}),
        "nothing normalises": dropping(64, softmax=False),
    }
    for reason, spec in refused.items():
        assert reason in str(hopper.unsuited(spec)) and reason in str(hopper_bwd.unsuited(spec))
    assert "8 bits" in str(hopper.unsuited(dropping(64, fp8="rotate")))
