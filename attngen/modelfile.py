"""The user's own file as a source of a model and of inputs to trace it with. Reading the file runs it.

The convention is short, and an ordinary script nearly meets it: at module level ``model`` (an ``nn.Module`` or a
function) or ``get_model()``, and ``example_inputs`` (a tuple of arguments, one tensor, or a dict of keyword arguments)
or ``get_example_inputs()``. The file is imported, so what stands under ``if __name__ == "__main__":`` does not run.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from attngen.errors import BadModelFile

INPUTS_EXAMPLE = """\
    example_inputs = (torch.randint(0, 32000, (1, 1024)),)          # positional arguments
    example_inputs = {"input_ids": torch.randint(0, 32000, (1, 1024))}  # or keyword arguments"""


@dataclass(frozen=True)
class Example:
    """A model and one call of it."""

    path: Path
    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def opened(path: Path) -> Iterator[Example]:
    """Run the file and yield what it names. Until the end it sees its own folder and argument list, as a script would.

    Raises ``BadModelFile``.
    """
    if not path.is_file():
        raise BadModelFile(
            f"{path} {'is not a file' if path.exists() else 'does not exist'}. Give the path of a Python file."
        )
    kept_path, kept_argv = list(sys.path), sys.argv
    sys.path.insert(0, str(path.resolve().parent))
    sys.argv = [str(path)]
    try:
        yield _example(path)
    finally:
        sys.path[:], sys.argv = kept_path, kept_argv


def _example(path: Path) -> Example:
    module = _imported(path)
    model = _model(module, path)
    args, kwargs = _inputs(module, path)
    return Example(path, model, args, kwargs)


# --------------------------------------------------------------------------------------------------------------- import


def _imported(path: Path) -> ModuleType:
    """The file as a module under a private name, kept in ``sys.modules``: Dynamo looks there for a model's globals."""
    name = "_attngen_model_" + "".join(c if c.isalnum() else "_" for c in path.stem)
    loader = importlib.machinery.SourceFileLoader(name, str(path.resolve()))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _said(path, "fails to import"):
            loader.exec_module(module)
    except BadModelFile:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _said(path: Path, what: str) -> Iterator[None]:
    """Whatever the user's code raises is shown as theirs, with its line."""
    try:
        yield
    except SystemExit as ending:
        raise BadModelFile(
            f"{path} {what}: it ends the process (exit code {ending.code}), perhaps by parsing arguments.\n"
            'Put what it does as a script under: if __name__ == "__main__":'
        ) from ending
    except Exception as problem:
        raise BadModelFile(f"{path} {what}:\n\n{_own_error(problem, path)}") from problem


def _own_error(problem: Exception, path: Path) -> str:
    """The error as Python shows it, with the innermost line of the user's file and the line that raised, no others."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [n for n, frame in enumerate(frames) if Path(frame.filename) == path.resolve()]
    shown = [frames[n] for n in dict.fromkeys([own[-1], len(frames) - 1])] if own else []
    lines = [*traceback.format_list(shown), *traceback.format_exception_only(type(problem), problem)]
    return "".join(lines).rstrip()


# ---------------------------------------------------------------------------------------------------------------- names


def _model(module: ModuleType, path: Path) -> Callable[..., Any]:
    model = _named(module, path, "model")
    if model is None:
        raise BadModelFile(
            f"{path} names no model. attngen runs the file, except for what stands under"
            ' `if __name__ == "__main__":`,\n'
            f"and then looks for `model`, or calls `get_model()`. {_candidates(module)}"
        )
    if isinstance(model, type):
        raise BadModelFile(
            f"{path}: `model` is the class {model.__name__}. Make an instance:\n\n"
            f"    model = {model.__name__}().eval()\n"
        )
    if not callable(model):
        raise BadModelFile(
            f"{path}: `model` is a {type(model).__name__}, which cannot be called. It must be a module or a function."
        )
    # What torch.compile returned: attngen compiles what is inside.
    inner: Callable[..., Any] | None = getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", None))
    return model if inner is None else inner


def _inputs(module: ModuleType, path: Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    import torch

    inputs = _named(module, path, "example_inputs")
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if isinstance(inputs, Mapping):
        return (), {str(name): value for name, value in inputs.items()}
    found = "names no inputs" if inputs is None else f"has a {type(inputs).__name__} as `example_inputs`"
    raise BadModelFile(
        f"{path} {found}. attngen traces the model with `example_inputs`, or what `get_example_inputs()` returns:\n"
        f"a tuple of arguments, one tensor, or a dict of keyword arguments. For example:\n\n{INPUTS_EXAMPLE}\n"
    )


def _named(module: ModuleType, path: Path, name: str) -> Any:
    """The value under ``name``, else what ``get_<name>()`` returns, else None."""
    value = getattr(module, name, None)
    getter = getattr(module, f"get_{name}", None)
    if value is not None or not callable(getter):
        return value
    with _said(path, f"fails in get_{name}()"):
        return getter()


def _candidates(module: ModuleType) -> str:
    """What the file has that may have been meant, and the line to add."""
    from torch import nn

    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    instances = [name for name, value in own.items() if isinstance(value, nn.Module)]
    if instances:
        have = f"It has {', '.join(f'`{name}`' for name in instances)}. "
        return f"{have}Add at the top level:\n\n    model = {instances[0]}\n"
    classes = [name for name, value in own.items() if isinstance(value, type) and value.__module__ == module.__name__]
    modules = [name for name in classes if issubclass(own[name], nn.Module)]
    have = f"It defines {', '.join(modules)}, but no instance at the top level. " if modules else ""
    return f"{have}Add at the top level, for example:\n\n    model = {modules[-1] if modules else 'Net'}().eval()\n"
