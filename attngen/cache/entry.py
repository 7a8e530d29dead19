"""A tuned choice as it is stored: integers and names of a fixed few, strictly validated.

Nothing of an entry but its tiles reaches a template, and these are numbers. ``check`` tells a damaged entry from a sound one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from attngen.cache.key import FORWARD, Key
from attngen.plan import Record, TileRecord, fault
from attngen.spec import HOPPER, Tile, digest


class Entry(Record):
    """``microseconds`` is the median that ``tiles`` took, ``model_microseconds`` that of the cost model's own pick."""

    key: Key
    tiles: list[TileRecord] = Field(min_length=1, max_length=2)
    microseconds: float = Field(gt=0, lt=1e9)
    model_microseconds: float | None = Field(gt=0, lt=1e9)
    candidates: int = Field(ge=1, le=10_000)
    source: Literal["tuned"]
    check: str = Field(min_length=12, max_length=12)

    @model_validator(mode="after")
    def _whole(self) -> Entry:
        alone = self.key.phase == FORWARD or self.tiles[0].family == HOPPER
        if len(self.tiles) != (1 if alone else 2) or len({tile.family for tile in self.tiles}) != 1:
            raise ValueError("these are not the tiles of one kernel, or of the two of a backward")
        if self.check != _check(self):
            raise ValueError("the entry was changed after it had been written")
        return self

    @property
    def chosen(self) -> tuple[Tile, ...]:
        return tuple(tile.made for tile in self.tiles)

    @property
    def text(self) -> str:
        return self.model_dump_json()


def new(
    key: Key, tiles: Sequence[Tile], microseconds: float, model_microseconds: float | None, candidates: int
) -> Entry:  # fmt: skip
    content = {
        "key": key.model_dump(),
        "tiles": [TileRecord.of(tile).model_dump() for tile in tiles],
        "microseconds": microseconds,
        "model_microseconds": model_microseconds,
        "candidates": candidates,
        "source": "tuned",
    }
    return Entry.model_validate({**content, "check": digest(_canonical(content))})


def parsed(text: str | bytes) -> Entry | str:
    """The entry, or what is wrong with it."""
    try:
        return Entry.model_validate_json(text)
    except ValidationError as problem:
        return fault(problem)
    except ValueError as problem:  # numbers of thousands of digits, lone surrogates
        return str(problem)


def _check(entry: Entry) -> str:
    return digest(_canonical(entry.model_dump(exclude={"check"})))


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True)
