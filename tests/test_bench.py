"""The problems of ``attngen bench``: what is counted, and that every library is asked for the same attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attngen.bench import flash, peers, phases, problems, spelling
from attngen.bench.problems import PROBLEMS, Problem, changed, selected, small
from attngen.bench.terms import FORWARD, Missing, NotSpelled
from attngen.errors import BadOption
from attngen.verify import within_budget

TINY = Problem("tiny", batch=2, heads=2, length=24, head_size=16, dtype="float32")
VARIANTS = ("alibi", "softcap", "window", "document", "document_causal", "bias", "relative", "prefix", "sinks", "sigmoid")
OTHERS = ("gqa", "mla", "ragged_causal", "views", "cross")
SPELLINGS = [*(f"{name}_d64" for name in VARIANTS), *OTHERS, "dense_d64_n1024_full"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny(name: str) -> Problem:
    """A named problem, small and in float32, so that a mistake in one pair shows."""
    return replace(small(PROBLEMS[name]), dtype="float32", batch=2, heads=4, head_size=32)


# ------------------------------------------------------------------------------------------------------------- problems


def test_the_grid_holds_tokens_and_width() -> None:
    grid = selected(["dense_*"])
    assert len(grid) == 3 * 3 * 2
    assert {p.batch * p.length for p in grid} == {16384}
    assert {p.heads * p.head_size for p in grid} == {2048}
    assert {p.head_size for p in selected(["dense_d128_*"])} == {128}


def test_every_named_problem_is_consistent_and_stays_so_when_small() -> None:
    for problem in PROBLEMS.values():
        assert problem.checked() is problem
        assert small(problem).checked().keys <= problems.SMALL_LENGTH


def test_flags_change_numbers_and_the_name_says_which() -> None:
    other = changed(PROBLEMS["gqa"], {"length": 512, "causal": False, "window": None, "heads": 32})
    assert (other.length, other.causal, other.heads) == (512, False, 32)
    assert other.name == "gqa[length=512,causal=False]"
    assert changed(PROBLEMS["gqa"], {"length": None}) is PROBLEMS["gqa"]


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 0},
        {"heads": 6, "kv_heads": 4},
        {"kv_heads": 0},
        {"dtype": "float8"},
        {"causal": True, "key_length": 8},
        {"documents": 2, "key_length": 48},
        {"documents": 25},
        {"causal": True, "prefix": 4},
        {"sinks": True, "sigmoid": True},
        {"window": 0},
        {"softcap": -1.0},
        {"buckets": 3},
        {"dropout": 1.0},
    ],
    ids=str,
)
def test_numbers_that_contradict_each_other_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match="tiny"):
        changed(TINY, change)


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(BadOption, match="alibi_d128"):
        selected(["alibi_128"])


# ----------------------------------------------------------------------------------------------------- cost and results


def brute_force(p: Problem, documents: list[list[int]]) -> int:
    """Pairs that count, one by one."""

    def counts(b: int, i: int, j: int) -> bool:
        position = i + p.keys - p.length
        return not (
            (p.causal and j > position)
            or (p.window is not None and abs(position - j) >= p.window)
            or (p.prefix is not None and j > position and j >= p.prefix)
            or (p.documents is not None and documents[b][i] != documents[b][j])
        )

    pairs = sum(counts(b, i, j) for b in range(p.batch) for i in range(p.length) for j in range(p.keys))
    return p.heads * pairs


@pytest.mark.parametrize("at_once", [1 << 22, 300], ids=["whole", "in pieces"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"causal": True},
        {"causal": True, "key_length": 31},
        {"window": 5},
        {"causal": True, "window": 5},
        {"prefix": 7},
        {"documents": 3},
        {"documents": 4, "causal": True, "window": 4},
        {"key_length": 50, "kv_heads": 1},
    ],
    ids=str,
)
def test_operations_are_counted_over_the_pairs_of_the_mask(
    change: dict[str, Any], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(spelling.PAIRS_AT_ONCE, "cpu", at_once)
    p = replace(TINY, **change, value_size=8)
    inputs = spelling.inputs_of(p, "cpu")
    documents = inputs.tensors["documents"].tolist() if p.documents else []
    pairs = brute_force(p, documents)
    assert spelling.area(p, inputs) == pairs
    assert spelling.flop(p, pairs) == 2 * pairs * (16 + 8)


def test_causal_area_in_closed_form() -> None:
    p = small(PROBLEMS["long"])
    assert spelling.area(p, spelling.inputs_of(p, "cpu")) == p.batch * p.heads * p.length * (p.length + 1) // 2


def test_traffic_is_inputs_and_result_once() -> None:
    p = replace(TINY, kv_heads=1, value_size=8, bias=True)
    query, keys, values, out, bias = 2 * 2 * 24 * 16, 2 * 24 * 16, 2 * 24 * 8, 2 * 2 * 24 * 8, 2 * 24 * 24
    assert spelling.traffic(p, spelling.inputs_of(p, "cpu")) == 4 * (query + keys + values + out + bias)


def test_documents_are_as_many_as_asked() -> None:
    p = replace(TINY, documents=5)
    documents = spelling.inputs_of(p, "cpu").tensors["documents"]
    assert (documents[:, 0] == 0).all() and (documents[:, -1] == 4).all()
    assert (documents.diff() >= 0).all()


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_reference_in_pieces_is_the_spelling_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(spelling.PAIRS_AT_ONCE, "cpu", 10_000)
    p = tiny(name)
    inputs = spelling.inputs_of(p, "cpu")
    exact, eager = spelling.references(p, inputs)
    double = inputs.double()
    torch.testing.assert_close(exact, spelling.spelled(p)(*double.operands, double.tensors))
    torch.testing.assert_close(eager, spelling.spelled(p)(*inputs.operands, inputs.tensors))
    assert exact.dtype == torch.float64 and exact.isfinite().all()


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("peer", ["sdpa", "flex"])
def test_library_spellings_compute_the_problem(peer: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, against float64; ``flex_attention`` as it is, not compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    p = tiny(name)
    inputs = spelling.inputs_of(p, "cpu")
    exact, eager = spelling.references(p, inputs)
    unspelled = {"sdpa": ("softcap", "sinks", "sigmoid"), "flex": ("sigmoid",)}[peer]
    if any(getattr(p, feature) for feature in unspelled):
        with pytest.raises(NotSpelled, match="no spelling of"):
            peers.PEERS[peer].prepare(p, inputs)
        return
    actual = peers.PEERS[peer].prepare(p, inputs)()
    assert actual.shape == exact.shape
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)
    assert within_budget(actual, exact, eager, slack=6.0).ok


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_plain_spelling_is_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, **options, options={"inner": "eager"}))
    p = tiny(name)
    inputs = spelling.inputs_of(p, "cpu")
    actual = peers.PEERS[peers.OURS].prepare(p, inputs)()
    assert within_budget(actual, *spelling.references(p, inputs)).ok


def test_a_spelling_that_we_leave_alone_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "spelled", lambda p: lambda q, k, v, tensors: (q @ k.mT).softmax(-2) @ v)
    with pytest.raises(NotSpelled, match="left alone"):
        peers.PEERS[peers.OURS].prepare(TINY, spelling.inputs_of(TINY, "cpu"))


# -------------------------------------------------------------------------------------------------------- flash-attn


class FakeFlash(ModuleType):
    """The two functions, computed by float64 attention from what they were given; ``[B, N, H, D]``."""

    given: dict[str, Any]

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.given = options
        left, right = options["window_size"]
        window = None if left in (None, -1) else left + 1
        p = Problem("", q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1], q.shape[3], v.shape[3], views=True)
        causal = options["causal"]
        assert right in (None, -1, 0 if causal else left)
        p = replace(p, causal=causal, window=window, softcap=options.get("softcap"), sinks="learnable_sink" in options)
        return spelling.spelled(p)(q, k, v, {"sinks": options["learnable_sink"]} if p.sinks else {})

    def flash_attn_varlen_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
        bounds = options.pop("cu_seqlens_q").tolist()
        assert options["max_seqlen_q"] == max(b - a for a, b in pairwise(bounds))
        pieces = [self.flash_attn_func(*(x[None, a:b] for x in (q, k, v)), **options)[0] for a, b in pairwise(bounds)]
        return torch.cat(pieces), None


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("peer", ["fa3", "fa4"])
def test_flash_attention_is_asked_for_the_problem(peer: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeFlash("fake")
    monkeypatch.setattr(flash, "_imported", lambda *names, install: fake)
    p = tiny(name)
    inputs = spelling.inputs_of(p, "cpu")
    unspelled = ["alibi", "bias", "buckets", "prefix", "sigmoid", *(["sinks"] if peer == "fa3" else [])]
    if any(getattr(p, feature) for feature in unspelled):
        with pytest.raises(NotSpelled):
            peers.PEERS[peer].prepare(p, inputs)
        return
    actual = peers.PEERS[peer].prepare(p, inputs)()
    torch.testing.assert_close(actual.double(), spelling.references(p, inputs)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "grouped_views"])
def test_flash_attention_gets_operands_in_8_bits_and_what_they_are_worth(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(FakeFlash):
        def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            worth = [options.pop(f"{each}_descale") for each in "qkv"]
            assert {x.dtype for x in (q, k, v)} == {torch.float8_e4m3fn}
            shared = [s.repeat_interleave(x.shape[2] // s.shape[1], 1) for s, x in zip(worth, (q, k, v), strict=True)]
            back = [x.float() * s[:, None, :, None] for s, x in zip(shared, (q, k, v), strict=True)]
            return super().flash_attn_func(*back, **options)

    monkeypatch.setattr(flash, "_imported", lambda *names, install: Fake("fake"))
    p = replace(TINY, causal=True) if name == "tiny" else replace(TINY, kv_heads=1, views=True)
    inputs = spelling.inputs_of(p, "cpu")
    (wanted,) = phases.expected_in_eighths(p, inputs, phases.expected(p, inputs, FORWARD))
    actual = peers.PEERS["fa3-fp8"].prepare(p, inputs)()
    assert within_budget(actual, wanted.exact, wanted.eager).ok
    assert not within_budget(actual, *spelling.references(p, inputs)).ok


@pytest.mark.parametrize("mode", ["", "-rotate"])
def test_ours_in_8_bits_is_not_timed_where_it_stays_in_16(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile

    def planned(function: Any, options: dict[str, Any], **others: Any) -> Any:
        return compiled(function, options={**options, "inner": "eager", "target": "h200"}, **others)

    monkeypatch.setattr(torch, "compile", planned)
    suited, narrow = (replace(TINY, head_size=size, length=96, dtype="bfloat16") for size in (64, 32))
    inputs = spelling.inputs_of(suited, "cpu")
    assert peers.PEERS[f"attngen-fp8{mode}"].prepare(suited, inputs)().shape == inputs.query.shape
    with pytest.raises(NotSpelled, match="left in 16 bits"):
        peers.PEERS[f"attngen-fp8{mode}"].prepare(narrow, spelling.inputs_of(narrow, "cpu"))


def test_what_is_not_installed_says_how_to_install_it() -> None:
    with pytest.raises(Missing, match="pip install nothing-such"):
        flash._imported("nothing_such_at_all.interface", install="nothing-such")


def test_what_is_installed_and_broken_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_peer.py").write_text("import another_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="another_that_is_not_there"):
        flash._imported("broken_peer", install="broken-peer")
