"""Who is measured: each provider makes, of a case, a program that does the work in its own way."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attn_gate import backends, keep_memory
from attn_gate.judge import Judgement

from . import engines
from .case import gradients
from .registry import KINDS, MODES, AnyConfig

TRAINING = ("forward", "backward", "step")


class AnyCase(Protocol):
    """What providers ask of a case: `case.Case`, a gate, or `networks.NetworkCase`."""

    config: AnyConfig
    dtype: str
    device: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    slope: Tensor
    wants_input_gradients: bool

    def fused(self, **options: object) -> nn.Module: ...
    def settle(self) -> None: ...
    def check(self, training: bool, results: Mapping[str, Tensor]) -> Judgement: ...


@dataclass(frozen=True)
class Work:
    """One thing to time: `prepare` comes before each call, `leave` after each turn, outside the time."""

    call: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    leave: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Program:
    """What a provider makes of a case, for inference or for training.

    Attributes:
        works: by mode.
        results: does the work and returns tensors by name (see `case.results_of`); None: nothing to check.
        forward: the forward pass with gradients, whose kept tensors are counted; None: it has none.
        held: tensors that a network holds anyway: x, g and the parameters.
        counts_peak: whether its memory is worth counting, and comes from PyTorch's allocator.
        own_threads: whether it has worker threads that aren't PyTorch's, and may spin after their work.
    """

    works: Mapping[str, Work]
    results: Callable[[], dict[str, Tensor]] | None = None
    forward: Callable[[], Any] | None = None
    held: Iterable[Tensor] = ()
    counts_peak: bool = True
    own_threads: bool = False


@dataclass(frozen=True)
class Provider:
    """One way to compute a gate or a network.

    Attributes:
        name: for the command line; title: for tables and plots.
        make: (case, training) -> program.
        modes, devices, dtypes, kinds: those that it has; kinds are those of configs.
        packages: what has to be installed.
        backend: of attn_gate, if it is about one.
    """

    name: str
    title: str
    make: Callable[[AnyCase, bool], Program]
    modes: tuple[str, ...] = tuple(MODES)
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    kinds: tuple[str, ...] = KINDS
    packages: tuple[str, ...] = ()
    backend: str = ""

    def has(self, config: AnyConfig, mode: str) -> bool:
        """Whether there is anything to measure."""
        return mode in self.modes and config.kind in self.kinds

    def why_not(self, device: str, dtype: str) -> str:
        """What is missing here; empty if nothing."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"pip install {' '.join(missing)}"
        if device not in self.devices:
            return f"not measured on {device}"
        if dtype not in self.dtypes:
            return f"not measured in {dtype}"
        if not self.backend:
            return ""
        return backends.BACKENDS[self.backend].why_not(torch.device(device), getattr(torch, dtype))


def module_program(
    case: AnyCase, training: bool, module: nn.Module, *, channels_last: bool = False
) -> Program:
    """A PyTorch module with the parameters of the case's eager one."""
    module.train(training)
    layout = torch.contiguous_format
    if channels_last:
        layout = torch.channels_last if case.slope.ndim == 4 else torch.channels_last_3d
        module = module.to(memory_format=layout)
    inputs = [t.contiguous(memory_format=layout) for t in case.inputs]
    slope = case.slope.contiguous(memory_format=layout)
    if not training:

        def infer() -> Tensor:
            with torch.no_grad():
                return module(*inputs)

        return Program({"inference": Work(infer)}, results=lambda: {"y": infer()})

    inputs = [t.detach().requires_grad_(case.wants_input_gradients) for t in inputs]
    leaves = [*inputs, *module.parameters()]
    made: list[Tensor] = []

    def clear() -> None:
        made.clear()
        for leaf in leaves:
            leaf.grad = None

    def forward() -> Tensor:
        return module(*inputs)

    def prepare_backward() -> None:
        clear()
        made.append(forward())

    def results() -> dict[str, Tensor]:
        clear()
        y = forward()
        y.backward(slope)
        # torch.compile wraps the module, whose parameters then go by longer names.
        found = gradients(getattr(module, "_orig_mod", module), inputs, case.input_names)
        return {"y": y.detach(), **found}

    works = {
        "forward": Work(forward, clear),
        "backward": Work(lambda: made[0].backward(slope), prepare_backward),
        "step": Work(lambda: forward().backward(slope), clear),
    }
    return Program(works, results, forward, held=[*leaves, *module.buffers(), slope])


