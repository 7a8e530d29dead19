"""``attngen bench`` at work: clocks, verdicts, the process that measures, and the whole command on a CPU."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from torch import Tensor
from typer.testing import CliRunner, Result

from attngen import measure
from attngen.bench import command, peers, plot, records, report, spelling, worker
from attngen.bench.problems import PROBLEMS, Problem
from attngen.bench.records import FAILED, MISSING, NOT_SPELLED, TIMED, WRONG, Record, Row
from attngen.bench.terms import Missing
from attngen.cli import app
from attngen.errors import AttngenError, BadOption, CannotWrite, Unavailable
from attngen.measure import Ceilings, Clock
from attngen.show import console

TINY = Problem("tiny", batch=2, heads=2, length=24, head_size=16, dtype="float32")
CEILINGS = Ceilings(product=1e12, copy=1e11)


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


# --------------------------------------------------------------------------------------------------------------- clocks


class Script:
    """A clock that reads times from a list, and a record of what was called."""

    device = "cpu"

    def __init__(self, times: dict[str, list[float]]) -> None:
        self.times, self.calls = {name: iter(each) for name, each in times.items()}, list[str]()

    def start(self, call: Callable[[], object]) -> Callable[[], float]:
        name = str(call())
        self.calls.append(name)
        return lambda: next(self.times[name])


def scripted(times: dict[str, list[float]], rounds: int, **options: Any) -> tuple[dict[str, list[float]], list[str]]:
    clock = Script(times)
    calls = {name: (lambda name=name: name) for name in times}
    return measure.samples(calls, rounds, clock, **options), clock.calls  # type: ignore[arg-type]


def test_samples_are_interleaved_and_the_first_rounds_do_not_count() -> None:
    taken, calls = scripted({"a": [1.0, 3.0], "b": [10.0, 30.0]}, 2, warm_up=1)
    assert taken == {"a": [1.0, 3.0], "b": [10.0, 30.0]}
    assert calls == ["a", "b", "b", "a", "a", "b"]


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ([5.0], (5.0, 5.0, 5.0)),
        ([1.0, 2.0, 3.0, 4.0, 100.0], (3.0, 2.0, 4.0)),
        ([4.0, 1.0, 2.0, 3.0], (2.5, 1.75, 3.25)),
    ],
)
def test_median_and_quarters(taken: list[float], expected: tuple[float, ...]) -> None:
    times = measure.summary(taken)
    assert (times.median, times.low, times.high) == expected


def test_one_that_raises_while_timed_is_left_out() -> None:
    def breaks() -> None:
        raise RuntimeError("out of luck")

    failed: list[tuple[str, str]] = []
    runs = {"good": lambda: None, "bad": breaks}
    taken = measure.samples(runs, 3, Clock("cpu"), failed=lambda name, error: failed.append((name, str(error))))
    assert list(taken) == ["good"] and len(taken["good"]) == 3
    assert failed == [("bad", "out of luck")]
    with pytest.raises(RuntimeError):
        measure.samples(runs, 3, Clock("cpu"))


def test_rates_and_shares() -> None:
    row = worker.timed(Row("x", TIMED), [2.0, 2.0, 2.0], flop=10**9, moved=10**7, ceilings=CEILINGS)
    assert row.ms == 2.0
    assert row.tflops == pytest.approx(0.5)
    assert row.of_product == pytest.approx(0.5)
    assert row.of_copy == pytest.approx(0.05)


# ------------------------------------------------------------------------------------------------------------- verdicts


def peer(name: str, call: Callable[[Problem, spelling.Inputs], Tensor]) -> peers.Peer:
    return peers.Peer(name, lambda p, inputs: lambda: call(p, inputs), name, peers.BOTH)


def right(p: Problem, inputs: spelling.Inputs) -> Tensor:
    return spelling.spelled(p)(*inputs.operands, inputs.tensors)


def test_a_wrong_result_is_marked_and_has_no_time() -> None:
    wrong = peer("without its mask", lambda p, inputs: right(replace(p, causal=False), inputs))
    causal = replace(TINY, causal=True)
    result = worker.result_of(causal, [peer("right", right), wrong], "cpu", 3, CEILINGS)
    good, bad = result.rows
    assert good.status == TIMED and good.ms and good.error is not None and good.budget and good.error <= good.budget
    assert bad.status == WRONG and bad.ms is None and bad.tflops is None
    assert bad.error and bad.budget and bad.error > bad.budget
    text = shown(Record("card", {}, {"float32": asdict(CEILINGS)}, (result,)))
    assert "wrong result: error" in text
    timed_lines = [line for line in text.splitlines() if " ms " in line]
    assert len(timed_lines) == 1 and timed_lines[0].startswith("right")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        pytest.param(lambda p, i: right(p, i)[:, :, :1], "has shape", id="shape"),
        pytest.param(lambda p, i: right(p, i).fill_(torch.nan), "wrong result", id="nan"),
        pytest.param(lambda p, i: 1 / 0, "ZeroDivisionError: division by zero", id="raises"),
    ],
)
def test_a_bad_peer_ends_nothing_but_its_own_row(call: Any, said: str) -> None:
    result = worker.result_of(TINY, [peer("bad", call), peer("right", right)], "cpu", 2, CEILINGS)
    bad, good = result.rows
    assert bad.ms is None and bad.status in (FAILED, WRONG) and said in bad.reason
    assert good.status == TIMED


def test_reasons_are_short() -> None:
    assert worker.reason_of(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB")) == "out of memory"
    assert worker.reason_of(ValueError("first line\nsecond")) == "ValueError: first line"
    assert len(worker.reason_of(ValueError("x" * 1000))) == worker.LONGEST_REASON


def test_missing_and_unspelled_peers_have_a_row_each() -> None:
    def missing(p: Problem, inputs: spelling.Inputs) -> Any:
        raise Missing("not installed (pip install x)")

    absent = peers.Peer("absent", missing, "", peers.BOTH)
    elsewhere = peers.Peer("elsewhere", missing, "")
    result = worker.result_of(TINY, [absent, elsewhere], "cpu", 1, CEILINGS, {"lost": "x"})
    assert [row.status for row in result.rows] == [MISSING, NOT_SPELLED]


# ------------------------------------------------------------------------------------------------- the measuring process


def dies(p: Problem, inputs: spelling.Inputs) -> Any:
    os._exit(11)


def hangs(p: Problem, inputs: spelling.Inputs) -> Any:
    time.sleep(600)


def stricken(job: worker.Job, sender: Any) -> None:
    """The measuring process with two peers that take it with them; a new process, so it has to be told."""
    added = {"dies": dies, "hangs": hangs}
    peers.PEERS.update({name: peers.Peer(name, call, "", peers.BOTH) for name, call in added.items()})
    measured(job, sender)


measured = worker._work


def test_a_peer_that_takes_the_process_with_it_ends_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_work", stricken)
    job = worker.Job((TINY, replace(TINY, name="after")), ("eager", "dies", "sdpa"), "cpu", 1, timeout=60.0)
    begun: list[tuple[str, str]] = []
    *_, record = worker.measured(job, lambda problem, name: begun.append((problem, name)))
    assert [result.problem.name for result in record.results] == ["tiny", "after"]
    for result in record.results:
        rows = {row.peer: row for row in result.rows}
        assert rows["eager"].status == rows["sdpa"].status == TIMED
        assert (rows["dies"].status, rows["dies"].reason) == (FAILED, "its process died (exit code 11)")
    assert ("after", "dies") in begun


def test_a_peer_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_work", stricken)
    *_, record = worker.measured(worker.Job((TINY,), ("hangs", "eager"), "cpu", 1, timeout=12.0), lambda problem, name: None)
    hung, eager = record.results[0].rows
    assert (hung.status, hung.reason) == (FAILED, "stopped after 12 s")
    assert eager.status == TIMED


def test_a_process_that_dies_between_peers_costs_one_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a machine that is known, the next problem is measured; without, there is nothing to go on with."""
    known = [("machine", Record("card", {}, {}))]
    done = [("begins", ("after", "eager")), ("result", records.Result(TINY, 1, 1, 1, 1, ())), ("done", None)]
    said = [[*known, ("ended", "killed")], [*known, *done], [("ended", "no device")]]
    monkeypatch.setattr(worker, "_events", lambda job: iter(said.pop(0)))
    job = worker.Job((TINY, replace(TINY, name="after")), ("eager",), "cpu", 1, 60.0)
    *_, record = worker.measured(job, lambda problem, name: None)
    assert [[(row.status, row.reason) for row in result.rows] for result in record.results] == [[(FAILED, "killed")], []]
    with pytest.raises(AttngenError, match="no device"):
        list(worker.measured(job, lambda problem, name: None))


