"""Steps of training: what surrounds attention in them, whole steps compiled, and runs of the examples beside eager's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from specs import CAUSAL, attention
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

import attngen
from attngen import runtime
from attngen.choose_bwd import BackwardPlan, choose_backward
from attngen.device import resolve
from attngen.spec import Problem
from attngen.verify import within_budget

EXAMPLES = Path(__file__).parent.parent / "examples"
LAYERS, WIDTH, VOCABULARY, BATCH, LENGTH = 2, 32, 50, 8, 20


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.qkv, self.out = p, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT * 0.25).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
        heads = dropout(scores.softmax(-1), self.p) @ v
        out: Tensor = x + self.out(heads.transpose(1, 2).flatten(2)).tanh()
        return out


class Model(nn.Module):
    """Gives the loss of ``ids`` as a language model."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.Sequential(*(Layer(p) for _ in range(LAYERS)))

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.layers(self.embedding(ids)))
        return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def model(p: float = 0.0) -> Model:
    torch.manual_seed(0)
    return Model(p)


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def compiled(function: Callable[..., Any], inner: str = "eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="attngen", options={"inner": inner, "strict": True}, **options)  # type: ignore[no-any-return]


def gradients(of: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in of.parameters() if p.grad is not None]


def parameters(of: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in of.parameters()]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_accumulated_gradients_are_those_of_one_batch(inner: str) -> None:
    of, ids = model(), tokens()
    of(ids).backward()
    expected = gradients(of)
    of.zero_grad()
    with attngen.record() as reports:
        run = compiled(of, inner)
        for part in ids.chunk(4):
            (run(part) / 4).backward()
    close(gradients(of), expected)
    assert sum(len(report.replaced) for report in reports) == LAYERS


def test_each_micro_step_drops_anew() -> None:
    """The sum of four is that of the four alone, which differ on the same tokens."""
    of, ids = model(0.5), tokens()
    run = compiled(of)
    torch.manual_seed(1)
    for _ in range(4):
        run(ids).backward()
    total, alone = gradients(of), []
    torch.manual_seed(1)
    for _ in range(4):
        of.zero_grad()
        run(ids).backward()
        alone.append(gradients(of))
    close(total, [sum(parts[1:], parts[0]) for parts in zip(*alone, strict=True)])
    assert not any(torch.allclose(alone[0][k], later[k]) for k in (0, -2) for later in alone[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_autocast_and_a_scaler_of_gradients(inner: str, dtype: torch.dtype) -> None:
    """The step that a scaled loss leads to, and none where gradients are infinite."""
    ids = tokens()

    def stepped(of: nn.Module, run: Callable[..., Any], dtype: torch.dtype, times: float = 1.0) -> list[Tensor]:
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(of.parameters(), lr=1.0)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = run(ids)
        scaler.scale(loss * times).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (scaler.get_scale() < 1024.0) == (times > 1)
        return parameters(of)

    of, other, exact = model(), model(), model()
    run = compiled(of, inner)
    with attngen.record() as reports:
        ours = stepped(of, run, dtype)
    assert sum(len(report.replaced) for report in reports) == LAYERS
    eager, true = stepped(other, other, dtype), stepped(exact, exact, torch.float32)
    first = parameters(model())
    for mine, naive, right, start in zip(ours, eager, true, first, strict=True):
        verdict = within_budget(mine - start, right - start, naive - start, slack=3.0)
        assert verdict.ok, str(verdict)
    of.zero_grad()
    assert all(map(torch.equal, stepped(of, run, dtype, 3e38), ours))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("autograd", [False, True])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_whole_step_is_compiled(inner: str, autograd: bool, p: float) -> None:
    """Model, loss, backward and optimizer in one function; with compiled autograd the backward is a graph too."""

    def trained(compile_step: bool) -> tuple[list[float], list[Tensor]]:
        of, ids = model(p), tokens()
        optimizer = torch.optim.AdamW(of.parameters(), lr=1e-2)
        forward = of if compile_step else compiled(of)

        def step() -> Tensor:
            loss = forward(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        run = compiled(step, inner) if compile_step else step
        torch.manual_seed(4)
        return [run().item() for _ in range(3)], parameters(of)

    with torch._dynamo.config.patch(compiled_autograd=autograd), attngen.record() as reports:
        ours, ends = trained(True)
    assert sum(len(report.replaced) for report in reports) == LAYERS
    assert len(reports) > 2  # the optimizer's graph, and with compiled autograd that of the backward
    torch._dynamo.reset()
    losses, expected = trained(False)
    if inner == "eager" or p == 0:  # Inductor draws numbers of its own
        assert ours == pytest.approx(losses, rel=1e-5)
        for one, other in zip(ends, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert ours[2] < ours[0]


# ------------------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_loss_curve_is_eagers(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    training = import_module("training")
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    given = ["--models", name, "--steps", "12", "--size", "tiny", "--inner", "eager", "--out", str(out)]
    training.main(given)
    plain, dropped = json.loads(out.read_text())["results"]
    assert plain["same"] and plain["difference"]["largest"] < 1e-4
    assert dropped["difference"]["mean"] < 0.3 and dropped["curves"]["attngen"] != plain["curves"]["attngen"]
    for result in (plain, dropped):
        assert result["replaced"] == {"gpt2": 2, "t5": 6}[name] and not result["missed"]
        curve = result["curves"]["attngen"]
        assert sum(curve[-4:]) < sum(curve[:4])
    monkeypatch.setattr(training, "train", None)  # what is there is not trained again
    training.main(given)
    assert json.loads(out.read_text())["results"] == [plain, dropped]
    pytest.importorskip("matplotlib")
    training.main(["--show", str(out), "--plot", str(picture)])
    assert picture.stat().st_size > 10_000


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_loss_curve_is_eagers_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In bfloat16, by kernels, with Inductor around them."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    out = tmp_path / "out.json"
    import_module("training").main(["--models", name, "--steps", "40", "--size", "tiny", "--out", str(out)])
    plain, dropped = json.loads(out.read_text())["results"]
    assert plain["difference"]["mean"] < 0.03 and dropped["difference"]["mean"] < 0.2
    for result in (plain, dropped):
        assert result["dtype"] == "bfloat16" and result["replaced"] and not result["missed"]


# -------------------------------------------------------------------------------------------------------- deterministic


def test_a_deterministic_gradient_is_another_operator() -> None:
    """Chosen by an option, and never by the family whose programs add to each other's results."""
    names, found = [], []
    for options in ({}, {"deterministic": True}):
        torch._dynamo.reset()
        of = model()
        with attngen.record() as reports:
            fast = torch.compile(of, backend="attngen", options={"inner": "eager", "strict": True, **options})
            fast(tokens()).backward()
        names.append([site.operator for report in reports for site in report.replaced])
        found.append(gradients(of))
    assert set(names[0]).isdisjoint(names[1]) and len(names[1]) == LAYERS
    assert all(map(torch.equal, *found))
    spec = attention(dtype=torch.bfloat16, head_dim=128, mask=CAUSAL, lse=True)
    problem, device = Problem((2, 8), 2048, 2048), resolve("h200")
    usual, plan = (choose_backward(spec, problem, device, deterministic=asked) for asked in (False, True))
    assert isinstance(usual, BackwardPlan) and isinstance(plan, BackwardPlan)
    assert len(usual.tiles) == 1 and plan.tiles == usual.otherwise


@pytest.mark.parametrize("asked", [False, True])
def test_a_deterministic_gradient_leaves_the_users_setting(asked: bool) -> None:
    seen: list[bool] = []

    def run(*_: Any) -> list[Tensor]:
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise KeyError

    torch.use_deterministic_algorithms(asked)
    try:
        with pytest.raises(KeyError):
            runtime._same_bits(run)(*[torch.ones(1)] * 3, [], [])
        assert seen == [True] and torch.are_deterministic_algorithms_enabled() == asked
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_the_option_gives_the_same_bits_in_a_hundred_steps() -> None:
    """Of a bias that heads share too, which several programs would add to."""
    shapes = [(2, 8, 512, 64)] * 3 + [(512, 512)]
    generator = torch.Generator("cuda").manual_seed(0)
    leaves = [torch.randn(s, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_() for s in shapes]

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return plain + (q @ k.mT * 0.125 + bias).softmax(-1) @ v

    fast = torch.compile(attend, backend="attngen", options={"deterministic": True, "strict": True})
    grad = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16, generator=generator)
    first, *others = (torch.autograd.grad(fast(*leaves), leaves, grad) for _ in range(100))
    assert all(torch.equal(x, y) for grads in others for x, y in zip(first, grads, strict=True))
