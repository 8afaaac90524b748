"""The gates whose kernels bench/triton_resources.csv has, and the arguments of their operators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

LAYOUTS = ("contiguous", "channels last")


@dataclass(frozen=True)
class Setting:
    """A gate as it is launched.

    Attributes:
        x, g, channels, gating, inter, resize, activation: the gate; window: theta's kernel and stride.
        wide: with 64-bit offsets.
        tf32: with the matrix products of float32 that torch.backends.cuda.matmul allows.
        stored: pre-activations are kept for backward; and logits alone, as norms on psi take them.
    """

    name: str
    x: tuple[int, ...]
    g: tuple[int, ...]
    channels: int
    gating: int
    inter: int
    window: int = 1
    resize: str = "linear"
    activation: str = "relu"
    wide: bool = False
    tf32: bool = False
    stored: bool = False


# Sizes from practice; C, G, I and the grids are multiples of 16 as they are there.
SAME = Setting("same grid 2D", (64, 64), (64, 64), 64, 64, 32)
PAPER = Setting("paper 2D", (64, 64), (32, 32), 64, 128, 64, 2)
PAPER_3D = Setting("paper 3D", (16, 32, 32), (8, 16, 16), 32, 64, 32, 2)
SETTINGS = (
    SAME,
    PAPER,
    PAPER_3D,
    Setting("keras 2D, nearest", (64, 64), (32, 32), 64, 64, 64, 2, "nearest"),
    Setting("g coarser", (64, 64), (32, 32), 64, 64, 32),
    Setting("same grid, deep", (16, 16), (16, 16), 512, 512, 256),
)
_FLOAT32, _BFLOAT16, _FLOAT16 = torch.float32, torch.bfloat16, torch.float16
# On large grids the weight gradients are summed in the pass itself (`geometry.splits`).
LARGE = (
    (replace(SAME, name="same grid 2D, large", x=(512, 512), g=(512, 512)), _BFLOAT16),
    (replace(PAPER, name="paper 2D, large", x=(512, 512), g=(256, 256)), _FLOAT32),
    (replace(PAPER_3D, name="paper 3D, large", x=(64, 128, 128), g=(32, 64, 64)), _FLOAT32),
    (replace(PAPER_3D, name="paper 3D, large", x=(64, 128, 128), g=(32, 64, 64)), _BFLOAT16),
)
# What else a launch may be specialised for, with the first choice of block sizes.
VARIANTS = (
    (SAME, _FLOAT16),
    (replace(SAME, name="same grid 2D, stored", stored=True), _BFLOAT16),
    (replace(PAPER, name="paper 2D, stored", stored=True), _FLOAT32),
    (replace(SAME, name="same grid 2D, 64-bit offsets", wide=True), _FLOAT32),
    (replace(PAPER, name="paper 2D, 64-bit offsets", wide=True), _BFLOAT16),
    (replace(PAPER, name="paper 2D, 64-bit offsets", wide=True), _FLOAT32),
    (replace(PAPER, name="paper 2D, tf32", tf32=True), _FLOAT32),
    (replace(PAPER, name="paper 2D, silu", activation="silu"), _BFLOAT16),
    (replace(PAPER, name="paper 2D, leaky relu", activation="leaky_relu"), _FLOAT32),
    (replace(SAME, name="same grid 2D, gelu", activation="gelu"), _FLOAT32),
    (replace(SAME, name="same grid 2D, softplus", activation="softplus"), _BFLOAT16),
    (Setting("same grid 2D, odd sizes", (63, 65), (63, 65), 37, 29, 19), _FLOAT32),
    (Setting("paper 2D, odd sizes", (63, 65), (31, 32), 37, 29, 19, 2), _BFLOAT16),
    (Setting("paper 3D, odd sizes", (9, 17, 21), (4, 8, 10), 19, 29, 9, 2), _FLOAT32),
    (Setting("one channel of each", (63, 65), (63, 65), 1, 1, 1), _FLOAT32),
    (Setting("aligned corners", (64, 64), (24, 24), 64, 64, 32, 2, "align_corners"), _FLOAT32),
    (Setting("aligned corners 3D", (16, 32, 32), (6, 12, 12), 32, 64, 32, 2, "align_corners"), _BFLOAT16),
)


@dataclass(frozen=True)
class Combination:
    """A setting as it is compiled: with every choice of block sizes, or the first alone."""

    setting: Setting
    dtype: torch.dtype
    layout: str
    every_choice: bool


def combinations() -> Iterator[Combination]:
    """All that each GPU's kernels are compiled for."""
    for setting in SETTINGS:
        for dtype in (_FLOAT32, _BFLOAT16):
            for layout in LAYOUTS:
                yield Combination(setting, dtype, layout, True)
    for setting, dtype in LARGE:
        yield Combination(setting, dtype, "contiguous", True)
    for setting, dtype in VARIANTS:
        for layout in LAYOUTS if setting.resize == "align_corners" else LAYOUTS[:1]:
            yield Combination(setting, dtype, layout, False)


def calls(setting: Setting, dtype: torch.dtype, layout: str) -> list[tuple[str, tuple]]:
    """Names of operators, and their arguments (uninitialised: nothing runs)."""
    axes = len(setting.x)
    window = [setting.window] * axes
    coarse = tuple(n // setting.window for n in setting.x)
    last = torch.channels_last if axes == 2 else torch.channels_last_3d
    memory_format = last if layout == "channels last" else torch.contiguous_format

    def new(channels: int, grid: tuple[int, ...]) -> torch.Tensor:
        return torch.empty((1, channels, *grid), dtype=dtype, memory_format=memory_format)

    x, g = new(setting.channels, setting.x), new(setting.gating, setting.g)
    theta, phi = new(setting.inter, coarse), new(setting.inter, setting.g)
    weights = (
        torch.empty((setting.inter, setting.channels, *window), memory_format=memory_format),
        torch.empty(setting.inter, setting.gating, *[1] * axes),
    )
    bias, one, alpha = torch.empty(setting.inter), torch.empty(1), torch.empty(1, 1, *coarse)
    modes = setting.resize, setting.resize, setting.activation
    whole = x, g, *weights, bias, bias
    none = x.new_empty(0)
    if setting.stored:
        preact, logits = new(setting.inter, coarse), (setting.resize, setting.activation)
        return [
            ("attention_gate_fwd", (*whole, one, window, *modes, True)),
            (
                "attention_gate_bwd",
                (x, alpha, *whole, alpha, preact, window, *modes, 127),
            ),
            ("gate_logits_fwd", (theta, phi, bias, one, *logits)),
            ("gate_logits_bwd", (alpha, theta, phi, bias, *logits, 15)),
            ("attention_logits_fwd", (*whole, one, window, *logits, False)),
            ("attention_logits_bwd", (alpha, *whole, none, window, *logits, 127)),
        ]
    return [
        ("gate_fwd", (x, theta, phi, bias, one, *modes)),
        ("gate_bwd", (x, alpha, x, theta, phi, bias, alpha, *modes, 31)),
        ("attention_gate_fwd", (*whole, one, window, *modes, False)),
        ("attention_gate_bwd", (x, alpha, *whole, alpha, none, window, *modes, 127)),
        ("gate_apply_fwd", (x, alpha, setting.resize)),
        ("gate_apply_bwd", (x, x, alpha, setting.resize, 3)),
    ]
