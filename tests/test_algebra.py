"""The algebra against numbers: whatever a constructor folds must have the value of what it was asked to build."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attngen.algebra import (
    COMPARISONS,
    FALSE,
    TRUE,
    Const,
    Expr,
    Int,
    Load,
    Op,
    Reduce,
    as_number,
    compare,
    integer,
    negate,
    number,
    op,
    substitute,
    terms,
    to_bool,
    to_float,
    to_int,
    total,
    where,
)
from attngen.compat import FloorDiv
from attngen.evaluate import FUNCTIONS, Evaluator
from attngen.index import Axis

R, C = Axis("i", 7), Axis("j", 5)
POSITIONS = {R: torch.arange(7).reshape(-1, 1), C: torch.arange(5)}
TENSORS = {
    "x": torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "m": torch.rand(7, 5, generator=torch.Generator().manual_seed(1)) < 0.5,
    "n": torch.randint(-3, 4, (7, 5), generator=torch.Generator().manual_seed(2)),
}
LEAVES = {name: Load(name, (Int(R), Int(C)), kind) for name, kind in (("x", "float"), ("m", "bool"), ("n", "int"))}


def value(expr: Expr) -> torch.Tensor:
    """The expression at every position, as float64."""
    evaluate = Evaluator(POSITIONS, TENSORS.__getitem__)
    return torch.broadcast_to(evaluate(expr), (7, 5)).double()


def literal(name: str, *args: Expr) -> torch.Tensor:
    """What ``name`` means for these arguments, computed without any constructor."""
    values = [torch.broadcast_to(Evaluator(POSITIONS, TENSORS.__getitem__)(a), (7, 5)) for a in args]
    if name == "float":
        return values[0].double()
    if name not in ("and", "or", "not", "where"):
        values = [v.long() if v.dtype == torch.bool else v for v in values]
    if name in ("and", "or", "not"):
        values = [v != 0 for v in values]
    if name == "where":
        values = [values[0], *(v.double() for v in values[1:])]
    if name in ("min", "max"):
        values = [v.double() for v in values]
    if name == "trunc":
        return values[0].double().trunc()
    return FUNCTIONS[name](*values).double()


# ------------------------------------------------------------------------------------------------- random expressions

NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 2.0, 0.5, -0.125, 3.0])
INTEGERS = st.one_of(
    st.integers(-4, 8).map(integer),
    st.sampled_from([Int(R), Int(C), Int(R - C), Int(2 * R + C), Int(FloorDiv(R, 2)), Int(sp.Mod(C, 3)), LEAVES["n"]]),
)


def booleans(inner: st.SearchStrategy[Expr], floats: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    relation = st.sampled_from(sorted(COMPARISONS))
    return st.one_of(
        st.builds(lambda name, a, b: op(name, a, b), relation, INTEGERS, INTEGERS),
        st.builds(lambda name, a, b: op(name, a, b), relation, floats, floats),
        st.builds(lambda name, a, b: op(name, a, b), st.sampled_from(["and", "or", "eq", "ne"]), inner, inner),
        st.builds(negate, inner),
        st.builds(where, inner, inner, inner),
    )


def arithmetic(floats: st.SearchStrategy[Expr], truths: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    binary = st.sampled_from(["add", "sub", "mul", "min", "max"])
    return st.one_of(
        st.builds(lambda name, a, b: op(name, a, b), binary, floats, floats),
        st.builds(lambda name, a: op(name, a), st.sampled_from(["neg", "abs", "tanh"]), floats),
        st.builds(where, truths, floats, floats),
        st.builds(lambda a, b: op("div", a, b), floats, st.sampled_from([Const(2.0), Const(-4.0), Const(1.0)])),
    )


BOOL_LEAVES = st.sampled_from([TRUE, FALSE, LEAVES["m"], op("le", Int(C), Int(R)), op("lt", Int(R), integer(1))])
FLOAT_LEAVES = st.one_of(NUMBERS.map(Const), st.just(LEAVES["x"]), INTEGERS.map(to_float))
FLOATS_1 = st.one_of(FLOAT_LEAVES, arithmetic(FLOAT_LEAVES, BOOL_LEAVES))
BOOLS_1 = st.one_of(BOOL_LEAVES, booleans(BOOL_LEAVES, FLOATS_1))
BOOLS_2 = st.one_of(BOOLS_1, booleans(BOOLS_1, FLOATS_1))
FLOATS_2 = st.one_of(FLOATS_1, arithmetic(FLOATS_1, BOOLS_2))
ANY = st.one_of(INTEGERS, FLOATS_2, BOOLS_2)
MANY = settings(max_examples=400, deadline=None)


def same(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12, equal_nan=True)


@MANY
@given(st.sampled_from(["add", "sub", "mul", "min", "max", *sorted(COMPARISONS)]), ANY, ANY)
def test_binary_constructors_mean_what_they_say(name: str, left: Expr, right: Expr) -> None:
    same(value(op(name, left, right)), literal(name, left, right))


@MANY
@given(st.sampled_from(["neg", "abs", "tanh", "exp", "sqrt", "float", "trunc", "not"]), ANY)
def test_unary_constructors_mean_what_they_say(name: str, arg: Expr) -> None:
    if name in ("tanh", "exp", "sqrt"):
        arg = to_float(arg)
    same(value(op(name, arg)), literal(name, arg))


@MANY
@given(st.sampled_from(["floordiv", "mod"]), INTEGERS, st.integers(1, 6))
def test_integer_division_rounds_down(name: str, left: Expr, divisor: int) -> None:
    same(value(op(name, left, integer(divisor))), literal(name, left, integer(divisor)))


@MANY
@given(st.sampled_from(["and", "or"]), st.lists(BOOLS_2, min_size=1, max_size=4))
def test_junctions_mean_what_they_say(name: str, parts: list[Expr]) -> None:
    same(value(op(name, *parts)), literal(name, *parts))


@MANY
@given(BOOLS_2, ANY, ANY)
def test_where_chooses(condition: Expr, yes: Expr, no: Expr) -> None:
    same(value(where(condition, yes, no)), literal("where", condition, yes, no))


@MANY
@given(BOOLS_2)
def test_negation_flips_every_element(expr: Expr) -> None:
    assert torch.equal(value(negate(expr)), 1 - value(expr))
    assert value(negate(negate(expr))).equal(value(expr))


@MANY
@given(FLOATS_2)
def test_terms_add_up(expr: Expr) -> None:
    parts = terms(expr)
    same(sum((value(part) for part in parts), torch.zeros(7, 5, dtype=torch.float64)), value(expr))
    same(value(total(parts)), value(expr))


@MANY
@given(FLOATS_2, st.sampled_from([-2.0, 0.5, 1.0]))
def test_scaled_terms_add_up(expr: Expr, sign: float) -> None:
    same(sum((value(t) for t in terms(expr, sign)), torch.zeros(7, 5, dtype=torch.float64)), sign * value(expr))


@MANY
@given(ANY, st.sampled_from([R // 1, 6 - R, sp.Integer(0), sp.Integer(6), FloorDiv(R, 2), R - sp.Min(R, C)]))
def test_substitution_reads_elsewhere(expr: Expr, place: sp.Expr) -> None:
    """Substituting a row and evaluating is evaluating at that row."""
    moved = Evaluator(POSITIONS, TENSORS.__getitem__).integer(place)
    there = Evaluator({R: torch.as_tensor(moved), C: POSITIONS[C]}, TENSORS.__getitem__)
    same(value(substitute(expr, {R: place})), torch.broadcast_to(there(expr), (7, 5)).double())


@MANY
@given(ANY)
def test_equal_expressions_have_equal_hashes_and_kinds_hold(expr: Expr) -> None:
    again = substitute(expr, {Axis("unused", 3): sp.Integer(0)})
    assert again == expr and hash(again) == hash(expr)
    dtype = Evaluator(POSITIONS, TENSORS.__getitem__)(expr).dtype
    assert expr.kind == ("bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int")
    assert expr.axes <= {R, C}


# ----------------------------------------------------------------------------------------------------- single folds


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        (lambda: op("le", Int(C), Int(C + R)), TRUE),
        (lambda: op("lt", Int(R), integer(7)), TRUE),
        (lambda: op("ge", Int(R), integer(7)), FALSE),
        (lambda: op("eq", Int(R + 1), Int(R)), FALSE),
        (lambda: op("and", LEAVES["m"], negate(LEAVES["m"])), FALSE),
        (lambda: op("or", LEAVES["m"], negate(LEAVES["m"])), TRUE),
        (lambda: op("and", LEAVES["m"], TRUE, LEAVES["m"]), LEAVES["m"]),
        (lambda: op("add", LEAVES["x"], Const(0.0)), LEAVES["x"]),
        (lambda: op("mul", Const(1.0), LEAVES["x"]), LEAVES["x"]),
        (lambda: op("mul", Const(2.0), Const(3.0)), Const(6.0)),
        (lambda: op("exp", Const(0.0)), Const(1.0)),
        (lambda: op("floordiv", Int(7 * C + R), integer(7)), Int(C)),
        (lambda: op("mod", Int(7 * C + R), integer(7)), Int(R)),
        (lambda: where(LEAVES["m"], LEAVES["x"], LEAVES["x"]), LEAVES["x"]),
        (lambda: where(LEAVES["m"], where(LEAVES["m"], LEAVES["x"], Const(1.0)), Const(2.0)).args[1], LEAVES["x"]),
        (lambda: where(LEAVES["m"], Const(1.0), where(LEAVES["m"], Const(2.0), LEAVES["x"])).args[2], LEAVES["x"]),
        (lambda: op("eq", where(LEAVES["m"], integer(1), integer(0)), integer(0)), negate(LEAVES["m"])),
        (lambda: op("mul", where(LEAVES["m"], Const(0.0), Const(-math.inf)), Const(2.0)).args[0], LEAVES["m"]),
        (lambda: to_bool(to_float(LEAVES["m"])), LEAVES["m"]),
        (lambda: to_int(Const(-2.7)), integer(-2)),
        (lambda: as_number(TRUE), integer(1)),
        (lambda: op("sub", op("mul", Const(1.0), Int(1 + C)), Const(1.0)), to_float(Int(C))),
        (lambda: op("add", to_float(Int(R)), Const(0.5)), Op("add", (to_float(Int(R)), Const(0.5)))),
    ],
)
def test_fold(built: Callable[[], Expr], expected: Expr) -> None:
    assert built() == expected


@pytest.mark.parametrize(
    "kept",
    [
        lambda: op("mul", LEAVES["x"], Const(0.0)),  # x may be infinite
        lambda: op("div", Const(1.0), Const(0.0)),
        lambda: op("sub", LEAVES["x"], LEAVES["x"]),
        lambda: op("log", Const(-1.0)),
        lambda: op("floordiv", Int(R), LEAVES["n"]),
    ],
)
def test_what_cannot_be_proved_is_not_folded(kept: Callable[[], Expr]) -> None:
    assert isinstance(kept(), Op)


def test_comparison_of_floats_is_not_flipped() -> None:
    """``not (x < y)`` is not ``x >= y`` where either is NaN."""
    flipped = negate(compare("lt", LEAVES["x"], Const(0.0)))
    assert isinstance(flipped, Op) and flipped.name == "not"


def test_reduction_binds_its_axis() -> None:
    row_sum = Reduce("sum", C, LEAVES["x"])
    assert row_sum.axes == {R}
    same(value(row_sum), TENSORS["x"].sum(1, keepdim=True).expand(7, 5))
    same(value(Reduce("max", C, LEAVES["x"])), TENSORS["x"].amax(1, keepdim=True).expand(7, 5))
    same(value(Reduce("sum", C, Const(2.0))), torch.full((7, 5), 10.0, dtype=torch.float64))


def test_number_reads_literals_only() -> None:
    assert number(Const(2.5)) == 2.5 and number(integer(3)) == 3.0
    assert number(TRUE) is None and number(Int(R)) is None and number(LEAVES["x"]) is None


def test_walk_visits_each_node_once() -> None:
    shared = op("tanh", LEAVES["x"])
    nodes = op("add", shared, op("mul", shared, shared)).walk()
    assert len(nodes) == len(set(nodes)) and nodes.count(shared) == 1
