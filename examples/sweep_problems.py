"""What the sweep measures: ``SITES``, attention specs at sizes, built from the records that detection makes of a model.

Sites that share a spec share kernels, whose lengths are arguments: what is compiled for one serves all of them. ``second``
marks sites of programs that no formula was fitted to and that belong to neither half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import sympy as sp
import torch

from attngen import aot, prepare, verify
from attngen.algebra import Const, Expr, Int, Load, integer, op, to_float
from attngen.aot import Layout
from attngen.cache.key import BACKWARD, FORWARD, Wanted
from attngen.compat import FloorDiv
from attngen.device import Device
from attngen.spec import FEATURE, INNER, KEY, ROW, SCORE, AttentionSpec, Input, Problem, batch_axes

Phase = Literal["forward", "backward", "decode"]
B, H = batch_axes(2)
ZERO = sp.Integer(0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
GROUPS = 4  # query heads that share keys, in programs with ``grouped`` in their name


# ------------------------------------------------------------------------------------------------------------- programs


def _loaded(name: str, *index: Any, kind: str = "float") -> Load:
    return Load(name, tuple(Int(sp.sympify(place)) for place in index), kind)


def _both(first: Expr, second: Expr) -> Expr:
    return op("and", first, second)


CAUSAL = op("le", Int(KEY), Int(ROW))
LAST_ROWS = op("le", Int(KEY), Int(ROW + KEY.extent - ROW.extent))  # causal, for queries at the end of a cache
SLOPE = _loaded("t0", H)
DIAGONAL = KEY - ROW + ROW.extent - 1
DOCUMENTS = op("eq", _loaded("t0", B, ROW, kind="int"), _loaded("t1", B, KEY, kind="int"))
NUMBERS = {"t0": (torch.int64, (B, ROW)), "t1": (torch.int64, (B, KEY))}
SLOPES = {"t0": (FP32, (H,))}


def _window(width: int) -> Expr:
    return _both(CAUSAL, op("gt", Int(KEY), Int(ROW - width)))


def _softcap(score: Expr) -> Expr:
    return op("mul", op("tanh", op("div", score, Const(50.0))), Const(50.0))


def _program(name: str, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Fields of the spec: score, mask and what else is loaded."""
    qk = op("mul", SCORE, Const(head_dim**-0.5))
    keys_first = op("or", _window(1024), _both(CAUSAL, op("lt", Int(KEY), integer(4))))
    alibi = op("add", qk, op("mul", SLOPE, to_float(Int(KEY))))
    table = op("add", qk, _loaded("t0", H, DIAGONAL))
    bias = op("add", qk, _loaded("t0", ZERO, H, ROW, KEY))
    planes = {"t0": (dtype, (ZERO, H, ROW, KEY))}
    return {
        "full": {},
        "causal": {"mask": CAUSAL},
        "last rows": {"mask": LAST_ROWS},
        "window": {"mask": _window(512)},
        "documents": {"mask": _both(CAUSAL, DOCUMENTS), "extras": NUMBERS},
        "padding": {"mask": _loaded("t0", B, KEY, kind="bool"), "extras": {"t0": (torch.bool, (B, KEY))}},
        "prefix": {"mask": op("or", CAUSAL, op("lt", Int(KEY), integer(1024)))},
        "alibi": {"mask": CAUSAL, "score": alibi, "extras": SLOPES},
        "alibi last rows": {"mask": LAST_ROWS, "score": alibi, "extras": SLOPES},
        "softcap": {"mask": CAUSAL, "score": _softcap(qk)},
        "softcap last rows": {"mask": LAST_ROWS, "score": _softcap(qk)},
        "table": {"score": table, "extras": {"t0": (FP32, (H, DIAGONAL))}},
        "bias": {"score": bias, "extras": planes},
        "sinks": {"mask": _window(128), "sinks": (SLOPE,), "extras": SLOPES},
        "sigmoid": {"score": op("sigmoid", op("add", qk, Const(-7.0))), "softmax": False},
        "streaming": {"mask": keys_first},
    }[name]


def spec_of(program: str, head_dim: int, value_dim: int, dtype: torch.dtype, gradients: bool) -> AttentionSpec:
    """``program`` over ``[B, H, N, D]`` operands."""
    name = program.removeprefix("grouped ")
    shared = FloorDiv(H, GROUPS) if name != program else H
    fields = _program(name, head_dim, dtype)
    extras = tuple(Input(each, index, kind) for each, (kind, index) in fields.pop("extras", {}).items())
    score = fields.pop("score", op("mul", SCORE, Const(head_dim**-0.5)))
    spec = AttentionSpec(
        query=Input("q", (B, H, ROW, INNER), dtype),
        keys=Input("k", (B, shared, KEY, INNER), dtype),
        values=Input("v", (B, shared, KEY, FEATURE), dtype),
        extras=extras,
        batch=(B, H),
        output=(B, H, ROW, FEATURE),
        head_dim=head_dim,
        value_dim=value_dim,
        out_dtype=dtype,
        score=score,
        lse=gradients,
    )
    return replace(spec, **fields)


# ---------------------------------------------------------------------------------------------------------------- sites


@dataclass(frozen=True)
class Site:
    """One problem. ``name`` says all of it, and decides its half."""

    name: str
    phase: Phase
    spec: AttentionSpec
    problem: Problem
    second: bool = False

    @property
    def half(self) -> str:
        """ "fit", "held out", or "second". By the name alone: a site stays where it is when others come."""
        if self.second:
            return "second"
        return "held out" if hashlib.sha256(self.name.encode()).digest()[0] & 1 else "fit"

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """How its tensors lie in memory: plainly."""
        return tuple(map(aot.layout_of, verify.sample_inputs(self.spec, self.problem, device="meta")))

    @property
    def launched(self) -> tuple[Layout, ...]:
        """The layouts of what its kernel is launched on: in a backward, what the forward made comes first."""
        results = prepare.results_of(self.spec, self.problem) if self.phase == BACKWARD else ()
        return (*results, *self.layouts)

    def wanted(self, device: Device) -> Wanted:
        """The choice that it is, as the tuner has it."""
        phase = BACKWARD if self.phase == BACKWARD else FORWARD
        return Wanted(phase, self.spec, self.problem, self.layouts, device, self.name)


# (batch, heads, queries) or (batch, heads, queries, keys), by program and head size.
Sizes = Sequence[tuple[int, ...]]
Declared = Mapping[tuple[Any, ...], Sizes]

