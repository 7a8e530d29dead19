"""A record as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attngen.bench.peers import OURS, PEERS
from attngen.bench.problems import PROBLEMS
from attngen.bench.records import TIMED, WRONG, Record, Result, Row
from attngen.bench.terms import BOTH, FORWARD, GRADIENT
from attngen.show import milliseconds

COLUMNS = ("Peer", "Time", "+-", "TFLOP/s", "Product", "Copy", "To ours", "Error")
TITLES = {FORWARD: "forward", GRADIENT: "gradient", BOTH: "forward and gradient"}


def shown(record: Record) -> RenderableType:
    """A table for each problem, the machine under them."""
    parts: list[RenderableType] = []
    for result in record.results:
        parts += [result_table(result), Text()]
    return Group(*parts, _machine(record))


def result_table(result: Result) -> RenderableType:
    """Timed peers, the fastest first, and under them the others with the reason. Product and Copy are shares of the
    ceilings, To ours is a time over ours, and Error a share of its budget; where budgets are of 8 and of 16 bits, the errors
    themselves are below."""
    phase = "" if result.phase == FORWARD else f"  {TITLES[result.phase]}:"
    title = Text.assemble((result.problem.name, "bold cyan"), f"{phase}  {result.problem}")
    table = _table(*COLUMNS)
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column is table.columns[0] else "right"
    ours = next((row.ms for row in result.rows if row.peer == OURS), None)
    for row in sorted(result.rows, key=lambda row: row.ms or float("inf")):
        if row.status == TIMED:
            table.add_row(*_cells(row, ours), style="bold" if row.peer == OURS else "")
    notes = [_note(row) for row in result.rows if row.status != TIMED or row.kernel]
    errors = [f"{row.peer} {row.rms:.2e}" for row in result.rows if row.status == TIMED and row.rms is not None]
    if any(row.peer in PEERS and PEERS[row.peer].eighths for row in result.rows):
        notes.append(Text(f"  RMS error: {', '.join(errors)}", style="dim"))
    return Group(title, table, *notes)


def _cells(row: Row, ours: float | None) -> list[str]:
    assert row.ms is not None and row.ms_low is not None and row.ms_high is not None
    spread = (row.ms_high - row.ms_low) / row.ms / 2
    ratio = "-" if ours is None or row.peer == OURS else f"{row.ms / ours:.2f}x"
    return [
        row.peer,
        milliseconds(row.ms),
        _share(spread),
        f"{row.tflops:.3g}",
        _share(row.of_product or 0),
        _share(row.of_copy or 0),
        ratio,
        _share((row.error or 0) / row.budget if row.budget else 0.0),
    ]


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _note(row: Row) -> Text:
    style = "red" if row.status == WRONG else "dim"
    reason = {WRONG: row.reason, TIMED: row.kernel}.get(row.status, f"{row.status}: {row.reason}")
    return Text.assemble((f"  {row.peer:<15}", "bold"), (reason, style))


def _machine(record: Record) -> Text:
    rates = [
        f"{dtype} product {each['product'] / 1e12:.3g} TFLOP/s, copy {each['copy'] / 1e9:.4g} GB/s"
        for dtype, each in record.ceilings.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return Text(f"{record.device}. Ceilings measured in this run: {'; '.join(rates)}.\n{versions}.", style="dim")


def listing() -> RenderableType:
    """Every problem and every peer that has a name."""
    problems = _table("Problem", "Computes")
    for problem in PROBLEMS.values():
        problems.add_row(problem.name, str(problem))
    peers = _table("Peer", "Is")
    for peer in PEERS.values():
        where = "" if peer.default else " (only if named)"
        peers.add_row(peer.name, peer.describes + where)
    return Group(problems, Text(), peers)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def wrong(records: Sequence[Record]) -> list[str]:
    """Problems at which our own result is wrong."""
    return [
        f"{result.problem.name}: {row.reason}"
        for record in records
        for result in record.results
        for row in result.rows
        if row.peer == OURS and row.status == WRONG
    ]
