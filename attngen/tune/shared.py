"""In a group of processes (``torch.distributed``), rank 0 makes each choice and tells the others; nobody waits for ever.

A choice goes through the key-value store that the group was begun with, not through a collective operation: ranks may compile
different graphs, in any order. One that hears nothing in time goes by the cost model, whose kernels compute the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from attngen.cache.key import Wanted, key_of
from attngen.cache.lookup import Choice
from attngen.errors import say_once
from attngen.plan import Record, TileRecord
from attngen.tune.tuner import Budget

BEYOND = 10.0  # seconds to wait beyond the budget, for what rank 0 was measuring when it was spent
PAUSE = 0.05  # seconds between two looks


class Told(Record):
    """What rank 0 says of a choice; no tiles where it leaves it to the cost model."""

    tiles: list[TileRecord] = Field(max_length=2)
    microseconds: float | None = None


@dataclass(frozen=True)
class Shared:
    """``measure`` for every rank. ``decide`` is what rank 0 asks."""

    rank: int
    group: Any  # the store
    budget: Budget
    decide: Callable[[Wanted], Choice | None]

    def measure(self, wanted: Wanted) -> Choice | None:
        name = f"attngen/{key_of(wanted).digest}"
        try:
            return self._told(name, wanted) if self.rank == 0 else self._heard(name)
        except RuntimeError as problem:  # the store is gone, with the process that held it
            say_once(f"ranks cannot share what is tuned ({problem}): each goes by the cost model")
            return None

    def _told(self, name: str, wanted: Wanted) -> Choice | None:
        choice = self.decide(wanted)
        tiles = [TileRecord.of(tile) for tile in choice.tiles] if choice else []
        self.group.set(name, Told(tiles=tiles, microseconds=choice.microseconds if choice else None).model_dump_json())
        return choice

    def _heard(self, name: str) -> Choice | None:
        began = time.monotonic()
        limit = began + self.budget.left + (BEYOND if self.budget.left else 0.0)
        while not self.group.check([name]):
            if time.monotonic() >= limit:
                say_once("rank 0 told of no choice in time: the cost model makes it")
                return self._after(began, None)
            time.sleep(PAUSE)
        return self._after(began, _understood(self.group.get(name)))

    def _after(self, began: float, choice: Choice | None) -> Choice | None:
        self.budget.spent += time.monotonic() - began
        return choice


def _understood(text: bytes) -> Choice | None:
    try:
        told = Told.model_validate_json(text)
    except ValidationError:
        return None
    return Choice(tuple(tile.made for tile in told.tiles), "tuned", told.microseconds) if told.tiles else None
