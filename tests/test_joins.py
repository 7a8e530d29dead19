"""Keys and values in pieces: scores joined before the softmax, weights taken apart after it, are one attention over all."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from analysis import Analysis, watched
from test_inductor import EAGER
from test_weights import Call
from torch import Tensor
from torch.nn.functional import dropout

import attngen
from attngen.passes.joins import TOO_LARGE
from attngen.verify import within_budget

BATCH, HEADS, LENGTH, FEW, SIZE = 2, 3, 24, 5, 8
BLOCKS, BLOCK = 4, 20
Function = Callable[..., Tensor]


def plain(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values, and a few more keys and values that all of the batch share."""
    return _made([(BATCH, HEADS, LENGTH, SIZE)] * 3 + [(HEADS, FEW, SIZE)] * 2, dtype)


def blocked(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same in blocks, and a few more keys and values that all blocks share."""
    return _made([(BATCH, BLOCKS, BLOCK, HEADS, SIZE)] * 3 + [(BATCH, FEW, HEADS, SIZE)] * 2, dtype)


def _made(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def future() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def prefix(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    w = (torch.cat([q @ pk.mT, q @ k.mT], -1) * SIZE**-0.5).softmax(-1)
    return w[..., :FEW] @ pv + w[..., FEW:] @ v


def prefix_before_causal(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    """A mask and a scale for each piece, and the last piece of values first."""
    near = (q @ k.mT * SIZE**-0.5).masked_fill(future(), -math.inf)
    w = torch.cat([q @ pk.mT * 0.2 + 0.5, near], -1).softmax(-1)
    return w[..., FEW:] @ v + w[..., :FEW] @ pv


def scores_alone(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    w = torch.cat([q @ k.mT, q @ pk.mT], -1).softmax(-1)
    return w @ torch.cat([v, pv.expand(BATCH, -1, -1, -1)], 2)


def weights_alone(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    w = (q @ torch.cat([k, pk.expand(BATCH, -1, -1, -1)], 2).mT).softmax(-1)
    near, far = w.split([LENGTH, FEW], -1)
    return (near @ v).transpose(1, 2) + (far @ pv).transpose(1, 2)


def beside_a_sink(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    """The last column is no key."""
    nothing = torch.zeros(BATCH, HEADS, LENGTH, 1, dtype=q.dtype)
    w = torch.cat([q @ pk.mT, q @ k.mT, nothing], -1).softmax(-1)
    return w[..., :FEW] @ pv + w[..., FEW:-1] @ v


def values_of_the_other_piece(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    """Keys and values need not be joined where the other ones are: here the values are of 5 and 24, the keys of 24 and 5."""
    w = torch.cat([q @ k.mT, q @ pk.mT], -1).softmax(-1)
    return w[..., :FEW] @ pv + w[..., FEW:] @ v


def one_sequence(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    q, k, v = q[:1], k[:1], v[:1]
    w = torch.cat([q @ pk.mT, q @ k.mT], -1).softmax(-1)
    return w[..., :FEW] @ pv + w[..., FEW:] @ v


def global_and_local(q: Tensor, k: Tensor, v: Tensor, gk: Tensor, gv: Tensor) -> Tensor:
    """Pegasus-X: each block sees itself and a few tokens that all see."""
    s = torch.cat([torch.einsum("bnihd,bghd->bnhig", q, gk), torch.einsum("bnihd,bnjhd->bnhij", q, k)], -1)
    w = dropout(s.softmax(-1), 0.1, training=False)
    return torch.einsum("bnhig,bghd->bnihd", w[..., :FEW], gv) + torch.einsum("bnhij,bnjhd->bnihd", w[..., FEW:], v)


def big_bird(q: Tensor, k: Tensor, v: Tensor, gk: Tensor, gv: Tensor) -> Tensor:
    """Two neighbouring blocks, one that is chosen, and the first; masks and sums in place, the first piece last."""
    q, k, v = (x.transpose(2, 3).transpose(1, 2) for x in (q, k, v))  # b h n i d
    near_k, near_v = (torch.cat([x[:, :, :-1], x[:, :, 1:]], 3) for x in (k, v))
    far_k, far_v = (x[:, :, torch.tensor([3, 0, 0])] for x in (k, v))
    q = q[:, :, 1:]
    near = torch.matmul(q, near_k.transpose(-1, -2)) * 0.3
    far = torch.matmul(q, far_k.mT) * 0.3
    first = torch.einsum("bhnid,bhjd->bhnij", q, gk.transpose(1, 2)) * 0.3
    near += (torch.arange(2 * BLOCK) % 7 == 3) * -10000.0
    far += (torch.arange(BLOCK) < 2) * -10000.0
    w = torch.cat([first, near, far], -1).softmax(-1)
    out = w[..., FEW : FEW + 2 * BLOCK] @ near_v
    out += torch.matmul(w[..., -BLOCK:], far_v)
    out += torch.einsum("bhnij,bhjd->bhnid", w[..., :FEW], gv.transpose(1, 2))
    return out * 2


FOUND: dict[Function, Callable[..., list[Tensor]]] = {
    prefix: plain, prefix_before_causal: plain, scores_alone: plain, weights_alone: plain, beside_a_sink: plain,
    values_of_the_other_piece: plain, one_sequence: plain, global_and_local: blocked, big_bird: blocked,
}  # fmt: skip
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def analysed(function: Function, inputs: list[Tensor]) -> Analysis:
    run, analyses = watched(Call(function))
    with torch.no_grad():
        expected, got = function(*inputs), run(*inputs)
    torch.testing.assert_close(got, expected)  # the graph that is analysed computes the same
    return analyses[0]


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_one_site_that_says_the_same(function: Function) -> None:
    analysis = analysed(function, FOUND[function]())
    assert len(analysis.hits) == 1 and not analysis.misses
    assert max(analysis.errors()) < 2e-6


def differentiated(run: Function, tensors: list[Tensor]) -> list[Tensor]:
    out = run(*tensors)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    found = torch.autograd.grad(out, tensors, grad, allow_unused=True)
    return [out.detach(), *(x for x in found if x is not None)]


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_replaced_with_its_gradient(function: Function, dtype: torch.dtype) -> None:
    make = partial(FOUND[function], dtype)
    torch._dynamo.reset()
    with attngen.record() as reports:
        ours = differentiated(torch.compile(function, backend="attngen", options=EAGER), make())
    assert [site.status for report in reports for site in report.sites] == ["replaced"]
    exact = differentiated(function, [x.detach().double().requires_grad_() for x in make()])
    eager = differentiated(function, make())
    for place, (a, x, e) in enumerate(zip(ours, exact, eager, strict=True)):
        verdict = within_budget(a, x, e, slack=4.0 if place else 2.0)
        assert verdict.ok, (place, verdict)


def test_each_piece_keeps_its_mask() -> None:
    ((_, special),) = analysed(prefix_before_causal, plain()).hits
    assert special.spec.softmax and not special.spec.extras


def test_autocast() -> None:
    def under(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return prefix(*tensors)

    torch._dynamo.reset()
    with attngen.record() as reports, torch.no_grad():
        ours = torch.compile(under, backend="attngen", options=EAGER)(*plain())
    assert [site.status for report in reports for site in report.sites] == ["replaced"]
    assert within_budget(ours, prefix(*(x.double() for x in plain())), under(*plain())).ok


# ---------------------------------------------------------------------------------------------------- left as they are


def softmax_of_each(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    w = torch.cat([(q @ pk.mT).softmax(-1), (q @ k.mT).softmax(-1)], -1)
    return w[..., : FEW + 2] @ k[:, :, : FEW + 2] + w[..., FEW + 2 :] @ v[:, :, : LENGTH - 2]


def overlapping(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    w = torch.cat([q @ pk.mT, q @ k.mT], -1).softmax(-1)
    return w[..., :FEW] @ pv + w[..., FEW - 1 : -1] @ v


def column_left_out(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    w = torch.cat([q @ pk.mT, q @ k.mT], -1).softmax(-1)
    return w[..., : FEW - 1] @ pv[:, 1:] + w[..., FEW:] @ v


def other_queries(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    w = torch.cat([q.flip(1) @ pk.mT, q @ k.mT], -1).softmax(-1)
    return w[..., :FEW] @ pv + w[..., FEW:] @ v


def weights_of_two(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    s = torch.cat([q @ pk.mT, q @ k.mT], -1)
    return s.softmax(-1)[..., :FEW] @ pv + (2 * s).softmax(-1)[..., FEW:] @ v


def also_read(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    w = torch.cat([q @ pk.mT, q @ k.mT], -1).softmax(-1)
    return w[..., :FEW] @ pv + w[..., FEW:] @ v + w.amax()


def part_also_read(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    w = torch.cat([q @ pk.mT, q @ k.mT], -1).softmax(-1)
    far = w[..., :FEW] @ pv
    return (far + w[..., FEW:] @ v) * far


def seen_at_work(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    """A view of the first product shows what is added to it."""
    w = torch.cat([q @ pk.mT, q @ k.mT], -1).softmax(-1)
    out = w[..., :FEW] @ pv
    row = out[:, :, 0]
    out += w[..., FEW:] @ v
    out *= 2
    return out + row.unsqueeze(2)


def keys_overwritten(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    pk = pk.clone()
    far = q @ pk.mT
    pk.zero_()
    w = torch.cat([far, q @ k.mT], -1).softmax(-1)
    return w[..., :FEW] @ pv + w[..., FEW:] @ v + pk.sum()


def detached_piece(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    with torch.no_grad():
        far = q @ pk.mT
    w = torch.cat([far, q @ k.mT], -1).softmax(-1)
    return w[..., :FEW] @ pv + w[..., FEW:] @ v


ALONE = [
    softmax_of_each, overlapping, column_left_out, other_queries, weights_of_two, also_read, part_also_read, seen_at_work,
    keys_overwritten, detached_piece,
]  # fmt: skip


@pytest.mark.parametrize("function", ALONE, ids=lambda f: f.__name__)
def test_left_alone(function: Function) -> None:
    torch._dynamo.reset()
    with attngen.record() as reports:
        ours = differentiated(torch.compile(function, backend="attngen", options=EAGER), plain())
    sites = [site for report in reports for site in report.sites]
    assert sites and not [site for site in sites if site.status == "replaced"]
    for a, e in zip(ours, differentiated(function, plain()), strict=True):
        torch.testing.assert_close(a, e)


def test_pieces_as_large_as_the_weights_say_so() -> None:
    """Blocks shorter than heads are wide: joined, keys and values would take more than scores and weights take."""

    def short_blocks(q: Tensor, k: Tensor, v: Tensor, gk: Tensor, gv: Tensor) -> Tensor:
        return global_and_local(q[:, :, : SIZE - 1], k, v, gk, gv)

    report = attngen.explain(short_blocks, *blocked())
    assert [site.reason for site in report.sites] == [TOO_LARGE] * 2
