"""The stages of ``attngen optimize`` after reading the model: generate, compile, verify; each with its line of progress."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from attngen import capture, paths, show, trial
from attngen.aot import Compilation
from attngen.device import Device
from attngen.errors import Unavailable
from attngen.modelfile import Example
from attngen.prepare import Use
from attngen.report import Report, groups
from attngen.show import Progress


def advised(report: Report, model: object) -> Report:
    """With a note, if a site has dropout that nobody may have wanted."""
    dropout = any("dropped" in site.reason or "random" in site.computes for site in report.sites)
    if not dropout or not getattr(model, "training", False):
        return report
    note = "The model is in training mode, so dropout is active. For inference, call model.eval() in the file."
    return replace(report, notes=(*report.notes, note))


def generated(progress: Progress, example: Example, options: dict[str, Any]) -> tuple[Report, list[Use]]:
    with progress.stage("analyse", "tracing the model") as stage:
        report, uses = capture.generate(example.model, example.args, example.kwargs, options)
        stage.result = f"{show.found(report)}, {show.counted(len(uses), 'kernel')} emitted"
    return advised(report, example.model), uses


def tried(progress: Progress, report: Report, uses: list[Use], device: Device, card: str | None) -> Report:
    """The report with what became of its kernels: compiled in child processes, and checked."""
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
    with progress.stage("compile", f"{show.counted(len(uses), 'kernel')} for sm_{device.arch}", started=started) as stage:
        binaries = dict(zip((use.kernel.name for use in uses), compilation.results(), strict=True))
        stage.result = f"{stage.doing}: {show.binaries(binaries.values())}"
    return binaries


def _checked(progress: Progress, uses: list[Use], card: str | None) -> trial.Results:
    place = "on the GPU" if card else f"in {trial.places(uses)}"
    with progress.stage("verify", f"{show.counted(len(uses), 'kernel')} {place}") as stage:
        results = trial.check(uses, card)
        half = "" if card else trial.substitution(uses)
        stage.result = f"{stage.doing}{half}: {show.verdict(results.values())}"
    return results


def failed(report: Report) -> str:
    """What to say of the sites whose kernel does not compile or is off; empty if there are none."""
    sites = groups([site for site in report.missed if site.reason.startswith(trial.FAILED)])
    if not sites:
        return ""
    lines = "\n".join(f"  {each.path or each.line}: {each.first.kernel}: {each.first.reason}" for each in sites)
    kernels = show.counted(len({each.first.kernel for each in sites}), "kernel")
    return f"{kernels} failed, so nothing was written. Their text is in {paths.cache_dir() / 'kernels'}.\n{lines}"
