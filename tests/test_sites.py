"""Every family and spelling of the zoo: all sites found, the spec as it should be, and the model's own numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import zoo
from analysis import Analysis, Module, analyse
from torch import Tensor

from attngen import gradient
from attngen.algebra import Const, op
from attngen.naming import describe
from attngen.passes.specialise import Table
from attngen.spec import INNER, KEY, AttentionSpec
from attngen.text import index_text, readable

BY_NAME = {row.name: row for row in zoo.ROWS}


@cache
def analysis(name: str) -> Analysis:
    module, inputs = BY_NAME[name].build()
    return analyse(module, inputs)


def keys_read_at(spec: AttentionSpec) -> str:
    return ", ".join(index_text(place) for place in spec.keys.index if place not in (KEY, INNER))


@pytest.mark.parametrize("name", BY_NAME)
def test_every_site_is_found_with_its_spec(name: str) -> None:
    found = analysis(name)
    assert found.misses == []
    described = [
        zoo.Expected(
            describe(special.spec.mask),
            readable(special.spec.score),
            keys_read_at(special.spec),
            len(special.spec.sinks),
            sum(isinstance(binding, Table) for binding in special.bindings),
        )
        for _, special in found.hits
    ]
    assert described == list(BY_NAME[name].sites)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_spec_computes_what_the_model_computes(name: str) -> None:
    assert max(analysis(name).errors()) < 5e-6


@pytest.mark.parametrize("name", BY_NAME)
def test_the_lowered_graph_computes_what_the_module_computes(name: str) -> None:
    module, inputs = BY_NAME[name].build()
    with torch.no_grad():
        plain = module(**inputs)
    expected = plain if isinstance(plain, torch.Tensor) else plain[0]
    results = analysis(name).results
    assert any(r.shape == expected.shape and torch.allclose(r, expected, atol=2e-4, rtol=1e-3) for r in results)


def test_a_wrong_scale_would_be_noticed() -> None:
    """The zoo's scores are spread widely enough that the comparison of numbers means something."""
    for name in ("gpt2_eager", "llama_sdpa", "bert_eager", "t5_eager", "whisper_eager", "gpt_oss_eager", "nanogpt"):
        found = analysis(name)
        for site, special in found.hits:
            spec = special.spec
            skewed = replace(spec, score=op("mul", spec.score, Const(1.05)), whole=None)
            assert found.error(site, replace(special, spec=skewed)) > 1e-3, name


def test_masks_of_models_are_covers_not_tensors() -> None:
    """No mask tensor is loaded where the model builds it from positions; padding is one row per batch."""
    for name in ("llama_sdpa", "mistral_eager", "gemma2_eager", "t5_eager", "gpt2_padded_sdpa", "bert_eager"):
        for _, special in analysis(name).hits:
            for extra in special.spec.extras:
                assert len(extra.index) <= 2, (name, extra)


def test_equal_layers_have_equal_specs() -> None:
    for name in ("gpt2_eager", "llama_sdpa", "bert_eager", "bloom_eager", "vit_sdpa"):
        keys = {special.spec.key for _, special in analysis(name).hits}
        assert len(keys) == 1, name


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("spelt", ["heads first", "heads apart", "keys shared"])
@pytest.mark.parametrize(("batch", "heads"), [(1, 4), (2, 1), (1, 1)])
def test_a_batch_of_one_has_the_kernels_of_any(spelt: str, batch: int, heads: int) -> None:
    """Were its dimensions left without an axis, gradients would be summed over that axis afterwards."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if spelt == "heads apart":
            q, k, v = (_split(x, x.shape[-1] // 8) for x in (q, k, v))
        return (q @ k.mT * 8**-0.5).softmax(-1) @ v

    def spec(batch: int, heads: int) -> AttentionSpec:
        sizes = ((6, heads), (9, 1 if spelt == "keys shared" else heads), (9, 1 if spelt == "keys shared" else heads))
        shapes = [(batch, n, h * 8) if spelt == "heads apart" else (batch, h, n, 8) for n, h in sizes]
        inputs = dict(zip("qkv", map(torch.randn, shapes), strict=True))
        return analyse(Module(attend), inputs).hits[0][1].spec

    found, usual = spec(batch, heads), spec(2, 4)
    if spelt == "keys shared" and heads == 1:
        usual = spec(2, 1)  # nothing is shared
    assert found.key == usual.key
    assert gradient.backward_of(found).query.direct and gradient.backward_of(found).keys.direct
