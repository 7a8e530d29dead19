"""``attngen minify``: a script for one site that computes what the model computes there, with the same outcome."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from attngen import blockwise, capture, minify, sample
from attngen.cli import app

MODEL = """
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))

    def forward(self, x, mask):
        q, k, v = (part(x).view(2, -1, 3, 8).transpose(1, 2) for part in self.parts)
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        allowed = past & mask[:, None, None, :].bool()
        scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~allowed, -1e9)
        return self.weighted(torch.softmax(scores, -1), v).transpose(1, 2).reshape(x.shape)

    def weighted(self, weights, v):
        return weights @ v

class Precise(Attention):
    def weighted(self, weights, v):
        return (weights.double() @ v.double()).float()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention(), Precise()])

    def forward(self, x, mask):
        for layer in self.layers:
            x = x + layer(x, mask)
        return x

torch.manual_seed(0)
model = Net().eval()
mask = torch.ones(2, 20, dtype=torch.long)
mask[1, 13:] = 0
example_inputs = (torch.randn(2, 20, 24), mask)
"""


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def written(*arguments: str) -> Result:
    Path("model.py").write_text(MODEL)
    return CliRunner().invoke(app, ["minify", "model.py", *arguments])


def alone(script: str) -> tuple[int, str]:
    """The exit code of a script and what it prints, run in this process."""
    torch._dynamo.reset()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), torch.enable_grad():
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0), printed.getvalue()
    return 0, printed.getvalue()


# -------------------------------------------------------------------------------------------------------------- scripts


def test_a_replaced_site_runs_alone_and_is_right() -> None:
    done = written("--site", "layers.1")
    assert done.exit_code == 0, done.output
    assert "Note:" not in done.output and "model_layers.1.py" in done.stdout
    text = Path("model_layers.1.py").read_text()
    imported = {line for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {"import sys", "import torch", "import attngen", "from attngen.verify import within_budget"}
    assert "def attention(query, keys, values, mask):" in text and "linear" not in text
    assert "runs((2, 20), [1, 0], [33, 7], torch.int64),  # mask" in text
    run = subprocess.run([sys.executable, "model_layers.1.py"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert re.search(r"^replaced: softmax\(qk\*0.3; causal & padding\), 2x3 heads, 20 x 20", run.stdout, re.MULTILINE)
    assert len(re.findall(r"^right: error \S+ \(budget", run.stdout, re.MULTILINE)) == 1


def test_a_wrong_site_ends_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    written("--site", "layers.0", "-o", "made/alone.py")
    forward = blockwise.forward
    monkeypatch.setattr(
        blockwise, "forward", lambda *a, **k: tuple(x * (1 if k else 1.01) for x in forward(*a, **k))
    )
    monkeypatch.setattr(blockwise, "plain", lambda spec: None)
    code, said = alone("made/alone.py")
    assert code == 1 and re.search("^WRONG: error", said, re.MULTILINE), said


def test_a_missed_site_gives_the_same_reason_alone() -> None:
    done = written("--site", "layers.2")
    assert done.exit_code == 0 and "Note:" not in done.output, done.output
    code, said = alone("model_layers.2.py")
    assert code == 0 and "missed: kernels do not compute in float64" in said, said
    assert len(re.findall("^right: ", said, re.MULTILINE)) == 1


def test_training_compares_gradients_too() -> None:
    done = written("--site", "layers.0", "--train")
    assert done.exit_code == 0, done.output
    code, said = alone("model_layers.0.py")
    assert code == 0, said
    assert len(re.findall("^right: ", said, re.MULTILINE)) == 4  # the result; gradients of query, keys, values


@pytest.mark.parametrize("site", ["layers.7", "layers.0#2", "nowhere.py:3"])
def test_a_site_that_is_not_there_is_one_error_that_lists_those_that_are(site: str) -> None:
    done = written("--site", site)
    assert done.exit_code == 2 and done.stderr.count("error: ") == 1
    assert f'no site "{site}"' in done.stderr
    assert re.search(r"^  layers\.0-1  \(model\.py:\d+, found\)$", done.stderr, re.MULTILINE)
    assert re.search(r"^  layers\.2  \(model\.py:\d+, missed\)$", done.stderr, re.MULTILINE)
    assert [path.name for path in Path().iterdir() if path.suffix == ".py"] == ["model.py"]


@pytest.mark.parametrize(
    ("site", "where"), [("layers.0-1", "layers.0"), ("layers.*#3", "layers.2"), ("layers.*", "layers.0")]
)
def test_rows_of_explain_patterns_and_numbers_name_sites(site: str, where: str) -> None:
    done = written("--site", site, "-o", "x.py")
    assert done.exit_code == 0 and Path("x.py").read_text().startswith(f'"""{where} ')


