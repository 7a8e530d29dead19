"""The benchmark of training steps, at sizes for a CPU: every model of it is replaced, and passes the check it makes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parent.parent / "examples"
CASES = ("gpt2", "gpt2-dropout", "bert", "bert-dropout", "llama", "gemma2", "bloom", "mpt", "t5", "deberta")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark, where attngen leaves the rest of a graph as it is."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, options={"inner": "eager", "strict": True}))
    torch._dynamo.reset()
    yield import_module("benchmark_training")
    torch._dynamo.reset()


def measured(benchmark: Any, name: str, *variants: str) -> dict[str, Any]:
    (case,) = [case for case in benchmark.CASES if case.name == name]
    result: dict[str, Any] = benchmark.measure(replace(case, size=case.size.small), 1, list(variants))
    return result


def test_all_cases_are_tested(benchmark: Any) -> None:
    assert tuple(case.name for case in benchmark.CASES) == CASES


@pytest.mark.parametrize("name", CASES)
def test_a_model(name: str, benchmark: Any) -> None:
    result = measured(benchmark, name, "eager", "attngen eager")
    assert [row["variant"] for row in result["rows"]] == ["eager", "attngen eager"]
    for row in result["rows"]:
        assert not row["problem"] and row["ms"] > 0 and not row["missed"], row
        assert row["error"] <= result["budget"] < 0.3
    assert result["rows"][1]["replaced"] == 1


def test_a_deterministic_run_is_one(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is so no longer when it is over."""
    seen, step = [], benchmark.step

    def watched(*given: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        step(*given)

    monkeypatch.setattr(benchmark, "step", watched)
    result = measured(benchmark, "gpt2", "attngen eager deterministic")
    assert not result["rows"][0]["problem"] and seen and all(seen)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", ["bloom", "bert-dropout"])
def test_wrong_gradients_are_over_budget(name: str, benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = benchmark.step_of

    def halved(model: Any, variant: str, inputs: Any, weights: Any) -> Any:
        return made(model, variant, inputs, weights if variant == "eager" else weights / 2)

    monkeypatch.setattr(benchmark, "step_of", halved)
    result = measured(benchmark, name, "eager", "attngen eager")
    eager, ours = result["rows"]
    assert eager["error"] <= result["budget"] < ours["error"]


def test_only_spellings_that_the_library_has_are_run(benchmark: Any) -> None:
    models = {case.name: replace(case, size=case.size.small).model() for case in benchmark.CASES}
    spelt = {name: [v for v in benchmark.VARIANTS if benchmark.spelt(model, v)] for name, model in models.items()}
    assert spelt["llama"] == list(benchmark.VARIANTS)
    others = ["inductor eager deterministic", "attngen eager deterministic"]
    assert spelt["mpt"] == ["eager", "inductor eager", "attngen eager", *others]


def test_gradients_that_are_zero_must_stay_so(benchmark: Any) -> None:
    """But for rounding, which has no relative error: what a key's bias gets, as no weight changes with it."""
    exact = [torch.full((4,), size) for size in (1.0, 2.0, 1e-9)]
    found = [1.01 * exact[0], exact[1], torch.full((4,), 5e-4)]
    assert benchmark.difference(found, exact) == pytest.approx((0.01**2 / 2) ** 0.5, rel=1e-3)
    assert benchmark.difference([*found[:2], torch.full((4,), 2e-3)], exact) == float("inf")


def test_each_model_has_a_process(tmp_path: Path, benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails in one is not in the record, and the others are."""
    out = tmp_path / "out.json"
    given = ["--models", "gpt2,t5", "--variants", "eager", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / "benchmark_training.py"), *given])
    shared = import_module("benchmark")
    run = shared.subprocess.run

    def failing(command: list[str], **options: Any) -> Any:
        return run([sys.executable, "-c", "raise SystemExit(1)"] if "t5" in command else command, **options)

    monkeypatch.setattr(shared.subprocess, "run", failing)
    shared.record("", benchmark.measure, cases=benchmark.CASES, variants=benchmark.VARIANTS, rounds=1)
    (result,) = json.loads(out.read_text())["results"]
    assert result["model"] == "gpt2" and result["rows"][0]["ms"] > 0
    monkeypatch.setattr(shared.subprocess, "run", lambda command, **_: asked.append(command[3]))
    asked: list[str] = []
    shared.record("", benchmark.measure, cases=benchmark.CASES, variants=benchmark.VARIANTS, rounds=1)
    assert asked == ["t5"] and json.loads(out.read_text())["results"] == [result]


def test_a_variant_that_breaks_the_device_is_left_out(
    tmp_path: Path, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row says what it did; the others are measured in another process."""
    shared, out, asked = import_module("benchmark"), tmp_path / "out.json", []

    def process(command: list[str], **_: Any) -> None:
        asked.append(command[command.index("--variants") + 1])
        monkeypatch.setattr(sys, "argv", command[1:])
        shared.record("", benchmark.measure, cases=benchmark.CASES, variants=benchmark.VARIANTS, rounds=1)
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / "benchmark_training.py"), *given])

    def illegal(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    made = benchmark.step_of
    monkeypatch.setattr(
        benchmark, "step_of", lambda *given: illegal if given[1] == "inductor sdpa" else made(*given)
    )
    monkeypatch.setattr(shared, "synchronize", lambda _: illegal() if asked[-1:] == ["eager,inductor sdpa"] else None)
    given = ["--models", "gpt2", "--variants", "eager,inductor sdpa", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / "benchmark_training.py"), *given])
    monkeypatch.setattr(shared.subprocess, "run", process)
    shared.record("", benchmark.measure, cases=benchmark.CASES, variants=benchmark.VARIANTS, rounds=1)
    (result,) = json.loads(out.read_text())["results"]
    eager, sdpa = result["rows"]
    assert asked == ["eager,inductor sdpa", "eager"] and not eager["problem"]
    assert sdpa["variant"] == "inductor sdpa" and "illegal memory access" in sdpa["problem"]


