"""The ten operators of csrc/ops.cpp: inputs checked, results allocated, and filled by `passes`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._library import empty_results
from . import launch
from .geometry import Resize, grid_of, is_channels_last, layout_of, native, new_map
from .passes import (
    MOST_VOXELS,
    ONE,
    Gradients,
    Problem,
    run_apply_alone,
    run_backward,
    run_forward,
    run_project,
    run_spread,
    run_weights,
)


def _check(
    t: Tensor | None, name: str, like: Tensor, shape: Sequence[int | None], dtype: torch.dtype
) -> None:
    """The public functions have checked more kindly; this is for callers of the bare operators."""
    if t is None:
        return
    fits = len(t.shape) == len(shape) and all(
        b is None or a == b for a, b in zip(t.shape, shape, strict=True)
    )
    if not fits or t.dtype != dtype or t.device != like.device:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(
            f"attn_gate: {name} must be [{wanted}] in {dtype} on {like.device}; "
            f"got {list(t.shape)} in {t.dtype} on {t.device}"
        )


def _maps(like: Tensor, **maps: tuple[Tensor | None, int | None]) -> list[Tensor | None]:
    """The maps in layouts that kernels take; each comes with its number of channels, where that is known."""
    if like.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"attn_gate: the Triton kernels take float32, bfloat16 and float16; got {like.dtype}")
    if like.ndim not in (4, 5):
        raise ValueError(f"attn_gate: maps are [N, C, H, W] or [N, C, D, H, W]; got {list(like.shape)}")
    for name, (t, channels) in maps.items():
        _check(t, name, like, (like.shape[0], channels, *[None] * (like.ndim - 2)), like.dtype)
        # Of a sample; many channels of fewer voxels are fine.
        if t is not None and math.prod(t.shape[2:]) > MOST_VOXELS:
            raise ValueError(
                f"attn_gate: the Triton kernels take grids of at most {MOST_VOXELS} voxels; {name} is "
                f"{list(t.shape)}: take another backend"
            )
    return [t if t is None else native(t) for t, _ in maps.values()]


def _parameters(like: Tensor, **parameters: tuple[Tensor | None, Sequence[int]]) -> list[Tensor | None]:
    for name, (t, shape) in parameters.items():
        _check(t, name, like, shape, torch.float32)
    return [t if t is None else t.contiguous() for t, _ in parameters.values()]


def _or_none(t: Tensor, wanted: bool = True) -> Tensor | None:
    """Results that nobody wants come as empty vectors."""
    return t if wanted else None


def _chain(
    x: Tensor | None,
    theta: Tensor,
    phi: Tensor | None,
    psi: Tensor,
    psi_bias: Tensor | None,
    phi_resize: str,
    alpha_resize: str,
    activation: str,
) -> Problem:
    inter, like = theta.shape[1], theta if x is None else x
    x, theta, phi = _maps(like, x=(x, None), theta=(theta, inter), phi=(phi, inter))
    psi, psi_bias = _parameters(like, psi_weight=(psi, [inter]), psi_bias=(psi_bias, [1]))
    coarse = grid_of(theta)
    fine, gating = grid_of(x) if x is not None else coarse, grid_of(phi) if phi is not None else coarse
    return Problem(
        like, inter, fine, coarse, gating,
        Resize.between(alpha_resize, coarse, fine), Resize.between(phi_resize, gating, coarse), activation,
        psi=psi, psi_bias=psi_bias, x=x, theta=theta, phi=phi, full=x is not None,
    )  # fmt: skip


def _whole(
    x: Tensor,
    g: Tensor,
    theta_weight: Tensor,
    phi_weight: Tensor,
    bias: Tensor | None,
    psi: Tensor,
    psi_bias: Tensor | None,
    stride: Sequence[int],
    phi_resize: str,
    alpha_resize: str,
    activation: str,
    full: bool,
) -> Problem:
    inter = theta_weight.shape[0]
    if inter == 0:
        raise ValueError(
            f"attn_gate: the Triton kernels take theta_weight [I, C, ...] with I of at least 1; got "
            f"{list(theta_weight.shape)}: take another backend"
        )
    x, g = _maps(x, x=(x, None), g=(g, None))
    ones = [1] * (x.ndim - 2)
    kernel = theta_weight.shape[2:]
    _check(theta_weight, "theta_weight", x, [inter, x.shape[1], *[None] * len(ones)], torch.float32)
    # Networks in channels last have their weights so too: taken as they are.
    theta_weight = native(theta_weight) if is_channels_last(x) else theta_weight.contiguous()
    phi_weight, bias, psi, psi_bias = _parameters(
        x, phi_weight=(phi_weight, [inter, g.shape[1], *ones]), bias=(bias, [inter]),
        psi_weight=(psi, [inter]), psi_bias=(psi_bias, [1]),
    )  # fmt: skip
    if len(stride) != len(ones) or any(not 1 <= k <= s for k, s in zip(kernel, stride, strict=True)):
        raise ValueError(
            f"attn_gate: kernel {list(kernel)} must be at most stride {list(stride)}, axis by axis"
        )
    if any(n < k for n, k in zip(x.shape[2:], kernel, strict=True)):
        raise ValueError(f"attn_gate: x {list(x.shape)} is smaller than theta's kernel {list(kernel)}")
    fine = grid_of(x)
    kernel, stride = ((*[1] * (3 - len(ones)), *values) for values in (kernel, stride))
    coarse = tuple((n - k) // s + 1 for n, k, s in zip(fine, kernel, stride, strict=True))
    # Where an axis keeps its size its stride is never taken: 1 makes it the plain case.
    stride = tuple(1 if n == r else s for n, r, s in zip(fine, coarse, stride, strict=True))
    gating = grid_of(g)
    return Problem(
        x, inter, fine, coarse, gating,
        Resize.between(alpha_resize, coarse, fine), Resize.between(phi_resize, gating, coarse), activation,
        psi=psi, psi_bias=psi_bias, x=x, g=g, theta_weight=theta_weight, phi_weight=phi_weight, bias=bias,
        kernel=kernel, stride=stride, full=full,
    )  # fmt: skip


def _phi_apart(p: Problem) -> tuple[Tensor, Tensor] | None:
    """Where g is on a grid of its own, phi is made there, which p then takes for g: returns g and its weight.

    Why: see the head of `forward`. It stays in float32: rounded, it could change relu's side.
    """
    if p.phi_resize.identity:
        return None
    g, weight = p.g, p.phi_weight
    phi = new_map(g, p.inter, p.gating, torch.float32)
    run_project(p, g, weight, phi, transposed=False)
    p.g, p.phi_weight, p.phi = None, None, phi
    return g, weight


def _channel(t: Tensor | None, name: str, p: Problem) -> Tensor | None:
    """alpha, or the gradient of it or of the logits."""
    grid = p.coarse[5 - p.like.ndim :]
    _check(t, name, p.like, (p.samples, 1, *grid), torch.float32)
    return t if t is None else t.contiguous()


def _slopes(dy: Tensor | None, p: Problem) -> Tensor | None:
    _check(dy, "dy", p.like, tuple(p.x.shape), p.like.dtype)
    return dy if dy is None else native(dy)


def _wanted(needs: int, count: int) -> list[bool]:
    return [bool(needs >> i & 1) for i in range(count)]


# ------------------------------------------------------------------------------------------------- the chain


def gate_fwd(x, theta, phi, psi_weight, psi_bias, phi_resize, alpha_resize, activation):
    results = empty_results(
        "gate_fwd", x, theta, phi, psi_weight, psi_bias, phi_resize, alpha_resize, activation
    )
    p = _chain(x, theta, phi, psi_weight, psi_bias, phi_resize, alpha_resize, activation)
    with launch.on_device_of(x):
        run_forward(p, *results, None)
    return results


def gate_logits_fwd(theta, phi, psi_weight, psi_bias, phi_resize, activation):
    logits = empty_results("gate_logits_fwd", theta, phi, psi_weight, psi_bias, phi_resize, activation)
    p = _chain(None, theta, phi, psi_weight, psi_bias, phi_resize, "linear", activation)
    with launch.on_device_of(theta):
        run_forward(p, None, logits, None)
    return logits


def gate_bwd(
    dy, dalpha, x, theta, phi, psi_weight, alpha, phi_resize, alpha_resize, activation, needs
):  # fmt: skip
    results = empty_results(
        "gate_bwd", dy, dalpha, x, theta, phi, psi_weight, alpha, phi_resize, alpha_resize, activation, needs
    )
    p = _chain(x, theta, phi, psi_weight, None, phi_resize, alpha_resize, activation)
    with launch.on_device_of(x):
        need_x, *wanted = _wanted(needs, 5)
        out = _gradients_of_chain(p, results[1:], wanted)
        out.dx = _or_none(results[0], need_x)
        dphi = results[2]
        run_backward(p, out, _slopes(dy, p), _channel(dalpha, "dalpha", p), _channel(alpha, "alpha", p))
        _spread_phi(p, out, dphi, wanted[1])
    return results


def gate_logits_bwd(dlogits, theta, phi, psi_weight, phi_resize, activation, needs):
    results = empty_results("gate_logits_bwd", dlogits, theta, phi, psi_weight, phi_resize, activation, needs)
    p = _chain(None, theta, phi, psi_weight, None, phi_resize, "linear", activation)
    with launch.on_device_of(theta):
        wanted = _wanted(needs, 4)
        out = _gradients_of_chain(p, results, wanted)
        run_backward(p, out, None, _channel(dlogits, "dlogits", p), None)
        _spread_phi(p, out, results[1], wanted[1])
    return results


def _gradients_of_chain(p: Problem, results: Sequence[Tensor], wanted: Sequence[bool]) -> Gradients:
    need_theta, need_phi, need_psi, need_bias = wanted
    need_phi = need_phi and p.phi is not None
    resized = need_phi and not p.phi_resize.identity
    ds = _or_none(results[0], need_theta)
    if resized and not need_theta:
        ds = torch.empty_like(p.theta)
    return Gradients(
        ds=ds, dphi=_or_none(results[1], need_phi and not resized),
        psi=_or_none(results[2], need_psi), psi_bias=_or_none(results[3], need_bias),
    )  # fmt: skip


def _spread_phi(p: Problem, out: Gradients, dphi: Tensor, wanted: bool) -> None:
    """phi's gradient on a grid of its own."""
    if wanted and p.phi is not None and not p.phi_resize.identity:
        run_spread(p, out.ds, dphi)


