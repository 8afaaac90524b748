"""Bytes that a gate must move and operations that it must do: counted from its sizes, not measured.

Every element of an input read once, every element of an output written once, parameters and alpha left out:

    forward, inference   x, g -> y               2 C S + G Q
    backward             x, g, dy -> dx, dg      3 C S + 2 G Q
    step                 both                    5 C S + 3 G Q

Operations are those of forward; backward has twice as many: each product of matrices has two there. What a
kernel computes again to save memory isn't needed, so it isn't counted.
"""

from __future__ import annotations

import math

from .registry import Config

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def needed_bytes(config: Config, mode: str, dtype: str) -> int:
    """The least that memory has to move."""
    x, g = math.prod(config.x_shape), math.prod(config.g_shape)
    forward, backward = 2 * x + g, 3 * x + 2 * g
    elements = {
        "inference": forward,
        "forward": forward,
        "backward": backward,
        "step": forward + backward,
    }[mode]
    return elements * ITEMSIZE[dtype]


def needed_flops(config: Config, mode: str) -> int:
    """Multiplications and additions of the projections, psi, the product, and an output convolution."""
    coarse = config.batch * math.prod(config.gating_size)
    fine = config.batch * math.prod(config.size)
    patch = config.ratio ** len(config.size) if config.gate.startswith("paper") else 1
    forward = 2 * coarse * config.inter * (config.channels * patch + config.gating + 1)
    forward += fine * config.channels
    if config.gate in ("paper_output", "keras"):
        forward += 2 * fine * config.channels**2
    return forward * {"inference": 1, "forward": 1, "backward": 2, "step": 3}[mode]
