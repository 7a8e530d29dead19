"""What ``attngen info`` knows: versions, the GPUs of this machine, the devices that can be planned for, the cache."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import attngen
from attngen import paths
from attngen.device import DEVICES, Device
from attngen.show import counted, size


def describe() -> RenderableType:
    return Group(
        _versions(), Text("\nDevices of this machine", style="bold"), _cards(), Text(), _targets(), Text(), _cache()
    )


def _versions() -> Table:
    table = Table.grid(padding=(0, 3))
    for name in ("attngen", "torch", "triton", "python"):
        known = {"attngen": attngen.__version__, "torch": torch.__version__, "python": platform.python_version()}
        table.add_row(Text(name, style="bold"), known.get(name) or _installed(name))
    return table


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed: kernels can be planned and emitted; models run block by block in ATen"


def _cards() -> RenderableType:
    if not torch.cuda.is_available():
        return Text("  none with CUDA; plans are made for a named target")
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Group(
        *(Text(f"  cuda:{n}  {card.name}, {size(card.total_memory)}, {_arch(card)}") for n, card in enumerate(cards))
    )


def _arch(card: object) -> str:
    if torch.version.hip:
        return str(getattr(card, "gcnArchName", "hip"))
    return f"sm_{getattr(card, 'major', '?')}{getattr(card, 'minor', '?')}"


def _targets() -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in ("--target", "Device", "SMs", "HBM", "Tensor", "Model"):
        table.add_column(column, no_wrap=True)
    for device in DEVICES.values():
        table.add_row(*_row(device))
    return table


def _row(device: Device) -> tuple[str, ...]:
    rates = "calibrated" if device.calibrated else "datasheet"
    tensor = f"{device.tensor16 / 1e12:.0f} TF/s"
    return (device.name, device.label, str(device.sms), f"{size(device.hbm_bandwidth)}/s", tensor, rates)


def _cache() -> Text:
    try:
        folder = paths.cache_dir()
    except OSError as problem:
        return Text.assemble(("Cache  ", "bold"), f"{problem.filename} cannot be used: {problem.strerror}")
    files = [path for path in folder.rglob("*") if path.is_file()]
    kernels = sum(path.parent.name == "kernels" and path.suffix == ".py" for path in files)
    held = sum(path.stat().st_size for path in files)
    return Text.assemble(("Cache  ", "bold"), f"{folder}  ({counted(kernels, 'kernel')}, {size(held)})")