# --------------------------------------------------------------------------------------------- the whole gate


def attention_gate_fwd(
    x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias,
    stride, phi_resize, alpha_resize, activation, store,
):  # fmt: skip
    results = empty_results(
        "attention_gate_fwd", x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias,
        stride, phi_resize, alpha_resize, activation, store,
    )  # fmt: skip
    p = _whole(
        x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias,
        stride, phi_resize, alpha_resize, activation, True,
    )  # fmt: skip
    with launch.on_device_of(x):
        if not p.empty:
            _phi_apart(p)
        y, alpha, preact = results
        run_forward(p, y, alpha, _or_none(preact, store))
    return results


def attention_logits_fwd(
    x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias, stride, phi_resize, activation, store
):  # fmt: skip
    results = empty_results(
        "attention_logits_fwd", x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias,
        stride, phi_resize, activation, store,
    )  # fmt: skip
    p = _whole(
        x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias,
        stride, phi_resize, "linear", activation, False,
    )  # fmt: skip
    with launch.on_device_of(x):
        if not p.empty:
            _phi_apart(p)
        logits, preact = results
        run_forward(p, None, logits, _or_none(preact, store))
    return results


def attention_gate_bwd(
    dy, dalpha, x, g, theta_weight, phi_weight, bias, psi_weight, alpha, preact,
    stride, phi_resize, alpha_resize, activation, needs,
):  # fmt: skip
    results = empty_results(
        "attention_gate_bwd", dy, dalpha, x, g, theta_weight, phi_weight, bias, psi_weight, alpha, preact,
        stride, phi_resize, alpha_resize, activation, needs,
    )  # fmt: skip
    p = _whole(
        x, g, theta_weight, phi_weight, bias, psi_weight, None,
        stride, phi_resize, alpha_resize, activation, True,
    )  # fmt: skip
    with launch.on_device_of(x):
        slopes = _slopes(dy, p), _channel(dalpha, "dalpha", p), _channel(alpha, "alpha", p)
        _whole_backward(p, results, needs, *slopes, preact)
    return results


