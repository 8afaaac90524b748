"""How a gate tells which map it has computed, whoever runs it."""

from __future__ import annotations

from torch import Tensor, nn

LISTENER = "_attn_gate_listener"  # an attribute of the gate: a function of alpha, or None


def tell(gate: nn.Module, alpha: Tensor) -> None:
    """Calls the gate's listener, if it has one, with the map."""
    listener = getattr(gate, LISTENER, None)  # not by __dict__: torch.compile wouldn't see it come and go
    if listener is not None:
        listener(alpha)
