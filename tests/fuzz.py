"""Fuzz attngen: random attention-like graphs (``fuzz_graphs``) must compute after replacement what they computed before.

    python tests/fuzz.py run --count 100000 --out FILE    a recorded run; goes on where FILE stops
    python tests/fuzz.py show SEED                        one graph, what was found in it, and how it is judged

The judge is float64: results may be off by twice what eager is (``attngen.verify``). A failure is shrunk by making fewer
and plainer choices for as long as it fails in the same way.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from fuzz_graphs import Case, build
from fuzz_judge import Run, judged, results_of
from fuzz_writer import Draw
from torch import Tensor, fx

import attngen
from attngen import pipeline, runtime, verify
from attngen.emit import Kernel
from attngen.errors import AttngenError, Miss
from attngen.options import Options
from attngen.passes import closing, detect, effects, lower, specialise
from attngen.passes import replace as replacing
from attngen.passes.detect import Site
from attngen.report import Report

torch.set_num_threads(1)


@dataclass(frozen=True)
class Outcome:
    """What became of a case: how many sites were replaced, why others were not, and what is wrong, if anything."""

    replaced: int = 0
    reasons: tuple[str, ...] = ()
    wrong: str = ""


# ------------------------------------------------------------------------------------------------------------ running


def _placed(
    site: Site, earlier: Sequence[replacing.Placed], lowered: lower.Lowered, facts: effects.Effects, training: bool
) -> replacing.Placed | Miss:
    special = specialise.run(site)
    if isinstance(special, Miss):
        return special
    special = replace(special, spec=replace(special.spec, lse=training))
    placed = replacing.place(site, special, lowered, facts, training=training)
    if isinstance(placed, Miss) or not training:
        return placed
    return replace(placed, specialised=closing.run(site, special, earlier))


def replaced(case: Case) -> tuple[Run, int, list[str]]:
    """The graph with its sites replaced, how many those are, and why others are not: the pipeline without the kernels."""
    gm = _copied(case.gm)
    lowered = lower.run(gm, case.inputs)
    facts = effects.run(lowered.graph)
    placed: list[list[replacing.Placed]] = []
    reasons = []
    for each in detect.run(lowered):
        earlier = [one for terms in placed for one in terms]
        sites = () if isinstance(each, Miss) else each
        terms = [_placed(site, earlier, lowered, facts, case.training) for site in sites] or [each]
        missed = [term.reason for term in terms if isinstance(term, Miss)]
        reasons += missed[:1]
        if not missed:
            placed.append(terms)  # type: ignore[arg-type]
    for together in placed:
        operators = [runtime.operator(site.specialised.spec, None) for site in together]
        miss = replacing.run(together, lowered, operators)
        reasons += [] if miss is None else [miss.reason]
    gm.graph.lint()
    gm.recompile()
    return gm.forward, len(placed), reasons


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(torch.nn.Module(), graph)


def compiled(case: Case, *, dynamic: bool) -> tuple[Run, int, list[str]]:
    """The same by ``torch.compile``, for real; compiled when first run."""
    reports: list[Report]
    with attngen.record() as reports:
        run = torch.compile(case.gm, backend="attngen", options={"inner": "eager", "strict": True}, dynamic=dynamic)
        results_of(run, case, case.inputs)
    sites = [site for made in reports for site in made.sites]
    misses = [site.reason for site in sites if site.status == "missed"]
    return run, len(sites) - len(misses), misses


def outcome(choices: Draw, run: Callable[[Case], tuple[Run, int, list[str]]] = replaced) -> Outcome:
    """Build the case of ``choices``, replace what ``run`` replaces, and compare."""
    case = build(choices)
    try:
        eager = results_of(case.gm.forward, case, case.inputs)
    except RuntimeError as refused:
        return Outcome(reasons=(f"eager refuses it: {str(refused).splitlines()[0]}",))
    try:
        with torch.set_grad_enabled(case.training):
            module, count, reasons = run(case)
        ours = results_of(module, case, case.inputs) if count else eager
    except Exception as failed:
        place = traceback.extract_tb(failed.__traceback__)[-1]
        return Outcome(wrong=f"{type(failed).__name__}: {failed} ({Path(place.filename).name}:{place.lineno})")
    return Outcome(count, tuple(reasons), judged(case, ours, eager) if count else "")


# -------------------------------------------------------------------------------------------------------- interpreted


# Triton's interpreter takes the type of a comparison for that of its operands, and so makes numbers of a scalar truth value.
QUIRK = "ufunc 'bitwise_"


class _Watched(fx.Interpreter):
    """Runs a replaced graph; what each kernel is called on is noted, or its result given."""

    def __init__(self, gm: fx.GraphModule, results: Sequence[list[Tensor]] = ()) -> None:
        super().__init__(gm)
        self.calls: list[tuple[Kernel, list[Tensor]]] = []
        self._results = list(results)[::-1]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        known = runtime.registered(target.name()) if isinstance(target, torch._ops.OpOverload) else None
        if known is None:
            return super().call_function(target, args, kwargs)
        if self._results:
            return self._results.pop()[0]
        assert known[1] is not None
        self.calls.append((known[1], [x.clone() for x in args]))
        return super().call_function(target, args, kwargs)


def interpreted_case(seed: int) -> Case:
    """Up to 128 long, and without bfloat16, whose products the interpreter gets wrong."""
    case = build(Draw(seed), half=(torch.float16,), longest=128)
    return replace(case, training=False)


def interpreted(seeds: Iterable[int], count: int, batch: int = 50) -> dict[int, str]:
    """What is wrong with each of the first ``count`` cases with a site, their kernels run in Triton's interpreter."""
    waiting: list[tuple[int, Case, fx.GraphModule, list[tuple[Kernel, list[Tensor]]]]] = []
    found: dict[int, str] = {}
    for seed in seeds:
        case = interpreted_case(seed)
        gm = _copied(case.gm)
        report, _ = pipeline.optimize(gm, case.inputs, Options(inner="eager", strict=True))
        if report.replaced:
            watched = _Watched(gm)
            results_of(watched.run, case, case.inputs)
            waiting.append((seed, case, gm, watched.calls))
        if len(waiting) == batch or len(found) + len(waiting) == count:
            found.update(_interpret(waiting))  # without those that the interpreter itself gets wrong
            waiting = []
        if len(found) == count:
            break
    return {**found, **_interpret(waiting)}


