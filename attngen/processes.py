"""Processes of our own: modules of attngen, run by the Python that runs this."""

from __future__ import annotations

import sys

_CODE = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
)


def command(module: str, *arguments: str) -> list[str]:
    """``python -m module``, but for the working directory: files of a user lie there, and may be named as a library is."""
    return [sys.executable, "-c", _CODE.format(module=module), *arguments]
