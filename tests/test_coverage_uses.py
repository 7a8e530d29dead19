"""What the count of attention leaves out: what is computed for nothing, and functions that cannot be captured."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from coverage import Outcome, Reported, _compared, measure
from coverage_results import DEAD, summary
from coverage_tracer import Traced
from test_coverage import QKV, Attention, found, plain
from torch import Tensor, nn


class Wasteful(nn.Module):
    """The first attention is for nothing; the others are written into what is returned, decided by, and kept in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(2, 4, 8, 16))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        plain(k, q, v).relu()
        out = torch.zeros(2, 4, 16, 16)
        out[:, :, 8:].copy_(plain(q, k, v))
        if plain(v, k, q).sum() > 1e9:
            out = out + 1
        self.kept.add_(plain(v, q, k))
        return {"out": (out,)}


def test_dead_is_what_nothing_is_made_of() -> None:
    assert [site.dead for site in found(Wasteful(), *QKV)] == [True, False, False, False]


def test_dead_ones_take_no_fate_but_replaced() -> None:
    seen = [Traced("softmax", "a", "m.py:1", dead=True), Traced("softmax", "a", "m.py:2")]
    sites, _ = _compared(seen, [Reported("a", "m.py:2", "too odd")], Outcome("model"))
    assert [site["fate"] for site in sites] == [DEAD, "too odd"]
    outcome = Outcome("model", sites=sites)
    assert [summary([asdict(outcome)])[key] for key in ("sites", "replaced", "dead")] == [1, 0, 1]


@torch.library.custom_op("attngen_coverage::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x.clone()


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    raise RuntimeError("without its data nothing is known of the result")


class Uncapturable(nn.Module):
    """``torch.compile`` raises at an operator that fake tensors cannot go through."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(opaque(x))


def test_what_cannot_be_captured_is_left_out() -> None:
    outcome = measure("uncapturable", Uncapturable().eval(), {"x": torch.randn(2, 8, 16)})
    assert [site["fate"] for site in outcome.sites] == ["replaced"]
    assert [problem.split(":")[0] for problem in outcome.problems] == ["capture"]
