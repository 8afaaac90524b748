"""Loads the compiled libraries and tells PyTorch's tracers the shapes, dtypes and strides that the operators return."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

_DIRECTORY = Path(os.environ.get("ATTN_GATE_LIBRARY_DIR") or Path(__file__).parent)


def _load() -> tuple[bool, str]:
    """Load _C and, where this torch can use it, _C_cuda. Returns whether the latter is there, and if not, why."""
    cpu = _DIRECTORY / "_C.abi3.so"
    if not cpu.exists():
        raise ImportError(
            f"attn_gate: {_DIRECTORY} has no compiled library ({cpu.name}): this is a source tree that is not installed. "
            "Run `pip install -e .` in it, or start Python in another folder to use an installed attn_gate."
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
        return False, "this installation of attn_gate was built without CUDA kernels (`python -m attn_gate info` says why)"
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} is not a CUDA build"
    try:
        torch.ops.load_library(cuda)
    except OSError as error:
        return False, f"{cuda.name} can't be loaded: {error.__cause__ or error}"
    return True, ""


has_cuda_library, why_no_cuda_library = _load()
ops = torch.ops.attn_gate


def cpu_isa() -> str:
    """The instruction set of the CPU kernels that run here: default, avx2 or avx512."""
    return ops.cpu_isa()


def _acc(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _like(t: Tensor, channels: int | None = None, grid: tuple | None = None, want: bool = True) -> Tensor:
    """Empty [N, channels, *grid] in t's dtype and native layout: channels last where t is and not contiguous as well."""
    if not want:
        return t.new_empty(0)
    shape = (t.shape[0], t.shape[1] if channels is None else channels, *(t.shape[2:] if grid is None else grid))
    last = torch.channels_last if t.ndim == 4 else torch.channels_last_3d
    native = not t.is_contiguous() and t.is_contiguous(memory_format=last)
    return torch.empty(shape, dtype=t.dtype, device=t.device, memory_format=last if native else torch.contiguous_format)


def _map1(t: Tensor, grid: tuple) -> Tensor:
    return t.new_empty((t.shape[0], 1, *grid), dtype=_acc(t))


def _parameter(t: Tensor, shape: tuple, want: bool) -> Tensor:
    return t.new_empty(shape if want else (0,), dtype=_acc(t))


def _coarse(x: Tensor, theta_weight: Tensor, stride: list[int]) -> tuple:
    return tuple(
        (n - k) // s + 1 for n, k, s in zip(x.shape[2:], theta_weight.shape[2:], stride, strict=True)
    )


def _wants(needs: int, count: int) -> list[bool]:
    return [bool(needs >> i & 1) for i in range(count)]


@torch.library.register_fake("attn_gate::gate_fwd")
def _(x, theta, phi, psi_weight, psi_bias, phi_resize, alpha_resize, activation):
    return _like(x), _map1(x, theta.shape[2:])


@torch.library.register_fake("attn_gate::gate_bwd")
def _(dy, dalpha, x, theta, phi, psi_weight, alpha, phi_resize, alpha_resize, activation, needs):
    dx, *rest = _wants(needs, 5)
    return (_like(x, want=dx), *_given_grads(x, theta, phi, *rest))


def _given_grads(like, theta, phi, need_theta, need_phi, need_psi, need_bias):
    need_phi = need_phi and phi is not None
    same = need_phi and phi.shape[2:] == theta.shape[2:]  # then d phi is d theta, in theta's layout
    return (
        _like(theta, want=need_theta),
        _like(theta if same else phi, want=need_phi) if need_phi else like.new_empty(0),
        _parameter(like, (theta.shape[1],), need_psi),
        _parameter(like, (1,), need_bias),
    )


@torch.library.register_fake("attn_gate::gate_logits_fwd")
def _(theta, phi, psi_weight, psi_bias, phi_resize, activation):
    return _map1(theta, theta.shape[2:])


@torch.library.register_fake("attn_gate::gate_logits_bwd")
def _(dlogits, theta, phi, psi_weight, phi_resize, activation, needs):
    return _given_grads(theta, theta, phi, *_wants(needs, 4))


@torch.library.register_fake("attn_gate::attention_gate_fwd")
def _(x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias, stride, phi_resize, alpha_resize, activation, store):
    coarse = _coarse(x, theta_weight, stride)
    return _like(x), _map1(x, coarse), _like(x, theta_weight.shape[0], coarse, want=store)


def _attention_grads(x, g, theta_weight, phi_weight, needs):
    want, inter = _wants(needs, 7), theta_weight.shape[0]
    return (
        _like(x, want=want[0]),
        _like(g, want=want[1]),
        _parameter(x, theta_weight.shape, want[2]),
        _parameter(x, phi_weight.shape, want[3]),
        _parameter(x, (inter,), want[4]),
        _parameter(x, (inter,), want[5]),
        _parameter(x, (1,), want[6]),
    )


@torch.library.register_fake("attn_gate::attention_gate_bwd")
def _(
    dy, dalpha, x, g, theta_weight, phi_weight, bias, psi_weight, alpha, preact, stride, phi_resize, alpha_resize, activation, needs
):  # fmt: skip
    return _attention_grads(x, g, theta_weight, phi_weight, needs)


@torch.library.register_fake("attn_gate::attention_logits_fwd")
def _(x, g, theta_weight, phi_weight, bias, psi_weight, psi_bias, stride, phi_resize, activation, store):
    coarse = _coarse(x, theta_weight, stride)
    return _map1(x, coarse), _like(x, theta_weight.shape[0], coarse, want=store)


@torch.library.register_fake("attn_gate::attention_logits_bwd")
def _(dlogits, x, g, theta_weight, phi_weight, bias, psi_weight, preact, stride, phi_resize, activation, needs):
    return _attention_grads(x, g, theta_weight, phi_weight, needs)


@torch.library.register_fake("attn_gate::gate_apply_fwd")
def _(x, alpha, alpha_resize):
    return _like(x)


@torch.library.register_fake("attn_gate::gate_apply_bwd")
def _(dy, x, alpha, alpha_resize, needs):
    dx, dalpha = _wants(needs, 2)
    return _like(x, want=dx), _map1(alpha.to(_acc(x)), alpha.shape[2:]) if dalpha else alpha.new_empty(0, dtype=_acc(x))
