"""GateSpec: one validated description of an attention gate, read by modules, reference and verification.

    theta = norm(conv(resize(x, Q)))                x on g's grid first, in few gates
    phi   = norm(transposed_conv(conv(g)))          the transposed convolution in few gates
    q     = act(theta + resize(phi, R))             or theta * resize(phi, R)
    alpha = normaliser(norm(psi(q)))                sigmoid, mostly
    y     = output_transform(x * resize(alpha, S))

PRESETS holds the three gates that most networks use; every other published one is some of these fields away.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from attn_gate.reference import ACTIVATIONS

RESIZES = ("none", "nearest", "linear", "align_corners")
NORMS = ("none", "batch", "instance", "group")
CHOICES: dict[str, tuple[Any, ...]] = {
    "spatial_dims": (1, 2, 3),
    "x_resize": RESIZES,
    "theta_padding": ("none", "symmetric", "same"),
    "phi_resize": RESIZES,
    "combine": ("add", "multiply"),
    "activation": tuple(ACTIVATIONS),
    "psi_channels": (1, "in_channels"),
    "normaliser": ("sigmoid", "softmax", "mean", "mean_flow", "range"),
    "theta_norm": NORMS,
    "phi_norm": NORMS,
    "psi_norm": NORMS,
    "alpha_resize": RESIZES,
    "output": ("none", "conv", "conv_norm"),
    "output_norm": NORMS[1:],
}

PRESETS: dict[str, dict[str, Any]] = {
    # Oktay et al. 2018: x comes to g's grid by a strided convolution, the map goes back by linear
    # interpolation. The authors' code adds an output transform (output="conv_norm"), which the paper's
    # formula lacks.
    "paper": {"theta_kernel": 2, "theta_stride": 2, "theta_bias": False},
    # The block of the Keras implementations: every second voxel of x, nearest upsampling, 1x1 convolution and
    # batch norm with Keras's constants.
    "keras": {
        "theta_stride": 2,
        "phi_resize": "nearest",
        "alpha_resize": "nearest",
        "output": "conv_norm",
        "norm_eps": 1e-3,
        "norm_momentum": 0.01,
        "norm_biased_variance": True,
    },
    # The gate of MONAI and of most 2D copies: x and g on one grid, batch norm after every projection.
    "same_grid": {
        "phi_resize": "none",
        "alpha_resize": "none",
        "theta_norm": "batch",
        "phi_norm": "batch",
        "psi_norm": "batch",
    },
}


class Fusion(NamedTuple):
    """Which part of a gate one fused operator takes, and why not more.

    plan: "whole"         attention_gate: both projections to the product
          "whole_logits"  attention_logits; norm of psi and normaliser in PyTorch; apply_attention
          "whole_moments" the same, with batch norms in training mode folded by the statistics of x and g
          "chain"         theta and phi in PyTorch; gate
          "chain_logits"  theta and phi in PyTorch; gate_logits; norm of psi and normaliser; apply_attention
          "apply"         everything up to alpha in PyTorch; apply_attention
          "eager"         nothing is fused
    reason: what keeps the plan from being "whole"; empty for "whole".
    """

    plan: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """What an attention gate computes, apart from its numbers of channels. The module's text has the graph.

    Attributes:
        spatial_dims: 1, 2 or 3.
        x_resize: how x is brought to g's grid before theta; "none" leaves it (theta's stride does it).
        theta_kernel, theta_stride: of the convolution on x; one number or one per axis (held as a tuple).
        theta_padding: "none"; "symmetric", (k - 1) // 2 on both sides; "same", as TensorFlow pads: to
            ceil(n / stride) outputs, the odd zero at the end.
        theta_bias: whether theta has a bias.
        phi_kernel, phi_stride, phi_bias: of the convolution on g (no padding).
        phi_tail_stride: stride of a learned 3x3(x3) transposed convolution behind phi, I to I channels with
            bias and TensorFlow's "same" padding (n * stride outputs); None for no such layer.
        phi_resize: how phi is brought to theta's grid, after its norm.
        combine: "add" | "multiply".
        activation: "relu" | "leaky_relu" (slope 0.01) | "softplus" | "silu" | "gelu".
        psi_bias: whether psi (1x1 convolution) has a bias.
        psi_channels: 1, one map; or "in_channels", one map per channel of x.
        normaliser: "sigmoid", or over all voxels of one map q: "softmax"; "mean", q / sum(q);
            "mean_flow", (q - min) / sum(q - min); "range", (q - min) / (max - min). The last three are NaN on
            a constant map, as in the code that introduced them.
        theta_norm, phi_norm, psi_norm: "none" | "batch" | "instance" | "group", with learned scale and shift.
        norm_groups: groups of a "group" norm, at most (fewer channels make fewer groups).
        norm_eps, norm_momentum: constants of all norms, in PyTorch's sense (Keras's momentum 0.99 is 0.01).
        norm_biased_variance: True keeps the biased batch variance in running_var, as Keras does; PyTorch
            keeps the unbiased one.
        alpha_resize: how alpha is brought to x's grid, after the normaliser.
        output: what follows the product: "none"; "conv", 1x1, C to C, with bias; "conv_norm", also a norm.
        output_norm: the norm of "conv_norm".

    Raises:
        ValueError, TypeError: a field has a value that it can't have; the message says what it can.
    """

    spatial_dims: int = 2
    x_resize: str = "none"
    theta_kernel: int | tuple[int, ...] = 1
    theta_stride: int | tuple[int, ...] = 1
    theta_padding: str = "none"
    theta_bias: bool = True
    phi_kernel: int | tuple[int, ...] = 1
    phi_stride: int | tuple[int, ...] = 1
    phi_bias: bool = True
    phi_tail_stride: int | tuple[int, ...] | None = None
    phi_resize: str = "linear"
    combine: str = "add"
    activation: str = "relu"
    psi_bias: bool = True
    psi_channels: int | str = 1
    normaliser: str = "sigmoid"
    theta_norm: str = "none"
    phi_norm: str = "none"
    psi_norm: str = "none"
    norm_groups: int = 8
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1
    norm_biased_variance: bool = False
    alpha_resize: str = "linear"
    output: str = "none"
    output_norm: str = "batch"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            # `True in (1, 2, 3)` holds, and so does 1.0: compare the types too.
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
        for name in ("theta_kernel", "theta_stride", "phi_kernel", "phi_stride", "phi_tail_stride"):
            value = getattr(self, name)
            if name != "phi_tail_stride" or value is not None:
                object.__setattr__(self, name, _per_axis(name, value, self.spatial_dims))
        for name in ("theta_bias", "phi_bias", "psi_bias", "norm_biased_variance"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        if not _is_int(self.norm_groups) or self.norm_groups < 1:
            raise ValueError(f"norm_groups must be an integer of at least 1; got {self.norm_groups!r}")
        for name, lowest, highest in (("norm_eps", 0.0, math.inf), ("norm_momentum", 0.0, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number; got {value!r}")
            if not (lowest < value <= highest and math.isfinite(value)):
                limit = "at most 1" if highest == 1.0 else "finite"
                raise ValueError(f"{name} must be more than 0 and {limit}; got {value!r}")

    @classmethod
    def from_preset(cls, preset: str, spatial_dims: int = 2, **overrides: Any) -> GateSpec:
        """The spec of this preset ("paper" | "keras" | "same_grid"), with any field replaced."""
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}; got {preset!r}")
        return cls(spatial_dims=spatial_dims, **{**PRESETS[preset], **known_fields(overrides)})

    def replace(self, **overrides: Any) -> GateSpec:
        """A copy with these fields replaced, validated anew."""
        return dataclasses.replace(self, **known_fields(overrides))

    def theta_pads(self, size: Sequence[int]) -> list[tuple[int, int]]:
        """Zeros that theta puts (before, after) each axis of an input of this size."""
        pads = []
        for n, k, s in zip(size, self.theta_kernel, self.theta_stride, strict=True):
            if self.theta_padding == "same":
                total = max((-(-n // s) - 1) * s + k - n, 0)
                pads.append((total // 2, total - total // 2))
            else:
                pads.append(((k - 1) // 2,) * 2 if self.theta_padding == "symmetric" else (0, 0))
        return pads

    def input_grid(self, x_size: Sequence[int], g_size: Sequence[int]) -> Sequence[int]:
        """The grid of theta's input: x's, or g's where x is resized to that."""
        return x_size if self.x_resize == "none" else g_size

    def theta_grid(self, x_size: Sequence[int], g_size: Sequence[int]) -> tuple[int, ...]:
        """R: the grid of theta, and of alpha, for x and g of these sizes."""
        size = self.input_grid(x_size, g_size)
        axes = zip(size, self.theta_pads(size), self.theta_kernel, self.theta_stride, strict=True)
        return tuple((n + sum(pad) - k) // s + 1 for n, pad, k, s in axes)

    def phi_grid(self, g_size: Sequence[int]) -> tuple[int, ...]:
        """The grid of phi before its resize, for g of this size."""
        tail = self.phi_tail_stride or (1,) * self.spatial_dims
        axes = zip(g_size, self.phi_kernel, self.phi_stride, tail, strict=True)
        return tuple(((n - k) // s + 1) * r for n, k, s, r in axes)

    def fusion(self, unfused: Collection[str] = ()) -> Fusion:
        """What the fused operators take of this gate.

        unfused: parts that have to run as they are for a reason outside the spec: names of theta, phi, psi,
            theta_norm, phi_norm, psi_norm. Without it, batch norms count as folded into the weights, as in
            eval mode; in training mode theirs are the names to give.
        """
        if self.psi_channels != 1:
            reason = "psi_channels='in_channels': the fused operators hold one map, not one per channel"
            return Fusion("eager", reason)
        if self.combine != "add":
            return Fusion("apply", "combine='multiply': the fused operators add theta and phi")
        if "psi" in unfused:
            return Fusion("apply", "psi has to run as a module")

        norms = {f"{part}_norm": getattr(self, f"{part}_norm") for part in ("theta", "phi", "psi")}
        active = {name for name, kind in norms.items() if kind in ("instance", "group") or name in unfused}
        logits = []
        if self.normaliser != "sigmoid":
            logits.append(f"normaliser={self.normaliser!r} needs the whole map")
        if "psi_norm" in active:
            logits.append(f"psi's {norms['psi_norm']} norm needs the statistics of the whole map")
        if self.x_resize != "none":
            logits.append(f"x_resize={self.x_resize!r} projects another x than the one that is weighed")

        chain = []
        for name in ("theta_norm", "phi_norm"):
            if name in active:
                chain.append(f"{name[:-5]}'s {norms[name]} norm needs statistics")
        chain += [f"{part} has to run as a module" for part in ("theta", "phi") if part in unfused]
        axes = list(zip(self.theta_kernel, self.theta_stride, strict=True))
        if any(k > s for k, s in axes):
            chain.append(f"theta's patches overlap (kernel {self.theta_kernel}, stride {self.theta_stride})")
        if self.theta_padding == "symmetric" and any(k > 2 for k, _ in axes):
            chain.append("theta is padded")
        if any(k != 1 for k in self.phi_kernel + self.phi_stride):
            chain.append(f"phi isn't 1x1 with stride 1 (kernel {self.phi_kernel}, stride {self.phi_stride})")
        if self.phi_tail_stride is not None:
            chain.append("phi ends in a transposed convolution")

        plan = ("chain" if chain else "whole") + ("_logits" if logits else "")
        return Fusion(plan, "; ".join(chain + logits))


def known_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The same dictionary, if all its keys are fields of GateSpec that may be given beside spatial_dims."""
    fields = [f.name for f in dataclasses.fields(GateSpec)]
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise TypeError(f"GateSpec has no field {', '.join(map(repr, unknown))}; it has {', '.join(fields)}")
    return values


def _per_axis(name: str, value: Any, spatial_dims: int) -> tuple[int, ...]:
    values = (value,) * spatial_dims if _is_int(value) else value
    if not isinstance(values, (tuple, list)) or not all(map(_is_int, values)):
        raise TypeError(f"{name} must be an integer or one integer per axis; got {value!r}")
    if len(values) != spatial_dims:
        raise ValueError(f"{name} must have one number for each of the {spatial_dims} axes; got {value!r}")
    if any(v < 1 for v in values):
        raise ValueError(f"{name} must be at least 1; got {value!r}")
    return tuple(values)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
