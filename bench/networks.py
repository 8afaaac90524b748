"""Cases by kind of config."""

from __future__ import annotations

from .case import Case
from .registry import AnyConfig


def make_case(config: AnyConfig, dtype: str, device: str) -> Case:
    return Case(config, dtype, device)
