"""Specs on their way to a process that we start: as pickled bytes, which are for nobody else to write or to read.

Axes of specs are singletons, and travel by name; an expression knows its hash, which is another one in another process.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import fields
from typing import Any

from attngen.algebra import Expr
from attngen.index import Axis
from attngen.spec import BATCH_NAMES, FEATURE, INNER, KEY, ROW, batch_axes

_AXES = {axis.name: axis for axis in (ROW, KEY, INNER, FEATURE, *batch_axes(len(BATCH_NAMES)))}


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> str | None:
        if not isinstance(value, Axis):
            return None
        if _AXES.get(value.name) is not value:
            raise pickle.PicklingError(f"{value} is no axis of a spec")
        return value.name

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Expr):
            return type(value), tuple(getattr(value, field.name) for field in fields(value))  # type: ignore[arg-type]
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, name: str) -> Axis:
        return _AXES[name]


def packed(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


def unpacked(content: bytes) -> Any:
    return _Unpickler(io.BytesIO(content)).load()
