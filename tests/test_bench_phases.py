"""``attngen bench --phase``: gradients alone, and with the forward; what is timed, and that each is right before it is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from test_bench import TINY, FakeFlash, tiny
from torch import Tensor
from typer.testing import CliRunner

import attngen
from attngen import measure
from attngen.bench import flash, peers, phases, problems, records, report, spelling, worker
from attngen.bench.problems import Problem, changed
from attngen.bench.records import NOT_SPELLED, TIMED, WRONG, Record, Row
from attngen.bench.terms import BOTH, FORWARD, GRADIENT, PHASES, NotSpelled
from attngen.cli import app
from attngen.errors import BadOption
from attngen.measure import Ceilings, Clock, Staged
from attngen.show import console
from attngen.spec import HOPPER, PORTABLE

ROOT = Path(__file__).parent.parent
CEILINGS = Ceilings(product=1e12, copy=1e11)
COMPILED = torch.compile


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(name: str) -> Problem:
    """A small problem; what its scores load is trained where they load anything."""
    p = tiny(name)
    return replace(p, trained=any(getattr(p, feature) for feature in problems.LEARNT))


def timed(peer: str, p: Problem, phase: str) -> tuple[phases.Call, list[phases.Expected]]:
    """The call of a peer at ``p``, and what it has to give."""
    inputs = spelling.inputs_of(p, "cpu")
    wanting = inputs.wanting(trained=p.trained, rows_first=peers.PEERS[peer].rows_first and not p.views)
    call = phases.call_of(peers.PEERS[peer].prepare(p, wanting), p, wanting, phase)
    return call, phases.expected(p, inputs, phase)


def close(made: Any, expected: list[phases.Expected]) -> None:
    """In float32, against float64."""
    for actual, each in zip(made, expected, strict=True):
        torch.testing.assert_close(actual.double(), each.exact, rtol=1e-5, atol=2e-5, msg=lambda text, e=each: e.name + text)


# ----------------------------------------------------------------------------------------------------------- references


@pytest.mark.parametrize(
    "name", ["gqa", "views", "mla", "alibi_d64", "bias_trained_d64", "relative_trained_d64", "sinks_d64"]
)
def test_the_reference_in_pieces_is_the_gradient_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(spelling.PAIRS_AT_ONCE, "cpu", 40_000)
    p = trained(name)
    inputs = spelling.inputs_of(p, "cpu")
    assert len(list(spelling.chunks(p, "cpu"))) > 2
    found = phases.expected(p, inputs, GRADIENT)
    exact, eager = inputs.double().wanting(trained=p.trained), inputs.wanting(trained=p.trained)
    assert [each.name.removeprefix("gradient of ") for each in found] == list(exact.leaves)
    assert tuple(exact.leaves)[:3] == ("queries", "keys", "values") and len(exact.leaves) == 3 + p.trained
    for leaves, at in ((exact, "exact"), (eager, "eager")):
        out = spelling.spelled(p)(*leaves.operands, leaves.tensors)
        grad = spelling.gradient_of_result(p, inputs)
        made = torch.autograd.grad(out, list(leaves.leaves.values()), grad.to(out.dtype))
        for each, whole in zip(found, made, strict=True):
            torch.testing.assert_close(getattr(each, at), whole, rtol=1e-4, atol=1e-5)
    assert all(each.exact.dtype == torch.float64 and each.slack == 3.0 for each in found)


def test_both_has_the_result_too() -> None:
    names = [each.name for each in phases.expected(TINY, spelling.inputs_of(TINY, "cpu"), BOTH)]
    assert names == ["result", "gradient of queries", "gradient of keys", "gradient of values"]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("peer", ["eager", "sdpa", "attngen"])
def test_draws_of_dropout_are_right_if_they_are_draws(peer: str, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, **options, options={"inner": "eager"}))
    p = replace(tiny("dropout_d64"), length=96, heads=4)
    torch.manual_seed(0)
    with torch.set_grad_enabled(phase != FORWARD):
        inputs = spelling.inputs_of(p, "cpu")
        given = inputs if phase == FORWARD else inputs.wanting(trained=False)
        call = phases.call_of(peers.PEERS[peer].prepare(p, given), p, given, phase)
        expected = phases.expected(p, inputs, phase)
        made = call()
    assert phases.verdict(made, expected)[1].ok
    assert not phases.verdict([x * 0.9 for x in made], expected)[1].ok  # a factor was forgotten
    assert not phases.verdict([each.exact for each in expected], expected)[1].ok  # nothing was dropped
    twice = [2 * x - each.exact for x, each in zip(made, expected, strict=True)]
    assert not phases.verdict(twice, expected)[1].ok  # far too much was


def test_operations_and_bytes_of_each_phase() -> None:
    """Two products forward, five for the gradients; with each gradient as large as what it is of."""
    assert [spelling.flop(TINY, 10, phase) for phase in PHASES] == [2 * 10 * 16 * n for n in (2, 5, 7)]
    assert [spelling.flop(replace(TINY, value_size=8), 10, phase) for phase in PHASES] == [480, 1280, 1760]
    p = replace(TINY, bias=True)
    inputs = spelling.inputs_of(p, "cpu")
    forward, bias = spelling.traffic(p, inputs), inputs.tensors["bias"].numel() * 4
    assert spelling.traffic(p, inputs, GRADIENT) == 2 * forward - bias
    assert spelling.traffic(replace(p, trained=True), inputs, BOTH) == 2 * forward


def test_only_what_can_be_trained_is() -> None:
    with pytest.raises(BadOption, match="trained needs something to train"):
        changed(TINY, {"trained": True})
    assert changed(TINY, {"trained": True, "alibi": True}).trained


# ---------------------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("phase", [GRADIENT, BOTH])
@pytest.mark.parametrize(
    "name", ["gqa", "views", "document_causal_d64", "alibi_d64", "bias_trained_d64", "relative_trained_d64"]
)
def test_sdpa_gives_the_gradients(name: str, phase: str) -> None:
    call, expected = timed("sdpa", trained(name), phase)
    for _ in range(2):
        close(call(), expected)


@pytest.mark.parametrize("name", ["views", "bias_trained_d64", "relative_trained_d64"])
def test_flex_gives_the_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own derivatives, which it allows on GPUs only; a table is made beside it, or it would get none."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch, "compile", lambda f, **options: COMPILED(f, backend="aot_eager", dynamic=False))
    call, expected = timed("flex", trained(name), GRADIENT)
    for _ in range(2):
        close(call(), expected)


@pytest.mark.parametrize("name", ["gqa", "views", "document_d64"])
def test_flash_attention_gives_the_gradients_and_copies_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    class Watched(FakeFlash):
        def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            given.extend((q, k, v))
            return super().flash_attn_func(q, k, v, **options)

    monkeypatch.setattr(flash, "_imported", lambda *names, install: Watched("fake"))
    p = trained(name)
    call, expected = timed("fa4", p, GRADIENT)
    close(call(), expected)
    if not p.documents:
        assert all(x.is_contiguous() and x._is_view() == (not p.views) for x in given)


def test_the_wheel_without_gradients_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_imported", lambda *names, install: FakeFlash(flash.FORWARD_ONLY))
    inputs = spelling.inputs_of(TINY, "cpu")
    assert peers.PEERS["fa3"].prepare(TINY, inputs)().shape == (2, 2, 24, 16)
    with pytest.raises(NotSpelled, match="fa3-fwd has no gradient"):
        peers.PEERS["fa3"].prepare(TINY, inputs.wanting(trained=False))


@pytest.mark.parametrize("name", ["gqa", "bias_trained_d64"])
def test_ours_is_planned_with_its_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **options: COMPILED(f, **options, options={"inner": "eager"}))
    p = trained(name)
    with attngen.record() as reports:
        call, expected = timed("attngen", p, BOTH)
    for _ in range(2):
        close(call(), expected)
    assert phases.kernels(reports, p, FORWARD).startswith(f"forward {PORTABLE} (")
    both = phases.kernels(reports, p, BOTH)
    assert both == f"{phases.kernels(reports, p, FORWARD)}, {phases.kernels(reports, p, GRADIENT)}"
    assert f"gradient {PORTABLE} (queries " in both


def test_our_operator_can_be_asked_for_its_gradient_again(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = spelling.inputs_of(TINY, "cpu").wanting(trained=False)
    run = COMPILED(spelling.spelled(TINY), backend="attngen", options={"inner": "eager"})
    out = run(*inputs.operands, {})
    again = [torch.autograd.grad(out, inputs.operands, torch.ones_like(out), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))


def test_gradients_without_a_kernel_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They go block by block: heads are too wide."""
    monkeypatch.setattr(torch, "compile", lambda f, **options: COMPILED(f, **options, options={"inner": "eager"}))
    wide = replace(TINY, head_size=512, heads=1, batch=1)
    inputs = spelling.inputs_of(wide, "cpu")
    assert peers.PEERS[peers.OURS].prepare(wide, inputs)().shape == (1, 1, 24, 512)
    torch._dynamo.reset()
    with pytest.raises(NotSpelled, match="no kernel of ours for the gradient: block by block"):
        peers.PEERS[peers.OURS].prepare(wide, inputs.wanting(trained=False))


