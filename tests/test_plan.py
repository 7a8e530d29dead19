"""Plan files: what is written is what is used elsewhere, and a file that is not a plan is refused with a reason."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attngen
from attngen import capture, emit, plan
from attngen.emit import BACKWARDS, TEMPLATES, Kernel, template_digest
from attngen.errors import BadPlan
from attngen.report import Report
from attngen.spec import PORTABLE, Problem, Tile, digest

OTHER = {"rows": 16, "keys": 32, "warps": 8, "stages": 1}  # a tile that the model would never pick


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layers(nn.Module):
    """Two causal layers of the same kind, and one of another length."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(2):
            q = q + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return nn.functional.scaled_dot_product_attention(q[:, :, :40], k, v)


def inputs(length: int = 80) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, 3, length, 32) for _ in range(3))


@pytest.fixture(scope="module")
def made() -> tuple[Report, list[Kernel]]:
    with torch.no_grad():
        report, uses = capture.generate(Layers(), inputs(), {}, {"target": "h200"})
    return report, [use.kernel for use in uses]


def write(folder: Path, made: tuple[Report, list[Kernel]], **changes: Any) -> Path:
    """The plan of ``made`` as a file, with some fields of each entry changed."""
    content = json.loads(plan.of(*made).model_dump_json())
    for entry in content["entries"]:
        entry.update(changes)
    path = folder / "plan.json"
    path.write_text(json.dumps(content))
    return path


def run(length: int = 80, **options: str) -> tuple[Tensor, Report]:
    with torch.no_grad(), attngen.record() as reports:
        common = {"inner": "eager", "target": "h200"}
        if "load" in options:
            compiled = torch.compile(Layers(), backend=attngen.load(options["load"], **common))
        else:
            compiled = torch.compile(Layers(), backend="attngen", options={**common, **options})
        out = compiled(*inputs(length))
    return out, reports[0]


def test_one_entry_for_each_kernel_and_size(made: tuple[Report, list[Kernel]]) -> None:
    report, kernels = made
    content = plan.of(report, kernels)
    assert [(e.batch, e.rows, e.keys) for e in content.entries] == [([2, 3], 80, 80), ([2, 3], 40, 80)]
    assert [e.kernel for e in content.entries] == [kernel.name for kernel in kernels]
    assert all(e.template == template_digest(TEMPLATES[PORTABLE]) for e in content.entries)
    assert content.device == report.device == "NVIDIA H200"


def test_reading_gives_back_what_was_written(tmp_path: Path, made: tuple[Report, list[Kernel]]) -> None:
    path = write(tmp_path, made)
    assert plan.read(path) == plan.read(tmp_path) == plan.of(*made)
    for site, kernel in ((made[0].sites[0], made[1][0]), (made[0].sites[2], made[1][1])):
        assert site.sizes is not None
        problem = Problem(tuple(site.sizes["batch"]), site.sizes["rows"], site.sizes["keys"])
        assert plan.read(path).tile_for(kernel.spec, problem) == kernel.tile


@pytest.mark.parametrize("way", ["plan", "load"])
def test_a_tile_changed_by_hand_is_the_tile_used(way: str, tmp_path: Path, made: tuple[Report, list[Kernel]]) -> None:
    path = write(tmp_path, made, tile=OTHER)
    expected, plain = run()
    torch._dynamo.reset()
    actual, report = run(plan=str(path)) if way == "plan" else run(load=str(tmp_path))
    assert {site.tile for site in report.sites} == {str(Tile(**OTHER))}
    assert not {site.tile for site in plain.sites} & {str(Tile(**OTHER))}
    assert {site.kernel for site in report.sites}.isdisjoint({site.kernel for site in plain.sites})
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual, Layers()(*inputs()))


def test_other_sizes_take_the_choice_of_the_same_spec(tmp_path: Path, made: tuple[Report, list[Kernel]]) -> None:
    _, report = run(length=96, plan=str(write(tmp_path, made, tile=OTHER)))
    assert {site.tile for site in report.sites} == {str(Tile(**OTHER))}


def test_the_exact_size_goes_before_others(tmp_path: Path, made: tuple[Report, list[Kernel]]) -> None:
    path = write(tmp_path, made, tile=OTHER)
    content = json.loads(path.read_text())
    first = content["entries"][0]
    content["entries"].append({**first, "rows": 96, "keys": 96, "tile": {**OTHER, "rows": 32}})
    path.write_text(json.dumps(content))
    read, spec = plan.read(path), made[1][0].spec
    assert read.tile_for(spec, Problem((2, 3), 96, 96)) == Tile(32, 32, 8, 1)
    assert read.tile_for(spec, Problem((2, 3), 80, 80)) == read.tile_for(spec, Problem((9, 9), 1, 1)) == Tile(**OTHER)


def test_a_tile_that_cannot_run_is_said_and_not_used(
    tmp_path: Path, made: tuple[Report, list[Kernel]], caplog: pytest.LogCaptureFixture
) -> None:
    huge = {"rows": 256, "keys": 256, "warps": 4, "stages": 4}
    with caplog.at_level(logging.WARNING, "attngen"):
        _, report = run(plan=str(write(tmp_path, made, tile=huge)))
    assert "the plan's tile 256x256 w4 s4 cannot run on NVIDIA H200" in caplog.text
    assert all(site.tile != "256x256 w4 s4" for site in report.replaced)


def test_a_choice_for_another_template_is_ignored_and_said(
    tmp_path: Path, made: tuple[Report, list[Kernel]], caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, made, tile=OTHER, template="0" * 12)
    with caplog.at_level(logging.WARNING, "attngen"):
        _, report = run(plan=str(path))
    assert [site.tile for site in report.sites] == [site.tile for site in made[0].sites]
    assert f"another version of {TEMPLATES[PORTABLE]}" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"tile": {**OTHER, "rows": -16}}, "entries.0.tile.rows", id="negative"),
        pytest.param({"tile": {**OTHER, "keys": 48}}, "entries.0.tile.keys", id="not a power of two"),
        pytest.param({"tile": {**OTHER, "rows": "64"}}, "entries.0.tile.rows", id="text for a number"),
        pytest.param({"source": "import os"}, "entries.0.source", id="a field that is none of ours"),
        pytest.param({"spec": "short"}, "entries.0.spec", id="not a digest"),
    ],
)
def test_a_wrong_field_is_named(
    change: dict[str, Any], said: str, tmp_path: Path, made: tuple[Report, list[Kernel]]
) -> None:
    path = write(tmp_path, made, **change)
    with pytest.raises(BadPlan, match=said) as wrong:
        attngen.load(path)
    assert str(path) in str(wrong.value) and "attngen optimize" in str(wrong.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00", '{"attngen": "1"}'])
def test_files_that_are_no_plans(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(BadPlan, match="is not a plan file"):
        plan.read(tmp_path)


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadPlan, match="does not exist"):
        attngen.load(tmp_path)


@pytest.mark.parametrize("template", [*TEMPLATES.values(), *BACKWARDS.values()])
def test_a_digest_is_of_all_that_a_template_includes(template: str) -> None:
    parts = emit._texts(template)
    assert "def launch" in parts[0] and any("def tanh" in part for part in parts[1:])
    assert template_digest(template) == digest("".join(parts))
