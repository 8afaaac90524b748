"""The fused operators as plain functions: arguments checked, autocast applied, the backend chosen.

Shapes: N batch, C channels of x, G of g, I in between; grids S of x, R of theta (and alpha), Q of g, each of
    1, 2 or 3 axes. Maps are float32, float64, bfloat16 or float16, contiguous or channels last (both native;
    other strides are copied); sums are taken in float32 (float64 for float64), and alpha comes in that dtype.
    Where a CPU has products of bfloat16, autocast to it may round weights of projections, as PyTorch's
    convolutions do, and backward of bfloat16 maps and weights the gradient of the pre-activation.
    The eager twin of every function is in `attn_gate.reference`.

Formulas: Oktay et al., Attention U-Net, 2018 (arXiv 1804.03999), section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library, backends, checks, operators, reference
from .autograd import call

_BFLOAT16_PAYS: bool = _library.multiplies_bfloat16()


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The chain: alpha = sigmoid(psi . act(theta + resize(phi, R)) + psi_bias), y = x * resize(alpha, S).

    Args:
        x: skip connection [N, C, *S].
        theta: projected skip connection [N, I, *R].
        phi: projected gating signal [N, I, *Q], or None where theta holds the sum already.
        psi_weight: [1, I, 1..], psi_bias: [1] or None; in any floating dtype.
        phi_resize, alpha_resize: "linear", "nearest" or "align_corners": F.interpolate(size=...) in mode
            "bilinear" (1D, 3D: its kin), "nearest", or "bilinear" with align_corners=True; equal sizes are
            the identity.
        align_corners: True makes "linear" mean "align_corners".
        activation: "relu" | "leaky_relu" | "softplus" | "silu" | "gelu".
        backend: "auto" | "cpu" | "cuda" | "triton" | "eager".

    Returns:
        y [N, C, *S] in x's dtype and layout, alpha [N, 1, *R].

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options don't fit; the message names the argument.
    """
    phi_resize = checks.checked_resize("phi_resize", phi_resize, align_corners)
    alpha_resize = checks.checked_resize("alpha_resize", alpha_resize, align_corners)
    checks.check_activation(activation)
    x, theta, phi = cast(x, theta, phi)
    checks.check_map("x", x)
    checks.check_map("theta", theta, x)
    checks.check_resizable("theta", theta, x.shape[2:])
    checks.check_phi(phi, theta)
    checks.check_psi(psi_weight, psi_bias, theta.shape[1], x)
    tensors = (x, theta, phi, psi_weight.reshape(-1), psi_bias)
    return _run(operators.GATE, backend, tensors, phi_resize, alpha_resize, activation)


