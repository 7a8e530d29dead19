"""Spellings of softmax: each is recognised, and what is recognised has the value of what was written."""

from __future__ import annotations

import pytest
import sympy as sp
import torch

from attngen.algebra import Const, Expr, Int, Load, Reduce, integer, op, substitute, to_float, where
from attngen.evaluate import Evaluator
from attngen.index import Axis
from attngen.normaliser import Normalised, softmax

ROW, KEY = Axis("i", 4), Axis("j", 6)
POSITIONS = {ROW: torch.arange(4).reshape(-1, 1), KEY: torch.arange(6)}
TENSORS = {
    "x": torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "s": torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
}
X = Load("x", (Int(ROW), Int(KEY)))
SINK = Load("s", (Int(ROW),))
SCORE = op("add", op("mul", X, Const(0.3)), op("mul", to_float(Int(KEY)), Const(-0.1)))
CAUSAL = where(op("le", Int(KEY), Int(ROW)), SCORE, Const(-torch.inf))


def over(name: str, body: Expr) -> Expr:
    """``body`` summed up, or its maximum, over all keys: a reduction has an axis of its own."""
    axis = Axis("k", KEY.extent)
    return Reduce(name, axis, substitute(body, {KEY: axis}))


def exp(x: Expr) -> Expr:
    return op("exp", x)


def minus(x: Expr, y: Expr) -> Expr:
    return op("sub", x, y)


def stable(x: Expr) -> Expr:
    return minus(x, over("max", x))


def logsumexp(x: Expr) -> Expr:
    return op("log", over("sum", exp(x)))


def with_column(x: Expr, column: Expr) -> tuple[Expr, Expr]:
    """``x`` and its sum of exponentials, with ``column`` joined behind the keys before the softmax."""
    axis = Axis("k", KEY.extent + 1)
    behind = op("ge", Int(axis), integer(KEY.extent))
    return x, Reduce("sum", axis, exp(where(behind, column, substitute(x, {KEY: axis}))))


def library(x: Expr) -> Expr:
    """As torch decomposes it: the maximum is subtracted, exponentials are divided by their sum."""
    power = exp(stable(x))
    return op("div", power, over("sum", power))


SPELLINGS = {
    "library": library(SCORE),
    "library, masked": library(CAUSAL),
    "no maximum": op("div", exp(SCORE), over("sum", exp(SCORE))),
    "times the reciprocal": op("mul", exp(SCORE), op("div", Const(1.0), over("sum", exp(SCORE)))),
    "log softmax": exp(minus(SCORE, op("log", over("sum", exp(SCORE))))),
    "logsumexp": exp(minus(SCORE, logsumexp(SCORE))),
    "plus one": op("div", exp(SCORE), op("add", over("sum", exp(SCORE)), Const(1.0))),
    "one plus": op("div", exp(SCORE), op("add", Const(1.0), over("sum", exp(SCORE)))),
    "sink": op("div", exp(SCORE), op("add", over("sum", exp(SCORE)), exp(SINK))),
    "two sinks": op("div", exp(SCORE), op("add", op("add", exp(SINK), over("sum", exp(SCORE))), Const(2.0))),
    "zero where empty": op("div_or_zero", exp(SCORE), over("sum", exp(SCORE))),
}
POWER = exp(stable(CAUSAL))
SPELLINGS |= {
    "sum at least 1e-9": op("div", POWER, op("max", over("sum", POWER), Const(1e-9))),
    "sum and 1e-12": op("div", POWER, op("add", over("sum", POWER), Const(1e-12))),
    "1e-12 and sum": op("div", POWER, op("add", Const(1e-12), over("sum", POWER))),
}
SINKS = {"plus one": 1, "one plus": 1, "sink": 1, "two sinks": 2}


def value(expr: Expr) -> torch.Tensor:
    evaluate = Evaluator(POSITIONS, TENSORS.__getitem__)
    return torch.broadcast_to(evaluate(expr), (4, 6))


def meaning(found: Normalised) -> torch.Tensor:
    score = value(found.score)
    total = score.exp().sum(-1, keepdim=True)
    for sink in found.sinks:
        total = total + value(sink)[:, :1].exp()
    return score.exp() / total


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_recognised(name: str) -> None:
    found = softmax(SPELLINGS[name], KEY)
    assert isinstance(found, Normalised), found
    assert len(found.sinks) == SINKS.get(name, 0)
    assert found.empty == ("zero" if name == "zero where empty" else "nan")
    torch.testing.assert_close(meaning(found), value(SPELLINGS[name]))


def test_stable_spellings_with_a_logarithm() -> None:
    """One maximum, subtracted everywhere, as one node of a graph is: two maxima over axes of their own are two values."""
    largest = over("max", SCORE)
    shifted = minus(SCORE, largest)
    total = op("log", over("sum", exp(shifted)))
    for weight in (exp(minus(shifted, total)), exp(minus(SCORE, op("add", total, largest)))):
        found = softmax(weight, KEY)
        assert isinstance(found, Normalised), found
        torch.testing.assert_close(meaning(found), value(weight))


