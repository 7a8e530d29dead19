"""The README names what users can ask for and what tools read: all of it, and nothing else."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from attngen.cli import app
from attngen.commands import EXIT_CODES
from attngen.options import Options
from attngen.report import SiteReport

README = (Path(__file__).parent.parent / "README.md").read_text()
# Other programs read these, whatever else a site of a report holds.
STABLE = {"where", "status", "reason", "computes", "family", "tile", "predicted_ms", "hbm_bytes", "error", "budget"}


def paragraph(start: str) -> str:
    """From ``start`` to the next empty line."""
    return README[README.index(start) :].split("\n\n")[0]


def test_options() -> None:
    rows = [line.split("|")[1] for line in paragraph("| option | meaning |").splitlines()[2:]]
    assert sorted(re.findall(r"`(\w+)`", "".join(rows))) == sorted(Options.model_fields)


def test_commands() -> None:
    shown = set(re.findall(r"^attngen (\w+)", paragraph("attngen explain model.py [--formula]"), re.MULTILINE))
    commands = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert shown == commands | {group.name for group in app.registered_groups}


def test_exit_codes() -> None:
    told, shown = (re.findall(r"\b(\d)\s[a-z]", text) for text in (paragraph("Exit codes: 0 done"), EXIT_CODES))
    assert told == [code for code in shown if code != "1"]  # an internal error, which nobody should plan for


def test_fields_of_a_site() -> None:
    named = set(re.findall(r"`(\w+)`", paragraph("A report holds for each site").split("; `--json`")[0]))
    assert named <= {field.name for field in fields(SiteReport)}
    assert named >= STABLE
