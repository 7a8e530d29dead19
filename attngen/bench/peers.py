"""Every way to compute a problem: ours, PyTorch's own, and the libraries', each in the spelling that suits it best.

What a peer can make beforehand and a model would keep (mask tensors, block masks, its own layout of the operands) is made
outside of what is timed. What is trained changes from step to step: what is made of that is made in the call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attngen
from attngen.bench import flash
from attngen.bench.features import Bias, Place, Tensors, features_of, masks_of
from attngen.bench.problems import Problem
from attngen.bench.spelling import Inputs, spelled
from attngen.bench.terms import NotSpelled
from attngen.errors import BadOption
from attngen.report import SiteReport

Run = Callable[[], Tensor]
OURS = "attngen"


@dataclass(frozen=True)
class Peer:
    """``prepare`` makes the forward to be timed. It raises ``NotSpelled`` or ``Missing`` where there is none.

    ``eighths``: its products are of 8-bit numbers, and its error is held against an eager whose operands are such numbers.
    ``rows_first``: it takes ``[B, N, H, D]``, and is given leaves that lie so where gradients are asked for.
    """

    name: str
    prepare: Callable[[Problem, Inputs], Run]
    describes: str
    devices: tuple[str, ...] = ("cuda",)
    default: bool = True
    rows_first: bool = False
    eighths: bool = False


def chosen(names: Sequence[str], device: str) -> list[Peer]:
    """The peers of those names, or those that are run by default on ``device``. Raises ``BadOption`` for an unknown one."""
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise BadOption(f'no peer is called "{unknown[0]}". Known: {", ".join(PEERS)}.')
    if names:
        return [PEERS[name] for name in dict.fromkeys(names)]
    return [peer for peer in PEERS.values() if peer.default and device in peer.devices]


# ------------------------------------------------------------------------------------------------- the user's spelling


def _eager(problem: Problem, inputs: Inputs) -> Run:
    attend = spelled(problem)
    return lambda: attend(*inputs.operands, inputs.tensors)


def _compiled(backend: str, **given: Any) -> Callable[[Problem, Inputs], Run]:
    def prepare(problem: Problem, inputs: Inputs) -> Run:
        attend = torch.compile(spelled(problem), backend=backend, dynamic=False, **given)
        return lambda: attend(*inputs.operands, inputs.tensors)

    return prepare


def _sites_of(run: Run) -> list[SiteReport]:
    """What the first call compiles."""
    with attngen.record() as reports:
        run()
    return [site for report in reports for site in report.sites]


def _ours(**given: Any) -> Callable[[Problem, Inputs], Run]:
    """The first call says whether our kernel is in it: a time without it would be another compiler's."""

    def prepare(problem: Problem, inputs: Inputs) -> Run:
        run = _compiled("attngen", **given)(problem, inputs)
        sites = _sites_of(run)
        if not sites or any(site.status != "replaced" for site in sites):
            raise NotSpelled("left alone: " + ("; ".join(site.reason for site in sites if site.reason) or "not found"))
        if without := [site.backward for site in sites if inputs.leaves and not site.backward_tiles]:
            raise NotSpelled(f"no kernel of ours for the gradient: {without[0] or 'nobody asks for it'}")
        return run

    return prepare


def _in_eighths(mode: str) -> Callable[[Problem, Inputs], Run]:
    """Ours in products of 8-bit numbers. Operands come in 16 bits: writing them in 8 is part of what is timed."""

    def prepare(problem: Problem, inputs: Inputs) -> Run:
        run = _compiled("attngen", options={"fp8": mode})(problem, inputs)
        sites = _sites_of(run)
        if not sites or any(f"fp8 ({mode})" not in site.computes for site in sites):
            raise NotSpelled("left in 16 bits: " + "; ".join(site.reason or site.computes for site in sites))
        return run

    return prepare


# ----------------------------------------------------------------------------------------------------------------- sdpa


