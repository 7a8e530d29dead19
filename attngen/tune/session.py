"""Tuning while a model is compiled: which choices are looked up, measured, or heard from rank 0."""

from __future__ import annotations

from dataclasses import replace

from attngen import compat
from attngen.cache.lookup import Choices
from attngen.tune.candidates import Effort
from attngen.tune.shared import Shared
from attngen.tune.spread import visible
from attngen.tune.tuner import Tuner, budget_of_process


def choices(known: Choices, effort: Effort, seconds: float, card: int = 0) -> Choices:
    """``known``, and what it does not have is measured, on the GPU of that number. In a group of processes all but plans is
    rank 0's to say.
    """
    tuner = Tuner(effort, budget_of_process(seconds), known.store, visible(card))
    measuring = replace(known, measure=tuner.measure)
    if (group := compat.process_group()) is None:
        return measuring
    shared = Shared(*group, tuner.budget, replace(measuring, plans=None).find)
    return Choices(known.plans, "skip", shared.measure, known.store)
