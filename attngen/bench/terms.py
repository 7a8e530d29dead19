"""Why a peer has no time."""

from __future__ import annotations


class Missing(Exception):
    """It is not installed."""


class NotSpelled(Exception):
    """It has no spelling of the problem, or refuses it."""