def test_a_file_of_somebody_else_is_left_alone() -> None:
    Path("mine.py").write_text("mine")
    done = written("--site", "layers.0", "-o", "mine.py")
    assert done.exit_code == 5 and "was not written by attngen minify" in done.stderr
    assert Path("mine.py").read_text() == "mine"
    assert written("--site", "layers.0", "-o", "x.py").exit_code == written("--site", "layers.1", "-o", "x.py").exit_code == 0


# -------------------------------------------------------------------------------------------------------------- regions


def weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT + torch.arange(k.shape[-2]) * 0.1
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True) @ v


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None]
    allowed = (j <= i) & ~(j < i - 4) | (j % 3 == 0)
    return torch.where(allowed, q @ k.mT, float("-inf")).softmax(-1) @ v


def library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)


def doubled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weights(q.double(), k.double()) @ v.double()


def returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    w = weights(q, k)
    return w @ v, w


def read_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    w = weights(q, k)
    return w @ v, w.mean(-1)


def other_dimension(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2), -2) @ v


def by_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Which pairs count follows from positions, by way of functions that no kernel knows."""
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None]
    far = torch.ceil(torch.log1p((i - j).abs().float())) > 2
    scores = (q @ k.transpose(-1, -2)).masked_fill(far, -1e9)
    return nn.functional.layer_norm(scores.softmax(-1), (16,)) @ v


def written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = torch.relu(k)
    s = q @ k.transpose(-1, -2)
    k[..., 0] = 3.0
    return torch.softmax(s, -1) @ v


def written_alias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = weights(q, k)
    w.view(-1).mul_(2)
    return w @ v


def written_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2)
    s[..., 1:, 2:] += s[..., 1:, 2:].tanh()
    return s.softmax(-1) @ v


def written_diagonal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = weights(q, k)
    w.diagonal(dim1=-2, dim2=-1).mul_(2)
    return w @ v


@pytest.mark.parametrize(
    ("model", "status"),
    [
        (by_hand, "found"), (windowed, "found"), (library, "found"), (doubled, "missed"), (returned, "missed"),
        (read_elsewhere, "missed"), (other_dimension, "missed"), (by_distance, "missed"),
        (written_alias, "found"), (written_part, "found"), (written_diagonal, "missed"), (written_between, "missed"),
    ],
)  # fmt: skip
def test_the_script_computes_what_the_model_does_with_the_same_outcome(model: Any, status: str) -> None:
    """The function of the script, given the model's own inputs (positive: relu changes none), gives its own numbers."""
    torch.manual_seed(0)
    q, k, v = (torch.rand(2, 16, 3, 8).transpose(1, 2) for _ in range(3))
    with torch.no_grad():
        made = minify.run(model, (q, k, v), {}, "test_minify.py:*", "alone.py")
    assert made.site.status == status and made.alone == "", made
    script = loaded(made.text)
    given = [fitted(x, script["inputs"]()[n]) for n, x in enumerate((q, k, v))]
    assert [x.stride() for x in given] == [x.stride() for x in script["inputs"]()]
    for one, other in zip(several(script["attention"](*given)), several(model(q, k, v)), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert script["main"]() == 0


def loaded(text: str) -> dict[str, Any]:
    script = sys.modules["alone"] = ModuleType("alone")  # Dynamo looks there for a model's globals
    exec(compile(text, "alone.py", "exec"), vars(script))
    return vars(script)


def fitted(x: Tensor, like: Tensor) -> Tensor:
    """A tensor of the model as the script takes it: keys may be transposed, and types those of the product."""
    return (x if x.shape == like.shape else x.mT).to(like.dtype).clone(memory_format=torch.preserve_format)


def several(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_biases_and_grouped_heads_of_real_models(implementation: str) -> None:
    """T5's bias comes from its table, an input of the script; Llama's mask from positions alone."""
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 1, "num_layers": 1, "vocab_size": 64, "use_cache": False}
    t5 = transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_heads=4, **small)
    llama = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, **small
    )
    for config, part, site in ((t5, "T5EncoderModel", "*.SelfAttention"), (llama, "LlamaModel", "layers.0.self_attn")):
        config._attn_implementation = implementation
        model = getattr(transformers, part)(config).eval()
        with torch.no_grad():
            made = minify.run(model, (), {"input_ids": torch.randint(0, 64, (2, 16))}, site, "alone.py")
            assert made.site.status == "found" and made.alone == ""
            assert loaded(made.text)["main"]() == 0
        extra = ", relative_attention_bias_weight" if part.startswith("T5") else ""
        assert re.search(rf"def attention\(\w+, \w+, \w+{extra}\):", made.text)


