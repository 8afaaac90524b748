"""What a layer computes with beside its tensors and layers: plain attributes, such as a Dropout's p.

Nothing tells when one of them changes, so they are compared with what they were.
"""

from __future__ import annotations

import enum
import itertools
import numbers
import reprlib
import types
from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attn_gate.families import norm_kind
from attn_gate.listening import LISTENER

STATE = "_attn_gate"  # the attribute of a fused gate that makes it one

_PLAIN = (numbers.Number, str, bytes, enum.Enum, torch.dtype, torch.device, types.NoneType)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial, type)
_CONTAINERS = (list, tuple, dict)
# What makes no difference to results, or is looked up at each call.
_NOT_ASKED = frozenset(nn.Module().__dict__) | {STATE, LISTENER, "inplace", "_compiled_call_impl"}
_OF_CONVOLUTIONS = _NOT_ASKED | {"in_channels", "out_channels"}
_OF_NORMS = _NOT_ASKED | {"num_features", "num_channels", "eps", "momentum", "affine", "track_running_stats"}
_ITSELF = ...  # the content of what nothing can be said of but whether it is the same object
_GONE = object()
_LIMITS = (64, 16, 4)  # items of a container that are looked at, of one in it, and of one in that
_ELEMENTS = 64  # of a tensor or an array; larger ones count as changed by their version, or not at all


class Settings(NamedTuple):
    """Of one layer: how many attributes it had, and of those that count (name, value, content)."""

    count: int
    values: tuple[tuple[str, Any, Any], ...]


def settings_of(layer: nn.Module) -> Settings:
    """The layer's as they are now."""
    not_asked = _not_asked(layer)
    values = [(name, v, _content(v)) for name, v in layer.__dict__.items() if name not in not_asked]
    return Settings(_count(layer.__dict__), tuple(values))


def changed(layer: nn.Module, seen: Settings) -> str:
    """The first of these settings that isn't what it was; empty where all are."""
    now = layer.__dict__
    for name, value, content in seen.values:
        current = now.get(name, _GONE)
        if current is value and (content is value or content is _ITSELF):
            continue  # nearly always: each call of a gate asks for all of its layers
        if current is _GONE or not _alike(current, value, content):
            return name
    return _added(layer, seen) if _count(now) != seen.count else ""


def described(layer: nn.Module, name: str) -> str:
    """What became of a changed setting, such as "is 0.5 now"."""
    if name not in layer.__dict__:
        return "is gone"
    value = layer.__dict__[name]
    return f"is {'another tensor' if isinstance(value, Tensor) else reprlib.repr(value)} now"


def _not_asked(layer: nn.Module) -> frozenset[str]:
    if isinstance(layer, nn.modules.conv._ConvNd):
        return _OF_CONVOLUTIONS
    return _OF_NORMS if norm_kind(layer) else _NOT_ASKED


def _count(attributes: dict[str, Any]) -> int:
    return len(attributes) - (STATE in attributes) - (LISTENER in attributes)


def _added(layer: nn.Module, seen: Settings) -> str:
    """An attribute that wasn't there and hides one of the class: a default, or its forward."""
    known = {name for name, _, _ in seen.values} | _not_asked(layer)
    return next((name for name in layer.__dict__ if name not in known and hasattr(type(layer), name)), "")


def _alike(current: Any, value: Any, content: Any) -> bool:
    if content is _ITSELF or type(current) is not type(value):
        return False
    if torch.compiler.is_compiling() and not isinstance(value, (*_PLAIN, *_CONTAINERS)):
        # Compiled code can't tell what became of elements.
        return current is value and not _has_elements(value)
    return _content(current) == content


def _content(value: Any, depth: int = 0) -> Any:
    """Something that equals that of another value of this type only if both are alike: the value itself where
    it can't change, plain copies of what can."""
    if isinstance(value, _PLAIN):
        return "nan" if value != value else value
    if _has_elements(value):
        return _elements(value)
    if type(value) is tuple and all(isinstance(item, _PLAIN) and item == item for item in value):
        return value
    if isinstance(value, (nn.Module, *_FUNCTIONS)) or depth == len(_LIMITS):
        return _Same(value) if depth else _ITSELF
    if isinstance(value, dict):
        return _items(value, depth), _items(value.values(), depth)
    if isinstance(value, (list, tuple)):
        return _items(value, depth)
    if isinstance(value, (set, frozenset)):
        return frozenset(value) if len(value) <= _LIMITS[depth] else (_Same(value), len(value))
    if hasattr(value, "__dict__"):
        return _Same(value), _content(vars(value), depth + 1)
    return _Same(value) if depth else _ITSELF


def _items(values: Collection[Any], depth: int) -> tuple:
    return len(values), *[_content(item, depth + 1) for item in itertools.islice(values, _LIMITS[depth])]


def _has_elements(value: Any) -> bool:
    """Whether it is a tensor or an array of NumPy's, which need not be installed."""
    return isinstance(value, Tensor) or hasattr(type(value), "__array_interface__")


def _elements(value: Any) -> Any:
    """dtype, shape and elements of a small one on the CPU; else which one it is."""
    if not isinstance(value, Tensor):
        small = value.size <= _ELEMENTS and not value.dtype.hasobject
        return (value.dtype.str, value.shape, value.tobytes()) if small else _Same(value)
    if type(value) is Tensor and value.device.type == "cpu" and value.numel() <= _ELEMENTS:
        return str(value.dtype), tuple(value.shape), repr(value.detach().tolist())
    return _Same(value), None if value.is_inference() else value._version


class _Same:
    """Equal to another one of the same object, which it keeps."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value
