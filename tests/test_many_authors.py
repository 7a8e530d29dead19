"""Attention as people write it who never saw this repository: each was written down first, and then found as it is.

With gradients, against eager's. ``FOUND`` says how many kernels it takes; the last ones are left alone, each with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from analysis import assert_replaced_with_its_gradient
from torch import Tensor
from torch.nn import functional as F

import attngen

B, H, N, D = 2, 4, 48, 16
SCALE = D**-0.5
Function = Callable[..., Tensor]


def made(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n, shape in enumerate(shapes)]


def plain(*more: tuple[int, ...]) -> list[Tensor]:
    return made(*[(B, H, N, D)] * 3, *more)


def later() -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).triu(1)


# ------------------------------------------------------------------------------------------------------------- ways to write


def vmap_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.T * SCALE
        return torch.where(torch.arange(N)[:, None] >= torch.arange(N), s, float("-inf")).softmax(-1) @ v

    return torch.vmap(torch.vmap(one))(q, k, v)


def blocks_of_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    outs = []
    for i in range(0, N, 16):
        s = q[:, :, i : i + 16] @ k[:, :, : i + 16].mT * SCALE
        rows, cols = torch.arange(i, i + 16)[:, None], torch.arange(i + 16)[None]
        outs.append(s.masked_fill(cols > rows, float("-inf")).softmax(-1) @ v[:, :, : i + 16])
    return torch.cat(outs, 2)


def keys_by_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores are laid out the other way round, and the softmax is over their first dimension."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    s = torch.baddbmm(torch.empty(B * H, N, N), k, q.transpose(1, 2), beta=0, alpha=SCALE)
    return torch.bmm(F.softmax(s, dim=1).transpose(1, 2), v)


def split_into_the_batch(i: Tensor, x: Tensor) -> Tensor:
    """Set Transformer's induced points: two attentions, heads cut from the features and joined to the batch."""

    def block(q: Tensor, k: Tensor) -> Tensor:
        queries, keys = torch.cat(q.split(D, 2), 0), torch.cat(k.split(D, 2), 0)
        a = torch.softmax(queries.bmm(keys.transpose(1, 2)) / math.sqrt(H * D), 2)
        return torch.cat((queries + a.bmm(keys)).split(q.size(0), 0), 2)

    return block(x, block(i.repeat(B, 1, 1), x))


