"""Which tiles are worth measuring: the fastest few of each family as the cost model has it, its own pick first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attngen import choose_bwd, decide
from attngen.cache.key import FORWARD, Wanted
from attngen.errors import Miss
from attngen.spec import HOPPER, PORTABLE, Tile

Effort = Literal["quick", "full"]


@dataclass(frozen=True)
class Extent:
    """How many candidates of each family, and how many calls of each count."""

    candidates: int
    rounds: int


EXTENTS: dict[Effort, Extent] = {"quick": Extent(4, 15), "full": Extent(16, 40)}


def candidates(wanted: Wanted, count: int) -> tuple[tuple[Tile, ...], ...]:
    """None where no kernel can compute it."""
    about = (wanted.spec, wanted.problem, wanted.device)
    if wanted.phase != FORWARD:
        able = choose_bwd.candidates(*about, count, deterministic=wanted.deterministic)
        plans = sorted(able, key=lambda plan: plan.seconds)
        return tuple(plan.tiles for plan in plans)
    plan = decide.chosen(*about, None, decide.misaligned(wanted.spec, wanted.inputs))
    if isinstance(plan, Miss):
        return ()
    ranked = [tile for tile, _ in plan.ranked]
    few = {tile for family in (PORTABLE, HOPPER) for tile in [t for t in ranked if t.family == family][:count]}
    return tuple((tile,) for tile in ranked if tile in few)
