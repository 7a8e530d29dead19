"""Barriers that the threads of a simulated kernel meet at: those in shared memory, and those of the hardware by number."""

from __future__ import annotations

import threading
import time

from attngen.proxies import Broken, Known, Witness

SECONDS = 10.0  # a thread may wait for a barrier


class Stuck(Broken):
    """A thread waited in vain, or a barrier was arrived at once too often."""


class Barrier:
    """Phases with a count of arrivals and of bytes to come. Who arrives tells what it knows, who waits hears it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.pending = self.bytes = self.phase = 0
        self.told, self.heard = Known(), Known()  # in this phase, and in those that are over

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def step(self, arrivals: int, incoming: int, by: Witness) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += incoming
            self.told.hear(by)
            if self.pending < 0:
                raise Stuck("more arrivals than the barrier counts")
            if self.pending == 0 and self.bytes == 0:
                self.phase += 1
                self.pending = self.count
                self.heard.hear(self.told)
                self.told = Known()
                self.changed.notify_all()

    def wait(self, parity: int, by: Witness) -> None:
        """Until a phase of that parity is over."""
        until = time.monotonic() + SECONDS
        with self.changed:
            while (self.phase & 1) == (parity & 1):
                self.changed.wait(0.2)
                if time.monotonic() > until:
                    raise Stuck("nobody completes this phase")
            by.hear(self.heard)


class Turn:
    """A barrier of the hardware, with a number for a name, where some threads arrive and others also wait."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.arrived = self.met = 0

    def meet(self, threads: int, stays: bool) -> None:
        """A warpgroup arrives; where it ``stays``, until as many ``threads`` have."""
        until = time.monotonic() + SECONDS
        with self.changed:
            mine = self.met
            self.arrived += 128
            if self.arrived == threads:
                self.arrived, self.met = 0, self.met + 1
                self.changed.notify_all()
            while stays and self.met == mine:
                self.changed.wait(0.2)
                if time.monotonic() > until:
                    raise Stuck("nobody else comes to this barrier")
