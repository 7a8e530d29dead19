"""The whole of a user's cache, for commands: what is in it, what comes to it, and what can go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from attngen.cache.entry import Entry, parsed
from attngen.cache.files import Entries, merged
from attngen.cache.key import templates_of, versions
from attngen.cache.store import Store
from attngen.choose import HOPPER_TILES, TILES
from attngen.choose_bwd import TILES as BACKWARD_TILES
from attngen.spec import HOPPER


@dataclass(frozen=True)
class Contents:
    """``wrong`` says of rows that do not count what is wrong with them."""

    entries: Entries
    wrong: dict[str, str]


def contents(store: Store) -> Contents:
    """Raises ``UnusableCache``."""
    entries: Entries = {}
    wrong: dict[str, str] = {}
    for digest, text in store.all():
        entry = parsed(text)
        if isinstance(entry, str):
            wrong[digest] = entry
        elif entry.key.digest != digest:
            wrong[digest] = "it stands under the digest of another key"
        else:
            entries[digest] = entry
    return Contents(entries, wrong)


@dataclass(frozen=True)
class Taken:
    """How many entries were new, were faster than those here, and were not."""

    new: int
    faster: int
    slower: int


def take(store: Store, found: Entries) -> Taken:
    """Add entries to the cache; of two for one key the faster one stays. Raises ``UnusableCache``."""
    here = contents(store).entries
    better = {digest: entry for digest, entry in merged(here, found).items() if here.get(digest) != entry}
    store.put((digest, entry.text) for digest, entry in better.items())
    new = sum(digest not in here for digest in better)
    return Taken(new, len(better) - new, len(found) - len(better))


def outdated(entry: Entry) -> str | None:
    """Why an entry counts for nobody with what is installed here, if so."""
    for name, installed in versions().items():
        if (made := getattr(entry.key, name)) != installed:
            return f"made with {name} {made}, here is {installed}"
    return None if entry.key.templates == templates_of(entry.key.phase) else "made from other templates"


def unknown(entry: Entry) -> str | None:
    """Why the tiles of an entry are none that attngen would try, if so."""
    forward = {*TILES, *HOPPER_TILES}
    known = forward if entry.key.phase == "forward" else set(BACKWARD_TILES)
    odd = next((tile for tile in entry.chosen if tile not in known and tile.family != HOPPER), None)
    return None if odd is None else f"{odd} is none of the tiles that attngen tries"


def prune(store: Store, useless: Callable[[Entry], str | None] = outdated) -> Mapping[str, str]:
    """Take out what is damaged or ``useless``, and say why of each. Raises ``UnusableCache``."""
    found = contents(store)
    reasons = {digest: why for digest, entry in found.entries.items() if (why := useless(entry))}
    gone = {**found.wrong, **reasons}
    store.remove(gone)
    return gone


def beginning(entries: Iterable[str], prefix: str) -> list[str]:
    return [digest for digest in entries if digest.startswith(prefix)]
