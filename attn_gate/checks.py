"""What users may pass to the operators of `attn_gate.functional`, and what they are told otherwise.

Every error names the argument, what it takes, what it got and, where there is one, the remedy. A wrong type
or dtype is a TypeError, everything else a ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reference import ACTIVATIONS, RESIZE_MODES, resize_mode

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ACTIVATIONS = tuple(ACTIVATIONS)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """One of these strings."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_activation(activation: Any) -> None:
    """One of reference.ACTIVATIONS."""
    check_choice("activation", activation, _ACTIVATIONS)


def check_recompute(recompute: Any) -> None:
    """True, False or "auto"."""
    if not isinstance(recompute, bool) and recompute != "auto":
        raise ValueError(f"recompute must be 'auto', True or False; got {recompute!r}")


def checked_resize(name: str, mode: Any, align_corners: bool) -> str:
    """The mode that the operators take: align_corners=True is one of its own there."""
    check_choice(name, mode, RESIZE_MODES)
    return resize_mode(mode, align_corners)


def check_map(name: str, t: Any, like: Tensor | None = None) -> None:
    """[N, channels, *grid] in a supported dtype; N, dtype, device and number of axes as those of `like`."""
    if not isinstance(t, Tensor) or t.dtype not in _DTYPES:
        raise TypeError(f"{name} must be a float32, float64, bfloat16 or float16 tensor; got {_described(t)}")
    if t.ndim not in (3, 4, 5):
        raise ValueError(f"{name} must be [N, channels, *grid], 1 to 3 grid axes; got shape {list(t.shape)}")
    if like is None:
        return
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, the other maps are on {like.device}; move one of them")
    if t.dtype != like.dtype:
        raise TypeError(
            f"{name} is {t.dtype}, the other maps are {like.dtype}; cast one of them, or use torch.autocast"
        )
    if t.ndim != like.ndim or t.shape[0] != like.shape[0]:
        raise ValueError(
            f"{name} must have batch size {like.shape[0]} and {like.ndim - 2} grid axes as the other maps; "
            f"got shape {list(t.shape)}"
        )


def check_phi(phi: Any, theta: Tensor) -> None:
    """None, or theta's channels on a grid that can be resized to theta's."""
    if phi is None:
        return
    check_map("phi", phi, theta)
    if phi.shape[1] != theta.shape[1]:
        raise ValueError(f"phi must have theta's {theta.shape[1]} channels; got shape {list(phi.shape)}")
    check_resizable("phi", phi, theta.shape[2:])


def check_alpha(alpha: Any, x: Tensor) -> None:
    """[N, 1, *R], in any floating dtype."""
    if not isinstance(alpha, Tensor) or not alpha.is_floating_point():
        raise TypeError(f"alpha must be a floating point tensor; got {_described(alpha)}")
    if alpha.ndim != x.ndim or tuple(alpha.shape[:2]) != (x.shape[0], 1):
        wanted = ", ".join([str(x.shape[0]), "1", *["*"] * (x.ndim - 2)])
        raise ValueError(f"alpha must be [{wanted}] for x {list(x.shape)}; got shape {list(alpha.shape)}")
    if alpha.device != x.device:
        raise ValueError(f"alpha is on {alpha.device}, x is on {x.device}; move one of them")
    check_resizable("alpha", alpha, x.shape[2:])


def check_resizable(name: str, t: Tensor, size: Sequence[int]) -> None:
    """Both grids have voxels, or neither has."""
    if (0 in t.shape[2:]) != (0 in size):
        raise ValueError(f"{name} can't be resized from grid {list(t.shape[2:])} to {list(size)}")


def check_parameter(name: str, t: Any, shape: Sequence[int], x: Tensor) -> None:
    """This shape, x's device, any floating dtype."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor; got {_described(t)}")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}; got {list(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, the maps are on {x.device}; move the one or the others")


def check_psi(weight: Any, bias: Any, inter: int, x: Tensor) -> None:
    """psi_weight [1, I, 1..] and psi_bias [1] or None."""
    check_parameter("psi_weight", weight, (1, inter, *[1] * (x.ndim - 2)), x)
    if bias is not None:
        check_parameter("psi_bias", bias, (1,), x)


def check_projections(x: Any, g: Any, theta_weight: Any, phi_weight: Any, bias: Any) -> None:
    """x, g and the parameters of both projections."""
    check_map("x", x)
    check_map("g", g, x)
    axes = x.ndim - 2
    if not isinstance(theta_weight, Tensor):
        raise TypeError(f"theta_weight must be a floating point tensor; got {_described(theta_weight)}")
    if theta_weight.ndim != x.ndim or 0 in theta_weight.shape[2:]:
        raise ValueError(
            f"theta_weight must be [I, C, *kernel] with {axes} kernel axes of at least 1; "
            f"got shape {list(theta_weight.shape)}"
        )
    inter = theta_weight.shape[0]
    check_parameter("theta_weight", theta_weight, (inter, x.shape[1], *theta_weight.shape[2:]), x)
    check_parameter("phi_weight", phi_weight, (inter, g.shape[1], *[1] * axes), x)
    if bias is not None:
        check_parameter("bias", bias, (inter,), x)


def checked_whole(
    x: Any,
    g: Any,
    theta_weight: Any,
    phi_weight: Any,
    psi_weight: Any,
    bias: Any,
    psi_bias: Any,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    recompute: Any,
) -> tuple[list[int], list[int]]:
    """Stride and padding with a number for each axis, of a whole gate whose maps and parameters fit."""
    check_recompute(recompute)
    check_projections(x, g, theta_weight, phi_weight, bias)
    check_psi(psi_weight, psi_bias, theta_weight.shape[0], x)
    window = checked_window(x, theta_weight, stride, padding)
    check_resizable("g", g, x.shape[2:])
    return window


def checked_window(
    x: Tensor, theta_weight: Tensor, stride: int | Sequence[int], padding: int | Sequence[int]
) -> tuple[list[int], list[int]]:
    """Stride and padding with a number for each axis; theta's kernel fits on x's grid."""
    stride, padding = _per_axis("stride", stride, x, least=1), _per_axis("padding", padding, x, least=0)
    grid, kernel = x.shape[2:], theta_weight.shape[2:]
    if any(n + 2 * p < k for n, k, p in zip(grid, kernel, padding, strict=True)):
        raise ValueError(f"x must have a grid of at least theta's kernel {list(kernel)}; got {list(grid)}")
    return stride, padding


def checked_patches(
    x: Tensor, kernel: int | Sequence[int], stride: int | Sequence[int]
) -> tuple[list[int], list[int]]:
    """Kernel and stride with a number for each axis, for patches of x that don't overlap; there is one."""
    kernel, stride = _per_axis("kernel", kernel, x, least=1), _per_axis("stride", stride, x, least=1)
    if any(k > s for k, s in zip(kernel, stride, strict=True)):
        raise ValueError(f"kernel must not be larger than the stride {stride}; got {kernel}")
    if x.shape[0] == 0 or any(n < k for n, k in zip(x.shape[2:], kernel, strict=True)):
        raise ValueError(f"x must have at least one patch of {kernel} voxels; got shape {list(x.shape)}")
    return kernel, stride


def _per_axis(name: str, value: Any, x: Tensor, least: int) -> list[int]:
    axes = x.ndim - 2
    values = list(value) if isinstance(value, Sequence) else [value] * axes
    if len(values) != axes or not all(type(v) is int and v >= least for v in values):
        raise ValueError(f"{name} must be an integer of at least {least}, or {axes} of them; got {value!r}")
    return values


def _described(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
