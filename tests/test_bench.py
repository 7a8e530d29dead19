"""``attngen bench``: what is counted, what is checked, and the whole command on a CPU."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from attngen.bench import command, flash, measure, peers, plot, problems, records, report, spelling, worker
from attngen.bench.measure import Ceilings, Clock
from attngen.bench.problems import PROBLEMS, Problem, changed, selected, small
from attngen.bench.records import FAILED, MISSING, NOT_SPELLED, TIMED, WRONG, Record, Row
from attngen.bench.terms import Missing, NotSpelled
from attngen.cli import app
from attngen.errors import BadOption, CannotWrite, Unavailable
from attngen.show import console
from attngen.verify import within_budget

TINY = Problem("tiny", batch=2, heads=2, length=24, head_size=16, dtype="float32")
CEILINGS = Ceilings(product=1e12, copy=1e11)
VARIANTS = ("alibi", "softcap", "window", "document", "document_causal", "bias", "relative", "prefix", "sinks", "sigmoid")
OTHERS = ("gqa", "mla", "ragged_causal", "views", "cross")
SPELLINGS = [*(f"{name}_d64" for name in VARIANTS), *OTHERS, "dense_d64_n1024_full"]


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


def tiny(name: str) -> Problem:
    """A named problem, small and in float32, so that a mistake in one pair shows."""
    return replace(small(PROBLEMS[name]), dtype="float32", batch=2, heads=4, head_size=32)


# ------------------------------------------------------------------------------------------------------------- problems


def test_the_grid_holds_tokens_and_width() -> None:
    grid = selected(["dense_*"])
    assert len(grid) == 3 * 3 * 2
    assert {p.batch * p.length for p in grid} == {16384}
    assert {p.heads * p.head_size for p in grid} == {2048}
    assert {p.head_size for p in selected(["dense_d128_*"])} == {128}


def test_every_named_problem_is_consistent_and_stays_so_when_small() -> None:
    for problem in PROBLEMS.values():
        assert problem.checked() is problem
        assert small(problem).checked().keys <= problems.SMALL_LENGTH


def test_flags_change_numbers_and_the_name_says_which() -> None:
    other = changed(PROBLEMS["gqa"], {"length": 512, "causal": False, "window": None, "heads": 32})
    assert (other.length, other.causal, other.heads) == (512, False, 32)
    assert other.name == "gqa[length=512,causal=False]"
    assert changed(PROBLEMS["gqa"], {"length": None}) is PROBLEMS["gqa"]


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 0},
        {"heads": 6, "kv_heads": 4},
        {"kv_heads": 0},
        {"dtype": "float8"},
        {"causal": True, "key_length": 8},
        {"documents": 2, "key_length": 48},
        {"documents": 25},
        {"causal": True, "prefix": 4},
        {"sinks": True, "sigmoid": True},
        {"window": 0},
        {"softcap": -1.0},
        {"buckets": 3},
    ],
    ids=str,
)
def test_numbers_that_contradict_each_other_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match="tiny"):
        changed(TINY, change)


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(BadOption, match="alibi_d128"):
        selected(["alibi_128"])


# ----------------------------------------------------------------------------------------------------- cost and results


def brute_force(p: Problem, documents: list[list[int]]) -> int:
    """Pairs that count, one by one."""

    def counts(b: int, i: int, j: int) -> bool:
        position = i + p.keys - p.length
        return not (
            (p.causal and j > position)
            or (p.window is not None and abs(position - j) >= p.window)
            or (p.prefix is not None and j > position and j >= p.prefix)
            or (p.documents is not None and documents[b][i] != documents[b][j])
        )

    pairs = sum(counts(b, i, j) for b in range(p.batch) for i in range(p.length) for j in range(p.keys))
    return p.heads * pairs


@pytest.mark.parametrize("at_once", [1 << 22, 300], ids=["whole", "in pieces"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"causal": True},
        {"causal": True, "key_length": 31},
        {"window": 5},
        {"causal": True, "window": 5},
        {"prefix": 7},
        {"documents": 3},
        {"documents": 4, "causal": True, "window": 4},
        {"key_length": 50, "kv_heads": 1},
    ],
    ids=str,
)
def test_operations_are_counted_over_the_pairs_of_the_mask(
    change: dict[str, Any], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(spelling.PAIRS_AT_ONCE, "cpu", at_once)
    p = replace(TINY, **change, value_size=8)
    inputs = spelling.inputs_of(p, "cpu")
    documents = inputs.tensors["documents"].tolist() if p.documents else []
    pairs = brute_force(p, documents)
    assert spelling.area(p, inputs) == pairs
    assert spelling.flop(p, pairs) == 2 * pairs * (16 + 8)


def test_causal_area_in_closed_form() -> None:
    p = small(PROBLEMS["long"])
    assert spelling.area(p, spelling.inputs_of(p, "cpu")) == p.batch * p.heads * p.length * (p.length + 1) // 2


def test_traffic_is_inputs_and_result_once() -> None:
    p = replace(TINY, kv_heads=1, value_size=8, bias=True)
    query, keys, values, out, bias = 2 * 2 * 24 * 16, 2 * 24 * 16, 2 * 24 * 8, 2 * 2 * 24 * 8, 2 * 24 * 24
    assert spelling.traffic(p, spelling.inputs_of(p, "cpu")) == 4 * (query + keys + values + out + bias)


def test_documents_are_as_many_as_asked() -> None:
    p = replace(TINY, documents=5)
    documents = spelling.inputs_of(p, "cpu").tensors["documents"]
    assert (documents[:, 0] == 0).all() and (documents[:, -1] == 4).all()
    assert (documents.diff() >= 0).all()


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_reference_in_pieces_is_the_spelling_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(spelling.PAIRS_AT_ONCE, "cpu", 10_000)
    p = tiny(name)
    inputs = spelling.inputs_of(p, "cpu")
    exact, eager = spelling.references(p, inputs)
    double = inputs.double()
    torch.testing.assert_close(exact, spelling.spelled(p)(*double.operands, double.tensors))
    torch.testing.assert_close(eager, spelling.spelled(p)(*inputs.operands, inputs.tensors))
    assert exact.dtype == torch.float64 and exact.isfinite().all()


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("peer", ["sdpa", "flex"])
def test_library_spellings_compute_the_problem(peer: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, against float64; ``flex_attention`` as it is, not compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    p = tiny(name)
    inputs = spelling.inputs_of(p, "cpu")
    exact, eager = spelling.references(p, inputs)
    unspelled = {"sdpa": ("softcap", "sinks", "sigmoid"), "flex": ("sigmoid",)}[peer]
    if any(getattr(p, feature) for feature in unspelled):
        with pytest.raises(NotSpelled, match="no spelling of"):
            peers.PEERS[peer].prepare(p, inputs)
        return
    actual = peers.PEERS[peer].prepare(p, inputs)()
    assert actual.shape == exact.shape
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)
    assert within_budget(actual, exact, eager, slack=6.0).ok


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_plain_spelling_is_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, **options, options={"inner": "eager"}))
    p = tiny(name)
    inputs = spelling.inputs_of(p, "cpu")
    actual = peers.PEERS[peers.OURS].prepare(p, inputs)()
    assert within_budget(actual, *spelling.references(p, inputs)).ok


def test_a_spelling_that_we_leave_alone_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "spelled", lambda p: lambda q, k, v, tensors: (q @ k.mT).softmax(-2) @ v)
    with pytest.raises(NotSpelled, match="left alone"):
        peers.PEERS[peers.OURS].prepare(TINY, spelling.inputs_of(TINY, "cpu"))


# -------------------------------------------------------------------------------------------------------- flash-attn


class FakeFlash(ModuleType):
    """The two functions, computed by float64 attention from what they were given; ``[B, N, H, D]``."""

    given: dict[str, Any]

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.given = options
        left, right = options["window_size"]
        window = None if left in (None, -1) else left + 1
        p = Problem("", q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1], q.shape[3], v.shape[3], views=True)
        causal = options["causal"]
        assert right in (None, -1, 0 if causal else left)
        p = replace(p, causal=causal, window=window, softcap=options.get("softcap"), sinks="learnable_sink" in options)
        return spelling.spelled(p)(q, k, v, {"sinks": options["learnable_sink"]} if p.sinks else {})

    def flash_attn_varlen_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
        bounds = options.pop("cu_seqlens_q").tolist()
        assert options["max_seqlen_q"] == max(b - a for a, b in pairwise(bounds))
        pieces = [self.flash_attn_func(*(x[None, a:b] for x in (q, k, v)), **options)[0] for a, b in pairwise(bounds)]
        return torch.cat(pieces), None


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("peer", ["fa3", "fa4"])
def test_flash_attention_is_asked_for_the_problem(peer: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeFlash("fake")
    monkeypatch.setattr(flash, "_imported", lambda *names, install: fake)
    p = tiny(name)
    inputs = spelling.inputs_of(p, "cpu")
    unspelled = ["alibi", "bias", "buckets", "prefix", "sigmoid", *(["sinks"] if peer == "fa3" else [])]
    if any(getattr(p, feature) for feature in unspelled):
        with pytest.raises(NotSpelled):
            peers.PEERS[peer].prepare(p, inputs)
        return
    actual = peers.PEERS[peer].prepare(p, inputs)()
    torch.testing.assert_close(actual.double(), spelling.references(p, inputs)[0], rtol=1e-5, atol=1e-5)


def test_what_is_not_installed_says_how_to_install_it() -> None:
    with pytest.raises(Missing, match="pip install nothing-such"):
        flash._imported("nothing_such_at_all.interface", install="nothing-such")


def test_what_is_installed_and_broken_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_peer.py").write_text("import another_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="another_that_is_not_there"):
        flash._imported("broken_peer", install="broken-peer")


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
    import time

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
    """Two problems, one with a flag, the record as JSON and a picture."""
    names = ["gqa", "document_d64", "--length", "64"]
    done = run(
        *names, "--device", "cpu", "--peers", "attngen,eager,sdpa,fa4", "--rounds", "2", "--json", "a.json", "--plot", "a.png"
    )
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
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert "gqa[length=64]" in done.output
    again = run("--show", "a.json", "--plot", "b.png")
    assert again.exit_code == 0 and "gqa[length=64]" in again.output and Path("b.png").exists()


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
    record = a_record()
    for count in (0, plot.PER_ROW + 1):
        plot.drawn([replace(record, results=record.results * count)], tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").exists()
    with pytest.raises(CannotWrite):
        plot.drawn([record], tmp_path / "a.nothing")


# ---------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_the_command_on_a_gpu() -> None:
    done = run("dense_d64_n1024_causal", "--rounds", "3", "--json", "a.json", "--length", "512", "--batch", "2")
    assert done.exit_code == 0, done.output
    (result,) = json.loads(Path("a.json").read_text())["results"]
    rows = {row["peer"]: row for row in result["rows"]}
    assert rows[peers.OURS]["status"] == rows["eager"]["status"] == rows["flex"]["status"] == TIMED
    assert all(row["ms"] is None for row in rows.values() if row["status"] != TIMED)


def test_requests_know_every_number_of_a_problem() -> None:
    assert set(command.CHANGES) == {field.name for field in fields(Problem)} - {"name"}
    flags = {parameter.name for parameter in SimpleNamespace(**vars(_click_command())).params}
    assert set(command.CHANGES) <= flags


def _click_command() -> Any:
    import typer.main

    group: Any = typer.main.get_command(app)
    return group.commands["bench"]
