"""What is copied because it was traced before is what tracing it again would give: nodes, metadata, memory, the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from fuzz_graphs import build
from fuzz_writer import Draw
from torch import Tensor, fx

from attngen.passes import effects, lower, repeats
from attngen.passes.memory import storage

Function = Callable[..., Any]


def everything(lowered: lower.Lowered) -> list[Any]:
    """All that is known of a lowered graph, with numbers for memories."""
    memories: dict[int, int] = {}
    nodes = []
    for node in lowered.graph.nodes:
        value = node.meta.get("val")
        parts = value if isinstance(value, (list, tuple)) else [value]
        kinds = [(x.shape, x.stride(), x.storage_offset(), x.dtype, x.device) for x in parts if isinstance(x, Tensor)]
        memory = memories.setdefault(storage(node), len(memories)) if isinstance(value, Tensor) else None
        nodes.append((node.name, node.op, str(node.target), str(node.args), str(node.kwargs), str(kinds), memory))
    back = [[(str(key), str(values)) for key, values in way.items()] for way in (lowered.origins, lowered.emitted)]
    return [*nodes, *back, sorted(map(str, lowered.parameters)), sorted(map(str, effects.run(lowered.graph).stale))]


class Counted(repeats.Repeats):
    """Counts the captured nodes that were traced and those that were copied."""

    traced = copied = 0

    def copy(self, call: repeats.Call, graph: fx.Graph) -> tuple[bool, Any]:
        known, result = super().copy(call, graph)
        Counted.copied += known
        Counted.traced += not known
        return known, result


def both(gm: fx.GraphModule, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """``gm`` lowered with copies, and with everything traced."""
    Counted.traced = Counted.copied = 0
    with monkeypatch.context() as patched:
        patched.setattr(lower, "Repeats", Counted)
        copied = everything(lower.run(gm, inputs))
        patched.setattr(lower, "Repeats", lambda: None)
        return copied, everything(lower.run(gm, inputs))


def assert_same(function: Function, inputs: Any, monkeypatch: pytest.MonkeyPatch, *, dynamic: bool = False) -> int:
    """Copies change nothing. Returns how many captured nodes were copied."""
    copied = 0

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Function:
        nonlocal copied
        ours, theirs = both(gm, example_inputs, monkeypatch)
        assert ours == theirs
        copied += Counted.copied
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, dynamic=dynamic)
    compiled(**inputs) if isinstance(inputs, dict) else compiled(*inputs)
    return copied


@pytest.mark.parametrize(("name", "how", "train"), zoo.spread(zoo.MASKS, False, True))
def test_models(name: str, how: str, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = zoo.build(name, how)
    with torch.set_grad_enabled(train):
        assert assert_same(model.train(train), inputs, monkeypatch) > 10


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_under_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = zoo.build(name, "eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert assert_same(model, inputs, monkeypatch) > 10


def test_random_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = 0
    for seed in range(50):
        case = build(Draw(seed))
        ours, theirs = both(case.gm, case.inputs, monkeypatch)
        assert ours == theirs, f"seed {seed}\n{case.text}"
        copied += Counted.copied
    assert copied > 25


# ------------------------------------------------------------------------------------------------------ what is copied


def twice(step: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: step(step(x))


def written_through_a_view(x: Tensor) -> Tensor:
    y = x.exp()
    y[:, 1:] += 1
    return y * 2


def written_after_a_view(x: Tensor) -> Tensor:
    y = x.exp()
    part = y[:, 1:]
    y.mul_(2)
    return y.sum() + part.sum() + x


def zeros_written_in_part(x: Tensor) -> Tensor:
    """In training they get a gradient with what is written."""
    y = x.new_zeros(x.shape)
    y[:1] = x[:1] * 2
    return x + y


def halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    a, b = torch.cat([b, a], dim=-1).split(2, dim=-1)
    return torch.cat([a, b], dim=-1)


def largest(x: Tensor) -> Tensor:
    value, _ = x.max(dim=-1, keepdim=True)
    return x - value


def nothing_to_do(x: Tensor) -> Tensor:
    return torch.nn.functional.dropout(x.contiguous().to(torch.float32), 0.5, training=False).exp()


def one_tensor_twice(x: Tensor) -> Tensor:
    return (x.exp() @ x.exp().mT).softmax(-1) + x @ x.mT


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.exp()
    return y * x


COPIED = [
    written_through_a_view,
    written_after_a_view,
    zeros_written_in_part,
    halves,
    largest,
    nothing_to_do,
    one_tensor_twice,
    under_no_grad,
]


@pytest.mark.parametrize("step", COPIED)
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_steps(step: Callable[[Tensor], Tensor], train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 4, requires_grad=train)
    assert assert_same(twice(twice(step)), (x,), monkeypatch) > 0


def test_what_reads_copies_is_traced_on_tensors_like_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of one memory, in which a copy wrote, read by operators that were not met before."""

    def function(x: Tensor) -> Tensor:
        for _ in range(3):
            y = x.exp()
            part = y[1:]
            y += 1
            x = part + y[:-1]
            x = torch.cat([x, x[:1]])
        part.mul_(3)
        return y.tanh() + part.sin().sum() + y.view(-1)[3:].cos().sum() + part.t().sinh().sum()

    assert assert_same(function, (torch.randn(4, 4),), monkeypatch) > 10


