"""The process that measures. A peer may take it with it (a crash, a hang, a lost device): another then goes on without that
peer, from the problem that was lost.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any

import torch

import attngen
from attngen import measure
from attngen.bench import peers, phases
from attngen.bench import spelling as s
from attngen.bench.problems import Problem
from attngen.bench.records import FAILED, MISSING, NOT_SPELLED, TIMED, WRONG, Record, Result, Row
from attngen.bench.terms import FORWARD, Missing, NotSpelled
from attngen.errors import AttngenError
from attngen.measure import Ceilings, Clock
from attngen.verify import Check

PACKAGES = ("triton", "flash-attn-4", "fa3-fwd")
LONGEST_REASON = 160
CEILING_ROUNDS = 15
ENDING = 10.0  # seconds that a process which is done may take to end


@dataclass(frozen=True)
class Job:
    """What to measure, and what each problem goes without: ``lost[problem][peer]`` is why."""

    problems: tuple[Problem, ...]
    peers: tuple[str, ...]
    device: str
    rounds: int
    timeout: float
    phase: str = FORWARD
    lost: dict[str, dict[str, str]] = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------- supervision


def measured(job: Job, begins: Callable[[str, str], None]) -> Iterator[Record]:
    """The record so far, after each problem. ``begins`` is told what is about to run: problem and peer."""
    record: Record | None = None
    while record is None or len(record.results) < len(job.problems):
        done = len(record.results) if record else 0
        problem, at, ending = job.problems[done].name, "", ""
        for event, value in _events(replace(job, problems=job.problems[done:])):
            if event == "machine":
                record = record or value
            elif event == "begins":
                problem, at = value
                begins(problem, at)
            elif event == "result":
                assert record is not None
                record = replace(record, results=(*record.results, value))
                at = ""
                yield record
            else:
                ending = value
        if record is None:
            raise AttngenError(f"the measuring process ended before it could measure anything: {ending}")
        if at:
            lost = {**job.lost.get(problem, {}), at: ending}
            job = replace(job, lost={**job.lost, problem: lost})
        elif ending:  # between peers, so none is to blame
            failed = _unmeasured(job, job.problems[len(record.results)], ending)
            record = replace(record, results=(*record.results, failed))
            yield record


def _events(job: Job) -> Iterator[tuple[str, Any]]:
    """What a new process says until it is done; last, ("ended", why) if it ended before that."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, sender))
    process.start()
    sender.close()
    try:
        while True:
            if not receiver.poll(job.timeout):
                yield "ended", f"stopped after {job.timeout:.0f} s"
                return
            event, value = receiver.recv()
            if event == "done":
                process.join(ENDING)
                return
            yield event, value
            if event == "ended":
                return
    except EOFError:
        process.join()
        yield "ended", f"its process died (exit code {process.exitcode})"
    finally:
        process.kill()
        process.join()


def _work(job: Job, sender: Connection) -> None:
    """Runs in the process: says what is about to run before it runs."""
    try:
        _set_up(job.phase)
        ceilings = {
            dtype: measure.ceilings(job.device, dtype, CEILING_ROUNDS)
            for dtype in dict.fromkeys(problem.dtype for problem in job.problems)
        }
        sender.send(("machine", _machine(job.device, ceilings)))
        for problem in job.problems:

            def begins(peer: str, name: str = problem.name) -> None:
                sender.send(("begins", (name, peer)))

            sender.send(("result", _result(job, problem, ceilings[problem.dtype], begins)))
        sender.send(("done", None))
    except (DeviceLost, AttngenError) as ending:
        sender.send(("ended", str(ending)))


def _set_up(phase: str) -> None:
    """What libraries print is no part of the result, and nothing needs a gradient but where one is timed."""
    os.dup2(2, 1)
    torch.set_grad_enabled(phase != FORWARD)


def _result(job: Job, problem: Problem, ceilings: Ceilings, begins: Callable[[str], None]) -> Result:
    """The result of ``problem``; where not even the reference can be computed, every row says so."""
    chosen = [peers.PEERS[name] for name in job.peers]
    try:
        lost = job.lost.get(problem.name, {})
        return result_of(problem, chosen, job.device, job.rounds, ceilings, lost, begins, phase=job.phase)
    except DeviceLost:
        raise
    except Exception as error:
        return _unmeasured(job, problem, f"no reference: {_untimed('', error, job.device).reason}")


def _unmeasured(job: Job, problem: Problem, reason: str) -> Result:
    return Result(problem, 0, 0, 0, 0, tuple(Row(name, FAILED, reason) for name in job.peers), job.phase)


def _machine(device: str, ceilings: Mapping[str, Ceilings]) -> Record:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Record(name, _versions(device), {dtype: asdict(each) for dtype, each in ceilings.items()})


