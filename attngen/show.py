"""What the command line shows: progress on stderr, the table of sites and its summary on stdout."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import nn

from attngen.abbreviate import abbreviated
from attngen.aot import Binary
from attngen.errors import AttngenError
from attngen.report import Report, Same, SiteReport, groups, unnumbered
from attngen.verify import Check

MOST_REASONS, MOST_PLACES = 6, 4  # that are shown of sites left as they were
MOST_LOADS = 4  # that are explained
WIDEST = 90  # columns of an expression, however wide the terminal


def console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, markup=False)


# -------------------------------------------------------------------------------------------------------------- numbers


def size(count: float) -> str:
    """Bytes in decimal units, three digits: ``33.6 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:.0f} TB"


def milliseconds(value: float) -> str:
    return f"{value:.3f} ms" if value < 1 else f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# ---------------------------------------------------------------------------------------------------------------- table


def sites(report: Report) -> RenderableType:
    """The table of replaced (or found) sites, and under it those left alone with their reasons."""
    shown: list[RenderableType] = []
    if report.replaced:
        shown += [_replaced(groups(report.replaced)), Text()]
    if report.missed:
        shown += [_missed(groups(report.missed)), Text()]
    return Group(*shown)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _replaced(found: list[Same]) -> Table:
    table = _table("Site", "Kernel", "Per call")
    table.columns[1].no_wrap = table.columns[2].no_wrap = True
    table.columns[0].max_width = WIDEST
    for number, each in enumerate(found):
        if number:
            table.add_row()
        expression, *sizes = each.first.computes.rsplit(", ", 4)
        lines = [*abbreviated(expression), ", ".join(sizes)]
        site = _site(each).append("".join(f"\n{line}" for line in lines), style="not dim")
        table.add_row(Group(site, *_loads(each, expression)), _kernel(each.first), _per_call(each.first))
    return table


def _loads(each: Same, expression: str) -> list[Text]:
    """What the tensors are that the expression names, a line for each."""
    named = [name for name in each.first.loads if re.search(rf"\b{name}\b", expression)]
    lines = [f"{name} is {each.first.loads[name]}".replace(f" {each.first.module}.", " its ") for name in named[:MOST_LOADS]]
    return [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in lines]


def _missed(found: list[Same]) -> Table:
    """By reason, those of most sites first: where, at which line of code, and what would help."""
    reasons: dict[str, list[Same]] = {}
    for each in found:
        reasons.setdefault(unnumbered(each.first.reason), []).append(each)
    most = sorted(reasons.items(), key=lambda item: -sum(len(each.sites) for each in item[1]))
    table = _table("Left as it was")
    table.columns[0].max_width = WIDEST
    for number, (reason, places) in enumerate(most[:MOST_REASONS]):
        if number:
            table.add_row()
        table.add_row(Text(reason, style="yellow"))
        for each in places[:MOST_PLACES]:
            table.add_row(_left(each))
        if len(places) > MOST_PLACES:
            table.add_row(_more(places[MOST_PLACES:], "with this reason"))
        if advice := places[0].first.advice:
            table.add_row(Padding(Text(f"-> {advice}"), (0, 0, 0, 2)))
    if rest := [each for _, places in most[MOST_REASONS:] for each in places]:
        table.add_row()
        table.add_row(_more(rest, "with other reasons"))
    return table


def _left(each: Same) -> RenderableType:
    """Where, and the code of the line that the reason is about."""
    lines = [Padding(_site(each, "  "), (0, 0, 0, 2))]
    blamed = each.first.blamed
    if blamed is not None and blamed["code"]:
        line = f"{Path(blamed['file']).name}:{blamed['line']}"
        text = blamed["code"] if line == each.line else f"{line}  {blamed['code']}"
        lines.append(Padding(Text(text, style="dim", no_wrap=True, overflow="ellipsis"), (0, 0, 0, 4)))
    return Group(*lines)


def _more(places: list[Same], which: str) -> Text:
    count = sum(len(each.sites) for each in places)
    return Text(f"  and {counted(count, 'more site')} {which} (--json lists all)", style="dim")


def _site(each: Same, before_line: str = "\n") -> Text:
    text = Text.assemble((each.path or each.line, "cyan"))
    if len(each.sites) > 1:
        text.append(f"  x{len(each.sites)}", style="bold")
    if each.path and each.line:
        text.append(f"{before_line}{each.line}", style="dim not bold")
    return text


def _kernel(site: SiteReport) -> Text:
    lines = [site.kernel, site.tile] if site.kernel else [site.tile]
    if site.compiled is not None:
        lines.append(f"{site.compiled['registers']} registers")
        if site.compiled["spills"]:
            lines.append(f"{site.compiled['spills']} B spilled")
    return Text("\n".join(lines))


