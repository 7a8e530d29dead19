"""Bytes that kernels move to and from memory, by hardware counters, beside what the cost model says.

    python examples/count_traffic.py --out FILE       on a machine with the GPU and Nsight Compute (ncu)

Each problem is launched once under ncu, with empty caches, after launches that are not counted. Problems move many times what
the L2 cache holds: results that are still there when a kernel ends have not been written to memory and are not counted.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from sweep_problems import BF16, Site, spec_of
from torch import Tensor

from attngen import decide, verify
from attngen.cache.key import versions
from attngen.choose import HOPPER_TILES, TILES, Plan
from attngen.cost import costs
from attngen.device import Device, resolve
from attngen.emit import Kernel
from attngen.errors import AttngenError, Miss, Unavailable
from attngen.runtime import launch_of
from attngen.spec import Problem

METRICS = {"dram__bytes_read.sum": "read", "dram__bytes_write.sum": "written"}
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
CLOSE = 0.1  # what may lie between the model and the counters
_DECLARED = [
    ("full", 64, (16, 32), 4096, 4096),
    ("full", 128, (16, 16), 4096, 4096),
    ("full", 128, (1, 16), 65536, 65536),
    ("causal", 128, (8, 16), 8192, 8192),
    ("causal", 256, (8, 8), 8192, 8192),
    ("grouped causal", 128, (8, 32), 8192, 8192),
    ("window", 64, (4, 32), 16384, 16384),
    ("bias", 64, (4, 32), 2048, 2048),
    ("full", 128, (32, 32), 1, 8192),
    ("grouped full", 128, (16, 32), 1, 32768),
]
PROBLEMS = [
    Site(
        f"{program} d{size} {batch[0]}x{batch[1]} {rows}x{keys}",
        "forward",
        spec_of(program, size, size, BF16, False),
        Problem(batch, rows, keys),
    )
    for program, size, batch, rows, keys in _DECLARED
]


@dataclass(frozen=True)
class Row:
    """One problem, in bytes. ``problem`` says why it was not launched, if so."""

    name: str
    tile: str = ""
    read: float = 0.0
    written: float = 0.0
    problem: str = ""

    @property
    def moved(self) -> float:
        return self.read + self.written


def predicted(row: Row, device: Device) -> int:
    """What the model says that the tile of ``row`` moves, in bytes."""
    site = next(site for site in PROBLEMS if site.name == row.name)
    tile = next(tile for tile in (*TILES, *HOPPER_TILES) if str(tile) == row.tile)
    return costs(site.spec, site.problem, device, [tile])[0].hbm_bytes


def error(row: Row, device: Device) -> float:
    """Of the model, as a share of what was counted."""
    return predicted(row, device) / row.moved - 1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--launch", action="store_true", help="launch only, to be counted by ncu")
    given = parser.parse_args(arguments)
    if given.launch:
        given.out.write_text(json.dumps([asdict(launched(site, resolve("auto"))) for site in PROBLEMS]))
        return
    rows, device = measured(), resolve("auto")
    found = {"device": device.label, "versions": versions(), "problems": [asdict(row) for row in rows]}
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(lines(rows, device)))


# ------------------------------------------------------------------------------------------------------------- launching


def plan_of(site: Site, device: Device) -> Plan:
    """What the chooser takes. Raises ``Unavailable`` where it takes nothing."""
    plan = decide.chosen(site.spec, site.problem, device, None, decide.misaligned(site.spec, site.layouts))
    if isinstance(plan, Miss):
        raise Unavailable(plan.reason)
    return plan


def launched(site: Site, device: Device) -> Row:
    """Launch it, and once more while the profiler looks."""
    try:
        plan = plan_of(site, device)
        kernel = decide.emitted(plan, device, site.name)
        assert isinstance(kernel, Kernel)
        launch, inputs = launch_of(kernel), _drawn(site)
        for _ in range(2):
            launch(*inputs)
        torch.cuda.synchronize()
    except (AttngenError, RuntimeError) as failed:
        return Row(site.name, problem=str(failed))
    torch.cuda.profiler.start()
    launch(*inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return Row(site.name, str(plan.tile))


def _drawn(site: Site) -> list[Tensor]:
    """Normal numbers, made on the GPU: a CPU takes longer for so many than all kernels."""
    shapes = verify.sample_inputs(site.spec, site.problem, device="meta")
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").normal_() for x in shapes]


# -------------------------------------------------------------------------------------------------------------- counting


def measured() -> list[Row]:
    """Every problem with its counts. Raises ``Unavailable`` without ncu."""
    profiler = shutil.which("ncu")
    if profiler is None:
        raise Unavailable("ncu (Nsight Compute) is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        said, log = Path(folder, "launched.json"), Path(folder, "ncu.csv")
        launch = [sys.executable, __file__, "--launch", "--out", str(said)]
        subprocess.run(launch, check=True)  # compiles what is compiled no more under ncu
        count = [profiler, "--csv", "--log-file", str(log), "--print-units", "base", "--clock-control", "none"]
        count += ["--profile-from-start", "off", "--kernel-name", "regex:attention_forward", "--metrics", ",".join(METRICS)]
        subprocess.run([*count, *launch], check=True)
        return counted([Row(**row) for row in json.loads(said.read_text())], log.read_text())


def counted(rows: Sequence[Row], log: str) -> list[Row]:
    """``rows`` with what ``log``, CSV as ncu writes it, has for those that were launched, in order. Raises ``AttngenError``
    where
    it has more or fewer."""
    text = [line for line in log.splitlines() if line.startswith('"')]
    bytes_of: dict[str, dict[str, float]] = {}
    for entry in csv.DictReader(text):
        if (name := METRICS.get(entry["Metric Name"])) is not None:
            value = float(entry["Metric Value"].replace(",", "")) * UNITS[entry["Metric Unit"]]
            bytes_of.setdefault(entry["ID"], {})[name] = value
    kernels = [bytes_of[number] for number in sorted(bytes_of, key=int)]
    if len(kernels) != sum(not row.problem for row in rows):
        raise AttngenError(f"ncu counted {len(kernels)} kernels:\n{log[-2000:]}")
    left = iter(kernels)
    return [row if row.problem else replace(row, **next(left)) for row in rows]


def lines(rows: Sequence[Row], device: Device) -> list[str]:
    """For people: gigabytes, and how far the model is off."""
    able = {row.name: error(row, device) for row in rows if not row.problem}
    shown = []
    for row in rows:
        counts = f"{row.read / 1e9:7.3f} GB read, {row.written / 1e9:6.3f} written"
        said = row.problem or f"{counts}, {predicted(row, device) / 1e9:7.3f} predicted ({able[row.name]:+.1%}) {row.tile}"
        shown.append(f"{row.name:36s} {said}")
    close = sum(abs(off) <= CLOSE for off in able.values())
    return [*shown, f"{close} of {len(rows)} within {CLOSE:.0%}."]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
