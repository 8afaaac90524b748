"""A small made-up set for machines without network: ellipses and blobs, never to be mistaken for patients."""

from __future__ import annotations

import numpy as np

from attn_gate.demo.dicom import Scan

SOURCE = "SYNTHETIC images, drawn by a program: no patient, no network needed"


def synthetic_scans(count: int = 4, slices: int = 40, size: int = 96, seed: int = 0) -> list[Scan]:
    """`count` chests of `slices` x `size` x `size` voxels of 3 x 2 x 2 mm: body, lungs, vessels, a tumour."""
    return [_chest(f"synthetic {n + 1}", slices, size, np.random.default_rng(seed + n)) for n in range(count)]


def _chest(name: str, slices: int, size: int, rng: np.random.Generator) -> Scan:
    z, y, x = np.meshgrid(
        np.linspace(-1, 1, slices), np.linspace(-1, 1, size), np.linspace(-1, 1, size), indexing="ij"
    )
    hu = np.full(z.shape, -1000.0)
    hu[(x / 0.92) ** 2 + (y / 0.72) ** 2 < 1] = 40
    for side in (-1, 1):
        lung = ((x - side * 0.44) / 0.34) ** 2 + (y / 0.5) ** 2 + (z / 1.3) ** 2 < 1
        hu[lung] = -820
        for _ in range(
            14
        ):  # vessels: long along z, so that they look like a tumour in one slice but not in three
            cx, cy = side * 0.44 + rng.uniform(-0.25, 0.25), rng.uniform(-0.4, 0.4)
            tilt = rng.uniform(-0.15, 0.15, 2)
            vessel = (x - cx - tilt[0] * z) ** 2 + (y - cy - tilt[1] * z) ** 2 < rng.uniform(0.012, 0.03) ** 2
            hu[vessel & lung] = 30
    cz, cy = rng.uniform(-0.3, 0.3), rng.uniform(-0.25, 0.25)
    cx = rng.choice([-1, 1]) * rng.uniform(0.36, 0.52)
    radius = rng.uniform(0.14, 0.22)
    angle = np.arctan2(y - cy, x - cx)
    ripple = 1 + 0.15 * np.sin(3 * angle + rng.uniform(0, 6)) + 0.1 * np.cos(5 * angle + rng.uniform(0, 6))
    distance = np.sqrt((x - cx) ** 2 + (y - cy) ** 2 + (0.45 * (z - cz)) ** 2)
    truth = distance < radius * ripple
    hu[truth] = 20
    hu += rng.normal(0, 35, hu.shape)
    return Scan(name, hu.astype(np.float32), truth, (3.0, 2.0, 2.0))
