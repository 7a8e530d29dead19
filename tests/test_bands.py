"""Neighbourhood attention: each query has a window of keys of its own, which becomes a band of keys that all share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from analysis import assert_replaced_with_its_gradient, watched
from test_inductor import EAGER
from test_weights import Call
from torch import Tensor
from torch.nn.functional import pad

import attngen
from attngen.index import never_negative
from attngen.mask import derive

BATCH, HEADS, LENGTH, SIZE, WIDTH = 2, 3, 30, 8, 7
HALF = WIDTH // 2
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, LENGTH, SIZE, generator=generator, requires_grad=grad) for _ in range(3)]


def windows(x: Tensor, left: int = HALF, right: int = HALF) -> Tensor:
    return pad(x, (0, 0, left, right)).unfold(2, WIDTH, 1)


def outside() -> Tensor:
    place = torch.arange(LENGTH)[:, None] + torch.arange(WIDTH) - HALF
    return (place < 0) | (place >= LENGTH)


def with_padding_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhnd,bhndw->bhnw", q, windows(k)) * 0.3
    return torch.einsum("bhnw,bhndw->bhnd", s.masked_fill(outside(), -math.inf).softmax(-1), windows(v))


def padding_counts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys of zeros have scores of zero."""
    s = q[..., None, :] @ windows(k)
    return (s.softmax(-1) @ windows(v).mT).squeeze(-2)


def sums_of_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q[..., None] * windows(k)).sum(-2)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return ((e / e.sum(-1, keepdim=True))[..., None, :] * windows(v)).sum(-1)


def relative_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = q[0, :, 0, :WIDTH].sin()
    s = torch.einsum("bhnd,bhndw->bhnw", q, windows(k)) + bias[:, None]
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), windows(v))


def mask_of_the_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    padding = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [22]]))[:, None, :, None]
    kept = pad(padding.expand(-1, HEADS, -1, -1).float(), (0, 0, WIDTH - 1, 0)).unfold(2, WIDTH, 1)[..., 0, :]
    s = torch.einsum("bhnd,bhndw->bhnw", q, windows(k, WIDTH - 1, 0)).masked_fill(kept == 0, -1e9)
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), windows(v, WIDTH - 1, 0))


def every_second(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Windows two steps apart, without padding."""
    k, v = (x.unfold(2, WIDTH, 2) for x in (k, v))
    s = torch.einsum("bhnd,bhndw->bhnw", q[:, :, : k.shape[2]], k)
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), v)


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhnw,bhndw->bhnd", torch.einsum("bhnd,bhndw->bhnw", q, windows(k)).sigmoid(), windows(v))


def values_one_step_on(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhnd,bhndw->bhnw", q, windows(k))
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), windows(v, HALF - 1, HALF + 1))


def keys_changed_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Windows are views: what they show is what is there by then."""
    k = k.clone()
    q, own, v = q[:, :, : LENGTH - WIDTH + 1], k.unfold(2, WIDTH, 1), v.unfold(2, WIDTH, 1)
    s = torch.einsum("bhnd,bhndw->bhnw", q, own)
    k.zero_()
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), v)


FOUND = (
    with_padding_masked, padding_counts, sums_of_products, relative_bias, mask_of_the_keys, every_second, sigmoid,
    values_one_step_on,
    keys_changed_between,
)  # fmt: skip


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_a_band_of_shared_keys(function: Function) -> None:
    run, analyses = watched(Call(function))
    args = inputs()
    torch.testing.assert_close(run(*args), function(*args))
    (analysis,) = analyses
    ((site, special),) = analysis.hits
    assert int(site.row.extent) > 1 and site.key.extent >= LENGTH and analysis.errors()[0] < 2e-6
    cover = derive(special.spec.mask)
    assert len(cover.visit) == 1 and not never_negative(-cover.visit[0].low)  # later rows begin with later keys


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_replaced_with_its_gradient(function: Function) -> None:
    assert_replaced_with_its_gradient(function, partial(inputs, grad=True))


def values_in_reverse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhnd,bhndw->bhnw", q, windows(k))
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), windows(v).flip(-1))


