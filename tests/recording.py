"""``pytest --record FILE``: how many tests of each file passed, on which device and with which versions, for the record.

A file of records holds one entry for each device and set of versions. What is run there again replaces what its test files
had; a run that is cut off says so by tests that are missing from it.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

PACKAGES = ("torch", "triton", "transformers")
OUTCOMES = ("passed", "failed", "skipped")


class Recorder:
    """Counts reports where they all arrive: in the one process, or in the one that others report to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, Counter[str]] = {}
        self.names: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = Path(report.nodeid.partition("::")[0]).name
        if report.when == "call" or report.outcome != "passed":
            self.files.setdefault(file, Counter())[report.outcome] += 1
        if report.failed:
            self.names.setdefault(file, []).append(report.nodeid.partition("::")[2])

    def pytest_sessionfinish(self) -> None:
        runs = json.loads(self.path.read_text()) if self.path.exists() else []
        self.path.write_text(json.dumps(merged(runs, self.run()), indent=1) + "\n")

    def run(self) -> dict[str, Any]:
        versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
        files = {name: {key: counts[key] for key in OUTCOMES} for name, counts in sorted(self.files.items())}
        for name, failed in self.names.items():
            files[name]["failures"] = failed
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        return {"device": device, "versions": versions, "files": files}


def merged(runs: list[dict[str, Any]], run: dict[str, Any]) -> list[dict[str, Any]]:
    """``runs`` with ``run`` in them: what the same device and versions had of other files stays."""
    key = (run["device"], run["versions"])
    before = next((known for known in runs if (known["device"], known["versions"]) == key), None)
    if before is None:
        return [*runs, run]
    whole = {**run, "files": dict(sorted({**before["files"], **run["files"]}.items()))}
    return [whole if known is before else known for known in runs]
