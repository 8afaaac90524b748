"""The CUDA kernels on the host under sanitizers; and bugs planted in them, each of which must be found."""

from __future__ import annotations

import re
import shutil

import pytest
from cuda_on_host import build, check

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=build.why_not() or "-")

# The logits' partial sums are read before all of them are there.
NO_BARRIER = (
    "forward.cuh",
    "store_run(part + int(threadIdx.x) * V, sum);\n    __syncthreads();",
    "store_run(part + int(threadIdx.x) * V, sum);",
)
# One coarse voxel more than the tile needs: in shared memory, and behind the map.
ONE_TOO_MANY_LOADED = (
    "forward.cuh",
    "v < tile.need.voxels(); v += kThreads",
    "v <= tile.need.voxels(); v += kThreads",
)
ONE_TOO_MANY_STORED = ("forward.cuh", "e < own.voxels(); e += kThreads", "e <= own.voxels(); e += kThreads")
# All threads add to the block's sum, where one of them may.
SHARED_SUM = (
    "backward.cuh",
    "if (split.unit == 0 && i < chain.inter) sums[i] += sum;",
    "if (i < chain.inter) sums[i] += sum;",
)
# What lies beyond 2**31 elements is found elsewhere.
NARROW_OFFSET = (
    "device.h",
    "static_cast<T*>(m.data) + n * m.sample + c * m.channel + voxel * m.voxel",
    "static_cast<T*>(m.data) + int(n * m.sample + c * m.channel + voxel * m.voxel)",
)
# dphi is gathered from a group's ds before all of it is there.
NO_BARRIER_IN_SWEEP = (
    "phi_backward.cuh",
    "        __syncthreads();\n        if (chain.dphi) add_to_dphi(",
    "        if (chain.dphi) add_to_dphi(",
)


@pytest.fixture
def planted(tmp_path):
    """The sources with a bug, and for one dtype alone, which compiles sooner."""

    def plant(file, right, wrong):
        csrc = tmp_path / "csrc"
        shutil.copytree(build.ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("cpu"))
        for unit in ("forward.cu", "backward.cu"):
            path = csrc / "cuda" / unit
            path.write_text(re.sub(r" *case DType::(f64|bf16|f16): .*\n", "", path.read_text()))
        path = csrc / "cuda" / file
        assert path.read_text().count(right) == 1
        path.write_text(path.read_text().replace(right, wrong))
        return csrc

    return plant


def test_missing_barrier_shows_in_the_numbers(planted):
    """Shared memory starts as NaN: what was read too early is seen, though not in every order of threads."""
    csrc = planted(*NO_BARRIER)
    done = [check.run("plain", "--tiny", "--order", str(order), csrc=csrc) for order in (0, 1)]
    assert any(process.returncode and "AssertionError" in process.stderr for process in done)
    assert any("alpha: error inf" in process.stderr for process in done)


def test_narrow_offset_is_found(planted):
    csrc = planted(*NARROW_OFFSET)
    assert check.run("plain", "--tiny", csrc=csrc).returncode == 0
    assert check.run("plain", "--tiny", "--far", csrc=csrc).returncode


@pytest.mark.slow
def test_no_address_is_wrong():
    """AddressSanitizer and UndefinedBehaviorSanitizer over the matrix."""
    done = check.run("sanitized")
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 300


@pytest.mark.slow
def test_no_race():
    """ThreadSanitizer at tiny sizes."""
    done = check.run("races", "--tiny")
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 24


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind,bug,report",
    [
        ("races", NO_BARRIER, r"data race.*(forward\.cuh|make_alpha_rows)"),
        ("races", SHARED_SUM, r"data race.*backward\.cuh"),
        ("races", NO_BARRIER_IN_SWEEP, r"data race.*(phi_backward|resized|device)"),
        ("sanitized", ONE_TOO_MANY_LOADED, r"heap-buffer-overflow.*(forward|device|cuda_on_host)"),
        ("sanitized", ONE_TOO_MANY_STORED, r"heap-buffer-overflow.*(forward\.cuh|store_alpha)"),
    ],
    ids=[
        "missing barrier",
        "unordered sum",
        "missing barrier in a sweep",
        "one too many loaded",
        "one too many stored",
    ],
)
def test_planted_bug_is_found(kind, bug, report, planted):
    done = check.run(kind, "--tiny", csrc=planted(*bug))
    assert done.returncode
    assert re.search(rf"SUMMARY: .*{report}", done.stderr), done.stderr[-3000:]