def keys_of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first keys for every query, values by window."""
    s = q @ k[:, :, :WIDTH].mT
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), windows(v))


def windows_over_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The window moves along what is summed over."""
    k, v = (pad(x, (HALF, HALF)).unfold(3, WIDTH, 1) for x in (k, v))
    s = torch.einsum("bhnd,bhndw->bhnw", q, k)
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-1), v)


def normalised_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhnd,bhndw->bhnw", q, windows(k))
    return torch.einsum("bhnw,bhndw->bhnd", s.softmax(-2), windows(v))


def batch_beside_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Windows that do not overlap: keys of several batch elements in one dimension (LeViT)."""
    joined = torch.cat([x.transpose(1, 2).reshape(BATCH * LENGTH, HEADS, SIZE) for x in (q, k, v)], -1).flatten(1)
    joined = joined @ torch.eye(joined.shape[1])
    q, k, v = (x.transpose(1, 2) for x in joined.view(BATCH, LENGTH, HEADS, 3 * SIZE).split(SIZE, -1))
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(
    "function",
    [
        batch_beside_keys,
        values_in_reverse,
        keys_of_all,
        windows_over_features,
        normalised_over_queries,
    ],
    ids=lambda f: f.__name__,
)
def test_other_windows_are_none(function: Function) -> None:
    """Left alone, or computed as it is written, query by query."""
    run, analyses = watched(Call(function))
    torch.testing.assert_close(run(*inputs()), function(*inputs()))
    assert all(site.key.extent <= LENGTH for site, _ in analyses[0].hits)
    torch._dynamo.reset()
    out = torch.compile(function, backend="attngen", options=EAGER)(*inputs())
    torch.testing.assert_close(out, function(*inputs()))


# --------------------------------------------------------------------------------------------------------------- images

LINES, COLUMNS = 5, 6


def image(x: Tensor) -> Tensor:
    return x.view(BATCH, HEADS, LINES, COLUMNS, SIZE)


def squares(x: Tensor, lines: int = 3, columns: int = 3, apart: int = 1) -> Tensor:
    """[..., x, y, d] -> [..., x, y, d, lines * columns], around each place of an image; one key in so many counts."""
    x = pad(x, (0, 0, *[apart * (columns // 2)] * 2, *[apart * (lines // 2)] * 2))
    x = x.unfold(2, apart * (lines - 1) + 1, 1).unfold(3, apart * (columns - 1) + 1, 1)
    return x[..., ::apart, ::apart].flatten(-2)


def weighed(s: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhxyw,bhxydw->bhxyd", s.softmax(-1), v)


def scored(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhxyd,bhxydw->bhxyw", q, k) * 0.3


def around(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighed(scored(image(q), squares(image(k))), squares(image(v)))


def wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (squares(image(x), 3, 5) for x in (k, v))
    return weighed(scored(image(q), k), v).flatten(2, 3)


def dilated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighed(scored(image(q), squares(image(k), apart=2)), squares(image(v), apart=2))


def bias_of_the_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Relative positions, and -inf for what is outside of the image."""
    bias = q[0, :, 0, :9].sin() if SIZE >= 9 else torch.cat([q[0, :, 0], q[0, :, 1, :1]], -1).sin()
    outside = squares(torch.ones(1, 1, LINES, COLUMNS, 1))[..., 0, :] == 0
    s = scored(image(q), squares(image(k))) + bias[:, None, None]
    return weighed(s.masked_fill(outside, -math.inf), squares(image(v)))


