"""capture_attention: the attention maps of a model while it runs, without hooks.

A gate tells its listener, one attribute of the instance, which map it has just computed. So nothing has to
run unfused for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from attn_gate import patch
from attn_gate.listening import LISTENER
from attn_gate.module import AttentionGate


@contextmanager
def capture_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The maps of all gates by module name, filled whenever the model runs inside of the `with` block.

        with attn_gate.capture_attention(model) as maps:
            model(image)
        maps["model.1.attention"]  # alpha [N, 1, *R]

    Of a gate that runs several times the last map is kept. Maps are detached, on their gate's own grid R, in
    the precision they were computed in.

    Args:
        model: with AttentionGate modules, or with gates that fuse_gates has found, those included that run
            their original forward because of a hook.

    Raises:
        ValueError: the model has neither; the message says what to do.
    """
    gates = {
        name.replace("_orig_mod.", "").removesuffix("_orig_mod"): module
        for name, module in model.named_modules()
        if isinstance(module, AttentionGate) or patch.state_of(module) is not None
    }
    if not gates:
        raise ValueError(
            "model has no gates to capture: call attn_gate.fuse_gates(model) first; "
            "its report says which it found"
        )
    maps: dict[str, Tensor] = {}
    before = {name: gate.__dict__.get(LISTENER) for name, gate in gates.items()}
    try:
        for name, gate in gates.items():
            gate.__dict__[LISTENER] = _Listener(maps, name)
        yield maps
    finally:
        for name, gate in gates.items():
            if before[name] is None:
                gate.__dict__.pop(LISTENER, None)
            else:
                gate.__dict__[LISTENER] = before[name]


class _Listener:
    """Keeps the last map of one gate. Nobody listens to copies and pickles of the gate: there it is None."""

    def __init__(self, maps: dict[str, Tensor], name: str) -> None:
        self._maps, self._name = maps, name

    def __call__(self, alpha: Tensor) -> None:
        self._maps[self._name] = alpha.detach()

    def __reduce__(self) -> tuple:
        return type(None), ()
