"""The operators once more, under another namespace: for a backend beside the native kernels of a device.

torch.ops.attn_gate.* runs the native kernels of the tensors' device. Another backend for the same device gets
a namespace of its own with the same schemas, so that a call, a compiled graph and an exported program say by
the operator's name who computes, and autograd, compile, vmap and fake kernels serve all backends alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ._library import ops, register_fakes
from .autograd import make_differentiable
from .operators import BY_NAMESPACE, OPERATORS


def define(namespace: str, devices: Sequence[str], implementation: Callable[[str], Callable]) -> None:
    """Registers all operators as torch.ops.{namespace}.*, for tensors of these devices ("cpu", "cuda", ...).

    implementation: "gate_fwd" -> the function that computes it; asked at the first call, so that nothing is
        imported before it is needed.
    """
    BY_NAMESPACE[namespace] = {op.name: replace(op, namespace=namespace) for op in OPERATORS}
    for op in OPERATORS:
        for name in (f"{op.name}_fwd", f"{op.name}_bwd"):
            schema = str(getattr(ops, name).default._schema)
            torch.library.define(f"{namespace}::{name}", schema[schema.index("(") :])
            implement(f"{namespace}::{name}", devices, lambda name=name: implementation(name))
    register_fakes(namespace)
    for op in BY_NAMESPACE[namespace].values():
        make_differentiable(op)


def implement(operator: str, devices: Sequence[str], find: Callable[[], Callable]) -> None:
    """Makes `find()`, asked at the first call, what the operator does on tensors of these devices."""
    found: list[Callable] = []

    def run(*args: Any) -> Any:
        if not found:
            found.append(find())
        return found[0](*args)

    torch.library.impl(operator, tuple(devices), run)
