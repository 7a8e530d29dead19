"""The sweep's process that measures, on a CPU: kernels run in Triton's interpreter, and times mean nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import sweep_worker

from attngen.interpret import import_file
from attngen.measure import Clock
from attngen.runtime import kernel_path
from attngen.tune.worker import Machine, serve

if __name__ == "__main__":
    machine = Machine("cpu", lambda kernel: import_file(kernel_path(kernel)).launch, Clock("cpu"))
    serve(lambda task: machine, sweep_worker.work)
