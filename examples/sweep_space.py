"""The configurations that the sweep measures of a site: a declared part, at most 64 of each family, of what the chooser
ranks.

Forward and decode, portable: 32 to 128 keys, 2 or 3 stages, 4 with at most 32 queries, whose loads are longest; 8 warps where
a tile is 64 x 64 or larger; 16 queries where 64 would leave multiprocessors idle, 16 keys in fp32 alone. Hopper: 2 or 3
stages. Backward, portable: for each of both kernels 32 to 128 rows and steps, 2 or 3 stages, 8 warps where a tile is 64 x 128
or larger. Times of both kernels add up: measured is every tile of one beside the same tile of the other, FlexAttention's if
it can run, and the pairs that the model ranks first. FlexAttention's own tile is always among those of a forward, and in a
backward those of the hopper family.
"""

from __future__ import annotations

import torch
from sweep_problems import Site

from attngen import choose_bwd, decide
from attngen.device import Device
from attngen.errors import Miss
from attngen.spec import HOPPER, PORTABLE, Tile

MOST = 64  # configurations of a family
FIRST = 8  # pairs that a model ranks first
ALL = 1 << 20  # pairs
FILLED = 4  # tiles of 64 queries for each multiprocessor, from which smaller ones gain nothing

Configuration = tuple[Tile, ...]

# FlexAttention's defaults for compute capability 9.0 without max-autotune: queries, keys, warps, stages by the bytes of an
# element and head size (torch 2.11 and 2.13, torch/_inductor/template_heuristics/triton.py: h100_default_flex_config and
# get_flex_attn_fwd_configs; config_map of get_flex_attn_bwd_configs; get_flex_decode_configs, whose two warps are four here).
_FLEX_FORWARD = {
    (2, 64): Tile(128, 128, 4, 3),
    (2, 128): Tile(128, 64, 8, 3),
    (2, 256): Tile(64, 32, 4, 3),
    (4, 64): Tile(128, 32, 4, 3),
    (4, 128): Tile(32, 64, 4, 3),
    (4, 192): Tile(32, 64, 8, 1),
    (4, 256): Tile(32, 32, 4, 3),
}
_FLEX_OTHERWISE = Tile(64, 64, 4, 3)
_FLEX_DECODE = Tile(16, 64, 4, 1)
_FLEX_BACKWARD = {  # by bytes of an element and whether heads are larger than 128: which queries are held, which keys
    (2, False): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
    (2, True): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (4, False): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    (4, True): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}


def flex(site: Site) -> Configuration:
    """What FlexAttention would take without looking at anything but type and head size."""
    size, width = site.spec.head_dim, site.spec.query.dtype.itemsize
    if site.phase == "backward":
        return _FLEX_BACKWARD[width, size > 128]
    return (_FLEX_DECODE if site.phase == "decode" else _FLEX_FORWARD.get((width, size), _FLEX_OTHERWISE),)


def label(configuration: Configuration) -> str:
    """As the data has it."""
    return ", ".join(map(str, configuration))


def ranked(site: Site, device: Device) -> dict[Configuration, float]:
    """What the chooser ranks, best first, and what it predicts in seconds."""
    if site.phase == "backward":
        plans = sorted(choose_bwd.candidates(site.spec, site.problem, device, ALL), key=lambda plan: plan.seconds)
        return {plan.tiles: plan.seconds for plan in plans}
    wanted = site.wanted(device)
    misaligned = decide.misaligned(wanted.spec, wanted.inputs)
    plan = decide.chosen(wanted.spec, wanted.problem, device, None, misaligned)
    return {} if isinstance(plan, Miss) else {(tile,): seconds for tile, seconds in plan.ranked}


def space(site: Site, device: Device) -> list[Configuration]:
    """The declared configurations that can run."""
    if site.phase == "backward":
        return _pairs(site, device)
    rows = site.problem.rows
    few = rows < 64 or site.problem.heads * -(-rows // 64) < FILLED * device.sms
    exact = site.spec.query.dtype == torch.float32
    chosen = [tile for (tile,) in ranked(site, device) if _declared(tile, few, exact)]
    families = [[t for t in chosen if t.family == family][:MOST] for family in (PORTABLE, HOPPER)]
    return list(dict.fromkeys([*((tile,) for tiles in families for tile in tiles), flex(site)]))


def _declared(tile: Tile, few: bool, exact: bool) -> bool:
    if tile.family != PORTABLE:
        return tile.stages <= 3
    if (tile.rows == 16 and not (few or exact)) or (tile.keys == 16 and not exact):
        return False
    deep = 4 if tile.rows <= 32 else 3
    return 2 <= tile.stages <= deep and (tile.warps == 4 or tile.rows * tile.keys >= 64 * 64)


def _pairs(site: Site, device: Device) -> list[Configuration]:
    able = list(ranked(site, device))
    alone = [tiles for tiles in able if len(tiles) == 1]
    pairs = [tiles for tiles in able if len(tiles) == 2 and all(map(_declared_backward, tiles))]
    if not pairs:
        return alone
    queries, keys = flex(site) if flex(site) in pairs else pairs[0]
    star = [pair for pair in pairs if pair[0] == queries or pair[1] == keys]
    return [*alone, *dict.fromkeys([*star, *pairs[:FIRST]])]


def _declared_backward(tile: Tile) -> bool:
    large = tile.rows * tile.keys >= 64 * 128
    return min(tile.rows, tile.keys) >= 32 and 2 <= tile.stages <= 3 and (tile.warps == 4 or large)


def added_up(measured: dict[Configuration, float]) -> dict[Configuration, float]:
    """Times of all pairs whose halves were measured beside the same ones, and of what else was measured."""
    pairs = {each: time for each, time in measured.items() if len(each) == 2}
    found = dict(measured)
    if (centre := _centre(pairs)) is None:
        return found
    queries, keys = centre
    held = {pair[0]: time for pair, time in pairs.items() if pair[1] == keys}
    stepped = {pair[1]: time for pair, time in pairs.items() if pair[0] == queries}
    for one, first in held.items():
        for other, second in stepped.items():
            found.setdefault((one, other), first + second - pairs[centre])
    return found


def _centre(pairs: dict[Configuration, float]) -> Configuration | None:
    """The pair whose tiles were measured beside most others."""

    def beside(pair: Configuration) -> int:
        return sum(other[0] == pair[0] or other[1] == pair[1] for other in pairs)

    return max(pairs, key=beside, default=None)