@pytest.mark.parametrize("name", ["library", "no maximum", "times the reciprocal", "log softmax", "logsumexp"])
def test_every_spelling_gives_the_same_score(name: str) -> None:
    found = softmax(SPELLINGS[name], KEY)
    plain = softmax(SPELLINGS["no maximum"], KEY)
    assert isinstance(found, Normalised) and isinstance(plain, Normalised)
    torch.testing.assert_close(value(found.score), value(plain.score))
    assert not any(isinstance(node, Reduce) for node in found.score.walk())


def test_a_column_joined_to_the_scores_is_a_sink() -> None:
    x, total = with_column(SCORE, SINK)
    found = softmax(op("div", exp(x), total), KEY)
    assert isinstance(found, Normalised) and len(found.sinks) == 1
    joined = torch.cat([value(SCORE), TENSORS["s"].reshape(4, 1)], -1).softmax(-1)[:, :6]
    torch.testing.assert_close(meaning(found), joined)


OTHER = Axis("o", ROW.extent)
OVER_ROWS = Reduce("sum", OTHER, substitute(exp(SCORE), {ROW: OTHER}))
SHORT = Axis("k", sp.Integer(5))
UNMASKED = exp(minus(CAUSAL, over("max", SCORE)))
LOOK_ALIKES = {
    "sum at least two": (op("div", POWER, op("max", over("sum", POWER), Const(2.0))), "not divided by their sum"),
    "no maximum, at least": (op("div", exp(SCORE), op("max", over("sum", exp(SCORE)), Const(1e-9))), "not divided by"),
    "maximum of others": (op("div", UNMASKED, op("max", over("sum", UNMASKED), Const(1e-9))), "not divided by their sum"),
    "softmax over queries": (op("div", exp(SCORE), OVER_ROWS), "another dimension"),
    "sum of something else": (op("div", exp(SCORE), over("sum", exp(X))), "not the sum of these weights"),
    "sum without the last key": (
        op("div", exp(SCORE), Reduce("sum", SHORT, exp(substitute(SCORE, {KEY: SHORT})))),
        "not the sum of these weights",
    ),
    "no sum": (exp(SCORE), "not divided by one sum"),
    "divided by a maximum": (op("div", exp(SCORE), over("max", exp(SCORE))), "not the sum of these weights"),
    "changed in between": (
        op("div", op("tanh", exp(SCORE)), over("sum", op("tanh", exp(SCORE)))),
        "divided by their sum, but are no exponentials",
    ),
    "sigmoid": (op("sigmoid", SCORE), "changed between the exponential"),
    "negative sink": (op("div", exp(SCORE), op("sub", over("sum", exp(SCORE)), Const(0.5))), "not a plain sink"),
    "sink per key": (op("div", exp(SCORE), op("add", over("sum", exp(SCORE)), exp(X))), "not a plain sink"),
    "constant": (Const(1.0), "not exp(scores)"),
}


GAINS = {
    "scaled": (op("mul", library(SCORE), SINK), SINK),
    "weighed by key": (op("div", op("mul", X, exp(SCORE)), over("sum", exp(SCORE))), X),
    "squared": (op("div", op("mul", exp(SCORE), exp(SCORE)), over("sum", exp(SCORE))), exp(SCORE)),
    "divided twice": (op("div", library(SCORE), SINK), op("div", Const(1.0), SINK)),
}


@pytest.mark.parametrize("name", GAINS)
def test_what_multiplies_the_weights_is_their_gain(name: str) -> None:
    weight, gain = GAINS[name]
    found = softmax(weight, KEY)
    assert isinstance(found, Normalised) and found.gain == gain and found.score == SCORE


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alike_is_refused_with_its_reason(name: str) -> None:
    weight, reason = LOOK_ALIKES[name]
    found = softmax(weight, KEY)
    assert isinstance(found, str) and reason in found, found


def test_a_shift_on_one_side_only_is_kept() -> None:
    """In ``exp(x - max) / (sum(exp(x - max)) + exp(sink))`` the sink is not shifted: the maximum must stay."""
    power = exp(stable(SCORE))
    weight = op("div", power, op("add", over("sum", power), exp(SINK)))
    found = softmax(weight, KEY)
    assert isinstance(found, Normalised)
    torch.testing.assert_close(meaning(found), value(weight))
    assert any(isinstance(node, Reduce) for node in found.score.walk())


def test_a_number_that_float32_sees_beside_one_is_no_guard() -> None:
    found = softmax(op("div", POWER, op("add", over("sum", POWER), Const(1e-6))), KEY)
    assert isinstance(found, Normalised) and len(found.sinks) == 1
    less = op("sub", over("sum", POWER), Const(1e-12))
    assert softmax(op("div", POWER, less), KEY) == "the sum that normalises the weights has a term that is not a plain sink"
