"""The project itself: lint, types, direction of imports, packaging, and that README's tables come from recorded data."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ruff() -> None:
    run(PYTHON, "-m", "ruff", "check", ".")


def test_mypy(tmp_path: Path) -> None:
    """Strict, on the package as it is installed: type checkers do not follow the mapping of an editable install."""
    shutil.copytree(ROOT / "attngen", tmp_path / "attngen", ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("passes", "templates"):
        shutil.copytree(ROOT / part, tmp_path / "attngen" / part, ignore=shutil.ignore_patterns("__pycache__"))
    run(PYTHON, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "attngen", cwd=tmp_path)


# Each group may import from its own and from groups before it.
LAYERS = (
    {"errors", "paths", "compat", "index", "philox", "device", "measure", "barriers", "proxies", "registers", "processes"},
    {"algebra", "text", "evaluate", "abbreviate"},
    {"guards", "renormaliser", "normaliser", "spec", "inequalities", "mask", "naming", "parcel"},
    {"printer", "work", "formulas", "blockwise", "layout", "simulator", "gluon"},
    {"boxes", "bounds", "scores", "lost", "dropped", "fp8", "adjoint"},
    {"formulas_hopper", "formulas_bwd", "formulas_hopper_bwd"},
    {"finder"},
    {"portable", "hopper", "gradient", "sides", "words", "portable_bwd", "pairs_bwd", "hopper_bwd"},
    {"emit", "cost"},
    {"choose", "choose_bwd", "interpret"},
    {"verify", "verify_bwd", "aot", "runtime", "plan", "checkpoints", "report", "advice", "sample", "tuned"},
    {"cache"},
    {"prepare", "options", "decide"},
    {"tune"},
    {"passes"},
    {"candidates"},
    {"describe"},
    {"pipeline"},
    {"backend", "capture"},
    {"trial", "output", "modelfile"},
    {"info", "show"},
    {"page"},
    {"stages", "minify", "bench"},
    {"commands"},
    {"cli_cache", "cli_tune"},
    {"cli", "__init__"},
)


def imports_of(path: Path) -> set[str]:
    """The modules of attngen that a file imports at its top level, by first name."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "attngen":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("attngen."):
            found.add((node.module or "").split(".")[1])
    return found


MODULES = sorted([*(ROOT / "attngen").glob("*.py"), *(ROOT / "attngen").glob("*/*.py")])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "attngen").with_suffix("")))
def test_imports_go_one_way(path: Path) -> None:
    level = {name: rank for rank, names in enumerate(LAYERS) for name in names}
    name = path.relative_to(ROOT / "attngen").parts[0].removesuffix(".py")
    assert name in level, "add the module to LAYERS"
    wrong = {other for other in imports_of(path) if level.get(other, -1) > level[name]}
    assert not wrong


def test_passes_know_nothing_of_kernels() -> None:
    allowed = set().union(*LAYERS[:3])
    for path in (ROOT / "passes").glob("*.py"):
        assert imports_of(path) <= allowed | {"passes"}, path.name


def test_wheel_holds_passes_and_templates(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    run(PYTHON, *command, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    templates = [f"templates/{name}" for name in ("portable_fwd.py.jinja", "hopper_fwd.py.jinja", "recorded.py.jinja")]
    chosen = ("bench/peers.py", "cache/store.py", "tuned/h200.json", "page/page.html.jinja", "py.typed")
    for name in ("passes/detect.py", *templates, *chosen):
        assert f"attngen/{name}" in names
    assert not any(name.startswith(("passes/", "templates/", "tests/", "examples/")) for name in names)


def test_readme_tables_are_the_recorded_data() -> None:
    """``python examples/tables.py`` writes them."""
    sys.path.insert(0, str(ROOT / "examples"))
    import tables

    readme = (ROOT / "README.md").read_text()
    assert readme == tables.updated(readme)


def test_heavy_libraries_are_imported_late() -> None:
    heavy = "torch triton sympy transformers matplotlib"
    code = f"import attngen.cli, sys; print([m for m in {heavy.split()!r} if m in sys.modules])"
    assert run(PYTHON, "-c", code).strip() == "[]"
