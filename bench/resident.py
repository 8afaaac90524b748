"""Peak resident memory of one call, in a process of its own: `python -m attn_gate.bench.resident ...`."""

from __future__ import annotations

import subprocess
import sys

import torch

_PATIENCE_S = 600


def resident_bytes(config: str, dtype: str, threads: int, mode: str, provider: str) -> int | None:
    """How much a fresh process grows during the first call, libraries' own memory included; None: unknown.

    Raises:
        RuntimeError: the process failed, the message is its last line; or it took too long.
    """
    if not sys.platform.startswith("linux"):
        return None
    command = [sys.executable, "-m", __name__, config, dtype, str(threads), mode, provider]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer within {_PATIENCE_S} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    return int(done.stdout.split()[-1])  # what libraries say comes before


def main(config: str, dtype: str, threads: str, mode: str, provider: str) -> None:
    """Print the bytes."""
    from .memory import resident_growth
    from .network_case import make_case
    from .providers import PROVIDERS, TRAINING
    from .registry import CONFIGS

    torch.set_num_threads(int(threads))
    case = make_case(CONFIGS[config], dtype, "cpu")
    work = PROVIDERS[provider].make(case, mode in TRAINING).works[mode]
    work.prepare()
    print(resident_growth(work.call))


if __name__ == "__main__":
    main(*sys.argv[1:])
