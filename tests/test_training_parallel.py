"""Training on two ranks, data parallel and sharded: processes on the CPU, and two GPUs where there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo"
)

SCRIPT = Path(__file__).parent.parent / "examples" / "training_parallel.py"
SMALLEST_BUCKET = "1"  # so that Dynamo cuts the graph of a small model too


def trained(folder: Path, *options: str, gpu: bool = False) -> dict[tuple[str, float], dict[str, Any]]:
    """The results by kind of parallelism and dropout of a run of the example in processes of its own."""
    out = folder / "out.json"
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    given = ["--ranks", "2", "--size", "tiny", "--bucket-mb", SMALLEST_BUCKET, "--out", str(out), *options]
    command = [sys.executable, str(SCRIPT), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, **hidden})
    assert out.exists(), done.stdout + done.stderr
    return {(result["parallel"], result["dropout"]): result for result in json.loads(out.read_text())["results"]}


def check(results: dict[tuple[str, float], dict[str, Any]], tolerance: float) -> None:
    """Eager's curve; with dropout no further away than that may take it."""
    for (parallel, dropped), result in results.items():
        ours = result["curves"]["attngen"]
        assert result["replaced"] and not result["missed"], result["missed"]
        assert result["graphs"] > (1 if parallel == "ddp" else 0)
        assert sum(ours[-4:]) < sum(ours[:4])
        assert result["difference"]["mean"] < (0.2 if dropped else tolerance)


def test_two_processes(tmp_path: Path) -> None:
    """The second run does what the first was not asked for, and only that."""
    given = ("--steps", "8", "--inner", "eager", "--dropout", "0.0")
    first = trained(tmp_path, *given, "--parallel", "ddp")
    marked = json.loads((tmp_path / "out.json").read_text())
    marked["results"][0]["seen"] = True
    (tmp_path / "out.json").write_text(json.dumps(marked))
    results = trained(tmp_path, *given)
    assert len(first) == 1 and len(results) == 2
    assert [result.get("seen", False) for result in results.values()] == [True, False]
    check(results, 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path: Path) -> None:
    results = trained(tmp_path, "--steps", "30", "--dropout", "0.0,0.1", gpu=True)
    assert len(results) == 4
    check(results, 0.03)
