"""Step time and memory, eager and fused, of the gates alone and of the whole network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from attn_gate import AttentionUNet
from attn_gate.bench.memory import kept_bytes
from attn_gate.demo.train import make_network, segmentation_loss

BACKENDS = {"eager": "eager", "fused": "auto"}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
REPEATS = 15


@dataclass(frozen=True)
class Cost:
    """What one training step of a program ("eager" | "fused") costs.

    Attributes:
        gates_ms, network_ms: {layout: {program: median milliseconds of forward + backward}}, of all gates
            alone and of the whole network.
        gates_bytes, network_bytes: {program: bytes kept between the two}, the same in both layouts.
    """

    gates_ms: dict[str, dict[str, float]]
    network_ms: dict[str, dict[str, float]]
    gates_bytes: dict[str, int]
    network_bytes: dict[str, int]

    def gate_share(self, layout: str) -> float:
        """The part of the eager network's step that its gates take."""
        return self.gates_ms[layout]["eager"] / self.network_ms[layout]["eager"]


def measure(image: Tensor, truth: Tensor, on_step: Callable[[], None] = lambda: None) -> Cost:
    """Times and bytes for one batch; `on_step` is called REPEATS times.

    All programs take turns within each round, so that a change in the machine's mood hits them alike.
    """
    programs = {
        (layout, name): _Program(backend, memory_format, image, truth)
        for layout, memory_format in LAYOUTS.items()
        for name, backend in BACKENDS.items()
    }
    gates_ms = {key: [] for key in programs}
    network_ms = {key: [] for key in programs}
    for repeat in range(REPEATS + 1):
        for key, program in programs.items():
            times = program.gates_step(), program.network_step()
            if repeat:  # the first round warms up
                gates_ms[key].append(times[0])
                network_ms[key].append(times[1])
        if repeat:
            on_step()
    return Cost(
        gates_ms=_medians(gates_ms),
        network_ms=_medians(network_ms),
        gates_bytes={name: programs["contiguous", name].gates_bytes() for name in BACKENDS},
        network_bytes={name: programs["contiguous", name].network_bytes() for name in BACKENDS},
    )


def _medians(times: dict[tuple[str, str], list[float]]) -> dict[str, dict[str, float]]:
    return {layout: {name: median(times[layout, name]) for name in BACKENDS} for layout in LAYOUTS}


class _Program:
    """A network in one layout on one backend, with a batch for it and with inputs for each of its gates."""

    def __init__(self, backend: str, layout: torch.memory_format, image: Tensor, truth: Tensor) -> None:
        self.network = make_network(backend, layout)
        self.image, self.truth = image.contiguous(memory_format=layout), truth
        self.inputs = _gate_inputs(self.network, self.image)
        self.slopes = [torch.randn_like(x) for x, _ in self.inputs]

    def gates_step(self) -> float:
        """Milliseconds of forward + backward of all gates."""
        for leaf in (t for pair in self.inputs for t in pair):
            leaf.grad = None
        return self._timed(lambda: torch.autograd.backward(self._gates(), self.slopes))

    def network_step(self) -> float:
        """Milliseconds of forward + backward of the network and its loss."""
        return self._timed(lambda: self._loss().backward())

    def gates_bytes(self) -> int:
        """Bytes that the gates keep beyond their x and g."""
        return kept_bytes(self._gates, [*(t for pair in self.inputs for t in pair), *self._state()])

    def network_bytes(self) -> int:
        """Bytes that the network and its loss keep beyond the batch."""
        return kept_bytes(self._loss, [self.image, self.truth, *self._state()])

    def _gates(self) -> list[Tensor]:
        return [gate(x, g) for gate, (x, g) in zip(self.network.gates, self.inputs, strict=True)]

    def _loss(self) -> Tensor:
        return segmentation_loss(self.network(self.image), self.truth)

    def _state(self) -> list[Tensor]:
        return [*self.network.parameters(), *self.network.buffers()]

    def _timed(self, step: Callable[[], None]) -> float:
        self.network.zero_grad(set_to_none=True)
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3


def _gate_inputs(network: AttentionUNet, image: Tensor) -> list[tuple[Tensor, Tensor]]:
    """x and g of every gate, as the network feeds them, as leaves that ask for a gradient."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    hooks = [
        gate.register_forward_pre_hook(
            lambda gate, args: seen.__setitem__(
                gate, tuple(t.detach().clone().requires_grad_() for t in args[:2])
            )
        )
        for gate in network.gates
    ]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return [seen[gate] for gate in network.gates]
