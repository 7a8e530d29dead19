"""Which sites the hopper family takes, on which devices, and what runs where it turns out not to."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from specs import BY_NAME, CAUSAL, DENSE, HALF, QK, B, H, attention, loaded
from test_hopper import GRID, PERSISTENT, fused
from torch import Tensor, nn

import attngen
from attngen import capture, decide, hopper, plan, runtime
from attngen import choose as choosing
from attngen.algebra import Const, op, where
from attngen.choose import HOPPER_TILES, TILES, Plan, choose
from attngen.device import DEVICES
from attngen.emit import Kernel, emit
from attngen.errors import BadPlan, Miss
from attngen.simulator import simulated
from attngen.spec import FEATURE, HOPPER, INNER, KEY, PORTABLE, ROW, AttentionSpec, Input, Problem, Tile, batch_axes
from attngen.verify import check

BF16 = torch.bfloat16
SPEC = attention(dtype=BF16, head_dim=128, mask=CAUSAL)
PROBLEM = Problem((4, 16), 4096, 4096)


# ------------------------------------------------------------------------------------------------ what it cannot compute


def _keys(*index: Any, dtype: torch.dtype = HALF) -> AttentionSpec:
    return replace(attention(), keys=Input("k", index, dtype))


FOUR = batch_axes(4)
KEPT = attention(
    score=where(loaded("t0", B, ROW, KEY, kind="bool"), QK, Const(-8.0)), extras={"t0": (torch.bool, (B, ROW, KEY))}
)
BIAS_AS_MASK = attention(mask=op("gt", BY_NAME["bias"].spec.score.args[1], Const(0.0)), extras=DENSE)
UNSUITED = {
    "float32": (BY_NAME["dense_fp32"].spec, "16-bit operands"),
    "a float32 result": (replace(attention(), out_dtype=torch.float32), "16-bit operands"),
    "two types": (_keys(B, H, KEY, INNER, dtype=BF16), "different types"),
    "a result of another type": (replace(attention(), out_dtype=BF16), "different types"),
    "heads of 36": (attention(head_dim=36), "a head size of 36, 36 for values"),
    "values of 20": (attention(value_dim=20), "a head size of 64, 20 for values"),
    "heads of 264": (attention(head_dim=264), "up to 256"),
    "a gain": (BY_NAME["pair_gain"].spec, "multiplied after softmax"),
    "sinks by query": (BY_NAME["sinks_by_query"].spec, "differ from row to row"),
    "a mask for each pair": (KEPT, "a mask is loaded for each pair"),
    "a bias that masks": (BIAS_AS_MASK, "a mask is loaded for each pair"),
    "features apart": (attention(output=(B, H, FEATURE, ROW)), "features of the result"),
    "every second query": (
        replace(attention(), query=Input("q", (B, H, 2 * ROW, INNER), HALF)),
        "q is read at more than plain positions",
    ),
    "keys from the second on": (_keys(B, H, KEY + 1, INNER), "k is read at more than plain positions"),
    "six dimensions": (attention(batch=FOUR), "q has more than 5 dimensions"),
}


@pytest.mark.parametrize("name", UNSUITED)
def test_what_the_template_cannot_compute_is_refused_with_the_reason(name: str) -> None:
    spec, said = UNSUITED[name]
    reason = hopper.unsuited(spec)
    assert reason is not None and said in reason
    miss = emit(spec, GRID)
    assert not isinstance(miss, Kernel) and miss.reason == reason


@pytest.mark.parametrize("name", ["two types", "heads of 36", "six dimensions"])
def test_it_is_the_one_thing_that_is_refused(name: str) -> None:
    """The same spec but for the reason is taken."""
    twin = {"two types": attention(), "heads of 36": attention(head_dim=40), "six dimensions": attention(batch=FOUR[:3])}
    assert hopper.unsuited(twin[name]) is None


def _layouts(*tensors: Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    return [(tuple(x.shape), x.stride(), x.storage_offset()) for x in tensors]


def _memory(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=HALF, device="meta")


PLAIN = _memory(2, 4, 100, 64)
LAYOUTS = {
    "as they are": (PLAIN, None),
    "heads beside features": (_memory(2, 100, 4, 64).transpose(1, 2), None),
    "a part of wider rows": (_memory(2, 4, 100, 192)[..., 64:128], None),
    "features in columns": (_memory(2, 4, 64, 100).mT, "elements of {} that belong side by side are not"),
    "every second feature": (_memory(2, 4, 100, 128)[..., ::2], "elements of {} that belong side by side are not"),
    "rows of 65": (_memory(2, 4, 100, 65)[..., :64], "rows of {} do not begin"),
    "from the fourth feature on": (_memory(2, 4, 100, 72)[..., 4:68], "rows of {} do not begin"),
    "a batch of one, 65 apart": (_memory(1, 4, 100, 64).as_strided((1, 4, 100, 64), (65, 6400, 64, 1)), None),
    "one head for all": (_memory(2, 1, 100, 64).expand(2, 4, 100, 64), "rows of {} do not begin"),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("place", range(3))
def test_what_tma_cannot_address_is_said(name: str, place: int) -> None:
    view, said = LAYOUTS[name]
    tensors = [PLAIN] * 3
    tensors[place] = view
    reason = hopper.misaligned(attention(), _layouts(*tensors))
    assert reason is None if said is None else reason is not None and said.format("qkv"[place]) in reason


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_kernel_tells_the_same_of_the_tensors_it_gets(name: str) -> None:
    view, said = LAYOUTS[name]
    kernel = emit(attention(), PERSISTENT)
    assert isinstance(kernel, Kernel)
    storage = torch.zeros(view.untyped_storage().nbytes() // 2, dtype=HALF)
    real = storage.as_strided(view.shape, view.stride(), view.storage_offset())
    assert simulated(kernel.source).suits(real, real, real) == (said is None)


@pytest.mark.parametrize(
    ("bias", "reason"),
    [
        (_memory(1, 4, 100, 104), None),
        (_memory(1, 4, 100, 100), "rows of t0 do not begin at multiples of 16 bytes"),
        (_memory(1, 4, 100, 100).float(), None),  # multiples of 4 are enough
        (_memory(1, 4, 104, 100).mT, "elements of t0 that belong side by side are not"),
        (_memory(1, 4, 1, 104).expand(1, 4, 100, 104), "rows of t0 do not begin at multiples of 16 bytes"),
    ],
)
def test_biases_must_be_addressable_too(bias: Tensor, reason: str | None) -> None:
    spec = attention(score=BY_NAME["bias"].spec.score, extras={"t0": (bias.dtype, BY_NAME["bias"].spec.extras[0].index)})
    assert hopper.misaligned(spec, _layouts(PLAIN, PLAIN, PLAIN, bias)) == reason


def test_a_table_has_no_layout_to_keep() -> None:
    table = BY_NAME["table_cross"].spec
    assert hopper.misaligned(table, _layouts(PLAIN, PLAIN, PLAIN, _memory(4, 201)[:, 1:])) is None


# ------------------------------------------------------------------------------------------------ which kernel is launched


@pytest.mark.parametrize("suited", [True, False])
def test_tensors_that_tma_cannot_address_go_to_the_other_kernel(suited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = BY_NAME["causal"].spec
    kernel, other = (emit(spec, tile) for tile in (PERSISTENT, Tile(64, 32, 4, 2)))
    assert isinstance(kernel, Kernel) and isinstance(other, Kernel)
    launched: list[tuple[Tensor, ...]] = []
    stand_in = SimpleNamespace(launch=lambda *inputs: launched.append(inputs))
    monkeypatch.setattr(runtime, "import_kernel", lambda path: {other.name: stand_in}[path.stem])
    monkeypatch.setattr(runtime, "kernel_path", lambda kernel: Path(f"{kernel.name}.py"))
    launch = runtime._either(simulated(kernel.source).launch, other)
    inputs = fused(140, 2, 64)
    if not suited:
        inputs[1] = torch.empty(2, 2, 140, 65, dtype=HALF)[..., :64].copy_(inputs[1])
    result = launch(*inputs)
    assert (result is None) == (not suited) == bool(launched)
    assert result is None or check(result, spec, inputs).ok


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def generated(inputs: list[Tensor], target: str = "h200") -> Kernel:
    with torch.no_grad():
        report, (use,) = capture.generate(Attend(), tuple(inputs), {}, {"target": target})
    assert [site.kernel for site in report.replaced] == [use.kernel.name]
    return use.kernel


def large(row: int = 128, dtype: torch.dtype = BF16) -> list[Tensor]:
    return [torch.empty(4, 16, 1024, row, dtype=dtype)[..., :128] for _ in range(3)]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_kernel_of_the_family_comes_with_a_portable_one() -> None:
    kernel = generated(large())
    assert kernel.tile.family == HOPPER and kernel.otherwise is not None
    assert kernel.otherwise.tile.family == PORTABLE and kernel.otherwise.otherwise is None
    assert kernel.otherwise.spec == kernel.spec and "gluon" not in kernel.otherwise.source


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("target", "inputs"),
    [("a100", large()), ("h200", large(dtype=torch.float32)), ("h200", large(row=129))],
    ids=["a100", "float32", "rows of 129"],
)
def test_a_portable_kernel_comes_alone(target: str, inputs: list[Tensor]) -> None:
    kernel = generated(inputs, target)
    assert kernel.tile.family == PORTABLE and kernel.otherwise is None


# ---------------------------------------------------------------------------------------------------------------- choice


def planned(device: str, spec: AttentionSpec = SPEC, **given: Any) -> Plan:
    made = choose(spec, PROBLEM, DEVICES[device], **given)
    assert isinstance(made, Plan), made
    return made


@pytest.mark.parametrize("device", DEVICES)
def test_its_tiles_compete_where_warpgroups_multiply(device: str) -> None:
    made = planned(device)
    seen = {tile for tile, _ in made.ranked} | {refused.tile for refused in made.refused}
    expected = {*TILES, *HOPPER_TILES} if DEVICES[device].wgmma else set(TILES)
    assert seen == expected and (made.tile.family == HOPPER) == (device in ("h100", "h200"))


@pytest.mark.parametrize(
    ("spec", "misaligned", "reason"),
    [
        (BY_NAME["pair_gain"].spec, None, str(hopper.unsuited(BY_NAME["pair_gain"].spec))),
        (SPEC, "features of q are not neighbours", "features of q are not neighbours"),
    ],
    ids=["unsuited", "misaligned"],
)
def test_why_it_takes_no_part_is_said_once(spec: AttentionSpec, misaligned: str | None, reason: str) -> None:
    made = planned("h100", spec, misaligned=misaligned)
    said = [refused.reason for refused in made.refused if refused.tile.family == HOPPER]
    assert said == [f"and the like: {reason}"] and made.tile.family == PORTABLE
    elsewhere = planned("a100", spec, misaligned=misaligned)
    assert not any(refused.tile.family == HOPPER for refused in elsewhere.refused)


def test_limits_are_those_of_its_own_registers_and_memory() -> None:
    reasons = {refused.tile: refused.reason for refused in planned("h100", attention(dtype=BF16, head_dim=256)).refused}
    assert reasons[GRID] == "needs 353 KiB of shared memory; NVIDIA H100 80GB HBM3 has 227 KiB for a block"
    assert Tile(128, 64, 8, 2, HOPPER) not in reasons
    reasons = {refused.tile: refused.reason for refused in planned("h100").refused}
    assert "needs about 192 registers per thread; there are 160" in reasons[Tile(192, 128, 12, 2, HOPPER)]


def test_a_given_tile_is_taken_where_it_can_run() -> None:
    odd = Tile(192, 64, 12, 2, HOPPER)
    assert (planned("h100", tile=odd).tile, planned("h100", tile=odd).source) == (odd, "file")
    elsewhere = planned("a100", tile=odd)
    assert elsewhere.source == "model" and elsewhere.tile.family == PORTABLE
    assert {r.tile: r.reason for r in elsewhere.refused}[odd] == "NVIDIA A100 80GB has no warpgroups that multiply"
    assert planned("h100", BY_NAME["pair_gain"].spec, tile=odd).source == "model"
    assert planned("h100", misaligned="k is crooked", tile=odd).tile.family == PORTABLE


def test_rows_are_left_only_to_a_kernel_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = BY_NAME["fill_shows"].spec
    assert planned("h200", spec).tile.family == HOPPER
    kernel = decide.emitted(planned("h200", spec), DEVICES["h200"], "")
    assert isinstance(kernel, Kernel) and kernel.leaves_rows and kernel.otherwise is not None
    assert kernel.otherwise.tile.family == PORTABLE and not kernel.otherwise.leaves_rows
    able = choosing.refusal
    monkeypatch.setattr(choosing, "refusal", lambda tile, *about: "no" if tile.family == PORTABLE else able(tile, *about))
    assert isinstance(choose(spec, PROBLEM, DEVICES["h200"]), Miss)
    assert planned("h200").tile.family == HOPPER


UNKNOWN = (Tile(64, 64, 4, 2, HOPPER), Tile(128, 128, 4, 2, HOPPER), Tile(256, 16, 16, 2, HOPPER))


@pytest.mark.parametrize("tile", UNKNOWN, ids=str)
def test_a_tile_that_the_family_has_not_is_refused(tile: Tile) -> None:
    made = planned("h100", tile=tile)
    assert made.source == "model"
    assert {r.tile: r.reason for r in made.refused}[tile] == "is none of the tiles that the hopper family is made for"


# ------------------------------------------------------------------------------------------------------------ plan files


@pytest.fixture
def written(tmp_path: Path, fresh_dynamo: None) -> tuple[Path, Kernel]:
    """A plan for the H200, of one site."""
    with torch.no_grad():
        report, (use,) = capture.generate(Attend(), tuple(large()), {}, {"target": "h200"})
    path = tmp_path / "plan.json"
    path.write_text(plan.of(report, [use.kernel]).model_dump_json())
    torch._dynamo.reset()
    return path, use.kernel


def changed(path: Path, **tile: Any) -> None:
    content = json.loads(path.read_text())
    (entry,) = content["entries"]
    entry["tile"].update(tile)
    path.write_text(json.dumps(content))


def test_plan_files_keep_the_family(written: tuple[Path, Kernel]) -> None:
    path, kernel = written
    (entry,) = json.loads(path.read_text())["entries"]
    assert (entry["tile"]["family"], entry["tile"]["persistent"]) == (HOPPER, kernel.tile.persistent)
    assert plan.read(path).tile_for(kernel.spec, Problem((4, 16), 1024, 1024)) == kernel.tile
    changed(path, persistent=not kernel.tile.persistent)
    with torch.no_grad():
        _, (use,) = capture.generate(Attend(), tuple(large()), {}, {"target": "h200", "plan": str(path)})
    assert use.kernel.tile == replace(kernel.tile, persistent=not kernel.tile.persistent)


@pytest.mark.parametrize("tile", [{"family": "blackwell"}, {"family": None}, {"persistent": 1}, {"persistent": "yes"}])
def test_a_family_that_is_none_is_refused(tile: dict[str, Any], written: tuple[Path, Kernel]) -> None:
    changed(written[0], **tile)
    with pytest.raises(BadPlan, match=f"entries.0.tile.{next(iter(tile))}"):
        attngen.load(written[0])


@pytest.mark.parametrize(("target", "tile"), [("a100", {}), ("h200", {"warps": 12})], ids=["another GPU", "another tile"])
def test_a_choice_that_cannot_run_is_said_and_not_used(
    target: str, tile: dict[str, Any], written: tuple[Path, Kernel], caplog: pytest.LogCaptureFixture
) -> None:
    changed(written[0], **tile)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "attngen"):
        _, (use,) = capture.generate(Attend(), tuple(large()), {}, {"target": target, "plan": str(written[0])})
    assert "cannot run on" in caplog.text and "hopper" in caplog.text
    assert (use.kernel.tile.family == HOPPER) == (target == "h200") and use.kernel.tile.warps != 12
