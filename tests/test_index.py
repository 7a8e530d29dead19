"""Index arithmetic against numpy: reshapes read the same element, divisions round down, proofs hold."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import sympy as sp
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from attngen.compat import FloorDiv
from attngen.index import Axis, always_less, floordiv, modulo, never_negative, recombine, reshape, span

A, B, C = Axis("a", 4), Axis("b", 6), Axis("c", 3)
AXES = (A, B, C)
MANY = settings(max_examples=75, deadline=None)  # others in each run


def everywhere(expr: sp.Expr) -> np.ndarray:
    """The value at every position, by Python's own integers."""
    evaluate = sp.lambdify(AXES, expr, modules=[{"FloorDiv": lambda a, b: a // b, "Mod": lambda a, b: a % b}, "math"])
    places = itertools.product(*(range(int(axis.extent)) for axis in AXES))
    return np.array([int(evaluate(*place)) for place in places])


SMALL = st.integers(-5, 7)
LINEAR = st.builds(lambda a, b, c, k: a * A + b * B + c * C + k, SMALL, SMALL, SMALL, SMALL)
DIVISORS = st.integers(1, 9).map(sp.Integer)
INDICES = st.one_of(
    LINEAR,
    st.builds(lambda e, d, f: FloorDiv(e, d) + f, LINEAR, DIVISORS, LINEAR),
    st.builds(lambda e, d, f: sp.Mod(e, d) * 2 + f, LINEAR, DIVISORS, LINEAR),
    st.builds(lambda e, f: sp.Max(e, f), LINEAR, LINEAR),
    st.builds(lambda e: sp.Abs(e), LINEAR),
)


@MANY
@given(INDICES, DIVISORS)
@example(sp.Abs(2 * C - 6), sp.Integer(6))
@example(2 * sp.Mod(C, 3), sp.Integer(3))
@example(4 * sp.Mod(C, 3), sp.Integer(6))
@example(5 * sp.Mod(C, 6) + C, sp.Integer(3))
def test_floordiv_and_modulo_are_those_of_the_integers(expr: sp.Expr, divisor: sp.Expr) -> None:
    values = everywhere(expr)
    np.testing.assert_array_equal(everywhere(floordiv(expr, divisor)), values // int(divisor))
    np.testing.assert_array_equal(everywhere(modulo(expr, divisor)), values % int(divisor))


@MANY
@given(INDICES)
def test_span_contains_every_value(expr: sp.Expr) -> None:
    low, high = span(expr)
    values = everywhere(expr)
    assert low <= values.min() and values.max() <= high


@MANY
@given(INDICES, INDICES)
def test_proofs_hold(left: sp.Expr, right: sp.Expr) -> None:
    if never_negative(left):
        assert (everywhere(left) >= 0).all()
    if always_less(left, right):
        assert (everywhere(left) < everywhere(right)).all()


@MANY
@given(LINEAR, DIVISORS, st.integers(1, 3))
def test_recombine_changes_no_value(expr: sp.Expr, divisor: sp.Expr, weight: int) -> None:
    split = weight * divisor * FloorDiv(expr, divisor) + weight * sp.Mod(expr, divisor)
    np.testing.assert_array_equal(everywhere(recombine(split)), weight * everywhere(expr))


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (floordiv(6 * A + B, sp.Integer(6)), A),
        (modulo(6 * A + B, sp.Integer(6)), B),
        (floordiv(24 * A + 4 * B + C, sp.Integer(4)), 6 * A + B),
        (recombine(6 * FloorDiv(A, 6) + sp.Mod(A, 6)), A),
        (modulo(B, sp.Integer(6)), B),
    ],
)
def test_exact_divisions_fold(expr: sp.Expr, expected: sp.Expr) -> None:
    assert sp.expand(expr - expected) == 0


def test_divisions_fold_for_symbolic_sizes() -> None:
    """Merging and splitting heads of an unknown batch and length leaves nothing behind."""
    batch, rows = (sp.Symbol(name, integer=True, positive=True) for name in ("batch", "rows"))
    b, i = Axis("b", batch), Axis("i", rows)
    merged = b * rows + i
    assert floordiv(merged, rows) == b and modulo(merged, rows) == i
    assert reshape((b, i, A), (batch, rows, sp.Integer(4)), (batch * rows, sp.Integer(4))) == (merged, A)
    assert reshape((merged, A), (batch * rows, sp.Integer(4)), (batch, rows, sp.Integer(4))) == (b, i, A)


# ------------------------------------------------------------------------------------------------------------- reshape


@st.composite
def shape_pairs(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of equally many elements, ones included, from one list of prime factors."""
    primes = draw(st.lists(st.sampled_from([2, 2, 3, 5]), min_size=1, max_size=5))
    assume(math.prod(primes) <= 120)

    def grouped() -> list[int]:
        cuts = sorted(draw(st.lists(st.integers(0, len(primes)), max_size=4)))
        order = draw(st.permutations(primes))
        ends = zip([0, *cuts], [*cuts, len(primes)], strict=True)
        return [math.prod(order[low:high]) for low, high in ends]

    return grouped(), grouped()


@MANY
@given(shape_pairs())
def test_reshape_reads_what_numpy_reads(shapes: tuple[list[int], list[int]]) -> None:
    new, old = shapes
    axes = tuple(Axis(f"n{d}", size) for d, size in enumerate(new))
    index = reshape(axes, [sp.Integer(n) for n in new], [sp.Integer(n) for n in old])
    assert len(index) == len(old)
    source = np.arange(math.prod(old)).reshape(old)
    read = sp.lambdify(axes, index, modules=[{"FloorDiv": lambda a, b: a // b, "Mod": lambda a, b: a % b}])
    for place in itertools.product(*map(range, new)):
        assert source[tuple(map(int, read(*place)))] == source.reshape(new)[place]


@MANY
@given(shape_pairs())
def test_reshape_and_back_is_the_same_place(shapes: tuple[list[int], list[int]]) -> None:
    new, old = ([sp.Integer(n) for n in shape] for shape in shapes)
    axes = tuple(Axis(f"n{d}", size) for d, size in enumerate(old))
    there = reshape(axes, old, new)
    back = reshape(there, new, old)
    read = sp.lambdify(axes, back, modules=[{"FloorDiv": lambda a, b: a // b, "Mod": lambda a, b: a % b}])
    for place in itertools.product(*(range(int(n)) for n in old)):
        assert tuple(map(int, read(*place))) == place


def test_axes_are_equal_only_to_themselves() -> None:
    assert Axis("a", 4) != Axis("a", 4)
    assert A.extent == 4 and A.is_nonnegative
