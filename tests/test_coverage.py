"""The observer that counts attention, on functions small enough to count by hand; and the count in forty models."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coverage_models
import pytest
import torch
import torch.nn.functional as F
from coverage import Outcome, Reported, _compared, measure
from coverage_results import DEAD, beside, renewed
from coverage_tracer import Traced, trace
from torch import Tensor, nn


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def found(function: Callable[..., Any], *shapes: tuple[int, ...]) -> list[Traced]:
    with torch.no_grad():
        return trace(function, *tensors(*shapes))


def kinds(function: Callable[..., Any], *shapes: tuple[int, ...]) -> list[str]:
    return [site.kind for site in found(function, *shapes)]


QKV = ((2, 4, 8, 16),) * 3

# ------------------------------------------------------------------------------------------------------ what is attention


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def masked_and_cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.25).masked_fill(torch.ones(8, 8).triu(1).bool(), -1e9)
    return F.dropout(scores.double().softmax(-1).float(), 0.1, training=True) @ v


def einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bqhd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)


def multiplied_and_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q[..., :, None, :] * k[..., None, :, :]).sum(-1)
    return (scores.softmax(-1)[..., None] * v[..., None, :, :]).sum(-2)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def divided_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).exp()
    return weights @ v / weights.sum(-1, keepdim=True)


def by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def by_log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).log_softmax(-1).exp() @ v


def with_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, torch.zeros(2, 4, 8, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.zeros(2, 4, 8, 8)
    scores[..., :4] = q @ k[..., :4, :].mT
    scores[..., 4:].copy_(q @ k[..., 4:, :].mT)
    return scores.mul_(0.25).masked_fill_(v[..., :8] > 2, -1e9).softmax(-1) @ v


def by_sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.mT) @ v


def by_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def gathered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = (torch.arange(8)[:, None] - torch.arange(8)).clamp(min=0).expand(2, 4, 8, 8)
    return ((q @ k.mT).gather(-1, places) + q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (plain, "softmax"), (masked_and_cast, "softmax"), (einsums, "softmax"), (multiplied_and_summed, "softmax"),
        (by_hand, "exp"), (divided_last, "exp"), (by_logsumexp, "exp"), (by_log_softmax, "log_softmax"),
        (with_sink, "softmax"), (in_place, "softmax"), (by_sigmoid, "sigmoid"), (by_call, "sdpa"), (gathered, "softmax"),
    ],
)  # fmt: skip
def test_attention_counts_once(function: Callable[..., Tensor], kind: str) -> None:
    assert kinds(function, *QKV) == [kind]


def test_differential_attention_is_two_sites() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = ((x @ y.mT).softmax(-1) for x, y in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True))
        return (first - 0.2 * second) @ v

    assert kinds(function, *QKV) == ["softmax", "softmax"]


def test_weights_read_twice_are_one_site() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v + weights @ (2 * v)

    assert len(found(function, *QKV)) == 1


# -------------------------------------------------------------------------------------------------- what only looks like it


def no_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[..., :8] + k[..., :8]).softmax(-1) @ v


def no_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) + v[..., :8]


def not_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(q @ k.mT) @ v


def exponential_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).exp() @ v


def sum_of_another(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).exp() / (k @ q.mT).exp().sum(-1, keepdim=True) @ v


def sorted_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).sort(-1).values.softmax(-1) @ v


def chosen_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).topk(4).values @ v[..., :4, :]


def gate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A weight for each row, not for each pair."""
    return ((q @ k.mT).softmax(-1)[..., :1] * v) @ v.mT


def squares_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The norm of a row is no product of two operands."""
    norms = (q * q).sum(-1, keepdim=True)
    return (norms - k[..., :8]).softmax(-1) @ v


def renormalised_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1) * v[..., :8]
    return weights / weights.sum(-1, keepdim=True)


NEGATIVES = (
    no_scores, no_values, not_normalised, exponential_alone, sum_of_another, sorted_between, chosen_after, gate,
    squares_summed, renormalised_only,
)  # fmt: skip


@pytest.mark.parametrize("function", NEGATIVES)
def test_look_alike_does_not_count(function: Callable[..., Tensor]) -> None:
    assert found(function, *QKV) == []


def test_memory_that_is_used_again_carries_no_marks() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        buffer = q @ k.mT
        buffer.copy_(v[..., :8])
        return buffer.softmax(-1) @ v

    assert found(function, *QKV) == []


# ---------------------------------------------------------------------------------------------------------------- modules


class Pooled(nn.Module):
    """Scored by a weight vector, as attention pooling and routers are."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.score(x).softmax(-2) * x).sum(-2)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), Attention())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return plain(self.q(x), self.k(x), self.v(x))


def test_scores_of_weights_are_told_apart() -> None:
    (site,) = found(Pooled(), (2, 8, 16))
    assert site.learned
    assert not any(site.learned for site in found(Attention(), (2, 8, 16)))


def test_site_has_module_and_line() -> None:
    sites = found(Twice(), (2, 8, 16))
    assert [site.path for site in sites] == ["inner.1", "inner.1"]
    assert sites[0].line.startswith("test_coverage.py:")
    assert sites[0].scores[0] == "bmm"


# -------------------------------------------------------------------------------------------------------------- comparing


def test_fates_go_by_module_and_replaced_first() -> None:
    seen = [Traced("softmax", "a.attn", "m.py:1"), Traced("softmax", "b.attn", "m.py:1"), Traced("softmax", "c", "n.py:2")]
    reported = [
        Reported("b.attn", "m.py:1", "too odd"), Reported("a.attn.out", "m.py:9", ""), Reported("b.attn", "m.py:1", ""),
        Reported("d", "x.py:3", ""),
    ]  # fmt: skip
    sites, others = _compared(seen, reported, Outcome("model"))
    assert [site["fate"] for site in sites] == ["replaced", "replaced", "too odd"]
    assert others == [["d", "x.py:3", "replaced"]]
    sites, _ = _compared(seen, reported[1:2], Outcome("model"))
    assert [site["fate"] for site in sites] == ["replaced", "never reported", "never reported"]
    sites, _ = _compared(seen[:1], [], Outcome("model", problems=["attngen: it broke"]))
    assert sites[0]["fate"] == "attngen: it broke"


def test_measure_counts_each_call_of_a_shared_graph() -> None:
    model, inputs = Twice().eval(), {"x": torch.randn(2, 8, 16)}
    outcome = measure("twice", model, inputs)
    assert [site["fate"] for site in outcome.sites] == ["replaced", "replaced"]
    assert (outcome.others, outcome.problems) == ([], [])


# --------------------------------------------------------------------------------------------------------------- Inductor


class Dense(nn.Module):
    """Attention as PyTorch's own matcher knows it; with ``sharp``, as it does not."""

    def __init__(self, *, sharp: bool = False) -> None:
        super().__init__()
        self.sharp = sharp

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.transpose(-2, -1) / 4
        return (scores.sinh() if self.sharp else scores).softmax(-1) @ x


@pytest.mark.parametrize(("sharp", "fused"), [(False, 2), (True, 0)])
def test_what_inductor_fuses_is_counted_per_call(sharp: bool, fused: int) -> None:
    model = nn.Sequential(*(Dense(sharp=sharp) for _ in range(2))).eval()
    torch._dynamo.reset()
    outcome = measure("dense", model, {"input": torch.randn(2, 4, 8, 16)}, inductor=True)
    assert (len(outcome.sites), outcome.inductor, outcome.problems) == (2, fused, [])
    assert measure("dense", model, {"input": torch.randn(2, 4, 8, 16)}).inductor is None


def test_new_results_of_a_model_take_the_place_of_its_old_ones(tmp_path: Path) -> None:
    """Sites of layers' weights are as they were; a model with another number of sites is left as it was."""
    file = tmp_path / "source.jsonl"
    one, other = ({"fate": fate, "learned": False} for fate in ("replaced", "another reason 7"))
    layer = {"fate": "of a layer", "learned": True}
    runs = [
        {"model": "a", "status": "run", "sites": [one, one, other, layer]},
        {"model": "b", "status": "run", "sites": [one]},
        {"model": "a new one", "status": "run", "sites": [other]},
    ]
    file.write_text("".join(json.dumps(each) + "\n" for each in runs))
    packed = {
        "replaced": 6,
        "missed": {"a reason": {"sites": 3, "models": ["a", "b"]}},
        "by_model": {"a": [4, 1, None, {"a reason": 2, "of a layer": 1}], "b": [2, 1, None, {"a reason": 1}]},
    }
    source = renewed({"sources": {"source": packed}}, [file])["sources"]["source"]
    assert source["replaced"] == 7
    assert source["missed"] == {
        "a reason": {"sites": 1, "models": ["b"]},
        "another reason N": {"sites": 1, "models": ["a"]},
    }
    assert source["by_model"]["a"] == [4, 2, None, {"another reason N": 1, "of a layer": 1}]
    assert source["by_model"]["b"] == [2, 1, None, {"a reason": 1}]


def test_inductors_counts_go_beside_what_was_packed(tmp_path: Path) -> None:
    """Of models with as many sites as before, that Inductor was counted in; they add to what was counted earlier."""
    site = {"fate": "replaced", "learned": False}
    others = [site | {"learned": True}, site | {"fate": DEAD}]

    def line(model: str, sites: int, inductor: int | None) -> str:
        return json.dumps({"model": model, "status": "run", "sites": [site] * sites + others, "inductor": inductor})

    file = tmp_path / "source.jsonl"
    file.write_text("\n".join([line("a", 3, 2), line("b", 3, None), line("c", 1, 1), line("new", 1, 1)]))
    old = {name: [5, 3, None, {}] for name in "abc"}
    uncounted = {"inductor": None, "inductor_sites": 0, "inductor_models": 0}
    packed = beside({"sources": {"source": {"sites": 9, "by_model": old, **uncounted}}}, [file])
    source = packed["sources"]["source"]
    assert [source[name] for name in ("inductor", "inductor_sites", "inductor_models", "sites")] == [2, 3, 1, 9]
    assert [entry[2] for entry in source["by_model"].values()] == [2, None, None]
    file.write_text("\n".join([line("a", 3, 1), line("b", 3, 3)]))
    source = beside(packed, [file])["sources"]["source"]
    assert [source[name] for name in ("inductor", "inductor_sites", "inductor_models", "sites")] == [4, 6, 2, 9]
    assert torch.__version__.startswith(packed["inductor_versions"]["torch"])  # which may leave out what it was built for


# ------------------------------------------------------------------------------------------------------------ forty models

# Source, model, and how many of its sites are replaced, of how many: all, but where a mixture of heads is in the way.
TWO_LAYERS = (
    "albert", "bert", "big_bird", "bloom", "deberta-v2", "dinov2", "distilbert", "falcon", "gemma2", "gpt2", "gptj", "llama",
    "mixtral", "mpt", "opt", "roformer", "squeezebert", "vit", "wav2vec2", "xlnet",
)  # fmt: skip
SPELT = (
    "alibi", "data-dependent alibi", "decoder masked", "grouped kv heads", "learned sink", "memory keys", "sigmoid",
    "softclamp", "t5 relative bias",
)  # fmt: skip
FORTY = (
    *(("transformers", name, 2, 2) for name in TWO_LAYERS),
    ("transformers", "siglip_vision_model", 3, 3),
    ("transformers", "t5", 6, 6),
    ("timm", "levit_128s", 11, 11),
    ("timm", "test_vit", 2, 2),
    ("timm", "test_vit3", 3, 3),
    ("timm", "test_vit_relpos", 2, 2),
    ("diffusers", "pixart", 4, 4),
    ("diffusers", "prior", 2, 2),
    ("diffusers", "unet added keys", 4, 4),
    *(("x-transformers", name, 2, 2) for name in SPELT),
    ("x-transformers", "cross attention", 4, 4),
    ("x-transformers", "talking heads before", 0, 2),
)


def test_forty_models_of_every_source() -> None:
    assert len(FORTY) == 40
    assert {row[0] for row in FORTY} == set(coverage_models.SOURCES)


@pytest.mark.parametrize(("source", "name", "replaced", "sites"), FORTY, ids=lambda value: str(value))
def test_model_keeps_its_coverage(source: str, name: str, replaced: int, sites: int) -> None:
    if importlib.util.find_spec(source.replace("-", "_")) is None:
        pytest.skip(f"{source} is not installed")
    module, inputs = coverage_models.build(source, name, "eager")
    torch._dynamo.reset()
    outcome = measure(name, module, inputs)
    assert outcome.problems == []
    assert len(outcome.sites) == sites
    missed = [f"{site['path']}: {site['fate']}" for site in outcome.sites if site["fate"] != "replaced"]
    assert sites - len(missed) >= replaced, missed
