"""Every kernel on a GPU, at sizes where bounds, swizzles and pipelines matter. Run with ``pytest -m gpu``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from specs import BY_NAME, CASES, CAUSAL, Case, attention, window
from test_drowned import LOADED, case_of, close
from test_emit import emitted
from test_kernels import EMPTY, empty_inputs

from attngen import aot
from attngen.emit import Kernel, emit
from attngen.index import Axis
from attngen.interpret import import_file
from attngen.spec import KEY, AttentionSpec, Input, Problem, Tile
from attngen.verify import check, eager, sample_inputs

pytestmark = pytest.mark.gpu

ROWS = (1, 77, 1024)
LARGE = (
    Case("causal_d128", attention(dtype=torch.bfloat16, head_dim=128, mask=CAUSAL), Tile(128, 128, 8, 2), (2, 4)),
    Case("window_d64", attention(dtype=torch.bfloat16, mask=window(512), lse=True), Tile(128, 64, 4, 3), (2, 4)),
    Case("dense_d256", attention(head_dim=256), Tile(128, 32, 8, 2), (1, 4)),
    Case("ragged_d96", attention(head_dim=96, mask=CAUSAL), Tile(64, 64, 4, 2), (1, 4)),
    Case("fp32_d128", attention(dtype=torch.float32, head_dim=128, mask=CAUSAL), Tile(32, 16, 8, 2), (1, 2)),
)


def in_bfloat16(spec: AttentionSpec) -> AttentionSpec:
    """``spec`` with bfloat16 in place of float16, which the interpreter cannot check."""

    def wider(dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if dtype == torch.float16 else dtype

    def converted(source: Input) -> Input:
        return replace(source, dtype=wider(source.dtype))

    query, keys, values = map(converted, (spec.query, spec.keys, spec.values))
    extras = tuple(map(converted, spec.extras))
    return replace(spec, query=query, keys=keys, values=values, extras=extras, out_dtype=wider(spec.out_dtype))


def launched(case: Case, problem: Problem, folder: Path) -> None:
    _launched_on(case, sample_inputs(case.spec, problem, device="cuda"), folder)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel(case: Case, rows: int, tmp_path: Path) -> None:
    launched(case, case.problem(rows), tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_in_bfloat16(case: Case, tmp_path: Path) -> None:
    launched(replace(case, spec=in_bfloat16(case.spec)), case.problem(500), tmp_path)


@pytest.mark.parametrize("rows", [4000, 4096])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large_problem(case: Case, rows: int, tmp_path: Path) -> None:
    launched(case, case.problem(rows), tmp_path)


@pytest.mark.parametrize(("name", "axis"), EMPTY, ids=str)
def test_nothing_gives_what_eager_gives(name: str, axis: Axis, tmp_path: Path) -> None:
    inputs = [x.cuda() for x in empty_inputs(name, axis)]
    result = _result_of(emitted(BY_NAME[name]), inputs, tmp_path)
    for mine, theirs in zip(result, eager(BY_NAME[name].spec, inputs), strict=False):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-5, atol=1e-6)
    assert bool(result[0].numel()) == (axis is KEY)


@pytest.mark.parametrize("name", LOADED)
def test_masks_of_the_lowest_number(name: str, tmp_path: Path) -> None:
    spec, inputs = case_of(name)
    q, k, v, mask = (x.cuda() for x in inputs)
    kernel = emit(spec, Tile(64, 32, 4, 2))
    assert isinstance(kernel, Kernel), kernel
    theirs = ((q @ k.mT) * 0.125 + LOADED[name][-1](mask)).softmax(-1).to(q.dtype) @ v
    close(_result_of(kernel, [q, k, v, mask], tmp_path)[0], theirs)


def test_more_programs_than_a_grid_dimension_of_65535(tmp_path: Path) -> None:
    case = Case("many", attention(mask=CAUSAL), Tile(16, 16, 4, 1), (70000, 1))
    launched(case, Problem(case.batch, 17, 17), tmp_path)


def test_heads_beyond_two_billion_elements(tmp_path: Path) -> None:
    """The last batch begins beyond 2^31 elements: base offsets are 64-bit in every kernel."""
    whole = torch.zeros(3, 2**24 + 1, 1, 64, dtype=torch.half, device="cuda")
    q = whole[:, -2:]
    q.copy_(torch.randn(q.shape, device="cuda"))
    _launched_on(BY_NAME["causal"], [q, q, q], tmp_path)


def test_rows_beyond_two_billion_elements(tmp_path: Path) -> None:
    """A ``wide`` kernel: within one head, rows lie so far apart that 32 bits do not count their elements."""
    whole = torch.zeros(600 * 2**22, dtype=torch.half, device="cuda")
    inputs = [whole.as_strided((1, 1, 600, 64), (0, 0, 2**22, 1), 64 * n) for n in range(3)]
    for x in inputs:
        x.copy_(torch.randn(x.shape, device="cuda"))
    _launched_on(BY_NAME["wide"], inputs, tmp_path)


def _launched_on(case: Case, inputs: list[torch.Tensor], folder: Path) -> None:
    verdict = check(_result_of(emitted(case), inputs, folder), case.spec, inputs)
    assert verdict.ok, verdict


def _result_of(kernel: Kernel, inputs: list[torch.Tensor], folder: Path) -> list[torch.Tensor]:
    path = folder / "kernel.py"
    path.write_text(kernel.source)
    result = import_file(path).launch(*inputs)
    return [result] if isinstance(result, torch.Tensor) else list(result)


def test_launch_finds_what_was_compiled_ahead_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes fill Triton's disk cache under the very key that the launch looks up."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    case = BY_NAME["window"]
    path = tmp_path / "kernel.py"
    path.write_text(emitted(case).source)
    inputs = sample_inputs(case.spec, case.problem(300), device="cuda")
    major, minor = torch.cuda.get_device_capability()
    (binary,) = aot.compile_all([aot.Job.of(path, inputs)], 10 * major + minor)
    assert isinstance(binary, aot.Binary), str(binary)
    built = {file.parent.name for file in (tmp_path / "cache").rglob("*.cubin")}
    assert len(built) == 1
    import_file(path).launch(*inputs)
    assert {file.parent.name for file in (tmp_path / "cache").rglob("*.cubin")} == built
