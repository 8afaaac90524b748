"""bench/cuda_kernels.md: what CUDA kernels take of a GPU, by nvcc, and what they move, counted on the host.

python tests/cuda_on_host/table.py      makes it anew: two to five minutes
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from cuda_on_host import backend, build

FILE = build.ROOT / "bench" / "cuda_kernels.md"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
DTYPES = {"f": "float32", "d": "float64", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}
KINDS = tuple(itertools.product((torch.float32, torch.bfloat16), ("contiguous", "channels_last")))
THREADS = 256
# Of a multiprocessor: threads, and KiB of shared memory; every block takes one more than it asks for.
LIMITS = {"sm_80": (2048, 164), "sm_90": (2048, 228), "sm_100": (2048, 228), "sm_120": (1536, 100)}


def resources(architectures: tuple[str, ...] = ARCHITECTURES) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(kernel, dtype, architecture) -> (registers, bytes of local memory and spills)."""
    with tempfile.TemporaryDirectory() as scratch:
        running, said = [], []
        for architecture in architectures:
            for unit in ("forward", "backward"):
                command = [
                    *("nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", "-Xptxas", "-v"),
                    *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
                    *("-I", build.ROOT / "csrc", "-isystem", Path(torch.__file__).parent / "include"),
                    *(build.ROOT / "csrc" / "cuda" / f"{unit}.cu", "-o", f"{scratch}/{unit}.{architecture}"),
                ]
                running.append(subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True))
            for process in running:
                said.append((architecture, process.communicate()[1]))
                assert process.returncode == 0, said[-1]
            running.clear()
    table = {}
    for architecture, messages in said:
        entries = re.split(r"Compiling entry function '(\w+)'", messages)[1:]
        for name, report in zip(entries[::2], entries[1::2], strict=True):
            kernel, dtype = re.search(r"\d+(gate_\w+?|phi_backward|reduce_sums)I(\w+?)EEv", name).groups()
            registers = int(re.search(r"Used (\d+) registers", report)[1])
            local = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill)", report)))
            table[kernel, DTYPES[dtype], architecture] = (registers, local)
    return table


def traffic(kinds: Iterable[tuple[torch.dtype, str]] = KINDS) -> dict[tuple[str, str, str, str], Traffic]:
    """(kernel, gate, dtype, layout) -> what it moves; WHOLE is all kernels of that pass together.

    At sizes that fill the chip; for the host to get through, that has one multiprocessor.
    """
    module = backend.register("trace")
    module.set_processors(1)
    kernels = torch.ops.attn_gate_cuda_host_kernels
    table = {}
    for gate, (fine, coarse, gating, channels, mode) in GATES.items():
        for dtype, layout in kinds:
            torch.manual_seed(0)
            inter = channels // 2
            shapes = (1, channels, *fine), (1, inter, *coarse), (1, inter, *gating), (1, channels, *fine)
            x, theta, phi, dy = (_map(shape, dtype, layout) for shape in shapes)
            psi, modes = torch.randn(inter), (mode, mode, "relu")
            module.take_launches()
            y, alpha = kernels.gate_fwd(x, theta, phi, psi, None, *modes)
            key = (gate, str(dtype).removeprefix("torch."), layout)
            forward = module.take_launches()
            table[("gate_forward", *key)] = _counted(forward, (x, theta, phi, psi), (y, alpha))
            dx, dtheta, dphi, *dpsi = kernels.gate_bwd(dy, None, x, theta, phi, psi, alpha, *modes, 0b11111)
            launches = module.take_launches()
            behind = (theta, phi, psi, alpha), (dtheta, dphi)
            if len(launches) == 3:
                dfine = torch.empty(1, *fine)
                name = "phi_backward" if coarse != gating else "gate_backward, chain"
                stream = _counted(launches[:1], (dy, x, alpha), (dx, dfine))
                table[("gate_backward, stream", *key)] = stream
                table[(name, *key)] = _counted(launches[1:2], (*behind[0], dfine), behind[1])
            else:
                read = dy, x, *behind[0]
                table[("gate_backward", *key)] = _counted(launches[:1], read, (dx, *behind[1]))
            whole = (dy, x, *behind[0]), (dx, *behind[1], *dpsi)
            table[(WHOLE, *key)] = _counted(launches, *whole)
    return table


