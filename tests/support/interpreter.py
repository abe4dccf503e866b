"""Triton's interpreter without work whose results nobody sees: tests of kernels take a third of the time.

What kernels compute stays the same, operation by operation. A Triton whose interpreter is written otherwise keeps it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any


@functools.cache
def quicken() -> None:
    """Take the needless work out of Triton's interpreter, in this process."""
    try:
        from triton.runtime import interpreter

        for change in (_no_unread_checks, _operations_once_a_launch, _one_table_of_dtypes):
            change(interpreter)
    except (ImportError, AttributeError, TypeError):
        return


def _no_unread_checks(interpreter: ModuleType) -> None:
    """Of sums and products for overflow: each is computed again in int64, and without ``debug`` nothing is asserted."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def _operations_once_a_launch(interpreter: ModuleType) -> None:
    """At each call of a function in a kernel, operations are put where the launch has put them already."""
    launch, function = interpreter.GridExecutor, interpreter.InterpretedFunction
    if not {"_patch_lang", "rewrite"} <= set(function.__call__.__code__.co_names):
        return
    put: Callable[[Any], object] = interpreter._patch_lang
    run, done = launch.__call__, set[int]()  # the namespaces of functions that this launch has called, by their id

    def run_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()  # the last launch has put back what was there before it
        return run(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in done:
            put(self.fn)
            done.add(id(self.fn.__globals__))
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    launch.__call__, function.__call__ = run_anew, call


def _one_table_of_dtypes(interpreter: ModuleType) -> None:
    """That of numpy's dtypes is made anew for every value."""
    dtype_of = functools.cache(interpreter._get_np_dtype)
    language = interpreter.tl

    def of(dtype: Any) -> Any:
        pointer, block = language.pointer_type, language.block_type
        if isinstance(dtype, block):
            dtype = dtype.element_ty
        return dtype_of(language.uint64 if isinstance(dtype, pointer) else dtype)

    interpreter._get_np_dtype = of
