"""Times on GPUs as a model has them. Nothing here is measured, and everything that shows it says so.

A kernel takes as long as its memory traffic at the data sheet's bandwidth, or as its operations at the data
sheet's rate, whichever is longer: the roofline. Launches, caches between kernels and imperfect kernels are
left out, for both sides. Eager PyTorch is a list of kernels, each of which reads and writes whole maps;
attn_gate's one kernel forward and one backward read each input once and write each output once. Backward
computes theta + phi again, which is in its operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from .registry import AnyConfig, Config
from .traffic import ITEMSIZE, needed_bytes, needed_flops

LABEL = "modelled from data sheets, not measured"
MODES = ("inference", "step")


class Gpu(NamedTuple):
    """GB/s of memory, and dense TFLOP/s of matrix products with float32 sums (float32: by tf32)."""

    name: str
    gbps: float
    tflops: dict[str, float]


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM5, Ada GPU architecture paper (RTX 4090).
GPUS = (
    Gpu("A100 80GB", 2039, {"float32": 156, "bfloat16": 312}),
    Gpu("H100 SXM", 3350, {"float32": 494, "bfloat16": 989}),
    Gpu("RTX 4090", 1008, {"float32": 82.6, "bfloat16": 165.2}),
)


class Kernel(NamedTuple):
    """Elements that it reads and writes, operations that it does."""

    name: str
    elements: float
    flops: float = 0.0


def eager_kernels(config: Config, mode: str) -> list[Kernel]:
    """What eager PyTorch launches for this gate, alpha's single channel included."""
    n = config.batch
    fine, coarse = n * math.prod(config.size), n * math.prod(config.gating_size)
    x, g = config.channels * fine, config.gating * coarse
    i = config.inter * coarse
    patch = config.ratio ** len(config.size) if config.gate.startswith("paper") else 1
    strided = config.gate == "keras"
    read_x = x / config.ratio ** len(config.size) if strided else x
    theta_flops = 2 * i * config.channels * patch
    phi_flops = 2 * i * config.gating
    training = mode != "inference"
    norms = config.gate == "same_grid_norms"
    output = config.gate in ("paper_output", "keras")
    output_flops = 2 * x * config.channels

    def norm(name: str, size: float) -> Kernel:
        return Kernel(name, (3 if training else 2) * size)

    forward = [
        Kernel("theta", read_x + i, theta_flops),
        Kernel("phi", g + i, phi_flops),
        *([norm("theta's norm", i), norm("phi's norm", i)] if norms else []),
        Kernel("add", 3 * i),
        Kernel("relu", 2 * i),
        Kernel("psi", i + coarse, 2 * i),
        *([norm("psi's norm", coarse)] if norms else []),
        Kernel("sigmoid", 2 * coarse),
        *([Kernel("resize", coarse + fine)] if config.ratio > 1 else []),
        Kernel("multiply", 2 * x + fine, x),
        *([Kernel("W", 2 * x, output_flops), norm("W's norm", x)] if output else []),
    ]
    if not training:
        return forward
    return [
        *forward,
        *([Kernel("W's norm, backward", 5 * x), Kernel("W, dy", 2 * x, output_flops),
           Kernel("W, weight", 2 * x, output_flops)] if output else []),
        Kernel("dy * alpha", 2 * x + fine, x),
        Kernel("dy * x", 3 * x, x),
        Kernel("sum over channels", x + fine, x),
        *([Kernel("resize, backward", coarse + fine)] if config.ratio > 1 else []),
        Kernel("sigmoid, backward", 3 * coarse),
        *([Kernel("psi's norm, backward", 5 * coarse)] if norms else []),
        Kernel("psi, dq", coarse + i, 2 * i),
        Kernel("psi, weight", coarse + i, 2 * i),
        Kernel("relu, backward", 3 * i),
        *([Kernel("theta's and phi's norms, backward", 10 * i)] if norms else []),
        Kernel("theta, dx", i + x, theta_flops),
        Kernel("theta, weight", i + read_x, theta_flops),
        Kernel("phi, dg", i + g, phi_flops),
        Kernel("phi, weight", i + g, phi_flops),
        Kernel("add to dx", 3 * x),
    ]  # fmt: skip


def eager_ms(config: Config, mode: str, dtype: str, gpu: Gpu) -> float:
    """Modelled milliseconds of eager PyTorch."""
    return sum(_ms(k.elements * ITEMSIZE[dtype], k.flops, dtype, gpu) for k in eager_kernels(config, mode))


def fused_ms(config: Config, mode: str, dtype: str, gpu: Gpu) -> float:
    """Modelled milliseconds of one kernel forward and one backward. For gates without norms or W."""
    if mode == "inference":
        return _ms(needed_bytes(config, mode, dtype), needed_flops(config, mode), dtype, gpu)
    forward = needed_flops(config, "forward")
    return fused_ms(config, "inference", dtype, gpu) + _ms(
        needed_bytes(config, "backward", dtype), 3 * forward, dtype, gpu
    )


def can_model(config: AnyConfig) -> bool:
    """Whether one kernel each way is what attn_gate has for it: norms in training and W are PyTorch's."""
    return isinstance(config, Config) and config.gate in ("same_grid", "paper")


def to_json(configs: Iterable[AnyConfig]) -> dict[str, Any]:
    """All modelled numbers, with their label, as results.json has them apart from `rows`."""
    rows = [
        {
            "config": config.name,
            "gpu": gpu.name,
            "dtype": dtype,
            "mode": mode,
            "eager_ms": eager_ms(config, mode, dtype, gpu),
            "attn_gate_ms": fused_ms(config, mode, dtype, gpu),
        }
        for config in configs
        if can_model(config)
        for gpu in GPUS
        for dtype in gpu.tflops
        for mode in MODES
    ]
    gpus = {gpu.name: {"gbps": gpu.gbps, "tflops": gpu.tflops} for gpu in GPUS}
    return {"label": LABEL, "gpus": gpus, "rows": rows}


def _ms(count: float, flops: float, dtype: str, gpu: Gpu) -> float:
    return max(count / gpu.gbps / 1e6, flops / gpu.tflops[dtype] / 1e9)
