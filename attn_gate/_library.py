"""Loads the compiled libraries, and tells PyTorch's tracers the shapes, dtypes and strides of all results."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DIRECTORY = Path(os.environ.get("ATTN_GATE_LIBRARY_DIR") or Path(__file__).parent)


@functools.cache
def build_info() -> dict[str, str]:
    """What CMake wrote beside the libraries when it built them."""
    return json.loads((_DIRECTORY / "_build_info.json").read_text())


def _load() -> tuple[bool, str]:
    """Loads _C and, where this torch can use it, _C_cuda: returns whether it did, and if not, why."""
    cpu = _DIRECTORY / "_C.abi3.so"
    if not cpu.exists():
        raise ImportError(
            f"attn_gate: {_DIRECTORY} has no compiled library ({cpu.name}): this is a source tree that isn't "
            "installed. Run `pip install -e .` in it, or start Python elsewhere to use an installed one."
        )
    try:
        torch.ops.load_library(cpu)
    except OSError as error:
        raise ImportError(
            f"attn_gate: {cpu} can't be loaded by torch {torch.__version__}: {error.__cause__ or error}. "
            "It needs torch >= 2.10; reinstall with `pip install --force-reinstall --no-deps attn_gate`."
        ) from error
    cuda = _DIRECTORY / "_C_cuda.abi3.so"
    if not cuda.exists():
        return False, "attn_gate was built without CUDA kernels (`python -m attn_gate info` says why)"
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} is not a CUDA build"
    nvcc = build_info()["nvcc"]
    if int(nvcc.partition(".")[0]) > int(torch.version.cuda.partition(".")[0]):
        return False, f"the CUDA kernels were built by CUDA {nvcc}, torch is of CUDA {torch.version.cuda}"
    try:
        torch.ops.load_library(cuda)
    except OSError as error:
        return False, f"{cuda.name} can't be loaded: {error.__cause__ or error}"
    return True, ""


has_cuda_library, why_no_cuda_library = _load()
ops = torch.ops.attn_gate


def cpu_isa() -> str:
    """The instruction set of the CPU kernels that run here: default, avx2, avx512, avx512_bf16 (avx512 and
    dot products of bfloat16) or amx (avx512 and matrix units)."""
    return ops.cpu_isa()


def multiplies_bfloat16() -> bool:
    """Whether our kernels were built for products of bfloat16 that this CPU has, and may use them."""
    return cpu_isa() in ("amx", "avx512_bf16")


def has_bfloat16() -> bool:
    """Whether this CPU has products of bfloat16: our kernels use them, or PyTorch (if not old) says so."""
    told = getattr(torch.cpu, "get_capabilities", dict)()
    return multiplies_bfloat16() or told.get("amx_bf16", False) or told.get("avx512_bf16", False)


# ------------------------------------------------------------------------------------- what operators return


def _acc(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _map(like: Tensor, channels: int, grid: Sequence[int]) -> Tensor:
    """[N, channels, *grid] in this map's dtype and layout: channels last where it is that alone."""
    last = torch.channels_last if like.ndim == 4 else torch.channels_last_3d
    native = not like.is_contiguous() and like.is_contiguous(memory_format=last)
    memory_format = last if native else torch.contiguous_format
    shape = (like.shape[0], channels, *grid)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _like(t: Tensor, wanted: bool = True) -> Tensor:
    """The gradient of a map, or another map of its kind."""
    return _map(t, t.shape[1], t.shape[2:]) if wanted else t.new_empty(0)


def _channel(x: Tensor, grid: Sequence[int]) -> Tensor:
    """alpha or logits."""
    return x.new_empty((x.shape[0], 1, *grid), dtype=_acc(x))


def _parameter(x: Tensor, shape: Sequence[int], wanted: bool) -> Tensor:
    """The gradient of a parameter."""
    return x.new_empty(shape if wanted else (0,), dtype=_acc(x))


def _preactivation(x: Tensor, inter: int, grid: Sequence[int], store: bool) -> Tensor:
    return _map(x, inter, grid) if store else x.new_empty(0)


def _coarse(x: Tensor, theta_weight: Tensor, stride: Sequence[int]) -> list[int]:
    """theta's grid."""
    return [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], theta_weight.shape[2:], stride, strict=True)]


def _wanted(needs: int, count: int) -> list[bool]:
    return [bool(needs >> i & 1) for i in range(count)]


