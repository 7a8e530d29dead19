"""What attngen did to a model, and why: a record per site, as text for people and JSON for tools.

Field names of ``SiteReport`` are stable; tools read them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

_WHERE = re.compile(r"(?P<path>.*) \((?P<line>[^()]*:\d+)\)|(?P<alone>[^ ]*:\d+)")


@dataclass(frozen=True)
class Candidate:
    """A tile that could run, and what was predicted for it.

    ``parts_ms``     milliseconds of its parts: each resource is busy at the same time as the others ("products",
                     "exponentials", "arithmetic", "loads"), the rest adds to the busiest ("waiting", "shares", "launch")
    ``lost``         what it takes longer for than the tile that was chosen; empty for that one
    ``measured_ms``  of one call, where somebody measured it
    """

    tile: str
    predicted_ms: float
    parts_ms: dict[str, float]
    lost: str = ""
    measured_ms: float | None = None


@dataclass(frozen=True)
class SiteReport:
    """One place in the model that computes attention, or looks like it.

    ``where``         module path and source line; ``module``, ``file`` and ``line`` are its parts, the file in full
    ``status``        "replaced", "found" (by ``explain``, which changes nothing) or "missed"
    ``reason``        why it was missed; empty otherwise
    ``node``          the ATen node that computes it; of a miss, the one that the reason is about
    ``blamed``        where that node of a miss was written: {"file": ..., "line": ..., "code": ...}
    ``advice``        what would let it be replaced, where the user can do something
    ``computes``      the expression, readable
    ``loads``         where each tensor comes from that the expression loads: {"t0": "relative_bias.weight"}
    ``family``        template family of the kernel
    ``tile``          queries x keys per block, warps, stages
    ``behind``        what is launched behind the kernel, and what for; empty if nothing is
    ``predicted_ms``  of one call, by the cost model
    ``backward``      where gradients are asked for: the tiles of their kernels, or why they are computed block by block
    ``backward_ms``   of the gradients of one call, by the cost model
    ``backward_tiles`` their tiles as plan files hold them
    ``source``        where the choice of the tile comes from: "model", "plan", "cache" (tuned here), "shipped" (tuned for
                      this device by us) or "tuned" (just now); ``backward_source`` where that of the gradients does
    ``measured_ms``   of one call, where it was tuned; ``backward_measured_ms`` of its gradients
    ``hbm_bytes``     bytes moved to and from device memory by one call, {"before": ..., "after": ...}
    ``error``         largest difference from float64, where verified; ``budget`` is what was allowed
    ``kernel``        name of the generated module
    ``sizes``         of one call: batch extents, query rows, keys
    ``compiled``      what the ahead-of-time compiler made of the kernel: arch, registers, spills, shared memory
    ``formula``       the cost formula with numbers, line by line
    ``refused``       tiles that cannot run, or cannot run well, and why
    ``candidates``    the tile that was chosen, and the best of the others
    """

    where: str
    status: str
    reason: str = ""
    module: str = ""
    file: str = ""
    line: int = 0
    node: str = ""
    blamed: dict[str, Any] | None = None
    advice: str = ""
    computes: str = ""
    loads: dict[str, str] = field(default_factory=dict)
    family: str = ""
    tile: str = ""
    behind: str = ""
    predicted_ms: float | None = None
    backward: str = ""
    backward_ms: float | None = None
    backward_tiles: tuple[dict[str, Any], ...] = ()
    source: str = ""
    backward_source: str = ""
    measured_ms: float | None = None
    backward_measured_ms: float | None = None
    hbm_bytes: dict[str, int] | None = None
    error: float | None = None
    budget: float | None = None
    kernel: str = ""
    operator: str = ""
    sizes: dict[str, Any] | None = None
    compiled: dict[str, Any] | None = None
    formula: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Report:
    """Every site of a graph, or of all graphs of a model. ``device`` is what was planned for.

    ``partial``: some of the model was not looked at; a note says why.
    """

    device: str
    sites: tuple[SiteReport, ...]
    notes: tuple[str, ...] = ()
    partial: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def replaced(self) -> tuple[SiteReport, ...]:
        return tuple(site for site in self.sites if site.status in ("replaced", "found"))

    @property
    def missed(self) -> tuple[SiteReport, ...]:
        return tuple(site for site in self.sites if site.status == "missed")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        can_be = "can be " * all(site.status != "replaced" for site in self.sites)
        sites = f"{len(self.sites)} site{'s' * (len(self.sites) != 1)}"
        lines = [f"{len(self.replaced)} of {sites} {can_be}replaced, for {self.device}"]
        for each in groups(self.sites):
            site, many = each.first, f" ({len(each.sites)} sites)" if len(each.sites) > 1 else ""
            where = f"{each.path} ({each.line})" if each.path and each.line else each.path or each.line
            if site.status == "missed":
                lines.append(f"  {where}  MISSED  {site.reason}{many}")
            else:
                time = "" if site.predicted_ms is None else f"  {site.predicted_ms:.3f} ms"
                lines.append(f"  {where}  {site.status}  {site.computes}  tile {site.tile}{time}{many}")
        return "\n".join([*lines, *self.notes])


def merge(reports: list[Report]) -> Report:
    """One report over the graphs of a model, in order."""
    seconds: dict[str, float] = {}
    for report in reports:
        for stage, spent in report.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    sites = tuple(site for report in reports for site in report.sites)
    notes = tuple(dict.fromkeys(note for report in reports for note in report.notes))
    device = next((report.device for report in reports if report.device), "")
    return Report(device, sites, notes, any(report.partial for report in reports), seconds)


_LISTENERS: list[list[Report]] = []


@contextmanager
def record() -> Iterator[list[Report]]:
    """Collects the ``Report`` of every graph compiled inside the block."""
    reports: list[Report] = []
    _LISTENERS.append(reports)
    try:
        yield reports
    finally:
        _LISTENERS[:] = [kept for kept in _LISTENERS if kept is not reports]


def publish(report: Report) -> None:
    for listener in _LISTENERS:
        listener.append(report)


# --------------------------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True)
class Same:
    """Sites that differ in nothing but the layer they are in. ``path`` covers all: ``layers.0-11.self_attn``."""

    path: str
    line: str
    sites: tuple[SiteReport, ...]

    @property
    def first(self) -> SiteReport:
        return self.sites[0]


def groups(sites: Sequence[SiteReport]) -> list[Same]:
    """Sites by what they are, in the order of the model."""
    members: dict[tuple[object, ...], list[tuple[str, SiteReport]]] = {}
    lines: dict[tuple[object, ...], str] = {}
    for site in sites:
        path, line = _split(site.where)
        pattern = re.sub(r"\d+", "0", path)
        key = (pattern, line, site.status, unnumbered(site.reason), site.computes, site.tile, site.kernel, site.error)
        members.setdefault(key, []).append((path, site))
        lines[key] = line
    return [
        Same(joined([path for path, _ in each]), lines[key], tuple(site for _, site in each)) for key, each in members.items()
    ]


def unnumbered(reason: str) -> str:
    """A reason as it reads for every layer: nodes lose their numbers (``mul_7`` is ``mul``)."""
    return re.sub(r"(?<=[a-z])(_?)_\d+\b", r"\1", reason)


def _split(where: str) -> tuple[str, str]:
    """Module path and source line, each possibly empty."""
    matched = _WHERE.fullmatch(where)
    if matched is None:
        return where, ""
    return matched["path"] or "", matched["line"] or matched["alone"]


def joined(paths: Sequence[str]) -> str:
    """One path for several that differ in whole numbers: ``layers.0-3,6.attn``."""
    parts = []
    for column in zip(*(path.split(".") for path in paths), strict=True):
        distinct = list(dict.fromkeys(column))
        numbers = all(part.isdigit() for part in distinct)
        parts.append(_ranges([int(part) for part in distinct]) if numbers else "|".join(distinct))
    return ".".join(parts)


def _ranges(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{first},{numbers[1]}..{last}"
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and number == pieces[-1][-1] + 1:
            pieces[-1].append(number)
        else:
            pieces.append([number])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in pieces)
