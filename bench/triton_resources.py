"""Compiles every Triton kernel for GPUs that aren't there, and records what each takes: registers, shared
memory.

From a checkout, for the table isn't installed:

    python -m attn_gate.bench.triton_resources            compile all, compare with the table (minutes)
    python -m attn_gate.bench.triton_resources --write    compile all, rewrite bench/triton_resources.csv

Triton's driver is replaced by one that names the target; the operators then run as ever on CPU tensors, but
for the launches, which are compiled as a real one would be (the same specialisation) and not started.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("triton_resources.csv")
# Ampere (A100), Hopper, Blackwell (data centre, and workstation), AMD CDNA3 (MI300).
TARGETS = (("cuda", 80), ("cuda", 90), ("cuda", 100), ("cuda", 120), ("hip", "gfx942"))


@dataclass(frozen=True, order=True)
class Resources:
    """One kernel as compiled for one target.

    Attributes:
        target, operator, gate, dtype, layout, kernel: which.
        warps: of a program; registers: of a thread; spills: bytes of stack that a thread takes; shared:
        bytes.
    """

    target: str
    operator: str
    gate: str
    dtype: str
    layout: str
    kernel: str
    warps: int
    registers: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Setting:
    """A gate of a size from practice; C, G, I and the grids are multiples of 16 as they are there."""

    name: str
    x: tuple[int, ...]
    g: tuple[int, ...]
    channels: int
    gating: int
    inter: int
    window: int = 1
    resize: str = "linear"


SETTINGS = (
    Setting("same grid 2D", (64, 64), (64, 64), 64, 64, 32),
    Setting("paper 2D", (64, 64), (32, 32), 64, 128, 64, 2),
    Setting("paper 3D", (16, 32, 32), (8, 16, 16), 32, 64, 32, 2),
    Setting("keras 2D, nearest", (64, 64), (32, 32), 64, 64, 64, 2, "nearest"),
    Setting("g coarser", (64, 64), (32, 32), 64, 64, 32),
    Setting("same grid, deep", (16, 16), (16, 16), 512, 512, 256),
)


class OfflineDriver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, backend: str, arch: int | str, index: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
        self.index = index

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by device: a device for each target.
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def offline(backend: str, arch: int | str) -> Iterator[list[tuple[str, Any]]]:
    """Inside, launches compile for this target instead: the list fills with (kernel's name, compiled)."""
    import triton
    from attn_gate.triton_kernels import launch

    compiled: list[tuple[str, Any]] = []

    def start(kernel: Any, programs: int, *args: Any, blocks: Any, **constants: Any) -> None:
        found = kernel.warmup(*args, grid=(programs,), **constants, **launch.options(blocks))
        compiled.append((kernel.fn.__name__, found))

    driver = triton.runtime.driver
    before, launch.start, active = launch.start, start, driver._active
    driver.set_active(OfflineDriver(backend, arch, TARGETS.index((backend, arch))))
    try:
        yield compiled
    finally:
        launch.start = before
        driver._active = active


def measure(compiled: Any) -> tuple[int, int, int, int]:
    """Warps, registers, spilled bytes and shared memory of a compiled kernel."""
    metadata = compiled.metadata
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")
        )
        return metadata.num_warps, registers, 4 * spills, metadata.shared
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    return metadata.num_warps, registers, stack, metadata.shared


def compile_setting(setting: Setting, dtype: torch.dtype, layout: str, target: tuple) -> list[Resources]:
    """All kernels of forward and backward, of the chain, the whole gate and the multiply alone."""
    from attn_gate import triton_kernels

    axes = len(setting.x)
    window = [setting.window] * axes
    coarse = tuple(n // setting.window for n in setting.x)
    last = torch.channels_last if axes == 2 else torch.channels_last_3d
    memory_format = last if layout == "channels last" else torch.contiguous_format

    def new(channels: int, grid: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros((1, channels, *grid), dtype=dtype).contiguous(memory_format=memory_format)

    x, g = new(setting.channels, setting.x), new(setting.gating, setting.g)
    theta, phi = new(setting.inter, coarse), new(setting.inter, setting.g)
    weights = (
        torch.zeros(setting.inter, setting.channels, *window),
        torch.zeros(setting.inter, setting.gating, *[1] * axes),
    )
    bias, one, alpha = torch.zeros(setting.inter), torch.zeros(1), torch.zeros(1, 1, *coarse)
    modes = setting.resize, setting.resize, "relu"
    none = x.new_empty(0)
    calls = {
        "gate": [
            ("gate_fwd", (x, theta, phi, bias, one, *modes)),
            ("gate_bwd", (x, alpha, x, theta, phi, bias, alpha, *modes, 31)),
        ],
        "attention_gate": [
            ("attention_gate_fwd", (x, g, *weights, bias, bias, one, window, *modes, False)),
            ("attention_gate_bwd", (x, alpha, x, g, *weights, bias, bias, alpha, none, window, *modes, 127)),
        ],
        "gate_apply": [
            ("gate_apply_fwd", (x, alpha, setting.resize)),
            ("gate_apply_bwd", (x, x, alpha, setting.resize, 3)),
        ],
    }
    found = []
    with offline(*target) as compiled:
        for steps in calls.values():
            for step, arguments in steps:
                compiled.clear()
                triton_kernels.implementation(step)(*arguments)
                found += [
                    Resources(
                        f"{target[0]} {target[1]}", step, setting.name, str(dtype).removeprefix("torch."),
                        layout,
                        name, *measure(kernel),
                    )
                    for name, kernel in compiled
                ]  # fmt: skip
    return sorted(set(found))


def combinations() -> Iterator[tuple[Setting, torch.dtype, str]]:
    """Settings x dtypes, and the two most common gates in channels last; float16 takes bfloat16's code."""
    for setting in SETTINGS:
        yield setting, torch.float32, "contiguous"
        yield setting, torch.bfloat16, "contiguous"
    for setting in SETTINGS[:2]:
        yield setting, torch.bfloat16, "channels last"


def read_table() -> list[Resources]:
    """What is recorded."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = ("warps", "registers", "spills", "shared")
    return [Resources(**{k: int(v) if k in numbers else v for k, v in row.items()}) for row in rows]


def write_table(rows: list[Resources]) -> None:
    """Replace what is recorded."""
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Resources))
        writer.writerows(astuple(row) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="rewrite the table")
    parser.add_argument("--target", nargs="+", help="only these, such as 'cuda 90'")
    args = parser.parse_args()
    rows = []
    for target in TARGETS:
        if args.target and f"{target[0]} {target[1]}" not in args.target:
            continue
        for setting, dtype, layout in combinations():
            print(f"{target[0]} {target[1]}, {setting.name}, {dtype}, {layout}", file=sys.stderr, flush=True)
            rows += compile_setting(setting, dtype, layout, target)
    for row in rows:
        if row.spills:
            print(f"SPILLS: {row}")
    if args.write:
        write_table(sorted(rows))
        return 0
    return int(set(rows) != set(read_table()))


if __name__ == "__main__":
    sys.exit(main())
