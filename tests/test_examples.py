"""The examples: their numbers are eager's, and the command line does with them what the README says."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from typer.testing import CliRunner

import attngen
from attngen import backend, capture, compat, modelfile, verify
from attngen.cache.key import BACKWARD, FORWARD, Wanted, key_of
from attngen.cache.lookup import Choices
from attngen.cli import app

EXAMPLES = Path(__file__).parent.parent / "examples"
EXPECTED = {
    "llama": {"softmax(qk*0.125; causal)": 4},
    "gpt2": {"softmax(qk*0.125; where not(t0[i, j] == 0))": 4},
    "gemma2": {
        "softmax(tanh(qk*0.0625/50)*50; causal & window(256))": 2,
        "softmax(tanh(qk*0.0625/50)*50; causal)": 2,
    },
    "t5": {
        "softmax(qk + t0[h, j - i]; padding)": 3,
        "softmax(qk + t0[h, j - i]; causal)": 3,
        "softmax(qk; padding)": 3,
    },
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def computed(sites: list[dict[str, Any]]) -> dict[str, int]:
    """How many sites compute each expression."""
    expressions = [site["computes"].rsplit(", ", 4)[0] for site in sites]
    return {expression: expressions.count(expression) for expression in expressions}


def first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output.last_hidden_state
    return tensor


@pytest.mark.parametrize("name", EXPECTED)
def test_numbers_are_eagers(name: str) -> None:
    """At some length beyond the window of Gemma-2, to save time."""
    with modelfile.opened(EXAMPLES / f"{name}.py") as example, torch.no_grad(), attngen.record() as reports:
        assert isinstance(example.model, torch.nn.Module)
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x[:, :300], (example.args, example.kwargs))
        compiled = torch.compile(example.model, backend="attngen", options={"inner": "eager", "strict": True})
        actual, eager = (first(model(*args, **kwargs)) for model in (compiled, example.model))
        exact = first(copy.deepcopy(example.model).double()(*args, **kwargs))
    assert computed([site for report in reports for site in report.to_dict()["sites"]]) == EXPECTED[name]
    verdict = verify.within_budget(actual, exact, eager)
    assert verdict.ok, str(verdict)


@pytest.mark.parametrize("name", EXPECTED)
def test_each_is_explained(name: str) -> None:
    done = CliRunner().invoke(app, ["explain", str(EXAMPLES / f"{name}.py"), "--json", "--target", "h200"])
    assert done.exit_code == 0, done.stderr
    sites = json.loads(done.stdout)["sites"]
    assert computed(sites) == EXPECTED[name]
    for site in sites:
        assert site["status"] == "found" and 0.003 < site["predicted_ms"] < 0.2
        assert site["hbm_bytes"]["before"] > 4 * site["hbm_bytes"]["after"]


@pytest.mark.skipif(compat.interpreter_problem() is not None, reason="no interpreter of Triton")
def test_kernels_are_compiled_verified_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the README shows what is printed, except for names, registers, lines and errors, which are of some day."""
    name = "llama"
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["optimize", str(EXAMPLES / f"{name}.py"), "--target", "h200", "-o", str(out)])
    assert done.exit_code == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert computed(report["sites"]) == EXPECTED[name]
    for site in report["sites"]:
        assert site["status"] == "replaced" and 0 < site["error"] <= site["budget"]
        assert site["compiled"]["arch"] == 90 and site["compiled"]["spills"] == 0
    assert len(list((out / "kernels").iterdir())) == len(EXPECTED[name])
    sample = (EXAMPLES.parent / "README.md").read_text().split("```\n")[3]
    assert lasting(sample) == lasting(done.stdout.split("Written to")[0])


def lasting(text: str) -> list[str]:
    """The lines of a table without what changes with a release of a library, a template or a processor."""
    changing = r"fwd_\w+|\d+ registers|[\d.]+e-\d+|py:\d+"
    return [re.sub(changing, "", line).rstrip() for line in text.splitlines() if line.strip()]


class _Largest(TorchDispatchMode):
    """Notes the most elements that a result of any operator has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return results


def test_a_mask_and_a_bias_from_positions_exist_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 65,536 tokens it is explained; at fewer it runs, and no result has a number of elements near that of all pairs."""
    done = CliRunner().invoke(app, ["explain", str(EXAMPLES / "long.py"), "--json", "--target", "h200"])
    assert done.exit_code == 0, done.stderr
    expected = "softmax(qk*0.125 + neg(t0[h])*(i - j); causal & window(4096) & documents)"
    assert computed(json.loads(done.stdout)["sites"]) == {expected: 2}
    largest = _Largest()

    def inner(gm: fx.GraphModule, *_: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with largest:
                return gm(*args)

        return run

    monkeypatch.setattr(backend, "_inner", inner)
    with modelfile.opened(EXAMPLES / "long.py") as example, torch.no_grad():
        inputs = {name: x[:, :3500] for name, x in example.kwargs.items()}
        torch.compile(example.model, backend="attngen", options={"strict": True})(**inputs)
    assert largest.elements == 3 * 3500 * 1024  # queries, keys and values; there are 3500 * 3500 pairs


@pytest.mark.parametrize("train", [False, True])
def test_all_that_tiles_are_shipped_for_is_found(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones here, of which some are alike; on a GPU none are."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    asked: dict[str, Wanted] = {}

    def record(wanted: Wanted) -> None:
        asked[key_of(wanted).digest] = wanted

    with modelfile.opened(EXAMPLES / "shipped.py") as example, torch.set_grad_enabled(train):
        choices = Choices(mode="skip", measure=record)
        report = capture.explain(example.model, example.args, example.kwargs, {"target": "h200"}, choices=choices)
    assert len(report.sites) == len(example.args) >= 30 and all(site.status == "found" for site in report.sites)
    phases = [wanted.phase for wanted in asked.values()]
    assert (BACKWARD in phases) == train and phases.count(FORWARD) >= 20
    names = [problem.name for problem in import_module("shipped").problems()]
    assert len(set(names)) == len(names) == len(example.args)


def test_main_compares_with_eager(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert import_module("gpt2").main(inner="eager") < 1e-5
    assert "4 of 4 sites replaced" in capsys.readouterr().out


def test_benchmark_pass_says_what_share_the_pass_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    text = import_module("benchmark_pass").measure("gpt2", "eager")
    assert float(text.rsplit(": ", 1)[1].split(" or ")[0]) > 0, text
