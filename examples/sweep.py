"""An exhaustive sweep: which configuration is fastest for each of many problems, and how good the cost model's picks are.

    python examples/sweep.py --out FILE [--seconds 520] [--devices all]   on a machine with the GPU, again until it says done
    python examples/sweep.py --dry-run [--target h100]                    what it would take
    python examples/sweep.py --report FILE                                 the figures

Problems are those of ``sweep_problems``, configurations those of ``sweep_space``, which says by what rule they are a part of
what the chooser ranks. Lengths are arguments of kernels, so each distinct kernel is compiled once, on all cores; sites that
share kernels are measured in one batch, by a process of their own that may crash or hang, after a reference kernel. Every
result is held against float64 before its time counts. A run of ``--seconds`` keeps what is complete in FILE; the next one
goes on from there.

What was measured lies in ``tests/data/sweep_<gpu>.json``, beside the other measured sites: it is evidence for the cost model,
which tests and README read, and no part of what is installed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import sweep_report
import torch
from sweep_problems import SITES, Site, groups
from sweep_runs import REFERENCE, REFERENCE_TILE, ROUNDS, Planned, Run, check, planned
from sweep_space import ranked
from sweep_store import Store

from attngen.aot import Job
from attngen.cache.key import versions
from attngen.device import Device, resolve
from attngen.measure import WARM_UP
from attngen.spec import HOPPER
from attngen.tune.compilers import Ahead, Compilers, identity
from attngen.tune.spread import cards

# Seconds that a run takes, as assumed: of a core for one kernel, by family and whether backward; of a GPU for a batch,
# for a configuration besides its calls, for a call besides its kernel.
COMPILE = {("portable", False): 5.0, ("portable", True): 9.0, ("hopper", False): 20.0, ("hopper", True): 20.0}
BATCH, LAUNCHED, FLUSH = 12.0, 0.15, 0.8e-3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where times are kept")
    parser.add_argument("--seconds", type=float, default=520.0, help="when to end")
    parser.add_argument("--devices", default="auto", help='"auto" (one), "all", or numbers of GPUs: 0,1')
    parser.add_argument("--only", default="", help="sites whose name has this")
    parser.add_argument("--workers", type=int, default=0, help="compilers; as many as cores, less two per GPU")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--target", default="h100", help="the GPU of a dry run")
    parser.add_argument("--report", type=Path, help="the file to report on")
    given = parser.parse_args(arguments)
    sites = [site for site in SITES.values() if given.only in site.name]
    if given.report:
        store = Store.load(given.report)
        print("\n".join(sweep_report.lines(store)))
        print(sweep_report.choosing(sites, sweep_report.device_of(store)))
    elif given.dry_run:
        print("\n".join(estimate(sites, resolve(given.target))))
    elif given.out:
        run(sites, given.out, given.seconds, given.devices, given.workers)
    else:
        parser.error("one of --out, --dry-run and --report must be given")


def run(sites: Sequence[Site], path: Path, seconds: float, devices: str, workers: int) -> None:
    stops = time.monotonic() + seconds
    device = resolve("auto")
    store = Store.load(path) if path.exists() else Store(device.label, versions())
    check(store, device)
    chosen = cards(devices, device)
    assert isinstance(device.arch, int)
    compilers = Compilers(workers or max(1, (os.cpu_count() or 1) - 2 * len(chosen)), device.arch)
    try:
        Run(store, path, device, stops, Ahead(compilers.submit), says=lambda text: print(text, flush=True)).go(sites, chosen)
    finally:
        compilers.close()
    left = sum(site.name not in store.sites for site in sites)
    print(f"{len(store.sites)} sites in {path}; {f'{left} left: run it again' if left else 'done'}", flush=True)


def estimate(sites: Sequence[Site], device: Device) -> list[str]:
    """What there is to compile and to time, and for how long."""
    jobs: dict[tuple[object, ...], tuple[str, bool]] = {}
    gpu = timed = 0.0
    for group in [[REFERENCE], *groups(sites)]:
        gpu += BATCH
        for site in group:
            plan = planned(site, device, [REFERENCE_TILE] if site is REFERENCE else None)
            for tiles, job in zip(plan.configurations, plan.jobs, strict=True):
                if isinstance(job, Job):
                    jobs.setdefault(identity(job), (tiles[0].family, site.phase == "backward"))
            timed += len(plan.configurations)
            gpu += _seconds(plan, device)
    kinds = [*jobs.values()]
    cores = sum(COMPILE[kind] for kind in kinds)
    wide = sum(family == HOPPER for family, _ in kinds)
    return [
        f"{len(sites)} sites in {len(groups(sites))} batches, {timed:.0f} configurations to time, for the {device.label}",
        f"{len(jobs)} kernels to compile, {wide} of them of the hopper family: {cores:.0f} core-seconds",
        f"{gpu:.0f} GPU-seconds",
        *(
            f"{count} GPU{'s' * (count > 1)}, {workers} cores: {max(cores / (workers - 2 * count), gpu / count) / 60:.0f} min"
            for count, workers in ((1, 16), (2, 32), (4, 64))
        ),
    ]


def _seconds(plan: Planned, device: Device) -> float:
    """Of a GPU for one site: each configuration is launched, checked and timed."""
    predicted = ranked(plan.site, device)
    slowest = max(predicted.values(), default=0.0)
    calls = WARM_UP + ROUNDS
    return sum(LAUNCHED + calls * (FLUSH + predicted.get(tiles, slowest)) for tiles in plan.configurations)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
