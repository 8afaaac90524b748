"""From scans to training batches: 2 mm pixels, three-slice inputs, held-out slabs, flips and shifts.

A network input is a slice with its two neighbours as channels ("2.5D"). Of every patient the first, fifth,
ninth, ... slab of five slices is held out. The slice on either side of it is a guard, neither trained on nor
scored: no held-out slice is part of a training input, and no training slice is part of a held-out input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from attn_gate.demo.dicom import Scan

PIXEL_MM = 2.0
SIZE = 104
SLAB = 5
EVERY = 4
GUARD = 1
HU_WINDOW = (-1000.0, 400.0)
MAX_SHIFT = 8


@dataclass(frozen=True)
class Slices:
    """Network inputs and the experts' answers, as float32.

    Attributes:
        image: [n,3,SIZE,SIZE] in -1..1; truth: [n,1,SIZE,SIZE] in {0, 1}.
        patient: [n] index of the scan; z: [n] index of the slice in it.
    """

    image: torch.Tensor
    truth: torch.Tensor
    patient: np.ndarray
    z: np.ndarray

    def __len__(self) -> int:
        return len(self.z)


def split(slices: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a scan's training slices and of its held-out slices.

    >>> split(12)
    (array([ 6,  7,  8,  9, 10, 11]), array([0, 1, 2, 3, 4]))
    """
    z = np.arange(slices)
    held_out = z // SLAB % EVERY == 0
    near = np.abs(z[:, None] - z[held_out]).min(axis=1) <= GUARD
    return z[~near], z[held_out]


def prepare(scans: list[Scan]) -> tuple[Slices, Slices]:
    """All training slices and all held-out slices of `scans`, resampled and centred in SIZE x SIZE pixels."""
    parts: tuple[list, list] = ([], [])
    for patient, scan in enumerate(scans):
        image, truth = _resample(scan)
        # Before the first and after the last slice, the slice itself stands in for the missing neighbour.
        padded = torch.cat([image[:1], image, image[-1:]])
        stacked = torch.stack([padded[:-2], padded[1:-1], padded[2:]], dim=1)
        for part, z in zip(parts, split(len(image)), strict=True):
            part.append((stacked[z], truth[z, None], np.full(len(z), patient), z))
    return tuple(_join(part) for part in parts)


def _join(parts: list) -> Slices:
    image, truth, patient, z = zip(*parts, strict=True)
    return Slices(torch.cat(image), torch.cat(truth), np.concatenate(patient), np.concatenate(z))


def _resample(scan: Scan) -> tuple[torch.Tensor, torch.Tensor]:
    """Image in -1..1 and truth in {0, 1}, both float32 [Z,SIZE,SIZE] of 2 mm pixels; z stays as it is."""
    low, high = HU_WINDOW
    image = torch.from_numpy(scan.hu).clamp(low, high).sub(low).mul(2 / (high - low)).sub(1)
    truth = torch.from_numpy(scan.truth).float()
    size = [round(n * mm / PIXEL_MM) for n, mm in zip(image.shape[1:], scan.spacing[1:], strict=True)]
    both = F.interpolate(torch.stack([image, truth], dim=1), size=size, mode="bilinear", antialias=True)
    return _centre(both[:, 0], fill=-1.0), _centre((both[:, 1] > 0.5).float(), fill=0.0)


def _centre(volume: torch.Tensor, fill: float) -> torch.Tensor:
    """[Z,Y,X] -> [Z,SIZE,SIZE], cropped or filled alike on both sides (F.pad crops by negative widths)."""
    widths = []
    for n in (volume.shape[2], volume.shape[1]):
        before = (SIZE - n) // 2
        widths += [before, SIZE - n - before]
    return F.pad(volume, widths, value=fill)


class Batches:
    """The batch of every step, a function of (seed, step) alone, so that all runs see the same ones.

    The first half of a batch shows tumours, the patients taking turns so that a small tumour counts as much
    as a large one; the second half is drawn from all slices. Each slice is mirrored or not and shifted by up
    to MAX_SHIFT pixels.
    """

    def __init__(self, data: Slices, size: int, seed: int = 0) -> None:
        self.data, self.size, self.seed = data, size, seed
        shows_tumour = data.truth.flatten(1).any(1).numpy()
        pools = [np.flatnonzero(shows_tumour & (data.patient == p)) for p in np.unique(data.patient)]
        self._pools = [pool for pool in pools if len(pool)]

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image [size,3,SIZE,SIZE] and truth [size,1,SIZE,SIZE] of this step."""
        rng = np.random.default_rng((self.seed, step))
        half = self.size // 2
        chosen = [rng.choice(self._pools[(step * half + k) % len(self._pools)]) for k in range(half)]
        chosen += list(rng.integers(len(self.data), size=self.size - half))
        images, truths = [], []
        for i in chosen:
            dy, dx = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, 2)
            mirrored = rng.random() < 0.5
            images.append(_move(self.data.image[i], mirrored, dy, dx, fill=-1.0))
            truths.append(_move(self.data.truth[i], mirrored, dy, dx, fill=0.0))
        return torch.stack(images), torch.stack(truths)


def _move(image: torch.Tensor, mirrored: bool, dy: int, dx: int, fill: float) -> torch.Tensor:
    image = image.flip(-1) if mirrored else image
    return F.pad(image, (dx, -dx, dy, -dy), value=fill)
