"""What the tests of the tuner share: a process that only says that it measures."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parent


def fake(folder: Path, *kinds: str) -> list[str]:
    marks = folder / "marks"
    marks.mkdir(exist_ok=True)
    return [sys.executable, str(TESTS / "fake_worker.py"), str(marks), *kinds]
