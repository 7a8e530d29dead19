"""What is said of the cost model's choices, on sites that were measured before the sweep and on made-up times."""

from __future__ import annotations

import json
from pathlib import Path

import hopper_sites
import numpy as np
import pytest
import sweep
import sweep_report
import sweep_space
import tables
from sweep_problems import SITES, Site
from sweep_report import Rating, rating, ratings, table
from sweep_space import Configuration, flex, label, ranked
from sweep_store import Store, Timed

from attngen.device import DEVICES
from attngen.errors import AttngenError
from attngen.spec import Tile

H100 = DEVICES["h100"]
DATA = Path(__file__).parent / "data" / "hopper_fwd_h100.json"
A, B, C, D = ((Tile(64, 64, 4, stages),) for stages in (1, 2, 3, 4))
SITE = SITES["forward full d128 bf16 4x16 4096x4096"]
PAIRED = SITES["backward causal d64 bf16 4x32 4096x4096"]


def rated(microseconds: dict[Configuration, float], predicted: dict[Configuration, float]) -> Rating:
    found = rating(SITE, {label(tiles): time for tiles, time in microseconds.items()}, predicted)
    assert found is not None
    return found


def test_a_pick_is_rated_by_the_fastest() -> None:
    found = rated({A: 12.0, B: 10.0, C: 40.0}, {A: 9e-6, B: 11e-6, C: 40e-6})
    assert (found.chosen, found.fastest) == (A, B)
    assert (found.pick, found.few, found.several) == (pytest.approx(10 / 12), 1.0, 1.0)
    assert found.errors == pytest.approx((0.25, 0.1, 0.0))
    assert found.flex is None and found.over_flex is None


def test_what_was_not_measured_is_no_pick_and_what_is_not_ranked_may_be_the_fastest() -> None:
    found = rated({A: 12.0, B: 10.0, flex(SITE): 6.0}, {D: 1e-6, A: 9e-6, B: 11e-6})
    assert found.chosen == A and found.fastest == flex(SITE) and found.pick == 0.5
    assert found.flex == 1.0 and found.over_flex == 0.5
    assert rating(SITE, {label(A): 1.0}, {B: 1e-6}) is None


def test_the_fifth_of_the_ranking_is_not_among_the_first_four() -> None:
    tiles = [(Tile(64, 64, 4, stages),) for stages in range(1, 8)]
    times = dict(zip(tiles, (20.0, 16.0, 18.0, 20.0, 10.0, 30.0, 30.0), strict=True))
    found = rated(times, dict.fromkeys(tiles, 1e-05))
    assert (found.pick, found.few, found.several) == (0.5, 0.625, 1.0)


def test_pairs_that_were_not_measured_take_part() -> None:
    """As made up, times of both kernels add up; the pick is the fastest of all pairs, most of which follow from others."""
    predicted = ranked(PAIRED, H100)
    space = sweep_space.space(PAIRED, H100)
    found = rating(PAIRED, {label(tiles): 1e6 * predicted[tiles] for tiles in space}, predicted)
    assert found is not None and found.pick == 1.0 and max(found.errors) == pytest.approx(0.0, abs=1e-6)
    assert len(found.errors) > 3 * len(space)


def test_sites_that_were_measured_before() -> None:
    """The data that formulas were fitted to: the table says of it what tests of the choice require."""
    measured = json.loads(DATA.read_text())["sites"]
    found = []
    for name, times in measured.items():
        site = Site(name, "forward", *hopper_sites.SITES[name])
        one = rating(site, {tile: 1e3 * ms for tile, ms in times.items()}, ranked(site, H100))
        assert one is not None
        found.append(one)
    assert len(found) == len(measured) and all(0.7 < each.pick <= each.few <= each.several <= 1 for each in found)
    head, _, *rows = table(found, of=lambda each: "before")
    cells = [cell.strip() for cell in rows[0].split("|")[1:-1]]
    assert len(cells) == len(sweep_report.COLUMNS) == head.count("|") - 1
    assert cells[:3] == ["before", "forward", str(len(measured))] and float(cells[3].removesuffix(" %")) > 95


SWEEP = DATA.with_name("sweep_h100.json")


def test_choices_at_problems_that_nothing_was_fitted_to() -> None:
    """What the model reached in the sweep, less a little: a change of it that spoils other problems is seen here."""
    held_out = [each for each in ratings(Store.load(SWEEP)) if each.site.half == "held out"]
    picks, few, several = (np.array([getattr(each, name) for each in held_out]) for name in ("pick", "few", "several"))
    assert len(held_out) > 60
    assert np.exp(np.log(picks).mean()) > 0.97 and np.quantile(picks, sweep_report.TAIL) > 0.9 and picks.min() > 0.8
    assert np.exp(np.log(few).mean()) > 0.99 and np.exp(np.log(several).mean()) > 0.995
    assert np.median([error for each in held_out for error in each.errors]) < 0.1
    worse = [each for each in held_out if each.over_flex is not None and each.over_flex < 1]
    assert len(worse) <= 4


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A store of a few sites, whose times are the predicted ones but for one that is late and one that failed."""
    store = Store(H100.label, {"torch": "2.11"})
    chosen = [site for name, site in SITES.items() if "full d128" in name or "sinks" in name or "decode softcap" in name]
    for site in chosen:
        predicted = ranked(site, H100)
        first, *others = (tiles for tiles in sweep_space.space(site, H100) if tiles in predicted)
        times = {label(tiles): 1e6 * predicted[tiles] for tiles in others}
        store.sites[site.name] = Timed(100.0, {**times, label(first): 2e6 * predicted[first]}, {"gone": "out of memory"})
    store.save(tmp_path / "sweep.json")
    return tmp_path / "sweep.json"


def test_the_report(made_up: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.main(["--report", str(made_up), "--only", "decode softcap"])
    text = capsys.readouterr().out
    for part in ("| fitted to | forward |", "| held out | decode |", "| other programs | forward |", "The worst picks:"):
        assert part in text
    assert "failed: out of memory" in text and "Choosing takes" in text


def test_the_table_of_the_readme(made_up: Path) -> None:
    lines = tables.choices(json.loads(made_up.read_text()))
    assert lines[0].startswith("| sites |") and lines[-1].endswith("NVIDIA H100 80GB HBM3, torch 2.11.")


def test_hours_in_which_all_is_slower_change_nothing(made_up: Path) -> None:
    store = Store.load(made_up)
    before = ratings(store)
    name = before[0].site.name
    slow = store.sites[name]
    store.sites[name] = Timed(1.25 * slow.reference, {each: 1.25 * time for each, time in slow.microseconds.items()})
    (after, *_) = ratings(store)
    assert after.errors == pytest.approx(before[0].errors, abs=1e-6)


def test_a_gpu_that_nothing_is_known_of() -> None:
    with pytest.raises(AttngenError, match="nothing is known of the Other"):
        ratings(Store("Other"))


def test_nothing_measured() -> None:
    assert sweep_report.lines(Store(H100.label)) == ["No site has been measured."]
