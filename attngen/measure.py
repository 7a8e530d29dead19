"""Clocks: medians of interleaved calls, peak memory of one, and the ceilings of this machine.

On a GPU, calls are timed by device events. Before each, a buffer larger than the L2 cache is written, so often that the
device is still busy with that when the host has launched the call: the cache holds nothing of the operands, and no time of
the host is counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

WARM_UP = 3  # rounds before those that count
FLUSH_BYTES, FLUSHES, MOST_FLUSHES = 256 << 20, 4, 128  # four take 0.3 ms or more on any GPU of today
SIDE = {"cuda": 8192, "cpu": 512}  # of the product that is the ceiling
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 24}

Run = Callable[[], object]


@dataclass(frozen=True)
class Staged:
    """A call of which the second part is timed alone: ``timed`` is given what ``before`` returns, anew each time."""

    before: Callable[[], Any]
    timed: Callable[[Any], Any]

    def __call__(self) -> Any:
        return self.timed(self.before())


def _begun(run: Run) -> Run:
    """What is left to be timed of it."""
    return partial(run.timed, run.before()) if isinstance(run, Staged) else run


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --------------------------------------------------------------------------------------------------------------- clocks


@dataclass
class Clock:
    """Times one call after the other, in milliseconds; ``read`` gives the time of what ``start`` returned."""

    device: str
    flush: bool = True
    flushes: int = FLUSHES
    _buffer: torch.Tensor | None = field(default=None, repr=False)

    def start(self, run: Run) -> Callable[[], float]:
        """Run it; the result reads the time, once the device has got there."""
        if self.device != "cuda":
            run = _begun(run)
            began = time.perf_counter()
            run()
            took = 1e3 * (time.perf_counter() - began)
            return lambda: took
        start, end = self._timed(run)
        while self.flush and start.query() and self.flushes < MOST_FLUSHES:  # the device was there first: it has waited
            torch.cuda.synchronize()
            self.flushes *= 2
            start, end = self._timed(run)
        return lambda: float(start.elapsed_time(end))

    def _timed(self, run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        run = _begun(run)
        self._forget()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        return start, end

    def _forget(self) -> None:
        if not self.flush:
            return
        if self._buffer is None:
            self._buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        for _ in range(self.flushes):
            self._buffer.zero_()


def samples(
    runs: Mapping[str, Run],
    rounds: int,
    clock: Clock,
    *,
    warm_up: int = WARM_UP,
    failed: Callable[[str, Exception], None] | None = None,
    begins: Callable[[str], None] | None = None,
) -> dict[str, list[float]]:
    """Times of ``rounds`` interleaved calls of each, every round beginning with another one.

    One that raises is reported to ``failed`` and left out from then on; without that, its error is raised. ``begins`` is told
    of each before it is called.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warm_up + rounds):
        able = list(taken)
        shift = number % max(len(able), 1)
        for name in able[shift:] + able[:shift]:
            if begins is not None:
                begins(name)
            try:
                read = clock.start(runs[name])
                synchronize(clock.device)
            except Exception as problem:
                if failed is None:
                    raise
                del taken[name]
                failed(name, problem)
                continue
            if number >= warm_up:
                taken[name].append(read())
    return taken


@dataclass(frozen=True)
class Times:
    """Milliseconds: the median, and the quarters of the calls that were faster and slower than these."""

    median: float
    low: float
    high: float


def summary(taken: list[float]) -> Times:
    if len(taken) == 1:
        return Times(taken[0], taken[0], taken[0])
    low, _, high = statistics.quantiles(taken, n=4, method="inclusive")
    return Times(statistics.median(taken), low, high)


def peak_bytes(run: Run) -> int:
    """Device memory allocated during one call, beyond what stood before what is timed of it."""
    run = _begun(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ------------------------------------------------------------------------------------------------------------- ceilings


@dataclass(frozen=True)
class Ceilings:
    """What a large square product and a large copy reach here: FLOP/s, and bytes/s with reads and writes counted."""

    product: float
    copy: float


def ceilings(device: str, dtype: str, rounds: int) -> Ceilings:
    side, count = SIDE[device], COPY_BYTES[device]
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.zeros(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"product": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)}
    taken = {name: summary(each).median for name, each in samples(runs, rounds, Clock(device)).items()}
    return Ceilings(2e3 * side**3 / taken["product"], 2e3 * count / taken["copy"])
