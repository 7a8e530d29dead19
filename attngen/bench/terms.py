"""What is timed, and why a peer has no time."""

from __future__ import annotations

FORWARD, GRADIENT, BOTH = "forward", "gradient", "both"
PHASES = (FORWARD, GRADIENT, BOTH)


class Missing(Exception):
    """It is not installed."""


class NotSpelled(Exception):
    """It has no spelling of the problem, or refuses it."""
