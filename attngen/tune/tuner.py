"""Measures choices that nobody has made before, one after the other, within a budget of seconds; each is kept at once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from attngen.cache import entry as entries
from attngen.cache.key import Wanted, key_of
from attngen.cache.lookup import Choice
from attngen.cache.store import Store
from attngen.errors import UnusableCache, say_once
from attngen.spec import Tile
from attngen.tune import supervise
from attngen.tune.candidates import EXTENTS, Effort, candidates
from attngen.tune.compilers import Ahead
from attngen.tune.messages import Message, Task
from attngen.tune.supervise import Outcome, Spare

log = logging.getLogger("attngen")

TUNED = "tuned"  # the source of a choice that was measured just now


@dataclass
class Budget:
    """Seconds that measuring may take, all together; what passes between is not counted."""

    seconds: float
    spent: float = 0.0

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.spent)


@cache
def budget_of_process(seconds: float) -> Budget:
    """One for all graphs that a process compiles."""
    return Budget(seconds)


@dataclass(frozen=True)
class Result:
    """What came of one choice: the candidates, what became of them, and which was chosen."""

    wanted: Wanted
    tried: tuple[tuple[Tile, ...], ...]
    outcome: Outcome
    choice: Choice | None

    @property
    def model_microseconds(self) -> float | None:
        """Of the cost model's own pick."""
        return self.outcome.microseconds.get(0)


def _silent(wanted: Wanted, text: str) -> None:
    log.info("tuning %s, %s: %s", wanted.where, wanted.phase, text)


@dataclass
class Tuner:
    """``measure`` may be asked by the pipeline. ``says`` is told how it stands, in words; ``card`` is the GPU to measure on,
    as CUDA_VISIBLE_DEVICES has it, where that is not what this process sees. For many choices: ``ahead`` compiles those to
    come, and ``spare`` begins processes for them, while one is measured.
    """

    effort: Effort
    budget: Budget
    store: Store = field(default_factory=Store)
    card: str | None = None
    command: Sequence[str] = supervise.COMMAND
    step: float = supervise.STEP
    says: Callable[[Wanted, str], None] = _silent
    ahead: Ahead | None = None
    spare: Spare | None = None

    def measure(self, wanted: Wanted) -> Choice | None:
        """The fastest, or None where that cannot be told; never raises for what a candidate does."""
        if capturing():
            say_once("nothing is measured while a CUDA graph is captured: the cost model chooses")
            return None
        if self.budget.left <= 0:
            say_once(f"the {self.budget.seconds:.0f} s for tuning are spent: the cost model makes the other choices")
            return None
        return self.tuned(wanted).choice

    def task(self, wanted: Wanted) -> Task:
        extent = EXTENTS[self.effort]
        return Task(wanted, candidates(wanted, extent.candidates), extent.rounds)

    def tuned(self, wanted: Wanted) -> Result:
        task = self.task(wanted)
        if not task.candidates:
            return Result(wanted, (), Outcome(broke="there is no kernel for it"), None)
        began = time.monotonic()
        outcome = self._outcome(task, began + self.budget.left)
        with _LOCK:
            self.budget.spent += time.monotonic() - began
        return Result(wanted, task.candidates, outcome, self._kept(wanted, task.candidates, outcome))

    def _outcome(self, task: Task, deadline: float) -> Outcome:
        if self.ahead is not None:
            self.says(task.wanted, "compiling")
            task = self.ahead.compiled(task, deadline)
        try:
            return supervise.measured(
                task,
                deadline,
                card=self.card,
                command=self.command,
                step=self.step,
                heard=lambda message, outcome: self.says(task.wanted, _said(message, outcome, task.candidates)),
                spare=self.spare,
            )
        except OSError as problem:  # no process can be started
            return Outcome(broke=str(problem))

    def _kept(self, wanted: Wanted, tried: Sequence[tuple[Tile, ...]], outcome: Outcome) -> Choice | None:
        if (best := outcome.best) is None:
            reason = outcome.broke or "; ".join(dict.fromkeys(outcome.failed.values())) or "there was no time"
            log.warning("%s: its %s could not be tuned: %s", wanted.where, wanted.phase, reason)
            return None
        microseconds = outcome.microseconds[best]
        made = entries.new(key_of(wanted), tried[best], microseconds, outcome.microseconds.get(0), len(outcome.microseconds))
        try:
            self.store.put([(made.key.digest, made.text)])
        except UnusableCache as problem:
            say_once(f"{problem}; what is measured is used in this process alone")
        return Choice(tried[best], TUNED, microseconds)


_LOCK = threading.Lock()


def capturing() -> bool:
    """A CUDA graph is being captured, which another process that uses the card must not disturb."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _said(message: Message, outcome: Outcome, tried: Sequence[tuple[Tile, ...]]) -> str:
    best = outcome.best
    standing = "" if best is None else f", best {listed(tried[best])} at {outcome.microseconds[best]:.1f} us"
    what = {"began": "looking at", "failed": "lost", "timed": "timed"}[message.event]
    return f"{what} {message.candidate + 1} of {len(tried)}{standing}"


def listed(tiles: Sequence[Tile]) -> str:
    return ", ".join(map(str, tiles))
