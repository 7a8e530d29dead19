"""The process that measures: what candidates do to it harms nobody, and nothing that is wrong is timed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from specs import BY_NAME, CASES, CAUSAL, H, attention, loaded, plus, scaled
from test_cache import layouts, own_cache, wanted
from torch import Tensor
from tuning import TESTS, fake

import attngen
from attngen import compat, emit, hopper_bwd, measure, parcel, prepare, verify
from attngen.aot import Job, Layout, layout_of
from attngen.cache.key import BACKWARD, FORWARD
from attngen.measure import Clock
from attngen.spec import HOPPER, KEY, ROW, Problem, Tile
from attngen.tune import supervise, worker
from attngen.tune.candidates import candidates
from attngen.tune.compilers import Ahead, identity
from attngen.tune.kernels import job_of
from attngen.tune.messages import Message, Task
from attngen.tune.supervise import Outcome, Spare, measured
from attngen.tune.tuner import Budget, Tuner

__all__ = ["own_cache"]  # for every test here
TILES = tuple((Tile(16, 32, 4, stages),) for stages in range(1, 9))
needs_interpreter = pytest.mark.skipif(compat.interpreter_problem() is not None, reason="no interpreter")


def supervised(folder: Path, *kinds: str, seconds: float = 60.0, step: float = 30.0, **more: Any) -> Outcome:
    task = Task(wanted(), TILES[: len(kinds)], rounds=4)
    return measured(task, time.monotonic() + seconds, command=fake(folder, *kinds), step=step, **more)


# ------------------------------------------------------------------------------------------------------------ the process


def test_medians_and_the_best(tmp_path: Path) -> None:
    found = supervised(tmp_path, "30", "10.5", "20")
    assert (found.microseconds, found.failed, found.broke) == ({0: 30.0, 1: 10.5, 2: 20.0}, {}, "")
    assert found.best == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("crash", "killed by signal 11"),
        ("killed", "killed by signal 9"),
        ("out of memory", "MemoryError"),
        ("exit", "ended with code 3"),
        ("wrong", "the kernel's result is off"),
        ("garbage", "said what it should not"),
        ("endless", "said what it should not"),
        ("foreign", "said what it should not"),
        ("negative", "said what it should not"),
    ],
)
def test_what_one_candidate_does_costs_only_that_one(kind: str, reason: str, tmp_path: Path) -> None:
    found = supervised(tmp_path, "30", kind, "20")
    assert found.microseconds == {0: 30.0, 2: 20.0}
    assert list(found.failed) == [1] and reason in found.failed[1]


@pytest.mark.parametrize(("kind", "reason"), [("hang", "stopped after 1 s"), ("deaf", "stopped to answer")])
def test_one_that_hangs_is_stopped(kind: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "ENDING", 0.3)
    found = supervised(tmp_path, kind, "20", step=1.0)
    assert found.microseconds == {1: 20.0} and reason in found.failed[0]


def test_all_may_fail(tmp_path: Path) -> None:
    found = supervised(tmp_path, "crash", "wrong", "killed")
    assert not found.microseconds and sorted(found.failed) == [0, 1, 2] and found.best is None


def test_no_process_at_all(tmp_path: Path) -> None:
    task = Task(wanted(), TILES[:2], rounds=4)
    found = measured(task, time.monotonic() + 60, command=[sys.executable, "-c", "import nothing_of_that_name"])
    assert "nothing_of_that_name" in found.broke and not found.microseconds and not found.failed
    made = Tuner("quick", Budget(60.0), command=["/nowhere/python"])
    assert made.measure(wanted()) is None


def test_the_deadline_holds_and_what_was_timed_counts(tmp_path: Path) -> None:
    began = time.monotonic()
    found = supervised(tmp_path, "30", "20", "late", seconds=1.0)
    assert time.monotonic() - began < 5
    assert found.microseconds == {0: 30.0, 1: 20.0} and not found.failed


def test_progress_has_the_best_so_far(tmp_path: Path) -> None:
    said: list[str] = []
    made = Tuner(
        "quick", Budget(60.0), command=fake(tmp_path, "30", "wrong", "20.25"), says=lambda _, text: said.append(text)
    )
    made.measure(wanted())
    assert said[0] == "looking at 1 of 8" and said[3] == "looking at 3 of 8"
    assert said[-1].startswith("timed 3 of 8, best ") and said[-1].endswith(" at 20.2 us")


def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    """Even one that hangs, when its parent is killed."""
    code = (
        "import sys, threading, time\nsys.path.insert(0, sys.argv[1])\nfrom attngen.tune import worker\n"
        "worker.work = lambda *_: (print('pid', __import__('os').getpid(), file=sys.stderr, flush=True), time.sleep(600))\n"
        "worker.parcel.unpacked = lambda content: None\nworker.serve(lambda task: None)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(TESTS)], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdin is not None and child.stderr is not None
    child.stdin.write((0).to_bytes(8, "little"))
    child.stdin.flush()
    assert b"pid" in child.stderr.readline()
    child.stdin.close()
    assert child.wait(20) == 1
    child.stderr.close()


# ------------------------------------------------------------------------------------------------------------- the worker


class Script:
    """A clock that reads what a list says."""

    device = "cpu"

    def __init__(self, *times: float) -> None:
        self.times = times
        self.calls = 0

    def start(self, run: Any) -> Any:
        run()
        self.calls += 1
        return lambda: self.times[self.calls % len(self.times)]


def answers(task: Task, launch: Any, clock: Any = None) -> list[Message]:
    said: list[Message] = []
    worker.work(task, worker.Machine("cpu", launch, clock or Clock("cpu")), said.append)
    return said


def by_eager(kernel: Any) -> Any:
    """A right kernel."""
    return lambda *values: verify.eager(kernel.spec, values)[0]


SMALL = wanted(problem=Problem((2, 2), 24, 24), inputs=layouts(24))


def test_what_is_wrong_is_never_timed() -> None:
    def launch(kernel: emit.Kernel) -> Any:
        right = by_eager(kernel)
        broken = {2: lambda *v: right(*v) * 1.5, 3: lambda *v: None, 4: lambda *v: right(*v).fill_(torch.nan)}
        if kernel.tile.stages == 5:
            raise RuntimeError("ptxas: out of luck\nand more")
        return broken.get(kernel.tile.stages, right)

    said = answers(Task(SMALL, TILES[:5], rounds=7), launch)
    failed = {message.candidate: message.reason for message in said if message.event == "failed"}
    assert failed == {
        1: "the kernel's result is off",
        2: "the kernel does not take such tensors",
        3: "the kernel's result is off",
        4: "RuntimeError: ptxas: out of luck",
    }
    assert [message.candidate for message in said if message.event == "timed"] == [0, 0]
    assert said[-1].event == "done"


def test_one_that_fails_while_timed_is_out() -> None:
    calls: list[int] = []

    def launch(kernel: emit.Kernel) -> Any:
        def run(*values: Tensor) -> Tensor:
            calls.append(kernel.tile.stages)
            if kernel.tile.stages == 2 and calls.count(2) > 1 + measure.WARM_UP + 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot.")
            return by_eager(kernel)(*values)

        return run

    said = answers(Task(SMALL, TILES[:2], rounds=5), launch)
    assert [(m.candidate, m.reason) for m in said if m.event == "failed"] == [(1, "out of memory")]
    assert [m.candidate for m in said if m.event == "timed"] == [0] and said[-1].event == "done"


def test_medians_are_of_interleaved_calls() -> None:
    clock = Script(0.001, 0.002)
    said = answers(Task(SMALL, TILES[:2], rounds=6), by_eager, clock)
    assert clock.calls == 2 * (measure.WARM_UP + 6)
    assert [m.candidate for m in said if m.event == "began"][2:6] == [0, 1, 1, 0]
    assert all(1.0 <= m.microseconds <= 2.0 for m in said if m.event == "timed")


def test_those_that_were_lost_are_not_tried_again() -> None:
    said = answers(Task(SMALL, TILES[:3], rounds=1, lost={1: "crashed"}), by_eager)
    assert {m.candidate for m in said if m.candidate >= 0} == {0, 2}


def test_nothing_to_hold_results_against(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(verify, "reference", fails)
    (said,) = answers(Task(SMALL, TILES[:2], rounds=1), by_eager)
    assert (said.event, said.reason) == ("broke", "out of memory")


@pytest.mark.parametrize(
    "layout",
    [
        Layout((2, 3, 8, 16), (384, 128, 16, 1), 0, "float32"),
        Layout((2, 3, 8, 16), (384, 16, 48, 1), 5, "float32"),
        Layout((2, 3, 8, 16), (128, 0, 16, 1), 0, "float32"),
        Layout((9, 9, 9, 19), (1539, 171, 19, 1), 3, "float32"),
    ],
)
def test_tensors_lie_in_memory_as_those_of_the_model(layout: Layout) -> None:
    values = torch.arange(2 * 3 * 8 * 16, dtype=torch.float32).view(2, 3, 8, 16)
    (laid,) = worker.arranged([values], [layout])
    assert (laid.stride(), laid.storage_offset(), laid.shape) == (layout.strides, layout.offset, values.shape)
    expected = values[:, :1].expand_as(values) if layout.strides[1] == 0 else values
    assert torch.equal(laid, expected)
    (scalar,) = worker.arranged([torch.tensor(3.0)], [layout_of(torch.tensor(1.0))])
    assert scalar == 3


def test_what_is_checked_is_compiled_as_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of strides of another kind Triton would compile a kernel anew: here of rows that begin anywhere."""
    monkeypatch.setattr(worker, "CHECKED", 1 << 17)
    monkeypatch.setattr(prepare, "SHORTEST", 64)
    bias = loaded("bias", H, ROW, KEY)
    extras = {"bias": (torch.float32, (H, ROW, KEY))}
    spec = attention(score=plus(scaled(0.125), bias), extras=extras, head_dim=24, dtype=torch.float32, lse=True)
    operand = Layout((2, 2, 592, 24), (592 * 73, 24, 73, 1), 0, "float32")
    inputs = (operand, operand, operand, Layout((2, 592, 592), (592 * 604, 604, 1), 0, "float32"))
    question = wanted(spec=spec, problem=Problem((2, 2), 592, 592), inputs=inputs)
    machine = worker.Machine("cpu", by_eager, Clock("cpu"))
    forward = worker.Forward(Task(question, TILES[:1], rounds=1), machine)
    assert forward._samples[3].shape == (2, 160, 160) and forward._inputs[3].shape == (2, 592, 592)
    of_out = [[s % 16 == 0 for s in verify.eager(spec, x)[0].stride()] for x in (forward._samples, forward._inputs)]
    assert of_out[0] == of_out[1]
    task = Task(replace(question, phase=BACKWARD), ((Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)),), rounds=1)
    backward = worker.Backward(task, machine)
    forward_job, backward_job = job_of(Task(question, TILES[:1], rounds=1), TILES[0]), job_of(task, task.candidates[0])
    both = [(forward_job, (forward._samples, forward._inputs))]
    both += [(backward_job, [(x.grad, x.out, x.lse, *x.inputs) for x in (backward._small, backward._full)])]
    for job, several in both:
        assert job is not None
        for values in several:
            assert identity(replace(job, inputs=tuple(map(layout_of, values)))) == identity(job)


