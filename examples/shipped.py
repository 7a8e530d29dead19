"""Common attentions at common sizes, in plain PyTorch: what attngen comes with tuned tiles for (``attngen/tuned``).

They are problems of ``attngen bench``, as that spells them. On the GPU that the file is for, the first two commands measure
the forward of inference, and that of training with its gradients; the third writes what was measured. Each goes on where it
stopped, and ``--devices all`` spreads the work over the GPUs of the host:

    attngen tune examples/shipped.py --full
    attngen tune examples/shipped.py --full --train
    attngen cache export attngen/tuned/h200.json --device h200

Without a GPU the same attentions are small: ``attngen explain examples/shipped.py`` lists them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from attngen.bench.problems import Problem, selected, small
from attngen.bench.spelling import inputs_of, spelled

DENSE = ("dense_d128_*", "dense_d64_*", "dense_d256_*", "gqa")
VARIANTS = ("alibi", "softcap", "window", "document", "document_causal", "bias", "relative", "prefix", "sinks", "sigmoid")
SMALL_HEADS = ("alibi", "bias", "relative", "sinks")  # those that models with heads of 64 have
VIEWED = ("dense_d128_n4096_*", "dense_d64_n4096_*", "gqa")  # also with operands that lie as linear layers leave them
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problems() -> list[Problem]:
    """Dense ones first: most models have no other."""
    variants = [*(f"{name}_d128" for name in VARIANTS), *(f"{name}_d64" for name in SMALL_HEADS)]
    viewed = [replace(problem, name=f"{problem.name}_views", views=True) for problem in selected(VIEWED)]
    chosen = [*selected(DENSE), *viewed, *selected(variants)]
    return chosen if DEVICE == "cuda" else list(map(small, chosen))


class Attentions(nn.Module):
    """Each problem by itself: ``forward`` is given the operands of one after another, and what their scores load."""

    def __init__(self) -> None:
        super().__init__()
        self.spellings = list(map(spelled, problems()))

    def forward(self, *inputs: tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]) -> list[Tensor]:
        return [attend(*each) for attend, each in zip(self.spellings, inputs, strict=True)]


model = Attentions()


def get_example_inputs() -> tuple[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]], ...]:
    """Random operands, of which gradients may be asked for."""
    made = (inputs_of(problem, DEVICE).wanting(trained=False) for problem in problems())
    return tuple((*each.operands, each.tensors) for each in made)
