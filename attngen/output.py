"""The directory that ``attngen optimize`` writes: kernels, plan, report, page and loader; all of it or nothing.

It is staged in a directory inside the one to fill, which shows before any work that it can be written, and moved into
place at the end, the plan last: whatever happens, the plan that is there names what is there.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from attngen import paths
from attngen.errors import CannotWrite

PLAN, REPORT, PAGE, LOADER, KERNELS = "plan.json", "report.json", "report.html", "load.py", "kernels"
STAGE = ".attngen-"
SCRIPT = "Cut out by attngen"  # stands in every script of ``attngen minify``

LOADER_TEXT = '''\
"""The choices attngen made for {model}, planned for {device}. They are in plan.json, beside this file:

    from load import compiled

    fast = compiled(model)
"""

from pathlib import Path

import attngen
import torch


def compiled(model):
    return torch.compile(model, backend=attngen.load(Path(__file__).parent))
'''


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A place to write files for ``folder``. They move there if the block ends well; otherwise nothing stays.

    Raises ``CannotWrite``, before the block if that can be known.
    """
    _refuse_foreign(folder)
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=folder))
    try:
        yield stage
        with _writing(folder):
            _move(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        with suppress(OSError):  # the first that holds something ends it
            for each in missing:
                each.rmdir()


def write(
    stage: Path, model: str, device: str, plan: str, report: str, page: str, kernels: Sequence[tuple[str, str]]
) -> None:
    """Fill a stage: ``plan`` and ``report`` as JSON, the report as a ``page`` too, ``kernels`` as (name, source)."""
    with _writing(stage.parent):
        (stage / KERNELS).mkdir()
        for name, source in kernels:
            (stage / KERNELS / f"{name}.py").write_text(source)
        (stage / REPORT).write_text(report + "\n")
        (stage / PAGE).write_text(page, encoding="utf-8")
        (stage / LOADER).write_text(LOADER_TEXT.format(model=model, device=device))
        (stage / PLAN).write_text(plan + "\n")


def named(model: str, site: str) -> Path:
    """``model_layers.0.attn.py``"""
    return Path(f"{model}_{re.sub(r'[^A-Za-z0-9_.-]+', '_', site).strip('_.')}.py")


def refuse_foreign_script(file: Path) -> None:
    """A script of somebody else is not overwritten. Raises ``CannotWrite``."""
    with _writing(file):
        if file.exists() and SCRIPT not in file.read_text(errors="replace"):
            raise CannotWrite(f"{file} exists and was not written by attngen minify. Choose another file with -o.")


def write_script(file: Path, text: str) -> None:
    with _writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def refuse_bad_cache() -> None:
    """Kernels are kept in the cache directory too. Raises ``CannotWrite`` if they cannot be."""
    try:
        with tempfile.TemporaryFile(dir=paths.cache_dir()):
            pass
    except OSError as problem:
        raise CannotWrite(
            f"the cache directory cannot be written: {problem.strerror or problem} ({problem.filename}). "
            "Name another in the environment variable ATTNGEN_CACHE_DIR."
        ) from problem


def _move(stage: Path, folder: Path) -> None:
    (folder / KERNELS).mkdir(exist_ok=True)
    fresh = {source.name for source in (stage / KERNELS).iterdir()}
    for name in fresh:
        os.replace(stage / KERNELS / name, folder / KERNELS / name)
    for name in (REPORT, PAGE, LOADER, PLAN):
        os.replace(stage / name, folder / name)
    for old in (folder / KERNELS).glob("fwd_*.py"):
        if old.name not in fresh:
            old.unlink()


def _refuse_foreign(folder: Path) -> None:
    """A directory with other things in it is not filled: ``-o .`` must not overwrite somebody's ``load.py``."""
    if not folder.is_dir():
        return
    with _writing(folder):
        held = [each.name for each in folder.iterdir() if not each.name.startswith(STAGE)]
    if held and PLAN not in held:
        raise CannotWrite(
            f"{folder} is not empty and was not written by attngen (no {PLAN}). Choose another directory with -o."
        )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise CannotWrite(f"{folder} cannot be written: {problem.strerror or problem}. Choose another with -o.") from problem
