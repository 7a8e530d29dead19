"""What has been chosen before, in the order in which it counts: a plan, the user's cache, what comes with attngen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from attngen.cache import files
from attngen.cache.entry import Entry, parsed
from attngen.cache.key import FORWARD, Key, Wanted, key_of
from attngen.cache.store import Store
from attngen.errors import UnusableCache, say_once
from attngen.plan import PlanFile
from attngen.spec import Tile

Mode = Literal["use", "skip", "assert", "refresh"]
USE: Mode = "use"
ASSERT: Mode = "assert"
MODEL = "model"  # the source of a choice that nobody had made before


@dataclass(frozen=True)
class Choice:
    """Tiles that were chosen, and ``source``: "plan", "cache", "shipped" or "tuned"."""

    tiles: tuple[Tile, ...]
    source: str
    microseconds: float | None = None

    @classmethod
    def of(cls, entry: Entry, source: str) -> Choice:
        return cls(entry.chosen, source, entry.microseconds)


Measure = Callable[[Wanted], Choice | None]


@dataclass(frozen=True)
class Choices:
    """Looks choices up. ``measure`` is asked where there is none, and may say that it cannot tell either.

    With ``mode`` "skip" nothing but the plan counts; with "refresh" what has been tuned is measured again; with "assert" a
    choice that nobody made is an error for who asked. A cache that cannot be used is logged once, and does not count.
    """

    plans: PlanFile | None = None
    mode: Mode = USE
    measure: Measure | None = None
    store: Store = field(default_factory=Store)
    _known: dict[Wanted, Choice | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def find(self, wanted: Wanted) -> Choice | None:
        if wanted not in self._known:
            self._known[wanted] = next((choice for choice in self._ways(wanted) if choice is not None), None)
        return self._known[wanted]

    def _ways(self, wanted: Wanted) -> Iterator[Choice | None]:
        if self.plans is not None:
            yield _planned(self.plans, wanted)
        if self.mode in (USE, ASSERT):
            yield tuned(wanted, self.store)
        if self.measure is not None:
            yield self.measure(wanted)


def tuned(wanted: Wanted, store: Store) -> Choice | None:
    """From the user's cache, else from what comes with attngen."""
    key = key_of(wanted)
    if (entry := _stored(key, store)) is not None:
        return Choice.of(entry, "cache")
    entry = files.shipped(wanted.device.name).get(key.digest)
    return Choice.of(entry, "shipped") if entry is not None and entry.key == key else None


def _stored(key: Key, store: Store) -> Entry | None:
    try:
        text = store.get(key.digest)
    except UnusableCache as problem:
        say_once(f"{problem}; choices are made by the cost model")
        return None
    if text is None:
        return None
    entry = parsed(text)
    if isinstance(entry, str):
        say_once(f"an entry of the cache of tuned choices is damaged and does not count ({entry}). See: attngen cache verify")
        return None
    return entry if entry.key == key else None


def _planned(plans: PlanFile, wanted: Wanted) -> Choice | None:
    if wanted.phase == FORWARD:
        tile = plans.tile_for(wanted.spec, wanted.problem)
        return None if tile is None else Choice((tile,), "plan")
    tiles = plans.backward_for(wanted.spec, wanted.problem)
    return None if tiles is None else Choice(tiles, "plan")
