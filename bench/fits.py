"""The largest batch that fits in a given memory: found by running ever larger ones, not by a formula."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

from .device import Device
from .providers import PROVIDERS
from .registry import Config

_LARGEST = 4096


def largest_batch(
    make_case: Any, config: Config, dtype: str, provider: str, device: Device, limit: int
) -> dict[str, Any]:
    """How many samples a training step takes within `limit` bytes of tensors, inputs and parameters included.

    A step at batch n is run and its memory counted; a guess by proportion is corrected until n fits and n + 1
    doesn't. The result: {"batch": n (0: not even one), "bytes": at n, "more_bytes": at n + 1}.
    """
    counted: dict[int, int] = {}

    def needs(n: int) -> int:
        if n not in counted:
            counted[n] = _bytes(make_case, dataclasses.replace(config, batch=n), dtype, provider, device)
        return counted[n]

    low, high = 0, None  # low fits, high doesn't
    guess = max(1, limit // max(needs(1), 1))
    while low < _LARGEST and (high is None or high - low > 1):
        guess = min(max(guess, low + 1), _LARGEST if high is None else high - 1)
        if needs(guess) <= limit:
            low = guess
        else:
            high = guess
        last = max(counted)
        per_sample = (counted[last] - counted[1]) / (last - 1) if last > 1 else counted[1]
        guess = int(1 + (limit - counted[1]) / per_sample) if per_sample else low + 1
    names = {"config": config.name, "dtype": dtype, "provider": provider, "limit_bytes": limit}
    return {**names, "batch": low, "bytes": counted.get(low), "more_bytes": counted.get(low + 1)}


def _bytes(make_case: Any, config: Config, dtype: str, provider: str, device: Device) -> int:
    case = make_case(config, dtype, device.name)
    program = PROVIDERS[provider].make(case, True)
    work = program.works["step"]
    work.prepare()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in program.held}
    total = sum(held.values()) + device.peak_bytes(work.call)
    del case, program, work
    gc.collect()
    return total
