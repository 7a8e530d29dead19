"""What the threads of a simulated kernel do to shared memory, and what they know of each other's doings.

There are two ways to it: that of registers, and that of TMA and of products. What a thread has read or written on the first
has to be fenced by it before the same place is used on the second, and whoever uses it must know of that fence: each thread
counts its fences, and tells at a barrier how many of whose it has heard of. So it does not matter who came first this time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


class Broken(Exception):
    """A kernel does not keep to the protocol of barriers and fences."""


@dataclass(frozen=True)
class Touch:
    """A place that a thread used from registers when it had fenced so often."""

    owner: int
    fences: int
    place: np.ndarray


@dataclass
class Ground:
    """The last touch of each place by each thread."""

    touches: dict[tuple[object, ...], Touch] = field(default_factory=dict)


class Known:
    """How often each thread has fenced, as far as one has heard."""

    def __init__(self) -> None:
        self.fences: dict[int, int] = {}

    def hear(self, other: Known) -> None:
        for owner, count in other.fences.items():
            self.fences[owner] = max(count, self.fences.get(owner, 0))


class Witness(Known):
    """One thread."""

    def __init__(self, ground: Ground) -> None:
        super().__init__()
        self.ground = ground
        self.fences[id(self)] = 0

    def touch(self, place: np.ndarray) -> None:
        key = id(self), place.ctypes.data, place.shape, place.strides
        self.ground.touches[key] = Touch(id(self), self.fences[id(self)], place)

    def fence(self) -> None:
        self.fences[id(self)] += 1

    def use(self, place: np.ndarray) -> None:
        """By TMA or a product. Raises ``Broken``."""
        for touch in list(self.ground.touches.values()):
            if self.fences.get(touch.owner, 0) <= touch.fences and np.may_share_memory(touch.place, place):
                raise Broken("TMA or a product uses what a thread has read or written, without a fence that is heard of")
