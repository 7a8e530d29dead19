"""Detection where sizes, types, modes or memory differ from plain inference: a spec still means what the graph does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from analysis import Analysis, analyse, watched
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attngen.naming import describe
from attngen.passes.dropout import is_random


def spellings(*names: str, first: int = 0) -> pytest.MarkDecorator:
    """Families in one spelling each, in turn."""
    pairs = [(name, zoo.HOWS[name][place % len(zoo.HOWS[name])]) for place, name in enumerate(names, first)]
    return pytest.mark.parametrize(("name", "how"), pairs)


def masks(found: Analysis) -> list[str | None]:
    return [describe(special.spec.mask) for _, special in found.hits]


# ------------------------------------------------------------------------------------------------------ dynamic shapes

SIZES = ((2, 12), (3, 9), (4, 17))


def call_of(inputs: dict[str, Any], batch: int, length: int) -> dict[str, Tensor]:
    call = {"input_ids": zoo.token_ids(length, batch)}
    if "attention_mask" in inputs:
        call["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
        call["attention_mask"][1, -3:] = 0
    for tensor in call.values():
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(tensor, 1)
    return call


@spellings("gpt2", "llama", "mistral", "bert", "t5_encoder", "gemma2", "bloom", "mpt", "gpt_oss")
def test_one_spec_serves_all_lengths(name: str, how: str) -> None:
    module, inputs = zoo.build(name, how)
    compiled, graphs = watched(module)
    for batch, length in SIZES:
        with torch.no_grad():
            compiled(**call_of(inputs, batch, length))
        (found,) = graphs
        assert found.misses == [] and found.hits
        assert {found.values[site.output].shape[:2] for site, _ in found.hits} == {(batch, length)}
        assert max(found.errors()) < 1e-5
    assert masks(found) == zoo.MASKS[name]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.25

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v


def test_numbers_and_head_sizes_used_in_a_proof_are_guarded() -> None:
    """``dynamic=True`` makes the scale and every size a variable: the two that a spec fixes are guarded, no others."""
    module = Scaled()
    first, longer, wider = (
        dict(zip("qkv", torch.randn(3, *shape), strict=True))
        for shape in ((2, 4, 12, 16), (3, 5, 20, 16), (3, 5, 20, 24))
    )
    compiled, graphs = watched(module, dynamic=True)
    counts = []
    with torch.no_grad():
        for scale, inputs in ((0.25, first), (0.25, longer), (0.25, wider), (0.5, longer)):
            module.scale = scale
            compiled(**inputs)
            counts.append(len(graphs))
    assert counts == [1, 1, 2, 3]
    specs = [graph.hits[0][1].spec for graph in graphs]
    assert [(spec.head_dim, spec.value_dim) for spec in specs] == [(16, 16), (24, 24), (16, 16)]
    assert [spec.score.args[1].value for spec in specs] == [0.25, 0.25, 0.5]  # type: ignore[attr-defined]
    assert all(max(graph.errors()) < 5e-6 for graph in graphs)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_an_operator_that_asks_for_a_size_fixes_it_for_the_whole_proof(scale: float | None) -> None:
    """PyTorch's own attention takes the root of the head size: of values, the same symbol is a number from then on."""

    class Call(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    compiled, graphs = watched(Call(), dynamic=True)
    for batch, heads, row, keys, size in ((2, 4, 5, 16, 8), (3, 5, 6, 20, 8), (3, 5, 6, 20, 24)):
        q, k, v = (torch.randn(batch, heads, n, size) for n in (row, keys, keys))
        compiled(q=q, k=k, v=v)
    assert [len(graph.hits) for graph in graphs] == [1, 1]  # of head sizes 8 and 24, for any others
    assert all(max(graph.errors()) < 5e-6 for graph in graphs)


def test_everything_dynamic() -> None:
    module, inputs = zoo.bert("eager")
    compiled, graphs = watched(module, dynamic=True)
    with torch.no_grad():
        compiled(**inputs)
    assert [masks(graph) for graph in graphs] == [["padding"] * 2]
    assert max(graphs[0].errors()) < 5e-6


# -------------------------------------------------------------------------------------------------------------- types


def against_float64(found: Analysis) -> list[tuple[float, float]]:
    """For each site the error of the spec, rounded to the model's type, and that of the model: both against float64."""
    pairs = []
    for site, special in found.hits:
        exact = found.computed(site, special, torch.float64, rounded=False)
        ours, theirs = found.computed(site, special), found.values[site.output]
        pairs.append(tuple(float((x.double() - exact).abs().max()) for x in (ours, theirs)))
    return pairs  # type: ignore[return-value]


FAMILIES = ("gpt2", "bert", "llama", "t5", "bloom", "gemma2", "gpt_oss", "vit", "whisper")


@spellings(*FAMILIES)
def test_half_precision(name: str, how: str) -> None:
    """In bfloat16; in float16 it is ``test_zoo_kernels``."""
    (module, inputs), dtype = zoo.build(name, how), torch.bfloat16
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    found = analyse(module.to(dtype), inputs)
    assert found.misses == [] and masks(found) == zoo.MASKS[name]
    for site, special in found.hits:
        assert special.spec.query.dtype == special.spec.out_dtype == found.values[site.output].dtype == dtype
    for ours, theirs in against_float64(found):
        assert ours <= 2 * theirs + 1e-6


@spellings("gpt2", "llama", "bert", "t5", "gemma2", first=1)
def test_autocast_around_the_model(name: str, how: str) -> None:
    module, inputs = zoo.build(name, how)
    compiled, graphs = watched(module)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        compiled(**inputs)
    (found,) = graphs
    assert found.misses == [] and masks(found) == zoo.MASKS[name]
    assert {special.spec.query.dtype for _, special in found.hits} == {torch.bfloat16}
    for ours, theirs in against_float64(found):
        assert ours <= 2 * theirs + 1e-6


class Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.nanogpt()[0]

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = self.inner(x)
        return y.float() + 1


def test_autocast_inside_the_model() -> None:
    found = analyse(Cast(), zoo.nanogpt()[1])
    ((_, special),) = found.hits
    assert special.spec.query.dtype == special.spec.out_dtype == torch.bfloat16
    ((ours, theirs),) = against_float64(found)
    assert ours <= 2 * theirs + 1e-6


# ----------------------------------------------------------------------------------------------------------- training


def without_dropout(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for name in ("p", "dropout", "attention_dropout", "dropout_p", "dropout_prob"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    return module


@spellings("gpt2", "bert", "llama", "t5", "gemma2", "bloom")
def test_training(name: str, how: str) -> None:
    module, inputs = zoo.build(name, how)
    found = analyse(without_dropout(module.train()), inputs, grad=True)
    assert found.misses == [] and masks(found) == zoo.MASKS[name]
    assert max(found.errors()) < 5e-6


@pytest.mark.parametrize(("name", "how"), [("gpt2", "eager"), ("gpt2", "sdpa"), ("bert", "sdpa"), ("t5", "eager")])
def test_dropped_weights_are_part_of_the_spec(name: str, how: str) -> None:
    module, inputs = zoo.build(name, how)
    found = analyse(module.train(), inputs, grad=True)
    assert found.misses == [] and masks(found) == zoo.MASKS[name]
    assert all(is_random(special.spec.gain) for _, special in found.hits)


@spellings("gpt2", "llama")
def test_activation_checkpoint_of_transformers(name: str, how: str) -> None:
    module, inputs = zoo.build(name, how)
    module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    found = analyse(without_dropout(module.train()), inputs, grad=True)
    assert found.misses == [] and masks(found) == zoo.MASKS[name]
    assert max(found.errors()) < 5e-6


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.nanogpt()[0]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return y


def test_activation_checkpoint_by_hand() -> None:
    found = analyse(Checkpointed(), zoo.nanogpt()[1], grad=True)
    assert found.misses == [] and len(found.hits) == 1
    assert max(found.errors()) < 5e-6


# -------------------------------------------------------------------------------------------------------------- caches


def filled(module: nn.Module, cache: Any) -> Any:
    with torch.no_grad():
        module(input_ids=zoo.token_ids(), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_a_step_with_a_growing_cache(how: str) -> None:
    module, _ = zoo.llama(how)
    cache = filled(module, hf.DynamicCache(config=module.config))  # type: ignore[arg-type]
    found = analyse(module, {"input_ids": zoo.token_ids(1), "past_key_values": cache, "use_cache": True})
    assert found.misses == [] and masks(found) == ["", ""]
    assert {found.values[site.keys.node].shape[-2:] for site, _ in found.hits} == {(13, 16)}
    assert max(found.errors()) < 5e-6


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_steps_with_a_static_cache_share_one_graph(how: str) -> None:
    """The position is data: where the mask ends is read from memory, not fixed by the first step."""
    module, _ = zoo.llama(how)
    cache = filled(module, hf.StaticCache(config=module.config, max_cache_len=32))  # type: ignore[arg-type]
    compiled, graphs = watched(module)
    for step in range(3):
        with torch.no_grad():
            compiled(input_ids=zoo.token_ids(1), past_key_values=cache, cache_position=torch.tensor([12 + step]))
        (found,) = graphs
        assert found.misses == [] and len(found.hits) == 2
        assert set(masks(found)) == {"causal(loaded positions)"}
        assert max(found.errors()) < 5e-6
