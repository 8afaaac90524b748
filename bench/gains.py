"""What attn_gate gains, in one number for all gates or networks: geometric means of speeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .registry import AnyConfig
from .results import Results


@dataclass(frozen=True)
class Gain:
    """How many times faster attn_gate is, in each of some configs, the least first.

    Attributes:
        fused: where its operators ran.
        left: where it leaves everything to PyTorch's layers: that says nothing about its operators, so it
            isn't in the mean, but belongs beside it.
    """

    fused: tuple[float, ...]
    left: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """The geometric one."""
        return math.exp(sum(map(math.log, self.fused)) / len(self.fused))

    @property
    def without(self) -> str:
        """Such as "without 2 left to PyTorch's layers (0.91 to 0.97)"; empty if the mean is of all."""
        return f"without {len(self.left)} left to PyTorch's layers ({span(self.left)})" if self.left else ""


def gain(results: Results, configs: Sequence[AnyConfig], mode: str, over: Sequence[str]) -> Gain | None:
    """Of attn_gate over the fastest of these providers in each config; None if there is no mean to tell."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for config in configs:
        ours = results.find(config.name, mode, "attn_gate")
        others = [row for name in over if (row := results.find(config.name, mode, name)) is not None]
        if ours is not None and others:
            speed = min(row.median_ms for row in others) / ours.median_ms
            found[ours.fused is not False].append(speed)
    return Gain(tuple(sorted(found[True])), tuple(sorted(found[False]))) if found[True] else None


def span(speeds: Sequence[float]) -> str:
    """The least and the most of sorted ones."""
    ends = dict.fromkeys(f"{speed:.2f}" for speed in (speeds[0], speeds[-1]))
    return " to ".join(ends)
