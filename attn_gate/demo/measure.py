"""Step time and memory, eager and fused, of the gates alone and of the whole network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from attn_gate import AttentionUNet
from attn_gate.demo.train import make_network, segmentation_loss

BACKENDS = {"eager": "eager", "fused": "auto"}
REPEATS = 15


@dataclass(frozen=True)
class Cost:
    """Medians of one forward + backward pass in milliseconds, and bytes kept between the two passes."""

    gates_ms: dict[str, float]
    network_ms: dict[str, float]
    gates_bytes: dict[str, int]
    network_bytes: dict[str, int]

    @property
    def gate_share(self) -> float:
        """The part of the eager network's step that its gates take."""
        return self.gates_ms["eager"] / self.network_ms["eager"]


def measure(image: Tensor, truth: Tensor, on_step: Callable[[], None] = lambda: None) -> Cost:
    """Times and bytes for one batch. `on_step` is called REPEATS times.

    All four programs take turns within each repetition, so that a change in the machine's mood hits them alike.
    """
    image = image.contiguous(memory_format=torch.channels_last)
    networks = {name: make_network(backend) for name, backend in BACKENDS.items()}
    inputs = _gate_inputs(networks["eager"], image)

    def gates_forward(network: AttentionUNet) -> list[Tensor]:
        return [gate(x, g) for gate, (x, g) in zip(network.gates, inputs, strict=True)]

    def gates_step(network: AttentionUNet) -> None:
        torch.autograd.backward(gates_forward(network), slopes)

    def network_step(network: AttentionUNet) -> None:
        segmentation_loss(network(image), truth).backward()

    slopes = [torch.randn_like(x) for x, _ in inputs]
    times: dict[tuple, list[float]] = {}
    for repeat in range(REPEATS + 1):
        for step in (gates_step, network_step):
            for name, network in networks.items():
                network.zero_grad(set_to_none=True)
                for pair in inputs:
                    for t in pair:
                        t.grad = None
                start = time.perf_counter()
                step(network)
                if repeat:  # the first round warms up
                    times.setdefault((step, name), []).append((time.perf_counter() - start) * 1e3)
        if repeat:
            on_step()

    held = [t for pair in inputs for t in pair]
    return Cost(
        gates_ms={name: median(times[gates_step, name]) for name in networks},
        network_ms={name: median(times[network_step, name]) for name in networks},
        gates_bytes={
            name: kept_bytes(lambda n=n: gates_forward(n), [*held, *_state(n)]) for name, n in networks.items()
        },
        network_bytes={
            name: kept_bytes(lambda n=n: segmentation_loss(n(image), truth), [image, truth, *_state(n)])
            for name, n in networks.items()
        },
    )


def kept_bytes(forward: Callable[[], object], held: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, each storage once, without those of `held`."""
    known = {t.untyped_storage().data_ptr() for t in held}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()  # bound, so that nothing kept is freed and its address used again before the count is done
    del result
    return sum(kept.values())


def _state(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _gate_inputs(network: AttentionUNet, image: Tensor) -> list[tuple[Tensor, Tensor]]:
    """x and g of every gate, as the network feeds them, as leaves that ask for a gradient."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    hooks = [
        gate.register_forward_pre_hook(
            lambda gate, args: seen.__setitem__(gate, tuple(t.detach().clone().requires_grad_() for t in args[:2]))
        )
        for gate in network.gates
    ]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return [seen[gate] for gate in network.gates]
