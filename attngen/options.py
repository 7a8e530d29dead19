"""What a user may ask for, validated once: ``torch.compile(..., backend="attngen", options={...}, mode=...)``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attngen.cache.lookup import Mode as CacheMode
from attngen.errors import BadOption

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

CACHE = "tuned choices: use, skip, assert (there must be one) or refresh (tune again); also ATTNGEN_CACHE"
FAMILIES = "kernels to choose from: all, or portable, those in plain Triton alone"
FP8 = "inference in products of 8-bit numbers: off, block (a scale for each block of rows) or rotate (of rotated rows)"


class Options(BaseModel):
    """Options of the backend. Each has the meaning its description gives; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    inner: Literal["inductor", "eager"] = Field("inductor", description="what compiles the rest of the graph")
    mode: Mode = Field("default", description="Inductor's mode; the same as torch.compile(mode=...)")
    only: tuple[str, ...] = Field((), description="replace only sites whose path matches one of these patterns")
    skip: tuple[str, ...] = Field((), description="leave sites whose path matches one of these patterns")
    target: str = Field("auto", description="device to plan for where inputs are on the CPU")
    plan: str | None = Field(None, description="a plan.json whose choices are used")
    cache: CacheMode = Field("use", description=CACHE)
    tune: Literal["off", "quick", "full"] = Field("off", description="measure the best few tiles of each site on the GPU")
    tune_seconds: float = Field(120.0, gt=0, description="what tuning may take, for all graphs of a process")
    verify: bool = Field(False, description="check each kernel against float64 before it is used")
    deterministic: bool = Field(False, description="gradients that are the same bits in every run")
    fp8: Literal["off", "block", "rotate"] = Field("off", description=FP8)
    families: Literal["all", "portable"] = Field("all", description=FAMILIES)
    strict: bool = Field(False, description="raise instead of leaving a graph as it was (also ATTNGEN_STRICT=1)")

    @property
    def raises(self) -> bool:
        return self.strict or os.environ.get("ATTNGEN_STRICT", "") not in ("", "0")


def parse(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Validated options. Raises ``BadOption`` naming what is wrong and what is known."""
    given = dict(options or {})
    if mode is not None:
        given["mode"] = mode
    if os.environ.get("ATTNGEN_CACHE"):
        given.setdefault("cache", os.environ["ATTNGEN_CACHE"])
    for name in ("only", "skip"):
        if isinstance(given.get(name), (list, str)):
            given[name] = (given[name],) if isinstance(given[name], str) else tuple(given[name])
    try:
        return Options(**given)
    except ValidationError as wrong:
        raise BadOption(_explained(wrong)) from None


def _explained(wrong: ValidationError) -> str:
    lines = []
    for error in wrong.errors():
        name = ".".join(map(str, error["loc"]))
        if error["type"] == "extra_forbidden":
            lines.append(f"attngen has no option {name!r}.")
        else:
            lines.append(f"option {name!r}: {error['msg']}, not {error['input']!r}.")
    known = "\n".join(f"  {name:<13} {field.description}" for name, field in Options.model_fields.items())
    return "\n".join([*lines, "Known options:", known])
