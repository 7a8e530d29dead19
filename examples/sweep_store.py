"""The sweep's data: microseconds of each configuration of each site, and what became of those that have none.

A file is of one kind of GPU. Configurations are written once, and sites name them by number; each site has a line, and beside
its times that of the reference in the same batch, which puts machines and hours on one scale.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DIGITS = 4  # of a time, that say something


@dataclass(frozen=True)
class Timed:
    """What came of one site: microseconds and reasons by configuration, and microseconds of the reference."""

    reference: float
    microseconds: dict[str, float]
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class Store:
    """``device`` is the label of the GPU. ``save`` writes all of it, or nothing."""

    device: str
    versions: dict[str, str] = field(default_factory=dict)
    sites: dict[str, Timed] = field(default_factory=dict)

    @property
    def usual(self) -> float:
        """Microseconds that the reference takes in most batches."""
        return statistics.median(timed.reference for timed in self.sites.values())

    def scaled(self, name: str) -> dict[str, float]:
        """Microseconds of a site as they would be where the reference takes as long as usual."""
        timed = self.sites[name]
        return {each: time * self.usual / timed.reference for each, time in timed.microseconds.items()}

    @classmethod
    def load(cls, path: Path) -> Store:
        return cls.of(json.loads(path.read_text()))

    @classmethod
    def of(cls, data: dict[str, Any]) -> Store:
        """What a file holds."""
        labels: list[str] = data["configurations"]
        return cls(data["device"], data["versions"], {name: _read(labels, row) for name, row in data["sites"].items()})

    def save(self, path: Path) -> None:
        used = {label: None for timed in self.sites.values() for label in (*timed.microseconds, *timed.failed)}
        numbers = {label: number for number, label in enumerate(sorted(used))}
        head = {"device": self.device, "versions": self.versions, "unit": "us", "configurations": list(numbers)}
        lines = [f" {json.dumps(name)}: {json.dumps(_written(numbers, timed))}" for name, timed in sorted(self.sites.items())]
        text = json.dumps(head)[:-1] + ', "sites": {\n' + ",\n".join(lines) + "\n}}\n"
        beside = path.with_suffix(".part")
        beside.write_text(text)
        os.replace(beside, path)


def _read(labels: list[str], row: dict[str, Any]) -> Timed:
    times = {labels[number]: time for number, time in zip(row["which"], row["us"], strict=True)}
    failed = {labels[number]: reason for reason, numbers in row.get("failed", {}).items() for number in numbers}
    return Timed(row["reference"], times, failed)


def _written(numbers: dict[str, int], timed: Timed) -> dict[str, Any]:
    """By number; failures by what they have in common."""
    order = sorted(timed.microseconds, key=numbers.__getitem__)
    row = {
        "reference": _rounded(timed.reference),
        "which": [numbers[label] for label in order],
        "us": [_rounded(timed.microseconds[label]) for label in order],
    }
    failed: dict[str, list[int]] = {}
    for label, reason in timed.failed.items():
        failed.setdefault(reason, []).append(numbers[label])
    return {**row, "failed": failed} if failed else row


def _rounded(time: float) -> float:
    return float(f"{time:.{DIGITS}g}")
