"""The tiles that a choice was between: the one taken, the next best, and what each of these would take longer for."""

from __future__ import annotations

from dataclasses import replace

from attngen.choose import Plan
from attngen.cost import Cost, costs
from attngen.device import Device
from attngen.report import Candidate

MOST = 8  # that a report keeps
SAME = 1.0005  # times that differ by less are one
WORDS = {
    "products": "products",
    "exponentials": "exponentials",
    "arithmetic": "other arithmetic",
    "loads": "loads",
    "waiting": "latency that nothing hides",
    "shares": "starts and uneven shares",
    "launch": "the launch",
}
BUSY = ("products", "exponentials", "arithmetic", "loads")  # resources that work at the same time


def of(plan: Plan, device: Device) -> tuple[Candidate, ...]:
    """The chosen tile first, then the others by time; the best of each family is among them."""
    others = [tile for tile, _ in plan.ranked if tile != plan.tile]
    firsts = {tile.family: tile for tile in reversed(others)}
    tiles = list(dict.fromkeys([plan.tile, *others[: MOST - len(firsts)], *firsts.values()]))
    predicted = zip(tiles, costs(plan.spec, plan.problem, device, tiles), strict=True)
    chosen, *rest = (_candidate(str(tile), cost) for tile, cost in predicted)
    rest.sort(key=lambda each: each.predicted_ms)
    return chosen, *(replace(each, lost=_lost(each, chosen)) for each in rest)


def _candidate(tile: str, cost: Cost) -> Candidate:
    parts = cost.parts
    busy = dict(zip(BUSY, (parts.mma, parts.exp, parts.alu, parts.load), strict=True))
    # Beside the busiest resource: starts and shares, where traffic does not cover them; the rest is steps that wait.
    rest = max(0.0, cost.seconds - parts.launch - max(busy.values()))
    shares = min(rest, parts.waves)
    found = {**busy, "waiting": rest - shares, "shares": shares, "launch": parts.launch}
    return Candidate(tile, cost.seconds * 1e3, {name: seconds * 1e3 for name, seconds in found.items()})


def _lost(other: Candidate, chosen: Candidate) -> str:
    """What most of the difference is made of."""
    if other.predicted_ms < chosen.predicted_ms:
        return "predicted to be faster"
    if other.predicted_ms <= chosen.predicted_ms * SAME:
        return "as fast, and no smaller"
    busiest, before = (max(BUSY, key=lambda name: each.parts_ms[name]) for each in (other, chosen))
    pairs = {name: (other.parts_ms[name], chosen.parts_ms[name]) for name in ("waiting", "shares", "launch")}
    pairs[busiest] = other.parts_ms[busiest], chosen.parts_ms[before]
    most = max(pairs, key=lambda name: pairs[name][0] - pairs[name][1])
    longer, shorter = map(_time, pairs[most])
    return f"{'busiest with ' * (most == busiest)}{WORDS[most]}: {longer} in place of {shorter}"


def _time(milliseconds: float) -> str:
    return f"{1e3 * milliseconds:.3g} us"
