"""Which implementation runs.

One list of checks per backend serves the silent choice of "auto" and the error of a forced one.
"""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor

from . import _library

BACKENDS = ("auto", "cpu", "cuda", "triton", "eager")
_VARIABLE = "ATTN_GATE_BACKEND"
_log = logging.getLogger("attn_gate")


def why_not(backend: str, device: torch.device) -> str:
    """Why this backend can't run on tensors of this device; empty where it can."""
    if backend == "eager":
        return ""
    if backend == "cpu":
        return "" if device.type == "cpu" else f"the C++ kernels run on CPU tensors; these are on {device}"
    if backend == "cuda":
        elsewhere = "" if device.type == "cuda" else f"the tensors are on {device}"
        return _library.why_no_cuda_library or elsewhere
    return "this version of attn_gate has no Triton kernels"


def choose(backend: str, x: Tensor) -> str:
    """The backend that runs on x: `backend` itself, or for "auto" the first that can.

    The environment variable ATTN_GATE_BACKEND takes the place of "auto".

    Raises:
        ValueError: there is no such backend, or it can't run here; the message says why.
    """
    argument = "backend"
    if backend == "auto" and os.environ.get(_VARIABLE):
        argument, backend = f"the environment variable {_VARIABLE}", os.environ[_VARIABLE]
    if backend not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
    if backend != "auto":
        if reason := why_not(backend, x.device):
            raise ValueError(f"{argument} is {backend!r}, which can't be used: {reason}; use 'auto'")
        return backend
    for candidate in ("cpu",) if x.device.type == "cpu" else ("cuda", "triton"):
        reason = why_not(candidate, x.device)
        if not reason:
            return candidate
        if not torch.compiler.is_compiling():  # a logger would break the graph
            _log.debug("backend %s is skipped: %s", candidate, reason)
    return "eager"


def report() -> list[tuple[str, bool, str]]:
    """(name, usable on this machine, remark or reason why not), for `python -m attn_gate info`."""
    rows = [("cpu", True, f"C++, {_library.cpu_isa()} instructions")]
    for backend in ("cuda", "triton"):
        reason = why_not(backend, torch.device("cuda"))
        if not reason and not torch.cuda.is_available():
            reason = "torch sees no GPU"
        rows.append((backend, not reason, reason))
    return [*rows, ("eager", True, "the PyTorch reference, on every device")]
