"""A prompt that is read in chunks: several queries at an offset, over a cache that grows, or has its size from the start.

Chunk after chunk computes what the whole prompt does at once, in few graphs, and every mask is bounds of a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from analysis import watched
from test_detect_dynamic import masks
from torch import Tensor, nn
from torch.nn import functional as F

import attngen

EAGER = {"inner": "eager"}
BATCH, HEADS, KV_HEADS, SIZE = 2, 4, 2, 16
PROMPT, CHUNKS = 40, (16, 16, 8)
LONGEST = 64


class Attention(nn.Module):
    """Two layers of grouped attention, written by hand; ``step`` says what a layer does with new keys and values."""

    def __init__(self, cache: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = HEADS * SIZE
        self.qkv = nn.ModuleList(nn.Linear(width, (HEADS + 2 * KV_HEADS) * SIZE) for _ in range(2))
        self.cache = [cache(layer) for layer in range(2)]

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for layer in range(2):
            q, k, v = self.heads(layer, x)
            k, v, seen = self.cached(layer, k, v, positions)
            k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
            s = q @ k.mT * SIZE**-0.5
            s = s.masked_fill(~seen, torch.finfo(s.dtype).min)
            x = x + (F.softmax(s.float(), -1).type_as(s) @ v).transpose(1, 2).flatten(2)
        return x

    def heads(self, layer: int, x: Tensor) -> tuple[Tensor, ...]:
        parts = self.qkv[layer](x).unflatten(-1, (-1, SIZE)).transpose(1, 2)
        return parts.split([HEADS, KV_HEADS, KV_HEADS], 1)

    def cached(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


class Growing(Attention):
    """Keys and values are joined to those before; queries are the last rows of a triangle."""

    def __init__(self) -> None:
        super().__init__(lambda layer: tuple(torch.zeros(BATCH, KV_HEADS, 0, SIZE) for _ in "kv"))

    def cached(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (torch.cat([old, new], 2) for old, new in zip(self.cache[layer], (k, v), strict=True))
        self.cache[layer] = (k, v)
        rows, keys = positions.shape[0], k.shape[2]
        return k, v, torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)


class Static(Attention):
    """Written to at the positions of the chunk; what is beyond them holds nothing yet."""

    def __init__(self) -> None:
        super().__init__(lambda layer: tuple(torch.zeros(BATCH, KV_HEADS, LONGEST, SIZE) for _ in "kv"))

    def cached(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for held, new in zip(self.cache[layer], (k, v), strict=True):
            held.index_copy_(2, positions, new)
        k, v = self.cache[layer]
        return k, v, torch.arange(LONGEST)[None] <= positions[:, None]


def prompt() -> Tensor:
    return torch.randn(BATCH, PROMPT, HEADS * SIZE, generator=torch.Generator().manual_seed(1))


def in_chunks(run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    x, done, outs = prompt(), 0, []
    with torch.no_grad():
        for size in CHUNKS:
            outs.append(run(x[:, done : done + size], torch.arange(done, done + size)))
            done += size
    return torch.cat(outs, 1)


def whole() -> Tensor:
    with torch.no_grad():
        return Growing()(prompt(), torch.arange(PROMPT))


@pytest.mark.parametrize("model", [Growing, Static])
@pytest.mark.parametrize("dynamic", [None, True], ids=["as it comes", "dynamic"])
def test_chunks_compute_what_the_whole_prompt_does(model: type[Attention], dynamic: bool | None) -> None:
    torch._dynamo.reset()
    with attngen.record() as reports:
        got = in_chunks(torch.compile(model(), backend="attngen", dynamic=dynamic, options=EAGER))
    torch.testing.assert_close(got, whole())
    sites = [site for report in reports for site in report.sites]
    assert sites and {site.status for site in sites} == {"replaced"}
    assert not [site for site in sites if "t0[b, h" in site.computes]  # no mask of pairs is loaded


def test_chunks_over_a_static_cache_share_one_graph() -> None:
    """Of equal chunks; where the mask ends is read from memory."""
    run, graphs = watched(Static())
    done = 0
    for _ in range(3):
        with torch.no_grad():
            run(prompt()[:, done : done + 12], torch.arange(done, done + 12))
        done += 12
    assert len(graphs) == 1 and len(graphs[0].hits) == 2 and not graphs[0].misses
    assert set(masks(graphs[0])) == {"causal(loaded positions)"}


@pytest.mark.parametrize(("name", "how"), [("llama", "eager"), ("llama", "sdpa"), ("mistral", "eager"), ("gpt2", "sdpa")])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_models_read_a_prompt_in_chunks_and_go_on(kind: str, name: str, how: str) -> None:
    """Mistral's cache is no longer than its window. A static cache counts up how much it holds as soon as masks are made."""
    module, _ = zoo.build(name, how)

    def cache() -> Any:
        config = module.config
        return hf.DynamicCache(config=config) if kind == "dynamic" else hf.StaticCache(config=config, max_cache_len=32)

    tokens = zoo.token_ids(12)
    with torch.no_grad():
        expected = module(input_ids=tokens).last_hidden_state
        torch._dynamo.reset()
        compiled, held, outs = torch.compile(module, backend="attngen", options=EAGER), cache(), []
        with attngen.record() as reports:
            for first, end in ((0, 4), (4, 8), (8, 11), (11, 12)):
                places, part = torch.arange(first, end), tokens[:, first:end]
                given = {"position_ids": places[None].expand(part.shape[0], -1), "cache_position": places}
                outs.append(compiled(input_ids=part, past_key_values=held, use_cache=True, **given).last_hidden_state)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-4, atol=1e-5)
    sites = [site for report in reports for site in report.sites]
    assert sites and {site.status for site in sites} == {"replaced"}
