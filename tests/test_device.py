"""Device records: what is known, how a name finds one, and what a card that nobody described gets."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from attngen import device
from attngen.device import DEVICES, from_properties, resolve
from attngen.errors import Unavailable, UnknownDevice


def card(name: str, **changes: object) -> SimpleNamespace:
    """What torch says of an H100 with two thirds of its multiprocessors, unless changed."""
    properties = {
        "name": name,
        "major": 9,
        "minor": 0,
        "multi_processor_count": 88,
        "shared_memory_per_block_optin": 232448,
        "shared_memory_per_multiprocessor": 233472,
        "regs_per_multiprocessor": 65536,
        "max_threads_per_multi_processor": 2048,
        "L2_cache_size": 30 << 20,
        **changes,
    }
    return SimpleNamespace(**properties)


def test_only_what_was_measured_claims_to_be() -> None:
    assert [d.name for d in DEVICES.values() if d.calibrated] == ["h200", "h100"]
    assert DEVICES["h200"].hbm_bandwidth == 4.27e12
    assert DEVICES["h200"].tensor16 == 778e12
    assert DEVICES["h100"].hbm_bandwidth == 3.0e12


@pytest.mark.parametrize("name", DEVICES)
def test_records_are_consistent(name: str) -> None:
    d = DEVICES[name]
    assert d.name == name
    assert d.smem_block <= d.smem_sm
    assert d.tensor16 > d.tensor32 >= d.fp32 * 0.75
    assert d.hbm_bandwidth < d.l2_bandwidth
    assert d.target == (d.backend, d.arch, 64 if d.backend == "hip" else 32)
    # Lanes, clock and multiprocessors multiply up to the datasheet's fp32 rate (two operations per instruction).
    assert 2 * d.lanes_per_clock * d.sms * d.clock == pytest.approx(d.fp32, rel=0.15)


def test_wgmma_is_hopper_only() -> None:
    assert {d.name for d in DEVICES.values() if d.wgmma} == {"h200", "h100"}


def test_unknown_target_says_what_is_known() -> None:
    with pytest.raises(UnknownDevice, match=r'unknown target "h300".*auto, h200, h100, a100, l4, rtx4090, mi300x'):
        resolve("h300")


def test_auto_without_a_card_plans_for_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve("auto") is DEVICES["h200"]
    with pytest.raises(Unavailable, match="no GPU"):
        device.probe()


def test_auto_asks_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: card("NVIDIA H200", multi_processor_count=132))
    assert resolve("auto") is DEVICES["h200"]


def test_unknown_card_takes_limits_from_the_driver_and_rates_by_size() -> None:
    found = from_properties(card("NVIDIA H100 Small"), hip=False)
    h100 = DEVICES["h100"]
    assert (found.name, found.sms, found.arch, found.calibrated) == ("nvidia-h100-small", 88, 90, False)
    assert found.l2_bytes == 30 << 20
    assert found.tensor16 == pytest.approx(h100.tensor16 * 88 / 132)
    assert found.hbm_bandwidth == pytest.approx(h100.hbm_bandwidth * 88 / 132)


def test_a_part_of_a_known_card_is_not_taken_for_it() -> None:
    assert from_properties(card("NVIDIA H200 MIG 1g.18gb", multi_processor_count=16), hip=False).sms == 16


def test_memory_clock_and_bus_width_give_the_bandwidth_where_torch_tells_them() -> None:
    told = from_properties(card("NVIDIA X", memory_clock_rate=2619000, memory_bus_width=5120), hip=False)
    assert told.hbm_bandwidth == pytest.approx(3.35e12 * device.MEMORY_FRACTION, rel=0.01)


@pytest.mark.parametrize(
    ("major", "minor", "like"), [(8, 6, "a100"), (8, 9, "rtx4090"), (9, 0, "h100"), (12, 0, "h100"), (7, 5, "a100")]
)
def test_most_similar_card(major: int, minor: int, like: str) -> None:
    found = from_properties(card("NVIDIA X", major=major, minor=minor), hip=False)
    model = DEVICES[like]
    assert found.clock == model.clock
    assert found.tensor16 / found.sms == pytest.approx(model.tensor16 / model.sms)
    assert found.wgmma == (major == 9)


def test_amd_card_by_architecture_name() -> None:
    properties = card("AMD Instinct MI308X", gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=80)
    found = from_properties(properties, hip=True)
    assert found.target == ("hip", "gfx942", 64)
    assert found.tensor16 == pytest.approx(DEVICES["mi300x"].tensor16 * 80 / 304)


def test_importing_asks_nothing() -> None:
    code = "import sys, attngen.device; sys.exit('torch' in sys.modules and sys.modules['torch'].cuda.is_initialized())"
    subprocess.run([sys.executable, "-c", code], check=True)