def _versions(device: str) -> dict[str, str]:
    found = {"attngen": attngen.__version__, "torch": str(torch.__version__)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if device == "cuda":
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


# ---------------------------------------------------------------------------------------------------------- one problem


class DeviceLost(Exception):
    """No call will succeed in this process any more."""


def result_of(
    problem: Problem,
    chosen: list[peers.Peer],
    device: str,
    rounds: int,
    ceilings: Ceilings,
    lost: Mapping[str, str] | None = None,
    begins: Callable[[str], None] = lambda peer: None,
    phase: str = FORWARD,
) -> Result:
    """Every peer prepared, checked and, if it is right, timed. Each has a row."""
    torch._dynamo.reset()
    inputs = s.inputs_of(problem, device)
    pairs = s.area(problem, inputs)
    expected = coarse = phases.expected(problem, inputs, phase)
    if phase == FORWARD and any(peer.eighths for peer in chosen):
        coarse = phases.expected_in_eighths(problem, inputs, expected)
    rows: dict[str, Row] = {}
    runs: dict[str, phases.Call] = {}
    for peer in chosen:
        if reason := (lost or {}).get(peer.name):
            rows[peer.name] = Row(peer.name, FAILED, reason)
            continue
        begins(peer.name)
        rows[peer.name], run = _tried(peer, problem, inputs, coarse if peer.eighths else expected, device, phase)
        if run is not None:
            runs[peer.name] = run
    del expected, coarse
    flop, moved = s.flop(problem, pairs, phase), s.traffic(problem, inputs, phase)

    def failed(name: str, error: Exception) -> None:
        rows[name] = _untimed(name, error, device)

    for name, taken in measure.samples(runs, rounds, Clock(device), failed=failed, begins=begins).items():
        rows[name] = timed(rows[name], taken, flop, moved, ceilings)
    return Result(problem, pairs, flop, moved, rounds, tuple(rows.values()), phase)


def _tried(
    peer: peers.Peer, problem: Problem, inputs: s.Inputs, expected: Sequence[phases.Expected], device: str, phase: str
) -> tuple[Row, phases.Call | None]:
    """Its row so far, and its call if what that gives is right."""
    began = time.perf_counter()
    try:
        if device not in peer.devices:
            raise NotSpelled("not for this kind of device")
        if peer.eighths and phase != FORWARD:
            raise NotSpelled("products of 8-bit numbers are for inference")
        if phase != FORWARD:
            inputs = inputs.wanting(trained=problem.trained, rows_first=peer.rows_first and not problem.views)
        with attngen.record() as reports:
            call = phases.call_of(peer.prepare(problem, inputs), problem, inputs, phase)
            made = call()
        measure.synchronize(device)
        first = time.perf_counter() - began
        name, check = phases.verdict(made, expected)
        del made
        peak = measure.peak_bytes(call) if device == "cuda" else None
        kernel = phases.kernels(reports, problem, phase) if device == "cuda" else ""
    except Exception as error:  # whatever a library raises is that peer's alone
        return _untimed(peer.name, error, device), None
    row = judged(peer.name, name, check)
    return replace(row, first_s=first, peak_bytes=peak, kernel=kernel), call if row.status == TIMED else None


def judged(peer: str, name: str, check: Check) -> Row:
    """Its row with the verdict on what is called ``name``; one that is timed has no time yet."""
    status = TIMED if check.ok else WRONG
    reason = "" if check.ok else f"wrong {name}: {check}"
    return Row(peer, status, reason, error=check.error, budget=check.budget, rms=check.rms, rms_budget=check.rms_budget)


def timed(row: Row, taken: list[float], flop: int, moved: int, ceilings: Ceilings) -> Row:
    """``row`` with the median of ``taken`` and what follows from it."""
    times = measure.summary(taken)
    rate, stream = 1e3 * flop / times.median, 1e3 * moved / times.median
    return replace(
        row,
        ms=times.median,
        ms_low=times.low,
        ms_high=times.high,
        tflops=rate / 1e12,
        of_product=rate / ceilings.product,
        of_copy=stream / ceilings.copy,
    )


def _untimed(peer: str, error: Exception, device: str) -> Row:
    """The row of one that raised, with memory given back. Raises ``DeviceLost`` if the error has cost the device."""
    status = MISSING if isinstance(error, Missing) else NOT_SPELLED if isinstance(error, NotSpelled) else FAILED
    row = Row(peer, status, reason_of(error))
    error.__traceback__ = None  # it holds the tensors of every frame
    if device == "cuda":
        gc.collect()
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise DeviceLost(f"the device was lost: {row.reason}") from None
        torch.cuda.empty_cache()
    return row


def reason_of(error: Exception) -> str:
    """An error in few words."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, (Missing, NotSpelled)):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…"
