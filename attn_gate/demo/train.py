"""The training recipe and one run of it. Eager and fused runs differ by the gates' backend alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from attn_gate import AttentionUNet
from attn_gate.demo.dataset import Batches, Slices
from attn_gate.demo.errors import DemoError

CHANNELS = (16, 32, 64, 128)
# Gates without norms of their own: fused as a whole in training too, and the finest one learns to light up on
# the tumour, where with batch norms it is as likely to go dark there. The network keeps its own batch norms.
GATE_OPTIONS = {"theta_norm": "none", "phi_norm": "none", "psi_norm": "none"}
BATCH = 8
LEARNING_RATE = 2e-3
LAST_LEARNING_RATE = 1e-4
AVERAGE_DECAY = 0.98
SEED = 0
LAYOUT = torch.channels_last  # the faster one for eager convolutions of this size on a CPU


@dataclass
class Run:
    """What one training run leaves behind, filled step by step: an interrupted run is a shorter one."""

    name: str
    backend: str
    threads: int
    loss: list[float] = field(default_factory=list)
    dice: dict[int, Dice] = field(default_factory=dict)  # by the number of steps taken
    views: dict[int, View] = field(default_factory=dict)  # likewise


@dataclass(frozen=True)
class Dice:
    """Dice on the held-out slices: all of them `pooled`, and of each patient (nan: no tumour there)."""

    pooled: float
    patients: tuple[float, ...]


@dataclass(frozen=True)
class View:
    """What the network makes of the shown slices: `probability` [n,H,W] and each gate's `maps` [n,h,w]."""

    probability: np.ndarray
    maps: dict[str, np.ndarray]


def make_network(backend: str, layout: torch.memory_format = LAYOUT) -> AttentionUNet:
    """A new network in training mode: the same initial weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = AttentionUNet(
            2, 3, 1, CHANNELS, gate="same_grid", gate_options=GATE_OPTIONS, backend=backend
        )
    return network.to(memory_format=layout)


def segmentation_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross entropy + (1 - Dice of each image, averaged); an empty answer is right without tumour."""
    p = torch.sigmoid(logits)
    overlap, total = (p * truth).sum((1, 2, 3)), (p + truth).sum((1, 2, 3))
    dice = (2 * overlap + 1) / (total + 1)
    return F.binary_cross_entropy_with_logits(logits, truth) + 1 - dice.mean()


def differentiate(network: AttentionUNet, image: Tensor, truth: Tensor) -> float:
    """One forward and backward pass: the loss; fresh gradients are left in the parameters."""
    network.zero_grad(set_to_none=True)
    loss = segmentation_loss(network(image), truth)
    loss.backward()
    return loss.item()


def train(
    run: Run,
    steps: int,
    batches: Batches,
    held_out: Slices,
    *,
    shown: np.ndarray,
    on_step: Callable[[], None] = lambda: None,
    differentiate: Callable[[AttentionUNet, Tensor, Tensor], float] = differentiate,
) -> None:
    """Trains a new network for `steps` steps and fills `run`.

    Adam, learning rate on a cosine from LEARNING_RATE to LAST_LEARNING_RATE; what is scored and shown is the
    running average of the weights.

    Args:
        run: name, backend and number of threads; its lists are appended to.
        batches: called with the step.
        held_out: slices to score; `shown` indexes those whose attention maps are kept.
        on_step: called after every step.
        differentiate: as the function of this name; a comparison may do more than it.

    Raises:
        DemoError: the loss isn't finite.
    """
    network = make_network(run.backend)
    average = AveragedModel(network, avg_fn=_running_average, use_buffers=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=LAST_LEARNING_RATE)
    scored, viewed = moments(steps, 10), view_moments(steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(run.threads)
    try:
        for step in range(steps + 1):
            if step in scored:
                run.dice[step] = score(average, held_out)
            if step in viewed:
                run.views[step] = view(average, held_out.image[shown])
            if step == steps:
                break
            image, truth = batches(step)
            loss = differentiate(network, image.contiguous(memory_format=LAYOUT), truth)
            if not math.isfinite(loss):
                raise DemoError(f"{run.name}: the loss is {loss} at step {step}")
            optimizer.step()
            schedule.step()
            average.update_parameters(network)
            run.loss.append(loss)
            on_step()
    finally:
        torch.set_num_threads(threads)


def moments(steps: int, count: int) -> set[int]:
    """`count` evenly spaced numbers of steps, the last one being `steps`."""
    return {round(steps * k / count) for k in range(1, count + 1)}


def view_moments(steps: int) -> list[int]:
    """When attention maps are kept: the start, then closer together where the network learns fastest."""
    return sorted({0, *(max(1, round(steps * share)) for share in (0.08, 0.2, 0.45, 1.0))})


def _running_average(average: Tensor, current: Tensor, count: Tensor) -> Tensor:
    # Short memory at first: the earliest weights are far from good ones.
    decay = min(AVERAGE_DECAY, (1 + int(count)) / (10 + int(count)))
    return average * decay + current * (1 - decay)


@torch.no_grad()
def score(network: torch.nn.Module, data: Slices) -> Dice:
    """Dice of network(image) > 0 against the experts' contours."""
    network.eval()
    guess = torch.cat([network(image) > 0 for image in _chunks(data.image)]).flatten(1)
    network.train()
    truth = data.truth.flatten(1) > 0
    overlap = (guess & truth).sum(1).numpy()
    total = (guess.sum(1) + truth.sum(1)).numpy()
    patients = []
    for p in np.unique(data.patient):
        mine = data.patient == p
        patients.append(2 * overlap[mine].sum() / total[mine].sum() if truth[mine].any() else math.nan)
    return Dice(float(2 * overlap.sum() / max(total.sum(), 1)), tuple(float(d) for d in patients))


@torch.no_grad()
def view(network: torch.nn.Module, image: Tensor) -> View:
    """Probabilities and attention maps of a few slices."""
    network.eval()
    logits, maps = network(image.contiguous(memory_format=LAYOUT), return_attention=True)
    network.train()
    return View(
        torch.sigmoid(logits[:, 0]).numpy(), {name: alpha[:, 0].numpy() for name, alpha in maps.items()}
    )


def _chunks(image: Tensor) -> tuple[Tensor, ...]:
    return image.contiguous(memory_format=LAYOUT).split(BATCH)
