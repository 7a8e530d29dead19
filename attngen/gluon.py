"""What the Gluon templates share: the score program as Gluon has it, and which dimensions of a tensor TMA copies."""

from __future__ import annotations

import re

import torch

from attngen.index import Axis
from attngen.printer import Places, Printer, fixed_dims
from attngen.spec import Input

DTYPES = {torch.float16: "gl.float16", torch.bfloat16: "gl.bfloat16"}
PLACES = Places(row="rows", key="cols", row_beside="", key_beside="")  # tensors of two dimensions


def gluon(text: str) -> str:
    """Gluon has Triton's operations under its own name, except one."""
    return re.sub(r"\btl\.", "gl.", text.replace("tl.sigmoid(", "sigmoid(").replace("@triton.jit", "@gluon.jit"))


def helpers_of(printer: Printer, text: str) -> dict[str, bool]:
    """Which functions of ``gluon_helpers.jinja`` the printed ``text`` calls, and what comes before it."""
    every = " ".join([text, *printer.prologue])
    return {
        "tanh": printer.uses_tanh,
        "sigmoid": "sigmoid(" in every,
        "floor_div": printer.uses_floor_div,
        "drowned": printer.uses_drowned,
        "rounded": printer.uses_rounded,
    }


def box_dims(source: Input, row: Axis, feature: Axis) -> list[int]:
    """The dimensions of a box: those that are one per program, then rows, then features."""
    outer = [dim for dim, _ in fixed_dims(source)]
    return [*outer, source.index.index(row), source.index.index(feature)]
