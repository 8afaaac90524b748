"""1x1 convolutions as matrix products, where that is faster.

PyTorch's own copy contiguous maps into another layout and back on the CPU. On 2 cores with AVX-512 and AMX,
maps of 256^2 to 32^2, products by MKL took 0.4 to 0.9 of their time in float32, 0.1 to 0.7 in bfloat16. On
AMD's CPUs MKL leaves half of a Zen 5's arithmetic unused, in float32 (`pays`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attn_gate import _library, reference
from attn_gate.decisions import is_watched

_HAS_MKL: bool = torch.backends.mkl.is_available()
_IS_AMD: bool = _library.ops.cpu_is_amd()
_HAS_BFLOAT16: bool = _library.has_bfloat16()


def may_serve(layer: nn.Module) -> bool:
    """Whether `layer` is a plain 1x1 convolution without hooks that may run as a product here and now.

    Not under torch.compile, which has its own way with convolutions, nor in transforms of torch.func.
    """
    if not _HAS_MKL or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if type(layer) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d) or is_watched(layer):
        return False
    ones, zeros = (1,) * len(layer.kernel_size), (0,) * len(layer.kernel_size)
    return (
        layer.kernel_size == layer.stride == ones
        and layer.groups == 1
        and layer.padding in ("valid", "same", zeros)
    )


def serves(layer: nn.Module, x: Tensor) -> bool:
    """Whether layer(x) runs as a product: x is contiguous, and nothing is wrong with it."""
    return (
        may_serve(layer)
        and x.device.type == "cpu"
        and x.dim() == len(layer.kernel_size) + 2
        and x.shape[1] == layer.in_channels
        and x.numel() > 0
        and x.is_contiguous()
        and pays(layer, x)
    )


def pays(layer: nn.Module, x: Tensor) -> bool:
    """Whether the product is faster than the convolution of contiguous maps: always, except on AMD's CPUs.

    Measured there, on 2 cores of a Zen 5, time against the convolution's, inference and step: float32 0.15 to
    0.93 up to 2^10 weights, 0.3 to 1.2 at 2^11, 0.5 to 2.0 above, but 0.5 to 1.1 on maps of 16 MiB or more;
    bfloat16 0.2 to 1.0, float16 1.7 to 2.0. float64 was not measured.
    """
    if not _IS_AMD:
        return True
    autocast = None if x.dtype == torch.float64 else reference.autocast_dtype(x)
    dtype = autocast or x.dtype
    if dtype == torch.bfloat16:
        return _HAS_BFLOAT16
    large = x.numel() * x.element_size() >= 2**24
    return dtype == torch.float32 and layer.in_channels * layer.out_channels <= (2**16 if large else 2**10)


def convolve(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """layer(x), had it this weight and bias."""
    return _product(x, weight, bias) if serves(layer, x) else layer._conv_forward(x, weight, bias)


def call(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x); a plain nn.Sequential layer by layer."""
    if type(layer) is nn.Sequential and not (torch.compiler.is_compiling() or is_watched(layer)):
        for part in layer:
            x = call(part, x)
        return x
    return _product(x, layer.weight, layer.bias) if serves(layer, x) else layer(x)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, flat = weight.flatten(1).expand(x.shape[0], -1, -1), x.flatten(2)
    y = torch.bmm(rows, flat) if bias is None else torch.baddbmm(bias[:, None], rows, flat)
    return y.unflatten(2, x.shape[2:])
