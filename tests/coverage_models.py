"""The models whose attention is counted, by source: each built small with random weights, and inputs on which it runs."""

from __future__ import annotations

from typing import Any

from torch import nn

Example = tuple[nn.Module, dict[str, Any]]


def names(source: str) -> list[str]:
    import coverage_transformers

    return coverage_transformers.names()


def build(source: str, name: str, attention: str) -> Example:
    import coverage_transformers

    return coverage_transformers.build(name, attention)
