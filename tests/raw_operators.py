"""What the registered operators refuse, for every backend whose kernels check for themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def refuses_what_does_not_fit(ops: Any) -> None:
    """ops: a namespace of torch.ops with gate_fwd and gate_bwd."""
    x, theta, weight = torch.randn(1, 2, 3, 3), torch.randn(1, 4, 3, 3), torch.randn(4)
    modes = ("linear", "linear", "relu")
    good = ops.gate_fwd(x, theta, None, weight, None, *modes)
    for bad in (
        (x.double(), theta, None, weight, None, *modes),
        (x.long(), theta, None, weight, None, *modes),
        (x[0], theta, None, weight, None, *modes),
        (x, theta[:, :2], None, weight, None, *modes),
        (x, theta.expand(2, -1, -1, -1), None, weight, None, *modes),
        (x, theta, x, weight, None, *modes),
        (x, theta, None, weight.double(), None, *modes),
        (x, theta, None, weight[:3], None, *modes),
        (x, theta, None, weight, weight, *modes),
        (x, theta, None, weight, None, "linear", "linear", "tanh"),
        (x, theta[:, :, :1], None, weight, None, "linear", "cubic", "relu"),
        (x, theta[:, :, :0], None, weight, None, *modes),
        (x, theta, theta[:, :, :0], weight, None, *modes),
    ):
        with pytest.raises(RuntimeError, match="attn_gate: "):
            ops.gate_fwd(*bad)
    y, alpha = good
    for dy, dalpha in ((y[:, :1], None), (y.double(), None), (None, alpha[..., :2]), (None, alpha.double())):
        with pytest.raises(RuntimeError, match="attn_gate: "):
            ops.gate_bwd(dy, dalpha, x, theta, None, weight, alpha, *modes, 31)