def test_the_family_of_the_gradient_is_named() -> None:
    tile = {"rows": 128, "keys": 64, "family": HOPPER}
    site = attngen.report.SiteReport("", "replaced", backward="128x64 hopper", backward_tiles=(tile,))
    reports = [attngen.report.Report("", (site, site))]
    assert phases.kernels(reports, TINY, GRADIENT) == "gradient hopper (128x64 hopper)"
    alibi = replace(TINY, alibi=True, trained=True)
    assert phases.kernels(reports, alibi, GRADIENT).startswith("gradient portable (the hopper kernels make no")


# ------------------------------------------------------------------------------------------------------------- verdicts


def peer(name: str, run: Any) -> peers.Peer:
    return peers.Peer(
        name, lambda p, inputs: lambda: run(spelling.spelled(p)(*inputs.operands, inputs.tensors), inputs), "", peers.BOTH
    )


class Halved(torch.autograd.Function):
    """The value as it is, with half its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad / 2


@pytest.mark.parametrize("phase", [GRADIENT, BOTH])
def test_a_wrong_gradient_is_marked_and_has_no_time(phase: str) -> None:
    tried = [
        peer("right", lambda out, inputs: out),
        peer("halved", lambda out, inputs: Halved.apply(out)),
        peer("without", lambda out, inputs: out.detach()),
        peer("forgets", lambda out, inputs: torch.zeros_like(out) + inputs.query.sum()),
    ]
    result = worker.result_of(TINY, tried, "cpu", 2, CEILINGS, phase=phase)
    right, halved, without, forgets = result.rows
    assert right.status == TIMED and right.error is not None and right.budget and right.error <= right.budget
    assert result.phase == phase and result.flop == spelling.flop(TINY, result.pairs, phase)
    assert (halved.status, halved.ms) == (WRONG, None) and halved.reason.startswith("wrong gradient of ")
    assert (without.status, without.reason) == (NOT_SPELLED, "it has no gradient")
    assert (forgets.status, forgets.reason) == (NOT_SPELLED, "it has no gradient of keys, values")


def test_gradients_are_recorded_only_where_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "dup2", lambda a, b: None)
    with torch.enable_grad():
        for phase in PHASES:
            worker._set_up(phase)
            assert torch.is_grad_enabled() == (phase != FORWARD)


def test_of_a_staged_call_the_second_part_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is given what was made for it."""
    now, said = [0.0], list[str]()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def takes(seconds: float, value: str) -> str:
        now[0] += seconds
        said.append(value)
        return value

    call = Staged(lambda: takes(5.0, f"made {len(said)}"), lambda value: takes(2.0, f"used {value}"))
    assert Clock("cpu").start(call)() == 2000.0
    assert call() == "used made 2"
    assert said == ["made 0", "used made 0", "made 2", "used made 2"]


