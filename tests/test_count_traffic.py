"""Counted traffic: what ncu writes is read, and the problems are such that a cache hides little of them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import count_traffic
import pytest
from count_traffic import PROBLEMS, Row, counted, lines, plan_of
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
ROWS = [Row("one", "tile", 1_000_000_000), Row("two", problem="out of memory"), Row("three", "tile", 3_000_000)]


def test_counts_belong_to_what_was_launched() -> None:
    one, two, three = counted(ROWS, LOG)
    assert (one.read, one.written, one.error) == (1e9, 25e7, pytest.approx(-0.2))
    assert two == ROWS[1]
    assert (three.read, three.written, three.error) == (2.5e6, 5e5, 0.0)
    assert lines([one, two, three])[-1] == "1 of 3 within 10%." and "out of memory" in lines([one, two, three])[1]


def test_another_number_of_kernels_is_an_error() -> None:
    with pytest.raises(AttngenError, match="counted 2 kernels"):
        counted(ROWS[:2], LOG)


def test_without_ncu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="ncu"):
        count_traffic.measured()


def test_it_is_asked_for_one_launch_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for ncu keeps what it was called with."""
    rows = json.dumps([{"name": row.name, "predicted": row.predicted, "problem": row.problem} for row in ROWS])
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


@pytest.mark.parametrize("site", PROBLEMS, ids=lambda site: site.name)
def test_results_that_stay_in_the_cache_are_few(site: Site) -> None:
    device = DEVICES["h100"]
    cost = plan_of(site, device).cost
    written = site.problem.heads * site.problem.rows * site.spec.value_dim * 2
    assert len(PROBLEMS) == 10 and min(written, device.l2_bytes) < 0.1 * cost.hbm_bytes
