"""The whole gate from the chain: PyTorch's convolutions make theta and phi, the chain's kernels do the rest.

For backends with kernels for `gate` and `gate_logits` alone. theta and phi lie in memory between the two, in
the maps' dtype; backward makes them again, or reads what forward stored: theta + phi where they lie on one
grid, else theta alone, since phi on g's grid costs little to make.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .namespaces import implement

NAMES = ("attention_gate_fwd", "attention_gate_bwd", "attention_logits_fwd", "attention_logits_bwd")


def implementation(name: str, chain: Any) -> Callable:
    """One of NAMES, computed by gate_* or gate_logits_* of `chain`: torch.ops.attn_gate, say."""
    below = name.replace("attention_gate", "gate").replace("attention_logits", "gate_logits")
    return _BUILDERS[name](getattr(chain, below).default)


def _gate_fwd(chain: Callable) -> Callable:
    def run(
        x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias,
        stride, phi_resize, alpha_resize, activation, store,
    ):  # fmt: skip
        theta, phi, preact = _maps(x, g, theta_weight, phi_weight, bias, stride, store)
        modes = (phi_resize, alpha_resize, activation)
        return *chain(x, theta, phi, psi_weight, psi_bias, *modes), preact

    return run


def _logits_fwd(chain: Callable) -> Callable:
    def run(
        x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias, stride, phi_resize, activation, store
    ):  # fmt: skip
        theta, phi, preact = _maps(x, g, theta_weight, phi_weight, bias, stride, store)
        return chain(theta, phi, psi_weight, psi_bias, phi_resize, activation), preact

    return run


def _gate_bwd(chain: Callable) -> Callable:
    def run(
        dy, dalpha, x, g, theta_weight, phi_weight, bias, psi_weight, alpha, preact,
        stride, phi_resize, alpha_resize, activation, needs,
    ):  # fmt: skip
        theta, phi = _maps_again(preact, x, g, theta_weight, phi_weight, bias, stride)
        modes = (phi_resize, alpha_resize, activation)
        below = needs & 1 | _needs_of_chain(needs, phi) << 1
        dx, dtheta, dphi, *dpsi = chain(dy, dalpha, x, theta, phi, psi_weight, alpha, *modes, below)
        through, *others = _projections_bwd(dtheta, dphi, phi, x, g, theta_weight, phi_weight, stride, needs)
        return dx.add_(through) if needs & 1 else dx, *others, *dpsi

    return run


def _logits_bwd(chain: Callable) -> Callable:
    def run(
        dlogits, x, g, theta_weight, phi_weight, bias, psi_weight, preact,
        stride, phi_resize, activation, needs,
    ):  # fmt: skip
        theta, phi = _maps_again(preact, x, g, theta_weight, phi_weight, bias, stride)
        below = _needs_of_chain(needs, phi)
        dtheta, dphi, *dpsi = chain(dlogits, theta, phi, psi_weight, phi_resize, activation, below)
        return *_projections_bwd(dtheta, dphi, phi, x, g, theta_weight, phi_weight, stride, needs), *dpsi

    return run


_BUILDERS = dict(zip(NAMES, (_gate_fwd, _gate_bwd, _logits_fwd, _logits_bwd), strict=True))


# --------------------------------------------------------------------------------------------- projections


def _project(
    t: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sequence[int] | int = 1
) -> Tensor:
    bias = None if bias is None else bias.to(t.dtype)
    if 0 in weight.shape[:2]:  # sums over nothing, which PyTorch refuses or leaves as memory was
        axes = t.ndim - 2
        strides = [stride] * axes if isinstance(stride, int) else stride
        grid = [(n - k) // s + 1 for n, k, s in zip(t.shape[2:], weight.shape[2:], strides, strict=True)]
        sums = t.new_zeros((t.shape[0], weight.shape[0], *grid))
        return sums if bias is None else sums.add_(bias.view(-1, *[1] * axes))
    # Backward may be called under autocast, which is not the one that forward saw.
    with torch.autocast(t.device.type, enabled=False):
        return reference.convolution(t.ndim - 2)(t, weight.to(t.dtype), bias, stride=stride)


def _maps(
    x: Tensor, g: Tensor, theta_weight: Tensor, phi_weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], store: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """theta, phi (None where theta holds the sum), and what is stored for backward."""
    theta, phi = _project(x, theta_weight, bias, stride), _project(g, phi_weight)
    if not store:
        return theta, phi, x.new_empty(0)
    if theta.shape == phi.shape:
        theta, phi = theta.add_(phi), None
    theta = _like(x, theta)
    return theta, phi, theta


def _maps_again(
    preact: Tensor, x: Tensor, g: Tensor, theta_weight: Tensor, phi_weight: Tensor, bias: Tensor | None,
    stride: Sequence[int],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if preact.ndim == 1:
        return _maps(x, g, theta_weight, phi_weight, bias, stride, store=False)[:2]
    return preact, None if preact.shape[2:] == g.shape[2:] else _project(g, phi_weight)


def _needs_of_chain(needs: int, phi: Tensor | None) -> int:
    """The bits of theta, phi, psi_weight and psi_bias, from those of x, g, both weights, bias, and psi's."""
    theta_needed, phi_needed = bool(needs & 0b10101), bool(needs & 0b01010)
    if phi is None:
        theta_needed, phi_needed = theta_needed or phi_needed, False
    return theta_needed | phi_needed << 1 | (needs >> 5 & 0b11) << 2


