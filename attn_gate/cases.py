"""Named gate cases that the tests and `python -m attn_gate verify` share: sizes, options, and drawn inputs.

One case describes a whole gate; each of the five operators takes its part of it. The sizes are small, and
chosen to leave no vector, tile or resize in its comfortable multiple.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference

OPERATORS = ("gate", "gate_logits", "attention_gate", "attention_logits", "apply_attention")
LAYOUTS = ("contiguous", "channels_last")

# Pre-activations nearer to 0 than this are redrawn: there rounding, not the formula, decides relu's slope.
_MARGIN = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class GateCase:
    """One gate, by its sizes and options.

    Attributes:
        name: short and unique.
        x_size: S, grid of x; g_size: Q, grid of g. The number of axes is that of the gate.
        batch, channels, gating, inter: N, C, G, I.
        kernel, stride: of theta's convolution; a number, or one per axis.
        phi_resize, alpha_resize, activation: as the operators take them.
        bias, psi_bias: whether there are any.
        phi: False gives `gate` and `gate_logits` no phi: theta holds the sum.
    """

    name: str
    x_size: tuple[int, ...]
    g_size: tuple[int, ...]
    batch: int = 2
    channels: int = 6
    gating: int = 5
    inter: int = 3
    kernel: int | tuple[int, ...] = 1
    stride: int | tuple[int, ...] = 1
    phi_resize: str = "linear"
    alpha_resize: str = "linear"
    activation: str = "relu"
    bias: bool = True
    psi_bias: bool = True
    phi: bool = True

    @property
    def axes(self) -> int:
        """1, 2 or 3."""
        return len(self.x_size)

    @property
    def theta_size(self) -> tuple[int, ...]:
        """R, the grid of theta and alpha."""
        sizes = zip(self.x_size, self._per_axis(self.kernel), self._per_axis(self.stride), strict=True)
        return tuple((n - k) // s + 1 for n, k, s in sizes)

    def options(self, operator: str) -> dict[str, Any]:
        """The keyword arguments that this operator takes."""
        options: dict[str, Any] = {}
        if operator.startswith("attention"):
            options["stride"] = self.stride
        if operator != "apply_attention":
            options.update(phi_resize=self.phi_resize, activation=self.activation)
        if not operator.endswith("_logits"):
            options["alpha_resize"] = self.alpha_resize
        return options

    def inputs(
        self,
        operator: str,
        dtype: torch.dtype = torch.float32,
        layout: str = "contiguous",
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> dict[str, Tensor | None]:
        """The operator's tensors by name, in the order of its arguments; equal numbers on every device.

        Maps come in `dtype` and `layout`, parameters in float32 (float64 for float64). Theta and phi have
        variance 1, and no pre-activation lies where rounding would decide relu's derivative.
        """
        draw = _Draw(dtype, seed)
        if operator == "apply_attention":
            tensors = self._inputs_of_apply(draw)
        elif operator.startswith("attention"):
            tensors = self._inputs_of_whole(draw)
        else:
            tensors = self._inputs_of_chain(draw)
            if operator == "gate":
                tensors = {"x": draw.map(self.batch, self.channels, *self.x_size), **tensors}
        return {name: _arranged(name, t, layout, device) for name, t in tensors.items()}

    def _inputs_of_apply(self, draw: _Draw) -> dict[str, Tensor | None]:
        alpha = torch.sigmoid(draw.map(self.batch, 1, *self.theta_size).to(draw.parameter_dtype))
        return {"x": draw.map(self.batch, self.channels, *self.x_size), "alpha": alpha}

    def _inputs_of_chain(self, draw: _Draw) -> dict[str, Tensor | None]:
        theta = draw.map(self.batch, self.inter, *self.theta_size)
        phi = draw.map(self.batch, self.inter, *self.g_size) if self.phi else None
        psi_weight, psi_bias = self._psi(draw)
        self._leave_the_kink(draw, theta, lambda: self._sum(theta, phi))
        return {"theta": theta, "phi": phi, "psi_weight": psi_weight, "psi_bias": psi_bias}

    def _inputs_of_whole(self, draw: _Draw) -> dict[str, Tensor | None]:
        x = draw.map(self.batch, self.channels, *self.x_size)
        g = draw.map(self.batch, self.gating, *self.g_size)
        kernel = self._per_axis(self.kernel)
        theta_weight = draw.weight(self.inter, self.channels, *kernel)
        phi_weight = draw.weight(self.inter, self.gating, *[1] * self.axes)
        bias = draw.parameter(self.inter) if self.bias else None
        psi_weight, psi_bias = self._psi(draw)

        def preactivation() -> Tensor:
            conv, double_bias = reference.convolution(self.axes), None if bias is None else bias.double()
            theta = conv(x.double(), theta_weight.double(), double_bias, stride=self.stride)
            return self._sum(theta, conv(g.double(), phi_weight.double()))

        self._leave_the_kink(draw, x, preactivation, self._per_axis(self.stride))
        return {
            "x": x, "g": g, "theta_weight": theta_weight, "phi_weight": phi_weight,
            "psi_weight": psi_weight, "bias": bias, "psi_bias": psi_bias,
        }  # fmt: skip

    def _psi(self, draw: _Draw) -> tuple[Tensor, Tensor | None]:
        return 2 * draw.weight(1, self.inter, *[1] * self.axes), draw.parameter(1) if self.psi_bias else None

    def _sum(self, theta: Tensor, phi: Tensor | None) -> Tensor:
        if phi is None:
            return theta.double()
        return theta.double() + reference.resize(phi.double(), self.theta_size, self.phi_resize)

    def _leave_the_kink(
        self, draw: _Draw, t: Tensor, preactivation: Callable[[], Tensor], stride: Sequence[int] | None = None
    ) -> None:
        """Redraws the voxels of t, on theta's grid or `stride` as fine, whose pre-activation is next to 0."""
        if self.activation not in ("relu", "leaky_relu"):
            return
        stride = stride or self._per_axis(1)
        for _ in range(100):
            sample, *voxel = (preactivation().abs() < _MARGIN[t.dtype]).any(1).nonzero(as_tuple=True)
            if not len(sample):
                return
            voxel = [i * s for i, s in zip(voxel, stride, strict=True)]
            t[(sample, slice(None), *voxel)] = draw.map(len(sample), t.shape[1])

    def _per_axis(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * self.axes if isinstance(value, int) else value


class _Draw:
    """Normal numbers of one seed, in a map's or a parameter's dtype."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.generator = torch.Generator().manual_seed(seed)

    def map(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def parameter(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.parameter_dtype)

    def weight(self, *shape: int) -> Tensor:
        """Of a convolution that keeps the variance."""
        return self.parameter(*shape) / math.sqrt(math.prod(shape[1:]))


def channels_last(t: Tensor) -> Tensor:
    """The same map with its channels fastest in memory; 1D too, for which PyTorch has no memory format."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _arranged(name: str, t: Tensor | None, layout: str, device: str | torch.device) -> Tensor | None:
    if t is None:
        return None
    is_map = name in ("x", "g", "theta", "phi")
    return (channels_last(t) if is_map and layout == "channels_last" else t).to(device)


_PATCHES = {"kernel": 2, "stride": 2}
_NEAREST = {"phi_resize": "nearest", "alpha_resize": "nearest"}
_ALIGNED = {"phi_resize": "align_corners", "alpha_resize": "align_corners"}

CASES = (
    # one grid
    GateCase("same grid 2D", (9, 13), (9, 13), channels=16, gating=16, inter=8),
    GateCase("same grid 1D", (37,), (37,)),
    GateCase("same grid 3D", (3, 5, 7), (3, 5, 7)),
    GateCase("same grid, several tiles", (31, 37), (31, 37), channels=19, gating=17, inter=33),
    GateCase("no bias", (7, 9), (7, 9), bias=False, psi_bias=False),
    GateCase("theta holds the sum", (7, 9), (7, 9), phi=False),
    GateCase("one voxel", (1, 1), (1, 1)),
    GateCase("one channel of each", (5, 11), (5, 11), channels=1, gating=1, inter=1),
    # the paper's: theta is a patch convolution, alpha is interpolated
    GateCase("paper 1D", (22,), (11,), **_PATCHES),
    GateCase("paper 2D", (14, 18), (7, 9), channels=8, gating=16, inter=4, **_PATCHES),
    GateCase("paper 3D", (6, 8, 10), (3, 4, 5), channels=8, gating=16, inter=4, **_PATCHES),
    GateCase("paper 3D, odd sizes", (7, 11, 13), (2, 3, 5), **_PATCHES),
    # Keras's: every second voxel, nearest
    GateCase("keras 2D", (14, 18), (7, 9), stride=2, **_NEAREST),
    GateCase("keras 3D", (4, 6, 10), (2, 3, 5), stride=2, **_NEAREST),
    GateCase("nearest, odd ratios", (11, 17), (3, 4), stride=3, **_NEAREST),
    # phi is interpolated
    GateCase("g twice coarser", (10, 14), (5, 7)),
    GateCase("g finer than theta", (12, 10), (11, 13), **_PATCHES),
    GateCase("g of one voxel", (6, 7), (1, 1)),
    GateCase("aligned corners", (13, 10), (5, 3), stride=2, **_ALIGNED),
    GateCase("aligned corners 3D", (5, 7, 6), (2, 1, 4), stride=2, **_ALIGNED),
    GateCase("kernel 2, stride 3", (11, 13), (4, 5), kernel=2, stride=3),
    # activations
    GateCase("leaky relu", (7, 9), (7, 9), activation="leaky_relu"),
    GateCase("softplus", (7, 9), (4, 5), activation="softplus"),
    GateCase("silu", (8, 10), (4, 5), activation="silu", **_PATCHES),
    GateCase("gelu", (7, 9), (7, 9), activation="gelu"),
)
