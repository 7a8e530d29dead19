"""Shared fixtures: golden files, the GPU marker, and the error budget."""

from __future__ import annotations

import gc
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before numpy and torch are there: workers have a processor each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before torch is there: Inductor compiles a file for each kind of vectors to see whether it can, and C++ with them takes
# longer; Dynamo looks for garbage after each graph.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

import forked
import pytest
import recording
import torch

from attngen import verify

GOLDEN = Path(__file__).parent / "golden"
# Files that take longest begin first, so that no worker is left alone with one of them at the end.
LONG = ("aot", "backend", "coverage", "detect_dynamic", "fuzz", "hopper_backward_binaries", "hopper_binaries", "inductor")
LONG += ("training", "training_parallel", "zoo_kernels")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew instead of comparing")
    parser.addoption("--record", type=Path, metavar="FILE", help="add how many tests of each file passed to this record")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["ATTNGEN_CACHE"] = "skip"  # what has been tuned on this machine decides nothing here
    # pytest listens to each logger that does not propagate. Listened to, this one writes down all graphs that are compiled.
    logging.getLogger("torch.__trace").propagate = True
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")
    path = config.getoption("--record")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(recording.Recorder(path))


def pytest_collection_finish() -> None:
    """Garbage is looked for seldom, which took a sixth of the time: libraries and tests are most of what there is."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else extension modules complain of what is never freed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def forked_interpreter() -> Iterator[None]:
    """One process for all kernels that are interpreted; the child process of users is started by the command line's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_interpret", forked.interpret)
        yield


@pytest.fixture(scope="session")
def asked(request: pytest.FixtureRequest) -> Callable[[str, str], list[dict[str, Any]]]:
    """The parameters that a test function of a module will run with: what is made once for all of them is made for those."""

    def parameters(module: str, name: str) -> list[dict[str, Any]]:
        functions = [item for item in request.session.items if isinstance(item, pytest.Function)]
        return [item.callspec.params for item in functions if (item.module.__name__, item.originalname) == (module, name)]

    return parameters


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compare a text with this test's file under ``tests/golden/``; ``--update-golden`` accepts the text."""
    name = re.sub(r"[^\w.-]+", "_", request.node.name.removeprefix("test_")).strip("_")
    path = GOLDEN / f"{name}.txt"

    def compare(text: str) -> None:
        if request.config.getoption("--update-golden"):
            GOLDEN.mkdir(exist_ok=True)
            path.write_text(text)
        elif not path.exists():
            pytest.fail(f"{path} is missing: run this test with --update-golden, read what it wrote, and commit it")
        assert text == path.read_text()

    return compare