def test_a_problem_without_reference_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(p: Problem, inputs: spelling.Inputs) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(spelling, "references", none)
    job = worker.Job((TINY,), ("eager",), "cpu", 1, 60.0)
    (row,) = worker._result(job, TINY, CEILINGS, lambda name: None).rows
    assert (row.status, row.reason) == (FAILED, "no reference: out of memory")


# ----------------------------------------------------------------------------------------------------------- the command


def shown(record: Record) -> str:
    out = console()
    with out.capture() as text:
        out.print(report.shown(record))
    return text.get()


def a_record() -> Record:
    row = Row(
        "eager", TIMED, ms=1.0, ms_low=0.9, ms_high=1.1, tflops=2.0, of_product=0.4, of_copy=0.1, error=1e-3, budget=2e-3
    )
    rows = (row, replace(row, peer=peers.OURS, ms=0.5), Row("fa3", MISSING, "not installed"))
    result = records.Result(PROBLEMS["gqa"], 10, 100, 1000, 30, rows)
    return Record("card", {"torch": "2"}, {"bfloat16": asdict(CEILINGS)}, (result,))


def test_the_table_says_times_shares_and_reasons() -> None:
    text = shown(a_record())
    assert text.index("attngen") < text.index("eager")  # the fastest first
    assert "2.00x" in text and "40.0 %" in text and "50.0 %" in text  # of ours, of the product, of the budget
    assert "missing: not installed" in text and "card." in text
    assert "…" not in text


def test_errors_stand_beside_each_other_where_some_are_of_8_bits() -> None:
    record = a_record()
    (result,) = record.results
    eager, ours, missing = (replace(row, rms=rms) for row, rms in zip(result.rows, (1e-4, 2e-4, None), strict=True))
    coarse = replace(ours, peer="attngen-fp8", rms=1e-2)
    with_it = replace(record, results=(replace(result, rows=(eager, ours, coarse, missing)),))
    without = replace(record, results=(replace(result, rows=(eager, ours, missing)),))
    assert "RMS error: eager 1.00e-04, attngen 2.00e-04, attngen-fp8 1.00e-02" in shown(with_it)
    assert "RMS error" not in shown(without)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    records.written(a_record(), tmp_path / "a.json")
    assert records.read([tmp_path / "a.json"]) == [a_record()]
    with pytest.raises(CannotWrite):
        records.written(a_record(), tmp_path / "no" / "a.json")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"device": 1, "versions": {}, "ceilings": {}, "results": [{}]}'])
def test_a_file_that_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BadOption, match="no record"):
        records.read([tmp_path / "a.json"])


def test_the_command_from_end_to_end_on_a_cpu() -> None:
    """Two problems, one with a flag, the record as JSON."""
    names = ["gqa", "document_d64", "--length", "64", "--peers", "attngen,eager,sdpa,fa4"]
    done = run(*names, "--device", "cpu", "--rounds", "2", "--json", "a.json")
    assert done.exit_code == 0, done.output
    values = json.loads(Path("a.json").read_text())
    assert values["ceilings"]["bfloat16"]["product"] > 0 and values["versions"]["torch"] == torch.__version__
    assert [result["problem"]["name"] for result in values["results"]] == ["document_d64[length=64]", "gqa[length=64]"]
    for result in values["results"]:
        assert set(result) == {field.name for field in fields(records.Result)}
        rows = {row["peer"]: row for row in result["rows"]}
        assert list(rows) == ["attngen", "eager", "sdpa", "fa4"]
        assert all(set(row) == {field.name for field in fields(Row)} for row in rows.values())
        for name in ("attngen", "eager", "sdpa"):
            row = rows[name]
            assert row["status"] == TIMED, row["reason"]
            assert row["ms_low"] <= row["ms"] <= row["ms_high"]
            assert row["tflops"] == pytest.approx(result["flop"] / row["ms"] / 1e9)
            assert 0 < row["error"] <= row["budget"]
        assert rows["fa4"]["status"] == NOT_SPELLED and rows["fa4"]["ms"] is None
    assert "gqa[length=64]" in done.output