def _interpret(waiting: list[tuple[int, Case, fx.GraphModule, list[tuple[Kernel, list[Tensor]]]]]) -> dict[int, str]:
    results = iter(verify.run_interpreted([call for *_, calls in waiting for call in calls]))
    found = {}
    for seed, case, gm, calls in waiting:
        own = [next(results) for _ in calls]
        failed = next((str(r) for r in own if isinstance(r, AttngenError)), "")
        if QUIRK in failed:
            continue
        run = _Watched(gm, [r for r in own if not isinstance(r, AttngenError)]).run
        found[seed] = failed or judged(case, *(results_of(r, case, case.inputs) for r in (run, case.gm.forward)))
    return found


# ---------------------------------------------------------------------------------------------------------- shrinking


def shrunk(choices: Sequence[int], fails: Callable[[list[int]], bool], tries: int = 500) -> list[int]:
    """Fewer and smaller choices with which ``fails`` still holds: blocks are left out or made plain, ever smaller ones."""
    best = list(choices)
    width = len(best)
    while width and tries > 0:
        place = 0
        while place < len(best) and tries > 0:
            for smaller in _smaller(best, place, width):
                tries -= 1
                if fails(smaller):
                    best = smaller
                    break
            else:
                place += width
        width //= 2
    return best


def _smaller(choices: list[int], place: int, width: int) -> list[list[int]]:
    before, block, after = choices[:place], choices[place : place + width], choices[place + width :]
    found = [before + after]
    if any(block):
        found.append(before + [0] * len(block) + after)
    if width == 1 and block[0] > 1:
        found.append([*before, block[0] // 2, *after])
    return found


def fails_alike(wrong: str) -> Callable[[list[int]], bool]:
    """Whether choices give a failure of the same kind as ``wrong``."""

    def fails(choices: list[int]) -> bool:
        try:
            return _words(outcome(Draw(choices=choices)).wrong) == _words(wrong)
        except Exception:  # a graph that cannot be built is no failure of ours
            return False

    return fails


def _words(wrong: str) -> list[str]:
    return re.findall("[A-Za-z_]+", wrong)[:4]


def report(seed: int, wrong: str, choices: Sequence[int]) -> str:
    """What to print of a failure: its seed, and the smallest graph that fails like it."""
    small = shrunk(choices, fails_alike(wrong))
    case = Draw(choices=small)
    again = outcome(case).wrong
    return f"seed {seed}: {wrong}\nshrunk: {again}\nchoices {small}\n{build(Draw(choices=small)).text}"


# ----------------------------------------------------------------------------------------------------------- recorded


def chunk(first: int, count: int) -> dict[str, Any]:
    """What came of the seeds from ``first`` on, as a line of a record."""
    started = time.perf_counter()
    totals: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failures = []
    for seed in range(first, first + count):
        draw = Draw(seed)
        result = outcome(draw)
        totals["graphs"] += 1
        totals["sites"] += result.replaced
        totals["compared"] += result.replaced > 0
        reasons.update(result.reasons)
        if result.wrong:
            failures.append(report(seed, result.wrong, draw.made))
    seconds = round(time.perf_counter() - started, 1)
    return {"first": first, **totals, "seconds": seconds, "reasons": dict(reasons.most_common()), "failures": failures}


def recorded(count: int, out: Path, jobs: int = 1, step: int = 250) -> None:
    """Run seeds 0 .. ``count`` in ``jobs`` processes at a time, appending a line to ``out`` for each ``step``; done lines are
    kept."""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {line["first"] for line in lines}
    left = [first for first in range(0, count, step) if first not in done]
    with ThreadPool(jobs) as pool, out.open("a") as file:
        for line in pool.imap_unordered(lambda first: _in_a_process(first, min(step, count - first)), left):
            lines.append(line)
            print(json.dumps(line), file=file, flush=True)
            totals = Counter({name: sum(line.get(name, 0) for line in lines) for name in ("graphs", "compared", "sites")})
            print(dict(totals), "failures:", sum(len(line["failures"]) for line in lines), flush=True)


def _in_a_process(first: int, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "chunk", str(first), str(count)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])  # type: ignore[no-any-return]
    return {"first": first, "graphs": 0, "failures": [f"ended with {child.returncode}: {child.stderr[-2000:]}"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--count", type=int, required=True)
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--jobs", type=int, default=1, help="processes at a time")
    part = commands.add_parser("chunk")
    part.add_argument("first", type=int)
    part.add_argument("count", type=int)
    commands.add_parser("show").add_argument("seed", type=int)
    given = parser.parse_args()
    if given.command == "run":
        recorded(given.count, given.out, given.jobs)
    elif given.command == "chunk":
        print(json.dumps(chunk(given.first, given.count)))
    else:
        print(build(Draw(given.seed)).text, outcome(Draw(given.seed)), sep="\n")


if __name__ == "__main__":
    main()
