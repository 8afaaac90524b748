"""A gate of another class, made to run fused in place.

The instance gets a class of its own, a subclass of the one it had with the same name, whose forward runs the
fused operators where they compute what the original forward would, and that forward everywhere else. The
modules, parameters, buffers and hooks stay where they are. What is known about the gate lies in one attribute
of the instance, `_attn_gate`: copies, pickles and checkpoints of whole modules carry it along.
"""

from __future__ import annotations

import copyreg
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from attn_gate import eager, engine, reference, training
from attn_gate.backends import exporting_to_onnx
from attn_gate.decisions import Decisions, has_hooks, listened_globally
from attn_gate.families import Layers, Unreadable, find_layer, norm_kind
from attn_gate.folding import FoldCache
from attn_gate.listening import LISTENER, tell
from attn_gate.probe import Found, arrange
from attn_gate.settings import STATE, Settings, changed, described, settings_of

_NOTHING = Settings(0, ())
_classes: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


@dataclass
class FusedGate:
    """What is known about one gate: how its forward is called, what it computes, and where its layers are."""

    family: str
    found: Found
    paths: Layers
    channels: tuple[int, int]
    backend: str
    recompute: str | bool
    # Path, class and settings of the gate ("") and of every layer, as seen when it was fused.
    layers: tuple[tuple[str, type, Settings], ...]
    changed_before: tuple[str, str] | None = None  # of what the gate was copied from
    cache: FoldCache = field(default_factory=FoldCache)
    decisions: Decisions = field(default_factory=Decisions)

    def why_original(self, gate: nn.Module) -> str:
        """Why the gate runs its original forward now; empty while it runs fused."""
        if not torch.compiler.is_compiling() and listened_globally():
            return "a hook on all modules (register_module_*_hook) waits for its layers to be called"
        dims = self.found.spec.spatial_dims
        count = 1  # the gate itself is the first
        for path, layer in walk(gate):
            if has_hooks(layer):
                return f"a hook on {path} waits for that layer to be called"
            known, seen, _ = self.layers[count] if count < len(self.layers) else ("", type(None), ())
            if path != known or not _as_seen(type(layer), seen, dims):
                return f"{path} is a {type(layer).__name__} now{_remark(layer)}"
            if layer.training and self.found.training:
                return f"in training mode {self.found.training}; in eval mode it runs fused"
            count += 1
        if count < len(self.layers):
            return f"{self.layers[count][0]} is gone"
        what = self.changed(gate)
        if what is None:
            return ""
        path, name = what
        dotted = f"{path}.{name}" if path else name
        # Compiled code has no words for everything.
        return (
            dotted if torch.compiler.is_compiling() else f"{dotted} {described(find_layer(gate, path), name)}"
        )

    def changed(self, gate: nn.Module) -> tuple[str, str] | None:
        """Path and attribute of the gate, or of a layer, that isn't what it was when the gate was fused."""
        if self.changed_before is not None:
            return self.changed_before
        for path, _, settings in self.layers:
            layer = find_layer(gate, path)
            if layer is not None and (name := changed(layer, settings)):
                return path, name
        return None

    def to_copy(self, gate: nn.Module) -> FusedGate:
        """What a copy or a pickle of the gate takes along; the settings are for that to `see`."""
        layers = tuple((path, cls, _NOTHING) for path, cls, _ in self.layers)
        return replace(self, layers=layers, changed_before=self.changed(gate))

    def see(self, gate: nn.Module) -> None:
        """Take the settings of this gate, a copy, as those that were seen."""
        found = [(path, cls, find_layer(gate, path)) for path, cls, _ in self.layers]
        self.layers = tuple((p, cls, _NOTHING if m is None else settings_of(m)) for p, cls, m in found)

    def takes(self, gate: nn.Module, x: Any, g: Any) -> bool:
        """Whether the fused operators compute for these maps what the original forward does.

        Where they may not, the original runs, with its own broadcasting and its own errors.
        """
        if not (isinstance(x, Tensor) and isinstance(g, Tensor)):
            return False
        spec, dims = self.found.spec, self.found.spec.spatial_dims + 2
        if (x.ndim, g.ndim) != (dims, dims) or x.shape[0] != g.shape[0] or x.device != g.device:
            return False
        if (x.shape[1], g.shape[1]) != self.channels:
            return False
        weight = find_layer(gate, self.paths.theta).weight
        if x.device != weight.device:
            return False
        if is_traceable_wrapper_subclass(x) or is_traceable_wrapper_subclass(weight):
            return False  # a distributed tensor, say, which the operators know nothing of
        if torch.jit.is_tracing() or exporting_to_onnx():
            return False  # what others load has to hold their operators only
        if reference.autocast_dtype(x) is None:
            if not x.dtype == g.dtype == weight.dtype:
                return False
        elif torch.float64 in (x.dtype, g.dtype, weight.dtype):
            return False
        x_size, g_size = x.shape[2:], g.shape[2:]
        if self.found.divides and any(n % s for n, s in zip(x_size, spec.theta_stride, strict=True)):
            return False
        theta, phi = spec.theta_grid(x_size, g_size), spec.phi_grid(g_size)
        if min(*x_size, *g_size, *theta, *phi) < 1:
            return False
        return spec.phi_resize != "none" or theta == phi

    def pays(self, gate: nn.Module, x: Tensor) -> bool:
        """Whether the engine is the faster way for maps of this size; takes and why_original say whether it
        is one at all."""
        parts = layers_of(gate, self.paths)
        # Without autocast ours have x's dtype, PyTorch's layers the smaller one.
        products = not _without_autocast(x, parts)
        if not training.left_alone(parts, x, self.recompute, products):
            return True
        return products and training.products_pay(parts, x)

    def maps(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """x and g of a call; None where it isn't made of those two."""
        names = self.found.arguments
        if len(args) == 2 and not kwargs:
            return args if self.found.x_first else args[::-1]
        if len(args) + len(kwargs) != 2 or not all(name in names for name in kwargs):
            return None
        values = dict(zip(names, args, strict=False))
        if any(name in values for name in kwargs):
            return None
        values.update(kwargs)
        first, second = values[names[0]], values[names[1]]
        return (first, second) if self.found.x_first else (second, first)

    def plan(self, gate: nn.Module, x: Any, g: Any) -> str | None:
        """The engine's plan for these maps; None or empty where the original forward is to run."""
        options = self.backend, self.recompute, self.changed(gate), *_modes(gate, self.paths)
        return self.decisions.of(walk(gate), x, g, options, lambda: self._plan(gate, x, g), safe="")

    def _plan(self, gate: nn.Module, x: Any, g: Any) -> str | None:
        if self.why_original(gate) or not self.takes(gate, x, g):
            return None
        if not self.pays(gate, x):
            return ""
        parts = layers_of(gate, self.paths)
        x, g, precision = _in_own_dtype(x, g, parts)
        with precision:
            return engine.decide(self.found.spec, parts, x, g, self.recompute)

    def run(self, gate: nn.Module, plan: str, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """The gate's results by this plan, in the dtypes that its own forward would return them in."""
        spec, parts = self.found.spec, layers_of(gate, self.paths)
        autocast = reference.autocast_dtype(x)
        x, g, precision = _in_own_dtype(x, g, parts)
        with precision:
            y, alpha = engine.run(
                spec, parts, x, g, plan=plan, backend=self.backend, recompute=self.recompute, cache=self.cache
            )
        tell(gate, alpha)
        if self.found.returns != "y":
            alpha = alpha.to(x.dtype if autocast is None else autocast)
        return arrange(spec, self.found.returns, x, y, alpha)


def _without_autocast(x: Tensor, parts: eager.Parts) -> bool:
    """Whether a gate runs in x's dtype in spite of autocast: the product of x and a map in autocast's dtype
    has the wider one of both."""
    autocast = reference.autocast_dtype(x)
    return autocast is not None and parts.W is None and x.dtype != autocast


def _modes(gate: nn.Module, paths: Layers) -> tuple[bool | None, ...]:
    """Whether the norms before the logits are in training mode; None for those that there aren't."""

    norms = (paths.theta_norm, paths.phi_norm, paths.psi_norm)
    # A frozen one has no mode.
    return tuple(path and getattr(find_layer(gate, path), "training", None) for path in norms)


def _in_own_dtype(x: Tensor, g: Tensor, parts: eager.Parts) -> tuple[Tensor, Tensor, AbstractContextManager]:
    """The maps as the engine takes them, and what it runs under: no autocast, where that has no say."""
    if not _without_autocast(x, parts):
        return x, g, nullcontext()
    x = x.to(torch.promote_types(x.dtype, reference.autocast_dtype(x)))
    return x, g.to(x.dtype), torch.autocast(x.device.type, enabled=False)


def patch(gate: nn.Module, state: FusedGate, cls: type) -> None:
    """Gives the gate its class, `fused_class` of its own, and its state."""
    gate.__dict__[STATE] = state
    gate.__class__ = cls


def unpatch(gate: nn.Module) -> None:
    """Undoes `patch`. A class that others made of ours (FSDP2) stays, with the original forward's results."""
    gate.__dict__.pop(STATE, None)
    if type(gate) is _classes.get(type(gate).__mro__[1]):
        gate.__class__ = type(gate).__mro__[1]


def state_of(module: nn.Module) -> FusedGate | None:
    """What `patch` gave to the module; None for all others."""
    return module.__dict__.get(STATE)


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Path and layer of everything below a gate, but what is below its convolutions and norms."""
    for name, child in module._modules.items():
        if child is not None:
            path = prefix + name
            yield path, child
            if child._modules and not isinstance(child, nn.modules.conv._ConvNd) and not norm_kind(child):
                yield from walk(child, path + ".")


def layers_of(gate: nn.Module, paths: Layers) -> Layers:
    """The gate's layers as they are now."""
    return Layers(*[None if path is None else find_layer(gate, path) for path in paths])


def seen_in(gate: nn.Module) -> tuple[tuple[str, type, Settings], ...]:
    """What `FusedGate.layers` says of a gate."""
    layers = [("", gate), *walk(gate)]
    return tuple((path, type(layer), settings_of(layer)) for path, layer in layers)


def _run(gate: nn.Module, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    state = getattr(gate, STATE, None)
    maps = None if state is None else state.maps(args, kwargs)
    plan = "" if maps is None else state.plan(gate, *maps)
    if not plan:
        if state is not None and getattr(gate, LISTENER, None) is not None:
            return _heard(state, gate, original, args, kwargs)
        return original(gate, *args, **kwargs)
    if any(map(_knows_more, maps)):

        def fused_gate(x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
            return state.run(gate, plan, x, g)

        results = handle_torch_function(fused_gate, maps, *maps)
    else:
        results = state.run(gate, plan, *maps)
    return results[0] if len(results) == 1 else tuple(results)


def _knows_more(t: Tensor) -> bool:
    """Whether the tensor's class has to see the operation and wrap its results, as MONAI's MetaTensor."""
    return type(t) is not Tensor and type(t).__torch_function__ is not torch._C._disabled_torch_function_impl


def fused_class(cls: type) -> type:
    """The class of fused gates of class `cls`, one for all of them; itself if it is one already.

    Raises:
        Unreadable: the class doesn't let others inherit from it so.
    """
    if _fused_base(cls):
        return cls
    if cls not in _classes:
        names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        members = {**names, "forward": _fused_forward(cls.forward), "__reduce_ex__": _reduce, STATE: None}
        members["__setstate__"] = _set_state
        try:
            _classes[cls] = types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update(members))
        except Exception as error:  # __init_subclass__ that wants arguments, say
            raise Unreadable(f"its class can't be inherited from: {type(error).__name__}: {error}") from None
    return _classes[cls]


def _fused_forward(original: Callable) -> Callable:
    """A forward in front of `original`. TorchScript, which compiles source code, finds that of `original`:
    by __wrapped__, and with the globals that its names are looked up in."""
    run = _run

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, original, args, kwargs)

    forward = types.FunctionType(
        forward.__code__, original.__globals__, original.__name__, None, forward.__closure__
    )
    return functools.update_wrapper(forward, original)


def _fused_base(cls: type) -> type | None:
    """The class of ours that it is or inherits from."""
    return next((base for base in cls.__mro__ if base in _classes.values()), None)


def _reduce(self: nn.Module, protocol: int) -> tuple:
    """As the original class's, with `_rebuild` in place of a class that no import finds."""
    fused = _fused_base(type(self))
    function, args, *rest = super(fused, self).__reduce_ex__(protocol)
    if function is copyreg.__newobj__ and args[0] is fused:
        function, args = _rebuild, (fused.__mro__[1], *args[1:])
    if rest and isinstance(rest[0], dict) and isinstance(known := rest[0].get(STATE), FusedGate):
        rest[0] = {**rest[0], STATE: known.to_copy(self)}
    return (function, args, *rest)


def _set_state(self: nn.Module, state: Any) -> None:
    """As the original class's; its layers are there by now."""
    super(_fused_base(type(self)), self).__setstate__(state)
    if (known := self.__dict__.get(STATE)) is not None:
        known.see(self)


def _rebuild(cls: type, *args: Any) -> nn.Module:
    fused = fused_class(cls)
    return fused.__new__(fused, *args)


def _as_seen(now: type, seen: type, dims: int) -> bool:
    if issubclass(seen, nn.modules.conv._ConvNd):
        return now is engine.CONVOLUTIONS[dims]  # a parametrised or quantised one is another class
    return now is seen or (issubclass(now, _BatchNorm) and issubclass(seen, _BatchNorm))


def _remark(layer: nn.Module) -> str:
    return " (parametrised)" if torch.nn.utils.parametrize.is_parametrized(layer) else ""


def _heard(state: FusedGate, gate: nn.Module, original: Callable, args: tuple, kwargs: dict) -> Any:
    """The original forward's results; the listener hears of the map that it makes."""

    def hear(layer: nn.Module, inputs: Any, logits: Tensor) -> None:
        tell(gate, eager.normalise(logits, state.found.spec.normaliser))

    logits = find_layer(gate, state.paths.psi_norm or state.paths.psi)
    if logits is None:
        return original(gate, *args, **kwargs)
    handle = logits.register_forward_hook(hear)
    try:
        return original(gate, *args, **kwargs)
    finally:
        handle.remove()
