"""A launch that was made before goes to the driver at once, and the driver gets what Triton's own launch would give it.

``stand_in.py`` runs the launches in a child process, where a library that remembers them stands in for the driver.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stand_in
import torch
from specs import BY_NAME, Case
from test_hopper import GRID, PERSISTENT

from attngen import compat, hopper_bwd
from attngen.emit import BackwardKernel, Kernel, emit, emit_backward
from attngen.interpret import import_file
from attngen.spec import Tile
from attngen.verify import sample_inputs

pytest.importorskip("triton")

BEHIND = "behind"  # launched behind another kernel, for rows that it leaves
PORTABLE = ("causal_lse", "head_40", "bias", "fill_shows")
HOPPER = {
    "hopper_grid_lse": ("causal_lse", GRID),
    "hopper_bias": ("bias", GRID),
    "hopper_sinks": ("sinks", PERSISTENT),
    "hopper_leaves_rows": ("fill_shows", PERSISTENT),
    "hopper_documents": ("documents", PERSISTENT),
    "hopper_padding": ("fill_shows_padding", GRID),
    "hopper_dropped": ("dropped", PERSISTENT),
}
NAMES = (*PORTABLE, BEHIND, *HOPPER)
GRADIENTS_BEHIND = "gradients_behind"
GRADIENTS = {  # of which case, and whether by the kernels of the hopper family
    "gradients_portable": ("causal_lse", False),
    "gradients_hopper": ("causal_lse", True),
    "gradients_of_a_bias": ("bias", True),
    "gradients_of_a_table": ("table_cross", True),
    "gradients_documents": ("documents", True),
    "gradients_leave_rows": ("fill_shows", True),
    "gradients_dropped": ("dropped", True),
    GRADIENTS_BEHIND: ("fill_shows", False),
}
KERNELS = {  # where they are not three
    "gradients_portable": 2,
    "gradients_of_a_bias": 4,
    "gradients_of_a_table": 4,
    "gradients_documents": 4,
    GRADIENTS_BEHIND: 2,
    "hopper_documents": 2,
    "hopper_padding": 2,
}
ALL = (*NAMES, *GRADIENTS)


def launches(name: str) -> int:
    return KERNELS.get(name, 3 if name in GRADIENTS else 1)


def case_of(name: str) -> Case:
    return BY_NAME[HOPPER[name][0] if name in HOPPER else "fill_shows" if name == BEHIND else name]


def kernel_of(name: str) -> Kernel:
    case = case_of(name)
    kernel = emit(case.spec, HOPPER[name][1] if name in HOPPER else case.tile)
    assert isinstance(kernel, Kernel), kernel
    return kernel


def gradients_of(name: str) -> BackwardKernel:
    case, on_hopper = GRADIENTS[name]
    spec = replace(BY_NAME[case].spec, lse=True)
    tiles = hopper_bwd.tiles_of(spec)[1:] if on_hopper else (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
    kernel = emit_backward(spec, tiles)
    assert isinstance(kernel, BackwardKernel), kernel
    return kernel


def _written(name: str, folder: Path) -> None:
    """A kernel, what it is called with, and what beside it where it is launched behind another."""
    kernel = gradients_of(name) if name in GRADIENTS else kernel_of(name)
    case = BY_NAME[GRADIENTS[name][0]] if name in GRADIENTS else case_of(name)
    (folder / f"{name}.py").write_text(kernel.source)
    inputs = sample_inputs(kernel.spec, case.problem(144))
    results = torch.zeros_like(inputs[0]), torch.zeros(2, 2, 144)
    only = torch.ones(2, 2, 144, dtype=torch.int32)
    if name in GRADIENTS:
        inputs = [torch.zeros_like(inputs[0]), *results, *inputs]
        results, only = (*map(torch.zeros_like, inputs[3:6]), torch.zeros(2, 2, 144)), torch.ones(1, dtype=torch.int32)
    torch.save(inputs, folder / f"{name}.pt")
    if name in (BEHIND, GRADIENTS_BEHIND):
        torch.save({"only": only, "into": results}, folder / f"{name}.behind.pt")


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("launches")
    try:
        stand_in.build(folder)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no C compiler")
    for name in ALL:
        _written(name, folder)
    command = [sys.executable, stand_in.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_the_second_launch_does_not_go_through_triton(name: str, stories: dict[str, Any]) -> None:
    told = stories[name]
    assert told["first"]["anew"] == 1 and told["first"]["launches"] == launches(name)
    for each in ("second", "elsewhere", "again", "back", "one tensor"):
        assert told[each]["anew"] == 0 and told[each]["launches"] == launches(name), each


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_that_are_not_needed_are_other_launches(name: str, stories: dict[str, Any]) -> None:
    first, second = stories[name].get("less", [None, None])
    assert (first is None) == (name not in ("gradients_of_a_bias", "gradients_of_a_table"))
    if first is not None:
        assert (first["anew"], second["anew"]) == (1, 0)
        assert first["launches"] == second["launches"] == launches(name) - 1
        assert first["call"] == second["call"]


@pytest.mark.parametrize("name", ALL)
def test_the_driver_gets_what_triton_gives_it(name: str, stories: dict[str, Any]) -> None:
    """Every byte of every parameter, descriptors included, and grid, block, shared memory, stream and function."""
    told = stories[name]
    assert told["hooked"]["anew"] == 1  # Triton's own way
    assert told["elsewhere"]["call"] == told["hooked"]["call"] == told["again"]["call"]
    assert told["second"]["call"] == told["back"]["call"] != told["elsewhere"]["call"]
    assert len(told["second"]["call"]) > 2 * (48 + 100) * launches(name)


@pytest.mark.parametrize("name", ALL)
def test_no_tensor_is_kept(name: str, stories: dict[str, Any]) -> None:
    assert stories[name]["kept"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_hooks_hear_of_launches(name: str, stories: dict[str, Any]) -> None:
    kernels = ["find_bounds", "attention_forward"][-launches(name) :]
    assert stories[name]["heard"] == [f"{when} {kernel}" for kernel in kernels for when in ("enter", "leave")]


@pytest.mark.parametrize("name", ALL)
def test_on_another_device_than_the_current_one_nothing_is_taken_for_granted(name: str, stories: dict[str, Any]) -> None:
    assert stories[name]["other device"]["anew"] == 1


def _remembered(name: str) -> tuple[str, ...]:
    """Other layouts that the kernels themselves can take."""
    if name in GRADIENTS:
        return ("strides", "address")
    return ("strides",) if name in HOPPER else ("dtype", "strides", "address")


@pytest.mark.parametrize("name", ALL)
def test_other_layouts_are_launched_and_remembered_by_themselves(name: str, stories: dict[str, Any]) -> None:
    known = stories[name]["again"]["known"]
    for variant in _remembered(name):
        first, *later = stories[name][variant]
        assert first["anew"] == 1 and first["known"] == known + 1, variant
        assert [(each["anew"], each["call"]) for each in later] == [(0, first["call"])] * 2, variant
        known += 1


@pytest.mark.parametrize("name", [*PORTABLE, BEHIND])
def test_what_triton_specialises_on_is_compiled_by_itself(name: str, stories: dict[str, Any]) -> None:
    """Another type is another binary; so is an address that is no multiple of 16."""
    functions = [_function(stories[name][each][0]["call"]) for each in ("dtype", "address")]
    assert len({_function(stories[name]["first"]["call"]), *functions}) == 3


def _function(call: str) -> str:
    return call[80:96]


@pytest.mark.parametrize("name", GRADIENTS)
def test_what_a_call_copies_is_copied_again(name: str, stories: dict[str, Any]) -> None:
    """What TMA cannot address, and tables, to which margins are added; and zeros, where kernels add to them."""
    told = stories[name]
    assert told["first"]["memory"] == told["second"]["memory"] == told["back"]["memory"]
    copied = {each["memory"] for each in told["address"]}
    assert len(copied) == 1
    assert (copied == {told["first"]["memory"]}) == (not GRADIENTS[name][1])


@pytest.mark.parametrize("name", HOPPER)
def test_what_tma_cannot_address_is_left_to_others(name: str, stories: dict[str, Any]) -> None:
    assert [each["none"] for each in stories[name]["address"]] == [True] * 3
    assert not any(each["launches"] for each in stories[name]["address"])


# ------------------------------------------------------------------------------------------ a Triton unlike those known


class Launcher:
    """Of Triton, for a kernel of two arguments."""

    global_scratch_size = profile_scratch_size = 0

    def __init__(self, launch: Any) -> None:
        self.launch = launch

    def __call__(self, *args: Any) -> None:
        self.launch(*args)


class Unlike(Launcher):
    def __call__(self, *args: Any) -> None:
        self.launch(args)


def recorded(launcher: Launcher, tmp_path: Path) -> Any:
    path = tmp_path / "kernel.py"
    path.write_text(kernel_of("causal_lse").source)
    compiled = SimpleNamespace(run=launcher, function=11, packed_metadata=(4, 1, 0))
    q = torch.zeros(2)
    return import_file(path).recorded(compiled, (1, 1, 1), (q, 5), [q], [q])


def test_a_launcher_is_called_as_triton_calls_it(tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    _, start, args, places, layout = recorded(Launcher(lambda *args: calls.append(args)), tmp_path)
    assert not calls and layout == ((2,), (1,))
    (place,) = places
    assert args[place] is None
    args[place] = 13
    start(7, args)
    assert calls == [(1, 1, 1, 7, 11, (4, 1, 0), None, None, None, 13, 5)]


@pytest.mark.parametrize("kind", ["scratch", "elsewhere", "other arguments"])
def test_launches_that_do_more_are_not_recorded(kind: str, tmp_path: Path) -> None:
    launcher = (Unlike if kind == "elsewhere" else Launcher)(lambda *args: None)
    if kind == "scratch":
        launcher.global_scratch_size = 128
    if kind == "other arguments":
        launcher.__class__ = type("Other", (Launcher,), {"__call__": lambda self, *args: self.launch(*args[:-2], "q", 5)})
    assert recorded(launcher, tmp_path) is None


# ---------------------------------------------------------------------------------------------- through the dispatcher


@pytest.fixture(scope="module")
def squared() -> Any:
    """An operator with a gradient, whose implementation notes in ``calls`` whether gradients are computed."""
    library = torch.library.Library("attngen_test_launch", "FRAGMENT")
    library.define("squared(Tensor x) -> (Tensor, Tensor)")
    calls: list[bool] = []

    def implementation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(torch.is_grad_enabled())
        return x.detach() ** 2, x.detach().clone()

    def setup(ctx: Any, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])

    def gradient(ctx: Any, grad: torch.Tensor, _: Any) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad

    library.impl("squared", implementation, "CPU")
    torch.library.register_fake("attngen_test_launch::squared", lambda x: (x.clone(), x.clone()), lib=library)
    op = torch.ops.attngen_test_launch.squared.default
    compat.register_gradient(library, op, gradient, setup, implementation, key="CPU")
    yield SimpleNamespace(op=op, calls=calls)
    library._destroy()


@pytest.mark.parametrize("wanted", [False, True])
def test_gradients_are_there_where_they_are_wanted(squared: Any, wanted: bool) -> None:
    x = torch.tensor([1.0, -3.0], requires_grad=True)
    with torch.set_grad_enabled(wanted):
        out, kept = squared.op(x)
    assert out.tolist() == [1.0, 9.0] and kept.tolist() == [1.0, -3.0]
    assert out.requires_grad is wanted and not kept.requires_grad
    if wanted:
        assert torch.autograd.grad(out.sum(), x)[0].tolist() == [2.0, -6.0]


def test_fake_tensors_and_functional_ones_go_the_whole_way(squared: Any) -> None:
    before = len(squared.calls)
    with compat.FakeTensorMode(), torch.no_grad():
        out, _ = squared.op(torch.zeros(3))
    assert isinstance(out, compat.FakeTensor) and len(squared.calls) == before
    traced = compat.make_fx(lambda x: torch.func.functionalize(squared.op)(x), tracing_mode="fake")(torch.zeros(3))
    assert next(node.target for node in traced.graph.nodes if node.op == "call_function") is squared.op
    torch.library.opcheck(squared.op, [torch.ones(2, requires_grad=True)])
