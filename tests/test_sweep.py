"""The sweep without a GPU: what it measures, how a run goes on where the last one ended, and what becomes of what fails."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import sweep
import sweep_runs
import sweep_space
from sweep_problems import FP16, SITES, Site, groups, spec_of
from sweep_runs import REFERENCE, REFERENCE_TILE, Run, planned
from sweep_store import Store, Timed
from sweep_worker import Batch
from test_cache import own_cache

from attngen import compat
from attngen.aot import Job
from attngen.device import DEVICES
from attngen.errors import AttngenError, VerificationFailed
from attngen.spec import HOPPER, Problem, Tile
from attngen.tune import supervise
from attngen.tune.compilers import Ahead, Compilers, identity
from attngen.tune.supervise import Outcome

__all__ = ["own_cache"]  # for every test here
H100 = DEVICES["h100"]
HERE = Path(__file__).parent
FEW = [SITES[name] for name in SITES if " full d128 bf16" in name][:3]
needs_interpreter = pytest.mark.skipif(compat.interpreter_problem() is not None, reason="no interpreter")


# ------------------------------------------------------------------------------------------------- sites, configurations


def test_there_are_enough_sites_of_every_kind_in_both_halves() -> None:
    counts = Counter((site.phase, site.half) for site in SITES.values())
    assert sum(count for (_, half), count in counts.items() if half != "second") >= 120
    assert all(counts[phase, half] >= 9 for phase in ("forward", "backward", "decode") for half in ("fit", "held out"))
    assert {site.spec.head_dim for site in SITES.values()} >= {64, 80, 96, 128, 192, 256}
    assert counts["forward", "second"] >= 12


def test_a_site_stays_in_its_half() -> None:
    assert SITES["forward full d64 bf16 32x16 512x512"].half == "fit"
    assert SITES["forward full d64 bf16 4x32 4000x4000"].half == "held out"


@pytest.mark.parametrize("site", [group[0] for group in groups(list(SITES.values()))], ids=lambda site: site.name)
def test_configurations_are_a_declared_part_of_what_is_ranked(site: Site) -> None:
    space = sweep_space.space(site, H100)
    ranked = sweep_space.ranked(site, H100)
    families = Counter(tiles[0].family for tiles in space)
    assert len(space) == len(set(space)) and max(families.values()) <= sweep_space.MOST + 1
    assert all(tiles in ranked for tiles in space if tiles != sweep_space.flex(site))
    assert len(space) >= 4 and (site.phase == "backward" or sweep_space.flex(site) in space)
    assert (HOPPER in families) == any(tiles[0].family == HOPPER for tiles in ranked)


def test_times_of_pairs_follow_from_those_that_share_a_tile() -> None:
    a, b, c = (Tile(64, 64, 4, stages) for stages in (1, 2, 3))
    measured = {(a, a): 10.0, (b, a): 12.0, (a, b): 9.0, (c, c): 3.0, (a,): 1.0}
    assert sweep_space.added_up(measured) == {**measured, (b, b): 11.0}


def test_lengths_share_a_binary_and_types_do_not() -> None:
    def jobs(site: Site) -> list[tuple[object, ...]]:
        return [identity(job) for job in planned(site, H100, [REFERENCE_TILE]).jobs if isinstance(job, Job)]

    other = replace(REFERENCE, problem=Problem((1, 3), 1000, 1000))
    half = replace(REFERENCE, spec=spec_of("causal", 128, 128, FP16, False))
    assert jobs(REFERENCE) == jobs(other) != jobs(half)


# ------------------------------------------------------------------------------------------------------------------ runs


class Machine:
    """Stands in for compilers and GPUs: every configuration takes as long as its number; ``fails`` says which do not."""

    def __init__(self, fails: Callable[[int], bool] = lambda number: False, batches: int = 99) -> None:
        self.compiled: list[Job] = []
        self.measured: list[Batch] = []
        self._fails, self._batches = fails, batches

    def submit(self, job: Job) -> Future[str]:
        self.compiled.append(job)
        future: Future[str] = Future()
        future.set_result("")
        return future

    def measure(self, batch: Batch, deadline: float, card: str) -> Outcome:
        self.measured.append(batch)
        if len(self.measured) > self._batches:
            return Outcome({0: 50.0, 1: 1.0})  # the time is over
        numbers = range(len(batch.candidates))
        times = {n: 100.0 + n for n in numbers if not self._fails(n)}
        return Outcome(times, {n: "the kernel's result is off" for n in numbers if self._fails(n)})


def go(machine: Machine, path: Path, sites: Sequence[Site], seconds: float = 60.0, cards: Sequence[str] = ("0",)) -> Store:
    store = Store.load(path) if path.exists() else Store(H100.label)
    stops = time.monotonic() + seconds
    Run(store, path, H100, stops, Ahead(machine.submit), machine.measure, says=lambda text: None).go(sites, cards)
    return store


def test_sites_that_share_kernels_are_one_batch_after_the_reference(tmp_path: Path) -> None:
    machine = Machine()
    store = go(machine, tmp_path / "sweep.json", FEW)
    (batch,) = machine.measured
    assert [wanted.where for wanted, _ in batch.parts] == [REFERENCE.name, *(site.name for site in FEW)]
    assert batch.candidates[0] == REFERENCE_TILE and batch.parts[0][1] == 1
    assert list(store.sites) == [site.name for site in FEW]
    assert store.sites[FEW[0].name].reference == 100.0 and store.sites[FEW[0].name].failed == {}
    names = [job.source for job in machine.compiled]
    assert len(names) == len(set(names)), "each kernel is compiled once"
    assert sweep_space.label(sweep_space.space(FEW[0], H100)[0]) in store.sites[FEW[0].name].microseconds


def test_a_run_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    sites = [*FEW, *(SITES[name] for name in SITES if name.startswith("decode"))]
    first = Machine(batches=2)
    done = set(go(first, path, sites).sites)
    assert 0 < len(done) < len(sites) and set(Store.load(path).sites) == done
    second = Machine()
    assert set(go(second, path, sites).sites) == {site.name for site in sites}
    again = {wanted.where for batch in second.measured for wanted, _ in batch.parts}
    assert not again & done
    third = Machine()
    go(third, path, sites)
    assert not third.measured


def test_of_a_batch_that_was_cut_short_only_what_is_complete_is_kept(tmp_path: Path) -> None:
    assert not go(Machine(batches=0), tmp_path / "sweep.json", FEW).sites


def test_what_fails_is_kept_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    go(Machine(fails=lambda number: number == 2), path, FEW)
    timed = Store.load(path).sites[FEW[0].name]
    assert list(timed.failed.values()) == ["the kernel's result is off"]
    assert not set(timed.failed) & set(timed.microseconds)


def test_nothing_is_kept_without_a_reference(tmp_path: Path) -> None:
    assert not go(Machine(fails=lambda number: number == 0), tmp_path / "sweep.json", FEW).sites


def test_what_does_not_compile_is_measured_by_nobody(tmp_path: Path) -> None:
    class Broken(Machine):
        def submit(self, job: Job) -> Future[str]:
            future = super().submit(job)
            if len(self.compiled) == 3:
                future = Future()
                future.set_result("does not compile")
            return future

    machine = Broken()
    store = go(machine, tmp_path / "sweep.json", FEW)
    assert all(list(store.sites[site.name].failed.values()) == ["does not compile"] for site in FEW)
    (batch,) = machine.measured
    assert len(batch.candidates) == 1 + sum(len(store.sites[site.name].microseconds) for site in FEW)


def test_several_cards_share_the_work(tmp_path: Path) -> None:
    machine = Machine()
    sites = [site for site in SITES.values() if site.phase == "decode"]
    store = go(machine, tmp_path / "sweep.json", sites, cards=("0", "1", "2"))
    assert len(store.sites) == len(sites) and len(machine.measured) == len(groups(sites))


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    class Slow(Machine):
        def submit(self, job: Job) -> Future[str]:
            return Future()

    machine = Slow()
    go(machine, tmp_path / "sweep.json", FEW, seconds=0.1)
    assert not machine.measured


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it but the GPU, and but compilers."""
    machine = Machine()
    compilers = SimpleNamespace(submit=machine.submit, close=lambda: None)
    monkeypatch.setattr(sweep, "resolve", lambda target: H100)
    monkeypatch.setattr(sweep, "cards", lambda which, device: ["0", "1"])
    monkeypatch.setattr(sweep, "Compilers", lambda workers, arch: compilers)
    monkeypatch.setattr(
        sweep_runs.supervise, "measured", lambda batch, deadline, **more: machine.measure(batch, deadline, "")
    )
    path = tmp_path / "sweep.json"
    sweep.main(["--out", str(path), "--only", "decode full"])
    assert f"8 sites in {path}; done" in capsys.readouterr().out
    assert len(Store.load(path).sites) == 8 and Store.load(path).versions["attngen"]


