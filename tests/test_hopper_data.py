"""Kernels of the hopper family whose keys are bounded by data, or come in two stretches, in the simulator."""

from __future__ import annotations

import inspect
import random
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from specs import (
    BOOLEANS,
    BOTTOM_RIGHT,
    BY_NAME,
    CAUSAL,
    DIAGONAL,
    PADDING,
    QK,
    SAME_DOCUMENT,
    STREAMING,
    B,
    H,
    attention,
    loaded,
    plus,
)
from test_hopper import GRID, NARROW, PERSISTENT, THREE_GROUPS, kernel_of, right, run, written
from test_mask_random import compound
from torch import Tensor

from attngen import simulator
from attngen.algebra import Expr, Int, integer, negate, op
from attngen.evaluate import Evaluator
from attngen.registers import Scalar
from attngen.simulator import Pointer, simulated
from attngen.spec import KEY, ROW, AttentionSpec, Problem, Tile
from attngen.verify import check, sample_inputs

LONG = torch.int64
TILES = (PERSISTENT, GRID, THREE_GROUPS, replace(NARROW, stages=3))
DOCUMENTS = {"t0": (LONG, (B, ROW)), "t1": (LONG, (B, KEY))}
UNBATCHED = {"t0": (LONG, (ROW,)), "t1": (LONG, (KEY,))}
SAME = op("eq", loaded("t0", ROW, kind="int"), loaded("t1", KEY, kind="int"))
BELOW_LENGTH = op("lt", Int(KEY), loaded("t0", B, H, kind="int"))


def given(spec: AttentionSpec, rows: int, keys: int, *data: Tensor, batch: tuple[int, ...] = (2, 2)) -> list[Tensor]:
    """Random operands of ``spec``, and the data that its mask reads."""
    operands = sample_inputs(spec, Problem(batch, rows, keys))[:3]
    return [*operands, *data]


def packed(count: int, *lengths: int) -> Tensor:
    """Document numbers of ``count`` positions, for documents of these lengths and what is left."""
    ends = torch.tensor(lengths).cumsum(0)
    return torch.searchsorted(ends, torch.arange(count), right=True)


