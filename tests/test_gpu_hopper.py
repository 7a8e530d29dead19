"""The hopper family on a GPU: right for all that it takes, ragged or not, and bit by bit the same each time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from specs import CASES, Case
from test_hopper import PIECED

from attngen import hopper
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


@pytest.mark.parametrize("case", SUITED, ids=lambda case: case.name)
def test_right_and_the_same_each_time(case: Case, tmp_path: Path) -> None:
    for tile in tiles_of(case):
        kernel = emit(case.spec, tile)
        assert isinstance(kernel, Kernel) and tile in HOPPER_TILES
        path = tmp_path / f"{kernel.name}.py"
        path.write_text(kernel.source)
        module = import_file(path)
        for rows in (152, 1000):
            inputs = sample_inputs(case.spec, case.problem(rows), device="cuda")
            if not module.suits(*inputs):
                continue
            results = [module.launch(*inputs) for _ in range(REPEATS)]
            verdict = check(results[0], case.spec, inputs)
            assert verdict.ok, f"{tile} at {rows}: {verdict}"
            first, *others = [result[0] if isinstance(result, tuple) else result for result in results]
            assert all(torch.equal(first.nan_to_num(), other.nan_to_num()) for other in others), f"{tile} at {rows}"
