"""What commands share: options, how a model is read, how an error ends the program. Heavy imports are inside functions."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attngen.errors import AttngenError

if TYPE_CHECKING:
    from attngen.device import Device
    from attngen.modelfile import Example
    from attngen.show import Progress

CONVENTION = """\
MODEL is a Python file of yours. attngen RUNS it, as an import does: all but what stands under
`if __name__ == "__main__":`. Two names are then taken from it:

[b]model[/b], a module or a function, or [b]get_model()[/b];

[b]example_inputs[/b], a tuple of arguments, one tensor, or a dict of keyword arguments, or [b]get_example_inputs()[/b].
"""
EXIT_CODES = """\
Exit codes: 0 done (even if every site was left as it was), 1 internal error, 2 bad option or unknown target,
3 bad model file, 4 the model cannot be traced, 5 output cannot be written, 6 bad plan or cache file,
7 a kernel failed verification, 8 something needed is not available, 9 nothing is tuned where the cache must have it.
"""

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Python file with a model and inputs. It is run.")]
Target = Annotated[
    str, typer.Option(help="Device to plan for, as 'attngen info' lists them; auto is the GPU here, else h200.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout and nothing else there.")]
Only = Annotated[list[str] | None, typer.Option(help="Replace only sites whose module path matches, e.g. 'layers.0.*'.")]
Skip = Annotated[list[str] | None, typer.Option(help="Leave sites whose module path matches.")]
Train = Annotated[bool, typer.Option("--train", help="Plan for training: gradients will be asked for.")]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Plan for gradients that are the same bits in every run; with --train.")
]
Fp8 = Annotated[str, typer.Option("--fp8", help="Inference in products of 8-bit numbers: off, block (scales), or rotate.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")]


def options_of(
    target: str, only: list[str] | None, skip: list[str] | None, traceback: bool,
    *, deterministic: bool = False, fp8: str = "off",
) -> dict[str, Any]:  # fmt: skip
    """Options of the backend. Checked here, before any work."""
    from attngen import device, options

    if target != "auto":
        device.resolve(target)
    chosen = {
        "target": target, "only": only or [], "skip": skip or [], "deterministic": deterministic, "fp8": fp8,
        "strict": traceback,
    }  # fmt: skip
    options.parse(chosen)
    return chosen


def planned_for(progress: Progress, target: str) -> tuple[Device, str | None]:
    """The device, said aloud, and the GPU of this machine if that is the device."""
    with progress.console.status("loading torch"):
        import torch

        from attngen.device import probe, resolve

        device = resolve(target)
    here = torch.cuda.is_available()
    if here and probe() == device:
        progress.say(f"Planning for the {device.label} here. Kernels are checked on it, at the sizes of the model.")
        return device, "cuda"
    why = f"not the {probe().label} here" if here else "no GPU here" if target == "auto" else "not here"
    how = f"compiled ahead of time for sm_{device.arch} and " if isinstance(device.arch, int) else ""
    progress.say(f"Planning for {device.label} ({why}). Kernels are {how}checked at small sizes on the CPU.")
    return device, None


@contextmanager
def opened(progress: Progress, path: Path, train: bool) -> Iterator[Example]:
    """The user's file, run; what it prints, then and later, goes to stderr."""
    import torch

    from attngen import modelfile, show

    with ExitStack() as until_done:
        until_done.enter_context(redirect_stdout(sys.stderr))
        until_done.enter_context(_quiet_torch())
        with progress.stage("read", f"running {path}") as stage:
            example = until_done.enter_context(modelfile.opened(path))
            stage.result = show.model(example.model)
        until_done.enter_context(torch.set_grad_enabled(train))
        yield example


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Torch logs tracebacks of errors that it then raises, and warns of how it traces; our message says what matters, unless
    TORCH_LOGS is set."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings():
        if "TORCH_LOGS" not in os.environ:
            logger.setLevel(logging.CRITICAL)
            warnings.filterwarnings("ignore", module=r"torch\b|<string>")
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def ending(traceback: bool) -> Iterator[None]:
    """Every error as one message on stderr, with the exit code that belongs to it."""
    import traceback as tracebacks

    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as problem:  # the one place that ends the program
        if traceback:
            tracebacks.print_exc()
        known = isinstance(problem, AttngenError)
        text = (
            str(problem) if known else f"internal error: {type(problem).__name__}: {problem}\nPass --traceback to see where."
        )
        typer.secho(f"error: {text}", fg="red", err=True)
        raise typer.Exit(problem.exit_code if isinstance(problem, AttngenError) else 1) from None
