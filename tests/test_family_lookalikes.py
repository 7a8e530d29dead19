"""For each family of models twins that look like it and compute something else: all of it is left alone, and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from analysis import watched
from test_lookalikes import CHANGED, NO_PRODUCT, OTHER_DIM
from torch import Tensor, nn

FAMILIES = [name for name in zoo.MASKS if not name.endswith("_padded")]
Softmax = Callable[..., Tensor]
softmax = nn.functional.softmax  # which all of them call, spelt eagerly


def over_queries(x: Tensor, **options: torch.dtype | None) -> Tensor:
    return softmax(x, dim=-2, **options)


def of_normalised_scores(x: Tensor, **options: torch.dtype | None) -> Tensor:
    return softmax(nn.functional.layer_norm(x, x.shape[-1:]), dim=-1, **options)


def of_other_heads(x: Tensor, **options: torch.dtype | None) -> Tensor:
    return softmax(x, dim=-1, **options).roll(1, 1)


def reasons(name: str, **more: bool) -> list[str]:
    """Of all that is missed in the family's model; nothing is replaced."""
    module, inputs = zoo.build(name, "eager")
    compiled, graphs = watched(module)
    with torch.no_grad():
        compiled(**inputs, **more)
    assert not any(graph.hits for graph in graphs)
    return [miss.reason for graph in graphs for miss in graph.misses]


TWINS = [(over_queries, OTHER_DIM), (of_normalised_scores, NO_PRODUCT), (of_other_heads, CHANGED)]
# Families in turn leave out one of them: what computes the scores and what is made of them are looked at apart.
IN_TURN = [(name, *TWINS[(place + n) % 3]) for place, name in enumerate(FAMILIES) for n in range(2)]


@pytest.mark.parametrize(("name", "twin", "reason"), IN_TURN, ids=lambda x: getattr(x, "__name__", str(x)[:20]))
def test_another_softmax(name: str, twin: Softmax, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def instead(x: Tensor, dim: int, _stacklevel: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        if _stacklevel:  # the library's own call of itself, where a mode watches
            return softmax(x, dim=dim, dtype=dtype)
        assert dim in (-1, x.dim() - 1)
        return twin(x, dtype=dtype)

    monkeypatch.setattr(nn.functional, "softmax", instead)
    assert reasons(name) == [reason] * len(zoo.MASKS[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_that_are_returned(name: str) -> None:
    assert reasons(name, output_attentions=True) == ["the attention weights are returned"] * len(zoo.MASKS[name])
