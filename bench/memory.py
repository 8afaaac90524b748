"""Bytes: what autograd keeps between forward and backward, and the peak that PyTorch's allocator reaches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

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


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made in `call` hold at one time, its results included.

    Counted from PyTorch's allocator on the CPU, so memory of other libraries and of C++ objects isn't in it.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
