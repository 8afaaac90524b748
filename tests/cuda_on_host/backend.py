"""The CUDA kernels, run on the host, as one more backend of CPU tensors: backend="cuda on the host"."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import torch

from attn_gate import backends, composed, namespaces
from attn_gate._library import ops
from attn_gate.operators import OPERATORS

from . import build

NAME = "cuda on the host"
_KERNELS, _NAMESPACE = "attn_gate_cuda_host_kernels", "attn_gate_cuda_host"


@functools.cache
def register(kind: str = "plain", csrc: Path = build.ROOT / "csrc") -> ModuleType:
    """Compiles the extension, registers the backend, and returns the extension's handles."""
    for op in OPERATORS:
        if not op.name.startswith("attention"):
            for name in (f"{op.name}_fwd", f"{op.name}_bwd"):
                schema = str(getattr(ops, name).default._schema)
                torch.library.define(f"{_KERNELS}::{name}", schema[schema.index("(") :])
    module = build.load(kind, csrc)
    kernels = getattr(torch.ops, _KERNELS)

    def implementation(name: str):
        if name in composed.NAMES:
            return composed.implementation(name, kernels)
        return getattr(kernels, name).default

    namespaces.define(_NAMESPACE, ["cpu"], implementation)

    def why_not(device: torch.device, dtype: torch.dtype) -> str:
        return "" if device.type == "cpu" else f"it runs on CPU tensors; these are on {device}"

    backends.BACKENDS[NAME] = backends.Backend(NAME, _NAMESPACE, why_not)
    return module
