"""bench/cuda_kernels.md is true, and within what the kernels promise."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_host import build, table

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=build.why_not() or "-")


@pytest.fixture(scope="module")
def written():
    """The file's rows, by their words."""
    rows = [line.strip("| \n").split(" | ") for line in table.FILE.read_text().splitlines() if "|" in line]
    return {tuple(word for word in row if not re.match(r"[\d-]", word)): row for row in rows}


@pytest.mark.slow
def test_traffic(written):
    """At most 1.10 times what must move forward, and 1.15 backward, in each kernel, dtype and layout: half of
    the table's rows."""
    # A process of its own: in this one the kernels may be registered already, without the tracer.
    counts = """from cuda_on_host import table
_, float32_last, bfloat16, _ = table.KINDS
print({key: tuple(traffic) for key, traffic in table.traffic((float32_last, bfloat16)).items()})"""
    command = [sys.executable, "-c", counts]
    output = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    counted = {key: table.Traffic(*numbers) for key, numbers in ast.literal_eval(output.stdout).items()}
    assert len(counted) > 50
    for key, traffic in counted.items():
        assert traffic.ratio <= (1.10 if key[0] == "gate_forward" else 1.15), (key, traffic)
        assert traffic.passes <= 1.7, (key, traffic)
        ratio, shared, passes = map(float, written[key][4:7])
        assert shared == traffic.shared, (key, traffic)
        # Passes change a little with the address that the host gives to shared memory.
        assert abs(ratio - traffic.ratio) < 0.001 and abs(passes - traffic.passes) < 0.02, (key, traffic)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", table.ARCHITECTURES)
def test_registers(architecture, written):
    """No local memory, no spills, and registers as written (nvcc 13.0; others may differ by a few)."""
    at = 2 + table.ARCHITECTURES.index(architecture)
    for (kernel, dtype, _), (registers, local) in table.resources((architecture,)).items():
        assert local == 0, (kernel, dtype)
        assert abs(registers - int(written[kernel, dtype][at])) <= 8, (kernel, dtype, registers)
        most = 128 if dtype == "float64" or kernel == "phi_backward" else 80
        assert registers <= most, (kernel, dtype, registers)
