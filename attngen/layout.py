"""Where a kernel finds its elements: base pointers, strides and sizes, and the arguments that carry them.

Strides are taken as they are at every call; what is fixed in the text is only which dimension an axis runs over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from attngen.index import Axis
from attngen.printer import Printer, Unprintable, fixed_dims, moving_dims
from attngen.spec import FEATURE, INNER, KEY, ROW, AttentionSpec, Input

UNIT = 8  # elements, 16 bytes of a 16-bit type: what one load takes, and the shortest that is copied asynchronously
KNOWN = 16  # elements; Triton tells of a stride whether it is a multiple of this, and of nothing smaller


def addresses(spec: AttentionSpec, printer: Printer) -> dict[str, Any]:
    """Dimension numbers of the moving axes, base pointers, and how a head number unpacks into batch positions."""
    wide = ".to(tl.int64)" if spec.wide else ""
    return {
        "stride": {
            "q_row": stride_of(spec.query, ROW),
            "q_inner": stride_of(spec.query, INNER),
            "k_row": stride_of(spec.keys, KEY),
            "k_inner": stride_of(spec.keys, INNER),
            "v_row": stride_of(spec.values, KEY),
            "v_feature": stride_of(spec.values, FEATURE),
            "k_step": "k_step" if spec.wide else stride_of(spec.keys, KEY),
            "v_step": "v_step" if spec.wide else stride_of(spec.values, KEY),
        },
        "out_dims": {"row": spec.output.index(ROW), "feature": spec.output.index(FEATURE)},
        "wide_rows": f"rows{wide}",
        "wide_cols": f"block_cols{wide}",
        "unpack_head": unpacked(spec.batch),
        "bases": _bases(spec, printer),
        "heads": _product([f"size_{a.name}" for a in spec.batch]),
    }


def stride_of(source: Input, axis: Axis) -> str:
    """What separates neighbours along ``axis``; nothing where the input is the same all along it."""
    dim = source.dim_of(axis)
    if dim is not None:
        return f"{source.name}_stride_{dim}"
    if any(place.has(axis) for place in source.index):
        raise Unprintable(f"{source.name} is read at more than plain positions along {axis.name}")
    return "0"


def unpacked(axes: Sequence[Axis]) -> list[str]:
    """How the number of a head becomes its positions along ``axes``, of which the last changes fastest."""
    lines = []
    rest = "head"
    for axis in reversed(axes[1:]):
        lines.append(f"{axis.name} = {rest} % size_{axis.name}")
        rest = f"{rest} // size_{axis.name}"
    if axes:
        lines.append(f"{axes[0].name} = {rest}")
    return lines


def _bases(spec: AttentionSpec, printer: Printer) -> list[str]:
    """Where each tensor's slice for this head begins; 64-bit, for a batch may be large even where a slice is not."""
    lines = [base_of(source, printer) for source in spec.inputs]
    dims = [(d, a) for d, a in enumerate(spec.output) if a not in (ROW, FEATURE)]
    text = "".join(f" + {a.name}.to(tl.int64) * out_stride_{d}" for d, a in dims)
    lines.append(f"out_base = out_ptr{text}")
    if spec.wide:
        lines += [f"{x.name}_step = tl.full([], {stride_of(x, KEY)}, tl.int64)" for x in (spec.keys, spec.values)]
    return lines


def base_of(source: Input, printer: Printer) -> str:
    text = "".join(f" + {printer.base(p)} * {source.name}_stride_{d}" for d, p in fixed_dims(source))
    return f"{source.name}_base = {source.name}_ptr{text}"