# -------------------------------------------------------------------------------------------------------------- samples


def evaluated(text: str) -> Tensor:
    code = "\n".join(["import torch", "DEVICE = 'cpu'", *sample.HELPERS.values(), f"x = {text}"])
    held: dict[str, Any] = {"generator": torch.Generator().manual_seed(0)}
    exec(code, held)
    value: Tensor = held["x"]
    return value


@pytest.mark.parametrize(
    "recorded",
    [
        torch.ones(2, 9, dtype=torch.long),
        torch.tensor([[True] * 7 + [False] * 2, [True] * 9]),
        torch.arange(3, 20).expand(2, 17),
        torch.zeros(2, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf")),
        torch.tensor(0.5, dtype=torch.bfloat16),
        torch.tensor([3, 1, 4, 1, 5], dtype=torch.int32),
    ],
)
def test_small_recorded_values_come_back(recorded: Tensor) -> None:
    back = evaluated(sample.text(recorded, recorded))
    assert back.dtype == recorded.dtype and torch.equal(back, recorded)


@pytest.mark.parametrize(
    "like",
    [
        torch.empty(2, 16, 3, 8).transpose(1, 2),
        torch.empty(2, 1, 4, dtype=torch.bfloat16).expand(2, 3, 4),
        torch.empty(4, 6)[:, ::2],
        torch.empty(3, 5, dtype=torch.float16),
    ],
)
def test_random_values_have_shape_strides_and_type(like: Tensor) -> None:
    back = evaluated(sample.text(like))
    assert (back.shape, back.dtype) == (like.shape, like.dtype) and back.float().std() > 0.3
    moving = [d for d, n in enumerate(like.shape) if n > 1]
    assert [back.stride(d) for d in moving] == [like.stride(d) for d in moving]
    assert torch.equal(back, evaluated(sample.text(like)))


def test_random_integers_stay_in_the_recorded_range() -> None:
    recorded = torch.randint(5, 90, (3, 70), generator=torch.Generator().manual_seed(7))
    back = evaluated(sample.text(recorded, recorded))
    assert back.min() >= recorded.min() and back.max() <= recorded.max() and not torch.equal(back, recorded)


def test_weights_are_not_written_down() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    assert "randn" in sample.text(weight, weight) and evaluated(sample.text(weight, weight)).abs().min() > 0


def test_capture_hands_the_real_inputs_to_a_look() -> None:
    from attngen import options
    from attngen.report import Report

    seen: list[Any] = []

    def look(gm: Any, inputs: Any) -> Report:
        seen.extend(inputs)
        return Report("", ())

    x = torch.arange(3)
    capture.over_graphs(lambda x: x + 1, (x,), {}, options.parse({}), look, may_run=False)
    assert any(value is x for value in seen)
