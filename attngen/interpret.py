"""The child process that runs emitted kernels without a GPU: ``python -m attngen.interpret FOLDER``.

Plain Triton runs in Triton's interpreter, Gluon, which has none, in the simulator.

For every ``N.py`` of the folder it calls ``launch`` on the tensors of ``N.in.pt`` and writes ``N.out.pt``, or one line
in ``N.error``; ``again/N.py`` is the kernel that it leaves rows to, if there is one. A process of its own, because
``TRITON_INTERPRET=1`` decides what ``triton.jit`` makes when a kernel is imported, and because a parent can stop it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from attngen.simulator import simulated

AGAIN = "again"


def import_file(path: Path) -> ModuleType:
    """The module in ``path``, imported under the name of the file and kept out of ``sys.modules``."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _runnable(source: Path) -> ModuleType:
    text = source.read_text()
    return simulated(text) if "gluon" in text else import_file(source)


def _in_half(launch: Callable[..., Any]) -> Callable[..., None]:
    """``launch`` of a portable kernel with float16 for bfloat16, whose products the interpreter gets wrong."""

    def half(x: Any) -> Any:
        return x.half() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x

    def run(*args: Any, into: Sequence[torch.Tensor], **options: Any) -> None:
        made = tuple(map(half, into))
        launch(*map(half, args), into=made, **options)
        for x, y in zip(into, made, strict=True):
            x.copy_(y)

    return run


def main(folder: Path) -> None:
    for source in sorted(folder.glob("*.py"), key=lambda path: int(path.stem)):
        try:
            inputs = torch.load(source.with_suffix(".in.pt"), weights_only=True)
            other = source.parent / AGAIN / source.name
            again = {"again": _in_half(import_file(other).launch)} if other.exists() else {}
            result = _runnable(source).launch(*inputs, **again)
            outputs = [result] if isinstance(result, torch.Tensor) else list(result)
            torch.save(outputs, source.with_suffix(".out.pt"))
        except Exception as error:  # whatever it raises is the answer for this kernel
            message = " ".join(str(error).split())
            source.with_suffix(".error").write_text(f"{type(error).__name__}: {message}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
