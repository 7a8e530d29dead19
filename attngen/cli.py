"""The command line. Everything heavy is imported inside commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import attngen
from attngen import cli_cache, cli_tune
from attngen.commands import (
    CONVENTION,
    EXIT_CODES,
    Deterministic,
    Fp8,
    Json,
    Model,
    Only,
    Skip,
    Target,
    Traceback,
    Train,
    ending,
    opened,
    options_of,
    planned_for,
)  # fmt: skip
from attngen.errors import VerificationFailed

if TYPE_CHECKING:
    from attngen.report import Report

app = typer.Typer(
    help="Finds attention in PyTorch models by what it computes, and replaces it by generated Triton kernels.",
    epilog=EXIT_CODES,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

CHANGES = "Numbers of the problems"
Size = Annotated[int | None, typer.Option(metavar="N", rich_help_panel=CHANGES)]
Switch = Annotated[bool | None, typer.Option(rich_help_panel=CHANGES)]


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
    deterministic: Deterministic = False,
    fp8: Fp8 = "off",
    json: Json = False,
    traceback: Traceback = False,
) -> None:
    with ending(traceback):
        from attngen import output as outputs
        from attngen import plan, show, stages
        from attngen.page import document

        options = options_of(target, only, skip, traceback, deterministic=deterministic, fp8=fp8)
        folder = output or Path("attngen-out") / model.stem
        outputs.refuse_bad_cache()
        with outputs.staged(folder) as stage:
            progress = show.Progress(show.console(stderr=True))
            device, card = planned_for(progress, target)
            with opened(progress, model, train) as example:
                report, uses = stages.generated(progress, example, options)
            report = stages.tried(progress, report, uses, device, card)
            if failed := stages.failed(report):
                _print(report, json)
                raise VerificationFailed(failed)
            with progress.stage("write", str(folder)):
                plans = plan.of(report, [use.kernel for use in uses])
                kernels = [(use.kernel.name, use.kernel.source) for use in uses]
                text = plans.model_dump_json(indent=1)
                page = document.rendered(report, uses, device, model.name)
                outputs.write(stage, model.name, report.device, text, report.to_json(), page, kernels)
        _print(report, json)
        if not json:
            show.console().print(show.written(folder, report))


@app.command(help=f"Show what optimize would do and why; nothing is written.\n\n{CONVENTION}", epilog=EXIT_CODES)
def explain(
    model: Model,
    target: Target = "auto",
    only: Only = None,
    skip: Skip = None,
    formula: Annotated[bool, typer.Option("--formula", help="Print the cost formula with its numbers.")] = False,
    train: Train = False,
    deterministic: Deterministic = False,
    fp8: Fp8 = "off",
    json: Json = False,
    traceback: Traceback = False,
) -> None:
    with ending(traceback):
        from attngen import capture, show, stages

        options = options_of(target, only, skip, traceback, deterministic=deterministic, fp8=fp8)
        progress = show.Progress(show.console(stderr=True))
        with opened(progress, model, train) as example, progress.stage("analyse", "tracing the model") as stage:
            found = capture.explain(example.model, example.args, example.kwargs, options, may_run=True)
            report = stages.advised(found, example.model)
            stage.result = show.found(report)
        _print(report, json, formula=formula)


@app.command(
    help=f"Write one site of a model as a script of its own, to send with a report or to look at.\n\n{CONVENTION}",
    epilog=EXIT_CODES,
)
def minify(
    model: Model,
    site: Annotated[
        str, typer.Option("--site", metavar="PATH", help="The site, as explain names it: a module path or a line.")
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write; MODEL_SITE.py by default.")] = None,
    train: Train = False,
    traceback: Traceback = False,
) -> None:
    with ending(traceback):
        from attngen import minify as minifying
        from attngen import output as outputs
        from attngen import show

        file = output or outputs.named(model.stem, site)
        outputs.refuse_foreign_script(file)
        progress = show.Progress(show.console(stderr=True))
        with opened(progress, model, train) as example, progress.stage("minify", "tracing the model") as stage:
            made = minifying.run(example.model, example.args, example.kwargs, site, file.name)
            outputs.write_script(file, made.text)
            stage.result = f"{made.site.module or made.site.where}, {made.site.status}"
        if made.alone:
            show.console(stderr=True).print(f"Note: by itself the site has another outcome: {made.alone}.")
        show.console().print(f"Written to {file}. Run it: python {file}")


@app.command(epilog=EXIT_CODES)
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Problems, wildcards allowed: 'dense_d128_*'.")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Name every problem and every peer, and measure nothing.")] = False,
    peers: Annotated[str, typer.Option(help="Peers to run, separated by commas; all that suit by default.")] = "",
    device: Annotated[str, typer.Option(help="cuda; cpu runs the problems small, to try the command.")] = "auto",
    phase: Annotated[str, typer.Option(help="What is timed: forward, gradient (of it alone), or both.")] = "forward",
    rounds: Annotated[int, typer.Option(help="Interleaved calls of each peer.")] = 30,
    timeout: Annotated[float, typer.Option(help="Seconds that one step of a peer may take.")] = 600.0,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the record, problem by problem.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw TFLOP/s (PNG, PDF or SVG).")] = None,
    show: Annotated[list[Path] | None, typer.Option("--show", metavar="FILE", help="Show a record again.")] = None,
    batch: Size = None,
    heads: Size = None,
    kv_heads: Size = None,
    length: Size = None,
    key_length: Size = None,
    head_size: Size = None,
    value_size: Size = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.", rich_help_panel=CHANGES)] = None,
    causal: Switch = None,
    window: Size = None,
    prefix: Size = None,
    documents: Size = None,
    alibi: Switch = None,
    softcap: Annotated[float | None, typer.Option(rich_help_panel=CHANGES)] = None,
    bias: Switch = None,
    buckets: Size = None,
    sinks: Switch = None,
    sigmoid: Switch = None,
    dropout: Annotated[float | None, typer.Option(rich_help_panel=CHANGES)] = None,
    views: Switch = None,
    trained: Switch = None,
    traceback: Traceback = False,
) -> None:
    """Time attention beside every peer that is installed, each checked against float64 before its time counts.

    Without a NAME, dense causal attention of 4096 tokens; options change the numbers of every problem named.
    """
    given = locals()
    with ending(traceback):
        from attngen.bench import command

        if listing:
            command.listed()
        elif show:
            command.show(show, plot)
        else:
            changes = {name: given[name] for name in command.CHANGES}
            wanted = [name for name in peers.split(",") if name]
            command.run(command.Request(names or [], wanted, device, rounds, timeout, changes, phase, json, plot))


@app.command()
def info(traceback: Traceback = False) -> None:
    """Print versions, the GPUs of this machine, the devices that can be planned for, and the cache directory."""
    with ending(traceback):
        from attngen import info as information
        from attngen import show

        show.console().print(information.describe())


cli_tune.command(app)
app.add_typer(cli_cache.app, name="cache")


def main() -> None:
    app()


# --------------------------------------------------------------------------------------------------------------- stages


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
