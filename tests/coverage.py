"""How much of the attention in real models attngen replaces, beside an observer of operators that knows nothing of it.

    python tests/coverage.py run --source transformers --attention eager --inductor --out FILE [MODEL...]
    python tests/coverage.py run ... --again missed      (or failed: after a change of attngen or of the models)
    python tests/coverage.py show FILE...
    python tests/coverage.py pack FILE...                (to tests/data/coverage.json)
    python tests/coverage.py beside FILE...              (Inductor's counts alone, into what was packed before)
    python tests/coverage.py renew FILE...               (some models' results, into what was packed before)

A run is resumable: FILE gets one JSON line per model, and the last one of each model counts. Capture and detection only:
nothing is compiled. Models have random weights; nothing is downloaded. Sources: transformers, timm, diffusers,
x-transformers.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from coverage_results import DEAD, beside, pack, read, renewed, show
from coverage_tracer import Traced, trace, without_fast_paths
from torch import fx, nn

from attngen import compat, pipeline
from attngen import options as option_parsing

SECONDS, MEMORY, BATCH = 60, 9 << 30, 40
NEVER = "never reported"


# ---------------------------------------------------------------------------------------------------------- one model


@dataclass
class Outcome:
    """What was measured of one model. ``status``: "run", or "not run" with the ``error``.

    ``sites``: what the observer saw, each with its ``fate``: "replaced" or the reason why not.
    ``others``: what attngen reported and the observer did not see. ``problems``: failures of ours or of the capture.
    """

    model: str
    status: str = "run"
    error: str = ""
    sites: list[dict[str, Any]] = field(default_factory=list)
    others: list[list[str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    graphs: int = 0
    inductor: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # of processor time


@dataclass(frozen=True)
class Reported:
    """One site as attngen reports it, once per call of its graph. ``reason`` is empty for a replaced one."""

    path: str
    line: str
    reason: str


def measure(model: str, module: nn.Module, inputs: dict[str, Any], *, inductor: bool = False) -> Outcome:
    """The sites of ``module`` and what attngen would make of each."""
    outcome = Outcome(model)
    with torch.no_grad(), without_fast_paths():
        started = time.process_time()
        traced = trace(module, **inputs)
        outcome.seconds["trace"] = round(time.process_time() - started, 2)
        started = time.process_time()
        reported = _reported(module, inputs, outcome, inductor)
        outcome.seconds["explain"] = round(time.process_time() - started, 2)
    outcome.sites, outcome.others = _compared(traced, reported, outcome)
    return outcome


def _reported(module: nn.Module, inputs: dict[str, Any], outcome: Outcome, inductor: bool) -> list[Reported]:
    """As ``attngen.explain``, on the real inputs: models that decide by values go on, and reused graphs count each time.

    Where ``torch.compile`` gives up, it is told to leave out the function that it cannot capture (``suppress_errors``).
    """
    device = pipeline.planning_device([], option_parsing.parse({}))
    calls: list[list[Reported]] = []
    fused: list[int] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome.graphs += 1
        by_inductor = _fused_by_inductor(gm, example_inputs, outcome) if inductor else 0
        found = _looked(gm, example_inputs, device, outcome)

        def run(*args: Any) -> Any:
            calls.append(found)
            fused.append(by_inductor)
            return gm.forward(*args)

        return run

    for go_on in (False, True):
        try:
            with torch._dynamo.config.patch(suppress_errors=go_on), compat.looking_at(module, backend) as compiled:
                compiled(**inputs)
            break
        except Exception as problem:
            outcome.problems.append(f"capture: {_head(problem)}")
            calls.clear()
            fused.clear()
    if inductor and not any(problem.startswith("inductor:") for problem in outcome.problems):
        outcome.inductor = sum(fused)
    return [site for call in calls for site in call]


def _looked(gm: fx.GraphModule, example_inputs: Sequence[Any], device: Any, outcome: Outcome) -> list[Reported]:
    try:
        report = pipeline.explain(gm, example_inputs, option_parsing.parse({}), device)
    except Exception as problem:
        outcome.problems.append(f"attngen: {_head(problem)}")
        return []
    return [Reported(*_place(site.where), site.reason if site.status == "missed" else "") for site in report.sites]


def _place(where: str) -> tuple[str, str]:
    found = re.fullmatch(r"(?:(.*) \()?([^()]*:\d+)\)?", where)
    return (found[1] or "", found[2]) if found else (where, "")


def _head(problem: BaseException) -> str:
    """Its type, first line, and the innermost two frames."""
    frames = traceback.extract_tb(problem.__traceback__)[-2:]
    at = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    text = next((line for line in str(problem).splitlines() if line.strip()), "")
    return f"{type(problem).__name__}: {text[:200]} [{at}]"


def _fused_by_inductor(gm: fx.GraphModule, example_inputs: Sequence[Any], outcome: Outcome) -> int:
    """How many sites PyTorch's own matcher fuses in the inference graph."""
    from torch._dynamo.utils import counters
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    def passes(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        joint_graph_passes(graph)
        return graph.forward

    before = counters["inductor"]["fuse_attention"]
    try:
        lowered: Any = aot_module_simplified(
            gm, example_inputs, fw_compiler=passes, inference_compiler=passes, decompositions=select_decomp_table()
        )
        del lowered
    except Exception as problem:
        outcome.problems.append(f"inductor: {_head(problem)}")
    return counters["inductor"]["fuse_attention"] - before


# ----------------------------------------------------------------------------------------------------------- comparing


def _compared(
    traced: list[Traced], reported: list[Reported], outcome: Outcome
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Each traced site with its fate, by module first, then by what is near; replaced ones are given out first."""
    left = sorted(reported, key=lambda site: bool(site.reason))
    fates: dict[int, str] = {}
    order = sorted(range(len(traced)), key=lambda k: (traced[k].dead, traced[k].learned))
    for near in (_same_module, _one_in_the_other, _same_parent, _same_file, _missed):
        for k in order:
            match = next((site for site in left if k not in fates and near(traced[k], site)), None)
            if match is not None and not (traced[k].dead and match.reason):
                fates[k] = match.reason or "replaced"
                left.remove(match)
    lost = next((p for p in outcome.problems if not p.startswith("inductor")), None)
    sites = [asdict(site) | {"fate": fates.get(k, lost or (DEAD if site.dead else NEVER))} for k, site in enumerate(traced)]
    return sites, [[site.path, site.line, site.reason or "replaced"] for site in left]


def _same_module(seen: Traced, site: Reported) -> bool:
    return seen.path == site.path


def _one_in_the_other(seen: Traced, site: Reported) -> bool:
    longer, shorter = (seen.path, site.path) if len(seen.path) > len(site.path) else (site.path, seen.path)
    return bool(shorter) and (longer.startswith(f"{shorter}.") or longer.endswith(f".{shorter}"))


def _same_parent(seen: Traced, site: Reported) -> bool:
    """The views that a replacement takes along may belong to a neighbour."""
    parent = seen.path.rpartition(".")[0]
    return bool(parent) and parent == site.path.rpartition(".")[0]


def _missed(seen: Traced, site: Reported) -> bool:
    """A miss is reported where its proof failed, which may be far off."""
    return bool(site.reason)


def _same_file(seen: Traced, site: Reported) -> bool:
    return seen.line.split(":")[0] == site.line.split(":")[0]


# ------------------------------------------------------------------------------------------------------------- workers


def work(source: str, attention: str, names: Sequence[str], out: Path, mark: Path, *, inductor: bool) -> None:
    """Measure the models, one line each; called in a child process that may be killed."""
    import coverage_models

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, _out_of_time)
    torch.set_num_threads(1)
    quiet()
    for name in names:
        mark.write_text(name)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        started = time.process_time()
        try:
            module, inputs = coverage_models.build(source, name, attention)
            built = round(time.process_time() - started, 2)
            outcome = measure(name, module, inputs, inductor=inductor)
            outcome.seconds["build"] = built
        except Exception as problem:
            outcome = Outcome(name, "not run", f"{type(problem).__name__}: {str(problem).strip()[:300]}")
        signal.setitimer(signal.ITIMER_PROF, 0)
        append(out, outcome)
        module = inputs = None
        torch._dynamo.reset()
        gc.collect()


def quiet() -> None:
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _out_of_time(*_: Any) -> None:
    raise TimeoutError(f"not done in {SECONDS} s of processor time")


def append(out: Path, outcome: Outcome) -> None:
    with out.open("a") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def run(source: str, attention: str, out: Path, names: Sequence[str], *, inductor: bool, again: str, jobs: int) -> None:
    """All models of a source that ``out`` does not have yet, or that were ``again`` "missed" or "failed"; in children."""
    import coverage_models

    wanted = list(names) or coverage_models.names(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    old = {o["model"] for o in read(out) if again not in verdicts(o)}
    lines = len(out.read_text().splitlines()) if out.exists() else 0
    options = ["--source", source, "--attention", attention, "--out", str(out), *(["--inductor"] if inductor else [])]
    with ThreadPoolExecutor(jobs) as pool:
        while todo := [name for name in wanted if name not in old | {o["model"] for o in read(out, lines)}]:
            print(f"{source} {attention}: {len(todo)} of {len(wanted)} to do", flush=True)
            batches = [todo[k : k + BATCH] for k in range(0, min(len(todo), BATCH * jobs), BATCH)]
            list(pool.map(lambda batch: _in_a_child(options, batch, out), batches))


def _in_a_child(options: Sequence[str], names: Sequence[str], out: Path) -> None:
    """Measure until all are done or the process dies; then the model it was at is not run."""
    mark = out.with_suffix(f".{names[0].replace('/', '_')}.at")
    mark.write_text("")
    child = subprocess.Popen([sys.executable, __file__, "work", *options, "--mark", str(mark), *names])
    _watch(child, mark)
    at = mark.read_text()
    mark.unlink()
    if child.returncode != 0 and not at:
        raise SystemExit(f"the child process ended with {child.returncode} before its first model")
    if child.returncode != 0:
        append(out, Outcome(at, "not run", f"the process ended with {child.returncode}"))


def verdicts(outcome: dict[str, Any]) -> set[str]:
    missed = any(site["fate"] != "replaced" for site in outcome["sites"]) or outcome["problems"] or outcome["others"]
    return ({"missed"} if missed else set()) | ({"failed"} if outcome["status"] != "run" else set())


def _watch(child: subprocess.Popen[bytes], mark: Path) -> None:
    """Kill a child that stays on one model far beyond its time: stuck, or waiting."""
    while child.poll() is None:
        time.sleep(1)
        if time.time() - mark.stat().st_mtime > 15 * SECONDS:
            child.kill()
            child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "work"):
        command = commands.add_parser(name)
        command.add_argument("--source", required=True)
        command.add_argument("--attention", default="eager", choices=("eager", "sdpa"))
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--inductor", action="store_true", help="also count what PyTorch's own matcher fuses")
        command.add_argument("--mark", type=Path, help=argparse.SUPPRESS)
        command.add_argument("models", nargs="*")
    for name in ("show", "pack", "beside", "renew"):
        command = commands.add_parser(name)
        command.add_argument("files", nargs="+", type=Path)
        command.add_argument("--to", type=Path, default=Path(__file__).parent / "data" / "coverage.json")
    commands.choices["run"].add_argument("--jobs", type=int, default=1)
    commands.choices["run"].add_argument("--again", default="", choices=("missed", "failed"), help="also these of before")
    chosen = parser.parse_args()
    if chosen.command == "run":
        how: dict[str, Any] = {"inductor": chosen.inductor, "again": chosen.again, "jobs": chosen.jobs}
        run(chosen.source, chosen.attention, chosen.out, chosen.models, **how)
    elif chosen.command == "work":
        work(chosen.source, chosen.attention, chosen.models, chosen.out, chosen.mark, inductor=chosen.inductor)
    elif chosen.command == "show":
        print(show(chosen.files))
    else:
        into = {"beside": beside, "renew": renewed}.get(chosen.command)
        packed = pack(chosen.files) if into is None else into(json.loads(chosen.to.read_text()), chosen.files)
        chosen.to.write_text(json.dumps(packed, indent=1) + "\n")


if __name__ == "__main__":
    main()
