"""What ``pytest --record`` adds up, and how a file of records grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recording import Recorder, merged

TESTS = """
import pytest

def test_right(): pass
def test_wrong(): assert False
@pytest.fixture
def broken(): raise OSError
def test_not_reached(broken): pass
@pytest.mark.skip
def test_left_out(): pass
"""


def run_of(device: str, **passed: int) -> dict[str, Any]:
    return {"device": device, "versions": {"torch": "2"}, "files": {name: {"passed": n} for name, n in passed.items()}}


def test_each_outcome_is_counted_once(tmp_path: Path) -> None:
    path, source = tmp_path / "runs.json", tmp_path / "test_some.py"
    source.write_text(TESTS)
    for _ in range(2):  # the second run replaces the first
        pytest.main(["-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(source)], plugins=[Recorder(path)])
    (run,) = json.loads(path.read_text())
    counts = {"passed": 1, "failed": 2, "skipped": 1, "failures": ["test_wrong", "test_not_reached"]}
    assert run["files"] == {"test_some.py": counts} and {"python", "torch"} <= run["versions"].keys()


def test_a_run_replaces_what_its_files_had_on_the_same_device() -> None:
    runs = [run_of("one", a=1, b=2), run_of("other", a=3)]
    again = merged(runs, run_of("one", b=5, c=6))
    assert again == [run_of("one", a=1, b=5, c=6), run_of("other", a=3)]
    assert merged(runs, run_of("third", a=7))[2] == run_of("third", a=7) and len(runs) == 2
