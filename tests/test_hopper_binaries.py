"""Kernels of the hopper family compiled for sm_90: nothing spills, warpgroups multiply, and products do not wait in vain.

A few are compiled everywhere; all programs that were measured only where there is a GPU, which they do not need, but minutes.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hopper_sites import BY_HEAD
from specs import (
    BOOLEANS,
    BY_NAME,
    CAUSAL,
    LENGTHS,
    PADDING,
    SAME_DOCUMENT,
    STREAMING,
    WORTH_IT,
    B,
    attention,
    filled,
    scaled,
)
from test_cost import H200, cost, square
from test_hopper import kernel_of

from attngen import aot, compat, fp8, hopper
from attngen.algebra import op
from attngen.aot import Binary, Job
from attngen.choose import refusal
from attngen.spec import HOPPER, KEY, ROW, AttentionSpec, Tile
from attngen.verify import samples_for

pytest.importorskip("triton")

SERIALISED = ("C7510", "C7512")  # the assembler's warnings that products wait for each other
RESERVE = 3 << 10  # bytes of shared memory that the formula may ask for in excess: barriers, alignment


def persistent(rows: int, keys: int) -> Tile:
    return Tile(rows, keys, rows // 16, 2, HOPPER, True)


TILES = {
    64: (persistent(192, 128), persistent(128, 128), persistent(192, 64)),
    128: (persistent(128, 128), persistent(192, 64), persistent(128, 64)),
    256: (persistent(128, 64),),
}
EVERYWHERE = {
    ("softcap", 64, persistent(192, 128)),
    ("table", 64, persistent(192, 64)),
    ("bias", 128, persistent(128, 128)),
    ("sigmoid", 256, persistent(128, 64)),
    ("dropped", 128, persistent(128, 128)),
}
# Bytes where results fill most registers: what rounds of the random numbers are kept between, once a block.
SPILLS = {("dropped", 256): 2 * WORTH_IT}


def able(spec: AttentionSpec, tile: Tile) -> bool:
    problem = square(1024)
    return refusal(tile, cost(spec, problem, tile), problem, H200) is None


ABLE = [
    (name, d, tile) for d, tiles in TILES.items() for name, spec in BY_HEAD[d].items() for tile in tiles if able(spec, tile)
]
PROGRAMS = [
    pytest.param(*each, id=f"d{each[1]}-{each[0]}-{each[2]}", marks=() if each in EVERYWHERE else (pytest.mark.gpu,))
    for each in ABLE
]


PIECED = (  # head and value size; the largest tile that has room
    pytest.param(192, 128, persistent(128, 128)),
    pytest.param(96, 64, persistent(128, 128), marks=pytest.mark.gpu),
    pytest.param(80, 80, persistent(128, 128), marks=pytest.mark.gpu),
    pytest.param(96, 96, persistent(192, 64), marks=pytest.mark.gpu),
    pytest.param(112, 112, persistent(128, 128), marks=pytest.mark.gpu),
    pytest.param(192, 192, persistent(128, 64), marks=pytest.mark.gpu),
    pytest.param(224, 224, persistent(128, 64), marks=pytest.mark.gpu),
)


DOCUMENTS = {"t0": (torch.int64, (B, ROW)), "t1": (torch.int64, (B, KEY))}
BOUNDED = {  # by data
    "documents": (op("and", CAUSAL, SAME_DOCUMENT), DOCUMENTS),
    "padding": (PADDING, BOOLEANS),
    "lengths": (BY_NAME["lengths"].spec.mask, LENGTHS),
    "streaming": (STREAMING, {}),
}
BOUNDED_PROGRAMS = [
    pytest.param(name, d, tile, marks=() if (name, d) == ("documents", 128) else pytest.mark.gpu)
    for name in BOUNDED
    for d, tile in ((64, persistent(128, 128)), (128, persistent(128, 128)), (256, persistent(128, 64)))
]


@dataclass(frozen=True)
class Compiled:
    binary: Binary
    complaints: str  # of the assembler


@pytest.fixture(autouse=True)
def from_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What Triton remembers would come without the assembler's warnings."""
    from triton import knobs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(knobs.nvidia, "dump_ptxas_log", True)
    yield


