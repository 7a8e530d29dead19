"""What goes to the process that measures, and what it says: a line of JSON for each step, so that nothing done is lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from attngen.cache.key import Wanted
from attngen.plan import Record
from attngen.spec import Tile

LONGEST_REASON = 300


@dataclass(frozen=True)
class Task:
    """Which tiles to measure for one choice. ``lost`` says of candidates, by number, what happened to them before; the others
    have been ``compiled``, or are still to be.
    """

    wanted: Wanted
    candidates: tuple[tuple[Tile, ...], ...]
    rounds: int
    lost: dict[int, str] = field(default_factory=dict)
    compiled: bool = False


class Message(Record):
    """``began``: from now on, what happens is the candidate's doing. ``failed``: it is out, and why. ``timed``: the median so
    far. ``done``: that was all; ``broke``: nothing can be measured, and why.
    """

    event: Literal["began", "failed", "timed", "done", "broke"]
    candidate: int = Field(default=-1, ge=-1, lt=10_000)
    reason: str = Field(default="", max_length=2 * LONGEST_REASON)
    microseconds: float = Field(default=0.0, ge=0, lt=1e9)