def _per_call(site: SiteReport) -> Text:
    lines = []
    if site.predicted_ms is not None:
        lines.append(milliseconds(site.predicted_ms))
    if site.measured_ms is not None:
        lines.append(f"measured {milliseconds(site.measured_ms)}")
    if site.hbm_bytes is not None:
        lines.append(f"{size(site.hbm_bytes['before'])} -> {size(site.hbm_bytes['after'])}")
    if site.error is not None:
        lines.append(f"error {site.error:.1e}")
        lines.append(f"  of {site.budget:.1e}")
    return Text("\n".join(lines))


# -------------------------------------------------------------------------------------------------------------- summary


def summary(report: Report) -> Text:
    """One paragraph of totals."""
    if not report.sites:
        looked = "the part of this model that was looked at" if report.partial else "this model"
        return Text(f"No attention was found in {looked}; nothing to replace.")
    if not report.replaced:
        as_it_was = "it was" if len(report.missed) == 1 else "they were"
        return Text(f"Nothing was replaced: {counted(len(report.missed), 'site')} left as {as_it_was}, see above.")
    verb = "can be replaced" if report.replaced[0].status == "found" else "replaced"
    time_ms = sum(site.predicted_ms or 0 for site in report.replaced)
    before, after = (sum((site.hbm_bytes or {}).get(which, 0) for site in report.replaced) for which in ("before", "after"))
    kernels = len({site.kernel for site in report.replaced if site.kernel})
    by = f" by {counted(kernels, 'kernel')}" if kernels else ""
    factor = f", {before / after:.0f}x less" if after and before >= 2 * after else ""
    return Text.assemble(
        (f"{len(report.replaced)} of {counted(len(report.sites), 'site')} {verb}{by}.", "bold green"),
        f" Predicted for {report.device}: {milliseconds(time_ms)} of attention per call of the model,"
        f" HBM traffic {size(before)} -> {size(after)}{factor}.",
    )


def formulas(report: Report) -> RenderableType:
    """The cost formula of each group, with its numbers, line by line."""
    shown: list[RenderableType] = []
    for each in groups(report.replaced):
        shown.append(Text(f"{each.path}: tile {each.first.tile}", style="bold"))
        shown += [Text(f"  {line}") for line in each.first.formula]
        shown += [Text(f"  refused {line}", style="dim") for line in each.first.refused]
        shown.append(Text())
    return Group(*shown)


def found(report: Report) -> str:
    left = f", {len(report.missed)} left as {'it was' if len(report.missed) == 1 else 'they were'}" if report.missed else ""
    return f"{counted(len(report.replaced), 'site')} found{left}"


def model(value: object) -> str:
    """The class of a module and how many parameters it has, or the name of a function."""
    if not isinstance(value, nn.Module):
        return f"{getattr(value, '__name__', type(value).__name__)}()"
    count = sum(parameter.numel() for parameter in value.parameters())
    number = str(count) if count < 1e5 else f"{count / 1e6:.3g} M" if count < 1e9 else f"{count / 1e9:.3g} G"
    return f"{type(value).__name__}, {number} parameters"


def binaries(values: Collection[Binary | AttngenError]) -> str:
    built = [value for value in values if isinstance(value, Binary)]
    if len(built) < len(values):
        return f"{len(values) - len(built)} failed"
    spilling = sum(value.spills > 0 for value in built)
    spills = f"{spilling} of them spill" if spilling else "no spills"
    return f"at most {max(value.registers for value in built)} registers, {spills}"


def verdict(values: Collection[Check | AttngenError]) -> str:
    failed = sum(isinstance(value, AttngenError) for value in values)
    return f"{failed} failed" if failed else "within the error budget"


def written(folder: Path, report: Report) -> Text:
    """What was written, and how to use it where there is anything to use."""
    text = Text(f"Written to {folder}: report.html, kernels/, plan.json, report.json, load.py.", "bold")
    use = f'\nUse it: torch.compile(model, backend=attngen.load("{folder}"))'
    return Text.assemble(text, use if report.replaced else "")


# ------------------------------------------------------------------------------------------------------------- progress


@dataclass
class Stage:
    """A stage that is running; ``result`` is what its line will say."""

    doing: str
    result: str = ""


@dataclass(frozen=True)
class Progress:
    """Stages on stderr: a spinner while one runs on a terminal, one line when it is done."""

    console: Console

    def say(self, text: str) -> None:
        self.console.print(Text(text))

    @contextmanager
    def stage(self, name: str, doing: str, *, started: float | None = None) -> Iterator[Stage]:
        started = time.perf_counter() if started is None else started
        stage = Stage(doing)
        with self.console.status(Text(f"{name}: {doing}")):
            yield stage
        line = Text(f"  {name:<8}", style="bold").append(stage.result or doing, style="not bold")
        line.append(f"  {time.perf_counter() - started:.1f} s", style="dim not bold")
        self.console.print(line)