def attention_logits_bwd(
    dlogits, x, g, theta_weight, phi_weight, bias, psi_weight, preact, stride, phi_resize, activation, needs
):  # fmt: skip
    results = empty_results(
        "attention_logits_bwd", dlogits, x, g, theta_weight, phi_weight, bias, psi_weight, preact,
        stride, phi_resize, activation, needs,
    )  # fmt: skip
    p = _whole(
        x, g, theta_weight, phi_weight, bias, psi_weight, None,
        stride, phi_resize, "linear", activation, False,
    )  # fmt: skip
    with launch.on_device_of(x):
        _whole_backward(p, results, needs, None, _channel(dlogits, "dlogits", p), None, preact)
    return results


def _whole_backward(
    p: Problem,
    results: Sequence[Tensor],
    needs: int,
    dy: Tensor | None,
    dalpha: Tensor | None,
    alpha: Tensor | None,
    preact: Tensor,
) -> None:
    out = [_or_none(t, want) for t, want in zip(results, _wanted(needs, 7), strict=True)]
    gradients = Gradients(
        dx=out[0], dg=out[1], theta_weight=out[2], phi_weight=out[3], bias=out[4], psi=out[5], psi_bias=out[6]
    )
    stored = None
    if preact.numel():
        _check(preact, "preact", p.like, (p.samples, p.inter, *p.coarse[5 - p.like.ndim :]), p.like.dtype)
        stored = preact.contiguous(memory_format=layout_of(p.x))
    if p.phi_resize.identity or p.empty:
        run_backward(p, gradients, dy, dalpha, alpha, stored)
        if p.empty and gradients.dg is not None:
            gradients.dg.zero_()
        return
    # g on a grid of its own: ds comes back to it by the adjoint of the resize.
    g, weight = p.g, p.phi_weight
    dg, dweight = gradients.dg, gradients.phi_weight
    if stored is None:
        _phi_apart(p)
    p.g = p.phi_weight = gradients.dg = gradients.phi_weight = None
    if dg is not None or dweight is not None:
        gradients.ds = new_map(p.x, p.inter, p.coarse)
    run_backward(p, gradients, dy, dalpha, alpha, stored)
    if gradients.ds is None:
        return
    dphi = new_map(g, p.inter, p.gating, torch.float32)
    run_spread(p, gradients.ds, dphi)
    p.g = g
    if dg is not None:
        run_project(p, dphi, weight, dg, transposed=True)
    if dweight is not None:
        run_weights(p, dphi, g, dweight, ONE, ONE, launch.whole_backward(g)[0])


