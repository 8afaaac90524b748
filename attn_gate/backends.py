"""Which implementation runs.

One list of checks per backend serves the silent choice of "auto" and the error of a forced one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _library, architectures, checks, composed

_VARIABLE = "ATTN_GATE_BACKEND"
_log = logging.getLogger("attn_gate")


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    Attributes:
        name: what users call it.
        namespace: its operators are torch.ops.{namespace}.*; empty: the eager twins.
        why_not: (device, dtype of the maps) -> why it can't run on such tensors; empty where it can.
    """

    name: str
    namespace: str
    why_not: Callable[[torch.device, torch.dtype], str]


def _why_not_cpu(device: torch.device, dtype: torch.dtype) -> str:
    return "" if device.type == "cpu" else f"the C++ kernels run on CPU tensors; these are on {device}"


def _why_not_cuda(device: torch.device, dtype: torch.dtype) -> str:
    if _library.why_no_cuda_library or device.type != "cuda":
        return _library.why_no_cuda_library or f"the tensors are on {device}"
    if not torch.cuda.is_available():
        return ""  # fake tensors: nothing will run
    gpu = torch.cuda.get_device_properties(device)  # a constant for torch.compile, which traces this
    return architectures.why_not(_CUDA_ARCHITECTURES, (gpu.major, gpu.minor))


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str:
    if not _TRITON_IS_INSTALLED:
        return "triton isn't installed (`pip install triton`; CUDA and ROCm builds of torch bring it)"
    if device.type not in ("cuda", "xpu") and not (device.type == "cpu" and TRITON_RUNS_ON_CPU):
        return f"the Triton kernels run on GPUs; the tensors are on {device}"
    if dtype == torch.float64:
        return "the Triton kernels take float32, bfloat16 and float16; got float64"
    if device.type == "cuda" and torch.cuda.is_available():
        if torch.version.cuda and torch.cuda.get_device_properties(device).major < 8:
            return f"Triton needs compute capability 8.0 or newer; {device} has less"
        if not torch.compiler.is_compiling():  # which takes Triton itself, and can't trace this
            return _why_triton_does_not_start()
    return ""


@functools.cache
def _why_triton_does_not_start() -> str:
    """Start its driver, as its first kernel would.

    That compiles a part of it, for which a machine that only runs PyTorch may lack the C compiler or Python's
    headers.
    """
    try:
        _ = importlib.import_module("triton").runtime.driver.active
    except Exception as error:  # whatever a compiler may say
        return f"Triton doesn't start here: {type(error).__name__}: {error}".partition("\n")[0]
    return ""


# Asked once: torch.compile traces the choice, and these are nothing for a graph.
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
_CUDA_ARCHITECTURES = _library.build_info()["cuda_architectures"] if _library.has_cuda_library else ""
# Triton's driver is replaced by one for the CPU, for tests: by its interpreter, or by another tool.
TRITON_RUNS_ON_CPU = "1" in (os.environ.get("TRITON_INTERPRET"), os.environ.get("ATTN_GATE_TRITON_CPU"))


def device_of(backend: str) -> str:
    """The kind of device that tests and `verify` run this backend on."""
    on_gpu = backend == "cuda" or (backend == "triton" and not TRITON_RUNS_ON_CPU)
    return "cuda" if on_gpu else "cpu"


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", "attn_gate", _why_not_cpu),
        Backend("cuda", "attn_gate", _why_not_cuda),
        Backend("triton", "attn_gate_triton", _why_not_triton),
        Backend("eager", "", lambda device, dtype: ""),
    )
}

if _library.has_cuda_library:
    composed.implement_on_cuda()


def check(backend: Any, argument: str = "backend") -> None:
    """One of the names that `choose` takes.

    Raises:
        ValueError: there is no such backend.
    """
    checks.check_choice(argument, backend, ("auto", *BACKENDS))


def choose(backend: str, x: Tensor, operator: str = "attention_gate") -> str:
    """The backend that computes this operator of x: `backend` itself, or for "auto" the first that can.

    The environment variable ATTN_GATE_BACKEND takes the place of "auto".

    Raises:
        ValueError: there is no such backend, or it can't run here; the message says why.
    """
    if exporting_to_onnx():
        return "eager"  # operators of the ONNX standard, which every runtime has
    argument = "backend"
    if backend == "auto" and os.environ.get(_VARIABLE):
        argument, backend = f"the environment variable {_VARIABLE}", os.environ[_VARIABLE]
    if backend != "auto":
        check(backend, argument)
        if reason := BACKENDS[backend].why_not(x.device, x.dtype):
            raise ValueError(f"{argument} is {backend!r}, which can't be used: {reason}; use 'auto'")
        return backend
    for candidate in _preferred(x.device, operator):
        reason = BACKENDS[candidate].why_not(x.device, x.dtype)
        if not reason:
            return candidate
        if not torch.compiler.is_compiling():  # a logger would break the graph
            _log.debug("backend %s is skipped: %s", candidate, reason)
    return "eager"


def exporting_to_onnx() -> bool:
    """Whether torch.onnx.export is at work: never before its module is imported, which takes a while."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def _preferred(device: torch.device, operator: str) -> tuple[str, ...]:
    """The kernels for this device, that with the least memory traffic first.

    Triton's whole gate reads x and g and writes y; the CUDA one adds theta and phi, written by PyTorch's
    convolutions and read by the chain. The chain itself moves the same bytes in both; CUDA's needs no
    compilation at run time.
    """
    if device.type == "cpu":
        return ("cpu",)
    return ("triton", "cuda") if operator.startswith("attention") else ("cuda", "triton")


def report() -> list[tuple[str, bool, str]]:
    """(name, usable on this machine, remark or reason why not), for `python -m attn_gate info`."""
    rows = [("cpu", True, f"C++, {_library.cpu_isa()} instructions")]
    for name in ("cuda", "triton"):
        device = device_of(name)
        reason = BACKENDS[name].why_not(torch.device(device), torch.float32)
        if not reason and device == "cuda" and not torch.cuda.is_available():
            reason = "torch sees no GPU"
        rows.append((name, not reason, reason))
    return [*rows, ("eager", True, "the PyTorch reference, on every device")]
