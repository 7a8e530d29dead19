"""Where attngen keeps files of its own."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import platformdirs

from attngen.errors import say_once


def cache_path() -> Path:
    """``ATTNGEN_CACHE_DIR``, or ``attngen`` under the platform's user cache directory."""
    chosen = os.environ.get("ATTNGEN_CACHE_DIR")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("attngen", appauthor=False))


def cache_dir() -> Path:
    """``cache_path()``, which is there after the call and readable by its owner alone.

    Raises ``OSError`` where it cannot be made, or belongs to somebody else: what is read there is run.
    """
    path = cache_path()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_foreign(path)
    return path


def refuse_foreign(path: Path) -> None:
    """Raises ``PermissionError`` if ``path`` belongs to another user."""
    if hasattr(os, "geteuid") and path.stat().st_uid != os.geteuid():
        raise PermissionError(1, "it belongs to another user", str(path))


def folder() -> Path:
    """The cache directory; where that cannot be written, one of this process alone, which is logged."""
    try:
        path = cache_dir()
        if os.access(path, os.W_OK | os.X_OK):
            return path
        return _instead(path, "it is read-only")
    except OSError as problem:
        return _instead(Path(problem.filename or "?"), problem.strerror or str(problem))


def kept(name: str, text: str) -> Path:
    """A file in ``folder()`` that holds ``text``; in a directory of this process alone if the disk is full there."""
    path = folder() / name
    try:
        return _holding(path, text)
    except OSError as problem:
        return _holding(_instead(path.parent, problem.strerror or str(problem)) / name, text)


def _instead(path: Path, why: str) -> Path:
    say_once(
        f"the cache directory {path} cannot be used ({why}): kernels are kept for this process alone. "
        "Name another directory in the environment variable ATTNGEN_CACHE_DIR."
    )
    return _temporary()


@cache
def _temporary() -> Path:
    path = tempfile.mkdtemp(prefix="attngen-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def _holding(path: Path, text: str) -> Path:
    if not path.exists() or path.read_text() != text:
        write_atomically(path, text)
    return path


def write_atomically(path: Path, text: str) -> None:
    """``path`` holds all of ``text`` or what it held before."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
