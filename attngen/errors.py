"""Everything that can go wrong, said once: what, where, and what to do about it.

An ``AttngenError`` is for the person at the keyboard. A ``Miss`` is a value: a place in a model that is left as it was,
and why.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

log = logging.getLogger("attngen")


class AttngenError(Exception):
    """Base of all errors attngen raises on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class BadOption(AttngenError):
    exit_code = 2


class UnknownDevice(AttngenError):
    exit_code = 2


class BadModelFile(AttngenError):
    """The user's file cannot be imported, or names no model or no inputs."""

    exit_code = 3


class CannotTrace(AttngenError):
    exit_code = 4


class CannotWrite(AttngenError):
    exit_code = 5


class BadPlan(AttngenError):
    exit_code = 6


class BadCache(AttngenError):
    """A file of tuned choices that cannot be read as one."""

    exit_code = 6


class VerificationFailed(AttngenError):
    exit_code = 7


class Unavailable(AttngenError):
    """Something that needs a usable Triton or a GPU that is not there."""

    exit_code = 8


class CacheMissed(AttngenError):
    """Nothing is tuned for a site where the user asked that everything be."""

    exit_code = 9


class UnusableCache(AttngenError):
    """The user's cache of tuned choices can be neither read nor written; what was asked for has to do without."""

    exit_code = 5


@cache
def say_once(problem: str) -> None:
    """Log a warning, the first time in this process."""
    log.warning("%s", problem)


@dataclass(frozen=True)
class Miss:
    """A place that looks like attention and is left alone. ``depth`` counts how many proofs held before one failed.

    ``blamed`` is the node whose line shows what is in the way, where that is another than ``node``.
    """

    reason: str
    node: str = ""
    depth: int = 0
    blamed: str = ""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.reason} ({self.node})" if self.node else self.reason
