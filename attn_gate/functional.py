"""The fused operators as plain functions: arguments checked, autocast applied, the backend chosen.

Shapes: N batch, C channels of x, G of g, I in between; grids S of x, R of theta (and alpha), Q of g, each of 1, 2 or 3
axes. Maps are float32, float64, bfloat16 or float16, contiguous or channels last (both native; other strides are copied);
sums are taken in float32 (float64 for float64), and alpha comes in that dtype. The eager twin of every function is in
`attn_gate.reference`.

Formulas: Oktay et al., Attention U-Net, 2018 (arXiv 1804.03999), section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, backends, reference
from .reference import ACTIVATIONS, RESIZE_MODES, accumulation_dtype, resize_mode

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_RECOMPUTE = ("auto", True, False)


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
        phi_resize, alpha_resize: "linear" (F.interpolate(size=..., mode="bilinear" or its 1D, 3D kin)), "nearest" or
            "align_corners"; equal sizes are the identity.
        align_corners: True makes "linear" mean "align_corners".
        activation: "relu" | "leaky_relu" | "softplus" | "silu" | "gelu".
        backend: "auto" | "cpu" | "cuda" | "triton" | "eager".

    Returns:
        y [N, C, *S] in x's dtype and layout, alpha [N, 1, *R].

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that don't fit; the message names the argument.
    """
    modes = _modes(phi_resize, alpha_resize, align_corners)
    _check_option("activation", activation, tuple(ACTIVATIONS))
    x, theta, phi = _cast(x, theta, phi)
    _check_map("x", x)
    _check_map("theta", theta, like=x)
    _check_phi(phi, theta)
    _check_psi(psi_weight, psi_bias, theta.shape[1], x)
    return _run(
        autograd.GATE, reference.gate, backend,
        maps={"x": x, "theta": theta, "phi": phi},
        parameters={"psi_weight": psi_weight, "psi_bias": psi_bias},
        options={"phi_resize": modes[0], "alpha_resize": modes[1], "activation": activation},
    )  # fmt: skip


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
    """`gate` up to the logits, psi . act(theta + resize(phi, R)) + psi_bias: [N, 1, *R], for other normalisers."""
    mode, _ = _modes(phi_resize, "linear", align_corners)
    _check_option("activation", activation, tuple(ACTIVATIONS))
    theta, phi = _cast(theta, phi)
    _check_map("theta", theta)
    _check_phi(phi, theta)
    _check_psi(psi_weight, psi_bias, theta.shape[1], theta)
    return _run(
        autograd.GATE_LOGITS, reference.gate_logits, backend,
        maps={"theta": theta, "phi": phi},
        parameters={"psi_weight": psi_weight, "psi_bias": psi_bias},
        options={"phi_resize": mode, "activation": activation},
    )[0]  # fmt: skip


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
    """The whole gate: `gate` of x, theta = conv(x, theta_weight, bias, stride, padding) and phi = conv(g, phi_weight).

    One pass over x and g where theta's patches don't overlap (kernel <= stride) and padding is 0; else theta is
    PyTorch's convolution and the rest is fused.

    Args:
        x: skip connection [N, C, *S]; g: gating signal [N, G, *Q] of any grid.
        theta_weight: [I, C, *k]; phi_weight: [I, G, 1..]; psi_weight: [1, I, 1..].
        bias: [I], theta's bias plus phi's, or None; psi_bias: [1] or None. Parameters in any floating dtype.
        stride, padding: of theta's convolution; a number, or one per axis.
        recompute: True keeps only alpha between forward and backward and computes theta + phi again there; False keeps
            theta + phi too (I channels); "auto" recomputes unless arithmetic costs more than the memory traffic saved.
        phi_resize, alpha_resize, align_corners, activation, backend: as in `gate`.

    Returns:
        y [N, C, *S] in x's dtype and layout, alpha [N, 1, *R].

    Raises:
        ValueError, TypeError: as in `gate`.
    """
    modes = _modes(phi_resize, alpha_resize, align_corners)
    x, g = _cast(x, g)
    whole = _check_whole(x, g, theta_weight, phi_weight, psi_weight, bias, psi_bias, stride, padding, activation, recompute)
    if whole.padding_or_overlap:
        theta, phi = _convolved(x, g, theta_weight, phi_weight, bias, stride, padding)
        options = {"phi_resize": modes[0], "alpha_resize": modes[1], "activation": activation, "backend": backend}
        return gate(x, theta, phi, psi_weight, psi_bias, **options)
    return _run(
        autograd.ATTENTION_GATE, reference.attention_gate, backend,
        maps={"x": x, "g": g},
        parameters={
            "theta_weight": theta_weight, "phi_weight": phi_weight, "bias": bias,
            "psi_weight": psi_weight, "psi_bias": psi_bias,
        },
        options={"stride": whole.stride, "phi_resize": modes[0], "alpha_resize": modes[1], "activation": activation},
        store=whole.store,
    )  # fmt: skip


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
    mode, _ = _modes(phi_resize, "linear", align_corners)
    x, g = _cast(x, g)
    whole = _check_whole(x, g, theta_weight, phi_weight, psi_weight, bias, psi_bias, stride, padding, activation, recompute)
    if whole.padding_or_overlap:
        theta, phi = _convolved(x, g, theta_weight, phi_weight, bias, stride, padding)
        return gate_logits(theta, phi, psi_weight, psi_bias, phi_resize=mode, activation=activation, backend=backend)
    return _run(
        autograd.ATTENTION_LOGITS, reference.attention_logits, backend,
        maps={"x": x, "g": g},
        parameters={
            "theta_weight": theta_weight, "phi_weight": phi_weight, "bias": bias,
            "psi_weight": psi_weight, "psi_bias": psi_bias,
        },
        options={"stride": whole.stride, "phi_resize": mode, "activation": activation},
        store=whole.store,
    )[0]  # fmt: skip


