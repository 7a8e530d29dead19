"""What a tuned choice is for. An entry repeats its whole key, and counts only where all of it is the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from pydantic import Field

import attngen
from attngen.aot import Layout
from attngen.device import Device
from attngen.emit import BACKWARDS, TEMPLATES, template_digest
from attngen.plan import Record
from attngen.spec import AttentionSpec, Problem, digest

FORWARD: Literal["forward"] = "forward"
BACKWARD: Literal["backward"] = "backward"
Phase = Literal["forward", "backward"]
LONGEST = 100_000  # characters of a spec


@dataclass(frozen=True)
class Wanted:
    """A choice to be made: the tile of a spec at some sizes, for tensors that lie in memory so. ``where`` is for people."""

    phase: Phase
    spec: AttentionSpec
    problem: Problem
    inputs: tuple[Layout, ...]
    device: Device
    where: str = field(default="", compare=False)
    deterministic: bool = False  # gradients must be the same bits in every run


class Key(Record):
    """Sizes are classes: each stands for all down to half of it."""

    phase: Phase
    spec: str = Field(max_length=LONGEST)
    heads: int = Field(ge=1)
    rows: int = Field(ge=1)
    keys: int = Field(ge=1)
    dtype: str = Field(max_length=32)
    layout: str = Field(max_length=1000)
    deterministic: bool = False
    device: str = Field(max_length=200)
    sms: int = Field(ge=1)
    attngen: str = Field(max_length=64)
    torch: str = Field(max_length=64)
    triton: str = Field(max_length=64)
    templates: str = Field(min_length=12, max_length=12)

    @property
    def digest(self) -> str:
        return digest(self.model_dump_json())


@lru_cache(maxsize=4096)
def key_of(wanted: Wanted) -> Key:
    spec, problem = wanted.spec, wanted.problem
    return Key(
        phase=wanted.phase,
        spec=spec.text,
        heads=_class(problem.heads),
        rows=_class(problem.rows),
        keys=_class(problem.keys),
        dtype=str(spec.query.dtype).removeprefix("torch."),
        layout=" ".join(map(_arrangement, wanted.inputs)),
        deterministic=wanted.deterministic,
        device=wanted.device.label,
        sms=wanted.device.sms,
        **versions(),
        templates=templates_of(wanted.phase),
    )


def templates_of(phase: Phase) -> str:
    """One digest of every template that competes."""
    files = TEMPLATES if phase == FORWARD else BACKWARDS
    return digest("".join(template_digest(name) for name in files.values()))


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """What else decides how fast a kernel is. A build of torch for the CPU plans the same kernels as the others."""
    return {"attngen": attngen.__version__, "torch": _release("torch"), "triton": _release("triton")}


def _release(package: str) -> str:
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return "none"


def _class(size: int) -> int:
    """The power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def _arrangement(layout: Layout) -> str:
    """The order of dimensions in memory, outermost first, those that are expanded, and "u" where a row does not begin at a
    multiple of 16 bytes. Dimensions with one element are nowhere.
    """
    moving = [dim for dim, size in enumerate(layout.shape) if size > 1]
    held = sorted((dim for dim in moving if layout.strides[dim]), key=lambda dim: -layout.strides[dim])
    expanded = [dim for dim in moving if not layout.strides[dim]]
    unit = max(1, 16 // _itemsize(layout.dtype))
    outer = held[:-1] if held and layout.strides[held[-1]] == 1 else held
    aligned = not any(layout.strides[dim] % unit for dim in outer) and layout.offset % unit == 0
    text = "".join(map(str, held)) + ("x" + "".join(map(str, expanded)) if expanded else "")
    return f"{text or '-'}{'' if aligned else 'u'}"


def _itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