def gate_logits(
    theta: Tensor,
    phi: Tensor | None,
    psi_weight: Tensor,
    psi_bias: Tensor | None = None,
    *,
    phi_resize: str = "linear",
    align_corners: bool = False,
    activation: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """psi . act(theta + resize(phi)) + psi_bias, [N, 1, *R]: `gate` without the normaliser."""
    phi_resize = checks.checked_resize("phi_resize", phi_resize, align_corners)
    checks.check_activation(activation)
    theta, phi = cast(theta, phi)
    checks.check_map("theta", theta)
    checks.check_phi(phi, theta)
    checks.check_psi(psi_weight, psi_bias, theta.shape[1], theta)
    tensors = (theta, phi, psi_weight.reshape(-1), psi_bias)
    return _run(operators.GATE_LOGITS, backend, tensors, phi_resize, activation)[0]


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
    recompute: str | bool = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The whole gate: `gate` of x, theta = conv(x, theta_weight, bias, stride, padding), phi = conv(g,
    phi_weight).

    One pass over x and g where theta's patches don't overlap (kernel <= stride) and padding is 0; else theta
    is PyTorch's convolution and the rest is fused.

    Args:
        x: skip connection [N, C, *S]; g: gating signal [N, G, *Q] of any grid.
        theta_weight: [I, C, *k]; phi_weight: [I, G, 1..]; psi_weight: [1, I, 1..].
        bias: [I], theta's bias plus phi's, or None; psi_bias: [1] or None. Parameters in any floating dtype.
        stride, padding: of theta's convolution; a number, or one per axis.
        recompute: True keeps only alpha between forward and backward, and computes theta + phi again there;
            False keeps theta + phi too (I channels); "auto" recomputes unless the arithmetic costs more than
            the memory traffic that it saves.
        phi_resize, alpha_resize, align_corners, activation, backend: as in `gate`.

    Returns:
        y [N, C, *S] in x's dtype and layout, alpha [N, 1, *R].

    Raises:
        ValueError, TypeError: as in `gate`.
    """
    phi_resize = checks.checked_resize("phi_resize", phi_resize, align_corners)
    alpha_resize = checks.checked_resize("alpha_resize", alpha_resize, align_corners)
    checks.check_activation(activation)
    x, g = cast(x, g)
    parameters = (theta_weight, phi_weight, psi_weight, bias, psi_bias)
    stride, padding = checks.checked_whole(x, g, *parameters, stride, padding, recompute)
    if _patches_overlap(theta_weight, stride, padding):
        theta, phi = _convolved(x, g, theta_weight, phi_weight, bias, stride, padding)
        tensors = (x, theta, phi, psi_weight.reshape(-1), psi_bias)
        return _run(operators.GATE, backend, tensors, phi_resize, alpha_resize, activation)
    modes = (phi_resize, alpha_resize, activation)
    parameters = (*(round_weight(x, w) for w in parameters[:2]), *parameters[2:])
    return run_whole(operators.ATTENTION_GATE, x, g, *parameters, stride, modes, recompute, backend)


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
    recompute: str | bool = "auto",
    backend: str = "auto",
) -> Tensor:
    """`attention_gate` up to the logits [N, 1, *R], for other normalisers."""
    phi_resize = checks.checked_resize("phi_resize", phi_resize, align_corners)
    checks.check_activation(activation)
    x, g = cast(x, g)
    parameters = (theta_weight, phi_weight, psi_weight, bias, psi_bias)
    stride, padding = checks.checked_whole(x, g, *parameters, stride, padding, recompute)
    if _patches_overlap(theta_weight, stride, padding):
        theta, phi = _convolved(x, g, theta_weight, phi_weight, bias, stride, padding)
        tensors = (theta, phi, psi_weight.reshape(-1), psi_bias)
        return _run(operators.GATE_LOGITS, backend, tensors, phi_resize, activation)[0]
    modes = (phi_resize, activation)
    parameters = (*(round_weight(x, w) for w in parameters[:2]), *parameters[2:])
    return run_whole(operators.ATTENTION_LOGITS, x, g, *parameters, stride, modes, recompute, backend)[0]


def apply_attention(
    x: Tensor,
    alpha: Tensor,
    *,
    alpha_resize: str = "linear",
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    """x * resize(alpha, S): x [N, C, *S], alpha [N, 1, *R] -> [N, C, *S] in x's dtype and layout."""
    alpha_resize = checks.checked_resize("alpha_resize", alpha_resize, align_corners)
    (x,) = cast(x)
    checks.check_map("x", x)
    checks.check_alpha(alpha, x)
    alpha = alpha.to(reference.accumulation_dtype(x))
    return _run(operators.GATE_APPLY, backend, (x, alpha), alpha_resize)[0]


def moments(
    x: Tensor,
    kernel: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean m [K] and biased covariance [K, K] of x's patches over batch and grid, in float64.

    K = C * taps, taps fastest, as theta_weight.flatten(1) has them: theta = conv(x, W, b, stride) then has
    the mean W m + b and the variances diag(W Cov W^T), all that a batch norm behind it needs to know. Tiles
    are centred before they are multiplied: a mean far from zero costs no digits.

    Args:
        x: [N, C, *S] with at least one voxel; kernel, stride: a number, or one per axis; kernel <= stride.
        backend: as in `gate`; other devices than the CPU run the eager twin.

    Raises:
        ValueError, TypeError: as in `gate`.
    """
    (x,) = cast(x)
    checks.check_map("x", x)
    kernel, stride = checks.checked_patches(x, kernel, stride)
    if reference.autocast_dtype(x) is not None:
        with torch.autocast(x.device.type, enabled=False):
            return moments(x, kernel, stride, backend=backend)
    if backends.choose(backend, x, operators.MOMENTS.name) != "cpu":
        return operators.MOMENTS.twin(x, kernel, stride)
    if x.ndim == 3:
        x, kernel, stride = x.unsqueeze(2), [1, *kernel], [1, *stride]
    return call(operators.MOMENTS, x, kernel, stride)


def run_whole(
    op: operators.Operator,
    x: Tensor,
    g: Tensor,
    theta_weight: Tensor,
    phi_weight: Tensor,
    psi_weight: Tensor,
    bias: Tensor | None,
    psi_bias: Tensor | None,
    stride: Sequence[int],
    modes: tuple[str, ...],
    recompute: str | bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """ATTENTION_GATE or ATTENTION_LOGITS of what `checks.checked_whole` has let pass, which modules ask once
    for calls alike (decisions.py). The maps were `cast`; modes: the operator's options behind the stride."""
    tensors = (x, g, theta_weight, phi_weight, bias, psi_weight.reshape(-1), psi_bias)
    stride = list(stride)
    return _run(op, backend, tensors, stride, *modes, _stores(recompute, tensors, stride))


def _run(
    op: operators.Operator, backend: str, tensors: tuple[Tensor | None, ...], *options: Any
) -> tuple[Tensor, ...]:
    """Calls the operator, or its eager twin, with autocast off: its casts are done."""
    first = tensors[0]
    if reference.autocast_dtype(first) is not None:
        with torch.autocast(first.device.type, enabled=False):
            return _run(op, backend, tensors, *options)
    namespace = backends.BACKENDS[backends.choose(backend, first, op.name)].namespace
    if not namespace:
        return op.twin(*tensors, *options)
    op = operators.BY_NAMESPACE[namespace][op.name]
    dtype = reference.accumulation_dtype(first)
    parameters = [t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors[op.maps :]]
    if first.ndim > 3:
        return call(op, *tensors[: op.maps], *parameters, *options)
    # The kernels take 2D and 3D: a 1D grid is a row.
    tensors = (*tensors[: op.maps], *parameters)
    rows = [t.unsqueeze(2) if t is not None and t.ndim == 3 else t for t in tensors]
    options = tuple([1, *o] if isinstance(o, list) else o for o in options)
    return tuple(result.squeeze(2) for result in call(op, *rows, *options))


def cast(*maps: Any) -> tuple[Any, ...]:
    """Under autocast, maps in its dtype: outside of the operators, so that the casts are differentiated."""
    first = maps[0]
    dtype = reference.autocast_dtype(first) if isinstance(first, Tensor) else None
    if dtype is None:
        return maps
    castable = (torch.float32, torch.bfloat16, torch.float16)  # as PyTorch, which leaves float64 alone
    return tuple(m.to(dtype) if isinstance(m, Tensor) and m.dtype in castable else m for m in maps)


def round_weight(x: Tensor, weight: Tensor) -> Tensor:
    """A projection's weight as PyTorch's convolution of x would have it: under autocast rounded to bfloat16.

    Only where that pays: on a CPU whose products of bfloat16 our kernels use, for maps that aren't small.
    Measured on a Zen 5, time against that of float32's weight: inference 0.67 to 0.9, steps 0.8 to 1.0. The
    result has float32's dtype, its gradient is float32's. Not for weights that norms were folded into: that
    rounding, times the mean of x, would remain where PyTorch takes the mean off first.
    """
    if not _BFLOAT16_PAYS or x.dtype != torch.bfloat16 or reference.autocast_dtype(x) is None:
        return weight
    if x.device.type != "cpu" or weight.dtype != torch.float32:
        return weight
    traced = torch.compiler.is_compiling() or torch.compiler.is_exporting()
    if traced or x.numel() < 2**17:  # a size that is compared there is one that programs depend on
        return weight
    rounded = weight.detach().to(x.dtype).to(weight.dtype)
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return rounded
    return weight + (rounded - weight.detach())  # exact, and differentiated as the weight


def _patches_overlap(theta_weight: Tensor, stride: list[int], padding: list[int]) -> bool:
    """Whether theta is more than a product of patches, so that PyTorch has to make it."""
    return any(padding) or any(k > s for k, s in zip(theta_weight.shape[2:], stride, strict=True))


def _convolved(
    x: Tensor,
    g: Tensor,
    theta_weight: Tensor,
    phi_weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
) -> tuple[Tensor, Tensor]:
    """theta and phi by PyTorch's convolutions, in the maps' dtype, which is autocast's where there is one."""
    conv = reference.convolution(x.ndim - 2)
    bias = None if bias is None else bias.to(x.dtype)
    theta = conv(x, theta_weight.to(x.dtype), bias, stride=stride, padding=padding)
    return theta, conv(g, phi_weight.to(x.dtype))


def _stores(recompute: str | bool, tensors: tuple[Tensor | None, ...], stride: list[int]) -> bool:
    """Whether forward keeps the pre-activation for backward; never where there will be no backward."""
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        return False
    return not recompute if isinstance(recompute, bool) else _recompute_costs_more(*tensors[:3], stride)


def _recompute_costs_more(x: Tensor, g: Tensor, theta_weight: Tensor, stride: list[int]) -> bool:
    """Where recompute="auto" is decided: recomputing is a third more arithmetic for I channels less memory.

    A step does 6 * I * K multiply-adds' worth of flops per coarse voxel (K rows of [x's patch; g]; 2 forward,
    4 backward), and reads x, g, dy and writes dx, dg. Measured on 2 cores with AVX-512: at 75 flops for each
    element moved memory binds, and at 150 it still does nearly; at 300 and above the arithmetic does.
    """
    inter, depth = theta_weight.shape[0], math.prod(theta_weight.shape[1:]) + g.shape[1]
    moved = 3 * x.shape[1] * math.prod(stride) + 2 * g.shape[1]
    if x.device.type == "cpu":
        return 6 * inter * depth > 200 * moved
    # Modelled, not measured: matrix units do 200 flops of 16 bits, or 35 of float32 by three products, in the
    # time of a byte.
    return 6 * inter * depth > (140 if x.dtype == torch.float32 else 400) * moved