WHOLE = "backward, all kernels"
# x's grid, theta's, phi's, channels of x, resize
GATES = {
    "one grid": ((64, 64), (64, 64), (64, 64), 64, "linear"),
    "linear 2D": ((128, 128), (64, 64), (64, 64), 64, "linear"),
    "linear 3D": ((32, 32, 64), (16, 16, 32), (16, 16, 32), 32, "linear"),
    "nearest 2D": ((128, 128), (64, 64), (64, 64), 64, "nearest"),
    "coarser phi 2D": ((64, 64), (64, 64), (32, 32), 64, "linear"),
    "coarser phi 3D": ((16, 16, 32), (16, 16, 32), (8, 8, 16), 32, "linear"),
    "nearest phi 2D": ((64, 64), (64, 64), (32, 32), 64, "nearest"),
    "three grids 2D": ((128, 128), (64, 64), (32, 32), 64, "linear"),
    "three grids 3D": ((32, 32, 64), (16, 16, 32), (8, 8, 16), 32, "linear"),
}


class Traffic(NamedTuple):
    """Bytes of requested sectors over those that must move; bytes of shared memory; passes over it, over the
    least that they could be."""

    ratio: float
    shared: int
    passes: float

    def written(self) -> tuple[str, str, str]:
        """As in the file."""
        return f"{self.ratio:.3f}", str(self.shared), f"{self.passes:.2f}"


def _map(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    memory_format = last if layout == "channels_last" else torch.contiguous_format
    return torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)


def _counted(launches: list, read: tuple, written: tuple) -> Traffic:
    *_, shared, sectors, waves, least = zip(*launches, strict=True)
    must = sum(t.numel() * t.element_size() for t in (*read, *written))
    return Traffic(32 * sum(sectors) / must, max(shared), sum(waves) / sum(least))


def occupancy(architecture: str, registers: int, shared: int) -> float:
    """The part of a multiprocessor's threads that blocks can fill."""
    threads, kib = LIMITS[architecture]
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * THREADS // 32)
    blocks = min(by_registers, threads // THREADS, kib * 1024 // (shared + 1024))
    return blocks * THREADS / threads


def text() -> str:
    """The whole file."""
    found, moved = resources(), traffic()
    lines = [
        "# CUDA kernels",
        "",
        "Made by `python tests/cuda_on_host/table.py`; `tests/test_cuda_table.py` keeps it true.",
        "",
        "Registers a thread, by nvcc; local memory and spills are 0 bytes. Blocks are 256 threads.",
        "",
        "| kernel | dtype | " + " | ".join(ARCHITECTURES) + " |",
        "|---|---|" + "---|" * len(ARCHITECTURES),
    ]
    for kernel, dtype in sorted({key[:2] for key in found}):
        row = [found[kernel, dtype, architecture] for architecture in ARCHITECTURES]
        assert not any(local for _, local in row), (kernel, dtype, row)
        lines.append(f"| {kernel} | {dtype} | " + " | ".join(str(registers) for registers, _ in row) + " |")
    lines += [
        "",
        "Traffic: 32 bytes for each sector of global memory that a warp requests, over the bytes that must",
        "move (each input read once, each output written once), counted on the host at aligned sizes. Where",
        "backward is two kernels, what lies between them (one channel) counts as output and input of theirs,",
        "but for nothing in the row of the whole pass, which has the sum of the partial sums too. Passes are",
        "those that the banks of shared memory take, over the least that they could be. Shared memory is a",
        "block's; occupancy is what registers and shared memory allow, of a multiprocessor's threads.",
        "",
        "| kernel | gate | dtype | layout | traffic | shared memory, bytes | passes | "
        + " | ".join(f"occupancy {a}" for a in ARCHITECTURES)
        + " |",
        "|---|---|---|---|---|---|---|" + "---|" * len(ARCHITECTURES),
    ]
    for (kernel, gate, dtype, layout), counted in moved.items():
        filled = ["-"] * len(ARCHITECTURES)
        if kernel != WHOLE:
            registers = [found[kernel.partition(",")[0], dtype, a][0] for a in ARCHITECTURES]
            filled = [
                f"{occupancy(architecture, of_one, counted.shared):.0%}"
                for architecture, of_one in zip(ARCHITECTURES, registers, strict=True)
            ]
        said = " | ".join((kernel, gate, dtype, layout, *counted.written(), *filled))
        lines.append(f"| {said} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if why := build.why_not() or ("" if shutil.which("nvcc") else "nvcc is not installed"):
        sys.exit(why)
    FILE.write_text(text())
    print(FILE.read_text())