def test_what_is_compiled_ahead_is_handed_over_once_and_what_fails_is_lost() -> None:
    given: list[Job] = []

    def submit(job: Job) -> Future[str]:
        given.append(job)
        future: Future[str] = Future()
        if len(given) != 3:
            future.set_result("does not compile" if len(given) == 2 else "")
        return future

    ahead, task = Ahead(submit), Task(wanted(), TILES[:3], rounds=4)
    for question in (wanted(), wanted(rows=200), replace(wanted(), where="elsewhere")):
        ahead.begin(replace(task, wanted=question))
    assert len(given) == 3
    made = ahead.compiled(task, time.monotonic() + 0.1)
    assert made.compiled and made.lost == {1: "does not compile"}
    compiled: list[Any] = []
    said: list[Message] = []
    machine = worker.Machine("cpu", by_eager, Clock("cpu"), ahead=compiled.append)
    worker.work(replace(task, wanted=SMALL, compiled=True), machine, said.append)
    assert not compiled and said[-1].event == "done"
    worker.work(replace(task, wanted=SMALL), machine, said.append)
    assert len(compiled) == 1


def test_what_is_lost_before_stays_lost(tmp_path: Path) -> None:
    task = Task(wanted(), TILES[:2], rounds=4, lost={1: "does not compile"})
    found = measured(task, time.monotonic() + 60, command=fake(tmp_path, "30"))
    assert (found.microseconds, found.failed) == ({0: 30.0}, {1: "does not compile"})


