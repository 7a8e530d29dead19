"""64k tokens: a mask and a bias of N x M pairs, written as such, which exist nowhere at run time.

Packed documents, each seen causally through a window, with ALiBi. In eager the scores of one layer alone would take 128 GiB.

    attngen optimize examples/long.py      plan, emit, compile and verify its kernel
    python examples/long.py [FILE]         run it on a GPU and show its peak memory; without one, at 4,096 tokens
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attngen

LENGTH, WIDTH, HEADS, LAYERS, WINDOW, VOCABULARY = 65536, 1024, 16, 2, 4096, 4096


class Layer(nn.Module):
    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("slopes", 2.0 ** (-8 * torch.arange(1, HEADS + 1) / HEADS))

    def forward(self, x: Tensor, document: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        place = torch.arange(x.shape[1], device=x.device)
        distance = place[:, None] - place
        keep = (distance >= 0) & (distance < WINDOW) & (document[:, None, :, None] == document[:, None, None, :])
        bias = -self.slopes[:, None, None] * distance
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 + bias.to(q.dtype)
        y = scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v
        out: Tensor = x + self.out(y.transpose(1, 2).flatten(-2))
        return out


class Long(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, ids: Tensor, document: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, document)
        return x


torch.manual_seed(0)
model = Long().eval()


def get_example_inputs(length: int = LENGTH) -> dict[str, Tensor]:
    """Documents of some 3,000 tokens, one after another."""
    starts = torch.rand(1, length) < 1 / 3000
    return {"ids": torch.randint(0, VOCABULARY, (1, length)), "document": starts.cumsum(1)}


@torch.no_grad()
def main(length: int | None = None, out: Path | None = None, **options: Any) -> None:
    """Run it compiled. On a GPU, print the peak memory of one call beyond parameters and inputs, and write it to ``out``."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    inputs = {name: x.to(device) for name, x in get_example_inputs(length or (LENGTH if gpu else 4096)).items()}
    compiled = torch.compile(model.to(device, dtype), backend="attngen", options=options)
    with attngen.record() as reports:
        compiled(**inputs)
    print(*reports, sep="\n")
    if not gpu:
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    compiled(**inputs)
    torch.cuda.synchronize()
    peak, tokens = (torch.cuda.max_memory_allocated() - before) / 2**30, inputs["ids"].shape[1]
    mask = tokens**2 / 2**30
    record = {"device": torch.cuda.get_device_name(), "versions": {"torch": torch.__version__}, "tokens": tokens}
    record |= {"peak_gib": peak, "mask_gib": mask, "scores_gib": 2 * HEADS * mask}
    print(record)
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(out=Path(sys.argv[1]) if len(sys.argv) > 1 else None)