def _gradients_of_chain(theta: Tensor, phi: Tensor | None, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    need_theta, need_phi, need_weight, need_bias = wanted
    dphi = theta.new_empty(0)
    if phi is not None and need_phi:
        # On theta's grid the two gradients are one.
        dphi = _like(theta if phi.shape[2:] == theta.shape[2:] else phi)
    return (
        _like(theta, need_theta),
        dphi,
        _parameter(theta, (theta.shape[1],), need_weight),
        _parameter(theta, (1,), need_bias),
    )


def _gradients_of_whole(
    x: Tensor, g: Tensor, theta_weight: Tensor, phi_weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    inter = theta_weight.shape[0]
    parameters = (theta_weight.shape, phi_weight.shape, (inter,), (inter,), (1,))
    gradients = [_parameter(x, shape, want) for shape, want in zip(parameters, wanted[2:], strict=True)]
    return _like(x, wanted[0]), _like(g, wanted[1]), *gradients


_FAKES: dict[str, Callable] = {}


def _fake(name: str) -> Callable[[Callable], Callable]:
    """Marks what the operator of this name returns, in shape, dtype and strides."""

    def keep(function: Callable) -> Callable:
        return _FAKES.setdefault(name, function)

    return keep


def register_fakes(namespace: str) -> None:
    """Tells tracers what the operators of this namespace return."""
    for name, function in _FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", function)


def empty_results(name: str, *args: Any) -> Any:
    """What the operator of this name returns for these arguments, not yet computed: new tensors."""
    return _FAKES[name](*args)


@_fake("gate_fwd")
def _(x, theta, phi, psi_weight, psi_bias, phi_resize, alpha_resize, activation):
    return _like(x), _channel(x, theta.shape[2:])


@_fake("gate_bwd")
def _(dy, dalpha, x, theta, phi, psi_weight, alpha, phi_resize, alpha_resize, activation, needs):
    need_x, *others = _wanted(needs, 5)
    return _like(x, need_x), *_gradients_of_chain(theta, phi, others)


@_fake("gate_logits_fwd")
def _(theta, phi, psi_weight, psi_bias, phi_resize, activation):
    return _channel(theta, theta.shape[2:])


@_fake("gate_logits_bwd")
def _(dlogits, theta, phi, psi_weight, phi_resize, activation, needs):
    return _gradients_of_chain(theta, phi, _wanted(needs, 4))


@_fake("attention_gate_fwd")
def _(
    x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias,
    stride, phi_resize, alpha_resize, activation, store,
):  # fmt: skip
    grid = _coarse(x, theta_weight, stride)
    return _like(x), _channel(x, grid), _preactivation(x, theta_weight.shape[0], grid, store)


@_fake("attention_gate_bwd")
def _(
    dy, dalpha, x, g, theta_weight, phi_weight, bias, psi_weight, alpha, preact,
    stride, phi_resize, alpha_resize, activation, needs,
):  # fmt: skip
    return _gradients_of_whole(x, g, theta_weight, phi_weight, _wanted(needs, 7))


@_fake("attention_logits_fwd")
def _(x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias, stride, phi_resize, activation, store):
    grid = _coarse(x, theta_weight, stride)
    return _channel(x, grid), _preactivation(x, theta_weight.shape[0], grid, store)


@_fake("attention_logits_bwd")
def _(
    dlogits, x, g, theta_weight, phi_weight, bias, psi_weight, preact,
    stride, phi_resize, activation, needs,
):  # fmt: skip
    return _gradients_of_whole(x, g, theta_weight, phi_weight, _wanted(needs, 7))


@_fake("gate_apply_fwd")
def _(x, alpha, alpha_resize):
    return _like(x)


@_fake("gate_apply_bwd")
def _(dy, x, alpha, alpha_resize, needs):
    need_x, need_alpha = _wanted(needs, 2)
    return _like(x, need_x), _parameter(x, alpha.shape, need_alpha)


register_fakes("attn_gate")


# ---------------------------------------------------------------- operators that only the native kernels have


@torch.library.register_fake("attn_gate::moments_fwd")
def _(x, kernel, stride):
    rows = x.shape[1] * math.prod(kernel)
    return x.new_empty(rows, dtype=torch.float64), x.new_empty((rows, rows), dtype=torch.float64)


@torch.library.register_fake("attn_gate::moments_bwd")
def _(dmean, dcov, x, mean, kernel, stride, needs):
    return _like(x, bool(needs))


@torch.library.register_fake("attn_gate::projection_statistics")
def _(x, theta_weight, centre, stride):
    inter = theta_weight.shape[0]
    return x.new_empty(inter, dtype=torch.float64), x.new_empty(inter, dtype=torch.float64)


@torch.library.register_fake("attn_gate::attention_train_fwd")
def _(
    x, g, centre_x, centre_g, theta_weight, phi_weight, bias, psi_weight, psi_bias,
    stride, phi_resize, activation,
):  # fmt: skip
    return _channel(x, _coarse(x, theta_weight, stride))


@torch.library.register_fake("attn_gate::attention_train_bwd")
def _(
    dy, dlogits, x, g, centre_x, centre_g, theta_weight, phi_weight, theta_norm, phi_norm, bias, psi_weight,
    alpha, stride, phi_resize, alpha_resize, activation, needs,
):  # fmt: skip
    *wanted, of_theta, of_phi, of_bias, of_psi, of_psi_bias = _wanted(needs, 9)
    maps = _gradients_of_whole(x, g, theta_weight, phi_weight, (*wanted, of_bias, of_psi, of_psi_bias))
    inter = theta_weight.shape[0]
    scales = _parameter(x, (inter,), of_theta), _parameter(x, (inter,), of_phi)
    return *maps[:4], *scales, *maps[4:]
