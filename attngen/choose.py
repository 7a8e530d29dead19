"""The tile of a kernel: candidates that cannot run are refused with a reason, the rest ranked by the cost model.

Tiles of both template families compete. The hopper family takes part where the device has warpgroups that multiply, the
template can express the spec, and TMA can address the operands; if not, one refusal says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from attngen import boxes, fp8, hopper, lost
from attngen.cost import Cost, costs
from attngen.device import Device
from attngen.errors import Miss
from attngen.portable import MIN_DOT
from attngen.spec import HOPPER, PORTABLE, AttentionSpec, Problem, Tile

MAX_HEAD = 512
_SPILLS = "the rest would spill"
_ALONE = "leaves rows to a portable kernel, and there is none"

# What the portable forward template is tried at. Blocks of 16 keys only where there are few rows: such products starve
# tensor cores, but fp32 without them needs small ones.
TILES = tuple(
    Tile(rows, keys, warps, stages)
    for rows, keys, warps, stages in product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4))
    if keys >= 32 or rows <= 32
)
HOPPER_TILES = tuple(
    Tile(boxes.WARPGROUP_ROWS * groups, keys, 4 * groups, stages, HOPPER, persistent)
    for groups, keys, stages, persistent in product((2, 3), (64, 128), (2, 3, 4), (False, True))
)


@dataclass(frozen=True)
class Refusal:
    tile: Tile
    reason: str


@dataclass(frozen=True)
class Plan:
    """A choice and how it was made. ``ranked`` holds the tiles that can run with their predicted seconds, best first;
    ``source`` is "model", or "file" for a tile that was given."""

    spec: AttentionSpec
    problem: Problem
    device: str
    tile: Tile
    cost: Cost
    refused: tuple[Refusal, ...]
    ranked: tuple[tuple[Tile, float], ...]
    source: str = "model"


def choose(
    spec: AttentionSpec, problem: Problem, device: Device, tile: Tile | None = None, misaligned: str | None = None
) -> Plan | Miss:
    """The plan for one site, or why there is none. A given ``tile`` is taken if it can run on ``device``.

    ``misaligned`` says why TMA cannot address the site's operands, if so.
    """
    if (widest := max(spec.head_dim, spec.value_dim)) > MAX_HEAD:
        return Miss(f"the head size {widest} is over the limit of {MAX_HEAD}")
    outright = hopper.unsuited(spec) or misaligned
    portable = () if spec.fp8 else TILES
    candidates = (*portable, *HOPPER_TILES) if device.hopper and not outright else portable
    if spec.fp8 and not candidates:
        return Miss(outright or _without_hopper(device))
    if tile is not None and tile not in candidates and (not spec.fp8 if tile.family == PORTABLE else not outright):
        candidates = (*candidates, tile)
    predicted = dict(zip(candidates, costs(spec, problem, device, candidates), strict=True))
    features = boxes.results(spec)[0].width

    def refuse(tile: Tile, cost: Cost) -> str | None:
        return refusal(tile, cost, problem, device) or fp8.inexact(spec, tile, features, problem.keys)

    refused = tuple(Refusal(t, reason) for t, c in predicted.items() if (reason := refuse(t, c)))
    if lost.floor(spec) is not None and {t for t in candidates if t.family == PORTABLE} <= {each.tile for each in refused}:
        refused = tuple(Refusal(t, reason) for t, c in predicted.items() if (reason := refuse(t, c) or _ALONE))
    if len(refused) == len(candidates) and (least := _least_spilling(refused, predicted)) is not None:
        refused = tuple(each for each in refused if each is not least)
    ranked = _ranked(predicted, {r.tile for r in refused})
    if outright and device.hopper:
        refused += (Refusal(HOPPER_TILES[0], f"and the like: {outright}"),)
    if not ranked:
        return Miss(f"no tile fits {device.label}: {refused[0].tile} {refused[0].reason}")
    given = tile is not None and any(t == tile for t, _ in ranked)
    best = tile if given and tile is not None else ranked[0][0]
    return Plan(spec, problem, device.name, best, predicted[best], refused, ranked, source="file" if given else "model")


def refusal(tile: Tile, cost: Cost, problem: Problem, device: Device) -> str | None:
    """Why a kernel with that tile cannot run, or cannot run well, if so."""
    if tile.family == HOPPER and not device.hopper:
        return _without_hopper(device)
    if tile.family == HOPPER and tile not in HOPPER_TILES:
        return "is none of the tiles that the hopper family is made for"
    if cost.smem_bytes > device.smem_block:
        return f"needs {_kib(cost.smem_bytes)} of shared memory; {device.label} has {_kib(device.smem_block)} for a block"
    limit, given = (hopper.registers(tile),) * 2 if tile.family == HOPPER else (cost.limit, 255)
    if cost.registers > limit:
        return f"needs about {cost.registers} registers per thread; there are {given}, {_SPILLS}"
    if tile.rows > MIN_DOT and tile.rows >= 2 * problem.rows and not problem.dynamic:
        return f"at least half of its rows would be empty with queries of length {problem.rows}"
    return None


def _without_hopper(device: Device) -> str:
    return "only portable kernels are asked for" if device.wgmma else f"{device.label} has no warpgroups that multiply"


def _least_spilling(refused: tuple[Refusal, ...], predicted: dict[Tile, Cost]) -> Refusal | None:
    """Where every tile lacks registers, the one that lacks fewest: a few that spill cost less than scores in memory."""
    spilling = [each for each in refused if _SPILLS in each.reason and each.tile.family == PORTABLE]
    return min(spilling, key=lambda each: predicted[each.tile].registers, default=None)


def _kib(count: int) -> str:
    return f"{count / 1024:.0f} KiB"


def _ranked(predicted: dict[Tile, Cost], refused: set[Tile]) -> tuple[tuple[Tile, float], ...]:
    """By time; where that is equal the smaller tile, which leaves more room."""
    able = [(t, c) for t, c in predicted.items() if t not in refused]
    able.sort(key=lambda pair: (pair[1].seconds, pair[1].smem_bytes, _fields(pair[0])))
    return tuple((t, c.seconds) for t, c in able)


def _fields(tile: Tile) -> tuple[object, ...]:
    return tile.family, tile.rows, tile.keys, tile.warps, tile.stages, tile.persistent
