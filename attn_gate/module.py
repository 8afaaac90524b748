"""AttentionGate: a gate with its parameters, computed by fused operators as far as its spec allows."""

from __future__ import annotations

import dataclasses
import operator
import sys
from typing import Any

import torch
from torch import Tensor, nn

from attn_gate import backends, checks, engine, functional, reference
from attn_gate.decisions import Decisions
from attn_gate.folding import FoldCache
from attn_gate.listening import tell
from attn_gate.norms import make_norm
from attn_gate.spec import PRESETS, Fusion, GateSpec

_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_CONVOLUTIONS = (*engine.CONVOLUTIONS.values(), *_TRANSPOSED.values())
_INITS = ("default", "paper")


class AttentionGate(nn.Module):
    """Attention gate: y = x * resize(alpha) with alpha = sigmoid(psi . relu(theta x + resize(phi g))).

        gate = AttentionGate(64, 128)                  # the paper's: x [N, 64, 2H, 2W], g [N, 128, H, W]
        y = gate(x, g)
        y, alpha = gate(x, g, return_attention=True)   # alpha [N, 1, H, W]

    Args:
        in_channels: channels C of the skip connection x.
        gating_channels: channels G of the gating signal g.
        inter_channels: channels I in between; half of in_channels (at least 1) by default.
        spatial_dims: 1, 2 (the default) or 3; a GateSpec brings its own.
        preset: "paper" | "keras" | "same_grid" (see attn_gate.spec.PRESETS), or a GateSpec.
        backend: "auto" | "cpu" | "cuda" | "triton", for the fused operators, or "eager": plain PyTorch
            throughout. The attribute of this name may be changed at any time.
        recompute: whether the backward pass of the whole gate computes theta + phi again instead of keeping
            them; see functional.attention_gate. Where norms of theta or phi need statistics of their maps,
            True never makes those maps (batch norms, CPU, 2D and 3D), False runs projections and norms in
            PyTorch and fuses the rest, "auto" takes the fastest of these and of PyTorch throughout. The
            attribute may be changed at any time.
        init: "default", PyTorch's; or "paper", that of the authors' code: see `reset_parameters`.
        **overrides: fields of GateSpec that differ from the preset's.

    Layers: theta, phi, psi (convolutions); theta_norm, phi_norm, psi_norm, phi_tail and W (output transform:
    convolution W[0], norm W[1]), each None where the spec has none. Hooks on them are called: a layer with
    hooks, a norm over instances or groups, and what else the fused operators can't take (`gate.fusion(x, g)`
    says what and why) runs as it is in PyTorch, and the rest is fused. Batch norms are folded into the
    weights: in eval mode always, in training mode where that pays, or as `recompute` says.

    Raises:
        ValueError, TypeError: arguments out of range, unknown fields.

    Source: Oktay et al. 2018 (arXiv 1804.03999), section 2.2.
    """

    def __init__(
        self,
        in_channels: int,
        gating_channels: int,
        inter_channels: int | None = None,
        *,
        spatial_dims: int | None = None,
        preset: str | GateSpec = "paper",
        backend: str = "auto",
        recompute: str | bool = "auto",
        init: str = "default",
        **overrides: Any,
    ) -> None:
        super().__init__()
        in_channels = checked_channels("in_channels", in_channels)
        gating_channels = checked_channels("gating_channels", gating_channels)
        inter_channels = max(1, in_channels // 2) if inter_channels is None else inter_channels
        inter_channels = checked_channels("inter_channels", inter_channels)
        check_preset("preset", preset)
        if isinstance(preset, GateSpec):
            if spatial_dims not in (None, preset.spatial_dims):
                raise ValueError(
                    f"spatial_dims is {spatial_dims!r}, that of the GateSpec {preset.spatial_dims}"
                )
            spec = preset.replace(**overrides)
        else:
            spec = GateSpec.from_preset(preset, 2 if spatial_dims is None else spatial_dims, **overrides)

        self.spec = spec
        self.in_channels, self.gating_channels = in_channels, gating_channels
        self.inter_channels = inter_channels
        self.backend = backend
        self.recompute = recompute
        self._decisions, self._fold_cache = Decisions(), FoldCache()

        conv = engine.CONVOLUTIONS[spec.spatial_dims]
        # The zeros of "same" aren't symmetric; eager.pad puts them.
        padding = [(k - 1) // 2 if spec.theta_padding == "symmetric" else 0 for k in spec.theta_kernel]
        self.theta = conv(
            in_channels,
            inter_channels,
            spec.theta_kernel,
            stride=spec.theta_stride,
            padding=tuple(padding),
            bias=spec.theta_bias,
        )
        self.phi = conv(
            gating_channels, inter_channels, spec.phi_kernel, stride=spec.phi_stride, bias=spec.phi_bias
        )
        psi_channels = in_channels if spec.psi_channels == "in_channels" else 1
        self.psi = conv(inter_channels, psi_channels, 1, bias=spec.psi_bias)
        self.phi_tail = None
        if spec.phi_tail_stride is not None:
            # n * stride outputs, with stride 2 one more, which eager.project_g cuts off.
            self.phi_tail = _TRANSPOSED[spec.spatial_dims](
                inter_channels,
                inter_channels,
                3,
                stride=spec.phi_tail_stride,
                padding=tuple(int(s == 1) for s in spec.phi_tail_stride),
                output_padding=tuple(max(s - 3, 0) for s in spec.phi_tail_stride),
            )
        self.theta_norm = make_norm(spec.theta_norm, inter_channels, spec)
        self.phi_norm = make_norm(spec.phi_norm, inter_channels, spec)
        self.psi_norm = make_norm(spec.psi_norm, psi_channels, spec)
        self.W = None
        if spec.output != "none":
            layers = [conv(in_channels, in_channels, 1)]
            if spec.output == "conv_norm":
                layers.append(make_norm(spec.output_norm, in_channels, spec))
            self.W = nn.Sequential(*layers)
        if init != "default":
            self.reset_parameters(init)

    def __setattr__(self, name: str, value: Any) -> None:
        """Checks the attributes that may be changed at any time when they are."""
        if name == "backend":
            backends.check(value)
        elif name == "recompute":
            checks.check_recompute(value)
        super().__setattr__(name, value)

    def reset_parameters(self, init: str = "default") -> None:
        """Draws new parameters: "default", PyTorch's; "paper", that of the authors' code.

        The latter: weights of convolutions from N(0, 2 / fan_in) (Kaiming), their biases PyTorch's default,
        scales of norms from N(1, 0.02), their shifts 0.
        """
        if init not in _INITS:
            raise ValueError(f"init must be one of {', '.join(map(repr, _INITS))}; got {init!r}")
        for layer in self.modules():
            if layer is self or not hasattr(layer, "reset_parameters"):
                continue
            layer.reset_parameters()
            if init == "paper" and isinstance(layer, _CONVOLUTIONS):
                nn.init.kaiming_normal_(layer.weight, a=0, mode="fan_in")
            elif init == "paper":
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, x: Tensor, g: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """y [N, C, *S] for x [N, C, *S] and g [N, G, *Q]; with return_attention (y, alpha), alpha [N, 1, *R].

        y has x's dtype (autocast's under autocast), alpha is float32 (float64 for float64).
        psi_channels="in_channels" makes alpha [N, C, *R].

        Raises:
            TypeError: x or g isn't a floating tensor, or their dtypes differ.
            ValueError: ranks, batches, channels, devices or grids don't fit.
        """
        backend, recompute = self.backend, self.recompute
        layers, options = self._modules.items(), (self.spec, backend, recompute)
        plan = self._decisions.of(layers, x, g, options, lambda: self._plan(x, g))
        y, alpha = engine.run(
            self.spec, self, x, g, plan=plan, backend=backend, recompute=recompute, cache=self._fold_cache
        )
        tell(self, alpha)
        (y,) = functional.cast(y)  # the product has x's dtype, the output transform that of its last layer
        return (y, alpha) if return_attention else y

    def fusion(self, x: Tensor | None = None, g: Tensor | None = None) -> Fusion:
        """What of this gate fused operators compute now, and why not more; x and g add what sizes decide."""
        return engine.fusion(self.spec, self, x, g, self.recompute)

    def extra_repr(self) -> str:
        defaults = GateSpec(spatial_dims=self.spec.spatial_dims)
        fields = {f.name: getattr(self.spec, f.name) for f in dataclasses.fields(GateSpec)}
        told = [f"{name}={v!r}" for name, v in fields.items() if v != getattr(defaults, name)]
        channels = f"{self.in_channels}, {self.gating_channels}, {self.inter_channels}"
        dims, backend = f"spatial_dims={self.spec.spatial_dims}", f"backend={self.backend!r}"
        return ", ".join([channels, dims, *told, backend])

    def _plan(self, x: Tensor, g: Tensor) -> str:
        self._check(x, g)
        if self.backend == "eager" or _is_distributed(x):
            return "eager"
        return engine.decide(self.spec, self, x, g, self.recompute)

    def _check(self, x: Tensor, g: Tensor) -> None:
        spec = self.spec
        for name, t, channels in (("x", x, self.in_channels), ("g", g, self.gating_channels)):
            if not isinstance(t, Tensor) or not t.is_floating_point():
                got = f"a tensor of {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
                raise TypeError(f"{name} must be a floating-point tensor; got {got}")
            if t.ndim != spec.spatial_dims + 2:
                raise ValueError(
                    f"{name} must have {spec.spatial_dims + 2} dimensions, [N, channels] and "
                    f"{spec.spatial_dims} of space; got shape {tuple(t.shape)}"
                )
            if t.shape[1] != channels:
                other = self.gating_channels if name == "x" else self.in_channels
                hint = "; are x and g swapped? The call is gate(x, g)" if t.shape[1] == other else ""
                raise ValueError(f"{name} must have {channels} channels; got shape {tuple(t.shape)}{hint}")
        if x.shape[0] != g.shape[0]:
            raise ValueError(f"x and g must have the same batch size; got {x.shape[0]} and {g.shape[0]}")
        if x.device != g.device:
            raise ValueError(f"x and g must be on the same device; got {x.device} and {g.device}")
        dtypes = {x.dtype, g.dtype}
        if len(dtypes) > 1 and (reference.autocast_dtype(x) is None or torch.float64 in dtypes):
            raise TypeError(
                f"x and g must have the same dtype; got {x.dtype} and {g.dtype}; cast one of them, or use "
                "torch.autocast, which casts all but float64"
            )

        x_size, g_size = tuple(x.shape[2:]), tuple(g.shape[2:])
        theta_size, phi_size = spec.theta_grid(x_size, g_size), spec.phi_grid(g_size)
        for name, size, result in (("x", x_size, theta_size), ("g", g_size, phi_size)):
            if min(size + result) < 1:
                raise ValueError(f"{name} is too small for this gate: its grid {size} becomes {result}")
        if spec.phi_resize == "none" and theta_size != phi_size:
            raise ValueError(
                f"phi_resize='none' needs theta and phi on one grid; got {theta_size} from x and {phi_size} "
                "from g. Make the gate with phi_resize='linear', 'nearest' or 'align_corners', or resize g"
            )
        if spec.alpha_resize == "none" and theta_size != x_size:
            raise ValueError(
                f"alpha_resize='none' needs alpha on x's grid {x_size}; got {theta_size}. "
                "Make the gate with alpha_resize='linear', 'nearest' or 'align_corners'"
            )


def _is_distributed(t: Tensor) -> bool:
    """Whether it is a DTensor, whose layers know how to share it out, which the operators don't."""
    module = None if type(t) is Tensor else sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def checked_channels(name: str, value: Any) -> int:
    """A number of channels; NumPy's integers are some too."""
    try:
        channels = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        channels = 0
    if channels < 1:
        raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
    return channels


def check_preset(name: str, preset: Any) -> None:
    """A GateSpec or the name of one."""
    if not isinstance(preset, GateSpec) and not (isinstance(preset, str) and preset in PRESETS):
        names = ", ".join(map(repr, PRESETS))
        raise ValueError(f"{name} must be one of {names}, or a GateSpec; got {preset!r}")