def _projections_bwd(
    dtheta: Tensor, dphi: Tensor, phi: Tensor | None, x: Tensor, g: Tensor,
    theta_weight: Tensor, phi_weight: Tensor, stride: Sequence[int], needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dx, dg, dtheta_weight, dphi_weight, dbias; empty where their bits of `needs` are 0."""
    need_x, need_g, need_theta, need_phi, need_bias = (bool(needs >> i & 1) for i in range(5))
    dx, dtheta_weight, dbias = _project_bwd(dtheta, x, theta_weight, stride, (need_x, need_theta, need_bias))
    dphi = dtheta if phi is None else dphi
    dg, dphi_weight, _ = _project_bwd(dphi, g, phi_weight, [1] * len(stride), (need_g, need_phi, False))
    return dx, dg, dtheta_weight, dphi_weight, dbias


def _project_bwd(
    slope: Tensor, t: Tensor, weight: Tensor, stride: Sequence[int], wanted: tuple[bool, bool, bool]
) -> list[Tensor]:
    """The gradients of t, weight and bias, in t's layout and the parameters' dtype."""
    found: Sequence[Tensor | None] = (None, None, None)
    if any(wanted) and 0 in weight.shape[:2]:
        over = [0, *range(2, t.ndim)]
        found = torch.zeros_like(t), torch.zeros_like(weight), slope.sum(over, dtype=weight.dtype)
    elif any(wanted):
        axes = len(stride)
        found = torch.ops.aten.convolution_backward(
            slope, t, weight.to(t.dtype), [weight.shape[0]], list(stride), [0] * axes, [1] * axes, False,
            [0] * axes, 1, list(wanted),
        )  # fmt: skip
    parameter = weight.new_empty(0)
    dt, dweight, dbias = found
    return [
        _like(t, dt) if wanted[0] else t.new_empty(0),
        dweight.to(weight.dtype).contiguous() if wanted[1] else parameter,
        dbias.to(weight.dtype) if wanted[2] else parameter.clone(),
    ]


def _like(t: Tensor, found: Tensor) -> Tensor:
    """`found` in the layout that the operators give maps beside t: channels last where t is that alone."""
    last = torch.channels_last if t.ndim == 4 else torch.channels_last_3d
    native = not t.is_contiguous() and t.is_contiguous(memory_format=last)
    return found.contiguous(memory_format=last if native else torch.contiguous_format)


def implement_on_cuda() -> None:
    """Gives torch.ops.attn_gate.attention_* of CUDA tensors this implementation, by the native chain."""
    for name in NAMES:
        find = functools.partial(implementation, name, torch.ops.attn_gate)
        implement(f"attn_gate::{name}", ["cuda"], find)
