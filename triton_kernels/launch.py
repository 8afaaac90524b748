"""How kernels are launched: on which device, with which block sizes, in which precision.

Block sizes come from a short list for each kind of kernel. On a GPU the first call of a class of shapes times
the list and keeps the best, in this process and in Triton's cache on disk; batch and grid are no part of the
class, so new sizes cost nothing. Everywhere else the first of the list runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources, PTXASError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Blocks:
    """Block sizes of one launch.

    Attributes:
        voxels: coarse voxels of a tile (BT).
        elements: of a [channels, voxels] tile in registers where nothing is multiplied as a matrix.
        depth, inter: channels, and inner channels, that a matrix product takes at a time (BK, BI).
        warps, stages: Triton's num_warps and num_stages.
        programs: at least so many fit a multiprocessor of NVIDIA's at once, by their registers.
    """

    voxels: int
    elements: int = 2048
    depth: int = 32
    inter: int = 128
    warps: int = 4
    stages: int = 2
    programs: int = 2


# The first of each list runs where nothing is timed. bench/triton_resources.csv says what each takes of a
# GPU: none spills registers.
CHAIN = (
    Blocks(256),
    Blocks(128),
    Blocks(512, 4096, warps=8),
    Blocks(256, 4096, warps=8),
)
_WHOLE = (
    Blocks(128, warps=8, programs=1),
    Blocks(64),
    Blocks(64, depth=64, warps=8, programs=1),
)
_WHOLE_BACKWARD = (
    Blocks(64, depth=16, warps=8, programs=1),
    Blocks(32, depth=16),
    Blocks(32, warps=8, programs=1),
)
# Of float32 by three products each operand takes twice the registers; so do offsets of 64 bits.
_WHOLE_FLOAT32 = (
    Blocks(64, depth=16, inter=64, warps=8, programs=1),
    Blocks(32, depth=16, inter=64, warps=8, programs=1),
)
_WHOLE_BACKWARD_FLOAT32 = (
    Blocks(64, depth=16, inter=32, warps=8, programs=1),
    Blocks(32, depth=16, inter=64, warps=8, programs=1),
)


def whole(t: Tensor, wide: bool = False) -> tuple[Blocks, ...]:
    """For the forward of a whole gate on maps like t, with 64-bit offsets where `wide`."""
    return _WHOLE_FLOAT32 if wide or t.dtype == torch.float32 else _WHOLE


def whole_backward(t: Tensor) -> tuple[Blocks, ...]:
    """For its backward."""
    return _WHOLE_BACKWARD_FLOAT32 if t.dtype == torch.float32 else _WHOLE_BACKWARD


_best: dict[tuple, Blocks] = {}


def tuned(
    key: tuple, device: torch.device, choices: Sequence[Blocks], run: Callable[[Blocks], Result]
) -> Result:
    """run(blocks) with the best of `choices` for this class of shapes."""
    if device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
        return run(choices[0])  # which blocks are the best decides the order of sums
    key = (*key, torch.get_device_module(device).get_device_name(device))
    blocks = _best.get(key)
    if blocks is None and (blocks := _from_disk(key, choices)) is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return run(choices[0])  # a graph under capture can't be timed
        blocks = _fastest(device, choices, run)
        _to_disk(key, choices, blocks)
    _best[key] = blocks
    try:
        return run(blocks)
    except OutOfResources:  # other sizes of this class may take more shared memory
        return run(choices[0])


def _fastest(device: torch.device, choices: Sequence[Blocks], run: Callable[[Blocks], Any]) -> Blocks:
    module = torch.get_device_module(device)
    times = {}
    for blocks in choices:
        try:
            for _ in range(3):
                run(blocks)
        except (OutOfResources, PTXASError):
            continue
        measured = []
        for _ in range(7):
            begin, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
            begin.record()
            run(blocks)
            end.record()
            module.synchronize()
            measured.append(begin.elapsed_time(end))
        times[blocks] = sorted(measured)[len(measured) // 2]
    return min(times, key=times.__getitem__) if times else choices[0]


def _cache(key: tuple, choices: Sequence[Blocks]) -> Any:
    words = repr((key, tuple(choices), triton.__version__))
    return get_cache_manager(hashlib.sha256(words.encode()).hexdigest())


def _from_disk(key: tuple, choices: Sequence[Blocks]) -> Blocks | None:
    path = _cache(key, choices).get_file("attn_gate_blocks.json")
    if path is None:
        return None
    with open(path) as file:
        return Blocks(**json.load(file))


def _to_disk(key: tuple, choices: Sequence[Blocks], blocks: Blocks) -> None:
    _cache(key, choices).put(json.dumps(blocks.__dict__), "attn_gate_blocks.json", binary=False)


def start(kernel: Any, programs: int, *args: Any, blocks: Blocks, **constants: Any) -> None:
    """Launches a one-dimensional grid: its only axis takes 2^31 - 1 programs."""
    kernel[(programs,)](*args, **constants, **options(blocks))


def options(blocks: Blocks) -> dict[str, int | bool]:
    """What Triton is told beside a kernel's own arguments.

    No contraction of a * b + c: in the butterfly of a sum it makes the lanes' results differ in the last bit,
    and then the lane whose store comes last would decide. Matrix products are not concerned.
    """
    found = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": False}
    target = _target()
    if target is not None and target.backend == "cuda":
        # Left alone, ptxas may spill a little to have one program more on a multiprocessor.
        found["maxnreg"] = min(255, 2**16 // (32 * blocks.warps) // blocks.programs)
    elif target is not None and target.warp_size == 64:
        found["num_warps"] = max(1, blocks.warps // 2)  # as many lanes, and all registers for them
    return found


def _target() -> Any:
    """What is compiled for; None in the interpreter."""
    return None if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target()


def on_device_of(t: Tensor) -> AbstractContextManager:
    """Kernels start on the current device: makes it t's."""
    return nullcontext() if t.device.type == "cpu" else torch.get_device_module(t.device).device(t.device)


def precision(t: Tensor) -> str:
    """Of matrix products of maps like t, as torch.backends.cuda.matmul.allow_tf32 says.

    Where tf32 isn't allowed NVIDIA's matrix units still serve: three tf32 products are float32 but for the
    last bit.
    """
    if t.dtype != torch.float32:
        return "ieee"
    # Not allow_tf32, the older name of the same switch: it raises once somebody has set this one.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    target = _target()
    if target is None:
        return "tf32" if allowed else "ieee"
    if target.backend == "cuda" and target.arch >= 80:
        return "tf32" if allowed else "tf32x3"
    return "tf32" if allowed and target.arch == "gfx942" else "ieee"
