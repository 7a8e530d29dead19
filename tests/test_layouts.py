"""Attention along one of several dimensions, within windows, and over channels; and look-alikes of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from analysis import assert_replaced_with_its_gradient, watched
from test_inductor import EAGER
from test_weights import Call
from torch import Tensor
from torch.nn.functional import normalize, pad

BATCH, HEADS, TALL, WIDE, SIZE = 2, 2, 8, 12, 8
WINDOW = 4
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(grad: bool = False) -> list[Tensor]:
    """An image of queries, keys and values each: [batch, heads, rows, columns, features]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, TALL, WIDE, SIZE, generator=generator, requires_grad=grad) for _ in range(3)]


def along_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.3, -1) @ v


def along_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Axial attention by einsum; pixels of one column see each other."""
    s = torch.einsum("bhxyd,bhzyd->bhyxz", q, k) * 0.3
    return torch.einsum("bhyxz,bhzyd->bhxyd", s.softmax(-1), v)


def along_columns_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(2, 3) for x in (q, k, v))
    s = (q @ k.mT).masked_fill(torch.ones(TALL, TALL, dtype=torch.bool).triu(1), -torch.inf)
    return (s.softmax(-1) @ v).transpose(2, 3)


def windows(x: Tensor) -> Tensor:
    """[batch, windows, heads, places, features]"""
    x = x.view(BATCH, HEADS, TALL // WINDOW, WINDOW, WIDE // WINDOW, WINDOW, SIZE)
    return x.permute(0, 2, 4, 1, 3, 5, 6).reshape(BATCH, -1, HEADS, WINDOW * WINDOW, SIZE)


def whole(x: Tensor) -> Tensor:
    x = x.view(BATCH, TALL // WINDOW, WIDE // WINDOW, HEADS, WINDOW, WINDOW, SIZE)
    return x.permute(0, 3, 1, 4, 2, 5, 6).reshape(BATCH, HEADS, TALL, WIDE, SIZE)


def shifted_windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Swin: an image that is rolled, a bias by distance, and a mask between regions that were not neighbours."""
    rolled = [windows(x.roll((-2, -2), (2, 3))) for x in (q, k, v)]
    place = torch.arange(WINDOW * WINDOW)
    row, column = place // WINDOW, place % WINDOW
    distance = (row[:, None] - row + WINDOW - 1) * (2 * WINDOW - 1) + column[:, None] - column + WINDOW - 1
    bias = q[0, :, :, :, 0].flatten(1)[:, :49][:, distance]
    regions = torch.zeros(TALL, WIDE)
    for n, rows in enumerate((slice(0, -4), slice(-4, -2), slice(-2, None))):
        for m, columns in enumerate((slice(0, -4), slice(-4, -2), slice(-2, None))):
            regions[rows, columns] = 3 * n + m
    region = regions.view(TALL // WINDOW, WINDOW, WIDE // WINDOW, WINDOW).transpose(1, 2).reshape(-1, WINDOW * WINDOW)
    apart = region[:, None, :] - region[:, :, None]
    mask = apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)
    s = rolled[0] @ rolled[1].mT * 0.3 + bias + mask[:, None]
    return whole(s.softmax(-1) @ rolled[2]).roll((2, 2), (2, 3))


def over_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cross-covariance attention: features attend to features, with a temperature for each head (XCiT)."""
    q, k, v = (x.flatten(2, 3).mT for x in (q, k, v))
    heat = q[0, :, 0, :1, None].exp()
    return (torch.softmax((normalize(q, dim=-1) @ normalize(k, dim=-1).mT) * heat, -1) @ v).mT


FOUND: dict[Function, tuple[int, int]] = {
    along_rows: (WIDE, SIZE),
    along_columns: (TALL, SIZE),
    along_columns_causal: (TALL, SIZE),
    shifted_windows: (WINDOW * WINDOW, SIZE),
    over_channels: (SIZE, TALL * WIDE),
}


@pytest.mark.parametrize(("function", "sizes"), FOUND.items(), ids=lambda f: getattr(f, "__name__", ""))
def test_keys_and_features_are_these(function: Function, sizes: tuple[int, int]) -> None:
    run, analyses = watched(Call(function))
    torch.testing.assert_close(run(*inputs()), function(*inputs()))
    (analysis,) = analyses
    ((site, special),) = analysis.hits
    assert (site.key.extent, special.spec.head_dim) == sizes and analysis.errors()[0] < 3e-6


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_replaced_with_its_gradient(function: Function) -> None:
    assert_replaced_with_its_gradient(function, partial(inputs, grad=True))


def normalised_along_the_other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhxyd,bhzyd->bhyxz", q, k)
    return torch.einsum("bhyxz,bhzyd->bhxyd", s.softmax(2), v)


def values_along_the_other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of keys of one column, values of another one."""
    s = torch.einsum("bhxyd,bhzyd->bhyxz", q, k)[:, :, :TALL]
    return torch.einsum("bhyxz,bhyzd->bhxyd", s.softmax(-1), v[:, :, :, :TALL])


def windows_that_mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The softmax is over the windows, not over the places of one."""
    q, k, v = map(windows, (q, k, v))
    return whole((q @ k.mT).softmax(1) @ v)


def channels_of_the_gram_matrix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax over pixels, of keys alone (efficient attention): nothing weighs pairs."""
    q, k, v = (x.flatten(2, 3) for x in (q, k, v))
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def padded_away(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights moved by one key."""
    return pad((q @ k.mT).softmax(-1), (1, 0))[..., :-1] @ v


@pytest.mark.parametrize(
    "function",
    [normalised_along_the_other, windows_that_mix, channels_of_the_gram_matrix, padded_away],
    ids=lambda f: f.__name__,
)
def test_left_alone(function: Function) -> None:
    run, analyses = watched(Call(function))
    torch.testing.assert_close(run(*inputs()), function(*inputs()))
    assert not analyses[0].hits


def test_values_of_another_axis_are_read_as_they_are_written() -> None:
    torch._dynamo.reset()
    out = torch.compile(values_along_the_other, backend="attngen", options=EAGER)(*inputs())
    torch.testing.assert_close(out, values_along_the_other(*inputs()))
