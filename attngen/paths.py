"""Where attngen keeps files of its own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """``ATTNGEN_CACHE_DIR``, or ``attngen`` under the platform's user cache directory. Readable by its owner alone."""
    chosen = os.environ.get("ATTNGEN_CACHE_DIR")
    path = Path(chosen) if chosen else Path(platformdirs.user_cache_dir("attngen", appauthor=False))
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
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
