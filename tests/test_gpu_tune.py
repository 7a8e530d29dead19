"""The tuner on a real card. Run with ``pytest -m gpu``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import attngen
from attngen import cli
from attngen.cache.contents import contents, unknown
from attngen.cache.store import Store
from attngen.verify import within_budget

pytestmark = pytest.mark.gpu

MODEL = """
import torch
from torch import nn

class Layer(nn.Module):
    def forward(self, q, k, v):
        scores = (q @ k.mT) * 0.125
        mask = torch.ones(512, 512, dtype=torch.bool, device=q.device).tril()
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v

model = Layer()
example_inputs = tuple(torch.randn(2, 8, 512, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ATTNGEN_CACHE", raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def inputs(device: str = "cuda", grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    shape = (2, 512, 8, 64)
    return [torch.randn(shape, dtype=torch.bfloat16, device=device).transpose(1, 2).requires_grad_(grad) for _ in range(3)]


def compiled(grad: bool, **options: Any) -> attngen.report.SiteReport:  # type: ignore[name-defined]
    torch._dynamo.reset()
    values = inputs(grad=grad)
    with torch.set_grad_enabled(grad), attngen.record() as reports:
        out = torch.compile(Layer(), backend="attngen", options={"strict": True, **options})(*values)
        if grad:
            out.sum().backward()
    exact = Layer()(*(x.double() for x in values))
    check = within_budget(out, exact.detach(), Layer()(*values).detach())
    assert check.ok, str(check)
    return reports[0].sites[0]


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_measured_while_compiling_is_known_the_next_time(grad: bool) -> None:
    site = compiled(grad, tune="quick")
    assert site.source == "tuned" and site.measured_ms > 0
    again = compiled(grad, cache="assert")
    assert (again.source, again.tile, again.measured_ms) == ("cache", site.tile, site.measured_ms)
    if grad:
        assert (site.backward_source, again.backward_source) == ("tuned", "cache")
        assert again.backward == site.backward and site.backward_measured_ms > 0


def test_the_command_on_every_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    for expected in ("2 choices tuned, 0 known before", "0 choices tuned, 2 known before"):
        done = CliRunner().invoke(cli.app, ["tune", "model.py", "--train", "--devices", "all"], env={"COLUMNS": "200"})
        assert done.exit_code == 0 and expected in done.output, done.output
    found = contents(Store())
    assert len(found.entries) == 2 and not found.wrong
    for entry in found.entries.values():
        assert unknown(entry) is None and entry.model_microseconds is not None
        assert entry.microseconds <= entry.model_microseconds and entry.candidates >= 2
