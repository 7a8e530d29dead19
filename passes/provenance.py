"""Where a captured node came from: module path, file, line and code, as a person would look them up."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attngen.algebra import Load
from attngen.passes.dropout import Seed
from attngen.passes.lower import Lowered
from attngen.passes.semantics import op_name
from attngen.passes.specialise import Binding, Number, Table
from attngen.passes.views import VIEWS

_ROOT = re.compile(r"^(?:L|G)\['[^']*'\](?:\[\d+\])?\.?")
_MODULES = re.compile(r"_modules\['([^']*)'\]|\['([^']*)'\]")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)[^\n]*(?:\n +(?!File)(?P<code>\S[^\n]*))?')
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Place:
    """``module`` is the path of the module that runs there; ``code`` is the text of the line. Each may be unknown."""

    module: str = ""
    file: str = ""
    line: int = 0
    code: str = ""

    @property
    def short(self) -> str:
        """``modeling_llama.py:197``"""
        return f"{Path(self.file).name}:{self.line}" if self.file else ""


def place(node: fx.Node) -> Place:
    """The line of the model that ``node`` belongs to.

    That is the innermost one in the file that defines the module: helpers that many models share (and torch's own
    layers) lie deeper, and would name the same line for each.
    """
    home = _home(node)
    frames = _frames(node)
    return _placed(node, [frame for frame in frames if frame["file"] == home] or frames)


def exact_place(node: fx.Node) -> Place:
    """The very line that computes ``node``, in whatever file outside torch."""
    return _placed(node, _frames(node))


def _frames(node: fx.Node) -> list[dict[str, str]]:
    frames = [match.groupdict() for match in _FRAME.finditer(node.meta.get("stack_trace") or "")]
    return [frame for frame in frames if not frame["file"].startswith(_TORCH)] or frames


def _placed(node: fx.Node, frames: list[dict[str, str]]) -> Place:
    if not frames:
        return Place(module_path(node))
    return Place(module_path(node), frames[-1]["file"], int(frames[-1]["line"]), frames[-1]["code"] or "")


def module_path(node: fx.Node) -> str:
    """``layers.0.self_attn``; empty for code outside any module."""
    stack = _stack(node)
    if not stack:
        return ""
    path = _ROOT.sub("", str(stack[-1][0]))
    path = _MODULES.sub(lambda m: m.group(1) or m.group(2), path)
    return path.removeprefix("_orig_mod.").removeprefix("_orig_mod").strip(".")


def where(node: fx.Node) -> str:
    """Module path and source line; the node's name where neither is known."""
    here = place(node)
    if here.module and here.short:
        return f"{here.module} ({here.short})"
    return here.module or here.short or node.name


def made(binding: Binding, lowered: Lowered) -> str:
    """What a tensor is that a kernel loads: a parameter or an input by name, else the line that computes it."""
    if isinstance(binding, Seed):
        return "a number that is drawn for each run"
    if isinstance(binding, Number):
        given = binding.given(lowered.graph)
        return f"the number {made(given, lowered) if given is not None else binding.symbol}"
    if isinstance(binding, Table):
        sources = dict.fromkeys(load.source for load in binding.expr.walk() if isinstance(load, Load))
        known = [made(source, lowered) for source in sources if isinstance(source, fx.Node)]
        return f"a table of {' and '.join(known)}" if known else "a table"
    while op_name(binding) in VIEWS:  # what only rearranges it says little
        binding = binding.all_input_nodes[0]
    node = next(iter(lowered.origins.get(binding, [])), None) or lowered.parent(binding) or binding
    if node.op == "placeholder":
        return _named(node)
    at = exact_place(node)
    return f"{at.short}  {at.code}".rstrip() if at.short else node.name


def _named(placeholder: fx.Node) -> str:
    """The path of a parameter, or the name of an argument."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = getattr(source, "name", "")
    name = name() if callable(name) else name
    name = _ROOT.sub("", name) if name.startswith("L['self']") else re.sub(r"^[LG]\['[^']*'\]\['([^']*)'\]$", r"\1", name)
    name = re.sub(r"^[LG]\['([^']*)'\]$", r"\1", name)
    parts = re.findall(r"_(?:modules|parameters|buffers)\['([^']*)'\]", name)
    return ".".join(parts) or name or placeholder.name


def _stack(node: fx.Node) -> list[tuple[Any, ...]]:
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values()) if isinstance(stack, dict) else []


def _home(node: fx.Node) -> str:
    """The file that defines the class of the innermost module, if it is not one of torch's."""
    stack = _stack(node)
    defined = getattr(stack[-1][1], "__module__", "") if stack else ""
    file = getattr(sys.modules.get(defined), "__file__", None) or ""
    return "" if file.startswith(_TORCH) else file
