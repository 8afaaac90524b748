"""CPUs with units for products of bfloat16 matrices (Intel's AMX).

There PyTorch's bfloat16 convolutions have several times the arithmetic of our kernels, which multiply in
float32 whatever the maps are. So large projections are left to them, and what follows is fused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_gate import pointwise, reference
from attn_gate.eager import Parts

AVAILABLE: bool = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)


def serve(x: Tensor) -> bool:
    """Whether these units would multiply maps such as x."""
    return AVAILABLE and x.device.type == "cpu" and (reference.autocast_dtype(x) or x.dtype) == torch.bfloat16


def pay(x: Tensor, parts: Parts) -> bool:
    """Whether a gate's projections are faster there, made and stored, than in the fused operators.

    By the multiply-adds for each voxel of theta's grid. Measured on 2 cores with AMX, time of inference and
    of a step against that of the whole gate fused: 0.6 to 0.96 above 2^17, 1.0 to 4.4 at 2^16 and below;
    where both projections are products (pointwise.py) 0.63 to 0.75 at 2^14 and 2^16, 1.05 and 1.5 at 2^12.
    """
    norms = parts.theta_norm, parts.phi_norm  # which the whole gate folds
    products = norms == (None, None) and pointwise.serves(parts.theta, x)
    least = 2**14 if products else 2**17
    return serve(x) and parts.theta.weight.numel() + parts.phi.weight.numel() >= least
