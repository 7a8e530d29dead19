"""``attngen bench`` from options to tables: what the command line calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from attngen.bench import peers, plot, problems, records, report, worker
from attngen.bench.problems import Problem
from attngen.bench.records import Record
from attngen.bench.terms import FORWARD, PHASES
from attngen.errors import BadOption, Unavailable, VerificationFailed
from attngen.show import Progress, console

CHANGES = tuple(field.name for field in fields(Problem) if field.name != "name")


@dataclass(frozen=True)
class Request:
    """What was asked for; ``changes`` are the numbers given as flags, None where not."""

    names: Sequence[str]
    peers: Sequence[str]
    device: str
    rounds: int
    timeout: float
    changes: dict[str, Any]
    phase: str = FORWARD
    json: Path | None = None
    plot: Path | None = None


def listed() -> None:
    """Print the names."""
    console().print(report.listing())


def show(paths: Sequence[Path], picture: Path | None) -> None:
    """Records of earlier runs as tables and, if wanted, one picture."""
    found = records.read(paths)
    for record in found:
        console().print(report.shown(record))
    if picture:
        plot.drawn(found, picture)


def run(request: Request) -> None:
    """Measure and show. Raises ``VerificationFailed`` if our own result was wrong at any problem."""
    device = _device(request.device)
    asked = chosen(request, device)
    named = [peer.name for peer in peers.chosen(request.peers, device)]
    if request.phase not in PHASES:
        raise BadOption(f'unknown phase "{request.phase}". Known: {", ".join(PHASES)}.')
    if request.rounds < 1:
        raise BadOption("--rounds must be at least 1.")
    if request.plot:
        plot.require()
    job = worker.Job(tuple(asked), tuple(named), device, request.rounds, request.timeout, request.phase)
    record = _measured(job, request.json)
    out = console()
    out.print(report.shown(record))
    if request.plot:
        plot.drawn([record], request.plot)
    if wrong := report.wrong([record]):
        raise VerificationFailed("\n".join(wrong))


def chosen(request: Request, device: str) -> list[Problem]:
    """The problems asked for, with the numbers asked for; small ones on a CPU."""
    found = problems.selected(request.names or [problems.DEFAULT])
    if device == "cpu":
        found = [problems.small(problem) for problem in found]
    return [problems.changed(problem, request.changes) for problem in found]


def _device(asked: str) -> str:
    if asked not in ("auto", "cuda", "cpu"):
        raise BadOption(f'unknown device "{asked}". Known: auto, cuda, cpu.')
    if asked == "cpu" or torch.cuda.is_available():
        return "cpu" if asked == "cpu" else "cuda"
    listed()
    raise Unavailable(
        "there is no GPU here to measure these problems on. With `--device cpu` they are run small, which tries the command "
        "and says nothing of speed."
    )


def _measured(job: worker.Job, file: Path | None) -> Record:
    """The whole record; the file holds what is done at any time."""
    progress = Progress(console(stderr=True))
    record: Record | None = None
    status = progress.console.status(Text("starting"))
    with status:
        for record in worker.measured(job, lambda problem, peer: status.update(Text(f"{problem}: {peer}"))):
            last = record.results[-1]
            timed = sum(row.ms is not None for row in last.rows)
            progress.say(f"  {last.problem.name}: {timed} of {len(last.rows)} peers timed")
            if file:
                records.written(record, file)
    assert record is not None
    return record
