"""Compiles every Triton kernel for GPUs that aren't there, with every choice of block sizes, and records what
each takes: registers, shared memory.

From a checkout, for the table isn't installed:

    python -m attn_gate.bench.triton_resources            compile all, compare with the table
    python -m attn_gate.bench.triton_resources --write    compile all, rewrite bench/triton_resources.csv

Triton's driver is replaced by one that names the target; the operators then run as ever on CPU tensors, but
for the launches, which are compiled as a real one would be (the same specialisation) and not started.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

TABLE = Path(__file__).with_name("triton_resources.csv")
# Ampere (A100), Hopper, Blackwell (data centre, and workstation), AMD CDNA3 (MI300).
TARGETS = (("cuda", 80), ("cuda", 90), ("cuda", 100), ("cuda", 120), ("hip", "gfx942"))


@dataclass(frozen=True, order=True)
class Resources:
    """One kernel as compiled for one target.

    Attributes:
        target, operator, gate, dtype, layout, kernel: which.
        choice: of the list of block sizes in triton_kernels/launch.py; 0 is also what no list serves.
        warps: of a program; registers: of a thread; spills: bytes of stack of a thread; shared: bytes.
    """

    target: str
    operator: str
    gate: str
    dtype: str
    layout: str
    kernel: str
    choice: int
    warps: int
    registers: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Setting:
    """A gate as it is launched.

    Attributes:
        x, g, channels, gating, inter, resize, activation: the gate; window: theta's kernel and stride.
        wide: with 64-bit offsets.
        tf32: with the matrix products of float32 that torch.backends.cuda.matmul allows.
        stored: pre-activations are kept for backward; and logits alone, as norms on psi take them.
    """

    name: str
    x: tuple[int, ...]
    g: tuple[int, ...]
    channels: int
    gating: int
    inter: int
    window: int = 1
    resize: str = "linear"
    activation: str = "relu"
    wide: bool = False
    tf32: bool = False
    stored: bool = False


# Sizes from practice; C, G, I and the grids are multiples of 16 as they are there.
SAME = Setting("same grid 2D", (64, 64), (64, 64), 64, 64, 32)
PAPER = Setting("paper 2D", (64, 64), (32, 32), 64, 128, 64, 2)
PAPER_3D = Setting("paper 3D", (16, 32, 32), (8, 16, 16), 32, 64, 32, 2)
SETTINGS = (
    SAME,
    PAPER,
    PAPER_3D,
    Setting("keras 2D, nearest", (64, 64), (32, 32), 64, 64, 64, 2, "nearest"),
    Setting("g coarser", (64, 64), (32, 32), 64, 64, 32),
    Setting("same grid, deep", (16, 16), (16, 16), 512, 512, 256),
)
_FLOAT32, _BFLOAT16, _FLOAT16 = torch.float32, torch.bfloat16, torch.float16
# On large grids the weight gradients are summed in the pass itself (`geometry.splits`).
LARGE = (
    (replace(SAME, name="same grid 2D, large", x=(512, 512), g=(512, 512)), _BFLOAT16),
    (replace(PAPER, name="paper 2D, large", x=(512, 512), g=(256, 256)), _FLOAT32),
    (replace(PAPER_3D, name="paper 3D, large", x=(64, 128, 128), g=(32, 64, 64)), _FLOAT32),
    (replace(PAPER_3D, name="paper 3D, large", x=(64, 128, 128), g=(32, 64, 64)), _BFLOAT16),
)
# What else a launch may be specialised for: with the first choice of block sizes, and for two of the targets.
VARIANT_TARGETS = TARGETS[:2]
VARIANTS = (
    (SAME, _FLOAT16),
    (replace(SAME, name="same grid 2D, stored", stored=True), _BFLOAT16),
    (replace(PAPER, name="paper 2D, stored", stored=True), _FLOAT32),
    (replace(SAME, name="same grid 2D, 64-bit offsets", wide=True), _FLOAT32),
    (replace(PAPER, name="paper 2D, 64-bit offsets", wide=True), _BFLOAT16),
    (replace(PAPER, name="paper 2D, tf32", tf32=True), _FLOAT32),
    (replace(PAPER, name="paper 2D, silu", activation="silu"), _BFLOAT16),
    (replace(SAME, name="same grid 2D, gelu", activation="gelu"), _FLOAT32),
    (replace(SAME, name="same grid 2D, softplus", activation="softplus"), _BFLOAT16),
    (Setting("same grid 2D, odd sizes", (63, 65), (63, 65), 37, 29, 19), _FLOAT32),
    (Setting("paper 2D, odd sizes", (63, 65), (31, 32), 37, 29, 19, 2), _BFLOAT16),
    (Setting("paper 3D, odd sizes", (9, 17, 21), (4, 8, 10), 19, 29, 9, 2), _FLOAT32),
    (Setting("one channel of each", (63, 65), (63, 65), 1, 1, 1), _FLOAT32),
    (Setting("aligned corners", (64, 64), (24, 24), 64, 64, 32, 2, "align_corners"), _FLOAT32),
    (Setting("aligned corners 3D", (16, 32, 32), (6, 12, 12), 32, 64, 32, 2, "align_corners"), _BFLOAT16),
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
def offline(
    backend: str, arch: int | str, choices: Callable[[Sequence[Any]], Sequence[Any]]
) -> Iterator[list[tuple[str, int, Any]]]:
    """Inside, launches compile for this target instead: the list fills with (kernel's name, choice,
    compiled).

    choices: of a list of block sizes those to compile.
    """
    import triton
    from attn_gate.triton_kernels import launch

    compiled: list[tuple[str, int, Any]] = []
    lists: list[Sequence[Any]] = [()]

    def start(kernel: Any, programs: int, *args: Any, blocks: Any, **constants: Any) -> None:
        found = kernel.warmup(*args, grid=(programs,), **constants, **launch.options(blocks))
        choice = lists[-1].index(blocks) if blocks in lists[-1] else 0
        compiled.append((kernel.fn.__name__, choice, found))

    def each(key: tuple, device: torch.device, listed: Sequence[Any], run: Callable[[Any], Any]) -> None:
        lists.append(listed)
        for blocks in choices(listed):
            run(blocks)
        lists.pop()

    driver = triton.runtime.driver
    before, active = (launch.start, launch.tuned), driver._active
    launch.start, launch.tuned = start, each
    driver.set_active(OfflineDriver(backend, arch, TARGETS.index((backend, arch))))
    try:
        yield compiled
    finally:
        launch.start, launch.tuned = before
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


@contextlib.contextmanager
def _modes(setting: Setting) -> Iterator[None]:
    """64-bit offsets and tf32, where the setting has them."""
    from attn_gate.triton_kernels import passes

    matmul = torch.backends.cuda.matmul
    before = passes.WIDE_FROM, matmul.fp32_precision
    if setting.wide:
        passes.WIDE_FROM = 0
    if setting.tf32:
        matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        passes.WIDE_FROM, matmul.fp32_precision = before


def compile_setting(
    setting: Setting,
    dtype: torch.dtype,
    layout: str,
    target: tuple,
    choices: Callable[[Sequence[Any]], Sequence[Any]] = tuple,
) -> list[Resources]:
    """All kernels of forward and backward, of the chain, the whole gate and the multiply alone.

    choices: of a list of block sizes those to compile.
    """
    from attn_gate import triton_kernels

    found = []
    with offline(*target, choices) as compiled, _modes(setting):
        for step, arguments in calls(setting, dtype, layout):
            compiled.clear()
            triton_kernels.implementation(step)(*arguments)
            found += [
                Resources(
                    f"{target[0]} {target[1]}", step, setting.name, str(dtype).removeprefix("torch."), layout,
                    name, choice, *measure(kernel),
                )
                for name, choice, kernel in compiled
            ]  # fmt: skip
    return sorted(set(found))


def calls(setting: Setting, dtype: torch.dtype, layout: str) -> list[tuple[str, tuple]]:
    """Names of operators, and their arguments."""
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
        torch.zeros(setting.inter, setting.channels, *window).contiguous(memory_format=memory_format),
        torch.zeros(setting.inter, setting.gating, *[1] * axes),
    )
    bias, one, alpha = torch.zeros(setting.inter), torch.zeros(1), torch.zeros(1, 1, *coarse)
    modes = setting.resize, setting.resize, setting.activation
    whole = x, g, *weights, bias, bias
    none = x.new_empty(0)
    if setting.stored:
        preact, logits = new(setting.inter, coarse), (setting.resize, setting.activation)
        return [
            ("attention_gate_fwd", (*whole, one, window, *modes, True)),
            (
                "attention_gate_bwd",
                (x, alpha, *whole, alpha, preact, window, *modes, 127),
            ),
            ("gate_logits_fwd", (theta, phi, bias, one, *logits)),
            ("gate_logits_bwd", (alpha, theta, phi, bias, *logits, 15)),
            ("attention_logits_fwd", (*whole, one, window, *logits, False)),
            ("attention_logits_bwd", (alpha, *whole, none, window, *logits, 127)),
        ]
    return [
        ("gate_fwd", (x, theta, phi, bias, one, *modes)),
        ("gate_bwd", (x, alpha, x, theta, phi, bias, alpha, *modes, 31)),
        ("attention_gate_fwd", (*whole, one, window, *modes, False)),
        ("attention_gate_bwd", (x, alpha, *whole, alpha, none, window, *modes, 127)),
        ("gate_apply_fwd", (x, alpha, setting.resize)),
        ("gate_apply_bwd", (x, x, alpha, setting.resize, 3)),
    ]


def first(choices: Sequence[Any]) -> Sequence[Any]:
    """What runs where nothing is timed."""
    return choices[:1]


def combinations(target: tuple) -> Iterator[tuple[Setting, torch.dtype, str, Callable]]:
    """Settings x dtypes, the most common with all choices of block sizes; channels last; variants."""
    for dtype in (_FLOAT32, _BFLOAT16):
        for setting in SETTINGS:
            yield setting, dtype, "contiguous", tuple if setting in (SAME, PAPER, PAPER_3D) else first
    for setting, dtype in LARGE:
        yield setting, dtype, "contiguous", tuple
    yield SAME, _BFLOAT16, "channels last", first
    yield PAPER, _BFLOAT16, "channels last", tuple
    yield PAPER, _FLOAT32, "channels last", first
    yield PAPER_3D, _BFLOAT16, "channels last", first
    if target in VARIANT_TARGETS:
        for setting, dtype in VARIANTS:
            yield setting, dtype, "contiguous", first


def read_table() -> list[Resources]:
    """What is recorded."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = ("choice", "warps", "registers", "spills", "shared")
    return [Resources(**{k: int(v) if k in numbers else v for k, v in row.items()}) for row in rows]


