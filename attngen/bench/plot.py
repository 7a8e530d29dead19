"""Records as a picture: TFLOP/s of every peer at every problem, under the rate that a large product reaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attngen.bench.peers import PEERS
from attngen.bench.records import TIMED, Record, Result
from attngen.bench.report import TITLES
from attngen.bench.terms import FORWARD
from attngen.errors import CannotWrite, Unavailable

PER_ROW = 6  # problems side by side
ROW_INCHES, WIDTH_INCHES = 3.2, 14.0


def require() -> Any:
    """matplotlib, without a display. Raises ``Unavailable`` where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise Unavailable("--plot needs matplotlib: pip install 'attngen[bench]', or leave --plot out.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def drawn(records: Sequence[Record], path: Path) -> None:
    """Write the picture. Raises ``CannotWrite``, or ``Unavailable`` without matplotlib."""
    pyplot = require()
    shown = [(record, result) for record in records for result in record.results]
    parts = [shown[at : at + PER_ROW] for at in range(0, len(shown), PER_ROW)] or [[]]
    size = (WIDTH_INCHES, ROW_INCHES * len(parts) + 0.8)
    figure, axes = pyplot.subplots(len(parts), 1, figsize=size, squeeze=False, layout="constrained")
    names = [name for name in PEERS if any(name in _rates(result) for _, result in shown)]
    for axis, part in zip(axes[:, 0], parts, strict=True):
        _row(axis, part, names)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as problem:
        raise CannotWrite(f"cannot write {path}: {problem}") from None
    finally:
        pyplot.close(figure)


def _row(axis: Any, part: Sequence[tuple[Record, Result]], names: Sequence[str]) -> None:
    width = 0.84 / max(len(names), 1)
    for place, name in enumerate(names):
        rates = [_rates(result).get(name, 0.0) for _, result in part]
        where = [at + (place - (len(names) - 1) / 2) * width for at in range(len(part))]
        axis.bar(where, rates, width, label=name, color=f"C{list(PEERS).index(name) % 10}", hatch=_hatch(name))
    for at, (record, result) in enumerate(part):
        ceiling = record.ceilings[result.problem.dtype]["product"] / 1e12
        axis.plot([at - 0.45, at + 0.45], [ceiling, ceiling], color="0.5", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(part)), [_named(result) for _, result in part])
    axis.set_xlim(-0.5, PER_ROW - 0.5)
    axis.set_ylabel("TFLOP/s")
    axis.spines[["top", "right"]].set_visible(False)


def _named(result: Result) -> str:
    return result.problem.name if result.phase == FORWARD else f"{result.problem.name}\n{TITLES[result.phase]}"


def _hatch(name: str) -> str:
    """Colours repeat after ten peers."""
    return "//" if list(PEERS).index(name) >= 10 else ""


def _rates(result: Result) -> dict[str, float]:
    return {row.peer: row.tflops for row in result.rows if row.status == TIMED and row.tflops is not None}
