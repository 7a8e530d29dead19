"""Runs that mostly wait, several at a time: each in a process of its own, forked from this one."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

AT_ONCE, SECONDS = 4, 300.0


def side_by_side(run: Callable[[Any], Any], items: Sequence[Any]) -> dict[Any, Any]:
    """What ``run``, a function of a module, returns for each: tensors, strings or None. No gradients: autograd cannot be
    forked."""
    with multiprocessing.get_context("fork").Pool(AT_ONCE, maxtasksperchild=1) as pool:
        made = pool.map_async(partial(_written, run), items, chunksize=1).get(SECONDS)
    return {item: torch.load(io.BytesIO(each)) for item, each in zip(items, made, strict=True)}


def _written(run: Callable[[Any], Any], item: Any) -> bytes:
    file = io.BytesIO()
    torch.save(run(item), file)
    return file.getvalue()
