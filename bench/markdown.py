"""The table for READMEs: what attn_gate gains, in one line per gate or network."""

from __future__ import annotations

from collections.abc import Sequence

from .registry import AnyConfig
from .results import Results
from .tables import NOISY, milliseconds, three_digits

_OTHERS = ("eager", "compile", "onnxruntime", "openvino")
_NAMES = {"eager": "eager", "compile": "torch.compile", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def table(results: Results, kinds: Sequence[str] = ("gate", "network")) -> str:
    """A Markdown table of the float32 rows on the run's own number of threads; empty without any."""
    configs = [c for c in results.configs.values() if c.kind in kinds and _lines(results, c.name)]
    if not configs:
        return ""
    others = {
        mode: [p for p in _OTHERS if any(results.find(c.name, mode, p) for c in configs)]
        for mode in ("inference", "step")
    }
    titles = {"inference": "inference", "step": "forward + backward"}
    heads = ["gate or network", "x"]
    heads += [
        f"{titles[m]}: × {' / '.join(_NAMES[p] for p in names)}" for m, names in others.items() if names
    ]
    heads.append("MiB kept for backward (eager)")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for config in configs:
        cells = [f"{config.title} (`{config.name}`)", config.shape_text]
        cells += [_speeds(results, config.name, mode, names) for mode, names in others.items() if names]
        cells.append(_kept(results, config))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _lines(results: Results, config: str) -> bool:
    return any(results.find(config, mode, "attn_gate") for mode in ("inference", "step"))


def _speeds(results: Results, config: str, mode: str, others: Sequence[str]) -> str:
    """How many times faster attn_gate is than each of these, and its time; NOISY marks what says little."""
    ours = results.find(config, mode, "attn_gate")
    if ours is None:
        return ""
    speeds = []
    for name in others:
        other = results.find(config, mode, name)
        if other is None:
            speeds.append("–")
            continue
        speed = other.median_ms / ours.median_ms
        speeds.append((NOISY if other.summary.noisy else "") + f"{speed:.{1 if speed >= 2 else 2}f}")
    return f"{' / '.join(speeds)} ({milliseconds(ours)} ms)"


def _kept(results: Results, config: AnyConfig) -> str:
    ours, eager = (results.find(config.name, "step", name) for name in ("attn_gate", "eager"))
    if ours is None:
        return ""
    text = three_digits(ours.kept_bytes / 2**20)
    return text if eager is None else f"{text} ({three_digits(eager.kept_bytes / 2**20)})"
