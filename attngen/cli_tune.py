"""``attngen tune``: the tiles of a model's attention, measured on the GPU here. Heavy imports are inside functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attngen.commands import CONVENTION, EXIT_CODES, Fp8, Model, Only, Skip, Traceback, Train, ending, opened, options_of
from attngen.errors import BadOption, Unavailable, VerificationFailed

if TYPE_CHECKING:
    from attngen.cache.key import Wanted
    from attngen.device import Device
    from attngen.modelfile import Example
    from attngen.show import Progress
    from attngen.tune.tuner import Result, Tuner

HELP = "Measure the best few tiles of every site of a model on the GPU here, and keep what is fastest for later runs."


def tune(
    model: Model,
    full: Annotated[bool, typer.Option("--full", help="Measure four times as many tiles, and each more often.")] = False,
    seconds: Annotated[float, typer.Option(help="What it may take. Run it again to go on where it stopped.")] = 600.0,
    devices: Annotated[str, typer.Option(help="GPUs to spread the work over: auto (one), all, or numbers: 0,1.")] = "auto",
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again what has been measured.")] = False,
    only: Only = None,
    skip: Skip = None,
    train: Train = False,
    fp8: Fp8 = "off",
    traceback: Traceback = False,
) -> None:
    with ending(traceback):
        from attngen import show

        if seconds <= 0:
            raise BadOption("--seconds must be positive.")
        options = options_of("auto", only, skip, traceback, fp8=fp8)
        progress = show.Progress(show.console(stderr=True))
        device = _card(progress)
        tuners = _tuners(device, devices, "full" if full else "quick", seconds)
        with opened(progress, model, train) as example:
            questions = _wanted(progress, example, options)
        known = [] if refresh else [question for question in questions if _known(question)]
        left = [question for question in questions if question not in known]
        with _ahead(device, left, tuners):
            results = _measured(progress, left, tuners)
        _say(questions, known, results)


def command(app: typer.Typer) -> None:
    """Make it a command of ``app``."""
    app.command(help=f"{HELP}\n\n{CONVENTION}", epilog=EXIT_CODES)(tune)


def _card(progress: Progress) -> Device:
    with progress.console.status("loading torch"):
        import torch

        from attngen.device import probe
    if not torch.cuda.is_available():
        raise Unavailable(
            "there is no GPU here to measure on. Without one, the cost model chooses: attngen optimize. What was tuned on "
            "another machine can be used here: attngen cache export FILE there, attngen cache import FILE here."
        )
    return probe()


def _tuners(device: Device, devices: str, effort: Any, seconds: float) -> list[Tuner]:
    from attngen.tune.spread import cards
    from attngen.tune.tuner import Budget, Tuner

    return [Tuner(effort, Budget(seconds), card=card) for card in cards(devices, device)]


@contextmanager
def _ahead(device: Device, questions: list[Wanted], tuners: list[Tuner]) -> Iterator[None]:
    """While this lasts, candidates are compiled on all cores in the order of the questions, and what measures them is begun
    before it is needed. With one question there is nothing to be ahead of.
    """
    import os

    from attngen import compat
    from attngen.tune.compilers import Ahead, Compilers
    from attngen.tune.supervise import Spare

    if len(questions) < 2 or not isinstance(device.arch, int) or not compat.has_triton():
        yield
        return
    compilers = Compilers(max(1, (os.cpu_count() or 1) - len(tuners)), device.arch)
    ahead = Ahead(compilers.submit)
    spares = [Spare() for _ in tuners]
    try:
        for tuner, spare in zip(tuners, spares, strict=True):
            tuner.ahead, tuner.spare = ahead, spare
        for question in questions:
            ahead.begin(tuners[0].task(question))
        yield
    finally:
        compilers.close()
        for spare in spares:
            spare.close()


def _wanted(progress: Progress, example: Example, options: dict[str, Any]) -> list[Wanted]:
    """The distinct choices that the model asks for, in order."""
    from attngen import capture, show
    from attngen.cache.key import key_of
    from attngen.cache.lookup import Choices

    asked: dict[str, Wanted] = {}

    def record(wanted: Wanted) -> None:
        asked.setdefault(key_of(wanted).digest, wanted)

    with progress.stage("analyse", "tracing the model") as stage:
        choices = Choices(mode="skip", measure=record)
        report = capture.explain(example.model, example.args, example.kwargs, options, may_run=True, choices=choices)
        stage.result = f"{show.found(report)}, {show.counted(len(asked), 'choice')} to make"
    return list(asked.values())


def _known(wanted: Wanted) -> bool:
    from attngen.cache.lookup import tuned
    from attngen.cache.store import Store

    return tuned(wanted, Store()) is not None


def _measured(progress: Progress, questions: list[Wanted], tuners: list[Tuner]) -> list[Result]:
    """A line for each choice when it is made; how it stands meanwhile, on a terminal."""
    from rich.text import Text

    from attngen.tune.spread import spread

    def done(result: Result) -> None:
        progress.say(f"  {result.wanted.where}, {result.wanted.phase}: {_outcome(result)}")

    with progress.console.status(Text("tuning")) as status:
        for tuner in tuners:
            tuner.says = lambda wanted, text: status.update(Text(f"{wanted.where}, {wanted.phase}: {text}"))
        return spread(questions, tuners, done)


def _outcome(result: Result) -> str:
    from attngen.tune.tuner import listed

    if result.choice is None:
        return "not tuned"
    outcome = result.outcome
    lost = f", {len(outcome.failed)} lost" if outcome.failed else ""
    model = result.model_microseconds
    beside = "" if model is None else f" (the cost model's pick: {model:.1f} us)"
    of = f"best of {len(outcome.microseconds)}{lost}"
    return f"{listed(result.choice.tiles)} at {result.choice.microseconds:.1f} us{beside}, {of}"


def _say(questions: list[Wanted], known: list[Wanted], results: list[Result]) -> None:
    """The totals. Raises ``VerificationFailed`` if no candidate of some choice was right."""
    from attngen import show

    tuned = [result for result in results if result.choice is not None]
    wrong = [result for result in results if len(result.outcome.failed) == len(result.tried) > 0]
    broke = [result for result in results if result.choice is None and result.outcome.broke]
    left = len(questions) - len(known) - len(tuned) - len(wrong) - len(broke)
    again = f", {left} left for want of time: run it again" if left else ""
    show.console().print(f"{show.counted(len(tuned), 'choice')} tuned, {len(known)} known before{again}.")
    if wrong:
        lines = [f"{each.wanted.where}, {each.wanted.phase}: {'; '.join(each.outcome.failed.values())}" for each in wrong]
        raise VerificationFailed("no kernel could be measured:\n" + "\n".join(lines))