def _sdpa(backend: str = "") -> Callable[[Problem, Inputs], Run]:
    """``F.scaled_dot_product_attention`` by one of its backends, or by the one that it chooses."""

    def prepare(problem: Problem, inputs: Inputs) -> Run:
        if words := [word for word in ("softcap", "sinks", "sigmoid") if getattr(problem, word)]:
            raise NotSpelled(f"no spelling of {', '.join(words)}")
        query, keys, values = heads_first(problem, inputs)
        diagonal = problem.causal and problem.length == problem.keys and features_of(problem) == masks_of(problem)[:1]
        fixed = None if diagonal or inputs.trains else _mask_tensor(problem, inputs)
        grouped, dropped = problem.sources != problem.heads, problem.dropout or 0.0

        def run() -> Tensor:
            mask = _mask_tensor(problem, inputs) if inputs.trains else fixed
            out = torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, dropout_p=dropped, is_causal=diagonal, enable_gqa=grouped
            )
            return out.transpose(1, 2) if problem.views else out

        return _limited(run, backend) if backend else run

    return prepare


def _limited(run: Run, backend: str) -> Run:
    """With one backend allowed; where it refuses, PyTorch's warnings say why, and the error only that it does."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    allowed = getattr(SDPBackend, backend)

    def limited() -> Tensor:
        with sdpa_kernel(allowed):
            return run()

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            limited()
        except RuntimeError as problem:
            if "No available kernel" not in str(problem):
                raise
            reasons = [str(w.message).split(" (Triggered")[0] for w in said if "not used because" not in str(w.message)]
            raise NotSpelled(reasons[0] if reasons else "this backend refuses such operands") from None
    return limited


def heads_first(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The operands as ``[B, H, N, D]``, views where they are stored otherwise."""
    query, keys, values = inputs.operands
    if problem.views:
        return query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    return query, keys, values


def _mask_tensor(problem: Problem, inputs: Inputs) -> Tensor | None:
    """Everything that is done to the scores as one tensor to add, or a boolean one; of any size that broadcasts."""
    device, dtype = inputs.query.device, inputs.query.dtype
    i = torch.arange(problem.length, device=device)[:, None] + problem.offset
    at = Place(i, torch.arange(problem.keys, device=device), slice(0, problem.length), inputs.tensors)
    keeps = [mask.keep(at) for mask in masks_of(problem)]
    kept = torch.stack(torch.broadcast_tensors(*keeps)).all(0) if keeps else None
    adding = [feature for feature in features_of(problem) if feature not in masks_of(problem)]
    if not adding:
        return kept
    if adding == [Bias()]:
        bias = inputs.tensors["bias"]
    else:
        bias = torch.zeros(1, problem.heads, problem.length, problem.keys, device=device, dtype=dtype)
        for feature in adding:
            bias = feature.score(bias, at)
        bias = bias.to(dtype)
    return bias if kept is None else bias.masked_fill(~kept, -torch.inf)


# ----------------------------------------------------------------------------------------------------------------- flex


def _flex(backend: str, mode: str | None = None) -> Callable[[Problem, Inputs], Run]:
    """``flex_attention``, compiled, with the functions and the block mask that the problem needs."""

    def prepare(problem: Problem, inputs: Inputs) -> Run:
        from torch.nn.attention.flex_attention import AuxRequest, flex_attention

        if words := [word for word in ("sigmoid", "dropout") if getattr(problem, word)]:
            raise NotSpelled(f"no spelling of {', '.join(words)}")
        query, keys, values = heads_first(problem, inputs)
        options: dict[str, Any] = {
            "block_mask": _block_mask(problem, inputs),
            "enable_gqa": problem.sources != problem.heads,
            "kernel_options": {"BACKEND": backend},
        }

        def attend(query: Tensor, keys: Tensor, values: Tensor, tensors: Tensors) -> Tensor:
            score_mod, sinks = _score_mod(problem, tensors), tensors.get("sinks")
            if sinks is None:
                out = flex_attention(query, keys, values, score_mod, **options)
            else:  # a sink adds exp(sink) to the sum of each row
                out, aux = flex_attention(query, keys, values, score_mod, return_aux=AuxRequest(lse=True), **options)
                out = (out * torch.sigmoid(aux.lse - sinks[:, None]).unsqueeze(-1)).to(query.dtype)
            return out.transpose(1, 2) if problem.views else out

        compiled = torch.compile(attend, dynamic=False, mode=mode)
        if inputs.trains:  # not inside of ``attend``: what is made there gets no gradient from FlexAttention
            tables = torch.compile(_tables, dynamic=False)
            return lambda: compiled(query, keys, values, {**inputs.tensors, **tables(problem, inputs.tensors)})
        loaded = {**inputs.tensors, **_tables(problem, inputs.tensors)}
        return lambda: compiled(query, keys, values, loaded)

    return prepare


