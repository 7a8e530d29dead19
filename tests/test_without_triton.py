"""Where Triton cannot be imported (CPU wheels, macOS) everything but kernels works, and one message says what does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BLOCKED = """
import importlib.abc, logging, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))

import torch
import attngen
logging.getLogger("attngen").addHandler(handler)

def attend(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v

def blocks(messages):
    return [m for m in messages if "Triton cannot be imported" in m]

q, k, v = (torch.randn(2, 2, 8, 16, requires_grad=True) for _ in range(3))
"""
# Each code runs in a fork of this process, which has torch and its compilers already.
FORKS = """
import json, os, traceback
import torch._inductor.compile_fx

for line in sys.stdin:
    code, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        failed = ""
        os.chdir(folder)
        os.dup2(2, 1)
        try:
            exec(code)
            assert "triton" not in sys.modules
        except BaseException:
            failed = traceback.format_exc()
        with open("failed.txt", "w") as file:
            file.write(failed)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""
Blocked = Callable[[str, Path], None]


@pytest.fixture(scope="module")
def blocked() -> Iterator[Blocked]:
    """Runs code in a process without Triton; its assertions are ours."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # with a GPU, torch itself looks for the module
    command = [sys.executable, "-c", BLOCKED + FORKS]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as server:
        assert server.stdin is not None and server.stdout is not None
        asked, answers = server.stdin, server.stdout

        def run(code: str, folder: Path) -> None:
            print(json.dumps((textwrap.dedent(code), str(folder))), file=asked, flush=True)
            assert answers.readline() == "0\n"
            assert (folder / "failed.txt").read_text() == ""

        yield run


def test_compiling_on_the_cpu_is_silent(tmp_path: Path, blocked: Blocked) -> None:
    """No kernel would run there anyway: the report has the note, the log has nothing."""
    blocked(
        """
        with attngen.record() as reports:
            run = torch.compile(attend, backend="attngen", options={"inner": "eager", "strict": True})
            y = run(q, k, v)
        torch.testing.assert_close(y, attend(q, k, v))
        theirs = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), (q, k, v)), theirs)
        assert [len(report.replaced) for report in reports] == [1]
        assert len(blocks(reports[0].notes)) == len(reports[0].notes) == 1
        assert messages == []
        """,
        tmp_path,
    )


def test_explain_says_it_once(tmp_path: Path, blocked: Blocked) -> None:
    blocked(
        """
        def twice(q, k, v):
            y = attend(q, k, v)
            torch._dynamo.graph_break()
            return attend(y, k, v)

        report = attngen.explain(twice, q, k, v, options={"target": "h200"})
        assert len(report.replaced) == 2 and report.device == "NVIDIA H200"
        assert str(report).count("Triton cannot be imported") == 1
        assert messages == []
        """,
        tmp_path,
    )


def test_where_a_kernel_would_have_run_it_is_said_once_and_done_block_by_block(tmp_path: Path, blocked: Blocked) -> None:
    """What the GPU would call: two operators, one warning."""
    blocked(
        """
        from attngen import runtime, prepare
        from attngen.device import DEVICES
        from attngen.pipeline import optimize
        from attngen.options import parse
        for scale in (0.25, 0.5):
            graph = torch.fx.symbolic_trace(lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) * scale, -1) @ v)
            with torch.no_grad():
                _, (use,) = optimize(graph, (q, k, v), parse({"strict": True}))
                assert prepare.begin([use], DEVICES["h200"]).compilation is None
                call = runtime._by_kernel(use.kernel.spec, use.kernel)
                for _ in range(2):
                    out = call(q, k.transpose(-1, -2), v)
                    torch.testing.assert_close(out, torch.softmax(q @ k.transpose(-1, -2) * scale, -1) @ v)
        ((level, message),) = messages
        assert level == "WARNING" and "Triton cannot be imported" in message and "block by block" in message
        """,
        tmp_path,
    )


def test_optimize_writes_kernels(tmp_path: Path, blocked: Blocked) -> None:
    """The command plans and emits, and says why it left out the two other steps."""
    (tmp_path / "model.py").write_text(
        "import torch\nq = torch.randn(2, 2, 8, 16)\nexample_inputs = (q, q, q)\n"
        "class Attend(torch.nn.Module):\n"
        "    def forward(self, q, k, v):\n"
        "        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v\n"
        "model = Attend()\n"
    )
    blocked(
        """
        from typer.testing import CliRunner
        from attngen.cli import app
        done = CliRunner().invoke(app, ["optimize", "model.py", "-o", "out"])
        assert done.exit_code == 0, done.output
        assert done.output.count("Not compiled ahead of time") == done.output.count("Not verified") == 1
        import pathlib
        (kernel,) = pathlib.Path("out/kernels").glob("*.py")
        assert "import triton" in kernel.read_text()
        """,
        tmp_path,
    )


def test_the_rest_is_compiled_by_inductor(tmp_path: Path, blocked: Blocked) -> None:
    blocked(
        """
        run = torch.compile(attend, backend="attngen", options={"strict": True})
        with torch.no_grad():
            torch.testing.assert_close(run(q, k, v), attend(q, k, v))
        assert messages == []
        """,
        tmp_path,
    )
