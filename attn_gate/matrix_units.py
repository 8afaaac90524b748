"""CPUs with units for products of bfloat16 matrices (Intel's AMX), or with vectors that make dot products of
bfloat16 (AVX-512's BF16): what is left to PyTorch there.

Our kernels use them as PyTorch's bfloat16 convolutions do, but make theta and phi anew for the backward pass.
So a step with large projections makes them there, stored, and what follows is fused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_gate import _library, pointwise, reference
from attn_gate.eager import Parts, are_convolutions

AVAILABLE: bool = _library.has_bfloat16()
OURS: bool = _library.multiplies_bfloat16()


def serve(x: Tensor, parts: Parts) -> bool:
    """Whether PyTorch's convolutions of such maps by these layers are bfloat16's, on such units."""
    if not AVAILABLE or x.device.type != "cpu" or not are_convolutions(parts):
        return False
    weights = {parts.theta.weight.dtype, parts.phi.weight.dtype}
    if (autocast := reference.autocast_dtype(x)) is not None:
        return autocast == torch.bfloat16 and torch.float64 not in (x.dtype, *weights)
    return weights == {torch.bfloat16}


def pay(x: Tensor, parts: Parts) -> bool:
    """Whether a gate's projections are faster there, made and stored, than in the fused operators.

    Measured on 2 cores with AMX, time against that of the whole gate fused. Inference: 0.94 to 1.7; behind
    batch norms, which fold to weights of more bits, 0.83 from 2^17 multiply-adds a voxel on. A step: 0.75 to
    0.95 from 2^17 pairs of a channel of theta and one of x or g on, 0.96 to 2.5 below. By dot products, on a
    Zen 5: inference behind batch norms 0.67 at 2^18, a step 0.85 to 0.9 at 2^18 and 1.0 at 2^16.
    Where our kernels were built without, by the multiply-adds for each voxel of theta's grid, a step: 0.6 to
    0.96 from 2^17 on, 1.0 to 4.4 at 2^16 and below; where theta is a product (pointwise.py) 0.63 to 0.75 at
    2^14 and 2^16, 1.05 and 1.5 at 2^12.
    """
    if not serve(x, parts):
        return False
    norms = (parts.theta_norm, parts.phi_norm) != (None, None)  # which the whole gate folds
    if OURS and not norms:
        inter, channels = parts.theta.weight.shape[:2]
        return torch.is_grad_enabled() and inter * (channels + parts.phi.weight.shape[1]) >= 2**17
    product = not norms and pointwise.serves(parts.theta, x)
    return parts.theta.weight.numel() + parts.phi.weight.numel() >= (2**14 if product else 2**17)
