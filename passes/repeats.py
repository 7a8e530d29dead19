"""Trace an operator once: where it is met again on tensors of the same kind, what it was traced into is copied.

Models repeat their layers, and tracing an operator costs many times what copying the nodes does. Everything that tracing may
depend on is part of the key: the operator, its arguments, of each tensor its kind, which of them are one and which share
memory, and the modes that are on. Copies stand in memory of their own, as if they had been traced: see ``passes.memory``.

The result of a copy is no tensor but a record of one; a tensor is made of it when an operator is traced that reads it.
What cannot be copied faithfully is traced each time: sizes that are symbols, tensors of other types, literals.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

from attngen import compat
from attngen.passes.memory import MEMORY, Memory

_CONSTANTS = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None), type(...))


class Kind(NamedTuple):
    """Everything about a tensor that tracing can see, but which one it is."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


@dataclass(eq=False)
class Copied:
    """The result of a copied ``node``. ``tensor``: the one that was made of it, if any; it is followed from then on."""

    node: fx.Node
    kind: Kind
    memory: Memory
    tensor: torch.Tensor | None = None


@dataclass(frozen=True)
class Call:
    """A captured node as it is about to be traced. ``inputs``: its distinct tensors, ``nodes`` what they are traced as."""

    key: Hashable
    inputs: tuple[torch.Tensor | Copied, ...]
    nodes: tuple[fx.Node, ...]
    kinds: tuple[Kind, ...]


class _Old(NamedTuple):
    """An input of the call, by number."""

    number: int


class _New(NamedTuple):
    """A result that the call makes, by number."""

    number: int


class _Result(NamedTuple):
    """A tensor that the call makes. ``node``: which of the nodes it is traced as; ``memory``: see ``_Traced``."""

    node: int
    kind: Kind
    memory: int


@dataclass(frozen=True)
class _Traced:
    """What a call was traced into: ``nodes``, which read its ``inputs`` and each other.

    ``memories``: for each node the number of the input whose memory its value is in, or, from -1 down, of new memory, with
    ``sizes`` in bytes. ``moved``: inputs that stand for one of the nodes after the call (written in place), with its number.
    """

    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    memories: tuple[int | None, ...]
    sizes: tuple[int, ...]
    results: tuple[_Result, ...]
    result: Any
    moved: tuple[tuple[int, int], ...]


class CannotCopy(Exception):
    """A tensor cannot be made of a record: everything has to be traced."""


class _Unfit(Exception):
    """This call has to be traced."""


class Repeats:
    """What was traced so far, by call."""

    def __init__(self) -> None:
        self._traced: dict[Hashable, _Traced] = {}

    def call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Call | None:
        """The captured ``node`` as a call, or None if it has to be traced each time."""
        if node.op not in ("call_function", "call_method") or not _is_plain(node.target):
            return None
        found: dict[int, torch.Tensor | Copied] = {}
        try:
            arguments = _frozen((node.args, node.kwargs), env, found)
            inputs = tuple(found.values())
            with torch._C.DisableTorchFunction():
                kinds = tuple(map(_kind, inputs))
                memories = [_number(x) for x in inputs]
            nodes = tuple(map(_traced_as, inputs))
        except _Unfit:
            return None
        if not inputs or len(set(nodes)) < len(nodes):
            return None
        shared = tuple(map(memories.index, memories))
        return Call((node.op, node.target, arguments, kinds, shared, _modes()), inputs, nodes, kinds)

    def copy(self, call: Call, graph: fx.Graph) -> tuple[bool, Any]:
        """Whether the call was traced before, and if so the result of a copy of that at the end of ``graph``."""
        known = self._traced.get(call.key)
        if known is None:
            return False, None
        memories = [Memory(size) for size in known.sizes]

        def memory(number: int) -> Memory:
            return memories[-1 - number] if number < 0 else _memory(call.inputs[number])

        new = dict(zip(known.inputs, call.nodes, strict=True))
        for node, number in zip(known.nodes, known.memories, strict=True):
            new[node] = graph.node_copy(node, new.__getitem__)
            new[node].meta = {"val": node.meta["val"]}
            if number is not None:
                new[node].meta[MEMORY] = memory(number)
        made = [Copied(new[known.nodes[each.node]], each.kind, memory(each.memory)) for each in known.results]
        for index, position in known.moved:
            _move(call.inputs[index], new[known.nodes[position]])

        def result(leaf: _Old | _New) -> torch.Tensor | Copied:
            return call.inputs[leaf.number] if isinstance(leaf, _Old) else made[leaf.number]

        return True, _mapped(known.result, (_Old, _New), result)

    def learn(self, call: Call, result: Any, made: Sequence[fx.Node]) -> None:
        """The call was traced into the nodes ``made``: remember it, if a copy of these would be all it does."""
        with torch._C.DisableTorchFunction(), suppress(_Unfit):
            self._traced[call.key] = _Lesson(call, made).traced(result)


