"""Tuned choices as JSON: what ``attngen cache export`` writes, and the files for known devices that come with attngen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from attngen import paths
from attngen.cache.entry import Entry, parsed
from attngen.errors import BadCache, CannotWrite, say_once
from attngen.plan import Record, fault

LARGEST = 64 << 20  # bytes of a file
SHIPPED = "attngen.tuned"

Entries = dict[str, Entry]  # by the digest of their keys


class CacheFile(Record):
    """``entries`` are validated one by one: those that are wrong are left out."""

    attngen_cache: Literal[1]
    entries: list[dict[str, Any]] = Field(max_length=1_000_000)


def read(path: str | Path) -> tuple[Entries, list[str]]:
    """The sound entries of a file, and what is wrong with each of the others. Raises ``BadCache`` if it is no such file."""
    try:
        if Path(path).stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST >> 20} MiB")
        text = Path(path).read_text()
    except (OSError, ValueError) as problem:
        raise BadCache(f"{path} cannot be read: {problem}") from None
    return decoded(text, str(path))


def decoded(text: str | bytes, name: str) -> tuple[Entries, list[str]]:
    try:
        file = CacheFile.model_validate_json(text)
    except (ValidationError, ValueError) as problem:
        raise BadCache(
            f"{name} is not a file of tuned choices ({fault(problem)}). Write one with: attngen cache export FILE"
        ) from None
    found: Entries = {}
    wrong = []
    for number, content in enumerate(file.entries):
        entry = _validated(content)
        if isinstance(entry, str):
            wrong.append(f"entry {number}: {entry}")
        else:
            found = merged(found, {entry.key.digest: entry})
    return found, wrong


def _validated(content: Mapping[str, Any]) -> Entry | str:
    try:
        return parsed(json.dumps(content))
    except (ValueError, RecursionError) as problem:
        return str(problem)


def merged(first: Entries, second: Entries) -> Entries:
    """All of both; the faster one where both have an entry for the same key."""
    better = {
        digest: entry
        for digest, entry in second.items()
        if digest not in first or entry.microseconds < first[digest].microseconds
    }
    return {**first, **better}


def written(path: Path, entries: Iterable[Entry]) -> None:
    """Raises ``CannotWrite``."""
    ordered = sorted(entries, key=lambda entry: entry.key.digest)
    file = CacheFile(attngen_cache=1, entries=[entry.model_dump() for entry in ordered])
    try:
        paths.write_atomically(path, file.model_dump_json(indent=1) + "\n")
    except OSError as problem:
        raise CannotWrite(f"{path} cannot be written: {problem.strerror or problem}.") from problem


@cache
def shipped(device: str) -> Mapping[str, Entry]:
    """What comes with attngen for the device of that name; nothing for most."""
    file = files(SHIPPED).joinpath(f"{device}.json")
    if not file.is_file():
        return {}
    try:
        entries, wrong = decoded(file.read_bytes(), f"{device}.json of attngen itself")
    except (BadCache, OSError) as problem:
        say_once(str(problem))
        return {}
    if wrong:
        say_once(f"{device}.json of attngen itself is damaged, and some of it is not used: {wrong[0]}")
    return entries
