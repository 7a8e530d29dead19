"""BigBird's blocks: each block of queries sees the first and the last block of keys, three in a row, and some drawn by lot.

Its keys are gathered by the graph, and one kernel goes over them where they are joined. Nothing else is visited: that is
what a table of blocks inside a kernel would be for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from analysis import watched
from test_weights import Call
from torch import Tensor

import attngen
from attngen.verify import within_budget

BATCH, HEADS, BLOCKS, BLOCK, SIZE, DRAWN = 2, 2, 9, 16, 16, 2
MIDDLE = BLOCKS - 4
LISTED = 5 + DRAWN  # blocks of keys for each block of queries
LOW = -10000.0


def table(*, twice: bool = False) -> Tensor:
    """Drawn blocks for each head and block of queries, other than those it sees anyway; or ``twice`` the same one."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for block in range(2, BLOCKS - 2):
        others = [b for b in range(1, BLOCKS - 1) if abs(b - block) > 1]
        picks = [torch.randperm(len(others), generator=generator)[:DRAWN] for _ in range(HEADS)]
        rows.append(torch.stack([torch.tensor(others)[pick[:1].expand(DRAWN) if twice else pick] for pick in picks]))
    return torch.stack(rows, 1)  # [heads, middle, drawn]


def blocks(x: Tensor) -> Tensor:
    return x.view(BATCH, HEADS, BLOCKS, BLOCK, -1)


def windows(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, 1:-3], x[:, :, 2:-2], x[:, :, 3:-1]], 3)


def drawn(x: Tensor, picks: Tensor) -> Tensor:
    """``[batch, heads, middle, drawn * block, size]``"""
    places = (picks + torch.arange(HEADS)[:, None, None] * BLOCKS).flatten().expand(BATCH, -1)
    places = places + torch.arange(BATCH)[:, None] * HEADS * BLOCKS
    return x.reshape(-1, BLOCK, SIZE).index_select(0, places.flatten()).view(BATCH, HEADS, MIDDLE, DRAWN * BLOCK, SIZE)


def block_sparse(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, picks: Tensor) -> Tensor:
    """The blocks in the middle, as Hugging Face writes them: masks of pairs are products of masks of rows and keys."""
    q, k, v = map(blocks, (q, k, v))
    rows = kept.view(BATCH, BLOCKS, BLOCK)
    three = torch.cat([rows[:, 1:-3], rows[:, 2:-2], rows[:, 3:-1]], -1)
    near_mask = torch.einsum("blq,blk->blqk", rows[:, 2:-2], three).unsqueeze(1)
    picked = torch.stack([row[picks.flatten()].view(HEADS, MIDDLE, DRAWN * BLOCK) for row in rows])
    far_mask = torch.einsum("blq,bhlk->bhlqk", rows[:, 2:-2], picked)
    q = q[:, :, 2:-2]
    near = torch.matmul(q, windows(k).transpose(-1, -2)) * SIZE**-0.5
    far = torch.matmul(q, drawn(k, picks).transpose(-1, -2)) * SIZE**-0.5
    first = torch.einsum("bhlqd,bhkd->bhlqk", q, k[:, :, 0]) * SIZE**-0.5
    last = torch.einsum("bhlqd,bhkd->bhlqk", q, k[:, :, -1]) * SIZE**-0.5
    near += (1.0 - near_mask) * LOW
    first += (1.0 - rows[:, None, None, :1]) * LOW
    last += (1.0 - rows[:, None, None, -1:]) * LOW
    far += (1.0 - far_mask) * LOW
    w = torch.softmax(torch.cat([first, near, far, last], -1), -1)
    out = torch.matmul(w[..., BLOCK : 4 * BLOCK], windows(v))
    out += torch.matmul(w[..., 4 * BLOCK : -BLOCK], drawn(v, picks))
    out += torch.einsum("bhlqk,bhkd->bhlqd", w[..., :BLOCK], v[:, :, 0])
    out += torch.einsum("bhlqk,bhkd->bhlqd", w[..., -BLOCK:], v[:, :, -1])
    return out


def inputs(dtype: torch.dtype = torch.float32, *, twice: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(BATCH, HEADS, BLOCKS * BLOCK, SIZE, generator=generator).to(dtype) for _ in range(3)]
    kept = torch.ones(BATCH, BLOCKS * BLOCK, dtype=dtype)
    kept[1, -24:] = 0
    return [*(x.requires_grad_() for x in made), kept, table(twice=twice)]


def test_one_kernel_visits_the_listed_blocks_and_no_other() -> None:
    run, analyses = watched(Call(block_sparse))
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs()), block_sparse(*inputs()))
    ((site, _),) = analyses[0].hits
    assert not analyses[0].misses
    assert site.key.extent == LISTED * BLOCK < BLOCKS * BLOCK


def test_joined_keys_and_values_cost_less_than_scores_and_weights() -> None:
    """Here, in blocks of 16 and heads of 16, each of the four takes the same memory, as in the model's own 64 and 64. Joined
    keys and values are written and read once, from pieces that the model makes as well."""
    (site,) = attngen.explain(block_sparse, *inputs()).sites
    joined = 2 * BATCH * HEADS * MIDDLE * LISTED * BLOCK * SIZE * 4
    assert site.hbm_bytes["after"] + 2 * joined < site.hbm_bytes["before"] / 3


def results(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    out = function(*tensors)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    return [out.detach(), *(x.grad for x in tensors[:3] if x.grad is not None)]


@pytest.mark.parametrize("twice", [False, True], ids=["drawn", "a block twice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_values_and_gradients(dtype: torch.dtype, twice: bool) -> None:
    """A block that is listed twice counts twice in the softmax, as in the model: no mask over the keys could say that."""
    make = partial(inputs, dtype, twice=twice)
    torch._dynamo.reset()
    with attngen.record() as reports:
        ours = results(torch.compile(block_sparse, backend="attngen", options={"inner": "eager"}), make())
    assert [site.status for report in reports for site in report.sites] == ["replaced"]
    exact = [x.detach().double().requires_grad_() for x in make()[:3]]
    exact = results(block_sparse, [*exact, *(x.double() if x.is_floating_point() else x for x in make()[3:])])
    for place, (a, x, e) in enumerate(zip(ours, exact, results(block_sparse, make()), strict=True)):
        assert within_budget(a, x, e, slack=3.0 if place else 2.0).ok


def test_a_mask_of_two_masks_is_no_product_of_queries_and_keys() -> None:
    """An einsum that sums over nothing multiplies elements, also weights with a gate."""

    def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,bhi->bhij", w, q[..., 0].sigmoid()) @ v

    run, analyses = watched(Call(gated))
    tensors = [x.detach() for x in inputs()[:3]]
    torch.testing.assert_close(run(*tensors), gated(*tensors))
    assert len(analyses[0].hits) == 1 and not analyses[0].misses
