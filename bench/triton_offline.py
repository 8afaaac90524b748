"""The launches of the Triton kernels, for GPUs that aren't there: listed, and compiled.

Triton's driver is replaced by one that names the target; the operators then run as ever on CPU tensors, but
for the launches. A launch has a name that says which code it compiles to: a hash of the kernels' code, of how
Triton specialises the launch's arguments (as at a real launch), and of the options. The same name, the same
code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
import subprocess
import tempfile
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .triton_settings import Combination, Setting, calls

# Ampere (A100), Hopper, Blackwell (data centre, and workstation), AMD CDNA3 (MI300).
TARGETS = (("cuda", 80), ("cuda", 90), ("cuda", 100), ("cuda", 120), ("hip", "gfx942"))
# Modules of triton_kernels with code that runs on a GPU.
_DEVICE = ("maps", "resize", "forward", "parameters", "backward")

# Called for a launch: kernel's name, choice of block sizes (0 is also what no list serves), name of the
# launch, and a function that compiles it.
Report = Callable[[str, int, str, Callable[[], Any]], None]


class OfflineDriver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: tuple) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*target, 64 if target[0] == "hip" else 32)
        self.index = TARGETS.index(target)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by device: a device for each target.
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def offline(target: tuple, every_choice: bool, report: Report) -> Iterator[None]:
    """Inside, launches are reported instead."""
    import triton
    from attn_gate.triton_kernels import launch

    lists: list[Sequence[Any]] = [()]

    def start(kernel: Any, programs: int, *args: Any, blocks: Any, **constants: Any) -> None:
        options = {**constants, **launch.options(blocks)}
        choice = lists[-1].index(blocks) if blocks in lists[-1] else 0
        compiled = functools.partial(kernel.warmup, *args, grid=(programs,), **options)
        report(kernel.fn.__name__, choice, name_of(kernel, args, options), compiled)

    def each(key: tuple, device: torch.device, listed: Sequence[Any], run: Callable[[Any], Any]) -> None:
        lists.append(listed)
        for blocks in listed if every_choice else listed[:1]:
            run(blocks)
        lists.pop()

    driver = triton.runtime.driver
    before, active = (launch.start, launch.tuned), driver._active
    launch.start, launch.tuned = start, each
    driver.set_active(OfflineDriver(target))
    try:
        yield
    finally:
        launch.start, launch.tuned = before
        driver._active = active


def name_of(kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> str:
    """Of a launch, on the target at hand."""
    import triton

    *_, binder = kernel.device_caches[triton.runtime.driver.active.get_current_device()]
    _, specialisation, rest = binder(*args, debug=False, **options)
    words = f"{triton.__version__} {_device_code()} {kernel.fn.__name__} {specialisation} {rest}"
    return hashlib.sha256(words.encode()).hexdigest()[:12]


@functools.cache
def _device_code() -> str:
    """Of all kernels' code, without comments, docstrings and empty lines."""
    import attn_gate.triton_kernels as triton_kernels

    folder = Path(triton_kernels.__file__).parent
    return " ".join(word for module in _DEVICE for word in code_of((folder / f"{module}.py").read_text()))


def code_of(source: str) -> Iterator[str]:
    """Its words, but for comments, docstrings and empty lines."""
    begins = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL) or (begins and token.type == tokenize.STRING):
            continue
        begins = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        yield tokenize.tok_name[token.type] if begins else token.string


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


def each_launch(target: tuple, made: Combination, report: Callable[..., None]) -> None:
    """Reports all launches of forward and backward: of the chain, the whole gate and the multiply alone.

    report: of an operator's name, then as `Report` says.
    """
    from attn_gate import triton_kernels

    for operator, arguments in calls(made.setting, made.dtype, made.layout):
        with (
            offline(target, made.every_choice, functools.partial(report, operator)),
            _modes(made.setting),
        ):
            triton_kernels.implementation(operator)(*arguments)


def measure(compiled: Any) -> tuple[int, int, int, int]:
    """Warps of a program, registers of a thread, bytes of stack of a thread (spills) and shared memory."""
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
