"""A twin of a module: a copy to try things with, which shares no tensor, hook or layer with the module."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def make_twin(gate: nn.Module, axes: int = 0, generator: torch.Generator | None = None) -> nn.Module:
    """A copy of the gate without hooks, on the CPU.

    generator: draws all parameters and running statistics, in float64; without it they are copied.
    axes: of space; synchronised batch norms become those of as many axes.
    """
    memo: dict[int, Any] = {}
    twin = _copied_module(gate, axes, generator, memo)
    for module in twin.modules():
        for name, value in module.__dict__.items():
            if name not in ("_parameters", "_buffers", "_modules"):
                module.__dict__[name] = _of_twin(value, memo)
    return twin


def _copied_module(
    module: nn.Module, axes: int, generator: torch.Generator | None, memo: dict[int, Any]
) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    twin = memo[id(module)] = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for name in _HOOKS:
        twin.__dict__[name] = type(module.__dict__[name])()
    if isinstance(module, nn.SyncBatchNorm):  # which takes no CPU tensors, and would wait for other processes
        twin.__class__ = _BATCH_NORMS[axes]
    twin._parameters = {k: _copied(p, k, generator, memo) for k, p in module._parameters.items()}
    twin._buffers = {k: _copied(b, k, generator, memo) for k, b in module._buffers.items()}
    twin._modules = {
        k: child if child is None else _copied_module(child, axes, generator, memo)
        for k, child in module._modules.items()
    }
    return twin


def _of_twin(value: Any, memo: dict[int, Any]) -> Any:
    """An attribute with what it holds of the gate replaced by the twin's: methods, layers, tensors."""
    if isinstance(value, types.MethodType) and id(value.__self__) in memo:
        return types.MethodType(value.__func__, memo[id(value.__self__)])
    if isinstance(value, (nn.Module, Tensor)) and id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor) and value.is_floating_point() and value.device.type != "meta":
        return value.detach().to("cpu", torch.float64)
    if type(value) in (list, tuple, set):
        return type(value)(_of_twin(v, memo) for v in value)
    return {k: _of_twin(v, memo) for k, v in value.items()} if type(value) is dict else value


def _copied(t: Tensor | None, name: str, generator: torch.Generator | None, memo: dict[int, Any]) -> Any:
    if t is None:
        return None
    if id(t) not in memo:
        if generator is None:
            value = t.detach().clone()
        elif not t.is_floating_point():
            value = torch.zeros(t.shape, dtype=t.dtype)
        elif name == "running_var":
            value = torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5
        else:
            fan_in = max(1, t[0].numel()) if t.ndim > 1 else 1
            value = torch.randn(t.shape, generator=generator, dtype=torch.float64) / fan_in**0.5
        memo[id(t)] = nn.Parameter(value) if isinstance(t, nn.Parameter) else value
    return memo[id(t)]
