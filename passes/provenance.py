"""Where a captured node came from: module path and source line, as a person would write them."""

from __future__ import annotations

import re

from torch import fx

_ROOT = re.compile(r"^(?:L|G)\['[^']*'\](?:\[\d+\])?\.?")
_MODULES = re.compile(r"_modules\['([^']*)'\]|\['([^']*)'\]")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def module_path(node: fx.Node) -> str:
    """``layers.0.self_attn``; empty for code outside any module."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()] if isinstance(stack, dict) else []
    if not paths:
        return ""
    path = _ROOT.sub("", str(paths[-1]))
    path = _MODULES.sub(lambda m: m.group(1) or m.group(2), path)
    return path.removeprefix("_orig_mod.").removeprefix("_orig_mod").strip(".")


def source_line(node: fx.Node) -> str:
    """``modeling_llama.py:197``: the innermost line of the model that made the node."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    file, line = frames[-1]
    return f"{file.rsplit('/', 1)[-1]}:{line}"


def where(node: fx.Node) -> str:
    """Module path and source line; the node's name where neither is known."""
    path, line = module_path(node), source_line(node)
    if path and line:
        return f"{path} ({line})"
    return path or line or node.name
