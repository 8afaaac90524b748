"""keep_memory: what large results on the CPU leave behind for the next ones."""

from __future__ import annotations

from typing import Any

from attn_gate._library import ops


def keep_memory(limit: Any) -> int:
    """Limit the memory that freed results keep for the next ones, and say what the limit was: 1 GiB at first.

        attn_gate.keep_memory(0)          # none: what is kept is given back
        attn_gate.keep_memory(4 * 2**30)  # for volumes whose y and gradients take more

    On the CPU, results and workspaces from 4 MiB on (y, the gradients of x and g, stored pre-activations) lie
    in blocks of attn_gate's own. A freed block waits for the next result of its size, as memory on a GPU
    does in PyTorch: from the system each call would get fresh pages, which on large maps cost more than the
    gate.
    Where memory gets short the system takes what waits (Linux's MADV_FREE); until then it counts as the
    process's. The blocks freed first go first when the limit is reached.

    Such results are tensors as any, but their storage can't be resized (by a `resize_` that grows, say), and
    PyTorch's memory profiler doesn't see them. With 0 they come from PyTorch's allocator. Linux and torch >=
    2.11; elsewhere they always do.

    Args:
        limit: bytes, for the whole process.

    Raises:
        TypeError: it isn't an int.
        ValueError: it is negative.
    """
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"limit must be a number of bytes as an int; got {type(limit).__name__} {limit!r}")
    if not 0 <= limit < 2**63:
        raise ValueError(f"limit must be a number of bytes from 0 to 2**63 - 1; got {limit}")
    return ops.keep_memory(limit)
