"""Makes Triton's interpreter compute what a GPU computes.

Without a GPU, `tests/conftest.py` sets TRITON_INTERPRET=1, so that kernels run in NumPy. But the
interpreter of Triton 3.7

- rounds to bfloat16 by cutting bits off, computes in bfloat16 as if the bits were integers, and has
  no constants in it,
- passes a Python float to a kernel where the compiler passes a float32 scalar,
- has no libdevice: its functions return None,
- needs a GPU to choose a configuration of an autotuned kernel,
- warns about inf - inf, which is common in lanes that a mask discards.

`repair` changes that in Triton's own modules. Kernels must be imported after it.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton._C.libtriton import interpreter as memory
from triton._C.libtriton.ir import ATOMIC_OP
from triton.language.extra import libdevice
from triton.runtime import autotuner, interpreter

Array = np.ndarray[Any, Any]


@cache
def repair() -> None:
    """Replace the parts of the interpreter that differ from the compiler."""
    _store_bfloat16_as_ml_dtypes_do()
    _convert_float_arguments()
    _ignore_what_masks_discard()
    libdevice.exp, libdevice.tanh = _elementwise(np.exp), _elementwise(np.tanh)
    libdevice.rsqrt = _elementwise(lambda x: 1 / np.sqrt(x))
    # All configurations must compute the same, so the first one will do.
    autotuner.Autotuner._bench = lambda self, *_, config, **__: self.configs.index(config)


def _store_bfloat16_as_ml_dtypes_do() -> None:
    """NumPy computes with ml_dtypes.bfloat16; only loads and stores see it as uint16."""
    builder, numpy_dtype = interpreter.InterpreterBuilder, interpreter._get_np_dtype
    load, store = builder.create_masked_load, builder.create_masked_store
    update = builder.create_atomic_rmw

    def dtype_of(kind: Any) -> Any:
        is_bfloat16 = not isinstance(kind, tl.pointer_type) and kind.scalar == tl.bfloat16
        return np.dtype(ml_dtypes.bfloat16) if is_bfloat16 else numpy_dtype(kind)

    def as_bits(handle: Any) -> Any:
        if handle is None or handle.data.dtype != ml_dtypes.bfloat16:
            return handle
        return interpreter.TensorHandle(handle.data.view(np.uint16), handle.dtype)

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *options: Any) -> Any:
        interpreter._get_np_dtype = numpy_dtype
        loaded = load(self, pointers, mask, as_bits(other), *options)
        interpreter._get_np_dtype = dtype_of
        loaded.data = loaded.data.view(dtype_of(loaded.dtype))
        return loaded

    def masked_store(self: Any, pointers: Any, value: Any, *options: Any) -> Any:
        return store(self, pointers, as_bits(value), *options)

    def cast(self: Any, source: Any, kind: Any, *_: Any) -> Any:
        del self
        data = source.data.astype(np.float32) if kind.scalar == tl.bfloat16 else source.data
        return interpreter.TensorHandle(data.astype(dtype_of(kind)), kind.scalar)

    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *how: Any) -> Any:
        if value.data.dtype != ml_dtypes.bfloat16:
            return update(self, operation, pointers, value, mask, *how)
        assert operation == ATOMIC_OP.FADD
        assert np.unique(pointers.data).size == pointers.data.size
        nothing = np.zeros(pointers.data.shape, np.uint16)
        bits = memory.load(pointers.data, mask.data, nothing, nothing.dtype)
        before = bits.view(ml_dtypes.bfloat16)
        memory.store(pointers.data, (before + value.data).view(np.uint16), mask.data)
        return interpreter.TensorHandle(before, value.dtype)

    def bfloat16(self: Any, value: float) -> Any:
        del self
        return interpreter.TensorHandle(np.array([value], ml_dtypes.bfloat16), tl.bfloat16)

    interpreter._get_np_dtype, builder.get_bf16 = dtype_of, bfloat16
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_rmw = atomic
    builder.cast_impl = builder.create_fp_to_fp = cast


def _convert_float_arguments() -> None:
    convert = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = converted


def _ignore_what_masks_discard() -> None:
    call = interpreter.GridExecutor.__call__

    def quiet(self: Any, *arguments: Any, **options: Any) -> None:
        with np.errstate(all="ignore"):
            call(self, *arguments, **options)

    interpreter.GridExecutor.__call__ = quiet


def _elementwise(function: Callable[[Array], Array]) -> Callable[..., Any]:
    def applied(x: Any, **_: Any) -> Any:
        handle = interpreter.TensorHandle(function(x.handle.data), x.handle.dtype)
        return tl.tensor(handle, x.type)

    return applied
