"""Dropout of weights: the generator, the mask as kernels draw it, and models in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from analysis import analysed, scores, weights
from specs import CAUSAL, SEED, B, H, attention, dropped
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import attngen
from attngen import blockwise, gradient, philox, pipeline, verify
from attngen.emit import BackwardKernel, Kernel, emit, emit_backward
from attngen.options import Options
from attngen.spec import Tile
from attngen.work import operations

P = 0.3
SHAPE = (2, 2, 24, 16)  # as many keys as features below: identity in place of values shows the weights

# ------------------------------------------------------------------------------------------------------------ generator

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
PI_KEY = (0xA4093822, 0x299F31D0)
# Rounds, counter, key and result, from the known answers of Random123.
KNOWN = [
    (7, (0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI, PI_KEY, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize("known", KNOWN, ids=str)
def test_philox_gives_the_known_answers(known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, counter, key, expected = known
    monkeypatch.setattr(philox, "ROUNDS", rounds)
    seed = key[1] << 32 | key[0]
    seed -= (seed >> 63) << 64  # as the 64 bits of a signed number
    found = philox.philox(torch.tensor(seed), *(torch.tensor(word) for word in counter))
    assert tuple(map(int, found)) == expected


def kept(p: float, seed: int, batch: tuple[int, int] = (2, 4), rows: int = 128, keys: int = 128) -> Tensor:
    """Which weights ``[b, h, i, j]`` stay, by the blockwise path: the spec's meaning."""
    spec = attention(head_dim=16, value_dim=keys, gain=dropped(p, B, H), extras=SEED, dtype=torch.float32)
    operands = [torch.zeros(*batch, n, 16) for n in (rows, keys)]
    identity = torch.eye(keys).expand(*batch, keys, keys)
    return blockwise.forward(spec, [*operands, identity, torch.tensor(seed)])[0] != 0


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_keep_rate(p: float) -> None:
    for seed in (0, 1, 2**62 + 12345):
        assert abs(kept(p, seed).double().mean() - (1 - p)) < 0.01 * (1 - p)


def test_expectation_is_that_of_no_dropout() -> None:
    spec = attention(head_dim=16, gain=dropped(P, B, H), extras=SEED, dtype=torch.float32)
    x = torch.randn(1, 1, 32, 16, generator=torch.Generator().manual_seed(0))
    exact = blockwise.forward(replace(attention(head_dim=16, dtype=torch.float32)), [x, x, x])[0]
    runs = [blockwise.forward(spec, [x, x, x, torch.tensor(seed)])[0] for seed in range(400)]
    spread = torch.stack(runs).std(0) / 20
    assert ((torch.stack(runs).mean(0) - exact).abs() < 5 * spread).all()


def test_places_and_seeds_are_independent() -> None:
    """Neighbouring rows, keys, heads, batch elements and seeds share no more than chance has it: five sigmas."""
    signs = torch.stack([kept(0.5, seed) for seed in (5, 6, 5 + 2**32)]).double() * 2 - 1
    for dim in range(5):
        size = signs.shape[dim]
        for step in {1, min(8, size - 1), size - 1}:  # what is eight apart shares the words of a counter
            product = signs.narrow(dim, 0, size - step) * signs.narrow(dim, step, size - step)
            assert abs(product.mean()) < 5 / product.numel() ** 0.5, (dim, step)
    for dims in ((3, 4), (2, 3), (2, 4)):  # and no place is another with its coordinates exchanged
        n = min(signs.shape[d] for d in dims)
        one = signs.narrow(dims[0], 0, n).narrow(dims[1], 0, n)
        product = (one * one.transpose(*dims)) * (1 - torch.eye(n).reshape([n if d in dims else 1 for d in range(5)]))
        assert abs(product.mean()) < 8 / product.numel() ** 0.5, dims


# -------------------------------------------------------------------------------------------------------------- kernels

GAINED = attention(gain=dropped(P, B, H), extras=SEED, mask=CAUSAL, lse=True)


def test_every_tiling_draws_the_mask_of_the_spec() -> None:
    """Identity in place of values (and of the result's gradient) shows the mask that a kernel draws."""
    pytest.importorskip("triton")
    seed = torch.tensor(2**62 + 2**33 + 7)
    q, identity = torch.zeros(2, 2, 64, 64, dtype=torch.half), torch.eye(64, dtype=torch.half).expand(2, 2, 64, 64)
    inputs = (q, q, identity, seed)
    expected, lse = blockwise.forward(GAINED, inputs)
    forward = [emit(GAINED, tile) for tile in (Tile(16, 16, 4, 1), Tile(64, 16, 4, 1), Tile(32, 64, 4, 1))]
    backward = [emit_backward(GAINED, (Tile(16, 32, 4, 1), tile)) for tile in (Tile(16, 16, 4, 1), Tile(64, 32, 4, 1))]
    jobs: list[tuple[Kernel | BackwardKernel, tuple[Tensor, ...]]] = [(k, inputs) for k in forward if isinstance(k, Kernel)]
    arguments = (identity.contiguous(), expected, lse, *inputs)
    jobs += [(k, arguments) for k in backward if isinstance(k, BackwardKernel)]
    results = verify.run_interpreted(jobs)
    for out, *_ in results[:3]:  # type: ignore[misc]
        assert torch.equal(out != 0, expected != 0)
    for result in results[3:]:
        grads = gradient.finish(gradient.backward_of(GAINED), inputs, [True] * 3 + [False], result[:-1], lse, result[-1])  # type: ignore[index]
        of_values = grads[2]
        assert of_values is not None and torch.equal(of_values.mT != 0, expected != 0)
    assert 0.2 < (expected.tril() != 0).double().mean() < 0.5


def test_it_has_a_price() -> None:
    assert operations(GAINED, GAINED.gain).arithmetic > 10


def test_gradients_by_finite_differences() -> None:
    spec = attention(head_dim=3, value_dim=2, gain=dropped(P, B, H), extras=SEED, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 5, d, generator=generator, dtype=torch.float64).requires_grad_() for d in (3, 3, 2)]

    class Spec(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *operands):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(*operands)
            return blockwise.forward(spec, [*operands, torch.tensor(11)])[0]

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            found = blockwise.backward(spec, [*ctx.saved_tensors, torch.tensor(11)], grad, [True] * 3 + [False])
            return tuple(found[:3])

    assert torch.autograd.gradcheck(Spec.apply, inputs)


# --------------------------------------------------------------------------------------------------------------- models

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(dropout(torch.bmm(q, k.mT).softmax(-1), P), v).unflatten(0, SHAPE[:2])


SPELLINGS: dict[str, Attention] = {
    "softmax": lambda q, k, v: dropout(weights(q, k), P) @ v,
    "causal": lambda q, k, v: scaled_dot_product_attention(q, k, v, dropout_p=P, is_causal=True),
    "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, dropout_p=P),
    "native": lambda q, k, v: torch.native_dropout(weights(q, k), P, True)[0] @ v,
    "in place": lambda q, k, v: dropout(weights(q, k), P, True, True) @ v,
    "bmm": by_bmm,
    "difference": lambda q, k, v: dropout(weights(q, k) - 0.4 * weights(q * 2, k), P) @ v,
}
EXACT: dict[str, Attention] = {
    "causal": lambda q, k, v: scaled_dot_product_attention(q, k, torch.eye(SHAPE[-1]).expand_as(k), is_causal=True),
    "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, torch.eye(SHAPE[-1]).expand_as(k)),
    "bmm": lambda q, k, v: (q @ k.mT).softmax(-1),
    "difference": lambda q, k, v: weights(q, k) - 0.4 * weights(q * 2, k),
}


def operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (SHAPE[-2], SHAPE[-1], SHAPE[-1])
    return [torch.randn(*SHAPE[:2], n, SHAPE[-1], generator=generator).requires_grad_() for n in lengths]


def seeded(function: Callable[..., Tensor], *inputs: Tensor, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    return function(*inputs)


def compiled(function: Callable[..., Tensor], inner: str, sites: int = 1) -> Callable[..., Tensor]:
    """``function`` with its sites replaced, which is made sure of."""
    torch._dynamo.reset()
    fast = torch.compile(function, backend="attngen", options={"inner": inner})
    with attngen.record() as reports:
        fast(*operands())
    assert sum(len(report.replaced) for report in reports) == sites, [r.missed for r in reports]
    return fast  # type: ignore[no-any-return]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_results_and_gradients_are_those_of_eager_with_our_mask(name: str, inner: str) -> None:
    fast = compiled(SPELLINGS[name], inner, sites=2 if name == "difference" else 1)
    q, k, v = operands()
    identity = torch.eye(SHAPE[-1]).expand_as(v).contiguous().requires_grad_()
    mask = (seeded(fast, q, k, identity) != 0).float() / (1 - P)
    exact = EXACT.get(name, lambda q, k, v: weights(q, k))
    with torch.no_grad():
        seen = (exact(q, k, v) != 0).float().mean()
    assert abs((mask != 0).float().mean() / seen - (1 - P)) < 0.06
    expected = (exact(q, k, v) * mask) @ v
    ours = seeded(fast, q, k, v)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    again, later = seeded(fast, q, k, v), fast(q, k, v)
    assert torch.equal(ours, again) and not torch.equal(again, later)


def test_two_calls_in_one_graph_draw_anew() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([dropout(weights(q, k), P) @ v for _ in range(2)])

    first, second = compiled(twice, "eager", sites=2)(*operands())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_checkpoints_draw_the_same_again(inner: str, reentrant: bool) -> None:
    """What is random besides attention too. The result is linear in the values, and its gradient tells of the same masks."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dropout(SPELLINGS["softmax"](q, k, v), P)

    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(attend, q, k, v, use_reentrant=reentrant) * 3  # type: ignore[no-any-return]

    def outer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dropout(checkpoint(inside, q, k, v, use_reentrant=reentrant), P)

    fast, (q, k, v) = compiled(outer, inner), operands()
    out = seeded(fast, q, k, v)
    torch.randn(5)  # so that the state at the time of the backward is another one
    state, direction = torch.get_rng_state(), torch.ones_like(out)
    (grad,) = torch.autograd.grad(out, v, direction)
    torch.testing.assert_close((grad * v).sum(), (out * direction).sum(), rtol=1e-4, atol=1e-4)
    assert inner == "inductor" or torch.equal(torch.get_rng_state(), state)
    later = fast(q, k, v)
    assert not torch.equal(later, out)


@pytest.mark.parametrize("saved", [True, False])
def test_selective_checkpoints_save_what_they_are_told_to(saved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy is asked about our operator, and what it saves is not computed again."""

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if saved and "fwd_" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    def outer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(SPELLINGS["softmax"], q, k, v, use_reentrant=False, context_fn=contexts).tanh()  # type: ignore[no-any-return]

    plain, inputs = compiled(lambda q, k, v: SPELLINGS["softmax"](q, k, v).tanh(), "eager"), operands()
    expected = torch.autograd.grad(seeded(plain, *inputs).sum(), inputs)
    fast, forward, calls = compiled(outer, "eager"), blockwise.forward, []
    monkeypatch.setattr(blockwise, "forward", lambda *args: calls.append(args) or forward(*args))
    for mine, exact in zip(torch.autograd.grad(seeded(fast, *inputs).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-6)
    assert len(calls) == (1 if saved else 2)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_all_or_nothing(p: float) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dropout(weights(q, k), p) @ v

    inputs = operands()
    torch.testing.assert_close(compiled(function, "eager")(*inputs), function(*inputs))


def test_evaluation_drops_nothing() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(P)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = self.dropout(weights(q, k)) @ v
            return out

    layer, inputs = Layer().eval(), operands()
    torch.testing.assert_close(compiled(layer, "eager")(*inputs), layer(*inputs))
    assert not torch.equal(seeded(compiled(layer.train(), "eager"), *inputs), layer.eval()(*inputs))


@pytest.mark.parametrize("name", ["softmax", "sdpa", "difference"])
def test_no_sum_of_weights_stays_in_the_graph(name: str) -> None:
    """The model's own random numbers are not drawn any more, nor is anything computed for them."""
    found: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        pipeline.optimize(gm, inputs, Options(strict=True))
        found.extend(str(node.target) for node in gm.graph.nodes if node.op in ("call_function", "call_method"))
        return gm

    torch._dynamo.reset()
    torch.compile(SPELLINGS[name], backend=backend)(*operands())
    assert any("fwd_" in target for target in found)
    assert found.count("aten.randint.low") == 1
    assert not any(part in target for target in found for part in ("dropout", "softmax", "matmul", "scaled_dot")), found


# ----------------------------------------------------------------------------------------------------------- look-alikes

ALONE: dict[str, tuple[Callable[..., object], str]] = {
    "scores": (lambda q, k, v: dropout(scores(q, k), P).softmax(-1) @ v, "the scores are dropped at random"),
    "returned": (lambda q, k, v: (lambda w: (w @ v, w))(dropout(weights(q, k), P)), "weights are returned"),
    "mask read": (
        lambda q, k, v: (lambda w, m: (w @ v, m.sum()))(*torch.native_dropout(weights(q, k), P, True)),
        "also read by",
    ),
    "summed": (lambda q, k, v: (lambda w: w / w.sum(-1, keepdim=True) @ v)(dropout(weights(q, k), P)), ""),
    "twice": (lambda q, k, v: dropout(weights(q, k), P).softmax(-1) @ v, ""),
}


@pytest.mark.parametrize("name", ALONE)
def test_left_alone(name: str) -> None:
    function, reason = ALONE[name]
    found = analysed(function)  # type: ignore[arg-type]
    assert not found.hits and any(reason in miss.reason for miss in found.misses), found.misses


def test_dropout_elsewhere_is_loaded() -> None:
    """Of values and biases: these are tensors of the graph, with its own random numbers, and may be read by others too."""
    values = analysed(lambda q, k, v: weights(q, k) @ dropout(v, P))
    bias = analysed(lambda q, k, v, w: (scores(q, k) + dropout(w, P)).softmax(-1) @ v)
    for found in (values, bias):
        ((_, special),) = found.hits
        assert "random" not in special.spec.text


# ---------------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_bert_in_training(how: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        attn_implementation=how,
    )  # fmt: skip
    assert config.attention_probs_dropout_prob == 0.1
    torch.manual_seed(0)
    model = transformers.BertModel(config).train()
    tokens = torch.randint(0, 50, (2, 12))
    torch._dynamo.reset()
    fast = torch.compile(model, backend="attngen", options={"inner": "eager"})
    gradients = []
    for seed in (1, 1, 2):
        with attngen.record() as reports:
            torch.manual_seed(seed)
            loss = fast(tokens).last_hidden_state.square().mean()
        gradients.append(torch.autograd.grad(loss, model.embeddings.word_embeddings.weight)[0])
        if reports:
            assert [site.status for report in reports for site in report.sites] == ["replaced"] * 2
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[1], gradients[2])


@pytest.mark.gpu
def test_cuda_graphs_draw_anew_at_each_replay() -> None:
    torch._dynamo.reset()
    inputs = [x.detach().cuda() for x in operands()]
    fast = torch.compile(SPELLINGS["softmax"], backend="attngen", mode="reduce-overhead")
    runs = [seeded(fast, *inputs, seed=seed).clone() for seed in (0, 0, 0, 1, 1, 2)]
    assert torch.equal(runs[3], runs[4]) and not torch.equal(runs[4], runs[5])
    torch.manual_seed(5)
    assert not torch.equal(fast(*inputs).clone(), fast(*inputs).clone())
