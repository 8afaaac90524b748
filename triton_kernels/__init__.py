"""Triton kernels of attn_gate, installed as `attn_gate.triton_kernels`: the backend that needs no compiler.

Importing this package defines the operators torch.ops.attn_gate_triton.*; triton itself is imported by their
first call. `operators` holds the ten of them, `passes` their launches, `forward` and `backward` the kernels.
"""

from __future__ import annotations

from collections.abc import Callable

from attn_gate import _library, namespaces
from attn_gate.operators import OPERATORS

NAMESPACE = "attn_gate_triton"
DEVICES = ("cpu", "cuda", "xpu")  # "cuda" is ROCm's name too


def implementation(name: str) -> Callable:
    """The operator of this name ("gate_fwd"); imports triton."""
    from . import operators as implementations

    return getattr(implementations, name)


def register() -> None:
    """Defines the namespace, and stands in for the native operators on devices that have none.

    So a program that was exported on a CPU, which says torch.ops.attn_gate, runs on a GPU too.
    """
    namespaces.define(NAMESPACE, DEVICES, implementation)
    devices = ["xpu"] if _library.has_cuda_library else ["cuda", "xpu"]
    for op in OPERATORS:
        for name in (f"{op.name}_fwd", f"{op.name}_bwd"):
            namespaces.implement(f"attn_gate::{name}", devices, lambda name=name: implementation(name))
