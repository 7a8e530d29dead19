"""FlashAttention 3 and 4, which take ``[B, N, H, D]`` and say masks by number; packed documents are their varlen form."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attngen import fp8
from attngen.bench.problems import FEATURES, Problem
from attngen.bench.spelling import Inputs
from attngen.bench.terms import Missing, NotSpelled

SPELLED = {"causal", "window", "softcap", "documents"}  # by both
FORWARD_ONLY = "fa3_fwd_interface"


def third(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    """FlashAttention-3: the interface that its sources install, or the forward-only wheel."""
    module = _imported("flash_attn_interface", FORWARD_ONLY, install="fa3-fwd")
    if inputs.leaves and module.__name__ == FORWARD_ONLY:
        raise NotSpelled("fa3-fwd has no gradient; what FlashAttention-3's sources install has")
    return _prepared(module, problem, inputs, _options(problem, inputs, SPELLED, every=-1))


def third_in_eighths(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    """FlashAttention-3 on operands in 8 bits, a scale for each head of keys: made beforehand, so that takes no time here."""
    module = _imported("flash_attn_interface", FORWARD_ONLY, install="fa3-fwd")
    if inputs.leaves or problem.documents is not None:
        raise NotSpelled("no spelling of gradients and packed documents in 8 bits")
    options = _options(problem, inputs, SPELLED, every=-1)
    operands = []
    for name, each in zip("qkv", inputs.operands, strict=True):
        x = (each if problem.views else each.transpose(1, 2)).float()
        heads = x.unflatten(2, (problem.sources, -1))  # those that share keys share a scale
        scale = heads.abs().amax((1, 3, 4), keepdim=True) / fp8.LARGEST
        operands.append((heads / scale).to(torch.float8_e4m3fn).view(x.shape))
        options[f"{name}_descale"] = scale.view(problem.batch, problem.sources)

    def run() -> Tensor:
        out = _first(module.flash_attn_func(*operands, **options))
        return out if problem.views else out.transpose(1, 2)

    return run


def fourth(problem: Problem, inputs: Inputs) -> Callable[[], Tensor]:
    """FlashAttention-4, which also knows sinks."""
    module = _imported("flash_attn.cute.interface", install="--pre flash-attn-4")
    return _prepared(module, problem, inputs, _options(problem, inputs, SPELLED | {"sinks"}, every=None))


def _imported(*names: str, install: str) -> ModuleType:
    """The first that is installed. One that is installed and cannot be imported raises what it raises."""
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError as missing:
            if missing.name is None or not f"{name}.".startswith(f"{missing.name}."):
                raise
    raise Missing(f"not installed (pip install {install})")


def _options(problem: Problem, inputs: Inputs, spelled: set[str], *, every: int | None) -> dict[str, Any]:
    """Keyword arguments that say what ``problem`` does to its scores; ``every`` is a window's side without an end."""
    if other := [name for name in FEATURES if getattr(problem, name) and name not in spelled]:
        raise NotSpelled(f"no spelling of {', '.join(other)}")
    options: dict[str, Any] = {"causal": problem.causal, "softmax_scale": problem.head_size**-0.5}
    if problem.window is not None:
        options["window_size"] = (problem.window - 1, 0 if problem.causal else problem.window - 1)
    else:
        options["window_size"] = (every, every)
    if problem.softcap is not None:
        options["softcap"] = problem.softcap
    if problem.sinks:
        options["learnable_sink"] = inputs.tensors["sinks"]
    return options


def _prepared(module: ModuleType, problem: Problem, inputs: Inputs, options: dict[str, Any]) -> Callable[[], Tensor]:
    query, keys, values = (x if problem.views else x.transpose(1, 2).contiguous() for x in inputs.operands)
    if problem.documents is None:
        attend = module.flash_attn_func

        def run() -> Tensor:
            out = _first(attend(query, keys, values, **options))
            return out if problem.views else out.transpose(1, 2)

        return run
    attend, shape = module.flash_attn_varlen_func, (*query.shape[:-1], problem.width)
    flat = [x.flatten(0, 1) for x in (query, keys, values)]
    bounds, longest = boundaries(inputs.tensors["documents"])
    packed = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}

    def run_packed() -> Tensor:
        out = _first(attend(*flat, **packed, **options)).view(shape)
        return out if problem.views else out.transpose(1, 2)

    return run_packed


def _first(result: Any) -> Tensor:
    """The output; some versions give the log-sum-exp beside it."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def boundaries(documents: Tensor) -> tuple[Tensor, int]:
    """Where documents begin, all sequences in a row, with the end as the last; and the length of the longest."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([documents.numel()])]).to(torch.int32)
    return bounds, int(bounds.diff().max())
