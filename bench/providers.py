"""Who is measured: each provider makes, of a case and a mode, a program that does the work in its own way."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_gate import AttentionGate

from .case import Case, gradients
from .gates import PRESETS
from .registry import MODES


@dataclass(frozen=True)
class Program:
    """Something to time.

    Attributes:
        call: the work; what it returns is dropped inside the time, as a network drops its activations.
        results: does the work and returns tensors by name (see `case.run`); None: nothing to check.
        reset: called before each call, outside the time.
        forward: the forward pass with gradients, whose kept tensors are counted; None: it has none.
        held: tensors that a network holds anyway: x, g and the parameters.
        counts_peak: whether its memory is worth counting, and comes from PyTorch's allocator.
    """

    call: Callable[[], Any]
    results: Callable[[], dict[str, Tensor]] | None = None
    reset: Callable[[], None] = lambda: None
    forward: Callable[[], Any] | None = None
    held: Iterable[Tensor] = ()
    counts_peak: bool = True


@dataclass(frozen=True)
class Provider:
    """One way to compute a gate.

    Attributes:
        name: for the command line; title: for tables, two short lines.
        make: (case, mode) -> program.
        modes: those that it has.
        default: whether it runs when nobody asks for it by name.
        packages: what has to be installed.
    """

    name: str
    title: str
    make: Callable[[Case, str], Program]
    modes: tuple[str, ...] = tuple(MODES)
    default: bool = True
    packages: tuple[str, ...] = ()

    def why_not(self) -> str:
        """What is missing here; empty if nothing."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"pip install {' '.join(missing)}" if missing else ""


def module_program(case: Case, mode: str, gate: nn.Module, channels_last: bool = False) -> Program:
    """A gate that is a PyTorch module (x, g) -> y, with the parameters of the case's eager one."""
    layout = torch.contiguous_format
    if channels_last:
        layout = torch.channels_last if case.x.ndim == 4 else torch.channels_last_3d
        gate = gate.to(memory_format=layout)
    x, g, dy = (t.contiguous(memory_format=layout) for t in (case.x, case.g, case.dy))
    if mode == "inference":

        def infer() -> Tensor:
            with torch.no_grad():
                return gate(x, g)

        return Program(infer, results=lambda: {"y": infer()})

    x, g = (t.detach().requires_grad_() for t in (x, g))
    leaves = [x, g, *gate.parameters()]

    def reset() -> None:
        for leaf in leaves:
            leaf.grad = None

    def results() -> dict[str, Tensor]:
        reset()
        y = gate(x, g)
        y.backward(dy)
        # torch.compile wraps the module, whose parameters then go by longer names.
        return {"y": y.detach(), **gradients(getattr(gate, "_orig_mod", gate), x, g)}

    return Program(
        lambda: gate(x, g).backward(dy), results, reset, forward=lambda: gate(x, g), held=[*leaves, dy]
    )


def _eager(case: Case, mode: str, **options: Any) -> Program:
    return module_program(case, mode, copy.deepcopy(case.gate), **options)


def _compiled(case: Case, mode: str) -> Program:
    # dynamic=False: one graph for exactly this size, which is the best that torch.compile can do.
    return module_program(case, mode, torch.compile(copy.deepcopy(case.gate), dynamic=False))


def _attn_gate(case: Case, mode: str, *, recompute: str | bool = "auto", **options: Any) -> Program:
    config = case.config
    preset = {"spatial_dims": len(config.size), "recompute": recompute, **PRESETS[config.gate]}
    gate = AttentionGate(config.channels, config.gating, config.inter, **preset)
    gate.load_state_dict(case.gate.state_dict())
    return module_program(case, mode, gate.eval(), **options)


def _onnxruntime(case: Case, mode: str) -> Program:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_onnx(case), options, providers=["CPUExecutionProvider"])
    inputs = {"x": case.x.numpy(), "g": case.g.numpy()}

    def call() -> list:
        return session.run(None, inputs)

    return Program(call, lambda: {"y": torch.from_numpy(call()[0])}, counts_peak=False)


def _openvino(case: Case, mode: str) -> Program:
    import openvino

    core = openvino.Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the CPU has it
    }
    model = core.compile_model(core.read_model(_onnx(case)), "CPU", options)
    inputs = {"x": case.x.numpy(), "g": case.g.numpy()}

    def call() -> Any:
        return model(inputs, share_inputs=True, share_outputs=True)

    return Program(call, lambda: {"y": torch.from_numpy(call()[0].copy())}, counts_peak=False)


@functools.lru_cache(maxsize=1)
def _onnx(case: Case) -> bytes:
    """The case's eager gate, exported."""
    buffer = io.BytesIO()
    names = {"input_names": ["x", "g"], "output_names": ["y"]}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        # The older exporter: the same graph as from the newer one, in a tenth of the time.
        torch.onnx.export(case.gate, (case.x, case.g), buffer, dynamo=False, **names)
    return buffer.getvalue()


def _limit(case: Case, mode: str) -> Program:
    """The memory traffic that no gate can avoid."""
    x, g, dy = case.x, case.g, case.dy
    if mode == "inference":
        return Program(lambda: (g.sum(), x.clone()), counts_peak=False)
    return Program(lambda: (x.sum(), x.clone(), g.clone(), dy.clone()), counts_peak=False)


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("attn_gate", "attn_gate", _attn_gate),
        Provider("attn_gate-channels-last", "attn_gate\nch. last",
                 functools.partial(_attn_gate, channels_last=True)),
        Provider("attn_gate-recompute", "attn_gate\nrecompute", functools.partial(_attn_gate, recompute=True),
                 modes=("step",), default=False),
        Provider("attn_gate-store", "attn_gate\nstore", functools.partial(_attn_gate, recompute=False),
                 modes=("step",), default=False),
        Provider("eager", "eager", _eager),
        Provider("eager-channels-last", "eager\nch. last", functools.partial(_eager, channels_last=True)),
        Provider("compile", "torch\ncompile", _compiled),
        Provider("onnxruntime", "ONNX\nRuntime", _onnxruntime,
                 modes=("inference",), packages=("onnx", "onnxruntime")),
        Provider("openvino", "Open-\nVINO", _openvino,
                 modes=("inference",), packages=("onnx", "openvino")),
        Provider("limit", "memory\nlimit", _limit),
    )
}  # fmt: skip
