"""``attngen cache``: what was tuned, listed, carried to other machines, and cleared. Heavy imports are inside commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attngen.commands import EXIT_CODES, Traceback, ending
from attngen.errors import BadCache, BadOption

if TYPE_CHECKING:
    from rich.table import Table

    from attngen.cache.files import Entries

app = typer.Typer(
    help="Choices that 'attngen tune' measured: list them, and carry them to other machines.", no_args_is_help=True
)

Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="What 'attngen cache export' wrote.")]
Device = Annotated[str | None, typer.Option(help="Only entries of this device, e.g. h200.")]
MOST_SHOWN = 5  # of what is wrong with a file


@app.command("list", epilog=EXIT_CODES)
def listed(device: Device = None, traceback: Traceback = False) -> None:
    """One line for each tuned choice of this user."""
    with ending(traceback):
        from attngen import show
        from attngen.cache.contents import contents
        from attngen.cache.store import Store

        found = contents(Store())
        chosen = _of(found.entries, device)
        if chosen:
            show.console().print(_table(chosen))
        wrong = f", {len(found.wrong)} damaged (attngen cache verify)" if found.wrong else ""
        show.console().print(f"{show.counted(len(chosen), 'tuned choice')}{wrong} in {Store().path}")


@app.command("show", epilog=EXIT_CODES)
def shown(
    number: Annotated[str, typer.Argument(metavar="ID", help="As list shows it, or how it begins.")],
    traceback: Traceback = False,
) -> None:
    """All of one entry, as JSON."""
    with ending(traceback):
        from attngen.cache.contents import beginning, contents
        from attngen.cache.store import Store

        entries = contents(Store()).entries
        digests = beginning(entries, number)
        if len(digests) != 1:
            raise BadOption(f"{len(digests)} entries begin with {number!r}. See: attngen cache list")
        typer.echo(entries[digests[0]].model_dump_json(indent=1))


@app.command(epilog=EXIT_CODES)
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON to write.")],
    device: Device = None,
    traceback: Traceback = False,
) -> None:
    """Write the tuned choices of this user to a file that other machines can import."""
    with ending(traceback):
        from attngen import show
        from attngen.cache import files
        from attngen.cache.contents import contents
        from attngen.cache.store import Store

        chosen = _of(contents(Store()).entries, device)
        files.written(file, chosen.values())
        show.console().print(f"{show.counted(len(chosen), 'tuned choice')} written to {file}")


@app.command("import", epilog=EXIT_CODES)
def imported(paths: Files, traceback: Traceback = False) -> None:
    """Add the entries of files; of two for the same kernel on the same device the faster one stays."""
    with ending(traceback):
        from attngen import show
        from attngen.cache.contents import take
        from attngen.cache.store import Store

        found = _read(paths)
        taken = take(Store(), found)
        show.console().print(f"{taken.new} new, {taken.faster} faster than before, {taken.slower} not")


@app.command(epilog=EXIT_CODES)
def merge(
    paths: Files,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="JSON to write.")],
    traceback: Traceback = False,
) -> None:
    """Write the entries of several files to one; of two for the same kernel on the same device the faster one."""
    with ending(traceback):
        from attngen import show
        from attngen.cache import files

        found = _read(paths)
        files.written(output, found.values())
        show.console().print(f"{show.counted(len(found), 'tuned choice')} written to {output}")


@app.command(epilog=EXIT_CODES)
def prune(
    everything: Annotated[bool, typer.Option("--all", help="Take out all that there is.")] = False,
    traceback: Traceback = False,
) -> None:
    """Take out entries that are damaged, or were made with other versions than those installed."""
    with ending(traceback):
        from attngen import show
        from attngen.cache import contents
        from attngen.cache.store import Store

        gone = contents.prune(Store(), (lambda entry: "asked for") if everything else contents.outdated)
        show.console().print(f"{show.counted(len(gone), 'tuned choice')} taken out")


@app.command(epilog=EXIT_CODES)
def verify(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Files to look at, instead of this user's cache.")
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Look at every entry: well formed, unchanged since it was written, and a tile that attngen would try."""
    with ending(traceback):
        from attngen import show
        from attngen.cache.contents import contents, unknown
        from attngen.cache.files import read
        from attngen.cache.store import Store

        count, wrong = 0, list[str]()
        if paths:
            pairs = [(str(path), *read(path)) for path in paths]
        else:
            found = contents(Store())
            pairs = [(str(Store().path), found.entries, [f"{digest}: {why}" for digest, why in found.wrong.items()])]
        for name, entries, damaged in pairs:
            count += len(entries)
            odd = [f"{digest}: {why}" for digest, entry in entries.items() if (why := unknown(entry))]
            wrong += [f"{name}: {each}" for each in (*damaged, *odd)]
        if wrong:
            raise BadCache("\n".join(wrong))
        show.console().print(f"{show.counted(count, 'tuned choice')}, nothing wrong")


def _read(paths: list[Path]) -> Entries:
    """The entries of all files; what is wrong with some of them is said on stderr."""
    from attngen.cache.files import merged, read

    found: Entries = {}
    for path in paths:
        entries, wrong = read(path)
        found = merged(found, entries)
        for each in wrong[:MOST_SHOWN]:
            typer.echo(f"{path}: {each}: left out", err=True)
        if len(wrong) > MOST_SHOWN:
            typer.echo(f"{path}: and {len(wrong) - MOST_SHOWN} more left out", err=True)
    return found


def _of(entries: Entries, device: str | None) -> Entries:
    """``device`` by its name or as the driver has it."""
    from attngen.device import DEVICES

    label = DEVICES[device].label if device in DEVICES else device
    return {digest: entry for digest, entry in entries.items() if label in (None, entry.key.device)}


def _table(entries: Entries) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in ("ID", "Device", "", "Heads", "Sizes", "Tile", "us", "model's"):
        table.add_column(column, overflow="fold")
    for digest, entry in entries.items():
        key = entry.key
        tiles = ", ".join(map(str, entry.chosen))
        model = "" if entry.model_microseconds is None else f"{entry.model_microseconds:.1f}"
        row = (key.device, f"{key.phase}, {key.dtype}", f"{key.heads}", f"{key.rows} x {key.keys}", tiles)
        table.add_row(digest, *row, f"{entry.microseconds:.1f}", model)
    return table
