"""A GPT-2 as textbooks write it, in plain torch: one projection for q, k and v, a registered triangle, masked_fill.

The triangle is a buffer, whose values a trace does not prove: the kernel loads it. Models that compute their mask with
arange or tril get it as code.

    attngen optimize examples/gpt2.py      plan, emit, compile and verify its kernels
    python examples/gpt2.py                run it with its attention replaced, beside eager
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import attngen

VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS = 4096, 512, 384, 6, 4


class CausalSelfAttention(nn.Module):
    triangle: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("triangle", torch.tril(torch.ones(LENGTH, LENGTH)).view(1, 1, LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (y.view(batch, length, HEADS, width // HEADS).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.triangle[:, :, :length, :length] == 0, float("-inf"))
        y = torch.softmax(scores, dim=-1) @ v
        out: Tensor = self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = CausalSelfAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.h:
            x = block(x)
        out: Tensor = self.ln_f(x) @ self.wte.weight.T
        return out


torch.manual_seed(0)
model = GPT().eval()
example_inputs = torch.randint(0, VOCABULARY, (4, LENGTH))


@torch.no_grad()
def main(**options: Any) -> float:
    """Largest difference between the compiled and the eager model, relative to the largest value."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = example_inputs.to(device)
    eager = model.to(device)(tokens)
    with attngen.record() as reports:
        compiled = torch.compile(model, backend="attngen", options=options)(tokens)
    difference = float((compiled - eager).abs().max() / eager.abs().max())
    print(*reports, f"largest difference from eager: {difference:.1e}", sep="\n")
    return difference


if __name__ == "__main__":
    main()
