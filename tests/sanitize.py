"""Every golden kernel under compute-sanitizer: accesses out of bounds, and hazards between threads that share memory.

    python tests/sanitize.py run --out FILE    all of them at ragged lengths, one tool after the other; needs a GPU
    python tests/sanitize.py kernels           what runs below the sanitizer

What the sanitizer says is told apart by the names that are printed before each launch. Tensors lie apart (PyTorch's allocator
would put one behind the other, where an access too far goes unnoticed), and kernels are compiled before.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from specs import BY_NAME, Case
from test_backward import REVIEWED as BACKWARD
from test_backward import backward
from test_emit import HOPPER_REVIEWED, REVIEWED, emitted
from test_hopper_backward import kernel_of

from attngen import verify, verify_bwd
from attngen.emit import BackwardKernel, Kernel
from attngen.interpret import import_file
from attngen.spec import Tile

TOOLS = ("memcheck", "racecheck")
ROWS = (1, 77, 300)
TILES = (Tile(64, 64, 4, 2), Tile(64, 32, 8, 2))
ALONE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
MARK = "== kernel "
SAID = re.compile(r"========= (?!COMPUTE-SANITIZER)(?!\w+ SUMMARY)(\S.*)")
OTHER_ACCESS = re.compile(r"=========\s+(and \w+ access at .*)")  # of a race, on lines of their own, each with its hazards


def kernels() -> dict[str, tuple[Kernel | BackwardKernel, Case]]:
    """By the name of the golden file, and those of gradients by warpgroups, which have none."""
    forward = {case.name: (emitted(case), case) for case in (*(BY_NAME[name] for name in REVIEWED), *HOPPER_REVIEWED)}
    portable = {f"backward_{name}": (backward(BY_NAME[name], TILES), BY_NAME[name]) for name in BACKWARD}
    case = HOPPER_REVIEWED[0]
    return {**forward, **portable, "backward_hopper_causal": (kernel_of(case.spec), case)}


def launches(device: str) -> Iterator[tuple[str, list[Any], Any]]:
    """Each kernel at each length: its name, what it is launched with, and its module."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (kernel, case) in kernels().items():
            path = Path(folder) / f"{kernel.name}.py"
            path.write_text(kernel.source)
            module = import_file(path)
            for rows in ROWS:
                yield f"{name} {rows}", _arguments(kernel, case, rows, device), module


def _arguments(kernel: Kernel | BackwardKernel, case: Case, rows: int, device: str) -> list[Any]:
    problem = case.problem(rows)
    if isinstance(kernel, Kernel):
        return verify.samples_for(kernel, problem, device=device)
    at = verify_bwd.sample(replace(case.spec, lse=True), problem, device=device)
    return list(replace(at, extras=kernel.family == "portable").arguments)


def findings(text: str) -> dict[str, list[str]]:
    """What the sanitizer said, by the launch that it said it of. A race is one finding, with all accesses that take part."""
    found: dict[str, list[str]] = {}
    at = "before any kernel"
    for line in text.splitlines():
        if line.startswith(MARK):
            at = line.removeprefix(MARK)
        elif said := SAID.match(line):
            found.setdefault(at, []).append(said.group(1))
        elif other := OTHER_ACCESS.match(line):
            *before, race = found.get(at) or [""]
            found[at] = [*before, f"{race} {other.group(1)}".lstrip()]
    return found


def run(out: Path) -> None:
    command = [sys.executable, __file__, "kernels"]
    compiled = subprocess.run(command, capture_output=True, text=True, check=True)  # by this process's environment
    count = compiled.stdout.count(MARK)
    record: dict[str, Any] = {"launches": count, "torch": torch.__version__, "device": torch.cuda.get_device_name()}
    for tool in TOOLS:
        checked = ["compute-sanitizer", "--tool", tool, *command]
        child = subprocess.run(checked, capture_output=True, text=True, check=False, env={**os.environ, **ALONE})
        done = child.stdout.count(MARK)
        record[tool] = {"launches": done, "ended with": child.returncode, "findings": findings(child.stdout)}
        print(f"{tool}: {done} of {count} launches, {len(record[tool]['findings'])} with findings", flush=True)
        out.write_text(json.dumps(record, indent=1))


def launch_all() -> None:
    for name, arguments, module in launches("cuda"):
        print(f"{MARK}{name}", flush=True)
        assert module.launch(*arguments) is not None, f"{name} is not launched"
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("--out", type=Path, required=True)
    commands.add_parser("kernels")
    given = parser.parse_args()
    if given.command == "run":
        run(given.out)
    else:
        launch_all()


if __name__ == "__main__":
    main()
