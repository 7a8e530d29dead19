"""Processes that write to one cache at once, and are killed: ``python cache_processes.py writers|killed FILE``.

A program of its own, which knows nothing of torch, so that its processes are forked in a millisecond.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time
from itertools import count
from pathlib import Path

from attngen.cache.store import Store

WRITERS, EACH = 16, 1000
KILLS, BATCH = 200, 5


def rows(writer: int) -> list[tuple[str, str]]:
    return [(f"{writer}-{number}", f"entry {number} of {writer}") for number in range(EACH)]


def forked(run: object) -> int:
    child = os.fork()
    if child:
        return child
    try:
        run()  # type: ignore[operator]
        os._exit(0)
    except BaseException as problem:
        print(repr(problem), file=sys.stderr)
        os._exit(1)


def writers(path: Path) -> None:
    """Every row of every process is there."""
    children = [forked(lambda writer=writer: Store(path).put(rows(writer))) for writer in range(WRITERS)]
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    expected = {digest: text.encode() for writer in range(WRITERS) for digest, text in rows(writer)}
    assert dict(Store(path).all()) == expected
    print(f"{len(expected)} rows")


def killed(path: Path) -> None:
    """Whatever a process had written when it was killed is there, and the next one can write."""
    moments = random.Random(0)
    known: dict[str, bytes] = {}
    for number in range(KILLS):
        known |= written_until_killed(path, number, moments.uniform(0.0, 0.025))
        held = dict(Store(path).all())
        assert known.items() <= held.items(), f"kill {number}: {len(known.items() - held.items())} rows are lost"
        assert all(text.decode() == f"entry {digest}" for digest, text in held.items())
    assert not path.with_suffix(".damaged").exists()
    print(f"{KILLS} kills, {len(known)} rows")


def written_until_killed(path: Path, number: int, seconds: float) -> dict[str, bytes]:
    """The rows that a process said it had written before it was killed."""
    receiver, sender = os.pipe()
    child = forked(lambda: endless(path, number, sender))
    os.close(sender)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = b""
    while select.select([receiver], [], [], 0)[0] and (more := os.read(receiver, 1 << 16)):
        said += more
    os.close(receiver)
    return {digest: f"entry {digest}".encode() for digest in said.decode().split("\n")[:-1]}


def endless(path: Path, writer: int, said: int) -> None:
    for batch in count():
        digests = [f"{writer}-{batch}-{number}" for number in range(BATCH)]
        Store(path).put([(digest, f"entry {digest}") for digest in digests])
        os.write(said, "".join(f"{digest}\n" for digest in digests).encode())


if __name__ == "__main__":
    {"writers": writers, "killed": killed}[sys.argv[1]](Path(sys.argv[2]))
