"""Every family and spelling of the zoo: all sites found, the spec as it should be, and the model's own numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import zoo
from analysis import Analysis, analyse

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
