"""A region of a lowered graph as PyTorch code that a person would write: one line for each node, with its source line."""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from attngen import compat
from attngen.passes import effects
from attngen.passes.extract import Region
from attngen.passes.semantics import op_name

Names = Mapping[fx.Node, str]

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "matmul": "@", "pow": "**", "__and__": "&", "__or__": "|"}
_INFIX |= {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "remainder": "%"}
_INFIX |= {"bitwise_and": "&", "bitwise_or": "|", "logical_and": "&", "logical_or": "|"}
_TRUTHS = frozenset(["logical_and", "logical_or"])  # the sign means the same on truth values alone
_PREFIX = {"neg": "-", "bitwise_not": "~"}
_DEFAULTS = ("layout", "pin_memory", "memory_format")  # left out where they say nothing
_SAME = {"lift_fresh_copy": "clone", "_unsafe_view": "view"}
LONGEST = 60  # characters of a call that is written inside another
_NO_METHOD = frozenset(["where", "mT", "T", "H", "mH", "_to_copy", "data", "real"])
RESERVED = frozenset(["torch", "attngen", "DEVICE", "attention", "inputs", "functional"])


def names_of(region: Region, wanted: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    """A name of its own for every node; the ``wanted`` one where there is one."""
    names: dict[fx.Node, str] = {}
    taken = set(RESERVED)
    for node in (*region.inputs, *region.nodes):
        name = re.sub(r"\W|^(?=\d)", "_", wanted.get(node, node.name)).strip("_") or "x"
        while name in taken or keyword.iskeyword(name):
            name = f"{name}_"
        taken.add(name)
        names[node] = name
    return names


def statements(region: Region, names: Names, line_of: Callable[[fx.Node], str]) -> list[str]:
    """The body of a function from the inputs to the outputs; a comment wherever the line of the model changes.

    A call whose value is used once, by the same line of the model, is written where it is used.
    """
    lines, current = [], ""
    shown = dict(names)
    joins = not any(effects.written(node) for node in region.nodes)
    for node in region.nodes:
        if node.target is effects.updated and node not in region.outputs:
            shown[node] = shown[node.args[0]]  # type: ignore[index]
            continue
        text, line = _call(node, shown), line_of(node)
        reader = _only_reader(node, region) if joins else None
        if reader is not None and line_of(reader) == line and len(text) < LONGEST:
            shown[node] = f"({text})" if _is_signed(node) else text
            continue
        if line and line != current:
            lines.append(f"# {line}")
            current = line
        lines.append(f"{names[node]} = {text}")
    return [*lines, f"return {', '.join(names[node] for node in region.outputs)}"]


def _only_reader(node: fx.Node, region: Region) -> fx.Node | None:
    """The one node of the region that reads ``node``, once; none if it is an output."""
    readers = [user for user in node.users if user in region.nodes]
    if len(readers) != 1 or node in region.outputs:
        return None
    (reader,) = readers
    used: list[fx.Node] = []
    fx.map_arg((reader.args, reader.kwargs), lambda n: used.append(n) if n is node else None)
    return reader if len(used) == 1 else None


# ---------------------------------------------------------------------------------------------------------------- calls


def _call(node: fx.Node, names: Names) -> str:
    if node.target is operator.getitem:
        return f"{_text(node.args[0], names)}[{node.args[1]}]"
    if node.target is effects.updated:
        return _text(node.args[0], names)
    if not isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.__module__}.{node.target.__name__}({_arguments(node.args, node.kwargs, names)})"  # type: ignore[union-attr]
    args, name = list(node.args), _schema_name(node)
    if name == "alias":
        return _text(args[0], names)
    name = _SAME.get(name, name)
    if _is_signed(node):
        left, *right = (_text(argument, names) for argument in args)
        return f"{left} {_INFIX[name]} {right[0]}" if right else f"{_PREFIX[name]}{left}"
    if node.target.namespace == "aten" and name in ("slice", "index") and (places := _places(node, names)) is not None:
        return f"{_text(args[0], names)}[{places}]"
    callee, rest = _callee(node, name, args, names)
    return f"{callee}({_arguments(rest, _said(node.kwargs), names)})"


def _schema_name(node: fx.Node) -> str:
    return str(node.target._schema.name.split("::")[1])  # type: ignore[union-attr]


def _is_signed(node: fx.Node) -> bool:
    """Written with a sign, as ``a + b`` or ``-a``."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or _said(node.kwargs):
        return False
    name = _schema_name(node)
    if name in _TRUTHS and any(a.meta["val"].dtype != torch.bool for a in node.all_input_nodes):
        return False
    return (name in _INFIX and len(node.args) == 2) or (name in _PREFIX and len(node.args) == 1)


def _callee(node: fx.Node, name: str, args: list[Any], names: Names) -> tuple[str, list[Any]]:
    """The method or function that means this operator, and the arguments left to write."""
    if node.target.namespace == "aten" and name not in _NO_METHOD:  # type: ignore[union-attr]
        if args and isinstance(args[0], fx.Node) and callable(getattr(torch.Tensor, name, None)):
            return f"{names[args[0]]}.{name}", args[1:]
        if callable(getattr(torch, name, None)):
            return f"torch.{name}", args
        if callable(getattr(functional, name, None)):
            return f"torch.nn.functional.{name}", args
    if name == "where" and len(args) == 3:
        return "torch.where", args
    return f"torch.ops.{node.target}", args


def _places(node: fx.Node, names: Names) -> str | None:
    """What stands in brackets for a slice of one dimension, or for an index by tensors."""
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    if op_name(node) == "index":
        return ", ".join(":" if place is None else _text(place, names) for place in node.args[1])  # type: ignore[union-attr]
    dim, start, end, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])  # type: ignore[misc]
    sizes = (start if start is not None else 0, end, step)
    first, last, by = (None if size is None else _number(size) for size in sizes)
    if not (isinstance(first, int) and isinstance(by, int)):
        return None
    whole = last is None or last >= 2**62
    text = f"{first or ''}:{'' if whole else last}" + (f":{by}" if by != 1 else "")
    return ", ".join([*[":"] * (dim % value.dim()), text])


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any], names: Names) -> str:
    return ", ".join([*(_text(a, names) for a in args), *(f"{key}={_text(a, names)}" for key, a in kwargs.items())])


def _said(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is so anyway."""
    said = {}
    for key, value in kwargs.items():
        usual = (None, False, torch.strided, torch.preserve_format)
        if not (key in _DEFAULTS and any(value is u for u in usual)) and not (key == "device" and value is None):
            said[key] = value
    return said


def _text(value: Any, names: Names) -> str:
    if isinstance(value, fx.Node):
        return names[value] if value in names else repr(_number(value))
    if isinstance(value, torch.device):
        return "DEVICE"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(v, names) for v in value)}]"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return repr(_number(value))
    return str(value) if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)) else repr(value)


def _number(value: Any) -> Any:
    """A size as it was while tracing."""
    known = value.meta["val"] if isinstance(value, fx.Node) else value
    return compat.hint(known) if isinstance(known, torch.SymInt) else getattr(getattr(known, "node", None), "hint", known)