# -------------------------------------------------------------------------------------------------------------- records


def a_record(phase: str) -> Record:
    row = Row("eager", TIMED, ms=1.0, ms_low=0.9, ms_high=1.1, tflops=2.0, of_product=0.4, of_copy=0.1)
    ours = replace(row, peer=peers.OURS, ms=0.5, tflops=4.0, kernel="gradient hopper (128x64 hopper)")
    result = records.Result(problems.PROBLEMS["gqa"], 10, 100, 1000, 30, (row, ours), phase)
    return Record("card", {"torch": "2"}, {"bfloat16": asdict(CEILINGS)}, (result,))


@pytest.mark.parametrize("phase", PHASES)
def test_tables_say_what_was_timed(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = console()
    with out.capture() as text:
        out.print(report.shown(a_record(phase)))
    title, *lines = text.get().splitlines()
    assert title.startswith("gqa  4x32/8 heads" if phase == FORWARD else f"gqa  {report.TITLES[phase]}:  4x32/8 heads")
    assert any(line.split() == ["attngen", "gradient", "hopper", "(128x64", "hopper)"] for line in lines)
    monkeypatch.syspath_prepend(ROOT / "examples")
    import tables

    *_, note = tables.attention(json.loads(a_record(phase).to_json()))
    units = {FORWARD: "TFLOP/s", GRADIENT: "TFLOP/s of the gradient", BOTH: "TFLOP/s of forward and gradient"}
    assert note.startswith(f"{units[phase]}. Geometric mean over the best of the others: 2.00x.")


def test_a_record_from_before_there_were_phases_is_of_the_forward(tmp_path: Path) -> None:
    values = json.loads(a_record(FORWARD).to_json())
    for result in values["results"]:
        del result["phase"]
    (tmp_path / "old.json").write_text(json.dumps(values))
    (record,) = records.read([tmp_path / "old.json"])
    assert {result.phase for result in record.results} == {FORWARD}


def test_pictures_say_what_was_timed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from attngen.bench import plot

    plot.drawn([a_record(phase) for phase in PHASES], tmp_path / "a.svg")
    assert "forward and gradient" in (tmp_path / "a.svg").read_text()


def test_the_option_reaches_the_measuring_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[worker.Job] = []

    def measured(job: worker.Job, begins: Any) -> Iterator[Record]:
        asked.append(job)
        yield a_record(job.phase)

    monkeypatch.setattr(worker, "measured", measured)
    for phase in PHASES:
        done = CliRunner().invoke(app, ["bench", "gqa", "--device", "cpu", "--phase", phase])
        assert done.exit_code == 0 and asked.pop().phase == phase
    done = CliRunner().invoke(app, ["bench", "gqa", "--device", "cpu", "--phase", "sideways"])
    assert done.exit_code == BadOption.exit_code and "forward, gradient, both" in done.output
    job = worker.Job((TINY,), ("eager",), "cpu", 1, 60.0, BOTH)
    result = worker._result(job, TINY, CEILINGS, lambda name: None)
    assert (result.phase, result.rows[0].status) == (BOTH, TIMED)


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "phase"), [("dense_d64_n1024_causal", BOTH), ("bias_trained_d64", GRADIENT), ("relative_trained_d64", BOTH)]
)
def test_the_command_on_a_gpu(name: str, phase: str, tmp_path: Path) -> None:
    """A minute each: most of it is compilation."""
    sizes = ["--length", "512", "--batch", "2", "--rounds", "3", "--peers", "attngen,eager,inductor"]
    done = CliRunner().invoke(app, ["bench", name, *sizes, "--phase", phase, "--json", str(tmp_path / "a.json")])
    assert done.exit_code == 0, done.output
    (result,) = json.loads((tmp_path / "a.json").read_text())["results"]
    rows = {row["peer"]: row for row in result["rows"]}
    assert rows[peers.OURS]["status"] == TIMED and "gradient" in rows[peers.OURS]["kernel"], rows
    if "relative" not in name:  # there eager adds thousands up in 16 bits for each entry of a table
        assert rows["eager"]["status"] == rows["inductor"]["status"] == TIMED, rows
