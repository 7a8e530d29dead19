"""Random attention-like graphs compute after replacement what they computed before: in ATen, compiled, and interpreted.

A failure prints its seed, and the smallest graph that fails like it; ``python tests/fuzz.py show SEED`` shows it again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import fuzz
import pytest
import torch
from fuzz_graphs import Case, build
from fuzz_judge import Run, judged, results_of
from fuzz_writer import Draw
from torch import Tensor, fx

from attngen import compat
from attngen.passes import masking

GRAPHS, PART = 700, 100  # ``python tests/fuzz.py run`` goes on
COMPILED = range(5040, 5055)
INTERPRETED, JOBS = range(200), 100
ROUNDED = (75258, 81499, 84383)  # what eager rounds to 16 bits on the way, a kernel keeps in float32


@pytest.mark.parametrize("first", range(0, GRAPHS, PART))
def test_replaced_graphs_compute_what_they_did(first: int) -> None:
    result = fuzz.chunk(first, PART)
    assert not result["failures"], "\n\n".join(result["failures"])
    assert result["compared"] > PART / 4  # else this would say little


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_graphs_compute_what_they_did(dynamic: bool) -> None:
    found = Counter[str]()
    for seed in COMPILED:
        torch._dynamo.reset()
        draw = Draw(seed)
        result = fuzz.outcome(draw, lambda case: fuzz.compiled(case, dynamic=dynamic))
        assert not result.wrong, f"seed {seed}: {result.wrong}\n{build(Draw(seed)).text}"
        found["replaced"] += result.replaced > 0
    assert found["replaced"] > len(COMPILED) / 4


@pytest.mark.skipif(compat.interpreter_problem() is not None, reason="no interpreter")
def test_interpreted_kernels_compute_what_the_graph_did() -> None:
    results = fuzz.interpreted(INTERPRETED, JOBS)
    assert len(results) == JOBS
    wrong = {seed: text for seed, text in results.items() if text}
    assert not wrong, "\n\n".join(f"seed {seed}: {text}\n{fuzz.interpreted_case(seed).text}" for seed, text in wrong.items())


def test_failures_are_shrunk() -> None:
    """The smallest list with a 7 and, later, something over 50 in it."""

    def fails(choices: list[int]) -> bool:
        return 7 in choices and any(c > 50 for c in choices[choices.index(7) :])

    assert fuzz.shrunk([3, 99, 7, 1, 2, 60, 88, 4], fails) in ([7, 60], [7, 88])


def not_finite(added: float, place: int, value: float) -> Case:
    """Causal attention by adding a number, with ``value`` in the last query or key."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (torch.softmax(q @ k.mT + torch.full((8, 8), added).triu(1), -1) @ v,)

    torch.manual_seed(0)
    inputs = tuple(torch.randn(8, 8) for _ in range(3))
    inputs[place][7, 0] = value
    return Case(fx.symbolic_trace(model), inputs, training=False)


def test_a_hidden_nan_is_noticed() -> None:
    case = not_finite(0.0, 0, math.nan)
    eager = results_of(case.gm.forward, case, case.inputs)
    assert not judged(case, eager, eager)
    assert judged(case, [x.nan_to_num(0.0) for x in eager], eager)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_infinite_score_that_is_masked_need_not_be_seen(value: float) -> None:
    """Eager adds -inf to it: NaN. Without it only one number is right."""
    case = not_finite(-math.inf, 1, value)
    eager = results_of(case.gm.forward, case, case.inputs)
    assert eager[0][:7].isnan().any()
    plain = replace(case, inputs=(case.inputs[0], case.inputs[1].nan_to_num(0.0, 0.0, 0.0), case.inputs[2]))
    unseen = results_of(plain.gm.forward, plain, plain.inputs)
    ours = [torch.cat([unseen[0][:7], eager[0][7:]]), *eager[1:]]
    assert not judged(case, ours, eager)
    assert judged(case, [ours[0] * 1.01, *ours[1:]], eager)


def test_wrong_results_are_noticed() -> None:
    """A hundredth too much: all but a few graphs, whose scores are too large for anything to be certain, fail."""
    noticed = []
    for seed in range(60):
        case = build(Draw(seed))
        results = case.gm.forward(*(x.clone() for x in case.inputs))
        if case.training or not all(r.dtype == torch.float32 and r.isfinite().all() and r.any() for r in results):
            continue

        def off(case: Case) -> tuple[Run, int, list[str]]:
            return lambda *xs: tuple(1.01 * r for r in case.gm.forward(*xs)), 1, []

        noticed.append("error" in fuzz.outcome(Draw(seed), off).wrong)
    assert len(noticed) > 15 and sum(noticed) > 0.8 * len(noticed)


def scaled(by: float) -> Callable[[Case], tuple[Run, int, list[str]]]:
    """Stands for a wrong replacement: what eager computes, times ``by``."""
    return lambda case: (lambda *xs: tuple(by * r for r in case.gm.forward(*xs)), 1, [])


@pytest.mark.parametrize("seed", ROUNDED)
def test_roundings_on_the_way_may_be_left_out(seed: int) -> None:
    assert not fuzz.outcome(Draw(seed)).wrong
    assert "error" in fuzz.outcome(Draw(seed), scaled(1.1)).wrong


def test_wrong_results_in_16_bits_are_noticed() -> None:
    """A tenth too much: leaving out roundings excuses next to none of them."""
    noticed = []
    for seed in range(80):
        case = build(Draw(seed))
        results = case.gm.forward(*(x.clone() for x in case.inputs))
        if case.training or "float16" not in case.text or not all(r.isfinite().all() and r.any() for r in results):
            continue
        noticed.append("error" in fuzz.outcome(Draw(seed), scaled(1.1)).wrong)
    assert len(noticed) > 25 and sum(noticed) > 0.8 * len(noticed)


def test_a_wrong_replacement_of_the_past_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills taken for masks beside numbers as large as they: seed 64904, whose cause is mended."""
    assert fuzz.outcome(Draw(64904)) == fuzz.Outcome(replaced=1)
    monkeypatch.setattr(masking, "_holds_fill", lambda term: False)
    assert "error 3.25e+00" in fuzz.outcome(Draw(64904)).wrong
