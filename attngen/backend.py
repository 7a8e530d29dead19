"""``torch.compile(model, backend="attngen")``: replace attention, let Inductor compile the rest.

Nothing that goes wrong here may break the user's run: one named warning, the graph as it was, and Inductor on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx

from attngen import options as option_parsing
from attngen import plan as plan_files
from attngen.cache.lookup import Choices
from attngen.errors import CacheMissed, VerificationFailed, say_once
from attngen.options import Options
from attngen.tune import session

if TYPE_CHECKING:
    from attngen.prepare import Pending

log = logging.getLogger("attngen")


def attngen(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend, as the entry point names it. Raises ``BadOption`` or ``BadPlan`` for what the user asked wrongly."""
    chosen = option_parsing.parse(options, mode)
    pending = _optimized(gm, example_inputs, chosen, _choices(chosen, example_inputs))
    compiled = _inner(gm, example_inputs, chosen)
    if pending is not None:
        pending.finish()
    return compiled


def choices_of(options: Options) -> Choices:
    """What has been chosen before, as far as ``options`` want that. Raises ``BadPlan``."""
    plans = plan_files.read(options.plan) if options.plan else None
    return Choices(plans, options.cache)


def _choices(options: Options, example_inputs: Sequence[Any]) -> Choices:
    """The same, and what is measured for it now, if that is asked for and the inputs are on a GPU."""
    choices = choices_of(options)
    if options.tune == "off":
        return choices
    if (number := _card(example_inputs)) is not None:
        return session.choices(choices, options.tune, options.tune_seconds, number)
    say_once("tune: the inputs are not on a GPU, so nothing is measured and the cost model chooses")
    return choices


def _card(values: Sequence[Any]) -> int | None:
    """The number of the GPU that values are on, if they are on one."""
    return next((value.device.index or 0 for value in values if getattr(value, "is_cuda", False)), None)


def _optimized(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, choices: Choices) -> Pending | None:
    """Replace what can be replaced. Returns the compilation of kernels for the GPU the inputs are on, begun."""
    from attngen.report import Report, publish

    try:
        from attngen import pipeline, prepare

        report, uses = pipeline.optimize(gm, example_inputs, options, choices)
        publish(replace(report, notes=pipeline.notes()))
        card = pipeline.card(example_inputs)
        if card is None:
            return None
        device = pipeline.planning_device(example_inputs, options)
        pending = prepare.begin(uses, device)
        if options.verify:
            pending.finish()
            prepare.require(uses, card)
            return None
        return pending
    except (VerificationFailed, CacheMissed):
        raise
    except Exception as problem:
        if options.raises:
            raise
        log.warning("attngen leaves this graph as it was: %s: %s", type(problem).__name__, problem)
        publish(Report("", (), (f"not analysed: {type(problem).__name__}: {problem}",)))
        return None


def _inner(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    if options.inner == "eager":
        from attngen import checkpoints

        checkpoints.keep_random_numbers(gm)
        return gm.forward
    import torch._inductor
    from torch._inductor.compile_fx import compile_fx

    patches = torch._inductor.list_mode_options(options.mode) if options.mode != "default" else {}
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled
