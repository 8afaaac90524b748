"""What a gate decides once for all calls alike.

How a gate runs follows from its layers and from sizes, dtypes and modes, never from values. Finding out takes
Python 0.1 to 0.2 ms within a network, whose maps drive Python's own objects out of the caches: more than a
small gate's kernels. So what was found is kept, beside all that it depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from attn_gate import reference

Decision = TypeVar("Decision")
_STATISTICS = ("running_mean", "running_var")
_MOST = 64  # decisions kept; images of ever new sizes must not fill the memory


class Decisions:
    """The decisions of one gate. Copies of it start with none."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}

    def of(
        self,
        layers: Iterable[tuple[str, nn.Module | None]],
        x: Any,
        g: Any,
        options: tuple[Hashable, ...],
        decide: Callable[[], Decision | None],
        safe: Decision | None = None,
    ) -> Decision | None:
        """`decide()`, or what it was in the same situation; None isn't kept, nor what raises.

        layers: of the gate, with their names. options: what else the decision depends on. safe: a decision
        that stays right whatever becomes of the layers, if not always the fastest: they aren't looked at
        again then.
        """
        call = _call(x, g, options)
        if call is None:
            return decide()
        seen, found = self._kept.get(call, (None, None))
        if seen is not None and found == safe:
            return found
        now = _states(layers)
        if now is None:
            return decide()
        if now != seen:
            found = decide()
            if len(self._kept) >= _MOST:
                self._kept.clear()
            if found is not None:
                self._kept[call] = now, found
        return found

    def __deepcopy__(self, memo: dict) -> Decisions:
        return Decisions()

    def __reduce__(self) -> tuple:
        return Decisions, ()


def is_traced() -> bool:
    """Whether a call may be anything but plain eager PyTorch: traced, compiled or transformed."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or is_in_torch_dispatch_mode()
    )


def has_hooks(layer: nn.Module) -> bool:
    """Whether anybody waits for this layer to be called."""
    return bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )


def has_to_be_called(layer: nn.Module) -> bool:
    """Whether somebody waits for this layer's call, or its forward isn't its class's."""
    own = layer.__dict__  # where tools like LoRA's put a forward of theirs
    if "forward" in own or "_conv_forward" in own or has_hooks(layer):
        return True
    return layer.forward is None  # never: but torch.compile guards this, and not what a dictionary lacks


def is_watched(layer: nn.Module) -> bool:
    """Whether it has to be called, or somebody waits for layers of any kind."""
    return has_to_be_called(layer) or (not torch.compiler.is_compiling() and listened_globally())


def listened_globally() -> bool:
    """Whether anybody waits for layers of any kind to be called."""
    return bool(
        global_hooks._global_forward_hooks
        or global_hooks._global_forward_pre_hooks
        or global_hooks._global_backward_hooks
        or global_hooks._global_backward_pre_hooks
    )


def _call(x: Any, g: Any, options: tuple) -> tuple | None:
    """What a call differs in from others; None where its decision shan't be kept."""
    if is_traced() or type(x) is not Tensor or type(g) is not Tensor:
        return None
    maps = x.shape, x.stride(), x.dtype, x.device, g.shape, g.stride(), g.dtype, g.device
    return *maps, torch.is_grad_enabled(), reference.autocast_dtype(x), options


def _states(layers: Iterable[tuple[str, nn.Module | None]]) -> list | None:
    """What decisions depend on in these layers; None where that may change without a trace here."""
    states: list[Any] = [listened_globally()]  # once for all layers: this is asked at each call
    for name, layer in layers:
        states += (name, type(layer))
        if layer is None:
            continue
        if isinstance(layer, nn.SyncBatchNorm):
            return None  # its process group may come and go
        # A frozen ScriptModule has no mode.
        states += (getattr(layer, "training", None), has_to_be_called(layer))
        if "weight" in layer._parameters and (weight := layer._parameters["weight"]) is not None:
            states += (type(weight), weight.dtype, weight.device, weight.shape)
        states += (name in layer._buffers and layer._buffers[name] is None for name in _STATISTICS)
    return states
