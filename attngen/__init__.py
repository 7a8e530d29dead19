"""Finds attention in traced PyTorch models by what it computes, and replaces it by generated Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from attngen.report import Report

__version__ = "0.1.0"
__all__ = ["__version__", "explain", "load", "optimize", "record"]


def optimize(model: Callable[..., Any], *example_inputs: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """``model`` compiled with its attention replaced, ready for inputs like the examples.

    The same as ``torch.compile(model, backend="attngen", options=options)`` called once. Raises ``AttngenError``.
    """
    from attngen import capture

    return capture.optimize(model, example_inputs, kwargs, options or {})


def explain(model: Callable[..., Any], *example_inputs: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """What ``optimize`` would replace and what it would leave, and why. Computes nothing and writes nothing."""
    from attngen import capture

    return capture.explain(model, example_inputs, kwargs, options or {})


def load(plan: str | Path, **options: Any) -> Callable[..., Any]:
    """A backend that makes the choices of a plan file (or of a directory that ``attngen optimize`` wrote).

    Use it as ``torch.compile(model, backend=attngen.load("DIR"))``. Raises ``BadPlan`` if it cannot be read.
    """
    from functools import partial

    from attngen import backend
    from attngen import plan as plan_files

    found = plan_files.read(plan)
    return partial(backend.attngen, options={"fp8": found.fp8, **options, "plan": str(plan)})


def record() -> AbstractContextManager[list[Report]]:
    """``with attngen.record() as reports:`` collects the ``Report`` of every graph compiled inside."""
    from attngen import report

    return report.record()