def counted_from_the_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dimensions of the image are; lines come last."""
    k, v = (pad(image(x), (0, 0, 1, 1, 1, 1)) for x in (k, v))
    k, v = k.unfold(-3, 3, 1).unfold(-3, 3, 1).flatten(-2), v.unfold(-2, 3, 1).unfold(-4, 3, 1).mT.flatten(-2)
    return weighed(scored(image(q), k), v)


IMAGES = (around, wide, dilated, bias_of_the_place, counted_from_the_last)


@pytest.mark.parametrize("function", IMAGES, ids=lambda f: f.__name__)
def test_windows_of_an_image(function: Function) -> None:
    """Each line of queries is one tile, and reads a few lines of keys."""
    run, analyses = watched(Call(function))
    torch.testing.assert_close(run(*inputs()), function(*inputs()))
    (analysis,) = analyses
    ((site, special),) = analysis.hits
    assert int(site.row.extent) == COLUMNS and int(site.key.extent) > LENGTH and analysis.errors()[0] < 2e-6
    cover = derive(special.spec.mask)
    assert len(cover.visit) == 1 and not never_negative(-cover.visit[0].low)


@pytest.mark.parametrize("function", IMAGES, ids=lambda f: f.__name__)
def test_windows_of_an_image_with_their_gradients(function: Function) -> None:
    assert_replaced_with_its_gradient(function, partial(inputs, grad=True))


def patches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """They do not overlap."""
    q, k, v = (image(x)[:, :, :4] for x in (q, k, v))
    k, v = (x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2) for x in (k, v))
    return weighed(scored(q[:, :, ::2, ::2], k), v)


def halos(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The queries of a block of the image have a window together."""
    q = image(q)[:, :, :4].unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)
    k, v = (pad(image(x)[:, :, :4], (0, 0, 1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2).flatten(-2) for x in (k, v))
    s = torch.einsum("bhxydi,bhxydw->bhxyiw", q, k) * 0.3
    return torch.einsum("bhxyiw,bhxydw->bhxyid", s.softmax(-1), v)


def values_turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    values = pad(image(v), (0, 0, 1, 1, 1, 1)).unfold(3, 3, 1).unfold(2, 3, 1).flatten(-2)
    return weighed(scored(image(q), squares(image(k))), values)


def values_of_the_next_line(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    values = pad(image(v), (0, 0, 1, 1, 0, 2)).unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2)
    return weighed(scored(image(q), squares(image(k))), values)


def changed_in_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    padded = pad(image(k), (0, 0, 1, 1, 1, 1))
    s = scored(image(q), padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2))
    padded.zero_()
    return weighed(s, squares(image(v))) + padded[:, :, :1, :1]


def first_left_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (squares(image(x))[..., 1:] for x in (k, v))
    return weighed(scored(image(q), k), v)


def last_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (squares(image(x)).flip(-1) for x in (k, v))
    return weighed(scored(image(q), k), v)


def features_beside_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No dimension has the features alone: then each query reads its own keys, as it is written."""
    joined = (image(x).permute(0, 1, 4, 2, 3).reshape(BATCH, HEADS * SIZE, LINES, COLUMNS) for x in (k, v))
    k, v = (
        pad(x.sin(), (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).reshape(BATCH, HEADS, SIZE, LINES, COLUMNS, 9)
        for x in joined
    )
    return weighed(scored(image(q), k.permute(0, 1, 3, 4, 2, 5)), v.permute(0, 1, 3, 4, 2, 5))


@pytest.mark.parametrize(
    "function",
    [
        patches,
        halos,
        values_turned,
        values_of_the_next_line,
        changed_in_between,
        first_left_out,
        last_first,
        features_beside_heads,
    ],
    ids=lambda f: f.__name__,
)
def test_other_windows_of_an_image(function: Function) -> None:
    run, analyses = watched(Call(function))
    torch.testing.assert_close(run(*inputs()), function(*inputs()))
    shared = [site for site, _ in analyses[0].hits if site.key.extent > 16]
    assert not shared or (function is values_of_the_next_line and len(shared) == 1)
    torch._dynamo.reset()
    out = torch.compile(function, backend="attngen", options=EAGER)(*inputs())
    torch.testing.assert_close(out, function(*inputs()))


def test_traffic_of_the_model_is_that_of_its_windows() -> None:
    """Not of all pairs, which it never has."""
    with torch.no_grad():
        (site,) = attngen.explain(around, *inputs()).sites
    assert site.hbm_bytes is not None and site.sizes is not None
    pairs = BATCH * HEADS * LENGTH * site.sizes["keys"]
    assert site.hbm_bytes["after"] < site.hbm_bytes["before"] < 4 * 4 * pairs  # written, read and written, read