_FORWARD: Declared = {
    ("full", 64): [(32, 16, 512), (64, 12, 197), (2, 16, 1000), (4, 32, 4000), (1, 32, 16384), (2, 16, 1024, 8192)],
    ("full", 80): [(2, 16, 4096), (8, 16, 1000), (16, 16, 257)],
    ("full", 96): [(4, 16, 2048), (16, 8, 577), (1, 16, 8192)],
    ("full", 128): [(16, 16, 256), (1, 8, 1000), (16, 16, 1024), (4, 16, 4096), (1, 16, 16384), (1, 16, 512, 16384)],
    ("full", 192): [(2, 8, 4096), (8, 8, 1000), (1, 8, 512)],
    ("full", 256): [(4, 8, 2048), (2, 8, 1024), (1, 8, 8192)],
    ("causal", 64): [(16, 16, 1024), (4, 32, 4096), (1, 8, 2048), (1, 32, 16384), (8, 12, 1000)],
    ("causal", 80): [(4, 16, 2048), (2, 16, 4000)],
    ("causal", 96): [(8, 16, 2048), (2, 16, 4096), (1, 12, 777)],
    ("causal", 128): [(16, 16, 1024), (4, 16, 4096), (1, 8, 1000), (1, 16, 16384), (2, 32, 4000), (1, 16, 333)],
    ("causal", 192): [(4, 8, 2048), (2, 8, 4096)],
    ("causal", 256): [(16, 8, 1024), (2, 8, 4096), (1, 8, 1000)],
    ("window", 64): [(4, 32, 4096), (1, 16, 2048), (1, 32, 16384)],
    ("window", 128): [(4, 16, 4096), (2, 16, 4000), (1, 16, 32768)],
    ("window", 256): [(4, 8, 4096), (1, 8, 2000)],
    ("documents", 64): [(4, 16, 4096), (2, 16, 1000)],
    ("documents", 128): [(4, 16, 4096), (1, 16, 16384), (8, 16, 1024)],
    ("padding", 64): [(32, 16, 512), (16, 12, 384), (4, 16, 2048)],
    ("prefix", 128): [(4, 16, 4096), (2, 16, 4000), (8, 16, 2048)],
    ("alibi", 64): [(4, 32, 4096), (8, 16, 1024), (1, 16, 4000)],
    ("alibi", 128): [(8, 16, 2048), (2, 16, 4096), (1, 16, 1000)],
    ("softcap", 128): [(4, 16, 4096), (4, 16, 1000)],
    ("softcap", 256): [(4, 8, 4096), (8, 8, 1024), (1, 8, 2000)],
    ("table", 64): [(8, 12, 2048), (32, 12, 512), (2, 12, 4000)],
    ("bias", 64): [(4, 16, 1024), (8, 8, 256), (2, 8, 4096)],
    ("bias", 128): [(4, 16, 2048), (1, 16, 1000)],
    ("grouped causal", 128): [(4, 32, 4096), (1, 32, 8192), (2, 32, 1000)],
    ("full", 64, "fp16"): [(8, 16, 1024), (1, 16, 4000)],
    ("causal", 128, "fp16"): [(4, 16, 2048), (1, 16, 8192)],
    ("full", 64, "fp32"): [(4, 16, 1024), (8, 12, 197)],
    ("causal", 128, "fp32"): [(2, 16, 2048), (1, 8, 1000)],
}
_DECODE: Declared = {
    ("full", 64): [(16, 32, 1, 4096), (1, 16, 1, 32768)],
    ("full", 80): [(8, 32, 1, 4000)],
    ("full", 128): [(8, 32, 1, 4096), (1, 32, 1, 65536), (64, 16, 1, 1000)],
    ("full", 256): [(8, 8, 1, 8192), (1, 8, 1, 2048)],
    ("last rows", 64): [(16, 16, 4, 2048), (1, 16, 2, 16384)],
    ("last rows", 128): [(8, 32, 4, 4096), (1, 32, 8, 32768), (32, 8, 2, 1000)],
    ("grouped full", 128): [(16, 32, 1, 8192), (1, 32, 1, 65536), (64, 32, 1, 1000)],
    ("alibi last rows", 128): [(8, 16, 2, 8192), (1, 16, 1, 4000)],
    ("softcap last rows", 256): [(4, 8, 1, 8192), (1, 8, 4, 16384)],
    ("padding", 64): [(32, 16, 1, 2048)],
}
_BACKWARD: Declared = {
    ("full", 64): [(4, 32, 2048), (2, 16, 1000), (1, 32, 8192)],
    ("full", 128): [(4, 16, 2048), (8, 16, 256), (1, 16, 8192)],
    ("causal", 64): [(4, 32, 4096), (8, 12, 1024), (1, 8, 2000)],
    ("causal", 80): [(4, 16, 2048), (1, 16, 1000)],
    ("causal", 96): [(4, 16, 2048), (2, 12, 4000)],
    ("causal", 128): [(4, 16, 4096), (1, 16, 16384), (1, 8, 1000), (16, 16, 512)],
    ("causal", 256): [(4, 8, 2048), (1, 8, 4000)],
    ("window", 128): [(4, 16, 4096), (1, 16, 8000)],
    ("documents", 128): [(4, 16, 4096), (2, 16, 1000)],
    ("window", 64): [(4, 16, 2048), (1, 16, 4000)],
    ("softcap", 128): [(4, 16, 2048), (1, 16, 1000)],
    ("bias", 64): [(4, 16, 1024), (1, 12, 2048)],
    ("grouped causal", 128): [(4, 32, 2048), (1, 32, 4000)],
}
_SECOND: Declared = {
    ("sinks", 64): [(4, 32, 4096), (1, 16, 1000), (1, 32, 16384), (16, 16, 512)],
    ("sigmoid", 64): [(8, 16, 1024), (2, 16, 4000), (32, 12, 197), (1, 16, 8192)],
    ("causal", 192, "bf16", 128): [(4, 16, 2048), (1, 16, 1000), (1, 16, 8192), (2, 16, 4096)],
    ("streaming", 128): [(4, 16, 4096), (1, 16, 16384), (2, 8, 1000), (8, 16, 2048)],
}


def _site(phase: Phase, declared: tuple[Any, ...], sizes: tuple[int, ...], second: bool) -> Site:
    program, head_dim, *rest = declared
    dtype, value_dim = (*rest, *("bf16", head_dim)[len(rest) :])
    batch, heads, rows, *longer = sizes
    keys = longer[0] if longer else rows
    width = str(head_dim) if value_dim == head_dim else f"{head_dim}/{value_dim}"
    name = f"{phase} {program} d{width} {dtype} {batch}x{heads} {rows}x{keys}"
    spec = spec_of(program, head_dim, value_dim, DTYPES[dtype], phase == "backward")
    return Site(name, phase, spec, Problem((batch, heads), rows, keys), second)


def _sites() -> dict[str, Site]:
    phases: list[tuple[Phase, Declared, bool]] = [
        ("forward", _FORWARD, False),
        ("decode", _DECODE, False),
        ("backward", _BACKWARD, False),
        ("forward", _SECOND, True),
    ]
    made = [
        _site(phase, declared, sizes, second)
        for phase, table, second in phases
        for declared, several in table.items()
        for sizes in several
    ]
    return {site.name: site for site in made}


SITES = _sites()


def groups(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites that share kernels, in an order that spreads: those that are alike lie far apart."""
    by_spec: dict[tuple[str, bool], list[Site]] = {}
    for site in sites:
        by_spec.setdefault((site.spec.text, site.phase == "backward"), []).append(site)
    return sorted(by_spec.values(), key=lambda group: hashlib.sha256(group[0].name.encode()).hexdigest())
