"""A matrix in a process of its own, for sanitizers: check.py KIND --csrc DIR [--tiny].

`run` starts it with the sanitizer's runtime loaded first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from cuda_on_host import build

TESTS = Path(__file__).parent.parent
_RUNTIME = {"sanitized": "libasan.so", "races": "libtsan.so"}


def run(
    kind: str, *arguments: str, csrc: Path = build.ROOT / "csrc", timeout: int = 900
) -> subprocess.CompletedProcess:
    """This file, in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "ASAN_OPTIONS": "detect_leaks=0",  # leaks are Python's own
        "TSAN_OPTIONS": "halt_on_error=1 report_bugs=1 ignore_noninstrumented_modules=1",
    }
    command = [sys.executable, __file__, kind, "--csrc", str(csrc), *arguments]
    if kind in _RUNTIME:
        # Python isn't instrumented, so the runtime comes first, with the library whose exceptions it watches.
        # The compiler must not run under it.
        build.build(kind, csrc)
        environment["LD_PRELOAD"] = f"{_library(_RUNTIME[kind])} {_library('libstdc++.so.6')}"
    if kind == "races":
        command = ["setarch", "-R", *command]  # its memory map leaves no room for random addresses
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def _library(name: str) -> str:
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--order", type=int)
    parser.add_argument("--far", action="store_true", help="maps with strides beyond 32 bits")
    parser.add_argument("--csrc", type=Path, required=True)
    arguments = parser.parse_args()

    import torch
    from matrix import DTYPES, EDGES, LAYOUTS, compare, recomputes

    from attn_gate.cases import CASES, OPERATORS, GateCase
    from cuda_on_host import backend

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    module = backend.register(arguments.kind, arguments.csrc)
    patches, nearest = {"kernel": 2, "stride": 2}, {"phi_resize": "nearest", "alpha_resize": "nearest"}
    tiny = (
        GateCase("same grid", (4, 8), (4, 8), channels=8, inter=8, batch=1),
        GateCase("linear", (5, 8), (2, 4), channels=5, inter=3, batch=1, **patches),
        GateCase("nearest", (4, 8), (2, 4), channels=5, inter=3, batch=1, stride=2, **nearest),
        GateCase("phi resized", (3, 5), (2, 2), channels=3, inter=5, batch=1),
        GateCase("three grids", (6, 8), (2, 2), channels=3, inter=5, batch=1, **patches),
    )
    operators = [name for name in OPERATORS if not arguments.tiny or not name.startswith("attention")]
    count, layouts = 0, list(LAYOUTS)
    for case in tiny if arguments.tiny else CASES + EDGES:
        for operator in operators:
            for options in recomputes(operator):
                module.set_order((0, 1, 7)[count % 3] if arguments.order is None else arguments.order)
                module.set_processors((1, 2, 16)[count // 3 % 3])
                for layout in ("contiguous", "channels last") if arguments.tiny else layouts[count % 7 :][:1]:
                    dtype = torch.float32 if arguments.tiny else DTYPES[count % 4]
                    module.set_far(dtype.itemsize if arguments.far else 0)
                    compare(case, operator, dtype, layout, backend=backend.NAME, **options)
                    count += 1
    print(count)


if __name__ == "__main__":
    main()
