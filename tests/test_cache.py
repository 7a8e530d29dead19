"""Tuned choices: what they are for, where they are looked for, and that they come out of a file as they went in."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from specs import BOTTOM_RIGHT, CAUSAL, attention
from torch import Tensor, nn

import attngen
from attngen import capture, errors
from attngen.aot import Layout, layout_of
from attngen.cache import contents, files, key
from attngen.cache import entry as entries
from attngen.cache.entry import Entry
from attngen.cache.key import BACKWARD, FORWARD, Wanted, key_of
from attngen.cache.lookup import Choices, Mode
from attngen.cache.store import Store
from attngen.device import DEVICES, Device
from attngen.errors import BadOption, CacheMissed
from attngen.plan import PlanFile
from attngen.spec import Problem, Tile

H200 = DEVICES["h200"]
SPEC = attention(mask=CAUSAL)
OTHER = Tile(16, 32, 8, 1)  # that the model would never pick
PAIR = (Tile(32, 32, 4, 1), Tile(32, 64, 4, 2))


def layouts(rows: int) -> tuple[Layout, ...]:
    return tuple(layout_of(torch.empty(2, 2, rows, 64, dtype=torch.float16, device="meta")) for _ in range(3))


def wanted(rows: int = 100, device: Device = H200, **changes: Any) -> Wanted:
    made = Wanted(FORWARD, SPEC, Problem((2, 2), rows, rows), layouts(rows), device, "layers.0")
    return replace(made, **changes)


def entry(*, us: float = 12.5, tiles: tuple[Tile, ...] = (OTHER,), **about: Any) -> Entry:
    return entries.new(key_of(wanted(**about)), tiles, us, 14.0, 4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ATTNGEN_CACHE", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    errors.say_once.cache_clear()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def put(*made: Entry) -> None:
    Store().put((each.key.digest, each.text) for each in made)


# ------------------------------------------------------------------------------------------------------------------ keys


def test_a_choice_holds_for_sizes_down_to_half() -> None:
    put(entry(rows=128))
    assert [rows for rows in (64, 65, 100, 128, 129) if Choices().find(wanted(rows=rows))] == [65, 100, 128]


OTHERS: dict[str, Wanted] = {
    "spec": wanted(spec=attention(mask=BOTTOM_RIGHT)),
    "dtype": wanted(spec=attention(mask=CAUSAL, dtype=torch.bfloat16)),
    "heads": wanted(problem=Problem((2, 3), 100, 100)),
    "keys": wanted(problem=Problem((2, 2), 100, 300)),
    "device": wanted(device=DEVICES["h100"]),
    "part of the device": wanted(device=replace(H200, sms=66)),
    "phase": wanted(phase=BACKWARD),
    "views": wanted(inputs=tuple(replace(x, strides=(12800, 64, 128, 1)) for x in layouts(100))),
    "expanded": wanted(inputs=(*layouts(100)[:2], replace(layouts(100)[2], strides=(6400, 0, 64, 1)))),
    "misaligned": wanted(inputs=(replace(layouts(100)[0], offset=1), *layouts(100)[1:])),
}


@pytest.mark.parametrize("about", OTHERS)
def test_a_choice_for_something_else_is_a_miss(about: str) -> None:
    put(entry())
    assert Choices().find(wanted()) is not None
    assert Choices().find(OTHERS[about]) is None


@pytest.mark.parametrize("name", ["attngen", "torch", "triton", "templates"])
def test_a_choice_of_another_version_is_a_miss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(entry())
    if name == "templates":
        monkeypatch.setattr(key, "template_digest", lambda file: "0" * 12)
    else:
        others = {**key.versions(), name: "9"}
        monkeypatch.setattr(key, "versions", lambda: others)
    key_of.cache_clear()
    assert Choices().find(wanted()) is None
    monkeypatch.undo()
    key_of.cache_clear()


@pytest.mark.parametrize(
    ("change", "said"), [({"torch": "1.0"}, "made with torch 1.0"), ({"templates": "0" * 12}, "made from other templates")]
)
def test_entries_of_other_versions_are_pruned(change: dict[str, str], said: str) -> None:
    old = entries.new(key_of(wanted()).model_copy(update=change), (OTHER,), 3.0, None, 1)
    put(entry(), old)
    (reason,) = contents.prune(Store()).values()
    assert said in reason
    assert list(contents.contents(Store()).entries.values()) == [entry()]


def test_the_whole_key_must_be_the_same_not_its_digest() -> None:
    made = entry(device=DEVICES["h100"])
    Store().put([(key_of(wanted()).digest, made.text)])
    assert Choices().find(wanted()) is None
    assert "another key" in next(iter(contents.contents(Store()).wrong.values()))


def test_sizes_of_one_do_not_matter_for_the_layout() -> None:
    one, other = (Layout((1, 8, 16, 64), (stride, 1024, 64, 1), 0, "float16") for stride in (8192, 77))
    assert key._arrangement(one) == key._arrangement(other) == "123"
    assert key._arrangement(replace(one, strides=(0, 64, 512, 1))) == "213"


# --------------------------------------------------------------------------------------------------------------- entries


def test_numbers_come_out_as_they_went_in() -> None:
    chance = random.Random(0)
    for _ in range(300):
        made = entry(us=chance.uniform(0, 1) * 10 ** chance.randrange(-3, 8))
        assert entries.parsed(made.text) == made


@pytest.mark.parametrize(
    ("tiles", "phase"),
    [((), FORWARD), (PAIR, FORWARD), ((OTHER,), BACKWARD), ((*PAIR, OTHER), BACKWARD), ((replace(OTHER, rows=48),), FORWARD)],
)
def test_tiles_that_are_none(tiles: tuple[Tile, ...], phase: Any) -> None:
    with pytest.raises(ValueError):
        entry(tiles=tiles, phase=phase)


def test_a_changed_entry_is_refused() -> None:
    content = json.loads(entry().text)
    content["tiles"][0]["rows"] = 32
    assert "changed after" in str(entries.parsed(json.dumps(content)))


# ---------------------------------------------------------------------------------------------------------------- lookup


class Layer(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def inputs(grad: bool = False) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, 3, 80, 32, requires_grad=grad) for _ in range(3))


def asked(grad: bool = False) -> list[Wanted]:
    """What would be looked up for ``Layer``."""
    seen: list[Wanted] = []
    choices = Choices(measure=lambda one: seen.append(one))  # type: ignore[func-returns-value]
    with torch.set_grad_enabled(grad):
        capture.explain(Layer(), inputs(grad), {}, {"target": "h200"}, choices=choices)
    return seen


def tuned_for(*questions: Wanted) -> None:
    put(*(entries.new(key_of(one), (OTHER,) if one.phase == FORWARD else PAIR, 3.0, 4.0, 2) for one in questions))


def compiled(grad: bool = False, **options: Any) -> tuple[Tensor, attngen.report.Report]:  # type: ignore[name-defined]
    options = {"inner": "eager", "target": "h200", "strict": True, **options}
    with torch.set_grad_enabled(grad), attngen.record() as reports:
        out = torch.compile(Layer(), backend="attngen", options=options)(*inputs(grad))
    return out, reports[0]


def test_what_was_tuned_is_used_and_said() -> None:
    tuned_for(*asked(grad=True))
    out, report = compiled(grad=True, cache="assert")
    (site,) = report.sites
    assert (site.tile, site.source, site.measured_ms) == (str(OTHER), "cache", 0.003)
    assert (site.backward, site.backward_source) == (f"queries {PAIR[0]}, keys {PAIR[1]}", "cache")
    torch.testing.assert_close(out, Layer()(*inputs()))


def test_gradients_that_must_be_the_same_each_time_have_a_choice_of_their_own() -> None:
    forward, backward = asked(grad=True)
    tuned_for(forward, backward)
    assert Choices().find(backward) is not None
    assert Choices().find(replace(backward, deterministic=True)) is None
    assert compiled(grad=True, deterministic=True)[1].sites[0].backward_source == "model"


@pytest.mark.parametrize(("mode", "source"), [("use", "cache"), ("skip", "model"), ("refresh", "model"), ("assert", "cache")])
def test_modes(mode: Mode, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned_for(*asked())
    assert compiled(cache=mode)[1].sites[0].source == source
    torch._dynamo.reset()
    monkeypatch.setenv("ATTNGEN_CACHE", mode)
    assert compiled()[1].sites[0].source == source
    torch._dynamo.reset()
    assert compiled(cache="skip")[1].sites[0].source == "model"


def test_an_unknown_mode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNGEN_CACHE", "maybe")
    with pytest.raises(BadOption, match="cache"):
        attngen.options.parse({})  # type: ignore[attr-defined]


def test_a_miss_is_an_error_where_there_must_be_a_choice() -> None:
    for strict in (True, False):
        with pytest.raises(Exception, match="no tile of its forward has been tuned on NVIDIA H200"):
            compiled(cache="assert", strict=strict)
        torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(CacheMissed):
        capture.generate(Layer(), inputs(), {}, {"target": "h200", "cache": "assert"})
    forward, _ = asked(grad=True)
    tuned_for(forward)
    with pytest.raises(CacheMissed, match="backward"):
        capture.explain(Layer(), inputs(grad=True), {}, {"target": "h200", "cache": "assert"})


def test_a_plan_goes_before_the_cache_and_that_before_what_comes_with_attngen(monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = asked()
    by = {name: Tile(16, 32, warps, 1) for name, warps in (("shipped", 4), ("cache", 8))}
    made = {name: entries.new(key_of(one), (tile,), 3.0, None, 1) for name, tile in by.items()}
    monkeypatch.setattr(
        files, "shipped", lambda device: {made["shipped"].key.digest: made["shipped"]} if device == "h200" else {}
    )
    assert (found := Choices().find(one)) and (found.source, found.tiles) == ("shipped", (by["shipped"],))
    put(made["cache"])
    assert (found := Choices().find(one)) and (found.source, found.tiles) == ("cache", (by["cache"],))
    assert Choices(mode="skip").find(one) is None
    with torch.no_grad():
        report, uses = capture.generate(Layer(), inputs(), {}, {"target": "h200", "cache": "skip"})
    plan = attngen.plan.of(report, [use.kernel for use in uses])  # type: ignore[attr-defined]
    assert (found := Choices(plan).find(one)) and (found.source, str(found.tiles[0])) == ("plan", report.sites[0].tile)


def test_a_tile_that_cannot_run_is_said_and_not_used(caplog: pytest.LogCaptureFixture) -> None:
    (one,) = asked()
    put(entries.new(key_of(one), (Tile(256, 256, 4, 4),), 3.0, None, 1))
    with caplog.at_level(logging.WARNING, "attngen"):
        out, report = compiled()
    assert report.sites[0].source == "model"
    assert [r.message for r in caplog.records if "the cache's tile 256x256 w4 s4 cannot run on NVIDIA H200" in r.message]
    torch.testing.assert_close(out, Layer()(*inputs()))


def test_a_plan_carries_the_choices_for_gradients(tmp_path: Path) -> None:
    """What was tuned on one machine is emitted on another one that never tuned, and the other way round."""
    tuned_for(*asked(grad=True))
    options = {"target": "h200"}
    there, uses = capture.generate(Layer(), inputs(grad=True), {}, options)
    path = tmp_path / "plan.json"
    path.write_text(attngen.plan.of(there, [use.kernel for use in uses]).model_dump_json())  # type: ignore[attr-defined]
    (Store().path).unlink()
    here, again = capture.generate(Layer(), inputs(grad=True), {}, {**options, "plan": str(path)})
    assert [use.kernel.name for use in again] == [use.kernel.name for use in uses]
    assert [use.backward and use.backward.name for use in again] == [use.backward and use.backward.name for use in uses]
    assert uses[0].backward is not None and uses[0].backward.tiles == PAIR
    assert (here.sites[0].source, here.sites[0].backward_source) == ("plan", "plan")
    assert PlanFile.model_validate_json(path.read_text()) == attngen.plan.of(here, [use.kernel for use in again])  # type: ignore[attr-defined]