def apply_attention(
    x: Tensor, alpha: Tensor, *, alpha_resize: str = "linear", align_corners: bool = False, backend: str = "auto"
) -> Tensor:
    """x * resize(alpha, S): x [N, C, *S], alpha [N, 1, *R]; returns [N, C, *S] in x's dtype and layout."""
    _, mode = _modes("linear", alpha_resize, align_corners)
    (x,) = _cast(x)
    _check_map("x", x)
    if not isinstance(alpha, Tensor) or not alpha.is_floating_point():
        raise TypeError(f"alpha must be a floating point tensor; got {_describe(alpha)}")
    if alpha.ndim != x.ndim or alpha.shape[:2] != (x.shape[0], 1):
        raise ValueError(f"alpha must be [N, 1, *R] for x of shape {list(x.shape)}; got shape {list(alpha.shape)}")
    if alpha.device != x.device:
        raise ValueError(f"alpha is on {alpha.device}, x on {x.device}: move one of them")
    return _run(
        autograd.GATE_APPLY, reference.apply_attention, backend,
        maps={"x": x, "alpha": alpha.to(accumulation_dtype(x))},
        parameters={},
        options={"alpha_resize": mode},
    )[0]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ calls


def _run(
    op: autograd.Operator,
    twin: Callable,
    backend: str,
    maps: dict[str, Tensor | None],
    parameters: dict[str, Tensor | None],
    options: dict[str, Any],
    store: bool | None = None,
) -> tuple[Tensor, ...]:
    """Calls the operator, or its eager twin, with autocast off: its casts are done."""
    first = next(iter(maps.values()))
    with torch.autocast(first.device.type, enabled=False):
        if backends.choose(backend, first) == "eager":
            results = twin(**maps, **parameters, **options)
            return results if isinstance(results, tuple) else (results,)
        dtype = accumulation_dtype(first)
        lift = first.ndim == 3  # the operators take 2D and 3D: a 1D grid is a row
        if lift:
            maps = {k: v if v is None else v.unsqueeze(2) for k, v in maps.items()}
            parameters = {k: v.unsqueeze(2) if v is not None and v.ndim == 3 else v for k, v in parameters.items()}
            if "stride" in options:
                options = {**options, "stride": [1, *options["stride"]]}
        parameters = {k: v if v is None else v.to(dtype) for k, v in parameters.items()}
        if "psi_weight" in parameters:
            parameters["psi_weight"] = parameters["psi_weight"].reshape(-1)
        stored = () if store is None else (store,)
        results = autograd.call(op, *maps.values(), *parameters.values(), *options.values(), *stored)
        return tuple(r.squeeze(2) for r in results) if lift else tuple(results)


def _cast(*maps: Tensor | None) -> list[Tensor | None]:
    """Under autocast, maps in its dtype: before autograd sees them, so that the casts are differentiated too."""
    device = next(m.device.type for m in maps if isinstance(m, Tensor)) if any(isinstance(m, Tensor) for m in maps) else "cpu"
    if not torch.is_autocast_enabled(device):
        return list(maps)
    dtype = torch.get_autocast_dtype(device)
    return [m.to(dtype) if isinstance(m, Tensor) and m.dtype in (torch.float32, torch.bfloat16, torch.float16) else m for m in maps]


def _convolved(x, g, theta_weight, phi_weight, bias, stride, padding) -> tuple[Tensor, Tensor]:
    """theta and phi by PyTorch's convolutions, in the maps' dtype."""
    conv = reference.convolution(x.ndim - 2)
    bias = None if bias is None else bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        theta = conv(x, theta_weight.to(x.dtype), bias, stride=_per_axis("stride", stride, x), padding=_per_axis("padding", padding, x))
        return theta, conv(g, phi_weight.to(x.dtype))


# ----------------------------------------------------------------------------------------------------- checks


def _describe(value: Any) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"{type(value).__name__} ({value!r})"


