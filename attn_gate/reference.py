"""The attention gate in eager PyTorch: the ground truth that every backend is compared with.

    theta = W_theta * x + bias                     [N, I, *R]   1x1 or strided convolution
    phi   = W_phi * g                              [N, I, *Q]   1x1 convolution
    q     = act(theta + resize(phi, R))            [N, I, *R]
    alpha = sigmoid(psi . q + psi_bias)            [N, 1, *R]
    y     = x * resize(alpha, S)                   [N, C, *S]

Written to be read and to be right, not to be fast: plain differentiable operators, nothing in place, no
control flow that looks at data. So it can be differentiated any number of times, forward and backward, and
goes through torch.func, torch.compile and torch.export. 1D, 2D and 3D.

Precision: float64 inputs are computed in float64, everything else in float32, whatever the dtype of the
parameters. y (and nothing else) is rounded to x's dtype; alpha and logits stay in the precision of the
computation.
A surrounding autocast would undo that: callers that may run under one cast first and switch it off.

Source: Oktay et al., Attention U-Net, 2018 (arXiv 1804.03999), section 2.2 and figure 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,  # slope 0.01
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,  # exact: x * Phi(x) with erf
}
RESIZE_MODES = ("linear", "nearest", "align_corners")

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def gate(
    x: Tensor,
    theta: Tensor,
    phi: Tensor | None,
    psi_weight: Tensor,
    psi_bias: Tensor | None = None,
    *,
    phi_resize: str = "linear",
    alpha_resize: str = "linear",
    align_corners: bool = False,
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """The chain: alpha = sigmoid(psi . act(theta + resize(phi, R)) + psi_bias), y = x * resize(alpha, S).

    Args:
        x: skip connection [N, C, *S], any floating dtype.
        theta: projected skip connection [N, I, *R].
        phi: projected gating signal [N, I, *Q], or None where it is already added to theta.
        psi_weight: [1, I, 1..]; psi_bias: [1] or None.
        phi_resize, alpha_resize: "linear" | "nearest" | "align_corners"; equal sizes are left as they are.
        align_corners: True makes "linear" mean "align_corners".
        activation: a key of ACTIVATIONS.

    Returns:
        y [N, C, *S] in x's dtype, and alpha [N, 1, *R] in float32 (float64 for float64).

    Raises:
        ValueError: an unknown mode or activation.
    """
    logits = gate_logits(
        theta,
        phi,
        psi_weight,
        psi_bias,
        phi_resize=phi_resize,
        align_corners=align_corners,
        activation=activation,
    )
    alpha = torch.sigmoid(logits)
    return apply_attention(x, alpha, alpha_resize=alpha_resize, align_corners=align_corners), alpha


def attention_gate(
    x: Tensor,
    g: Tensor,
    theta_weight: Tensor,
    phi_weight: Tensor,
    psi_weight: Tensor,
    bias: Tensor | None = None,
    psi_bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    phi_resize: str = "linear",
    alpha_resize: str = "linear",
    align_corners: bool = False,
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """The whole gate: `gate` of x, theta = conv(x, theta_weight, bias, stride) and phi = conv(g, phi_weight).

    Args:
        x: skip connection [N, C, *S].
        g: gating signal [N, G, *Q].
        theta_weight: [I, C, *k]; phi_weight: [I, G, 1..]; psi_weight: [1, I, 1..].
        bias: [I], the bias of theta plus that of phi (a resize keeps constants, so the two are one); or None.
        psi_bias: [1] or None.
        stride, padding: of theta's convolution, one number or one per axis.
        phi_resize, alpha_resize, align_corners, activation: as in `gate`.

    Returns:
        y [N, C, *S] in x's dtype, and alpha [N, 1, *R] in float32 (float64 for float64).
    """
    logits = attention_logits(
        x,
        g,
        theta_weight,
        phi_weight,
        psi_weight,
        bias,
        psi_bias,
        stride=stride,
        padding=padding,
        phi_resize=phi_resize,
        align_corners=align_corners,
        activation=activation,
    )
    alpha = torch.sigmoid(logits)
    return apply_attention(x, alpha, alpha_resize=alpha_resize, align_corners=align_corners), alpha


def gate_logits(
    theta: Tensor,
    phi: Tensor | None,
    psi_weight: Tensor,
    psi_bias: Tensor | None = None,
    *,
    phi_resize: str = "linear",
    align_corners: bool = False,
    activation: str = "relu",
) -> Tensor:
    """`gate` before the sigmoid: psi . act(theta + resize(phi)) + psi_bias; [N, 1, *R], float32 at least."""
    dtype = accumulation_dtype(theta)
    q = theta.to(dtype)
    if phi is not None:
        q = q + resize(phi.to(dtype), q.shape[2:], resize_mode(phi_resize, align_corners))
    return _conv(activate(q, activation), psi_weight, psi_bias, dtype=dtype)


def attention_logits(
    x: Tensor,
    g: Tensor,
    theta_weight: Tensor,
    phi_weight: Tensor,
    psi_weight: Tensor,
    bias: Tensor | None = None,
    psi_bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    phi_resize: str = "linear",
    align_corners: bool = False,
    activation: str = "relu",
) -> Tensor:
    """`attention_gate` before the normaliser: logits [N, 1, *R] in float32 (float64 for float64)."""
    dtype = accumulation_dtype(x)
    theta = _conv(x, theta_weight, bias, stride, padding, dtype=dtype)
    phi = _conv(g, phi_weight, dtype=dtype)
    return gate_logits(
        theta,
        phi,
        psi_weight,
        psi_bias,
        phi_resize=phi_resize,
        align_corners=align_corners,
        activation=activation,
    )


def apply_attention(
    x: Tensor, alpha: Tensor, *, alpha_resize: str = "linear", align_corners: bool = False
) -> Tensor:
    """x * resize(alpha, S) in x's dtype: x [N, C, *S], alpha [N, 1, *R] or, a map per channel, [N, C, *R]."""
    dtype = accumulation_dtype(x)
    alpha = resize(alpha.to(dtype), x.shape[2:], resize_mode(alpha_resize, align_corners))
    return (x.to(dtype) * alpha).to(x.dtype)