def test_another_gpu_needs_another_file() -> None:
    with pytest.raises(AttngenError, match="write to another one"):
        sweep_runs.check(Store("NVIDIA H200"), H100)


def test_a_dry_run_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    sweep.main(["--dry-run", "--only", "decode"])
    text = capsys.readouterr().out
    assert "core-seconds" in text and "GPU-seconds" in text and "64 cores" in text


# ------------------------------------------------------------------------------------------------------------- the store


def test_the_store_gives_back_what_it_was_given(tmp_path: Path) -> None:
    timed = Timed(100.0, {"a": 1.2345, "b": 20000.0}, {"c": "out of memory", "d": "out of memory"})
    store = Store("GPU", {"torch": "2.11"}, {"one": timed, "two": Timed(200.0, {"b": 4.0})})
    store.save(tmp_path / "x.json")
    found = Store.load(tmp_path / "x.json")
    assert found == replace(
        store, sites={"one": replace(timed, microseconds={"a": 1.234, "b": 20000.0}), "two": store.sites["two"]}
    )
    assert found.scaled("two") == {"b": 3.0} and not list(tmp_path.glob("*.part"))


# ------------------------------------------------------------------------------------------------------------- processes


def fate(job: Job, arch: int) -> None:
    """What becomes of a job, by its name."""
    if job.source.name == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if job.source.name == "hang":
        time.sleep(60)
    if job.source.name == "bad":
        raise VerificationFailed("does not compile")


