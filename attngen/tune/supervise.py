"""The parent of the process that measures: reads its messages, stops it in time, and goes on without what ended it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import IO

from pydantic import ValidationError

from attngen import parcel, processes
from attngen.tune.messages import LONGEST_REASON, Message, Task

COMMAND = tuple(processes.command("attngen.tune.worker"))
STEP = 120.0  # seconds for one step of a candidate: to compile it, to check it, to time a call
ENDING = 10.0  # seconds that a process which has nothing more to say may take to end
LONGEST_LINE = 10_000
ENDED = None  # what stands in the queue after the last line


@dataclass
class Outcome:
    """Medians and failures by the number of a candidate; ``broke``: why there are none, if that is nobody's fault."""

    microseconds: dict[int, float] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    broke: str = ""

    @property
    def best(self) -> int | None:
        return min(self.microseconds, key=lambda number: self.microseconds[number], default=None)


def measured(
    task: Task,
    deadline: float,
    *,
    card: str | None = None,
    command: Sequence[str] = COMMAND,
    step: float = STEP,
    heard: Callable[[Message, Outcome], None] = lambda message, outcome: None,
    spare: Spare | None = None,
) -> Outcome:
    """Medians of the candidates of ``task`` that are right and could be timed before ``deadline`` (``time.monotonic``).

    ``card`` is the GPU that the process sees, as CUDA_VISIBLE_DEVICES has it. Every candidate that ends its process, or is
    silent for longer than ``step`` seconds, is lost, and another process goes on with the others. ``spare`` begins processes
    before they are needed.
    """
    outcome = Outcome(failed=dict(task.lost))
    while time.monotonic() < deadline:
        lost = dict(outcome.failed)
        begun = spare.taken(card, command) if spare else begin(card, command)
        culprit, ending = _once(replace(task, lost=lost), outcome, deadline, begun, step, heard)
        if not ending or time.monotonic() >= deadline:
            break
        if culprit is None or culprit in lost:
            outcome.broke = ending
            break
        outcome.failed.setdefault(culprit, ending)
        outcome.microseconds.clear()  # they are timed again, side by side
    return outcome


def _once(
    task: Task, outcome: Outcome, deadline: float, begun: Begun, step: float, heard: Callable[[Message, Outcome], None]
) -> tuple[int | None, str]:
    """One process over ``task``. If it ended early: the candidate that it was at, and how; else an empty text."""
    culprit: int | None = None
    with _answering(task, begun) as lines:
        while True:
            patience = min(step, deadline - time.monotonic())
            try:
                line = lines.get(timeout=max(0.0, patience))
            except queue.Empty:
                return culprit, f"stopped after {step:.0f} s"
            if line is ENDED:
                return culprit, _ending(begun)
            message = _understood(line, len(task.candidates))
            if message is None:
                return culprit, "its process said what it should not"
            if message.event == "done":
                return None, ""
            if message.event == "broke":
                return None, message.reason or "nothing can be measured"
            culprit = message.candidate
            if message.event == "failed":
                outcome.failed[culprit] = message.reason
                outcome.microseconds.pop(culprit, None)
            elif message.event == "timed":
                outcome.microseconds[culprit] = message.microseconds
            heard(message, outcome)


def _understood(line: bytes, count: int) -> Message | None:
    try:
        message = Message.model_validate_json(line)
    except (ValidationError, ValueError):
        return None
    about_one = message.event in ("began", "failed", "timed")
    sound = message.event != "timed" or message.microseconds > 0
    return message if sound and (not about_one or 0 <= message.candidate < count) else None


def _ending(begun: Begun) -> str:
    try:
        code = begun.process.wait(ENDING)
    except subprocess.TimeoutExpired:
        return "its process stopped to answer"
    complaints = begun.complaints
    complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - 4000))
    last = complaints.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"its process {how}: {last[0]}"[:LONGEST_REASON]


# -------------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Begun:
    """A process in a group of its own, which waits for a task, and the file that it complains to."""

    process: subprocess.Popen[bytes]
    complaints: IO[bytes]

    def end(self) -> None:
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.complaints.close()


def begin(card: str | None, command: Sequence[str]) -> Begun:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    if card is not None:
        environment["CUDA_VISIBLE_DEVICES"] = card
    pipe = subprocess.PIPE
    complaints = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the process has ended)
    try:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=complaints, env=environment, start_new_session=True
        )
    except OSError:
        complaints.close()
        raise
    return Begun(process, complaints)


class Spare:
    """Begins a process whenever one is taken: it imports torch while that one measures. For one card, until it is closed."""

    def __init__(self) -> None:
        self._next: Begun | None = None

    def taken(self, card: str | None, command: Sequence[str]) -> Begun:
        taken = self._next or begin(card, command)
        self._next = None
        try:
            self._next = begin(card, command)
        except OSError:
            taken.end()
            raise
        return taken

    def close(self) -> None:
        if self._next is not None:
            self._next.end()
            self._next = None


@contextmanager
def _answering(task: Task, begun: Begun) -> Iterator[queue.Queue[bytes | None]]:
    """The lines of a process that works on ``task``; it ends with the block."""
    lines: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_listen, args=(begun.process, parcel.packed(task), lines), daemon=True).start()
    try:
        yield lines
    finally:
        begun.end()


def _listen(process: subprocess.Popen[bytes], request: bytes, lines: queue.Queue[bytes | None]) -> None:
    """Hand over the task, then every line; a thread, for either may take as long as it likes.

    The input stays open: that it ends tells the process that nobody waits for it any more.
    """
    assert process.stdin is not None and process.stdout is not None
    with suppress(OSError):  # it ended before it had read all of it
        process.stdin.write(len(request).to_bytes(8, "little") + request)
        process.stdin.flush()
    while line := process.stdout.readline(LONGEST_LINE):
        lines.put(line)
    process.stdout.close()
    with suppress(OSError):
        process.stdin.close()
    lines.put(ENDED)
