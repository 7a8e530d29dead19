"""Triton's interpreter without what it does again and again; what it computes is the same.

Most of its time is its own: kernels of the tests are small.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def hurry() -> None:
    """In this process, from here on."""
    if hasattr(interpreter, "_patch_lang"):
        _redirect_once()
    if hasattr(interpreter, "_get_np_dtype"):
        _remember_types()
    if hasattr(interpreter, "interpreter_builder"):
        _add_whole_numbers_once()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)


def _redirect_once() -> None:
    """The language is redirected for each call of a helper, a hundred builtins at a time: once in a launch is enough."""
    redirect, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()

    def once(fn: Any) -> Any:
        if id(fn.__globals__) in done:
            return None  # asked for by a helper, which leaves it to the launch to undo it
        done.add(id(fn.__globals__))
        return redirect(fn)

    def launched(self: Any, *args: Any, **options: Any) -> Any:
        done.clear()
        return launch(self, *args, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launched


def _remember_types() -> None:
    """A table of all types is made whenever one is looked up."""
    look_up = cache(interpreter._get_np_dtype)

    def known(of: Any) -> Any:
        if isinstance(of, tl.block_type):
            of = of.element_ty
        return look_up(tl.uint64 if isinstance(of, tl.pointer_type) else of)

    interpreter._get_np_dtype = known


def _add_whole_numbers_once() -> None:
    """Each sum of them is made again in 64 bits and compared, for an assertion that is left out unless Triton is debugged."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