def _check_option(name: str, value: Any, choices: Sequence[Any]) -> None:
    if not any(value is c or (isinstance(c, str) and value == c) for c in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _modes(phi_resize: str, alpha_resize: str, align_corners: bool) -> tuple[str, str]:
    _check_option("phi_resize", phi_resize, RESIZE_MODES)
    _check_option("alpha_resize", alpha_resize, RESIZE_MODES)
    return resize_mode(phi_resize, align_corners), resize_mode(alpha_resize, align_corners)


def _check_map(name: str, t: Any, like: Tensor | None = None) -> None:
    if not isinstance(t, Tensor) or t.dtype not in _DTYPES:
        raise TypeError(f"{name} must be a float32, float64, bfloat16 or float16 tensor; got {_describe(t)}")
    if t.ndim not in (3, 4, 5):
        raise ValueError(f"{name} must be [N, channels, *grid] with 1, 2 or 3 grid axes; got shape {list(t.shape)}")
    if like is None:
        return
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, the other maps on {like.device}: move one of them")
    if t.dtype != like.dtype:
        raise TypeError(f"{name} is {t.dtype}, the other maps are {like.dtype}: cast one of them, or run under autocast")
    if t.ndim != like.ndim or t.shape[0] != like.shape[0]:
        raise ValueError(
            f"{name} must have batch size {like.shape[0]} and {like.ndim - 2} grid axes as the other maps; got shape {list(t.shape)}"
        )


def _check_phi(phi: Tensor | None, theta: Tensor) -> None:
    if phi is None:
        return
    _check_map("phi", phi, like=theta)
    if phi.shape[1] != theta.shape[1]:
        raise ValueError(f"phi must have theta's {theta.shape[1]} channels; got {phi.shape[1]}")
    _check_resizable("phi", phi, theta.shape[2:])


def _check_resizable(name: str, t: Tensor, size: Sequence[int]) -> None:
    if 0 in t.shape[2:] and 0 not in size:
        raise ValueError(f"{name} has no voxels (shape {list(t.shape)}) and can't be resized to {list(size)}")


def _check_parameter(name: str, t: Any, shape: Sequence[int], x: Tensor) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor; got {_describe(t)}")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}; got {list(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, x on {x.device}: move the module or the maps")


def _check_psi(weight: Tensor, bias: Tensor | None, inter: int, x: Tensor) -> None:
    _check_parameter("psi_weight", weight, (1, inter, *[1] * (x.ndim - 2)), x)
    if bias is not None:
        _check_parameter("psi_bias", bias, (1,), x)


def _per_axis(name: str, value: int | Sequence[int], x: Tensor) -> list[int]:
    axes = x.ndim - 2
    values = [value] * axes if isinstance(value, int) else list(value)
    least = 1 if name == "stride" else 0
    if len(values) != axes or any(isinstance(v, bool) or not isinstance(v, int) or v < least for v in values):
        raise ValueError(f"{name} must be an integer >= {least}, or {axes} of them; got {value!r}")
    return values


class _Whole:
    """What the checks of a whole gate found out."""

    def __init__(self, stride: list[int], padding_or_overlap: bool, store: bool) -> None:
        self.stride, self.padding_or_overlap, self.store = stride, padding_or_overlap, store


def _check_whole(x, g, theta_weight, phi_weight, psi_weight, bias, psi_bias, stride, padding, activation, recompute) -> _Whole:
    _check_option("activation", activation, tuple(ACTIVATIONS))
    _check_option("recompute", recompute, _RECOMPUTE)
    _check_map("x", x)
    _check_map("g", g, like=x)
    axes = x.ndim - 2
    if not isinstance(theta_weight, Tensor) or theta_weight.ndim != x.ndim:
        got = list(theta_weight.shape) if isinstance(theta_weight, Tensor) else _describe(theta_weight)
        raise ValueError(f"theta_weight must be [I, C, *kernel] with {axes} kernel axes; got {got}")
    inter, kernel = theta_weight.shape[0], theta_weight.shape[2:]
    _check_parameter("theta_weight", theta_weight, (inter, x.shape[1], *kernel), x)
    _check_parameter("phi_weight", phi_weight, (inter, g.shape[1], *[1] * axes), x)
    if bias is not None:
        _check_parameter("bias", bias, (inter,), x)
    _check_psi(psi_weight, psi_bias, inter, x)
    stride, padding = _per_axis("stride", stride, x), _per_axis("padding", padding, x)
    for n, k, p in zip(x.shape[2:], kernel, padding, strict=True):
        if k < 1 or n + 2 * p < k:
            raise ValueError(f"x's grid {list(x.shape[2:])} is smaller than theta's kernel {list(kernel)}: use larger maps")
    _check_resizable("g", g, x.shape[2:])
    overlap = any(padding) or any(k > s for k, s in zip(kernel, stride, strict=True))
    # What only inference or nothing differentiable sees is never kept.
    tensors = (x, g, theta_weight, phi_weight, psi_weight, bias, psi_bias)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    store = grad and (recompute is False or (recompute == "auto" and _recompute_costs_more(x, g, theta_weight)))
    return _Whole(stride, overlap, store)


def _recompute_costs_more(x: Tensor, g: Tensor, theta_weight: Tensor) -> bool:
    """The one place where recompute="auto" is decided, by measurement (bench: step with recompute=True and False)."""
    depth = theta_weight[0].numel() + g.shape[1]
    return x.device.type == "cpu" and depth >= 256
