"""The machine and the software that a run measured: what its times depend on."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable
from typing import Any

import torch

from attn_gate._version import __version__

from .device import Device

PACKAGES = ("onnxruntime", "openvino", "triton", "monai")


def facts(device: Device) -> dict[str, Any]:
    """Names, versions and settings."""
    return {
        **device.facts(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "attn_gate": __version__,
        **{package: _version(package) for package in PACKAGES},
    }


def rates(device: Device) -> dict[str, float]:
    """Copy bandwidth and peak rate, measured here and now."""
    return {"copy_gbps": round(device.copy_gbps(), 2), "peak_gflops": round(device.peak_gflops(), 1)}


def differences(new: dict[str, Any], old: dict[str, Any], names: Iterable[str]) -> dict[str, list[str]]:
    """{name: [before, now]} of these facts, where they aren't the same."""
    found = {name: [str(facts.get(name, "none")) for facts in (old, new)] for name in names}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def sentence(facts: dict[str, Any]) -> str:
    """The machine in one line."""
    gpu = f"{facts['gpu']}; " if "gpu" in facts else ""
    return (
        f"{gpu}{facts['processor']}, {facts['threads']} of {facts['cores']} threads, "
        f"{facts['instructions']}, copy {facts['copy_gbps']:.0f} GB/s, {facts['peak_gflops']:.0f} GFLOP/s; "
        f"torch {facts['torch']}"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