def test_a_table_says_what_did_not_fit(benchmark: Any) -> None:
    def row(variant: str, ms: float, problem: str = "") -> dict[str, Any]:
        return {"variant": variant, "ms": ms, "peak_gib": 1.0, "problem": problem}

    full = [row(name, 0, "OutOfMemoryError: CUDA") for name in ("eager", "inductor eager")] + [row("attngen eager", 2)]
    some = [row("eager", 9), row("inductor eager", 6), row("inductor flex", 0, "ValueError: no"), row("attngen eager", 3)]
    record = {"device": "D", "versions": {}, "results": [{"model": "a", "rows": full}, {"model": "b", "rows": some}]}
    title, _, a, b, _, mean = import_module("tables").models(record)
    assert title.startswith("| model | eager | inductor eager | attngen eager | inductor flex |")
    assert a == "| a | out of memory | out of memory | 2.00 ms, 1.00 GiB | - | - / - |"
    assert b == "| b | 9.00 ms, 1.00 GiB | 6.00 ms, 1.00 GiB | 3.00 ms, 1.00 GiB | - | 2.00x / - |"
    assert "2.00x" in mean


def test_a_table_of_training_takes_the_better_spelling(benchmark: Any) -> None:
    times = {"eager": 9.0, "inductor sdpa": 6.0, "attngen eager": 4.0, "attngen sdpa": 3.0}
    times["attngen eager deterministic"] = 5.0
    rows = [{"variant": name, "ms": ms, "peak_gib": 1.0, "problem": ""} for name, ms in times.items()]
    rows.append({"variant": "inductor flex", "ms": 0.0, "peak_gib": 0.0, "problem": "AcceleratorError: illegal"})
    record = {"device": "D", "versions": {}, "results": [{"model": "a", "rows": rows}]}
    *_, line, _, mean = import_module("tables").training(record)
    told = ["9.00 ms, 1.00 GiB", "-", "6.00 ms, 1.00 GiB", "-", "3.00 ms, 1.00 GiB", "2.00x", "-", "5.00 ms, 1.00 GiB"]
    assert line == f"| a | {' | '.join(told)} |" and "2.00x" in mean
