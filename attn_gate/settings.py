"""What a layer computes with beside its tensors and layers: plain attributes, such as a Dropout's p.

Nothing tells when one of them changes, so they are compared with what they were.
"""

from __future__ import annotations

import enum
import numbers
import reprlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attn_gate.families import norm_kind
from attn_gate.listening import LISTENER

Settings = tuple[tuple[str, Any], ...]  # (name, value), the value as `_frozen` keeps it

_PLAIN = (numbers.Number, str, bytes, enum.Enum, torch.dtype, torch.device, types.NoneType)
# What makes no difference to results, or is looked up at each call.
_NOT_ASKED = frozenset(nn.Module().__dict__) | {LISTENER, "inplace"}
_OF_CONVOLUTIONS = _NOT_ASKED | {"in_channels", "out_channels"}
_OF_NORMS = _NOT_ASKED | {"num_features", "num_channels", "eps", "momentum", "affine", "track_running_stats"}
_NOT_LOOKED_INTO = ...  # stands for values that aren't compared
_DEPTH = 3  # of lists in lists


def settings_of(layer: nn.Module) -> Settings:
    """The layer's as they are now."""
    not_asked = _NOT_ASKED
    if isinstance(layer, nn.modules.conv._ConvNd):
        not_asked = _OF_CONVOLUTIONS
    elif norm_kind(layer):
        not_asked = _OF_NORMS
    found = ((name, _frozen(value)) for name, value in layer.__dict__.items() if name not in not_asked)
    return tuple((name, value) for name, value in found if value is not _NOT_LOOKED_INTO)


def changed(layer: nn.Module, seen: Settings) -> str:
    """The first of these settings that isn't what it was; empty where all are."""
    now = layer.__dict__
    for name, value in seen:
        if name not in now or (now[name] is not value and _frozen(now[name]) != value):
            return name
    return ""


def described(layer: nn.Module, name: str) -> str:
    """What became of a changed setting, such as "is 0.5 now"."""
    if name not in layer.__dict__:
        return "is gone"
    value = layer.__dict__[name]
    return f"is {'another tensor' if isinstance(value, Tensor) else reprlib.repr(value)} now"


def _frozen(value: Any, depth: int = _DEPTH) -> Any:
    """Something equal as long as the value is; the value itself where that can't change."""
    if isinstance(value, _PLAIN) or (isinstance(value, Callable) and not isinstance(value, nn.Module)):
        return value
    if isinstance(value, Tensor):
        if torch.compiler.is_compiling():  # which can't tell, so it counts as changed
            return None
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, dict):
        value = tuple(value.items())
    if not isinstance(value, (list, tuple)) or depth == 0:
        return _NOT_LOOKED_INTO
    frozen = tuple(_frozen(item, depth - 1) for item in value)
    same = type(value) is tuple and all(a is b for a, b in zip(frozen, value, strict=True))
    return value if same else frozen