def test_a_process_is_begun_before_it_is_needed_and_ends_unused(tmp_path: Path) -> None:
    spare, command = Spare(), fake(tmp_path, "20", "30")
    found = supervised(tmp_path, "20", "30", spare=spare)
    held = spare._next
    assert found.microseconds == {0: 20.0, 1: 30.0} and held is not None
    assert spare.taken(None, command) is held
    last = spare._next
    assert last is not None
    spare.close()
    held.end()
    assert last.process.returncode is not None and held.process.returncode is not None
    with pytest.raises(OSError, match="nowhere"):
        spare.taken(None, ["/nowhere/python"])
    spare.close()


def test_specs_arrive_as_they_were() -> None:
    """In a process with other hashes; and what is written there is the same kernel."""
    code = (
        "import sys; from attngen import parcel; from attngen.emit import emit; import specs\n"
        "for got, case in zip(parcel.unpacked(sys.stdin.buffer.read()), specs.CASES, strict=True):\n"
        "    assert got == case.spec and hash(got) == hash(case.spec) and got.text == case.spec.text, case.name\n"
        "    if case.name in ('alibi', 'documents', 'dropped', 'table_cross'):\n"
        "        assert emit(got, case.tile).source == emit(case.spec, case.tile).source\n"
    )
    content = parcel.packed([case.spec for case in CASES])
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, "-c", code], input=content, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@needs_interpreter
def test_real_kernels_are_checked_and_timed() -> None:
    """Forward and backward, in Triton's interpreter: the whole way but for the card."""
    spec = attention(mask=CAUSAL, dtype=torch.float32, head_dim=16, lse=True)
    about = {"spec": spec, "problem": Problem((1, 2), 20, 20), "device": attngen.device.DEVICES["a100"]}  # type: ignore[attr-defined]
    layout = tuple(Layout((1, 2, 20, 16), (640, 16, 32, 1), 0, "float32") for _ in range(3))
    command = [sys.executable, str(TESTS / "interpreted_worker.py")]
    for phase in (FORWARD, BACKWARD):
        question = wanted(phase=phase, inputs=layout, **about)
        tiles = candidates(question, 2)[:2]
        assert len(tiles) == 2 and len(tiles[0]) == (1 if phase == FORWARD else 2)
        found = measured(Task(question, tiles, rounds=1), time.monotonic() + 120, command=command)
        assert sorted(found.microseconds) == [0, 1] and not found.failed and not found.broke, found


