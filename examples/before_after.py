"""What fuse_gates changes in a training step of this network on this machine: its time, and what it keeps."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from attn_gate.bench.memory import kept_bytes
from torch import Tensor, nn

import attn_gate


def print_before_after(
    net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], image: Tensor, label: Tensor, turns: int = 5
) -> None:
    """Prints a table; `net` itself stays as it is. Both take turns, and the medians are shown."""
    nets = {"before": copy.deepcopy(net), "after": copy.deepcopy(net)}
    attn_gate.fuse_gates(nets["after"])

    def forward(name: str) -> Tensor:
        return loss(nets[name](image), label)

    def step(name: str) -> float:
        start = time.perf_counter()
        forward(name).backward()
        if image.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    kept = {
        name: kept_bytes(lambda name=name: forward(name), [image, label, *nets[name].parameters()])
        for name in nets
    }
    times: dict[str, list[float]] = {name: [] for name in nets}
    for turn in range(turns + 1):
        for name in nets:
            seconds = step(name)
            if turn:  # the first one warms up
                times[name].append(seconds)
    print(f"\na training step, batch {tuple(image.shape)}      step time    kept for backward")
    for name, title in (("before", "before fuse_gates"), ("after", "after")):
        milliseconds = 1000 * statistics.median(times[name])
        print(f"  {title:40} {milliseconds:8.0f} ms {kept[name] / 2**20:12.0f} MiB")
    print()
