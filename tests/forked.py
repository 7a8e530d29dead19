"""Stands in for the child process of ``attngen.verify``: forks of one process that has torch and Triton already.

To import them takes longer than most kernels of the tests run. ``python tests/forked.py`` reads folders, one a line, and
says of each the number of the process that has it, and later how that ended.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path

from attngen import verify

in_a_process = verify._interpret  # what ``interpret`` stands in for
WORDS = "stderr.txt"  # of a fork, in its folder


@cache
def _server() -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, bufsize=0, env=environment)


def interpret(folder: Path, timeout: float) -> str:
    """Run the kernels of ``folder`` as ``attngen.verify._interpret`` does; how that ended, if it was early."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(f"{folder}\n".encode())
    child = int(server.stdout.readline())
    with selectors.DefaultSelector() as ready:
        ready.register(server.stdout, selectors.EVENT_READ)
        late = not ready.select(timeout)
    if late:
        with suppress(ProcessLookupError):
            os.kill(child, 9)
    code = int(server.stdout.readline())
    if late:
        return f"the interpreter was stopped after {timeout:.0f} s"
    lines = (folder / WORDS).read_text().strip().splitlines() or ["no message"]
    return f"the interpreter's process ended with code {code}: {lines[-1]}"


def _serve() -> None:
    from hurried import hurry

    hurry()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(Path(line.rstrip("\n")))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(folder: Path) -> None:
    """Never comes back."""
    from attngen.interpret import main

    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(folder / WORDS, os.O_WRONLY | os.O_CREAT), 2)
        main(folder)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