def write_table(rows: list[Resources]) -> None:
    """Replace what is recorded."""
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Resources))
        writer.writerows(astuple(row) for row in rows)


def _compile(work: tuple) -> list[Resources]:
    torch.set_num_threads(1)
    target, (setting, dtype, layout, choices) = work
    return compile_setting(setting, dtype, layout, target, choices)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="rewrite the table")
    parser.add_argument("--target", nargs="+", help="only these, such as 'cuda 90'")
    parser.add_argument("--processes", type=int, default=2, help="that compile at a time (2)")
    args = parser.parse_args()
    names = {f"{backend} {arch}" for backend, arch in TARGETS}
    wanted = set(args.target or names)
    if wanted - names:
        parser.error(f"--target must be among {sorted(names)}; got {sorted(wanted - names)}")
    work = [
        (target, combination)
        for target in TARGETS
        if f"{target[0]} {target[1]}" in wanted
        for combination in combinations(target)
    ]
    rows: list[Resources] = []
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        console = Console(stderr=True)
        for found in track(pool.imap_unordered(_compile, work), "compiling", len(work), console=console):
            rows += found
    for row in rows:
        if row.spills:
            print(f"SPILLS: {row}")
    if args.write:
        kept = [row for row in read_table() if row.target not in wanted] if wanted != names else []
        write_table(sorted({*rows, *kept}))
        return 0
    recorded = {row for row in read_table() if row.target in wanted}
    for row in sorted(recorded.symmetric_difference(rows)):
        print(f"{'only recorded' if row in recorded else 'only compiled'}: {row}")
    return int(recorded != set(rows))


if __name__ == "__main__":
    sys.exit(main())