def test_a_record_is_shown_again_with_a_picture() -> None:
    pytest.importorskip("matplotlib")
    records.written(a_record(), Path("a.json"))
    done = run("--show", "a.json", "--plot", "a.png")
    assert done.exit_code == 0 and "card." in done.output
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_the_list_names_problems_and_peers() -> None:
    done = run("--list")
    assert done.exit_code == 0
    assert all(name in done.output for name in (*PROBLEMS, *peers.PEERS))


def test_without_a_gpu_it_says_so_and_lists() -> None:
    done = run("gqa")
    assert done.exit_code == Unavailable.exit_code
    assert (
        "there is no GPU here" in done.output and "--device cpu" in done.output and "dense_d128_n4096_causal" in done.output
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "no problem is called"),
        (["gqa", "--peers", "fa9"], "no peer is called"),
        (["gqa", "--rounds", "0"], "--rounds"),
        (["gqa", "--device", "tpu"], "unknown device"),
        (["gqa", "--kv-heads", "3"], "cannot share"),
        (["--show", "nowhere.json"], "no record"),
    ],
)
def test_bad_options_end_before_any_work(arguments: list[str], said: str) -> None:
    device = [] if "--device" in arguments else ["--device", "cpu"]
    done = run(*arguments, *device)
    assert done.exit_code == BadOption.exit_code and said in done.output


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("gqa", "--device", "cpu", "--plot", "a.png")
    assert done.exit_code == Unavailable.exit_code and "attngen[bench]" in done.output


def test_our_own_wrong_result_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    record = a_record()
    rows = (Row(peers.OURS, WRONG, "wrong result: error 1"),)
    monkeypatch.setattr(
        worker, "measured", lambda job, begins: iter([replace(record, results=(replace(record.results[0], rows=rows),))])
    )
    done = run("gqa", "--device", "cpu")
    assert done.exit_code == 7 and "gqa: wrong result" in done.output


def test_pictures_of_no_and_of_many_problems(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = a_record()
    for count in (0, plot.PER_ROW + 1):
        plot.drawn([replace(record, results=record.results * count)], tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").exists()
    with pytest.raises(CannotWrite):
        plot.drawn([record], tmp_path / "a.nothing")


def test_every_number_of_a_problem_is_an_option() -> None:
    group: Any = typer.main.get_command(app)
    options = {parameter.name for parameter in group.commands["bench"].params}
    assert set(command.CHANGES) == {field.name for field in fields(Problem)} - {"name"}
    assert set(command.CHANGES) <= options


# ---------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_the_command_on_a_gpu() -> None:
    done = run("dense_d64_n1024_causal", "--rounds", "3", "--json", "a.json", "--length", "512", "--batch", "2")
    assert done.exit_code == 0, done.output
    (result,) = json.loads(Path("a.json").read_text())["results"]
    rows = {row["peer"]: row for row in result["rows"]}
    assert rows[peers.OURS]["status"] == rows["eager"]["status"] == rows["flex"]["status"] == TIMED
    assert all(row["ms"] is None for row in rows.values() if row["status"] != TIMED)
