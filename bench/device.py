"""What depends on the device: how a call is timed, its memory counted, the machine described."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attn_gate import _library

from .memory import allocated_peak

_COPY_BYTES = 2**28  # larger than any cache
_COPIES = 15
_PRODUCTS = 8


class Device:
    """The CPU. Calls are timed by the clock, memory is counted from PyTorch's allocator."""

    name = "cpu"
    products = ((512, 512, 512), (1024, 1024, 1024), (2048, 1024, 1024), (256, 2048, 4096))

    def time_ms(self, prepare: Callable[[], Any], call: Callable[[], Any]) -> float:
        """Milliseconds of `call`, after `prepare` outside the time; what call returns is dropped after it."""
        prepare()
        start = time.perf_counter()
        kept = call()
        end = time.perf_counter()
        del kept
        return (end - start) * 1e3

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """The most bytes that tensors made in `call` hold at one time, its results included."""
        return allocated_peak(call)

    def copy_gbps(self) -> float:
        """Bytes read plus bytes written in a second, in units of 1e9, by a copy between two old buffers."""
        source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=self.name)
        target = torch.zeros_like(source)
        best = min(self.time_ms(lambda: None, lambda: target.copy_(source)) for _ in range(_COPIES))
        return 2 * _COPY_BYTES / best / 1e6

    def peak_gflops(self) -> float:
        """Operations in a second, in units of 1e9, of PyTorch's product of float32 matrices, into old memory.

        The best of a few sizes: which it is depends on caches and on the library.
        """
        return max(self._product_gflops(*shape) for shape in self.products)

    def _product_gflops(self, rows: int, inner: int, columns: int) -> float:
        a, b = (torch.randn(shape, device=self.name) for shape in ((rows, inner), (inner, columns)))
        out = a @ b
        best = min(self.time_ms(lambda: None, lambda: torch.mm(a, b, out=out)) for _ in range(_PRODUCTS))
        return 2 * rows * inner * columns / best / 1e6

    def facts(self) -> dict[str, Any]:
        """What the times depend on."""
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        binding = {name: os.environ[name] for name in _BINDING if name in os.environ}
        return {
            "device": "cpu",
            "processor": _processor(),
            "cores": os.cpu_count() or 1,
            "threads": torch.get_num_threads(),
            "may_run_on": ",".join(map(str, cpus)),
            "pinning": " ".join(f"{k}={v}" for k, v in binding.items()) or "none",
            "instructions": _library.cpu_isa(),
            "load": os.getloadavg()[0],
        }


class CudaDevice(Device):
    """A GPU. Calls are timed by events, its L2 cache is overwritten before each; PyTorch counts memory."""

    name = "cuda"
    products = ((4096, 4096, 4096), (8192, 8192, 8192))

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(4 * l2, 2**26), dtype=torch.uint8, device="cuda")

    def time_ms(self, prepare: Callable[[], Any], call: Callable[[], Any]) -> float:
        """See Device; the time between two events in the stream."""
        prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # Also keeps the GPU busy while the host queues the call, whose launches are then not in the time.
        self._flush.zero_()
        start.record()
        kept = call()
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end)

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """See Device; what was allocated before isn't counted."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before

    def facts(self) -> dict[str, Any]:
        """See Device."""
        properties = torch.cuda.get_device_properties(0)
        return {
            **super().facts(),
            "device": "cuda",
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "gpu_bytes": properties.total_memory,
            "matmul_tf32": torch.backends.cuda.matmul.fp32_precision == "tf32",
            "convolution_tf32": torch.backends.cudnn.conv.fp32_precision == "tf32",
        }


DEVICES: dict[str, type[Device]] = {"cpu": Device, "cuda": CudaDevice}


def make(name: str) -> Device:
    """The device of this name.

    Raises:
        ValueError: it isn't here.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no GPU (`python -m attn_gate info` says more)")
    return DEVICES[name]()


_BINDING = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
