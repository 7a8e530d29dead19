"""More layers of the same kind cost next to nothing: they are proved by what was proved for the first ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from torch import fx, nn

from attngen import cost, decide, index, pipeline
from attngen.options import parse
from attngen.passes import decompose
from attngen.report import Report


def llama(layers: int, how: str) -> zoo.Example:
    config = hf.LlamaConfig(**zoo._COMMON, num_hidden_layers=layers, num_key_value_heads=2, use_cache=False)
    return zoo._model("LlamaModel", config, how), {"input_ids": zoo.token_ids()}


def t5(layers: int, how: str) -> zoo.Example:
    config = zoo._t5_config()
    config.num_layers = config.num_decoder_layers = layers
    inputs = {"input_ids": zoo.token_ids(), "attention_mask": zoo._right_padded()}
    return zoo._model("T5Model", config, how), inputs | {"decoder_input_ids": zoo.token_ids(7)}


def optimized(model: nn.Module, inputs: dict[str, Any]) -> tuple[Report, fx.Graph]:
    """The report, and the graph after its sites were replaced."""
    torch._dynamo.reset()
    seen: list[tuple[Report, fx.Graph]] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        report, _ = pipeline.optimize(gm, example_inputs, parse({"strict": True}))
        seen.append((report, gm.graph))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs)
    (found,) = seen
    return found


def proofs() -> int:
    """How many questions about indices have been answered by thinking, not by remembering."""
    known = (index.never_negative, index.floordiv, index.modulo, index.recombine, index._reshaped, decide.chosen)
    return sum(function.cache_info().misses for function in known)


@pytest.mark.parametrize(
    ("build", "how", "sites"), [(llama, "eager", 1), (llama, "sdpa", 1), (t5, "eager", 3)], ids=["llama", "sdpa", "t5"]
)
def test_further_layers_ask_nothing_new(
    build: Callable[[int, str], zoo.Example], how: str, sites: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[fx.Node] = []
    formulas: list[Any] = []
    trace, formula = decompose._trace, cost.formula
    monkeypatch.setattr(decompose, "_trace", lambda node, *rest: traced.append(node) or trace(node, *rest))
    monkeypatch.setattr(cost, "formula", lambda *about: formulas.append(about) or formula(*about))
    assert len(optimized(*build(2, how))[0].replaced) == 2 * sites
    few = proofs(), len(traced), len(formulas)
    report, _ = optimized(*build(4, how))
    assert len(report.replaced) == 4 * sites and report.missed == ()
    assert proofs() == few[0]
    assert len(formulas) == few[2]
    assert len(traced) == 2 * few[1]  # once for each graph, however many layers it has
    assert len({site.operator for site in report.sites}) <= sites


def test_layers_share_one_table() -> None:
    """T5 computes its bias in the first layer and passes it on: one table for the encoder, one for the decoder."""
    report, graph = optimized(*t5(3, "sdpa"))
    calls = [node for node in graph.nodes if "fwd_" in str(node.target)]
    tables: dict[str, list[fx.Node]] = {}
    for site, call in zip(report.sites, calls, strict=True):
        if "t0[h, j" in site.computes:
            tables.setdefault(f"{site.sizes['rows']}", []).append(call.args[3])  # type: ignore[index]
    assert [len(each) for each in tables.values()] == [3, 3]
    assert all(len(set(each)) == 1 for each in tables.values())