def compiled(spec: AttentionSpec, tile: Tile, folder: Path) -> Compiled:
    kernel = kernel_of(spec, tile)
    path = folder / f"{kernel.name}.py"
    path.write_text(kernel.source)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        binary = aot.compile_for(Job.of(path, samples_for(kernel, square(1024), device="meta")), 90)
    assert "registers" in said.getvalue(), "the assembler's words did not come through"
    return Compiled(binary, said.getvalue())


def test_what_is_compiled_everywhere_can_be_chosen() -> None:
    assert set(ABLE) >= EVERYWHERE


@pytest.mark.parametrize(("name", "head_dim", "tile"), PROGRAMS)
def test_program_compiles_as_it_should(name: str, head_dim: int, tile: Tile, tmp_path: Path) -> None:
    """Shared memory is what the formula says, and registers of all threads fit in those of a multiprocessor."""
    spec = BY_HEAD[head_dim][name]
    made = compiled(spec, tile, tmp_path)
    assert made.binary.spills <= (0 if (name, head_dim, tile) in EVERYWHERE else SPILLS.get((name, head_dim), WORTH_IT))
    assert made.binary.hgmma
    assert not any(code in made.complaints for code in SERIALISED)
    predicted = cost(spec, square(1024), tile)
    assert made.binary.shared <= predicted.smem_bytes <= made.binary.shared + RESERVE
    assert predicted.registers <= hopper.registers(tile)
    assert made.binary.registers * 32 * 4 * (tile.warps // 4 + 1) <= 65536


@pytest.mark.parametrize(("head_dim", "value_dim", "tile"), PIECED)
def test_heads_in_pieces_neither_spill_nor_wait(head_dim: int, value_dim: int, tile: Tile, tmp_path: Path) -> None:
    spec = attention(dtype=torch.bfloat16, head_dim=head_dim, value_dim=value_dim, mask=CAUSAL, lse=True)
    assert able(spec, tile)
    made = compiled(spec, tile, tmp_path)
    assert made.binary.hgmma and made.binary.spills == 0
    assert not any(code in made.complaints for code in SERIALISED)
    assert made.binary.shared <= cost(spec, square(1024), tile).smem_bytes <= made.binary.shared + RESERVE


@pytest.mark.parametrize(("name", "head_dim", "tile"), BOUNDED_PROGRAMS)
def test_masks_that_load_do_not_spill(name: str, head_dim: int, tile: Tile, tmp_path: Path) -> None:
    """A few bytes are for the largest heads: the portable kernel, which would take their place, is half as fast."""
    mask, extras = BOUNDED[name]
    spec = attention(dtype=torch.bfloat16, head_dim=head_dim, mask=mask, extras=extras)
    assert able(spec, tile)
    made = compiled(spec, tile, tmp_path)
    assert made.binary.hgmma and made.binary.spills <= (WORTH_IT if head_dim == 256 else 0)
    assert not any(code in made.complaints for code in SERIALISED)


LEAVING = [
    pytest.param(name, d, tile, marks=() if (name, d) == ("causal", 128) else pytest.mark.gpu)
    for name in ("causal", "documents", "padding")
    for d, tile in ((64, persistent(128, 128)), (128, persistent(128, 128)), (256, persistent(128, 64)))
]


@pytest.mark.parametrize(("name", "head_dim", "tile"), LEAVING)
def test_flags_of_rows_take_no_more_than_the_log_sum_exp(name: str, head_dim: int, tile: Tile, tmp_path: Path) -> None:
    """Registers, that is. Both are written when a tile ends; but for the widest heads nothing is spilled with either."""
    mask, extras = BOUNDED.get(name, (CAUSAL, {}))
    spec = attention(dtype=torch.bfloat16, head_dim=head_dim, extras=extras, **filled(scaled(head_dim**-0.5), mask, -1e4))
    assert able(spec, tile)
    made = compiled(spec, tile, tmp_path)
    spilled = 0
    if head_dim == 256:
        spilled = compiled(replace(spec, whole=None, redo_below=None, lse=True), tile, tmp_path).binary.spills + 8
    assert made.binary.hgmma and made.binary.spills <= spilled
    assert not any(code in made.complaints for code in SERIALISED)


EIGHTHS = [
    pytest.param(128, "causal", persistent(128, 128), fp8.ROTATE),
    pytest.param(256, "causal", persistent(128, 128), fp8.BLOCK, marks=pytest.mark.gpu),
    pytest.param(64, "full", persistent(192, 128), fp8.BLOCK, marks=pytest.mark.gpu),
    pytest.param(128, "softcap", persistent(128, 128), fp8.BLOCK, marks=pytest.mark.gpu),
    pytest.param(128, "alibi", persistent(128, 128), fp8.BLOCK, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("head_dim", "name", "tile", "mode"), EIGHTHS)
def test_8_bit_weights_stay_where_they_are(head_dim: int, name: str, tile: Tile, mode: str, tmp_path: Path) -> None:
    """Two conversions for four weights, and nothing that moves them. Triton 3.6 spills 8 bytes where a tile ends."""
    spec = replace(BY_HEAD[head_dim][name], fp8=mode)
    assert able(spec, tile)
    made = compiled(spec, tile, tmp_path)
    assert made.binary.hgmma and made.binary.spills <= (WORTH_IT if head_dim == 256 else 8)
    assert not any(code in made.complaints for code in SERIALISED)
    assert made.binary.shared <= cost(spec, square(1024), tile).smem_bytes <= made.binary.shared + RESERVE
    (cubin,) = (tmp_path / "triton").rglob("attention_forward.cubin")
    text = subprocess.run([compat.cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    products = set(re.findall(r"\bQ?H?GMMA\S*", text))
    assert products and all(each.startswith("QGMMA") and each.endswith("E4M3.E4M3") for each in products)
    assert "PRMT" not in text


@pytest.mark.parametrize("head_dim", [128, *(pytest.param(d, marks=pytest.mark.newest) for d in (64, 256))])
def test_operands_are_written_in_words(head_dim: int, tmp_path: Path) -> None:
    """16 bytes at a time, values too, whose neighbours in memory are not those that were read."""
    kernel = kernel_of(replace(BY_HEAD[head_dim]["full"], fp8=fp8.ROTATE), persistent(128, 128))
    path = tmp_path / f"{kernel.name}.py"
    path.write_text(kernel.source)
    module = aot.import_file(path)
    layouts = [aot.layout_of(x) for x in samples_for(kernel, square(1024), device="meta")]
    calls = aot.calls_of(module, layouts)["quantise"].all
    assert len(calls) == 3
    for args, options in calls:
        made = compat.compile_kernel(module.quantise, args, options, 90)
        ptx = made.asm["ptx"]
        assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx and "st.global.b8" not in ptx
        assert aot._resources(made.asm["cubin"])[1] == 0


def test_one_binary_serves_all_lengths_and_strides(tmp_path: Path) -> None:
    """TMA descriptors hold lengths and strides: nothing of them is in the text that is compiled."""
    kernel = kernel_of(BY_NAME["causal"].spec, persistent(128, 128))
    path = tmp_path / "kernel.py"
    path.write_text(kernel.source)
    module = aot.import_file(path)

    def signature(rows: int) -> object:
        call = aot.launch_of(module, [aot.layout_of(x) for x in samples_for(kernel, square(rows), device="meta")])
        source, *_ = compat.specialised(module.attention_forward, call.args, call.options, 90)
        return source.signature, source.attrs, source.constants

    assert signature(1024) == signature(1000) == signature(1)
