"""Kernels with planted defects: TRITON_INTERPRET=1 python tests/triton_planted.py

Prints "found" for each that the repaired interpreter notices, or computes as the hardware does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
import triton_repairs
from triton.runtime.errors import InterpreterError


@triton.jit
def copy(source, target, READ: tl.constexpr, WRITE: tl.constexpr, SAME: tl.constexpr):
    j = tl.arange(0, 16)
    value = tl.load(source + j, mask=j < READ, other=0.0)
    tl.store(target + (j // 2 if SAME else j), value, mask=j < WRITE)


@triton.jit
def product(a, b, c, PRECISION: tl.constexpr):
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    tl.store(
        c + i * 16 + j, tl.dot(tl.load(a + i * 16 + j), tl.load(b + i * 16 + j), input_precision=PRECISION)
    )


@triton.jit
def third(a, b):
    j = tl.arange(0, 16)
    tl.store(b + j, tl.load(a + j) * 3)


def finds(read: int, write: int, same: bool) -> bool:
    """Whether copying raises."""
    try:
        copy[(1,)](torch.zeros(9), torch.zeros(9), READ=read, WRITE=write, SAME=same)
    except InterpreterError as error:
        return "IndexError" in str(error)
    return False


def computes_bfloat16() -> bool:
    """Whether it rounds to nearest, and adds up exact products in float32."""
    a, b = torch.randn(2, 256).bfloat16(), torch.empty(16).bfloat16()
    third[(1,)](a, b)
    c = torch.empty(16, 16)
    product[(1,)](a[0], a[1], c, PRECISION="ieee")
    exact = a[0].view(16, 16).double() @ a[1].view(16, 16).double()
    return torch.equal(b, a[0, :16] * 3) and bool((c - exact).abs().max() < 1e-5)


def computes_tf32() -> bool:
    """Whether products are less exact than float32's, and no worse than tf32's."""
    a, c = torch.randn(2, 256), torch.empty(16, 16)
    product[(1,)](a[0], a[1], c, PRECISION="tf32")
    error = (c - a[0].view(16, 16).double() @ a[1].view(16, 16).double()).abs().max()
    return bool(1e-4 < error < 1e-1)


def main() -> None:
    triton_repairs.repair()
    torch.manual_seed(0)
    assert not finds(9, 9, False)
    for what, found in (
        ("load", finds(10, 9, False)),
        ("store", finds(9, 10, False)),
        ("twice", finds(9, 9, True)),
        ("bfloat16", computes_bfloat16()),
        ("tf32", computes_tf32()),
    ):
        print(what, "found" if found else "missed")


if __name__ == "__main__":
    main()