def _eager(case: AnyCase, training: bool, **options: Any) -> Program:
    return module_program(case, training, copy.deepcopy(case.module), **options)


def _compiled(case: AnyCase, training: bool, mode: str | None = None) -> Program:
    # dynamic=False: one graph for exactly this size, which is the best that torch.compile can do.
    module = torch.compile(copy.deepcopy(case.module), dynamic=False, mode=mode)
    return module_program(case, training, module)


def _attn_gate(
    case: AnyCase, training: bool, *, compiled: bool = False, channels_last: bool = False, **options: Any
) -> Program:
    module = case.fused(**options)
    if compiled:
        module = torch.compile(module, dynamic=False)
    return module_program(case, training, module, channels_last=channels_last)


def _unkept(case: AnyCase, training: bool) -> Program:
    """attn_gate without the memory that it keeps: its results come from PyTorch's allocator, like eager's."""
    program = _attn_gate(case, training)
    works = {mode: _without_kept_memory(work) for mode, work in program.works.items()}
    return dataclasses.replace(program, works=works, counts_peak=False)


def _without_kept_memory(work: Work) -> Work:
    before: list[int] = []

    def prepare() -> None:
        before.append(keep_memory(0))
        work.prepare()

    def call() -> Any:
        try:
            return work.call()
        finally:
            keep_memory(before.pop())

    def leave() -> None:
        """Fill what is kept again, which others of attn_gate's would find empty."""
        work.prepare()
        work.call()
        work.prepare()

    return Work(call, prepare, leave)


def _limit(case: AnyCase, training: bool) -> Program:
    """The memory traffic that no gate can avoid, between buffers made once: fresh pages would cost more."""
    x, g = case.inputs
    dy = case.slope
    y, dx, dg = (torch.empty_like(t) for t in (x, x, g))

    def forward() -> None:
        _read(g)
        y.copy_(x)

    def backward() -> None:
        _read(x)
        dg.copy_(g)
        dx.copy_(dy)

    def step() -> None:
        forward()
        backward()

    calls = {"forward": forward, "backward": backward, "step": step} if training else {"inference": forward}
    return Program({mode: Work(call) for mode, call in calls.items()}, counts_peak=False)


def _read(t: Tensor) -> Tensor:
    return t.view(-1).view(torch.float32).sum()  # whatever the dtype: sums of float32 are fast


def _engine(make: Callable[[AnyCase], engines.Engine], case: AnyCase, training: bool) -> Program:
    run = make(case)
    return Program(
        {"inference": Work(run)},
        lambda: {"y": torch.from_numpy(run().copy())},
        counts_peak=False,
        own_threads=True,
    )


# PyTorch itself, without anything else installed.
PYTORCH = ("eager", "eager-channels-last", "compile", "compile-max-autotune")

_CPU = {"devices": ("cpu",), "dtypes": ("float32",), "modes": ("inference",)}

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("attn_gate", "attn_gate", _attn_gate),
        *(
            Provider(f"attn_gate-{backend}", f"attn_gate {backend}", partial(_attn_gate, backend=backend),
                     backend=backend)
            for backend, _, _ in backends.report() if backend != "eager"
        ),
        Provider("attn_gate-channels-last", "attn_gate ch. last", partial(_attn_gate, channels_last=True)),
        Provider("attn_gate-compile", "attn_gate compiled", partial(_attn_gate, compiled=True)),
        Provider("attn_gate-unkept", "attn_gate, none kept", _unkept, devices=("cpu",)),
        Provider("attn_gate-recompute", "attn_gate recompute", partial(_attn_gate, recompute=True),
                 modes=TRAINING),
        Provider("attn_gate-store", "attn_gate store", partial(_attn_gate, recompute=False), modes=TRAINING),
        Provider("eager", "eager", _eager),
        Provider("eager-channels-last", "eager ch. last", partial(_eager, channels_last=True)),
        Provider("compile", "torch.compile", _compiled),
        Provider("compile-max-autotune", "torch.compile max-autotune",
                 partial(_compiled, mode="max-autotune"), devices=("cuda",)),
        Provider("onnxruntime", "ONNX Runtime", partial(_engine, engines.onnxruntime),
                 packages=("onnx", "onnxruntime"), **_CPU),
        Provider("openvino", "OpenVINO", partial(_engine, engines.openvino),
                 packages=("onnx", "openvino"), **_CPU),
        Provider("limit", "memory limit", _limit, kinds=("gate", "sweep")),
    )
}  # fmt: skip
