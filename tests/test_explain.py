"""What explain says of sites that were left: where, at which line, why, and what would help; how long things are shown."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

import attngen
from attngen import advice, show
from attngen.abbreviate import ENOUGH, LONGEST, abbreviated
from attngen.report import Report, SiteReport, unnumbered

ROOT = Path(__file__).parent.parent
SHAPE = (2, 3, 16, 8)


def inputs(**options: object) -> list[torch.Tensor]:
    return [torch.randn(SHAPE, **options) for _ in range(3)]  # type: ignore[arg-type]


def weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2), -1)


def returned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    w = weights(q, k)
    return w @ v, w


def read_elsewhere(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    w = weights(q, k)
    return w @ v + w.mean()


def dropped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.dropout(q @ k.transpose(-1, -2), 0.1).softmax(-1) @ v


def other_dimension(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2), -2) @ v


def changed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(weights(q, k), (SHAPE[-2],)) @ v


def in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k = torch.relu(k)
    s = q @ k.transpose(-1, -2)
    k.zero_()
    return torch.softmax(s, -1) @ v


def in_double(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return weights(q.double(), k.double()) @ v.double()


@pytest.mark.parametrize(
    ("model", "reason", "line", "helps"),
    [
        (returned, "the attention weights are returned", "return torch.softmax", "output_attentions=False"),
        (read_elsewhere, "the attention weights are also read by mean", "return w @ v + w.mean()", "Drop the other reader"),
        (dropped, "the scores are dropped at random", "F.dropout(", "model.eval()"),
        (other_dimension, "the softmax runs over another dimension", "-2) @ v", "the dimension of the keys"),
        (changed, "the weights are changed between", "F.layer_norm", "to the scores or to the result"),
        (in_place, "an input is written in place", "k.zero_()", "Write to a copy"),
        (in_double, "kernels do not compute in float64", "v.double()", "model.to(torch.float32)"),
    ],
)
def test_a_miss_names_its_line_and_what_would_help(model: object, reason: str, line: str, helps: str) -> None:
    with torch.no_grad():
        (site,) = attngen.explain(model, *inputs()).sites  # type: ignore[arg-type]
    assert site.status == "missed" and site.reason.startswith(reason), site
    assert site.file == __file__ and site.node and site.blamed is not None
    assert site.blamed["file"] == __file__ and line in site.blamed["code"], site.blamed
    assert Path(__file__).read_text().splitlines()[site.blamed["line"] - 1].strip() == site.blamed["code"]
    assert helps in site.advice


def test_every_row_of_advice_is_for_a_reason_that_is_given() -> None:
    sources = "\n".join(path.read_text() for part in ("passes", "attngen") for path in (ROOT / part).glob("*.py"))
    sources = sources.replace((ROOT / "attngen/advice.py").read_text(), "").replace("{name}", "head size")
    sources += sources.replace("the head size is", "the value head size is")
    for beginning in advice.ADVICE:
        assert beginning in sources, beginning
    assert advice.on("nothing that is known") == ""
    assert "mark_static" in advice.on("the head size is not a fixed number")
    assert "smaller" in advice.on("the head size is 512; kernels go up to 256")


# ---------------------------------------------------------------------------------------------------------------- where


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A file of functions that models of other files share."""
    (tmp_path / "shared_attention.py").write_text(
        "import torch\n\ndef attend(q, k, v):\n    return torch.softmax(q @ k.transpose(-1, -2), -1) @ v\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import shared_attention  # type: ignore[import-not-found]

    yield shared_attention
    del sys.modules["shared_attention"]


def test_a_site_in_a_shared_function_is_at_the_line_of_its_module(helper: ModuleType) -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = helper.attend(q, k, v)
            return result

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.inner(q, k, v)
            return result

    with torch.no_grad():
        (site,) = attngen.explain(Net().eval(), *inputs()).sites
    assert (site.status, site.module, site.file) == ("found", "inner", __file__)
    assert "helper.attend(q, k, v)" in Path(__file__).read_text().splitlines()[site.line - 1]
    assert site.where == f"inner ({Path(__file__).name}:{site.line})"


# ---------------------------------------------------------------------------------------------------------------- shown


def missed(layer: int, reason: str) -> SiteReport:
    blamed = {"file": "/x/model.py", "line": 7, "code": f"weights = change(weights, {'of_a_very_long_name, ' * 9})"}
    where = f"layers.{layer}.attn (model.py:9)"
    return SiteReport(where, "missed", reason, blamed=blamed, advice=advice.on(reason))


def shown(report: Report, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(show.sites(report), show.summary(report))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.rstrip() for line in text.splitlines()]


@pytest.mark.parametrize("width", [80, 200])
def test_misses_are_grouped_by_reason(width: int) -> None:
    """Layers whose reasons differ in the number of a node alone are one row, and its advice is said once."""
    read = [missed(n, f"the attention weights are also read by mul_{n}") for n in range(12)]
    lines = shown(Report("NVIDIA H200", (missed(20, "the attention weights are returned"), *read)), width)
    assert max(map(len, lines)) <= min(width, 100)
    assert lines[2] == "the attention weights are also read by mul"
    assert lines[3] == "  layers.0-11.attn  x12  model.py:9"
    assert lines[4].startswith("    model.py:7  weights = change(weights, of_a") and lines[4].endswith("…")
    text = " ".join(" ".join(lines).split())
    assert text.count("Only the product with the values may read the weights.") == 1
    assert "Nothing was replaced: 13 sites left as they were" in text and len(lines) < 20


def test_nodes_lose_their_numbers() -> None:
    assert unnumbered("also read by mul_7") == "also read by mul"
    assert unnumbered("also read by copy__7") == unnumbered("also read by copy_") == "also read by copy_"
    assert unnumbered("block_2d is read") == "block_2d is read"


class Biased(nn.Module):
    """Scores with a parameter by distance, and one by head."""

    def __init__(self) -> None:
        super().__init__()
        self.by_distance = nn.Embedding(31, 3)
        self.slopes = nn.Parameter(torch.rand(3))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        place = torch.arange(16)
        bias = self.by_distance(torch.sqrt((place - place[:, None] + 15).float()).long()).permute(2, 0, 1)
        s = q @ k.mT + bias + self.slopes[:, None, None].exp() * place
        return s.softmax(-1) @ v


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Biased()

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(*args)
        return result


def test_what_an_expression_loads_is_explained() -> None:
    with torch.no_grad():
        report = attngen.explain(Around().eval(), *inputs())
    (site,) = report.sites
    assert "[h, j - i]" in site.computes and "size" not in site.computes
    table, slopes = (next(made for made in site.loads.values() if what in made) for what in ("table", "exp()"))
    assert len(site.loads) == 2 and table == "a table of inner.by_distance.weight"
    assert slopes.startswith(f"{Path(__file__).name}:{site.line - 1}  s = q @ k.mT")
    lines = shown(report, 200)
    assert sum("is a table of its by_distance.weight" in line for line in lines) == 1


def rows_of_padding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return weights(q, k).masked_fill(padding[:, None, :, None], 0.0) @ v


def test_rows_that_are_zero_are_said_to_be() -> None:
    with torch.no_grad():
        (site,) = attngen.explain(rows_of_padding, *inputs(), torch.rand(2, 16) > 0.5).sites
    assert site.computes.startswith("softmax(qk; zero where t0[b, i]), ") and site.loads == {"t0": "padding"}


def test_many_places_and_many_reasons_are_counted_not_listed() -> None:
    places = [SiteReport(f"part{'abcdefgh'[n]}.attn (m.py:{n})", "missed", "one reason") for n in range(8)]
    reasons = [SiteReport(f"other (m.py:{n})", "missed", f"reason {n}") for n in range(9)]
    lines = shown(Report("NVIDIA H200", (*reasons, *places)), 80)
    assert "  and 4 more sites with this reason (--json lists all)" in lines
    assert "  and 4 more sites with other reasons (--json lists all)" in lines
    assert sum(line.startswith("  part") for line in lines) == 4


def split_in_the_middle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    w = weights(q, k)
    torch._dynamo.graph_break()
    return w @ v


def test_attention_between_two_graphs_is_not_nothing() -> None:
    with torch.no_grad():
        report = attngen.explain(split_in_the_middle, *inputs())
        whole = attngen.explain(rows_of_padding, *inputs(), torch.rand(2, 16) > 0.5)
    assert report.sites == () and any("captured 2 graphs" in note for note in report.notes)
    assert not any("graphs" in note for note in whole.notes)


def test_nothing_found_in_a_part_is_not_nothing_found() -> None:
    assert "in this model" in str(show.summary(Report("NVIDIA H200", ())))
    assert "that was looked at" in str(show.summary(Report("NVIDIA H200", (), partial=True)))


def test_short_expressions_stay() -> None:
    assert abbreviated("softmax(qk*0.25; causal)") == ["softmax(qk*0.25; causal)"]


def test_repeated_parts_of_long_expressions_get_names() -> None:
    """Put back, the names give the expression again."""
    part = "(1 if (j//8) + 8*(Mod(b, 16)) >= 24 else 0)"
    other = "(3 if Mod(i, 8) + 8*(Mod(b, 4)) >= 28 else 5)"
    text = f"softmax(qk + (0 if {part} - {other} == 0 else (-100 if {part} - {other} != 0 else {part} - {other})))"
    assert len(text) > ENOUGH
    line, *names = abbreviated(text)
    assert sorted(names) == sorted({f"{line[line.index('0 if ') + 5]} = {part}", *names}) and len(line) < 80
    for name in names:
        letter, _, meaning = name.partition(" = ")
        line = line.replace(letter, meaning)
    assert line == text


def test_what_is_still_too_long_is_cut() -> None:
    (line,) = abbreviated("softmax(" + " + ".join(f"t{n}[i, j]" for n in range(100)) + ")")
    assert len(line) <= LONGEST and line.startswith("softmax(t0[i, j] + t1") and "characters)" in line


def test_text_of_a_report_is_no_flood() -> None:
    """What holds for many layers, or many times on one line, is said once."""
    layers = [SiteReport(f"layers.{n}.attn (model.py:7)", "missed", f"also read by mul_{n}") for n in range(4)]
    steps = [SiteReport("rule (model.py:9)", "missed", "the weights are not exp(scores) over their sum")] * 60
    _, *lines = str(Report("NVIDIA H200", (*layers, *steps))).splitlines()
    assert lines == [
        "  layers.0-3.attn (model.py:7)  MISSED  also read by mul_0 (4 sites)",
        "  rule (model.py:9)  MISSED  the weights are not exp(scores) over their sum (60 sites)",
    ]
