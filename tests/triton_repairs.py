"""Repairs of Triton's interpreter (3.9), which runs kernels on CPU tensors where TRITON_INTERPRET is 1.

As it comes, bfloat16 is computed on its bit patterns, float32 is cut off rather than rounded to it, tf32 is
not rounded at all, and addresses are used as they are. After `repair()`:

- values of bfloat16 are widened before every operation that isn't a load, a store or a move, and rounded to
  nearest even when they come back;
- operands of a tf32 product are rounded to tf32, as the hardware does;
- a load or store outside of the launch's tensors raises IndexError, and so do two lanes of one store that
  write to one address (on a GPU one of them wins, unknown which).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

_spans: list[tuple[int, int]] = []


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 to the bit patterns of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """The 13 lowest bits of the mantissa rounded away."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits + 0x1000 & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bfloat16(value: object) -> bool:
    return isinstance(value, Handle) and value.dtype.scalar == tl.bfloat16


def _widen(value: object) -> object:
    return Handle(widened(value.data), tl.float32) if _is_bfloat16(value) else value


def repair() -> None:
    """Replaces the interpreter's defective parts, once for this process."""
    _repair_casts()
    for name in dir(Builder):
        arithmetic = name.startswith(("create_f", "create_exp", "create_log", "create_sqrt", "create_erf"))
        if arithmetic and not name.startswith(("create_fp_to", "create_fp_ext", "create_fp_trunc")):
            _widen_operands(name)
    _repair_products()
    _check_addresses()
    _save_time()


def _repair_casts() -> None:
    cast = Builder.cast_impl

    def cast_impl(self, source, target):
        to = target.scalar
        if _is_bfloat16(source) and to != tl.bfloat16:
            source = _widen(source)
        elif to == tl.bfloat16 and not _is_bfloat16(source):
            return Handle(rounded(source.data.astype(np.float32)), to)
        return cast(self, source, target)

    Builder.cast_impl = cast_impl
    convert = Builder.create_fp_to_fp

    def create_fp_to_fp(self, source, target, rounding):
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    Builder.create_fp_to_fp = create_fp_to_fp


def _widen_operands(name: str) -> None:
    operation = getattr(Builder, name)

    def in_float32(self, *operands, **options):
        result = operation(self, *map(_widen, operands), **options)
        narrow = any(map(_is_bfloat16, operands)) and result.data.dtype == np.float32
        return Handle(rounded(result.data), tl.bfloat16) if narrow else result

    setattr(Builder, name, in_float32)


def _repair_products() -> None:
    dot = Builder.create_dot

    def create_dot(self, a, b, sums, precision, imprecise):
        a, b = _widen(a), _widen(b)
        if a.data.dtype == np.float16:  # products are exact and added up in float32
            a, b = (Handle(t.data.astype(np.float32), tl.float32) for t in (a, b))
        if a.data.dtype == np.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
            a, b = (Handle(to_tf32(t.data), tl.float32) for t in (a, b))
        return dot(self, a, b, sums, precision, imprecise)

    Builder.create_dot = create_dot


def _check_addresses() -> None:
    begin = interpreter.GridExecutor._init_args_hst

    def remember(self, args, options):
        result = begin(self, args, options)
        _spans.clear()
        for t in (*result[0], *result[1].values()):
            if hasattr(t, "data_ptr") and t.numel():
                first = t.data_ptr()
                last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                _spans.append((first, first + (last + 1) * t.element_size()))
        return result

    interpreter.GridExecutor._init_args_hst = remember
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def create_masked_load(self, pointers, mask, *more, **options):
        _check(pointers, mask, "load")
        return load(self, pointers, mask, *more, **options)

    def create_masked_store(self, pointers, value, mask, *more, **options):
        _check(pointers, mask, "store")
        return store(self, pointers, value, mask, *more, **options)

    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store


def _check(pointers: Handle, mask: Handle, kind: str) -> None:
    addresses = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].astype(np.uint64)
    if not addresses.size:
        return
    size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
    inside = np.zeros(addresses.shape, bool)
    for first, end in _spans:
        inside |= (addresses >= first) & (addresses + size <= end)
    if not inside.all():
        raise IndexError(f"{kind}: {(~inside).sum()} of {inside.size} lanes are outside of every tensor")
    if kind == "store" and np.unique(addresses).size != addresses.size:
        raise IndexError("store: two lanes write to one address")


def _save_time() -> None:
    """Half of the time goes into overflow checks of indices and into patching triton.language once a call."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    def patch_once(function):
        if function in patched:
            return None
        patched.add(function)
        return patch(function)

    def launch_afresh(self, *args, **options):
        patched.clear()
        return launch(self, *args, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh
