"""What attn_gate gains, in one number for all gates or networks: geometric means of speeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .registry import AnyConfig
from .results import Results


@dataclass(frozen=True)
class Gain:
    """How many times faster: the geometric mean of `count` configs, the least and the most of them."""

    mean: float
    least: float
    most: float
    count: int


def gain(results: Results, configs: Sequence[AnyConfig], mode: str, over: Sequence[str]) -> Gain | None:
    """Of attn_gate over the fastest of these providers in each config; None if there is nothing to compare.

    Without the configs whose layers attn_gate leaves to PyTorch: those say nothing about its operators.
    """
    found = []
    for config in configs:
        ours = results.find(config.name, mode, "attn_gate")
        others = [row for name in over if (row := results.find(config.name, mode, name)) is not None]
        if ours is not None and ours.fused is not False and others:
            found.append(min(row.median_ms for row in others) / ours.median_ms)
    if not found:
        return None
    return Gain(math.exp(sum(map(math.log, found)) / len(found)), min(found), max(found), len(found))