def complex_rotary(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(N).float(), 100 ** (-torch.arange(0, D, 2).float() / D))
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotated(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    mask = torch.full((1, 1, N, N), float("-inf")).triu(1)
    return F.softmax(rotated(q) @ rotated(k).transpose(2, 3) / math.sqrt(D) + mask, dim=-1) @ v


# ------------------------------------------------------------------------------------------------------- scores and masks


def chosen_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MoBA: each query sees its own block of keys and the one whose mean it likes best."""
    blocks, rows = N // 16, torch.arange(N)
    gate = torch.einsum("bhid,bhnd->bhin", q, k.view(B, H, blocks, 16, D).mean(3))
    own = rows[:, None] // 16
    gate = gate.masked_fill(torch.arange(blocks) > own, float("-inf")).masked_fill(torch.arange(blocks) == own, float("inf"))
    chosen = torch.zeros(B, H, N, blocks, dtype=torch.bool).scatter(-1, gate.topk(2, -1).indices, True)
    seen = chosen.repeat_interleave(16, -1) & (rows[:, None] >= rows)
    return (q @ k.mT * SCALE).masked_fill(~seen, float("-inf")).softmax(-1) @ v


def forgetting(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    c = F.logsigmoid(f).cumsum(-1)
    s = q @ k.mT * SCALE + c[..., :, None] - c[..., None, :]
    return s.masked_fill(later(), float("-inf")).softmax(-1) @ v


def functional_bias(q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """FIRE: a small network of the distance, which depends on the row as well."""
    i = torch.arange(N).float()
    far = torch.log((i[:, None] - i).clamp(min=0) * 0.5 + 1) / torch.log(i[:, None].clamp(min=4.0) * 0.5 + 1)
    bias = F.linear(F.relu(F.linear(far[..., None], w1)), w2).permute(2, 0, 1)
    return (q @ k.mT * SCALE + bias).masked_fill(later(), float("-inf")).softmax(-1) @ v


def window_and_sinks(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    i = torch.arange(N)
    seen = (i[:, None] >= i) & ((i[:, None] - i < 16) | (i[None] < 2))
    s = (q @ k.mT * SCALE).masked_fill(~seen, float("-inf"))
    s = torch.cat([s, sink.view(1, H, 1, 1).expand(B, -1, N, 1)], -1)
    return (s - s.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


def relative_shift(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Transformer-XL: a product with all distances, shifted into place by padding and another view."""
    shifted = F.pad(torch.einsum("bhid,jd->bhij", q, r), (0, 1)).flatten(2)
    shifted = F.pad(shifted, (0, N - 1)).view(B, H, N + 1, 2 * N - 1)[:, :, :N, N - 1 :]
    return ((q @ k.mT + shifted) * SCALE).softmax(-1) @ v


def pair_bias(q: Tensor, k: Tensor, v: Tensor, z: Tensor, w: Tensor, gate: Tensor) -> Tensor:
    """AlphaFold."""
    bias = F.linear(F.layer_norm(z, (16,)), w).permute(0, 3, 1, 2)
    a = torch.softmax(torch.einsum("bhqc,bhkc->bhqk", q * SCALE, k) + bias, -1)
    return torch.einsum("bhqk,bhkc->bqhc", a, v).flatten(2) * gate.sigmoid()


# --------------------------------------------------------------------------------------------------------------- caches


def latent_cache(qn: Tensor, qr: Tensor, c: Tensor, kr: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    """MLA, absorbed: two products make the score, and the values are the keys of the first."""
    qc = torch.einsum("bshd,hdc->bshc", qn, wk)
    s = (torch.einsum("bshc,btc->bsht", qc, c) + torch.einsum("bshr,btr->bsht", qr, kr)) * (D + 8) ** -0.5
    a = s.softmax(-1, dtype=torch.float32).type_as(qn)
    return torch.einsum("bshc,hcd->bshd", torch.einsum("bsht,btc->bshc", a, c), wv)


def rolled_cache(q: Tensor, old_k: Tensor, old_v: Tensor, k: Tensor, v: Tensor) -> Tensor:
    last = torch.tensor([15])
    k, v = (old.roll(-1, 2).index_copy(2, last, new) for old, new in ((old_k, k), (old_v, v)))
    return (q @ k.mT * SCALE).masked_fill(torch.arange(16) < 3, float("-inf")).softmax(-1) @ v


def paged_cache(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    table, lengths = torch.tensor([[3, 1, 7, 0], [2, 9, 4, 4]]), torch.tensor([25, 32])
    k, v = (pages[table].flatten(1, 2).transpose(1, 2) for pages in (keys, values))
    s = (q @ k.mT * SCALE).masked_fill(torch.arange(32) >= lengths[:, None, None, None], float("-inf"))
    return s.softmax(-1) @ v


# ------------------------------------------------------------------------------------------------------------ no softmax


def taylor_series(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Based."""
    s = q @ k.mT * SCALE
    a = (1 + s + 0.5 * s**2).masked_fill(later(), 0)
    return torch.einsum("bhij,bhjd->bhid", a / (a.sum(-1, keepdim=True) + 1e-6), v)


def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """RetNet, as its authors have it."""
    i = torch.arange(N)
    far = (i[:, None] - i).float()
    rate = torch.log(1 - 2.0 ** (-5 - torch.arange(H).float()))[:, None, None]
    mask = torch.exp(torch.where(far >= 0, far * rate, float("-inf")))
    a = q @ k.mT * (mask / mask.sum(-1, keepdim=True).sqrt())
    return a / a.detach().abs().sum(-1, keepdim=True).clamp(min=1, max=5e4) @ v


def softplus_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.log(1 + torch.exp(q @ k.mT * SCALE))
    return torch.matmul(torch.div(a, a.sum(dim=3).unsqueeze(3)), v)


def noised_and_clean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Block diffusion, in training: each noised block sees itself and the clean ones before it."""
    half, i = N // 2, torch.arange(N)
    clean, block = i >= half, torch.where(i >= half, (i - half) // 4, i // 4)
    rows, cols, clean_rows, clean_cols = block[:, None], block, clean[:, None], clean
    itself = (rows == cols) & (clean_rows == clean_cols)
    before = (rows > cols) & clean_cols & ~clean_rows
    seen = itself | before | ((rows >= cols) & clean_cols & clean_rows)
    s = torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE
    return torch.einsum("bhqk,bhkd->bhqd", s.masked_fill(~seen, torch.finfo(s.dtype).min).softmax(-1), v)


def images_see_themselves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Text is causal; tokens of one picture see each other. Which those are is data."""
    ids = torch.randint(0, 3, (B, N), generator=torch.Generator().manual_seed(4))
    same = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] > 0)
    seen = (~later() | same)[:, None]
    return F.scaled_dot_product_attention(q, k, v, torch.where(seen, 0.0, torch.finfo(q.dtype).min))


def keys_by_an_indexer(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """DeepSeek's sparse attention: small heads choose the keys of each query."""
    top = F.relu(a @ b.mT).masked_fill(later(), float("-inf")).topk(12, -1).indices
    chosen = torch.full((B, N, N), float("-inf")).scatter(-1, top, 0.0)
    s = q @ k.mT * SCALE + chosen[:, None] + torch.full((N, N), float("-inf")).triu(1)
    return s.softmax(-1) @ v


def windows_by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Even heads see few keys, odd ones all."""
    far = torch.arange(N)[:, None] - torch.arange(N)
    width = torch.where(torch.arange(H) % 2 == 0, 8, N)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, (far >= 0) & (far < width))


def packed_by_ends(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    document = torch.bucketize(torch.arange(N), torch.tensor([13, 29, N]), right=True)
    return F.scaled_dot_product_attention(q, k, v, (document[:, None] == document) & ~later())


def a_key_without_a_value(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    k = torch.cat([sink.expand(B, -1, -1, -1), k], 2)
    v = torch.cat([v.new_zeros(B, H, 1, D), v], 2)
    after = torch.arange(N + 1) - 1 > torch.arange(N)[:, None]
    return (q @ k.mT * SCALE).masked_fill(after, float("-inf")).softmax(-1) @ v


def by_vecdot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.linalg.vecdot(q.unsqueeze(-2), k.unsqueeze(-3)) * SCALE
    return torch.linalg.vecdot(s.softmax(-1).unsqueeze(-1), v.unsqueeze(-3), dim=-2)


def repeated_by_expand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every pair of a query and a key, spelt out."""
    pairs = (*q.shape[:-1], k.shape[-2], q.shape[-1])
    s = (q.unsqueeze(-2).expand(pairs) * k.unsqueeze(-3).expand(pairs)).sum(-1) * SCALE
    return s.softmax(-1) @ v


def memory_and_window(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """Infini-attention: a gate between linear attention to a memory and attention as usual."""
    memory, norm = (F.elu(k) + 1).mT @ v, (F.elu(k) + 1).sum(-2, keepdim=True).mT
    recalled = (F.elu(q) + 1) @ memory / ((F.elu(q) + 1) @ norm + 1e-6)
    local = (q @ k.mT * SCALE).masked_fill(later(), -1e9).softmax(-1) @ v
    return beta.sigmoid() * recalled + (1 - beta.sigmoid()) * local


def padding_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """AllenNLP: masked before and after, and normalised again."""
    kept = (torch.rand(B, 1, 1, N, generator=torch.Generator().manual_seed(5)) > 0.3).float()
    w = (q @ k.mT * SCALE * kept).softmax(-1) * kept
    return w / (w.sum(-1, keepdim=True) + 1e-13) @ v


def pictures_beside_text(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """IP-Adapter."""
    return F.scaled_dot_product_attention(q, k, v) + 0.7 * F.scaled_dot_product_attention(q, a, b)


FOUND: dict[Function, tuple[int, Callable[[], list[Tensor]]]] = {
    vmap_over_heads: (1, plain),
    blocks_of_queries: (3, plain),
    keys_by_queries: (1, plain),
    split_into_the_batch: (2, lambda: made((1, 6, H * D), (B, N, H * D))),
    complex_rotary: (1, plain),
    chosen_blocks: (1, plain),
    forgetting: (1, lambda: plain((B, H, N))),
    functional_bias: (1, lambda: plain((8, 1), (H, 8))),
    window_and_sinks: (1, lambda: plain((H,))),
    relative_shift: (1, lambda: plain((2 * N - 1, D))),
    pair_bias: (1, lambda: plain((B, N, N, 16), (H, 16), (B, N, H * D))),
    latent_cache: (1, lambda: made((B, 1, H, D), (B, 1, H, 8), (B, N, 24), (B, N, 8), (H, D, 24), (H, 24, D))),
    rolled_cache: (1, lambda: made((B, H, 1, D), *[(B, H, 16, D)] * 2, *[(B, H, 1, D)] * 2)),
    paged_cache: (1, lambda: made((B, H, 7, D), *[(20, 8, H, D)] * 2)),
    taylor_series: (2, plain),
    retention: (2, plain),
    softplus_by_hand: (2, plain),
    noised_and_clean: (1, plain),
    images_see_themselves: (1, plain),
    keys_by_an_indexer: (1, lambda: plain((B, N, 8), (B, N, 8))),
    windows_by_head: (1, plain),
    packed_by_ends: (1, plain),
    a_key_without_a_value: (1, lambda: plain((1, H, 1, D))),
    by_vecdot: (1, plain),
    repeated_by_expand: (1, plain),
    memory_and_window: (1, lambda: plain((H, 1, 1))),
    padding_by_products: (1, plain),
    pictures_beside_text: (2, lambda: plain((B, H, 7, D), (B, H, 7, D))),
}


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_found_with_its_gradient(function: Function) -> None:
    count, inputs = FOUND[function]
    assert_replaced_with_its_gradient(function, lambda: [x.requires_grad_() for x in inputs()], count)


def test_factors_may_be_repeated_by_sizes_that_change() -> None:
    run = torch.compile(repeated_by_expand, backend="attngen", dynamic=True, options={"strict": True})
    for length in (N, N + 3):
        q, k, v = made((B, H, length, D), (B, H, length, D), (B, H, length, D))
        torch.testing.assert_close(run(q, k, v), repeated_by_expand(q, k, v), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ left alone


def positions_by_content(q: Tensor, k: Tensor, v: Tensor, e: Tensor) -> Tensor:
    """CoPE: how far a key is depends on all scores in between."""
    s = (q @ k.mT * SCALE).masked_fill(later(), -1e9)
    far = s.sigmoid().flip(-1).cumsum(-1).flip(-1).clamp(max=N - 1)
    low, high = far.floor(), far.ceil()
    z = q @ e.T
    below, above = (z.gather(-1, place.long()) for place in (low, high))
    return (s + above * (far - low) + below * (1 - (far - low))).softmax(-1) @ v


def deformable(v: Tensor, places: Tensor, w: Tensor) -> Tensor:
    """Values are sampled where a layer says; no product scores them."""
    x = v.permute(0, 2, 3, 1).reshape(B * H, D, 6, 8)
    sampled = F.grid_sample(x, places.tanh().permute(0, 2, 1, 3, 4).flatten(0, 1), align_corners=False)
    weights = w.softmax(-1).transpose(1, 2).reshape(B * H, 1, 10, 4)
    return (sampled * weights).sum(-1).view(B, H * D, 10).transpose(1, 2)


def slots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slot attention: queries compete for keys, and then share themselves out."""
    a = (q @ k.mT * SCALE).softmax(-2) + 1e-8
    return a / a.sum(-1, keepdim=True) @ v


def talking_heads(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bhij,hg->bgij", q @ k.mT * SCALE, w).softmax(-1) @ v


def both_ways(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """LoFTR: what a query makes of a key times what the key makes of the query."""
    s = q @ k.mT * SCALE
    return (s.softmax(-1) * s.softmax(-2)) @ v


def sticks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stick-breaking: each weight takes a share of what later keys have left."""
    s = (q @ k.mT * SCALE).masked_fill(later(), -1e9)
    left = F.logsigmoid(-s)
    return (F.logsigmoid(s) + left.flip(-1).cumsum(-1).flip(-1) - left).exp() @ v


ALONE: dict[Function, tuple[str, Callable[[], list[Tensor]]]] = {
    positions_by_content: ("more than pointwise arithmetic", lambda: plain((N, D))),
    deformable: ("", lambda: made((B, N, H, D), (B, 10, H, 4, 2), (B, 10, H, 4))),
    slots: ("something is added to the attention weights", plain),
    talking_heads: ("heads are mixed", lambda: plain((H, H))),
    both_ways: ("the weights are changed", plain),
    sticks: ("more than pointwise arithmetic", plain),
}


@pytest.mark.parametrize("function", ALONE, ids=lambda f: f.__name__)
def test_left_alone(function: Function) -> None:
    reason, inputs = ALONE[function]
    torch._dynamo.reset()
    with attngen.record() as reports, torch.no_grad():
        out = torch.compile(function, backend="attngen", options={"inner": "eager"})(*inputs())
    torch.testing.assert_close(out, function(*inputs()))
    sites = [site for report in reports for site in report.sites]
    assert not [site for site in sites if site.status == "replaced"]
    assert bool(sites) == bool(reason) and all(reason in site.reason for site in sites)
