"""The user's cache on disk: SQLite, one row for each entry, shared by all processes of a user.

Rows are text under a digest; what they mean, and whether they are right, is decided by who reads them. Every row is its own
transaction in a write-ahead log, so that a process that is killed takes no row with it but the one that it was writing. A
file that is no database is moved aside, and a new one begun.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from attngen import paths
from attngen.errors import UnusableCache, say_once

SCHEMA = 1  # part of the file's name: other versions of it are other files
BUSY = 30.0  # seconds to wait for another process that writes
LOCKED = 10.0  # seconds to wait for another process that sets the file up

_TABLE = "CREATE TABLE IF NOT EXISTS entries (digest TEXT PRIMARY KEY, entry TEXT NOT NULL)"
_PUT = "INSERT INTO entries VALUES (?, ?) ON CONFLICT (digest) DO UPDATE SET entry = excluded.entry"
# What SQLite says of a schema that is not ours, where it says no more than that the statement is wrong.
_DAMAGE = ("no such", "has no column", "malformed", "columns but", "ON CONFLICT clause", "unsupported file format")

Result = TypeVar("Result")
Row = tuple[str, bytes]


class Store:
    """Every method raises ``UnusableCache`` where the file can be neither read nor written, or is somebody else's."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        return self._path or paths.cache_path() / f"tuned-v{SCHEMA}.db"

    def get(self, digest: str) -> bytes | None:
        rows = self._read("SELECT digest, entry FROM entries WHERE digest = ?", (digest,))
        return rows[0][1] if rows else None

    def all(self) -> list[Row]:
        return self._read("SELECT digest, entry FROM entries ORDER BY digest", ())

    def put(self, rows: Iterable[tuple[str, str]]) -> None:
        """Each row that was taken before another failed stays."""
        pending = list(rows)

        def write(db: sqlite3.Connection) -> None:
            while pending:
                db.execute(_PUT, pending[0])
                pending.pop(0)

        self._guarded(lambda path: self._written(path, write))

    def remove(self, digests: Iterable[str]) -> None:
        listed = [(digest,) for digest in digests]

        def write(db: sqlite3.Connection) -> None:
            db.executemany("DELETE FROM entries WHERE digest = ?", listed)

        self._guarded(lambda path: self._written(path, write))

    # ------------------------------------------------------------------------------------------------------------ faults

    def _guarded(self, action: Callable[[Path], Result]) -> Result:
        """``action`` on the file; once more if that turns out to be no database, for then it is moved aside."""
        try:
            path = self.path
            try:
                return action(path)
            except (sqlite3.DatabaseError, UnicodeError) as problem:  # not even SQLite's complaints need be text
                if not _is_damage(problem):
                    raise
                _set_aside(path, str(problem))
                return action(path)
        except (OSError, sqlite3.Error, UnicodeError) as problem:
            raise UnusableCache(f"the cache of tuned choices cannot be used: {_said(problem)}") from problem

    def _read(self, query: str, values: tuple[str, ...]) -> list[Row]:
        return self._guarded(lambda path: _rows(path, query, values))

    def _written(self, path: Path, write: Callable[[sqlite3.Connection], None]) -> None:
        if self._path is None:
            paths.cache_dir()
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        paths.refuse_foreign(path)
        with _connected(path, "rw") as db:
            _prepare(db, path)
            write(db)


def _rows(path: Path, query: str, values: tuple[str, ...]) -> list[Row]:
    if not path.exists():
        return []
    for each in (path.parent, path):
        paths.refuse_foreign(each)
    try:  # a log that a process left behind is taken up by the next one, for which that must be able to write
        return _asked(path, "rw", query, values)
    except sqlite3.OperationalError as problem:
        if _is_damage(problem):
            raise
        with suppress(sqlite3.Error):  # the disk is full or read-only: what stands in the file itself
            return _asked(path, "ro&immutable=1", query, values)
        raise


def _asked(path: Path, mode: str, query: str, values: tuple[str, ...]) -> list[Row]:
    with _connected(path, mode) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'entries'").fetchone():
            return []
        db.text_factory = bytes
        return [(str(digest, errors="replace"), entry) for digest, entry in db.execute(query, values)]


@contextmanager
def _connected(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    """Each statement is a transaction. What a damaged or hostile schema holds is not run."""
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    with closing(sqlite3.connect(uri, uri=True, timeout=BUSY, isolation_level=None)) as db:
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA cell_size_check = ON")
        yield db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Once in the life of the file; switching to the log is nothing that two processes may do at a time."""
    db.execute("PRAGMA synchronous = NORMAL")
    if _version(db) == SCHEMA:
        return
    with FileLock(f"{path}.lock", timeout=LOCKED):
        if _version(db) != SCHEMA:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(_TABLE)
            db.execute(f"PRAGMA user_version = {SCHEMA}")


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _is_damage(problem: Exception) -> bool:
    """No database, a torn one, or one without our table; not one that is only busy, full or out of reach."""
    if isinstance(problem, sqlite3.OperationalError):
        return any(sign in str(problem) for sign in _DAMAGE)
    return True


def _set_aside(path: Path, why: str) -> None:
    with FileLock(f"{path}.lock", timeout=LOCKED):
        if _is_sound(path):  # another process has been here
            return
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        for ending in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.unlink(f"{path}{ending}")
    say_once(f"the cache of tuned choices was damaged ({why}); it is now {aside}, and a new one is begun")


def _is_sound(path: Path) -> bool:
    try:
        with _connected(path, "rw") as db:
            db.execute("SELECT digest, entry FROM entries LIMIT 1").fetchall()
            return bool(db.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
    except (sqlite3.Error, UnicodeError):
        return False


def _said(problem: Exception) -> str:
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.strerror} ({problem.filename})"
    return str(problem)
