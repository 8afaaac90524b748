"""CPUs with units for products of bfloat16 matrices (Intel's AMX).

There PyTorch's bfloat16 convolutions have several times the arithmetic of our kernels, which multiply in
float32 whatever the maps are. So large projections are left to them, and what follows is fused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_gate import reference
from attn_gate.eager import Parts

AVAILABLE: bool = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)


def serve(x: Tensor) -> bool:
    """Whether these units would multiply maps such as x."""
    return AVAILABLE and x.device.type == "cpu" and (reference.autocast_dtype(x) or x.dtype) == torch.bfloat16


def pay(x: Tensor, parts: Parts) -> bool:
    """Whether a gate's projections are faster there, made and stored, than in the fused operators.

    Measured on 2 cores with AMX, the time against that of the whole gate fused, inference and training step:
    0.6 to 0.9 and 0.6 to 0.96 above 2^17 multiply-adds for each voxel of theta's grid, 1.0 to 4.4 and 1.03 to
    3.9 at 2^16 and below; where it is lower, PyTorch's layers alone take 1.1 to 1.3 times as long.
    """
    return serve(x) and parts.theta.weight.numel() + parts.phi.weight.numel() >= 2**17