IDS = {
    "sorted": torch.stack([packed(300, 20, 150, 3), packed(300, 128, 128)]),
    "one document": torch.zeros(2, 300, dtype=LONG),
    "many": torch.stack([torch.arange(300) // 7, torch.arange(300)]),
    "unsorted": torch.randint(-3, 3, (2, 300), generator=torch.Generator().manual_seed(5)),
    "far apart": torch.stack([packed(300, 100, 100), packed(300, 290)]) * 2**40 - 2**50,
}


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("mask", [SAME_DOCUMENT, op("and", CAUSAL, SAME_DOCUMENT)], ids=["both ways", "causal"])
@pytest.mark.parametrize("name", IDS)
def test_documents(name: str, mask: Expr, tile: Tile) -> None:
    spec = attention(mask=mask, extras=DOCUMENTS, lse=True)
    right(spec, tile, given(spec, 300, 300, IDS[name], IDS[name]))


@pytest.mark.parametrize("tile", TILES[:2], ids=str)
def test_documents_that_all_heads_share_and_queries_of_none(tile: Tile) -> None:
    spec = attention(mask=SAME, extras=UNBATCHED, empty="zero", lse=True)
    rows, keys = packed(190, 40, 100) + 1, packed(260, 130, 20)
    out, lse = right(spec, tile, given(spec, 190, 260, rows, keys))
    assert not out[:, :, 140:].any() and (lse[:, :, 140:] == -torch.inf).all() and out[:, :, :140].any()


PADDINGS = {
    "nothing": torch.ones(2, 300, dtype=torch.bool),
    "right": torch.arange(300) < torch.tensor([[170], [3]]),
    "left": torch.arange(300) >= torch.tensor([[130], [299]]),
    "holes": torch.arange(300) % 7 != torch.tensor([[0], [3]]),
    "everything in one batch": torch.arange(300) < torch.tensor([[0], [128]]),
}


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", PADDINGS)
def test_padding(name: str, tile: Tile) -> None:
    """Rows that see nothing come out as in eager: NaN."""
    spec = attention(mask=PADDING, extras=BOOLEANS, lse=True)
    out, _ = right(spec, tile, given(spec, 130, 300, PADDINGS[name]))
    assert out[0].isnan().all() == (name == "everything in one batch")


@pytest.mark.parametrize("tile", TILES[:2], ids=str)
def test_padding_within_a_causal_mask_and_with_a_bias(tile: Tile) -> None:
    spec = attention(
        mask=op("and", BOTTOM_RIGHT, PADDING),
        score=plus(QK, loaded("t1", H, DIAGONAL)),
        extras={**BOOLEANS, "t1": (torch.float32, (H, DIAGONAL))},
    )
    right(spec, tile, given(spec, 140, 300, PADDINGS["left"], torch.randn(2, 439)))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_lengths_of_each_head(tile: Tile) -> None:
    spec = attention(mask=BELOW_LENGTH, extras={"t0": (LONG, (B, H))}, empty="zero", lse=True)
    out, _ = right(spec, tile, given(spec, 130, 300, torch.tensor([[0, 128], [-(2**40), 2**40]])))
    assert not out[0, 0].any() and not out[1, 0].any() and out[1, 1].any()


@pytest.mark.parametrize("name", ["padding", "documents", "lengths", "streaming"])
@pytest.mark.parametrize("rows", [0, 40])
def test_no_queries_or_no_keys(name: str, rows: int) -> None:
    spec = replace(BY_NAME[name].spec, lse=True)
    inputs = sample_inputs(spec, Problem((2, 2), 40, 40))
    empty = ROW if rows == 0 else KEY
    inputs = [
        x if (dim := source.dim_of(empty)) is None else x.narrow(dim, 0, 0)
        for source, x in zip(spec.inputs, inputs, strict=True)
    ]
    out, _ = run(written(spec, PERSISTENT), inputs)
    assert out.shape == (2, 2, rows, 64) and not out.any()


# -------------------------------------------------------------------------------------------------------- two stretches

GLOBAL = op("or", STREAMING, op("lt", Int(ROW), integer(3)))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("mask", [STREAMING, GLOBAL], ids=["first keys and a window", "and rows that see all"])
def test_two_stretches(mask: Expr, tile: Tile) -> None:
    spec = attention(mask=mask, lse=True)
    right(spec, tile, sample_inputs(spec, Problem((1, 2), 520, 520)))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_second_stretch_that_ends_before_the_last_tile(tile: Tile) -> None:
    """Nothing lies behind the gap of the last tiles, which reaches to the last block."""
    spec = attention(mask=op("or", op("lt", Int(KEY), integer(10)), op("ge", Int(KEY - ROW), integer(60))), lse=True)
    right(spec, tile, sample_inputs(spec, Problem((1, 2), 384, 256)))


def test_blocks_between_two_stretches_are_left_out() -> None:
    module = simulated(written(attention(mask=STREAMING), GRID))
    simulator._here.program = (0, 1)
    opened = [module.open_tile(tile, 1, 1, 1024, 1024, 1) for tile in range(8)]
    assert {int(first): int(left) + 1 for _, first, _, left, *_ in opened} == {
        row: 1 if row == 0 else 2 if row == 128 else 3 for row in range(0, 1024, 128)
    }


# --------------------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("name", ["sorted", "many", "far apart"])
def test_bounds_of_sorted_documents_are_tight(name: str) -> None:
    """Blocks that matter to no row of a tile are not visited, and those that matter to all of them have no mask."""
    spec = attention(mask=SAME_DOCUMENT, extras=DOCUMENTS)
    module, ids = simulated(written(spec, NARROW)), IDS[name]
    found = torch.full((2 * 3, 4), -1, dtype=torch.int32)
    sizes = map(Scalar, (2, 1, 300, 300))
    module.find_bounds[6, 1, 1](found, ids, ids, *ids.stride(), *ids.stride(), *sizes)
    for place, (top, left, low, high) in enumerate(found.tolist()):
        own, first = ids[place // 3], place % 3 * 128
        seen = own[first : first + 128, None] == own
        blocks = [seen[:, key : key + 64] for key in range(0, 300, 64)]
        some = [k for k, each in enumerate(blocks) if each.any()]
        assert (top - left, top) == (some[0], some[-1])
        assert [k for k in some if low <= k < high] == [
            k for k, each in enumerate(blocks) if each.all() and each.shape[1] == 64
        ]


@pytest.mark.parametrize(
    ("intact", "damaged"),
    [
        ("(b * tiles + first // BLOCK_I)", "(0 * tiles + first // BLOCK_I)"),
        ("gl.load(place + 1)", "gl.load(place + 1) * 0"),
        ("gl.load(place + 2), gl.load(place + 3)", "0, 99"),
    ],
    ids=["of another batch", "the top block alone", "no mask"],
)
def test_bounds_that_are_not_those_of_the_tile_are_noticed(intact: str, damaged: str) -> None:
    spec = attention(mask=SAME_DOCUMENT, extras=DOCUMENTS)
    inputs = given(spec, 300, 300, IDS["sorted"], IDS["sorted"])
    source = kernel_of(spec, NARROW).source
    assert intact in source and not check(run(source.replace(intact, damaged), inputs), spec, inputs).ok


def test_what_is_loaded_for_all_keys_is_looked_at_once_for_all_heads() -> None:
    """One program for each tile and place of the data: heads that read the same share it."""
    launch = written(attention(mask=SAME_DOCUMENT, extras=DOCUMENTS), PERSISTENT).split("def launch_anew")[1]
    assert "places = triton.cdiv(size_i, 128) * size_b\n" in launch
    launch = written(attention(mask=BELOW_LENGTH, extras={"t0": (LONG, (B, H))}), PERSISTENT).split("def launch_anew")[1]
    assert "places = triton.cdiv(size_i, 128) * size_b * size_h\n" in launch
    launch = written(attention(mask=SAME, extras=UNBATCHED), PERSISTENT).split("def launch_anew")[1]
    assert "places = triton.cdiv(size_i, 128)\n" in launch


# --------------------------------------------------------------------------------------------------------- random masks

DATA = {"t0": (LONG, (B, ROW)), "t1": (LONG, (B, KEY)), "t2": (torch.bool, (B, KEY)), "t3": (LONG, (B,))}
LEAVES = (
    SAME_DOCUMENT,
    loaded("t2", B, KEY, kind="bool"),
    op("lt", Int(KEY), loaded("t3", B, kind="int")),
    op("le", loaded("t1", B, KEY, kind="int"), loaded("t0", B, ROW, kind="int")),
)
ROWS = 200


def drawn(r: random.Random) -> Expr:
    """A mask of two to four parts, one or two of which are data in half of the cases."""
    mask = compound(r.randint(2, 3))(r)
    for _ in range(r.choice([0, 0, 1, 2])):
        mask = op(r.choice(["and", "and", "or"]), mask, r.choice(LEAVES))
        mask = negate(mask) if r.random() < 0.2 else mask
    return mask


def opened(module: ModuleType, keys: int, data: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """What ``open_tile`` says of each tile: its first row, top block, blocks below that, full blocks, and the gap."""
    sizes = [*map(Scalar, (1, 1, ROWS, keys))]
    simulator._here.program = (Scalar(0), Scalar(1))
    tiles = -(-ROWS // 128)
    bounds = []
    if hasattr(module, "find_bounds"):
        parameters = list(inspect.signature(module.find_bounds.function).parameters)[1:-4]
        tensors = [data[name.removesuffix("_ptr")] for name in parameters if name.endswith("_ptr")]
        strides = [data[name.split("_")[0]].stride(int(name[-1])) for name in parameters if not name.endswith("_ptr")]
        found = torch.full((tiles, 6), -1, dtype=torch.int32)
        module.find_bounds[tiles, 1, 1](found, *tensors, *strides, *sizes)
        simulator._here.program = (Scalar(0), Scalar(1))
        bounds = [Pointer(found)]
    return [tuple(map(int, module.open_tile(Scalar(tile), *bounds, *sizes, Scalar(1))))[1:] for tile in range(tiles)]


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_tiles_of_random_masks_visit_what_matters(first: int) -> None:
    """Every block that matters to some row is visited, and no block that needs a mask goes without."""
    for seed in range(first, first + 40):
        r = random.Random(seed)
        spec = attention(mask=drawn(r), extras=DATA, empty="zero")
        generator = torch.Generator().manual_seed(seed)
        keys = r.choice([256, 300])
        ids = torch.randint(0, 6, (1, keys), generator=generator)
        ids = ids.sort().values if r.random() < 0.7 else ids
        kept = torch.rand(1, keys, generator=generator) < r.choice([0.1, 0.5, 0.9, 1.1])
        data = {"t0": ids[:, :ROWS], "t1": ids, "t2": kept, "t3": torch.tensor([r.randint(-5, keys + 50)])}
        positions = {
            B: torch.tensor(0), ROW: torch.arange(ROWS)[:, None], KEY: torch.arange(keys), ROW.extent: ROWS, KEY.extent: keys
        }  # fmt: skip
        table = torch.broadcast_to(Evaluator(positions, data.__getitem__)(spec.mask), (ROWS, keys))
        for row, top, left, low, high, *gap in opened(simulated(written(spec, NARROW)), keys, data):
            beyond, missing = gap or (0, 0)
            visited = [top]
            for _ in range(left):
                visited.append(visited[-1] - 1 - missing * (visited[-1] == beyond))
            for k in range(-(-keys // 64)):
                block = table[row : row + 128, 64 * k : 64 * k + 64]
                assert k in visited or not block.any(), (seed, row, k)
                assert not low <= k < high or k not in visited or (block.all() and block.shape[1] == 64), (seed, row, k)
