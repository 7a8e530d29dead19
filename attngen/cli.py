"""The command line. Everything heavy is imported inside commands."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import attngen
from attngen.errors import AttngenError, Unavailable, VerificationFailed

if TYPE_CHECKING:
    from attngen import trial
    from attngen.aot import Compilation
    from attngen.device import Device
    from attngen.modelfile import Example
    from attngen.prepare import Use
    from attngen.report import Report
    from attngen.show import Progress

CONVENTION = """\
MODEL is a Python file of yours. attngen RUNS it, as an import does: all but what stands under
`if __name__ == "__main__":`. Two names are then taken from it:

[b]model[/b], a module or a function, or [b]get_model()[/b];

[b]example_inputs[/b], a tuple of arguments, one tensor, or a dict of keyword arguments, or [b]get_example_inputs()[/b].
"""
EXIT_CODES = """\
Exit codes: 0 done (even if every site was left as it was), 1 internal error, 2 bad option or unknown target,
3 bad model file, 4 the model cannot be traced, 5 output cannot be written, 6 bad plan file,
7 a kernel failed verification, 8 something needed is not available.
"""

app = typer.Typer(
    help="Finds attention in PyTorch models by what it computes, and replaces it by generated Triton kernels.",
    epilog=EXIT_CODES,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Python file with a model and inputs. It is run.")]
Target = Annotated[
    str, typer.Option(help="Device to plan for, as 'attngen info' lists them; auto is the GPU here, else h200.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout and nothing else there.")]
Only = Annotated[list[str] | None, typer.Option(help="Replace only sites whose module path matches, e.g. 'layers.0.*'.")]
Skip = Annotated[list[str] | None, typer.Option(help="Leave sites whose module path matches.")]
Train = Annotated[bool, typer.Option("--train", help="Plan for training: gradients will be asked for.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attngen {attngen.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# ------------------------------------------------------------------------------------------------------------- commands


@app.command(
    help=f"Replace the attention of a model by generated kernels and write them down.\n\n{CONVENTION}",
    epilog=EXIT_CODES,
)
def optimize(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Directory to write; attngen-out/NAME by default.")
    ] = None,
    target: Target = "auto",
    only: Only = None,
    skip: Skip = None,
    train: Train = False,
    json: Json = False,
    traceback: Traceback = False,
) -> None:
    with _ending(traceback):
        from attngen import output as outputs
        from attngen import plan, show

        options = _options(target, only, skip, traceback)
        folder = output or Path("attngen-out") / model.stem
        outputs.refuse_bad_cache()
        with outputs.staged(folder) as stage:
            progress = show.Progress(show.console(stderr=True))
            device, card = _planned_for(progress, target)
            with _read(progress, model, train) as example:
                report, uses = _generated(progress, example, options)
            report = _tried(progress, report, uses, device, card)
            if failed := _failed(report):
                _print(report, json)
                raise VerificationFailed(failed)
            with progress.stage("write", str(folder)):
                plans = plan.of(report, [use.kernel for use in uses])
                kernels = [(use.kernel.name, use.kernel.source) for use in uses]
                text = plans.model_dump_json(indent=1)
                outputs.write(stage, model.name, report.device, text, report.to_json(), kernels)
        _print(report, json)
        if not json:
            show.console().print(show.written(folder))


@app.command(help=f"Show what optimize would do and why; nothing is emitted.\n\n{CONVENTION}", epilog=EXIT_CODES)
def explain(
    model: Model,
    target: Target = "auto",
    only: Only = None,
    skip: Skip = None,
    formula: Annotated[bool, typer.Option("--formula", help="Print the cost formula with its numbers.")] = False,
    train: Train = False,
    json: Json = False,
    traceback: Traceback = False,
) -> None:
    with _ending(traceback):
        from attngen import capture, show

        options = _options(target, only, skip, traceback)
        progress = show.Progress(show.console(stderr=True))
        with _read(progress, model, train) as example, progress.stage("analyse", "tracing the model") as stage:
            found = capture.explain(example.model, example.args, example.kwargs, options, may_run=True)
            report = _advice(found, example.model)
            stage.result = show.found(report)
        _print(report, json, formula=formula)


@app.command()
def info(traceback: Traceback = False) -> None:
    """Print versions, the GPUs of this machine, the devices that can be planned for, and the cache directory."""
    with _ending(traceback):
        from attngen import info as information
        from attngen import show

        show.console().print(information.describe())


def main() -> None:
    app()


# --------------------------------------------------------------------------------------------------------------- stages


def _options(target: str, only: list[str] | None, skip: list[str] | None, traceback: bool) -> dict[str, Any]:
    """Options of the backend. Checked here, before any work."""
    from attngen import device, options

    if target != "auto":
        device.resolve(target)
    chosen = {"target": target, "only": only or [], "skip": skip or [], "strict": traceback}
    options.parse(chosen)
    return chosen


def _planned_for(progress: Progress, target: str) -> tuple[Device, str | None]:
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
    progress.say(f"Planning for {device.label} ({why}). Kernels are {how}checked in Triton's interpreter at small sizes.")
    return device, None


@contextmanager
def _read(progress: Progress, path: Path, train: bool) -> Iterator[Example]:
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
    """Torch logs tracebacks of errors that it then raises; our message says what matters, unless TORCH_LOGS is set."""
    logger = logging.getLogger("torch")
    level = logger.level
    if "TORCH_LOGS" not in os.environ:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _advice(report: Report, model: object) -> Report:
    """With a note, if sites were missed for dropout that nobody may have wanted."""
    dropout = any("dropped" in site.reason or "dropout" in site.reason for site in report.missed)
    if not dropout or not getattr(model, "training", False):
        return report
    note = "The model is in training mode, so dropout is active. For inference, call model.eval() in the file."
    return replace(report, notes=(*report.notes, note))


def _generated(progress: Progress, example: Example, options: dict[str, Any]) -> tuple[Report, list[Use]]:
    from attngen import capture, show

    with progress.stage("analyse", "tracing the model") as stage:
        report, uses = capture.generate(example.model, example.args, example.kwargs, options)
        stage.result = f"{show.found(report)}, {show.counted(len(uses), 'kernel')} emitted"
    return _advice(report, example.model), uses


def _tried(progress: Progress, report: Report, uses: list[Use], device: Device, card: str | None) -> Report:
    """The report with what became of its kernels: compiled in child processes, and checked."""
    from attngen import trial

    if not uses:
        return report
    started = time.perf_counter()
    notes: list[str] = []
    binaries: trial.Binaries = {}
    results: trial.Results = {}
    try:
        compilation = trial.begin(uses, device)
    except Unavailable as why:
        compilation = None
        notes.append(f"Not compiled ahead of time: {why}")
    if compilation is not None and card is not None:  # so that what runs on the card comes from the disk
        binaries = _compiled(progress, compilation, uses, device, started)
    try:
        results = _checked(progress, uses, card)
    except Unavailable as why:
        notes.append(f"Not verified: {why}")
    if compilation is not None and card is None:
        binaries = _compiled(progress, compilation, uses, device, started)
    return replace(trial.applied(report, results, binaries), notes=(*report.notes, *notes))


def _compiled(
    progress: Progress, compilation: Compilation, uses: list[Use], device: Device, started: float
) -> trial.Binaries:
    from attngen import show

    with progress.stage("compile", f"{show.counted(len(uses), 'kernel')} for sm_{device.arch}", started=started) as stage:
        binaries = dict(zip((use.kernel.name for use in uses), compilation.results(), strict=True))
        stage.result = f"{stage.doing}: {show.binaries(binaries.values())}"
    return binaries


def _checked(progress: Progress, uses: list[Use], card: str | None) -> trial.Results:
    from attngen import show, trial

    place = "on the GPU" if card else "in Triton's interpreter"
    with progress.stage("verify", f"{show.counted(len(uses), 'kernel')} {place}") as stage:
        results = trial.check(uses, card)
        half = "" if card else trial.substitution(uses)
        stage.result = f"{stage.doing}{half}: {show.verdict(results.values())}"
    return results


def _failed(report: Report) -> str:
    """What to say of the sites whose kernel does not compile or is off; empty if there are none."""
    from attngen import paths, show, trial

    failed = show.groups([site for site in report.missed if site.reason.startswith(trial.FAILED)])
    if not failed:
        return ""
    lines = "\n".join(f"  {each.path or each.line}: {each.first.kernel}: {each.first.reason}" for each in failed)
    kernels = show.counted(len({each.first.kernel for each in failed}), "kernel")
    return f"{kernels} failed, so nothing was written. Their text is in {paths.cache_dir() / 'kernels'}.\n{lines}"


def _print(report: Report, json: bool, *, formula: bool = False) -> None:
    from attngen import show

    if json:
        typer.echo(report.to_json())
        return
    out = show.console()
    out.print()
    out.print(show.sites(report))
    if formula:
        out.print(show.formulas(report))
    for note in report.notes:
        out.print(f"Note: {note}")
    out.print(show.summary(report))


@contextmanager
def _ending(traceback: bool) -> Iterator[None]:
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
