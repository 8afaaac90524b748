"""What the Triton kernels don't take, on its interpreter: TRITON_INTERPRET=1 python tests/triton_edges.py"""

from __future__ import annotations

import pytest
import torch

from attn_gate import functional


def main() -> None:
    # Of one element, so that whoever goes on finds out by the size of y: 8 GiB.
    x = torch.zeros(1).expand(1, 1, 2**16, 2**15)
    with pytest.raises(ValueError, match=r"at most 2146435071 voxels; x is \[1, 1, 65536, 32768\]"):
        functional.apply_attention(x, torch.zeros(1, 1, 2, 2), backend="triton")
    x, g, psi = torch.randn(1, 2, 4, 4), torch.randn(1, 3, 4, 4), torch.randn(1, 0, 1, 1)
    weights = torch.randn(0, 2, 1, 1).requires_grad_(), torch.randn(0, 3, 1, 1)
    for recompute in ("auto", True, False):
        options = {"psi_weight": psi, "psi_bias": torch.randn(1), "recompute": recompute}
        with pytest.raises(ValueError, match=r"I of at least 1; got \[0, 2, 1, 1\]"):
            functional.attention_gate(x, g, *weights, backend="triton", **options)
        functional.attention_gate(x, g, *weights, backend="cpu", **options)[0].sum().backward()
    print("right")


if __name__ == "__main__":
    main()
