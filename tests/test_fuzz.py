"""Random attention-like graphs compute after replacement what they computed before: in ATen, compiled, and interpreted.

A failure prints its seed, and the smallest graph that fails like it; ``python tests/fuzz.py show SEED`` shows it again.
"""

from __future__ import annotations

from collections import Counter

import fuzz
import pytest
import torch
from fuzz_graphs import Case, build
from fuzz_judge import Run
from fuzz_writer import Draw

from attngen import compat

GRAPHS, PART = 2000, 100
COMPILED = range(5040, 5080)
INTERPRETED, JOBS = range(6000, 6400), 200


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
