"""Stands in for the process that measures: ``fake_worker.py FOLDER KIND...``, one kind for each candidate.

A number is its median. What else may happen happens once: a mark in the folder says that it has.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path


def say(event: str, candidate: int = -1, **more: object) -> None:
    print(json.dumps({"event": event, "candidate": candidate, **more}), flush=True)


def out_of_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))
    bytearray(1 << 30)


FATES: dict[str, Callable[[], object]] = {
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "hang": lambda: time.sleep(600),
    "deaf": lambda: (signal.signal(signal.SIGTERM, signal.SIG_IGN), os.close(1), time.sleep(600)),
    "out of memory": out_of_memory,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: sys.exit(3),
    "garbage": lambda: print("Segmentation fault? \x00 {", flush=True),
    "endless": lambda: [os.write(1, b"x" * 65536) for _ in range(100)],
    "foreign": lambda: say("timed", 99, microseconds=1.0),
    "negative": lambda: say("timed", 0, microseconds=-1.0),
}


def main(folder: Path, kinds: list[str]) -> None:
    for number, kind in enumerate(kinds):
        mark = folder / f"{number}"
        if mark.exists():
            continue
        say("began", number)
        if kind == "wrong":
            say("failed", number, reason="the kernel's result is off")
        elif kind in FATES:
            mark.touch()
            FATES[kind]()
    for number, kind in enumerate(kinds):
        if kind.replace(".", "").isdigit():
            say("timed", number, microseconds=float(kind))
    if "late" in kinds:
        time.sleep(600)
    say("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