# ----------------------------------------------------------------------------------------------- the multiply


def _apply(x: Tensor, alpha: Tensor, alpha_resize: str) -> Problem:
    (x,) = _maps(x, x=(x, None))
    coarse, fine = grid_of(alpha), grid_of(x)
    resize = Resize.between(alpha_resize, coarse, fine)
    return Problem(
        x, 0, fine, coarse, coarse, resize, Resize.between("linear", coarse, coarse), "relu", x=x, full=False
    )


def gate_apply_fwd(x, alpha, alpha_resize):
    y = empty_results("gate_apply_fwd", x, alpha, alpha_resize)
    p = _apply(x, alpha, alpha_resize)
    with launch.on_device_of(x):
        run_apply_alone(p, _channel(alpha, "alpha", p), y)
    return y


def gate_apply_bwd(dy, x, alpha, alpha_resize, needs):
    results = empty_results("gate_apply_bwd", dy, x, alpha, alpha_resize, needs)
    p = _apply(x, alpha, alpha_resize)
    with launch.on_device_of(x):
        need_x, need_alpha = _wanted(needs, 2)
        out = Gradients(dx=_or_none(results[0], need_x), dalpha=_or_none(results[1], need_alpha))
        if p.empty and need_alpha:
            results[1].zero_()
        run_backward(p, out, _slopes(dy, p), None, _channel(alpha, "alpha", p))
    return results
