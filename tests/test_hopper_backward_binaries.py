"""The backward kernel of the hopper family compiled for sm_90: nothing spills, and products do not wait in vain."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hopper_sites import BY_HEAD
from specs import WORTH_IT
from test_cost import H200, square
from test_hopper_backward import kernel_of
from test_hopper_binaries import SERIALISED, from_nothing

from attngen import aot, hopper_bwd, verify_bwd
from attngen.aot import Binary, Job
from attngen.emit import BackwardKernel, emit_backward
from attngen.errors import VerificationFailed
from attngen.interpret import import_file
from attngen.spec import Tile

pytest.importorskip("triton")

__all__ = ["from_nothing"]  # a fixture

COMPLAINTS = (*SERIALISED, "C7514", "C7517")
EVERYWHERE = {
    (64, "causal"), (128, "full"), (128, "grouped"), (128, "softcap"), (64, "bias"), (128, "table"), (64, "dropped"),
    (128, "dropped"),
}  # fmt: skip
# Bytes, most of them by one Triton alone: what is kept aside until the loop is over, and few registers within.
SPILLS = {"softcap": WORTH_IT, "alibi": 8, "bias": 16, "table": 32, "prefix": 32, "dropped": 8}
# Of programs that stay, which keep aside addresses of the last step and of results, too; windows of wide heads by Triton 3.6.
SPILLS_STAYING = SPILLS | {
    "alibi": 24, "table": 56, "dropped": 24, "grouped": 32, "window": WORTH_IT, "sinks": WORTH_IT,
}  # fmt: skip
ABLE = [(d, name) for d in (64, 96, 128, 256) for name, spec in BY_HEAD[d].items() if hopper_bwd.unsuited(spec) is None]
# Compiled everywhere as a program for each tile, too; wide heads leave no room for programs that stay.
PLAIN = {(64, "causal"), (128, "full"), (128, "table"), (256, "causal"), (256, "softcap")}
# With the oldest Triton each kind of score once, and each width.
FOR_OLDEST = {(64, "dropped", True), (64, "bias", True), (128, "softcap", True), (128, "table", True)}
FOR_OLDEST |= {(64, "causal", False), (128, "full", False), (256, "causal", False)}


def marks(head_dim: int, name: str, stays: bool) -> tuple[pytest.MarkDecorator, ...]:
    if (head_dim, name) not in (EVERYWHERE if stays else PLAIN):
        return (pytest.mark.gpu,)
    return () if (head_dim, name, stays) in FOR_OLDEST else (pytest.mark.newest,)


PROGRAMS = [
    pytest.param(*each, stays, id=f"d{each[0]}-{each[1]}-{way}", marks=marks(*each, stays))
    for stays, way in ((True, "stays"), (False, "plain"))
    for each in ABLE
    if len(hopper_bwd.tiles_of(BY_HEAD[each[0]][each[1]])) > stays
]


def compiled(head_dim: int, name: str, stays: bool, folder: Path) -> tuple[Binary, str]:
    """What came out, and the complaints of the assembler."""
    kernel = kernel_of(BY_HEAD[head_dim][name], stays=stays)
    path = folder / f"{kernel.name}.py"
    path.write_text(kernel.source)
    at = replace(verify_bwd.sample(kernel.spec, square(64)))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        binary = aot.compile_for(Job.of(path, [at.grad, at.out, at.lse, *at.inputs]), 90)
    assert "registers" in said.getvalue(), "the assembler's words did not come through"
    return binary, said.getvalue()


def test_what_is_compiled_everywhere_is_among_them() -> None:
    assert set(ABLE) >= EVERYWHERE
    compiled = {param.values for param in PROGRAMS if pytest.mark.gpu not in param.marks}
    assert compiled >= FOR_OLDEST and {d for d, *_ in FOR_OLDEST} == {d for d, *_ in compiled}


@pytest.mark.parametrize(("head_dim", "name", "stays"), PROGRAMS)
def test_program_compiles_as_it_should(head_dim: int, name: str, stays: bool, tmp_path: Path) -> None:
    binary, complaints = compiled(head_dim, name, stays, tmp_path)
    assert binary.spills <= (SPILLS_STAYING if stays else SPILLS).get(name, 0)
    assert binary.hgmma and not any(code in complaints for code in COMPLAINTS)
    products = re.search(r"entry function 'backward_keys'.*?Used (\d+) registers", complaints, re.DOTALL)
    assert products, "the kernel of the products was not compiled"
    assert binary.shared <= H200.smem_block and int(products[1]) <= hopper_bwd.LIMIT
    # Three times four warps: those that compute, and those that load and write with the ones that fill up.
    given = 2 * hopper_bwd.REGISTERS + hopper_bwd.OTHER_REGISTERS
    assert given * 128 <= 65536 and 3 * hopper_bwd.LIMIT * 128 <= 65536


@pytest.mark.newest
def test_kernels_that_rows_are_left_to_are_compiled_with_it(tmp_path: Path) -> None:
    """As they will be launched behind it: told to look at a flag first."""
    kernel = kernel_of(BY_HEAD[64]["bias"])
    other = emit_backward(kernel.spec, (Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)))
    assert isinstance(other, BackwardKernel)
    path, again = tmp_path / "one.py", tmp_path / "other.py"
    path.write_text(kernel.source)
    again.write_text(other.source)
    at = verify_bwd.sample(kernel.spec, square(64))
    inputs = tuple(map(aot.layout_of, (at.grad, at.out, at.lse, *at.inputs)))
    calls = aot.standby_launches_of(import_file(path), import_file(again), inputs)
    assert calls.keys() == {"backward_queries", "backward_keys"}
    assert all(any(x is True for x in call.args) for call in calls.values())
    again.write_text(other.source.replace("tl.dot(", "tl.no_such_thing("))
    (failed,) = aot.compile_all([Job(path, inputs, again)], 90)
    assert isinstance(failed, VerificationFailed) and "no_such_thing" in str(failed)
