"""Scores or weights that are mixed across heads (talking heads): left alone, and called by that name, at that line."""

from __future__ import annotations

import math

import pytest
import torch
from analysis import Function, analysed, inputs_of, scores, weights
from test_inductor import EAGER
from torch import Tensor
from torch.nn.functional import conv2d, layer_norm, linear

import attngen

SCORES, WEIGHTS = "the scores of different heads are mixed", "the weights of different heads are mixed"


def mixed(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bhij,hg->bgij", x, w[:4, :4])


def layered(x: Tensor, w: Tensor) -> Tensor:
    """As CaiT does: a layer over the last dimension, where the heads are put for it."""
    return linear(x.permute(0, 2, 3, 1), w[:4, :4], w[5, :4]).permute(0, 3, 1, 2)


def convolved(x: Tensor, w: Tensor) -> Tensor:
    return conv2d(x, w[:4, :4, None, None], w[5, :4])


def multiplied(x: Tensor, w: Tensor) -> Tensor:
    return (w[:4, :4] @ x.flatten(2)).view_as(x)


def around_itself(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    s = scores(q, k)
    return (s + convolved(s, w)).softmax(-1) @ v


def gated_by_scores(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    s = scores(q, k)
    return (s.softmax(-1) * convolved(s, w)) @ v


def added_to_itself(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    x = weights(q, k)
    return (x + mixed(x, w)) @ v


def one_batch_for_all(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    products = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(2, 4, 12, 12)
    return torch.bmm(mixed(products / 4, w).softmax(-1).flatten(0, 1), v.flatten(0, 1))


def masked(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    far = torch.ones(12, 12, dtype=torch.bool).triu(1)
    return convolved(scores(q, k) / 4, w).masked_fill(far, -math.inf).softmax(-1) @ v


MIXED: dict[str, tuple[Function, str]] = {
    "scores": (lambda q, k, v, w: mixed(scores(q, k), w).softmax(-1) @ v, SCORES),
    "scores by a layer": (lambda q, k, v, w: layered(scores(q, k), w).softmax(-1) @ v, SCORES),
    "scores by a convolution": (lambda q, k, v, w: convolved(scores(q, k), w).softmax(-1) @ v, SCORES),
    "scores by a matrix": (lambda q, k, v, w: multiplied(scores(q, k), w).softmax(-1) @ v, SCORES),
    "scores, masked": (masked, SCORES),
    "scores, around themselves": (around_itself, SCORES),
    "scores, one batch": (one_batch_for_all, SCORES),
    "scores as gates": (gated_by_scores, SCORES),
    "weights": (lambda q, k, v, w: mixed(weights(q, k), w) @ v, WEIGHTS),
    "weights by a layer": (lambda q, k, v, w: layered(weights(q, k), w) @ v, WEIGHTS),
    "weights by a convolution": (lambda q, k, v, w: convolved(weights(q, k), w) @ v, WEIGHTS),
    "weights added to themselves": (added_to_itself, WEIGHTS),
    "both": (lambda q, k, v, w: mixed(mixed(scores(q, k), w).softmax(-1), w) @ v, WEIGHTS),
    "both by layers": (lambda q, k, v, w: layered(layered(scores(q, k), w).softmax(-1), w) @ v, WEIGHTS),
    "both by convolutions": (lambda q, k, v, w: convolved(convolved(scores(q, k), w).softmax(-1), w) @ v, WEIGHTS),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_heads_are_missed_by_name(name: str) -> None:
    function, reason = MIXED[name]
    found = analysed(function)
    assert not found.hits
    assert {miss.reason for miss in found.misses} == {reason}


@pytest.mark.parametrize("name", ["scores", "weights by a layer", "both by convolutions"])
def test_the_line_that_mixes_is_named_and_what_would_help(name: str) -> None:
    function, reason = MIXED[name]
    (site,) = attngen.explain(function, *inputs_of(function).values()).sites
    assert site.reason == reason and site.advice
    assert any(f"{way}(" in site.blamed["code"] for way in ("einsum", "linear", "conv2d")), site.blamed


OTHERS: dict[str, Function] = {
    "a layer over keys": lambda q, k, v, w: linear(weights(q, k), w) @ v,
    "a layer over keys, with a bias": lambda q, k, v, w: linear(weights(q, k), w, w[0]) @ v,
    "a wider convolution": lambda q, k, v, w: conv2d(weights(q, k), w[:4, :4, None, None].expand(4, 4, 3, 3), padding=1) @ v,
    "a convolution per head": lambda q, k, v, w: conv2d(weights(q, k), w[:4, :1, None, None], groups=4) @ v,
    "heads summed": lambda q, k, v, w: torch.einsum("bhij,bhjd->bid", weights(q, k), v),
    "values mixed, another miss": lambda q, k, v, w: layer_norm(weights(q, k), (12,)) @ mixed(v, w),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_mixes_no_heads_is_not_called_that(name: str) -> None:
    assert not {SCORES, WEIGHTS} & {miss.reason for miss in analysed(OTHERS[name]).misses}


@pytest.mark.parametrize("mixer", [mixed, layered, convolved], ids=lambda f: f.__name__)
def test_results_and_values_may_be_mixed(mixer: Function) -> None:
    """What the advice says would not be in the way."""
    assert len(analysed(lambda q, k, v, w: mixer(weights(q, k) @ v, w)).hits) == 1
    assert len(analysed(lambda q, k, v, w: weights(q, k) @ mixer(v, w).contiguous()).hits) == 1


def test_mixed_scores_as_a_product_over_joined_features_are_replaced() -> None:
    """What the advice says would help, and that it is the same function."""

    def joined(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        queries = torch.einsum("bhid,hg->bgihd", q, w[:4, :4]).flatten(-2)
        keys = k.transpose(1, 2).flatten(-2).unsqueeze(1)
        return (queries @ keys.mT).softmax(-1) @ v

    tensors = inputs_of(joined).values()
    torch._dynamo.reset()
    with attngen.record() as reports:
        out = torch.compile(joined, backend="attngen", options=EAGER)(*tensors)
    assert [site.status for report in reports for site in report.sites] == ["replaced"]
    torch.testing.assert_close(out, MIXED["scores"][0](*tensors), rtol=1e-4, atol=1e-4)