def moments(
    x: Tensor, kernel: int | Sequence[int] = 1, stride: int | Sequence[int] = 1
) -> tuple[Tensor, Tensor]:
    """Mean [K] and biased covariance [K, K], in float64, of x's patches (K = channels * taps, taps fastest).

    So that theta = conv(x, W, b, stride) has the mean W m + b and the variances diag(W Cov W^T).
    """
    axes = x.ndim - 2
    kernel, stride = ([v] * axes if isinstance(v, int) else list(v) for v in (kernel, stride))
    coarse = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    taps = []
    for tap in itertools.product(*map(range, kernel)):
        ends = [t + s * (n - 1) + 1 for t, s, n in zip(tap, stride, coarse, strict=True)]
        cut = tuple(slice(t, end, s) for t, end, s in zip(tap, ends, stride, strict=True))
        taps.append(x[(slice(None), slice(None), *cut)])
    rows = torch.stack(taps, 2).flatten(1, 2).transpose(0, 1).flatten(1).to(accumulation_dtype(x))  # [K, n]
    mean = rows.mean(1)
    centred = rows - mean[:, None]
    return mean.double(), (centred @ centred.T / rows.shape[1]).double()


def resize(t: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """t [N, C, *R] on the grid `size`; t itself where R is that grid already.

    mode: "linear" is F.interpolate(size=size, mode="linear" | "bilinear" | "trilinear", align_corners=False),
    "align_corners" the same with align_corners=True, "nearest" is F.interpolate(size=size, mode="nearest").
    """
    if mode not in RESIZE_MODES:
        raise ValueError(f"resize mode must be one of {', '.join(RESIZE_MODES)}; got {mode!r}")
    if tuple(t.shape[2:]) == tuple(size):
        return t
    if mode == "nearest":
        return F.interpolate(t, size=tuple(size), mode="nearest")
    return F.interpolate(t, size=tuple(size), mode=_LINEAR[t.ndim - 2], align_corners=mode == "align_corners")


def activate(t: Tensor, activation: str) -> Tensor:
    """The activation of this name; see ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    return ACTIVATIONS[activation](t)


def resize_mode(mode: str, align_corners: bool) -> str:
    """The two ways to ask for aligned corners, as one mode."""
    return "align_corners" if mode == "linear" and align_corners else mode


def accumulation_dtype(t: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants on t's device; None where it is off, or isn't known there."""
    device = t.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def convolution(axes: int) -> Callable[..., Tensor]:
    """F.conv1d, F.conv2d or F.conv3d."""
    return _CONV[axes]


def _conv(
    t: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    *,
    dtype: torch.dtype,
) -> Tensor:
    bias = None if bias is None else bias.to(dtype)
    stride, padding = (v if isinstance(v, int) else tuple(v) for v in (stride, padding))
    return convolution(t.ndim - 2)(t.to(dtype), weight.to(dtype), bias, stride=stride, padding=padding)
