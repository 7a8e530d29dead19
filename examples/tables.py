"""README's tables of measurements, made from the recorded results: ``python examples/tables.py`` writes them anew."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Record = dict[str, Any]


def models(record: Record) -> list[str]:
    """Milliseconds and peak memory of each variant, a line per model."""
    names = list(dict.fromkeys(row["variant"] for result in record["results"] for row in result["rows"]))
    lines = [f"| model | {' | '.join(names)} | speed-up over compiled eager / sdpa |", "|---" * (len(names) + 2) + "|"]
    for result in record["results"]:
        rows = {row["variant"]: row for row in result["rows"]}
        cells = [_cell(rows.get(name)) for name in names]
        ratios = " / ".join(f"{x:.2f}x" if (x := _speedup(rows, spelling)) else "-" for spelling in ("eager", "sdpa"))
        lines.append(f"| {result['model']} | {' | '.join(cells)} | {ratios} |")
    found = [_speedup({row["variant"]: row for row in result["rows"]}, "eager") for result in record["results"]]
    mean = statistics.geometric_mean(ratio for ratio in found if ratio)
    return [*lines, "", f"Geometric mean over the compiled eager spelling: {mean:.2f}x. {_machine(record)}"]


def _cell(row: Record | None) -> str:
    if row is not None and "OutOfMemory" in row["problem"]:
        return "out of memory"
    return "-" if row is None or row["problem"] else f"{row['ms']:.2f} ms, {row['peak_gib']:.2f} GiB"


def _speedup(rows: dict[str, Record], spelling: str) -> float | None:
    """What Inductor compiles over our best spelling; None where one of them has no time."""
    peer = rows.get(f"inductor {spelling}")
    ours = [row["ms"] for name, row in rows.items() if name.startswith("attngen") and not row["problem"]]
    return None if peer is None or peer["problem"] or not ours else float(peer["ms"] / min(ours))


def training(record: Record) -> list[str]:
    """Milliseconds and peak memory of a training step, attngen's by its better spelling, beside the best of the others; and
    of those whose gradients are the same bits in each run."""
    peers = ("eager", "inductor eager", "inductor sdpa", "inductor flex")
    same = ("inductor eager deterministic", "attngen eager deterministic")
    titles = ("model", *peers, "attngen", "over the best", "the same bits: inductor eager", "attngen eager")
    lines, ratios = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"], []
    for result in record["results"]:
        rows = {row["variant"]: row for row in result["rows"]}
        timed = {name: row["ms"] for name, row in rows.items() if not row["problem"]}
        ours = min((f"attngen {spelling}" for spelling in ("eager", "sdpa")), key=lambda name: timed.get(name, math.inf))
        ratios.append(min(timed[name] for name in peers if name in timed) / timed[ours])
        cells = [_cell(rows.get(name)) for name in (*peers, ours)] + [f"{ratios[-1]:.2f}x"]
        lines.append(f"| {result['model']} | {' | '.join(cells + [_cell(rows.get(name)) for name in same])} |")
    mean = statistics.geometric_mean(ratios)
    return [*lines, "", f"Geometric mean over the best of the others: {mean:.2f}x. {_machine(record)}"]


def curves(record: Record) -> list[str]:
    """Of each training, the last losses, and how far attngen's curve and eager's second one are from eager's first."""
    titles = ("model", "dropout", "loss in eager", "by attngen", "distance from eager", "of eager again", "sites")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for result in record["results"]:
        eager, ours = (sum(result["curves"][name][-20:]) / 20 for name in ("eager", "attngen"))
        distances = (f"{result[name]['mean']:.1e}" for name in ("difference", "noise"))
        cells = (result["model"], result["dropout"], f"{eager:.3f}", f"{ours:.3f}", *distances, result["replaced"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    dtype = record["results"][0]["dtype"]
    note = "Losses are means of the last 20 steps, distances of all of them"
    return [*lines, "", f"{note}: {record['steps']} steps in {dtype}. {_machine(record)}"]


def coverage(record: Record) -> list[str]:
    """Attention sites that an independent observer counts in each source of models, and what becomes of them."""
    titles = ("models of", "run", "sites", "replaced", "Inductor's matcher", "scored by a layer", "left alone, by reason")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, found in record["sources"].items():
        share = f"{found['replaced']} ({100 * found['replaced'] / found['sites']:.1f} %)"
        beside = _beside(found)
        reasons = "; ".join(f"{entry['sites']} {reason}" for reason, entry in found["missed"].items())
        layers = f"{found['learned_replaced']} of {found['learned']}"
        cells = (name.replace("_", ", "), found["models"], found["sites"], share, beside, layers, reasons or "-")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    packages = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    dead = sum(found["dead"] for found in record["sources"].values())
    matcher = ", ".join(f"{package} {version}" for package, version in record.get("inductor_versions", {}).items())
    notes = f"With {packages}. Not counted: {dead} sites whose result nothing reads."
    if matcher:
        notes += f" Inductor's matcher: in inference, with {matcher}, of the sites of the models that it was counted in."
    return [*lines, "", notes]


def _beside(found: Record) -> str:
    """What Inductor's matcher fuses, of the sites of the models that it was counted in."""
    if found["inductor"] is None:
        return "-"
    share = 100 * found["inductor"] / found["inductor_sites"]
    return f"{found['inductor']} of {found['inductor_sites']} ({share:.1f} %, {found['inductor_models']} models)"


def starts(record: Record) -> list[str]:
    """Seconds to the first result of a new process, with empty and with filled caches, and what a launch costs the host."""
    lines = ["| model | compiler and spelling | cold | warm |", "|---|---|---|---|"]
    for row in record["results"]:
        if row["of"] == "start":
            lines.append(f"| {row['model']} | {row['variant']} | {row['cold_s']:.1f} s | {row['warm_s']:.1f} s |")
    launch = next(row for row in record["results"] if row["of"] == "launch")
    added = f"One attention adds {launch['inductor_us']:.0f} us of host time to a compiled call under Inductor (sdpa)"
    return [*lines, "", f"{added}, {launch['attngen_us']:.0f} us here. {_machine(record)}"]


def long(record: Record) -> list[str]:
    """Peak memory of a call beside what its mask and its scores would take as tensors."""
    whole = f"a mask of all pairs would take {record['mask_gib']:.0f} GiB, a layer's scores {record['scores_gib']:.0f} GiB"
    return [f"{record['tokens']} tokens: {record['peak_gib']:.2f} GiB beside the parameters; {whole}. {_machine(record)}"]


_RATES = {"forward": "TFLOP/s", "gradient": "TFLOP/s of the gradient", "both": "TFLOP/s of forward and gradient"}


def attention(record: Record) -> list[str]:
    """TFLOP/s of every peer at every problem, and ours over the best of the others."""
    peers = list(dict.fromkeys(row["peer"] for result in record["results"] for row in result["rows"]))
    ours = next(peer for peer in peers if peer.startswith("attngen"))
    lines = [f"| problem | {' | '.join(peers)} | over the best |", "|---" * (len(peers) + 2) + "|"]
    ratios = []
    for result in record["results"]:
        rates = {row["peer"]: row["tflops"] for row in result["rows"] if row["status"] == "timed"}
        best = max((rate for peer, rate in rates.items() if peer != ours), default=math.nan)
        ratios.append(rates.get(ours, math.nan) / best)
        cells = [f"{rates[peer]:.0f}" if peer in rates else "-" for peer in peers]
        ratio = "-" if math.isnan(ratios[-1]) else f"{ratios[-1]:.2f}x"
        lines.append(f"| {result['problem']['name']} | {' | '.join(cells)} | {ratio} |")
    rate = _RATES[record["results"][0].get("phase", "forward")]
    mean = statistics.geometric_mean(ratio for ratio in ratios if not math.isnan(ratio))
    return [*lines, "", f"{rate}. Geometric mean over the best of the others: {mean:.2f}x. {_machine(record)}"]


def eighths(record: Record) -> list[str]:
    """TFLOP/s of products of 16-bit and of 8-bit numbers, with the RMS error of each result."""
    peers = [row["peer"] for row in record["results"][0]["rows"]]
    lines = [f"| problem | {' | '.join(peers)} |", "|---" * (len(peers) + 1) + "|"]
    for result in record["results"]:
        cells = [f"{row['tflops']:.0f}, {row['rms']:.1e}" for row in result["rows"]]
        lines.append(f"| {result['problem']['name']} | {' | '.join(cells)} |")
    return [*lines, "", f"TFLOP/s and RMS error. {_machine(record)}"]


def choices(record: Record) -> list[str]:
    """How good the cost model's picks are by a sweep: for each half, for programs of neither, and for each phase."""
    import sweep_report
    from sweep_store import Store

    return [*sweep_report.table(sweep_report.ratings(Store.of(record))), "", f"{sweep_report.NOTE} {_machine(record)}"]


def traffic(record: Record) -> list[str]:
    """Bytes that hardware counters saw, beside those of the cost model."""
    import count_traffic

    from attngen.device import DEVICES

    device = next(device for device in DEVICES.values() if device.label == record["device"])
    lines = ["| problem | tile | counted | predicted | off by |", "|---|---|---|---|---|"]
    for row in (count_traffic.Row(**each) for each in record["problems"]):
        sizes = f"{row.moved / 1e9:.3f} GB | {count_traffic.predicted(row, device) / 1e9:.3f} GB"
        lines.append(f"| {row.name} | {row.tile} | {sizes} | {count_traffic.error(row, device):+.1%} |")
    return [*lines, "", f"To and from HBM, reads and writes. {_machine(record)}"]


def runs(record: list[Record]) -> list[str]:
    """How many tests passed, with which device and versions."""
    lines = ["| device | versions | test files | passed | skipped | failed |", "|---|---|---|---|---|---|"]
    for run in record:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        files = run["files"].values()
        counts = (sum(file[outcome] for file in files) for outcome in ("passed", "skipped", "failed"))
        lines.append(f"| {run['device']} | {versions} | {len(files)} | {' | '.join(map(str, counts))} |")
    return lines


def _machine(record: Record) -> str:
    return f"{record['device']}, {', '.join(f'{name} {version}' for name, version in record['versions'].items())}."


TABLES: dict[str, tuple[str, Callable[[Any], list[str]]]] = {
    "runs": ("tests/data/runs.json", runs),
    "coverage": ("tests/data/coverage.json", coverage),
    "models": ("examples/results/models.json", models),
    "models_h100": ("examples/results/models_h100.json", models),
    "training": ("examples/results/training.json", training),
    "curves": ("examples/results/curves.json", curves),
    "dense": ("examples/results/dense.json", attention),
    "portable_dense": ("examples/results/portable_dense.json", attention),
    "portable": ("examples/results/portable.json", attention),
    "variants": ("examples/results/variants.json", attention),
    "dense_fa4": ("examples/results/dense_fa4.json", attention),
    "dense_gradient": ("examples/results/dense_gradient.json", attention),
    "dense_gradient_fa4": ("examples/results/dense_gradient_fa4.json", attention),
    "variants_training": ("examples/results/variants_training.json", attention),
    "fp8": ("examples/results/fp8.json", eighths),
    "long": ("examples/results/long.json", long),
    "starts": ("examples/results/starts.json", starts),
    "choices": ("tests/data/sweep_h100.json", choices),
    "traffic": ("tests/data/traffic_h100.json", traffic),
}


def updated(readme: str) -> str:
    """``readme`` with each ``<!-- table NAME -->`` block made from its data."""
    for name, (file, render) in TABLES.items():
        lines = "\n".join(render(json.loads((ROOT / file).read_text())))
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not pattern.search(readme):
            raise ValueError(f"README.md has no block for the table {name}")
        readme = pattern.sub(lambda found, text=lines: found[1] + text + found[2], readme)
    return readme


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))


if __name__ == "__main__":
    main()