def _tables(problem: Problem, tensors: Tensors) -> Tensors:
    made: Tensors = {}
    for feature in features_of(problem):
        made.update(feature.tables(problem, tensors))
    return made


def _score_mod(problem: Problem, tensors: Tensors) -> Callable[..., Tensor] | None:
    """What each feature does to a score, one after the other."""
    each = [feature.score_mod(problem, tensors) for feature in features_of(problem)]
    mods = [mod for mod in each if mod is not None]
    if not mods:
        return None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        for mod in mods:
            score = mod(score, b, h, i, j)
        return score

    return score_mod


def _block_mask(problem: Problem, inputs: Inputs) -> object:
    from torch.nn.attention.flex_attention import and_masks, create_block_mask

    each = [mask.mask_mod(problem, inputs.tensors) for mask in masks_of(problem)]
    if not each:
        return None
    mask_mod = each[0] if len(each) == 1 else and_masks(*each)
    # Compiled, it does not hold a mask of all pairs; for lengths that may change it took two minutes at 16,384.
    make = torch.compile(create_block_mask, dynamic=False) if inputs.query.is_cuda else create_block_mask
    batch = problem.batch if problem.documents else None
    return make(mask_mod, batch, None, problem.length, problem.keys, device=inputs.query.device)


# ------------------------------------------------------------------------------------------------------------- registry

BOTH = ("cuda", "cpu")
_PORTABLE = {"families": "portable"}
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(OURS, _ours(), 'torch.compile(backend="attngen") of the plain spelling', BOTH),
        Peer("attngen-portable", _ours(options=_PORTABLE), "ours, by kernels in plain Triton alone", BOTH, default=False),
        Peer("attngen-fp8", _in_eighths("block"), 'ours with options={"fp8": "block"}', BOTH, default=False, eighths=True),
        Peer("attngen-fp8-rotate", _in_eighths("rotate"), "the same, rotated", BOTH, default=False, eighths=True),
        Peer("eager", _eager, "the plain spelling as it is", BOTH),
        Peer("inductor", _compiled("inductor"), "torch.compile of the plain spelling", BOTH),
        Peer("sdpa", _sdpa(), "F.scaled_dot_product_attention, by the backend that it chooses", ("cpu",)),
        Peer("sdpa-flash", _sdpa("FLASH_ATTENTION"), "its FlashAttention backend"),
        Peer("sdpa-cudnn", _sdpa("CUDNN_ATTENTION"), "its cuDNN backend"),
        Peer("sdpa-efficient", _sdpa("EFFICIENT_ATTENTION"), "its memory-efficient backend"),
        Peer("flex", _flex("TRITON"), "compiled flex_attention, Triton backend"),
        Peer("flex-tuned", _flex("TRITON", "max-autotune-no-cudagraphs"), "the same with tiles tried out", default=False),
        Peer("flex-flash", _flex("FLASH"), "compiled flex_attention, FLASH backend (needs flash-attn-4)"),
        Peer("fa3", flash.third, "FlashAttention-3 (pip install fa3-fwd)", rows_first=True),
        Peer("fa3-fp8", flash.third_in_eighths, "the same on operands that are in 8 bits", default=False, eighths=True),
        Peer("fa4", flash.fourth, "FlashAttention-4 (pip install --pre flash-attn-4)", rows_first=True),
    )
}
