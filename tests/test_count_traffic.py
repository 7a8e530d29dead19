"""Counted traffic: what ncu writes is read, and the problems are such that a cache hides little of them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import count_traffic
import pytest
from count_traffic import CLOSE, PROBLEMS, Row, counted, error, lines, plan_of, predicted
from sweep_problems import Site

from attngen.device import DEVICES
from attngen.errors import AttngenError, Unavailable

COLUMNS = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",'
    '"Section Name","Metric Name","Metric Unit","Metric Value"'
)


def entry(number: int, metric: str, unit: str, value: str) -> str:
    where = '"7","python3","127.0.0.1","attention_forward","1","7","(128, 1, 1)","(132, 1, 1)","0","9.0","Command line"'
    return f'"{number}",{where},"{metric}","{unit}","{value}"'


LOG = "\n".join(
    [
        "==PROF== Connected to process 7",
        COLUMNS,
        entry(0, "dram__bytes_read.sum", "byte", "1,000,000,000"),
        entry(0, "dram__bytes_write.sum", "byte", "250000000"),
        entry(1, "dram__bytes_read.sum", "Mbyte", "2.5"),
        entry(1, "dram__bytes_write.sum", "Kbyte", "500"),
        "==PROF== Disconnected from process 7",
    ]
)
NAMES = [site.name for site in PROBLEMS[:3]]
TILE = "128x64 w8 s3"
ROWS = [Row(NAMES[0], TILE), Row(NAMES[1], problem="out of memory"), Row(NAMES[2], TILE)]
H100 = DEVICES["h100"]
COUNTED = json.loads((Path(__file__).parent / "data" / "traffic_h100.json").read_text())


def test_counts_belong_to_what_was_launched() -> None:
    one, two, three = counted(ROWS, LOG)
    assert (one.read, one.written, one.moved) == (1e9, 25e7, 1.25e9)
    assert two == ROWS[1]
    assert (three.read, three.written) == (2.5e6, 5e5)


def test_what_is_said_of_the_counts() -> None:
    said = [replace(ROWS[0], read=float(predicted(ROWS[0], H100))), *ROWS[1:2], replace(ROWS[2], read=1e6)]
    assert error(said[0], H100) == 0
    shown = lines(said, H100)
    assert shown[-1] == "1 of 3 within 10%." and "out of memory" in shown[1] and f"(+0.0%) {TILE}" in shown[0]


def test_another_number_of_kernels_is_an_error() -> None:
    with pytest.raises(AttngenError, match="counted 2 kernels"):
        counted(ROWS[:2], LOG)


def test_without_ncu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="ncu"):
        count_traffic.measured()


def test_it_is_asked_for_one_launch_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for ncu keeps what it was called with."""
    rows = json.dumps([asdict(row) for row in ROWS])
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nfor last; do :; done\ncat > \"$last\" <<'END'\n{rows}\nEND\n")
    ncu = tmp_path / "ncu"
    ncu.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\ncat > "$3" <<\'END\'\n{LOG}\nEND\n')
    for file in (python, ncu):
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(python))
    assert [row.read for row in count_traffic.measured()] == [1e9, 0.0, 2.5e6]
    called = (tmp_path / "called").read_text()
    for option in ("--profile-from-start off", "--clock-control none", "--kernel-name regex:attention_forward"):
        assert option in called


@pytest.mark.parametrize("row", [Row(**row) for row in COUNTED["problems"]], ids=lambda row: row.name)
def test_the_model_says_what_was_counted(row: Row) -> None:
    """On an H100, by hardware counters: for the tile that was launched, whichever is chosen today."""
    assert not row.problem and abs(error(row, H100)) <= CLOSE


def test_all_problems_were_counted() -> None:
    assert [row["name"] for row in COUNTED["problems"]] == [site.name for site in PROBLEMS]


@pytest.mark.parametrize("site", PROBLEMS, ids=lambda site: site.name)
def test_results_that_stay_in_the_cache_are_few(site: Site) -> None:
    cost = plan_of(site, H100).cost
    written = site.problem.heads * site.problem.rows * site.spec.value_dim * 2
    assert len(PROBLEMS) == 10 and min(written, H100.l2_bytes) < 0.1 * cost.hbm_bytes
