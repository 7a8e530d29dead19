"""``torch.compile(model, backend="attngen")``: replace attention, let Inductor compile the rest.

Nothing that goes wrong here may break the user's run: one named warning, the graph as it was, and Inductor on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from attngen import options as option_parsing
from attngen import plan as plan_files
from attngen.options import Options

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
    plans = plan_files.read(chosen.plan) if chosen.plan else None
    _optimized(gm, example_inputs, chosen, plans)
    return _inner(gm, example_inputs, chosen)


def _optimized(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, plans: plan_files.PlanFile | None
) -> None:
    from attngen.report import Report, publish

    try:
        from attngen import pipeline, prepare

        report, kernels = pipeline.optimize(gm, example_inputs, options, plans)
        report = prepare.run(report, kernels, example_inputs, options)
    except Exception as problem:
        if options.raises:
            raise
        log.warning("attngen leaves this graph as it was: %s: %s", type(problem).__name__, problem)
        report = Report("", (), (f"not analysed: {type(problem).__name__}: {problem}",))
    publish(report)


def _inner(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    if options.inner == "eager":
        return gm.forward
    import torch._inductor
    from torch._inductor.compile_fx import compile_fx

    patches = torch._inductor.list_mode_options(options.mode) if options.mode != "default" else {}
    return compile_fx(gm, list(example_inputs), config_patches=patches)  # type: ignore[no-any-return]