# -------------------------------------------------------------------------------------------------- what is traced again


UNLIKE: dict[str, Function] = {
    "types": lambda x: (x.exp(), x.double().exp()),
    "strides": lambda x: (x.exp(), x.t().exp()),
    "gradients": lambda x: (x.exp(), x.detach().exp()),
    "numbers": lambda x: (x.sum(0), x.sum(1)),
    "kinds_of_numbers": lambda x: (x * 1, x * 1.0, x * True),
    "signs_of_zero": lambda x: (x * 0.0, x * -0.0),
    "one_or_two": lambda x: (lambda a, b: (a * a, a * b))(x[1:], x[:-1]),
    "shared_or_not": lambda x: (lambda a: (torch.add(x, a), torch.add(a, a.clone())))(x.view(x.shape)),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_other_calls_are_traced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(UNLIKE[name], (torch.randn(3, 3, requires_grad=True),), monkeypatch)


def test_literals_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: Tensor) -> Tensor:
        return x * (torch.tensor(2.0) + 1) + x * (torch.tensor(3.0) + 1)

    assert_same(function, (torch.randn(3),), monkeypatch)


def test_layouts_changed_in_place_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(x: Tensor) -> Tensor:
        y = x.exp()
        y.transpose_(0, 1)
        return y.reshape(4, 3)

    assert_same(twice(turned), (torch.randn(4, 3),), monkeypatch)


def test_vmap_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: Tensor) -> Tensor:
        return torch.vmap(lambda row: row.exp().exp().exp())(x)

    assert assert_same(function, (torch.randn(4, 3),), monkeypatch) == 0


def test_symbolic_sizes_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert assert_same(lambda x: x.exp().exp().exp(), (torch.randn(4, 3),), monkeypatch, dynamic=True) == 0


def test_a_function_of_somebody_else_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x)
        return x.exp() if len(calls) % 2 else x.sin()

    graph = fx.Graph()
    node = graph.placeholder("x")
    for _ in range(4):
        node = graph.call_function(counted, (node,))
    graph.output((node,))
    ours, theirs = both(fx.GraphModule(torch.nn.Module(), graph), [torch.randn(3)], monkeypatch)
    assert ours == theirs
    assert Counted.copied == 0


def test_a_tensor_that_cannot_be_made_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the whole graph is traced."""

    def refuse(value: Any) -> Any:
        if any(isinstance(x, repeats.Copied) for x in value[0]):
            raise repeats.CannotCopy
        return value

    monkeypatch.setattr(lower, "materialised", refuse)
    assert_same(lambda x: x.exp().exp().exp().sin(), (torch.randn(3),), monkeypatch)


def test_a_layer_like_another_costs_copies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for layers in (2, 6):
        config = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
        model = zoo.hf.LlamaModel(zoo.hf.LlamaConfig(**config, intermediate_size=96, vocab_size=96, use_cache=False)).eval()
        with torch.no_grad():
            assert_same(model, (zoo.token_ids(),), monkeypatch)
        counts.append(Counted.traced)
    assert counts[0] == counts[1]
