"""The Python API over a whole model: capture through Dynamo, one graph or several, and hand each to the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map_only

from attngen import backend, compat, pipeline, report
from attngen import options as option_parsing
from attngen.errors import CannotTrace
from attngen.report import Report


def optimize(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """``model`` compiled for the given inputs, with its attention replaced. Raises ``BadOption`` or ``CannotTrace``."""
    option_parsing.parse(options)
    compiled = torch.compile(model, backend=backend.attngen, options=dict(options))
    try:
        compiled(*args, **kwargs)
    except torch._dynamo.exc.TorchDynamoException as problem:
        raise CannotTrace(_untraceable(problem)) from problem
    return compiled


def explain(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> Report:
    """What would be done to ``model``, over all of its graphs. Traced on fake tensors, so nothing is computed."""
    chosen = option_parsing.parse(options)
    reports: list[Report] = []

    def inspect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        reports.append(pipeline.explain(gm, example_inputs, chosen))
        return gm.forward

    traced = torch.compile(model, backend=inspect)
    mode = compat.FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: torch.Tensor) -> torch.Tensor:
        return mode.from_tensor(value, static_shapes=True)

    fake_args, fake_kwargs = tree_map_only(torch.Tensor, fake, (tuple(args), dict(kwargs)))
    try:
        with mode:
            traced(*fake_args, **fake_kwargs)
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as problem:
        if not reports:
            raise CannotTrace(_untraceable(problem)) from problem
        note = f"Tracing stopped after {len(reports)} graphs: {_first_line(problem)}"
        return report.merge([*reports, Report(reports[0].device, (), (note,))])
    return report.merge(reports)


def is_module(value: object) -> bool:
    return isinstance(value, nn.Module)


def _untraceable(problem: BaseException) -> str:
    return f"The model cannot be traced: {_first_line(problem)}"


def _first_line(problem: BaseException) -> str:
    return next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
