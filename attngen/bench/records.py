"""What was measured, as records; ``Record`` is what ``--json`` writes. Names of fields are stable: tools read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attngen.bench.problems import Problem
from attngen.bench.terms import FORWARD
from attngen.errors import BadOption, CannotWrite

TIMED, WRONG, FAILED, MISSING, NOT_SPELLED = "timed", "wrong", "failed", "missing", "not spelled"


@dataclass(frozen=True)
class Row:
    """One peer at one problem.

    ``status``    "timed"; "wrong" (over the error budget: no time is given); "failed" (raised or died); "missing" (not
                  installed); "not spelled" (it has no spelling of the problem or refuses it). ``reason`` says more
    ``ms``        median of a call; a quarter of the calls took less than ``ms_low``, a quarter more than ``ms_high``
    ``tflops``    of the products (two forward, five for the gradients) over the pairs that count; ``of_product`` and
                  ``of_copy`` are shares of the ceilings
    ``error``     largest difference from float64, and ``budget`` what it may be; ``rms`` and ``rms_budget`` likewise.
                  Of several results, those of the one that is nearest to its budget
    ``first_s``   seconds of preparing and of the first call, compilation included
    ``peak_bytes`` allocated during a call beyond what stood before
    ``kernel``    of ours: family and tiles of what was timed
    """

    peer: str
    status: str
    reason: str = ""
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    tflops: float | None = None
    of_product: float | None = None
    of_copy: float | None = None
    error: float | None = None
    budget: float | None = None
    rms: float | None = None
    rms_budget: float | None = None
    first_s: float | None = None
    peak_bytes: int | None = None
    kernel: str = ""


@dataclass(frozen=True)
class Result:
    """All peers at one problem. ``pairs`` of query and key count; ``bytes``: inputs, result and, but for ``phase``
    "forward", the gradient of each, once. Records from before there were phases are of the forward."""

    problem: Problem
    pairs: int
    flop: int
    bytes: int
    rounds: int
    rows: tuple[Row, ...]
    phase: str = FORWARD


@dataclass(frozen=True)
class Record:
    """One run. ``ceilings`` by dtype: {"product": FLOP/s, "copy": bytes/s}, measured in the same run."""

    device: str
    versions: dict[str, str]
    ceilings: dict[str, dict[str, float]]
    results: tuple[Result, ...] = field(default=())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def written(record: Record, path: Path) -> None:
    """Write ``record``. Raises ``CannotWrite``."""
    try:
        path.write_text(record.to_json())
    except OSError as problem:
        raise CannotWrite(f"cannot write {path}: {problem.strerror}") from None


def read(paths: Sequence[Path]) -> list[Record]:
    """Records of earlier runs. Raises ``BadOption`` for a file that is none."""
    return [_read(path) for path in paths]


def _read(path: Path) -> Record:
    try:
        return _record(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise BadOption(f"{path} is no record of attngen bench: {problem}") from None


def _record(values: dict[str, Any]) -> Record:
    results = tuple(
        Result(**{**each, "problem": Problem(**each["problem"]), "rows": tuple(Row(**row) for row in each["rows"])})
        for each in values["results"]
    )
    return Record(values["device"], values["versions"], values["ceilings"], results)
