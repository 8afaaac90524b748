"""Memory of large results on the CPU: kept when they are freed, for the next ones."""

import os
import threading
from pathlib import Path

import pytest
import torch
from attn_gate.bench.memory import allocated_peak
from matrix import STREAMED, compare
from torch import Tensor

import attn_gate
from attn_gate import functional

MiB = 2**20
LARGE = (1, 2, 1024, 1024)  # 8 MiB of float32

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists()
    or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="nothing is kept but on Linux and from torch 2.11 on",
)


@pytest.fixture(autouse=True)
def keeping():
    """Nothing is kept before a test."""
    attn_gate.keep_memory(1024 * MiB)
    yield
    attn_gate.keep_memory(0)


def gated(*shape: int, value: float = 2.0, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """x = value, alpha = 1/2."""
    x = torch.full(shape, value).to(memory_format=layout)
    return functional.apply_attention(x, torch.full((shape[0], 1, *shape[2:]), 0.5))


def lent() -> int:
    """Bytes that the system may take back from this process."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("LazyFree:"):
            return int(line.split()[1]) * 1024
    pytest.skip("this kernel doesn't tell what it has been lent")


def test_a_freed_result_lends_its_memory_to_the_next():
    y = gated(*LARGE)
    where = y.data_ptr()
    del y
    assert gated(*LARGE, value=6.0).data_ptr() == where


def test_small_results_are_pytorchs():
    gated(1, 1, 1024, 1023)
    assert lent() == 0
    gated(1, 1, 1024, 1024)  # 4 MiB
    assert lent() > 3 * MiB  # a kernel without huge pages counts some of them later


def test_results_in_use_are_left_alone():
    results = [gated(*LARGE, value=float(i)) for i in range(4)]
    view = results[0][:, 1:]
    del results[0]
    gated(*LARGE, value=9.0)
    assert (view == 0).all()
    assert all((y == (i + 1) / 2).all() for i, y in enumerate(results))


def test_a_result_up_to_a_quarter_smaller_fits():
    for rows, fits in ((1024, True), (820, True), (818, False), (1025, False)):
        y = gated(1, 4, 1024, 1024)
        where = y.data_ptr()
        del y
        z = gated(1, 4, rows, 1024)
        assert (z.data_ptr() == where) == fits, rows
        assert z.untyped_storage().nbytes() == z.nbytes
        attn_gate.keep_memory(0)
        attn_gate.keep_memory(1024 * MiB)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("operator", ["gate", "attention_gate", "apply_attention"])
@pytest.mark.parametrize("case", STREAMED, ids=lambda case: case.name)
def test_what_was_there_before_is_not_read(case, operator, layout):
    """Kept memory full of NaN, for y and for gradients."""
    shape = case.inputs(operator)["x"].shape
    poisoned = [gated(*shape) for _ in range(4)]
    for y in poisoned:
        y.fill_(torch.nan)
    del y, poisoned
    assert lent() >= 4 * 8 * MiB
    compare(case, operator, torch.float32, layout)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 3, 900, 900), torch.contiguous_format),
        ((2, 3, 900, 900), torch.channels_last),
        ((1, 3, 90, 90, 110), torch.channels_last_3d),
    ],
)
def test_strides_are_those_of_pytorch(shape, layout):
    y = gated(*shape, layout=layout)
    assert y.stride() == torch.empty(shape).to(memory_format=layout).stride()
    assert y.device == torch.device("cpu") and y.untyped_storage().nbytes() == y.nbytes


def test_results_are_tensors_as_any():
    with torch.inference_mode():
        assert gated(*LARGE).is_inference()
    y = gated(*LARGE)
    assert not y.is_inference() and torch.equal(y.clone().add_(1), y + 1)
    assert y.numpy().ctypes.data == y.data_ptr()
    assert y.share_memory_().is_shared() and (y == 1).all()


class TestKeepMemory:
    def test_says_what_the_limit_was(self):
        assert attn_gate.keep_memory(64 * MiB) == 1024 * MiB
        assert attn_gate.keep_memory(1024 * MiB) == 64 * MiB

    def test_the_system_may_take_what_is_kept(self):
        before = lent()
        y = gated(*LARGE)
        assert lent() == before
        del y
        assert lent() > before + 7 * MiB

    def test_0_gives_back_what_is_kept(self):
        gated(*LARGE)
        attn_gate.keep_memory(0)
        assert lent() == 0

    def test_with_0_results_come_from_pytorch(self):
        attn_gate.keep_memory(0)
        y = gated(*LARGE)
        del y
        assert lent() == 0
        y = gated(*LARGE)
        attn_gate.keep_memory(1024 * MiB)
        del y
        assert lent() == 0  # nor is it kept later

    def test_what_was_freed_first_goes_first(self):
        attn_gate.keep_memory(30 * MiB)
        old, new = gated(1, 3, 1024, 1024), gated(1, 6, 1024, 1024)  # 12 and 24 MiB
        where = new.data_ptr()
        del old
        del new
        other = gated(1, 4, 1024, 1024)  # of 16 MiB: neither fits
        assert other.data_ptr() != where
        assert gated(1, 6, 1024, 1024).data_ptr() == where
        del other  # 40 MiB with it
        assert lent() < 17 * MiB

    def test_a_result_above_the_limit_is_not_kept(self):
        attn_gate.keep_memory(9 * MiB)
        gated(1, 3, 1024, 1024)
        assert lent() == 0

    @pytest.mark.parametrize("limit", [1.5, "1G", None, True])
    def test_other_types_are_refused(self, limit):
        with pytest.raises(TypeError, match="limit must be a number of bytes as an int; got"):
            attn_gate.keep_memory(limit)

    @pytest.mark.parametrize("limit", [-1, 2**63])
    def test_other_numbers_are_refused(self, limit):
        with pytest.raises(ValueError, match=f"from 0 to .*; got {limit}"):
            attn_gate.keep_memory(limit)
        assert attn_gate.keep_memory(1024 * MiB) == 1024 * MiB


def test_the_benchmark_counts_results_and_leaves_the_limit():
    x, alpha = torch.ones(LARGE), torch.ones(1, 1, *LARGE[2:])
    assert x.nbytes <= allocated_peak(lambda: functional.apply_attention(x, alpha)) < 1.1 * x.nbytes
    assert attn_gate.keep_memory(1024 * MiB) == 1024 * MiB


def test_threads_get_memory_of_their_own():
    wrong = []

    def work(value: float) -> None:
        for _ in range(20):
            y = gated(*LARGE, value=value)
            if not (y == value / 2).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own():
    gated(*LARGE)
    y = gated(*LARGE, value=4.0)
    child = os.fork()
    if child == 0:
        right = False
        try:
            torch.set_num_threads(1)  # OpenMP's threads don't survive a fork
            y.fill_(7.0)
            del y
            right = bool((gated(*LARGE, value=8.0) == 4.0).all())
        finally:
            os._exit(not right)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (y == 2).all()
