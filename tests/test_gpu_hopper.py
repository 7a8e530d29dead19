"""The hopper family on a GPU: right for all that it takes, ragged or not, and bit by bit the same each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from specs import BOOLEANS, CASES, CAUSAL, PADDING, Case, attention, filled, scaled
from test_hopper import PIECED

from attngen import hopper
from attngen.algebra import op
from attngen.aot import import_file
from attngen.choose import HOPPER_TILES, choose
from attngen.device import probe
from attngen.emit import Kernel, emit
from attngen.spec import HOPPER, Tile
from attngen.verify import check, sample_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="not sm_90"),
]
SUITED = [case for case in (*CASES, *PIECED) if hopper.unsuited(case.spec) is None]
REPEATS = 5


def tiles_of(case: Case) -> list[Tile]:
    """The best tile that stays on its multiprocessor and the best that does not."""
    plan = choose(case.spec, case.problem(1024), probe())
    ranked = [tile for tile, _ in plan.ranked if tile.family == HOPPER]  # type: ignore[union-attr]
    return [next(tile for tile in ranked if tile.persistent is stays) for stays in (True, False)]


def launch_of(kernel: Kernel, folder: Path) -> Callable[..., Any]:
    """Its launch; with that of a portable kernel, if it leaves rows to one."""
    path = folder / f"{kernel.name}.py"
    path.write_text(kernel.source)
    launch: Callable[..., Any] = import_file(path).launch
    if not kernel.leaves_rows:
        return launch
    other = emit(kernel.spec, Tile(64, 64, 4, 2))
    assert isinstance(other, Kernel)
    return partial(launch, again=launch_of(other, folder))


@pytest.mark.parametrize("case", SUITED, ids=lambda case: case.name)
def test_right_and_the_same_each_time(case: Case, tmp_path: Path) -> None:
    for tile in tiles_of(case):
        kernel = emit(case.spec, tile)
        assert isinstance(kernel, Kernel) and tile in HOPPER_TILES
        launch = launch_of(kernel, tmp_path)
        for rows in (152, 1000):
            inputs = sample_inputs(case.spec, case.problem(rows), device="cuda")
            results = [launch(*inputs) for _ in range(REPEATS)]
            if results[0] is None:  # as ``suits`` has it
                continue
            verdict = check(results[0], case.spec, inputs)
            assert verdict.ok, f"{tile} at {rows}: {verdict}"
            first, *others = [result[0] if isinstance(result, tuple) else result for result in results]
            assert all(torch.equal(first.nan_to_num(), other.nan_to_num()) for other in others), f"{tile} at {rows}"


HIDDEN = {
    "no query sees a key": (slice(None), slice(0)),
    "one batch sees none": (slice(1), slice(None)),
    "the first keys are padding": (slice(None), slice(70, None)),
}
FILLED = filled(scaled(128**-0.5), op("and", CAUSAL, PADDING), -1e4)
LEFT_PADDED = attention(dtype=torch.bfloat16, head_dim=128, lse=True, extras=BOOLEANS, **FILLED)


@pytest.mark.parametrize("name", HIDDEN)
def test_rows_without_keys_are_filled_in(name: str, tmp_path: Path) -> None:
    """Also in a CUDA graph that was captured where there were none; all other rows are not touched."""
    batches, keys = HIDDEN[name]
    case = Case("left_padded", LEFT_PADDED)
    for tile in tiles_of(case):
        kernel = emit(case.spec, tile)
        assert isinstance(kernel, Kernel)
        launch = launch_of(kernel, tmp_path)
        for rows in (152, 1000):
            *operands, kept = sample_inputs(case.spec, case.problem(rows), device="cuda")
            kept.fill_(True)
            usual = launch(*operands, kept)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replayed = launch(*operands, kept)
            kept.fill_(False)
            kept[batches, keys] = True
            graph.replay()
            torch.cuda.synchronize()
            for result in (replayed, launch(*operands, kept)):
                verdict = check(result, case.spec, [*operands, kept])
                assert verdict.ok, f"{tile} at {rows}: {verdict}"
            if name == "one batch sees none":
                assert torch.equal(replayed[0][:1], usual[0][:1])
