"""One run of the sweep: kernels are compiled on all cores, and batches measured on the GPUs as soon as theirs are there.

Nothing but what is complete is kept: a site whose configurations were all timed, or failed. What a run does not reach is left
to the next one, which begins with the batch after the last.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path

from sweep_problems import BF16, Site, groups, spec_of
from sweep_space import Configuration, label, space
from sweep_store import Store, Timed
from sweep_worker import Batch

from attngen.aot import Job, Layout
from attngen.device import Device
from attngen.emit import emit, emit_backward
from attngen.errors import AttngenError, Miss
from attngen.runtime import kernel_path
from attngen.spec import Problem, Tile
from attngen.tune import supervise
from attngen.tune.compilers import Ahead
from attngen.tune.supervise import Outcome

COMMAND = (sys.executable, str(Path(__file__).with_name("sweep_worker.py")))
ROUNDS = 10  # interleaved calls of each
ENDING = 8.0  # seconds before the end of a run from which on no batch is begun

REFERENCE = Site("reference", "forward", spec_of("causal", 128, 128, BF16, False), Problem((2, 16), 4096, 4096))
REFERENCE_TILE = (Tile(128, 64, 8, 3),)


# -------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Planned:
    """A site, its configurations, and what has to be compiled for each; those that no template expresses say why instead."""

    site: Site
    configurations: tuple[Configuration, ...]
    jobs: tuple[Job | str, ...]


def planned(site: Site, device: Device, configurations: Sequence[Configuration] | None = None) -> Planned:
    chosen = tuple(space(site, device) if configurations is None else configurations)
    layouts = site.launched
    return Planned(site, chosen, tuple(_job(site, device, tiles, layouts) for tiles in chosen))


def _job(site: Site, device: Device, tiles: Configuration, layouts: tuple[Layout, ...]) -> Job | str:
    if site.phase == "backward":
        kernel = emit_backward(site.spec, tiles, l2_bytes=device.l2_bytes, sms=device.sms)
    else:
        kernel = emit(site.spec, tiles[0], l2_bytes=device.l2_bytes, sms=device.sms)
    if not isinstance(kernel, Miss) and kernel.leaves_rows:
        return "no kernel of its own: it leaves rows to others"
    return f"no kernel: {kernel}" if isinstance(kernel, Miss) else Job(kernel_path(kernel), layouts)


def compiling(plan: Planned, ahead: Ahead) -> Compiling:
    """What will be wrong with each configuration; nothing if it compiles."""
    return Compiling(plan, tuple(_known(job) if isinstance(job, str) else ahead.future(job) for job in plan.jobs))


def _known(reason: str) -> Future[str]:
    future: Future[str] = Future()
    future.set_result(reason)
    return future


@dataclass(frozen=True)
class Compiling:
    """What is wrong with each configuration of a site, once that is known."""

    plan: Planned
    futures: tuple[Future[str], ...]

    @property
    def wrong(self) -> dict[str, str]:
        pairs = zip(self.plan.configurations, self.futures, strict=True)
        return {label(tiles): why for tiles, future in pairs if (why := future.result())}

    @property
    def able(self) -> list[Configuration]:
        wrong = self.wrong
        return [tiles for tiles in self.plan.configurations if label(tiles) not in wrong]


Measure = Callable[[Batch, float, str], Outcome]


def on_card(batch: Batch, deadline: float, card: str) -> Outcome:
    """By the tuner's supervisor, in processes that may crash or hang."""
    return supervise.measured(batch, deadline, card=card, command=COMMAND)


# ----------------------------------------------------------------------------------------------------------------- a run

Batches = queue.Queue["list[Compiling] | None"]


@dataclass
class Run:
    """What all cards share. ``stops`` is when the run ends (``time.monotonic``), ``says`` is told what was done."""

    store: Store
    path: Path
    device: Device
    stops: float
    ahead: Ahead
    measure: Measure = on_card
    says: Callable[[str], None] = print
    lock: threading.Lock = field(default_factory=threading.Lock)

    def go(self, sites: Sequence[Site], cards: Sequence[str]) -> None:
        """Measure the sites that are not in the store, until all are or the time is over."""
        left = [site for site in sites if site.name not in self.store.sites]
        reference = compiling(planned(REFERENCE, self.device, [REFERENCE_TILE]), self.ahead)
        ready: Batches = queue.Queue()
        threads = [threading.Thread(target=self._card, args=(card, reference, ready)) for card in cards]
        for thread in threads:
            thread.start()
        for group in groups(left):
            if time.monotonic() > self.stops:
                break
            ready.put([compiling(planned(site, self.device), self.ahead) for site in group])
        for _ in threads:
            ready.put(None)
        for thread in threads:
            thread.join()

    def _card(self, card: str, reference: Compiling, ready: Batches) -> None:
        """One GPU: batch after batch, in the order in which they are compiled."""
        while (batch := ready.get()) is not None and self._compiled([reference, *batch]):
            began = time.monotonic()
            found = self._measured(card, reference.plan, batch)
            with self.lock:
                self.store.sites.update(found)
                self.store.save(self.path)
                what = f"{batch[0].plan.site.name} and the like"
                self.says(f"{time.monotonic() - began:6.1f} s  {what}: {len(found)} of {len(batch)} sites")

    def _compiled(self, batch: list[Compiling]) -> bool:
        """Whether all of it is, in time."""
        futures = [future for each in batch for future in each.futures]
        return not wait(futures, timeout=max(0.0, self.stops - ENDING - time.monotonic())).not_done

    def _measured(self, card: str, reference: Planned, batch: list[Compiling]) -> dict[str, Timed]:
        choices = [(reference.site, [REFERENCE_TILE]), *((each.plan.site, each.able) for each in batch)]
        task = Batch.of([(site.wanted(self.device), tiles) for site, tiles in choices if tiles], ROUNDS)
        outcome = self.measure(task, self.stops, card)
        if outcome.broke or 0 not in outcome.microseconds:
            self.says(f"{batch[0].plan.site.name}: {outcome.broke or outcome.failed.get(0, 'no time for the reference')}")
            return {}
        found, first = {}, 1
        for each in batch:
            if (timed := _timed(outcome, first, each)) is not None:
                found[each.plan.site.name] = timed
            first += len(each.able)
        return found


def _timed(outcome: Outcome, first: int, compiling: Compiling) -> Timed | None:
    """What came of one site, if all of it was looked at; its first candidate has the number ``first``."""
    times: dict[str, float] = {}
    lost = compiling.wrong
    for number, tiles in enumerate(compiling.able, first):
        if number in outcome.microseconds:
            times[label(tiles)] = outcome.microseconds[number]
        elif number in outcome.failed:
            lost[label(tiles)] = outcome.failed[number]
        else:
            return None
    return Timed(outcome.microseconds[0], times, lost)


def check(store: Store, device: Device) -> None:
    """Raises ``AttngenError`` where the store is of another GPU."""
    if store.device != device.label:
        raise AttngenError(f"the file holds times of the {store.device}; this is the {device.label}: write to another one")
