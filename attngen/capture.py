"""The Python API over a whole model: capture through Dynamo, one graph or several, and hand each to the pipeline."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map_only

from attngen import backend, compat, pipeline, report
from attngen import options as option_parsing
from attngen.cache.lookup import Choices
from attngen.device import Device, resolve
from attngen.errors import CacheMissed, CannotTrace
from attngen.options import Options
from attngen.prepare import Use
from attngen.report import Report

_SPLIT = (
    "torch.compile captured {count} graphs: attention that is split between two of them is not seen."
    " TORCH_LOGS=graph_breaks shows where they end."
)
Look = Callable[[fx.GraphModule, Sequence[Any]], Report]


def optimize(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """``model`` compiled for the given inputs, with its attention replaced. Raises ``BadOption`` or ``CannotTrace``."""
    option_parsing.parse(options)
    compiled = torch.compile(model, backend=backend.attngen, options=dict(options))
    try:
        compiled(*args, **kwargs)
    except torch._dynamo.exc.TorchDynamoException as problem:
        raise CannotTrace(_untraceable(problem, model)) from problem
    return compiled


def explain(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any],
    *, may_run: bool = False, choices: Choices | None = None,
) -> Report:  # fmt: skip
    """What would be done to ``model``, over all of its graphs. Traced on fake tensors, so nothing is computed.

    With ``may_run``, a model whose control flow needs real values is run, once, as it is.
    """
    chosen = option_parsing.parse(options)
    device = _named(chosen)
    choices = choices or backend.choices_of(chosen)

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Report:
        return pipeline.explain(gm, example_inputs, chosen, device, choices)

    return over_graphs(model, args, kwargs, chosen, look, may_run=may_run)


def over_graphs(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Options, look: Look,
    *, may_run: bool,
) -> Report:  # fmt: skip
    """What ``look`` reports of every graph of ``model``; see ``explain``. It is given the real inputs of a graph."""
    mode, fake_args, fake_kwargs = _fakes(args, kwargs)
    real = dict(zip(map(id, tree_leaves([fake_args, fake_kwargs])), tree_leaves([tuple(args), dict(kwargs)]), strict=True))

    def look_at_real(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Report:
        return look(gm, [real.get(id(value), value) for value in example_inputs])

    reports, stopped = _traced(model, mode, fake_args, fake_kwargs, options, look_at_real)
    if stopped is not None and may_run:
        reports, stopped = _traced(model, None, args, kwargs, options, look)
    return _merged(reports, stopped)


def generate(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Report, list[Use]]:
    """The report and the distinct kernels of ``model``, over all of its graphs.

    Traced on fake tensors. Only a model whose control flow needs real values is run, once, as it is.
    """
    chosen = option_parsing.parse(options)
    device = _named(chosen)
    choices = backend.choices_of(chosen)
    uses: dict[str, Use] = {}

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Report:
        found, used = pipeline.optimize(gm, example_inputs, chosen, choices, device)
        uses.update({use.kernel.name: use for use in used if use.kernel.name not in uses})
        return found

    return over_graphs(model, args, kwargs, chosen, look, may_run=True), list(uses.values())


def _named(options: Options) -> Device | None:
    """The target that was asked for by name, wherever the inputs are."""
    return None if options.target == "auto" else resolve(options.target)


# ---------------------------------------------------------------------------------------------------------------- trace


def _fakes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[compat.FakeTensorMode, Sequence[Any], Mapping[str, Any]]:
    """The inputs as fake tensors, and the mode that they live in."""
    mode = compat.FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: torch.Tensor) -> torch.Tensor:
        return mode.from_tensor(value, static_shapes=True)

    fake_args, fake_kwargs = tree_map_only(torch.Tensor, fake, (tuple(args), dict(kwargs)))
    return mode, fake_args, fake_kwargs


def _traced(
    model: Callable[..., Any], mode: compat.FakeTensorMode | None, args: Sequence[Any], kwargs: Mapping[str, Any],
    options: Options, look: Look,
) -> tuple[list[Report], Exception | None]:  # fmt: skip
    """``look`` at every graph of ``model``: what it reports, and what ended the run after the first graph, if so.

    Raises ``CannotTrace`` if that was before the first graph.
    """
    reports: list[Report] = []

    def inspect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        reports.append(_looked(look, gm, example_inputs, options))
        return gm.forward

    try:
        with compat.looking_at(model, inspect) as traced:
            if mode is None:
                traced(*args, **kwargs)
            else:
                with mode:
                    traced(*args, **kwargs)
    except Exception as problem:  # whatever the model itself raises
        if isinstance(missed := _cause(problem), CacheMissed):
            raise missed from None
        if options.raises and not isinstance(_cause(problem), compat.DataDependentOutputException):
            raise
        if not reports:
            raise CannotTrace(_untraceable(problem, model)) from problem
        return reports, problem
    return reports, None


def _looked(look: Look, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Report:
    """A failure of ours on one graph is a note, and the other graphs are still looked at."""
    try:
        return look(gm, example_inputs)
    except CacheMissed:
        raise
    except Exception as problem:
        if options.raises:
            raise
        return Report("", (), (f"A graph was not analysed: {type(problem).__name__}: {problem}",), partial=True)


def _merged(reports: list[Report], stopped: Exception | None) -> Report:
    if not reports:
        raise CannotTrace("torch.compile captured no graph of this model: its code may be excluded from tracing.")
    if stopped is not None:
        graphs = f"{len(reports)} graph{'' if len(reports) == 1 else 's'}"
        reason = _first_line(_cause(stopped))
        if isinstance(stopped, compat.DataDependentOutputException):
            reason = f"the model then decides by values, which only running it can tell ({reason})"
        reports = [*reports, Report("", (), (f"Tracing stopped after {graphs}: {reason}",), partial=True)]
    elif len(reports) > 1 and not any(each.sites for each in reports):
        reports = [*reports, Report("", (), (_SPLIT.format(count=len(reports)),))]
    return report.merge(reports)


# --------------------------------------------------------------------------------------------------------------- errors


def _untraceable(problem: Exception, model: Callable[..., Any]) -> str:
    """What the model raised, and at which line of whose code (torch's own frames left out), or how it is called."""
    cause = _cause(problem)
    own = tuple(str(Path(module.__file__ or "").parent) for module in (torch, backend))
    traced = [*traceback.extract_tb(problem.__traceback__), *(getattr(problem, "real_stack", None) or ())]
    frames = [frame for frame in traced if not frame.filename.startswith(own)]
    place = f"\n  at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else _arguments(model)
    return f"The model cannot be traced: {type(cause).__name__}: {_first_line(cause)}{place}"


def _arguments(model: Callable[..., Any]) -> str:
    try:
        names = inspect.signature(getattr(model, "forward", model)).parameters
    except (TypeError, ValueError):  # what is written in C may have no signature
        return ""
    return f"\n  It is called as model({', '.join(names)})."


def _cause(problem: BaseException) -> BaseException:
    """What went wrong under what Dynamo says of it."""
    while isinstance(problem, torch._dynamo.exc.TorchDynamoException):
        below = problem.__cause__ or problem.__context__
        if below is None:
            break
        problem = below
    return problem


def _first_line(problem: BaseException) -> str:
    """Of its message, and whether there is more."""
    first, *others = [line for line in str(problem).splitlines() if line.strip()] or ["no message"]
    return f"{first} ..." if others else first
