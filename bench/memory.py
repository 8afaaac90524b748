"""Bytes: what autograd keeps between forward and backward, what PyTorch allocates, what the process takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_gate import keep_memory

# Else the profiler greets and takes leave on stderr at each use; read when it is used for the first time.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def kept_bytes(forward: Callable[[], Any], held: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, each storage once, without `held`'s."""
    known = {t.untyped_storage().data_ptr() for t in held}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()  # bound: a storage freed too early could lend its address to another
    del result
    return sum(kept.values())


def allocated_peak(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made in `call` hold at one time, its results included.

    Counted from PyTorch's allocator on the CPU, so memory of other libraries and of C++ objects isn't in it;
    attn_gate's results are, since they come from it here.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    limit = keep_memory(0)
    try:
        with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
            kept = call()
        del kept
    finally:
        keep_memory(limit)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def runs_operators(call: Callable[[], Any]) -> bool:
    """Whether an operator of attn_gate runs in `call`: none does in gates that it leaves to PyTorch."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        call()
    names = (event.name() for event in profile.profiler.kineto_results.events())
    return any(name.startswith("attn_gate") and "::" in name for name in names)


def resident_growth(call: Callable[[], Any]) -> int:
    """How much more memory the process held at its peak during `call` than before it. Linux.

    Only true in a fresh process: what an earlier call has freed may still count as the process's.
    """
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    kept = call()
    del kept
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