def test_rows_that_a_candidate_leaves_to_others_are_for_a_portable_one() -> None:
    spec, problem = replace(BY_NAME["bias"].spec, lse=True), Problem((1, 2), 40, 40)
    inputs = tuple(map(layout_of, verify.sample_inputs(spec, problem)))
    device = attngen.device.DEVICES["h200"]  # type: ignore[attr-defined]
    question = wanted(phase=BACKWARD, spec=spec, problem=problem, device=device, inputs=inputs)
    tiles = (Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)), hopper_bwd.tiles_of(spec)[1:]
    launched: list[Any] = []
    machine = worker.Machine("cpu", lambda kernel: launched.append(kernel) or len, Clock("cpu"))  # type: ignore[func-returns-value]
    task = Task(question, tiles, rounds=1)
    backward = worker.Backward(task, machine)
    job = job_of(task, tiles[1])
    assert job is not None and job.again is not None and job.again != job.source
    with pytest.raises(TypeError):  # what is launched here takes no tensors
        backward.checked(tiles[1])
    assert launched[0].leaves_rows and launched[0].otherwise.tiles == tiles[0]


def test_a_forward_candidate_that_leaves_rows_has_a_portable_one_behind_it() -> None:
    spec, problem = BY_NAME["fill_shows"].spec, Problem((1, 2), 40, 40)
    inputs = tuple(map(layout_of, verify.sample_inputs(spec, problem)))
    question = wanted(spec=spec, problem=problem, device=attngen.device.DEVICES["h200"], inputs=inputs)  # type: ignore[attr-defined]
    tiles = (Tile(128, 128, 8, 2, HOPPER),), (Tile(64, 32, 4, 2),)
    first, second = (job_of(Task(question, tiles, rounds=1), each) for each in tiles)
    assert first is not None and second is not None and first.again == second.source and second.again is None