def materialised(value: Any) -> Any:
    """``value`` with a tensor for each record in it."""
    return _mapped(value, (Copied,), _tensor)


def traced_node(value: Any) -> fx.Node | None:
    """The lowered node that ``value`` is the result of."""
    if isinstance(value, Copied) and value.tensor is None:
        return value.node
    return compat.traced_node(value.tensor if isinstance(value, Copied) else value)


# ----------------------------------------------------------------------------------------------------------------- key


def _is_plain(target: Any) -> bool:
    """A method, or an operator of torch's own: a function of somebody else may do anything."""
    if isinstance(target, (str, torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return True
    function = isinstance(target, (types.FunctionType, types.BuiltinFunctionType))
    return function and str(target.__module__).split(".")[0] in ("torch", "_operator", "math", "builtins")


def _modes() -> Hashable:
    autocast = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_cache_enabled(), autocast


def _frozen(argument: Any, env: dict[fx.Node, Any], found: dict[int, torch.Tensor | Copied]) -> Hashable:
    """An argument as a key, with numbers for the tensors in it, which are ``found``."""
    if isinstance(argument, fx.Node):
        argument = env[argument]
    if isinstance(argument, (torch.Tensor, Copied)):
        found.setdefault(id(argument), argument)
        return _Old, list(found).index(id(argument))
    if isinstance(argument, (list, tuple)):
        return type(argument), tuple([_frozen(each, env, found) for each in argument])
    if isinstance(argument, dict):
        return dict, tuple([(name, _frozen(each, env, found)) for name, each in argument.items()])
    if isinstance(argument, slice):
        return slice, tuple([_frozen(each, env, found) for each in (argument.start, argument.stop, argument.step)])
    if isinstance(argument, _CONSTANTS):
        return type(argument), repr(argument) if isinstance(argument, float) else argument  # 0.0 == -0.0
    raise _Unfit


def _kind(value: torch.Tensor | Copied) -> Kind:
    if isinstance(value, Copied):
        if value.tensor is None:
            return value.kind
        value = value.tensor
    if type(value) is not compat.FakeTensor or value.layout != torch.strided:
        raise _Unfit
    if value.is_conj() or value.is_neg() or value.is_inference() or value.is_quantized:
        raise _Unfit
    offset: Any = value.storage_offset()
    if any(type(size) is not int for size in (*value.shape, *value.stride(), offset)):
        raise _Unfit
    return Kind(tuple(value.shape), value.stride(), offset, value.dtype, value.device, value.requires_grad)


def _number(value: torch.Tensor | Copied) -> int:
    return value.memory.number if isinstance(value, Copied) else compat.storage_of(value)


def _traced_as(value: torch.Tensor | Copied) -> fx.Node:
    """The lowered node that stands for ``value``, which is no literal: those are known to tracing as numbers."""
    node = traced_node(value)
    tensor = value.tensor if isinstance(value, Copied) else value
    if node is None or (tensor is not None and compat.is_literal(tensor)):
        raise _Unfit
    return node


# -------------------------------------------------------------------------------------------------------------- learning


class _Lesson:
    """A call that was just traced into the nodes ``made``. Raises ``_Unfit`` if it does more than make these."""

    def __init__(self, call: Call, made: Sequence[fx.Node]) -> None:
        self._call, self._made = call, made
        self._inputs: list[torch.Tensor] = [_tensor(x) if isinstance(x, Copied) else x for x in call.inputs]
        self._position = {node: k for k, node in enumerate(made)}
        self._numbers: dict[int, int] = {}
        self._sizes: list[int] = []
        for k, x in enumerate(self._inputs):
            self._numbers.setdefault(_number(x), k)

    def traced(self, result: Any) -> _Traced:
        if tuple(map(_kind, self._inputs)) != self._call.kinds:
            raise _Unfit  # transposed in place, for one
        known = set(self._call.nodes)
        for node in self._made:
            if node.op != "call_function" or not known.issuperset(node.all_input_nodes):
                raise _Unfit
            known.add(node)
        memories = tuple(map(self._memory_of, self._made))
        results: dict[int, _Result] = {}
        old = {id(x): k for k, x in enumerate(self._inputs)}

        def leaf(value: torch.Tensor) -> _Old | _New:
            if id(value) in old:
                return _Old(old[id(value)])
            results.setdefault(id(value), _Result(self._node(value), _kind(value), self._memory(value)))
            return _New(list(results).index(id(value)))

        template = _mapped(result, (torch.Tensor,), leaf, others=_CONSTANTS)
        moved = tuple(self._moved())
        sizes = tuple(self._sizes)
        return _Traced(self._call.nodes, tuple(self._made), memories, sizes, tuple(results.values()), template, moved)

    def _moved(self) -> Iterator[tuple[int, int]]:
        for k, (x, before) in enumerate(zip(self._inputs, self._call.nodes, strict=True)):
            if compat.traced_node(x) is not before:
                yield k, self._node(x)

    def _node(self, value: torch.Tensor) -> int:
        """Which of the nodes ``value`` is traced as."""
        node = compat.traced_node(value)
        if node not in self._position or compat.is_literal(value):
            raise _Unfit
        return self._position[node]

    def _memory(self, value: torch.Tensor) -> int:
        storage = compat.storage_of(value)
        if storage not in self._numbers:
            self._sizes.append(value.untyped_storage().nbytes())
            self._numbers[storage] = -len(self._sizes)
        return self._numbers[storage]

    def _memory_of(self, node: fx.Node) -> int | None:
        """The memory of a node's value, or None where that is several tensors: each of them is the value of a node too."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            _kind(value)
            return self._memory(value)
        if isinstance(value, (list, tuple)) and all(isinstance(each, torch.Tensor) for each in value):
            return None
        raise _Unfit


# --------------------------------------------------------------------------------------------------------------- records


def _memory(value: torch.Tensor | Copied) -> Memory:
    return value.memory if isinstance(value, Copied) else Memory(0, value)


def _move(value: torch.Tensor | Copied, node: fx.Node) -> None:
    """``value`` stands for ``node`` from now on."""
    tensor = value.tensor if isinstance(value, Copied) else value
    if tensor is not None:
        compat.set_traced_node(tensor, node)
    elif isinstance(value, Copied):
        value.node = node


def _tensor(record: Copied) -> torch.Tensor:
    kind, memory = record.kind, record.memory
    if record.tensor is None:
        with compat.untraced(), torch.enable_grad():
            if memory.tensor is None:
                elements = memory.size // kind.dtype.itemsize
                memory.tensor = torch.empty(elements, dtype=kind.dtype, device=kind.device)
                if kind.requires_grad:
                    memory.tensor = memory.tensor.requires_grad_().clone()  # no leaf: it may be written in place
            if memory.tensor.dtype != kind.dtype:
                raise CannotCopy
            # Where no gradient is to be cut off, they stay on: a view made without them may not be written with them.
            with torch.set_grad_enabled(kind.requires_grad or not memory.tensor.requires_grad):
                record.tensor = memory.tensor.as_strided(kind.shape, kind.strides, kind.offset)
            if record.tensor.requires_grad != kind.requires_grad:
                raise CannotCopy
        compat.set_traced_node(record.tensor, record.node)
    return record.tensor


def _mapped(value: Any, kinds: tuple[type, ...], change: Callable[[Any], Any], others: tuple[type, ...] | None = None) -> Any:
    """``value`` with what is of these ``kinds`` changed, inside containers too; else only ``others`` may be in it."""
    if isinstance(value, kinds):
        return change(value)
    if type(value) in (list, tuple, immutable_list):
        return (tuple if type(value) is tuple else list)([_mapped(each, kinds, change, others) for each in value])
    if type(value) in (dict, immutable_dict):
        return {key: _mapped(each, kinds, change, others) for key, each in value.items()}
    if isinstance(value, slice) and others is None:
        return slice(*(_mapped(each, kinds, change) for each in (value.start, value.stop, value.step)))
    if others is not None and not isinstance(value, others):
        raise _Unfit
    return value