def arguments(spec: AttentionSpec, heavy_first: bool) -> dict[str, Any]:
    tensors = [f"{x.name}_ptr" for x in spec.inputs] + ["out_ptr"] + (["lse_ptr"] if spec.lse else [])
    strides, call_strides = [], []
    for source in spec.inputs:
        for dim in used_dims(source):
            strides.append(f"{source.name}_stride_{dim}")
            call_strides.append(f"{source.name}.stride({dim})")
    for dim in range(len(spec.output)):
        strides.append(f"out_stride_{dim}")
        call_strides.append(f"out.stride({dim})")
    axes = [*spec.batch, ROW, KEY]
    sizes = {f"size_{a.name}": extent_of(spec, a) for a in axes}
    shape = {**{a: f"size_{a.name}" for a in axes}, FEATURE: str(spec.value_dim)}
    return {
        "tensors": tensors,
        "strides": strides,
        "unit": UNIT,
        "units": {name: (list(numbers), list(numbers.values())) for name, numbers in _units(spec).items()},
        "sizes": [*sizes],
        "arguments": [x.name for x in spec.inputs],
        "call_tensors": [x.name for x in spec.inputs] + ["out"] + (["lse"] if spec.lse else []),
        "call_strides": call_strides,
        "unspecialised": json.dumps([*sizes, "heads_per_group"] if heavy_first else [*sizes]),
        "size_lines": [f"{name} = {extent}" for name, extent in sizes.items()],
        "out_shape": tuple_of([shape[a] for a in spec.output]),
        "out_dtype": str(spec.out_dtype),
        "lse_shape": tuple_of([f"size_{a.name}" for a in (*spec.batch, ROW)]),
        "heads_python": _product([f"size_{a.name}" for a in spec.batch]),
    }


def _units(spec: AttentionSpec) -> dict[str, dict[str, str]]:
    """Numbers that may well be whole units though Triton does not see it, and what they are called with. One group holds
    the strides of operands whose head size is so, the other those of inputs per pair, which are loaded in vectors only if
    whole units of keys are in bounds as well."""
    operands = ((spec.query, spec.head_dim), (spec.keys, spec.head_dim), (spec.values, spec.value_dim))
    output = Input("out", spec.output, spec.out_dtype)
    uneven = [x for x, size in (*operands, (output, spec.value_dim)) if size % KNOWN and size % UNIT == 0]
    pairs = [x for x in spec.extras if x.dim_of(KEY) is not None and any(place.has(ROW) for place in x.index)]
    groups = {
        "head_unit": {k: v for x in uneven for k, v in _outer(x, (INNER, FEATURE)).items()},
        "pair_unit": {k: v for x in pairs for k, v in _outer(x, (KEY,)).items()},
    }
    if pairs:
        groups["pair_unit"][f"size_{KEY.name}"] = f"size_{KEY.name}"
    return {name: numbers for name, numbers in groups.items() if numbers}


def _outer(source: Input, inner: tuple[Axis, ...]) -> dict[str, str]:
    """The strides of ``source`` along all but the ``inner`` axes."""
    dims = [d for d in used_dims(source) if source.index[d] not in inner]
    return {f"{source.name}_stride_{d}": f"{source.name}.stride({d})" for d in dims}


def used_dims(source: Input) -> list[int]:
    """The dimensions of an input whose strides the kernel needs."""
    moving = {d for d, _ in (*moving_dims(source), *fixed_dims(source))}
    return sorted(moving | {d for d, p in enumerate(source.index) if p in (INNER, FEATURE)})


def extent_of(spec: AttentionSpec, axis: Axis) -> str:
    """Where ``launch`` reads the extent of ``axis``: an input and its dimension that is exactly that axis.

    An axis that no input has is one along which nothing changes; specialise lets it pass only if its extent is one.
    """
    for source in spec.inputs:
        dim = source.dim_of(axis)
        if dim is not None:
            return f"{source.name}.shape[{dim}]"
    if any(place.has(axis) for source in spec.inputs for place in source.index):
        raise Unprintable(f"no operand has the size of {axis.name}")
    return "1"


def _product(names: list[str]) -> str:
    return " * ".join(names) if names else "1"


def tuple_of(parts: list[str]) -> str:
    return f"({', '.join(parts)})" if len(parts) > 1 else f"({parts[0]},)"


def memory_order(spec: AttentionSpec, source: Input) -> list[int]:
    """The dimensions of ``source`` from the outermost in memory: batch and rows as in the output, features last."""
    if source not in (spec.query, spec.keys, spec.values):
        return list(range(len(source.index)))
    rank = {axis: place for place, axis in enumerate(spec.output)}
    rank = {**rank, KEY: rank[ROW], INNER: len(rank), FEATURE: len(rank)}

    def position(dim: int) -> int:
        return min((rank[axis] for axis in source.index[dim].atoms(Axis)), default=-1)

    return sorted(range(len(source.index)), key=position)
