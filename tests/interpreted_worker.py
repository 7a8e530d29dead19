"""The process that measures, on a CPU: kernels run in Triton's interpreter, and times mean nothing."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from attngen.interpret import import_file
from attngen.measure import Clock
from attngen.runtime import kernel_path
from attngen.tune.worker import Machine, serve

if __name__ == "__main__":
    serve(lambda task: Machine("cpu", lambda kernel: import_file(kernel_path(kernel)).launch, Clock("cpu")))
