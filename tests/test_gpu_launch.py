"""Launches that go to the driver at once, on a GPU: right results, in graphs, on streams and for layouts that alternate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from specs import BY_NAME, Case
from stand_in import hooks
from test_gpu_hopper import launch_of, tiles_of
from test_launch import PORTABLE

from attngen.aot import import_file
from attngen.emit import Kernel, emit
from attngen.verify import check, sample_inputs

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
NAMES = [*PORTABLE, *(f"hopper_{kind}_{name}" for kind in ("stays", "grid") for name in ("causal_lse", "bias", "sinks"))]

pytestmark = pytest.mark.gpu


class Counted:
    """A kernel, and how many of its launches went through Triton; with the launch ``again`` of one that it leaves rows to."""

    def __init__(self, case: Case, kernel: Kernel, module: ModuleType, **again: Callable[..., Any]) -> None:
        self.case, self.kernel, self.module, self.again = case, kernel, module, again
        self.anew = 0
        through = module.launch_anew

        def counted(*inputs: torch.Tensor) -> Any:
            self.anew += 1
            return through(*inputs)

        vars(module)["launch_anew"] = counted

    def inputs(self, rows: int) -> list[torch.Tensor]:
        return sample_inputs(self.case.spec, self.case.problem(rows), device="cuda")

    def launch(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        result = self.module.launch(*inputs, **self.again)
        return [result] if isinstance(result, torch.Tensor) else list(result)

    def right(self, inputs: list[torch.Tensor]) -> None:
        verdict = check(self.launch(inputs), self.case.spec, inputs)
        assert verdict.ok, verdict


@pytest.fixture(params=NAMES)
def counted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Counted]:
    name = request.param
    case = BY_NAME[name.removeprefix("hopper_stays_").removeprefix("hopper_grid_")]
    if name.startswith("hopper") and not HOPPER:
        pytest.skip("not sm_90")
    tile = tiles_of(case)["grid" in name] if name.startswith("hopper") else case.tile
    kernel = emit(case.spec, tile)
    assert isinstance(kernel, Kernel), kernel
    path = tmp_path / f"{kernel.name}.py"
    path.write_text(kernel.source)
    launch = launch_of(kernel, tmp_path)
    yield Counted(case, kernel, import_file(path), **(launch.keywords if isinstance(launch, partial) else {}))


def test_later_launches_are_right(counted: Counted) -> None:
    inputs = counted.inputs(304)
    first = counted.launch(inputs)
    assert counted.anew == 1
    for _ in range(3):
        for mine, theirs in zip(counted.launch(inputs), first, strict=True):
            assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
    for _ in range(3):
        counted.right(counted.inputs(304))  # elsewhere
    assert counted.anew == 1


def test_layouts_may_alternate(counted: Counted) -> None:
    several = [counted.inputs(rows) for rows in (304, 16, 1000)]
    apart = [x.new_zeros(*x.shape[:-1], x.shape[-1] + 8)[..., : x.shape[-1]].copy_(x) for x in several[0][:3]]
    several.append([*apart, *several[0][3:]])
    for inputs in several:
        counted.right(inputs)
    known = counted.anew
    for _ in range(2):
        for inputs in several:
            counted.right(inputs)
    assert counted.anew == known == len(several)


def test_addresses_and_types_are_not_taken_for_granted(counted: Counted) -> None:
    if hasattr(counted.module, "suits"):
        pytest.skip("of one type, and TMA wants whole units")
    q, *others = counted.inputs(304)
    for inputs in ([q, *others], [q.new_empty(q.numel() + 1)[1:].view(q.shape).copy_(q), *others]):
        for _ in range(3):
            counted.right(inputs)
    assert counted.anew == 2


def test_hooks_hear_of_each_launch(counted: Counted) -> None:
    inputs = counted.inputs(304)
    first = counted.launch(inputs)
    with hooks() as heard:
        second = counted.launch(inputs)
    assert heard == ["enter attention_forward", "leave attention_forward"] * (1 + len(counted.again))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))


def test_a_cuda_graph_holds_the_launch(counted: Counted) -> None:
    inputs = counted.inputs(304)
    counted.launch(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = counted.launch(inputs)
    assert counted.anew == 1
    for _ in range(3):
        for x in inputs:
            x.copy_(x.roll(1, -1) * 0.9)
        graph.replay()
        torch.cuda.synchronize()
        verdict = check(result, counted.case.spec, inputs)
        assert verdict.ok, verdict


def test_launches_go_to_the_current_stream(counted: Counted) -> None:
    inputs = counted.inputs(304)
    counted.launch(inputs)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for x in inputs:
            x.mul_(0.5)
        result = counted.launch(inputs)
    side.synchronize()
    verdict = check(result, counted.case.spec, inputs)
    assert verdict.ok and counted.anew == 1, verdict


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_launches_go_to_the_device_of_the_inputs(counted: Counted) -> None:
    for _ in range(3):
        for device in ("cuda:0", "cuda:1"):
            inputs = [x.to(device) for x in counted.inputs(304)]
            counted.right(inputs)
            assert torch.cuda.current_device() == 0
