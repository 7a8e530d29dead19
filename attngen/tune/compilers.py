"""Kernels compiled by processes that stay, each once: what a launch then finds in Triton's disk cache. A compiler that
crashes, or takes too long, costs one kernel.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from attngen import aot
from attngen.aot import Job
from attngen.errors import AttngenError
from attngen.tune.kernels import job_of
from attngen.tune.messages import Task

SECONDS = 100.0  # that one kernel may take

Compile = Callable[[Job, int], object]


def _serve(pipe: Connection, compiles: Compile, arch: int) -> None:
    """Runs in a process: answers each job with what is wrong, nothing if it was compiled."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what compilers say as they crash
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            compiles(job, arch)
            pipe.send("")
        except AttngenError as failed:
            pipe.send(str(failed))


class Compilers:
    """So many processes; jobs are taken in the order in which they come. The result of each is what is wrong, if anything."""

    def __init__(
        self,
        workers: int,
        arch: int,
        compiles: Compile = aot.compile_for,
        seconds: float = SECONDS,
        start: str = "spawn",
    ) -> None:
        self._jobs: queue.Queue[tuple[Job, Future[str]] | None] = queue.Queue()
        self._about = compiles, arch
        self._seconds = seconds
        self._context: Any = multiprocessing.get_context(start)
        self._children: set[Any] = set()
        self._closed = False
        for _ in range(workers):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, job: Job) -> Future[str]:
        future: Future[str] = Future()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """Stop at once, whatever is being compiled."""
        self._closed = True
        for child in list(self._children):
            child.kill()

    def _work(self) -> None:
        child = pipe = None
        while not self._closed:
            try:
                item = self._jobs.get(timeout=0.2)
            except queue.Empty:
                continue
            assert item is not None
            if child is None or pipe is None:
                child, pipe = self._start()
            problem = self._answered(pipe, item[0])
            if problem is None:
                child.kill()
                self._children.discard(child)
                child = pipe = None
            item[1].set_result("the compiler crashed, or took too long" if problem is None else problem)

    def _answered(self, pipe: Connection, job: Job) -> str | None:
        """What the process says of ``job``; None if it says nothing."""
        try:
            pipe.send(job)
            return str(pipe.recv()) if pipe.poll(self._seconds) else None
        except (EOFError, OSError):
            return None

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        child = self._context.Process(target=_serve, args=(theirs, *self._about), daemon=True)
        child.start()
        theirs.close()
        self._children.add(child)
        return child, ours


def identity(job: Job) -> tuple[object, ...]:
    """Equal for jobs that give the same binary: lengths are arguments, of strides counts what Triton asks of them."""
    strides = ((x.dtype, *((s == 1, s % 16 == 0, s >= 2**31) for s in x.strides)) for x in job.inputs)
    return job.source, job.again, *strides


class Ahead:
    """Jobs that were handed to compilers, each once."""

    def __init__(self, submit: Callable[[Job], Future[str]]) -> None:
        self._submit = submit
        self._known: dict[tuple[object, ...], Future[str]] = {}

    def future(self, job: Job) -> Future[str]:
        """What is wrong with it, if anything, once that is known."""
        key = identity(job)
        if key not in self._known:
            self._known[key] = self._submit(job)
        return self._known[key]

    def begin(self, task: Task) -> dict[int, Future[str]]:
        """Hand over what there is to compile of a task: the future of each candidate that has a kernel."""
        jobs = {number: job_of(task, tiles) for number, tiles in enumerate(task.candidates)}
        return {number: self.future(job) for number, job in jobs.items() if job is not None}

    def compiled(self, task: Task, deadline: float) -> Task:
        """``task`` once all is compiled, or ``deadline`` (``time.monotonic``) is there; what does not compile is lost."""
        futures = self.begin(task)
        wait(futures.values(), timeout=max(0.0, deadline - time.monotonic()))
        lost = {number: why for number, future in futures.items() if future.done() and (why := future.result())}
        return replace(task, lost={**task.lost, **lost}, compiled=True)