def test_a_compiler_that_crashes_or_hangs_costs_one_kernel() -> None:
    compilers = Compilers(1, 90, fate, seconds=1.0, start="fork")
    try:
        names = ("good", "crash", "bad", "hang", "good")
        futures = [compilers.submit(Job(Path(name), ())) for name in names]
        said = [future.result(60) for future in futures]
    finally:
        compilers.close()
    lost = "the compiler crashed, or took too long"
    assert said == ["", lost, "does not compile", lost, ""]


@needs_interpreter
def test_a_batch_in_a_process() -> None:
    """A forward, a backward and a site that cannot be measured, in the interpreter."""
    tiny = Problem((1, 2), 20, 20)
    forward = Site("forward", "forward", spec_of("causal", 16, 16, FP16, False), tiny)
    backward = Site("backward", "backward", spec_of("causal", 16, 16, FP16, True), tiny)
    wrong = replace(forward, name="wrong", spec=replace(forward.spec, values=replace(forward.spec.values, dtype=None)))
    tiles = [(Tile(16, 16, 4, 1),), (Tile(32, 16, 4, 1),)]
    parts = [(site.wanted(H100), tiles) for site in (forward,)]
    parts.append((replace(parts[0][0], spec=wrong.spec), tiles))
    parts.append((backward.wanted(H100), [(*tile, *tile) for tile in tiles]))
    batch = Batch.of(parts, rounds=2)
    command = (sys.executable, str(HERE / "interpreted_sweep.py"))
    outcome = supervise.measured(batch, time.monotonic() + 100, command=command)
    assert not outcome.broke and sorted(outcome.microseconds) == [0, 1, 4, 5], outcome
    assert sorted(outcome.failed) == [2, 3]
