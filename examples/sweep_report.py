"""How good the cost model's choices are, by the sweep's data: without measuring, and with the first few of its ranking
measured.

A pick is rated by the time of the fastest configuration over its own: 1 is right. Of what the chooser ranks, only
configurations that were measured take part. Predicted times are held against measured ones of a usual hour (``sweep_store``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sweep_problems import SITES, Site
from sweep_space import Configuration, added_up, flex, label, ranked
from sweep_store import Store

from attngen import choose_bwd, decide
from attngen.device import DEVICES, Device
from attngen.errors import AttngenError
from attngen.spec import PORTABLE

FEW, SEVERAL = 4, 8  # of the ranking, measured
TAIL = 0.1  # the share of sites that the tenth percentile leaves below it
WORST = 10  # sites that are listed
TIMES = 5  # that each choice is made, to see how long that takes
PHASES = ("forward", "decode", "backward")
TITLES = {"fit": "fitted to", "held out": "held out", "second": "other programs"}


@dataclass(frozen=True)
class Rating:
    """One site. ``pick``, ``few`` and ``several``: the fastest of the first, first 4 and first 8, rated. ``errors``: of
    predicted times, the pick's first. ``flex`` rates FlexAttention's default; ``over_flex`` is its time over that of the best
    portable configuration as the model has it: below 1, it is the better choice.
    """

    site: Site
    chosen: Configuration
    fastest: Configuration
    pick: float
    few: float
    several: float
    errors: tuple[float, ...]
    flex: float | None
    over_flex: float | None


def rating(site: Site, microseconds: Mapping[str, float], predicted: Mapping[Configuration, float]) -> Rating | None:
    """``predicted``: seconds of what the chooser ranks, best first. None where nothing of it was measured."""
    by_label = {label(tiles): tiles for tiles in (flex(site), *predicted)}
    times = added_up({by_label[name]: t for name, t in microseconds.items() if name in by_label})
    order = [tiles for tiles in predicted if tiles in times]
    if not order:
        return None
    fastest = min(times, key=lambda tiles: times[tiles])
    pick, few, several = (times[fastest] / min(times[tiles] for tiles in order[:count]) for count in (1, FEW, SEVERAL))
    errors = tuple(abs(1e6 * predicted[tiles] / times[tiles] - 1) for tiles in order)
    default = times.get(flex(site))
    ours = next((times[tiles] for tiles in order if tiles[0].family == PORTABLE), None)
    over = None if default is None or ours is None else default / ours
    return Rating(site, order[0], fastest, pick, few, several, errors, default and times[fastest] / default, over)


def ratings(store: Store) -> list[Rating]:
    """Of every site of the store that is still one of the sweep's. Raises ``AttngenError`` for a GPU that is not known."""
    device = device_of(store)
    found = [(SITES[name], store.scaled(name)) for name in store.sites if name in SITES]
    rated = (rating(site, times, ranked(site, device)) for site, times in found)
    return [each for each in rated if each is not None]


def device_of(store: Store) -> Device:
    for device in DEVICES.values():
        if device.label == store.device:
            return device
    raise AttngenError(f"nothing is known of the {store.device}")


# ---------------------------------------------------------------------------------------------------------------- tables

COLUMNS = (
    "sites",
    "",
    "",
    "pick",
    "10th percentile",
    "worst",
    "best of 4",
    "best of 8",
    "error",
    "of picks",
    "FlexAttention",
)


def table(rated: Sequence[Rating], of: Callable[[Rating], str] = lambda each: each.site.half) -> list[str]:
    """A line for each phase of each part, as ``of`` has it, in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for part in dict.fromkeys([*TITLES, *map(of, rated)]):
        members = [each for each in rated if of(each) == part]
        phases = [phase for phase in PHASES if any(each.site.phase == phase for each in members)]
        for phase in phases:
            lines.append(_line(TITLES.get(part, part), phase, [each for each in members if each.site.phase == phase]))
        if len(phases) > 1:
            lines.append(_line(TITLES.get(part, part), "all", members))
    return lines


def _line(part: str, phase: str, rated: Sequence[Rating]) -> str:
    picks = [each.pick for each in rated]
    errors = [error for each in rated for error in each.errors]
    shown = (
        _percent(_mean(picks)),
        _percent(float(np.quantile(picks, TAIL))),
        _percent(min(picks)),
        _percent(_mean(each.few for each in rated)),
        _percent(_mean(each.several for each in rated)),
        _percent(statistics.median(errors)),
        _percent(statistics.median(each.errors[0] for each in rated)),
        _default(rated),
    )
    return f"| {part} | {phase} | {len(rated)} | {' | '.join(shown)} |"


def _default(rated: Sequence[Rating]) -> str:
    """How good FlexAttention's defaults are, and how often the model does worse within the portable family."""
    flexed = [each.flex for each in rated if each.flex]
    worse = sum(each.over_flex is not None and each.over_flex < 1 for each in rated)
    return f"{_percent(_mean(flexed))}, {worse} of {len(flexed)} better" if flexed else "-"


def _mean(ratios: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(ratios)))))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


NOTE = (
    "Time of the fastest of all configurations over that of the model's pick (geometric mean, tenth percentile, worst), "
    "and over the best of the first 4 and 8 of its ranking; median absolute error of predicted times, of all configurations "
    "and of picks; the same ratio for FlexAttention's default tile in these kernels, and at how many sites it beats the "
    "model's best portable one."
)


def lines(store: Store) -> list[str]:
    """The table, and below it the sites with the worst picks."""
    rated = ratings(store)
    if not rated:
        return ["No site has been measured."]
    measured = sum(len(timed.microseconds) for timed in store.sites.values())
    failed = sum(len(timed.failed) for timed in store.sites.values())
    head = f"{store.device}, {', '.join(f'{name} {version}' for name, version in store.versions.items())}: "
    counted = f"{len(store.sites)} of {len(SITES)} sites, {measured} configurations timed, {failed} failed."
    return [*table(rated), "", NOTE, "", head + counted, "", *worst(rated), "", *failures(store)]


def worst(rated: Sequence[Rating]) -> list[str]:
    lowest = sorted(rated, key=lambda each: each.pick)[:WORST]
    rows = (f"{_percent(x.pick):>7s}  {x.site.name}: {label(x.chosen)}; fastest {label(x.fastest)}" for x in lowest)
    return ["The worst picks:", *rows]


def failures(store: Store) -> list[str]:
    """Why configurations have no time, most frequent first."""
    counts: dict[str, int] = {}
    for timed in store.sites.values():
        for reason in timed.failed.values():
            counts[reason] = counts.get(reason, 0) + 1
    return [f"{count} failed: {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1])]


def choosing(sites: Sequence[Site], device: Device) -> str:
    """How long the choice takes for a site of new sizes, here and now: the shortest of a few times."""
    taken = [1e3 * min(_choosing(site, device) for _ in range(TIMES)) for site in sites]
    return f"Choosing takes {statistics.median(taken):.1f} ms a site here (median), {max(taken):.1f} at most."


def _choosing(site: Site, device: Device) -> float:
    wanted = site.wanted(device)
    for known in (choose_bwd.choose_backward, choose_bwd._ranked, decide.chosen):
        known.cache_clear()
    began = time.perf_counter()
    if site.phase == "backward":
        choose_bwd.choose_backward(wanted.spec, wanted.problem, device)
    else:
        decide.chosen(wanted.spec, wanted.problem, device, None, decide.misaligned(wanted.spec, wanted.inputs))
    return time.perf_counter() - began
