"""The table for READMEs: what attn_gate gains, in one line per gate or network."""

from __future__ import annotations

from collections.abc import Sequence

from .gains import gain
from .providers import PROVIDERS, PYTORCH
from .registry import AnyConfig
from .results import Results
from .tables import MARKS, NOISY, WRONG, milliseconds, threads_text, three_digits

_NOT_MEASURED = "–"
_OTHERS = ("eager", "eager-channels-last", "compile", "onnxruntime", "openvino")


def table(results: Results, kinds: Sequence[str] = ("gate", "network")) -> str:
    """A Markdown table in the dtype and on the number of threads that go without saying; empty without rows.

    Its last line is the geometric mean of the gates, over eager and over the fastest of PyTorch's own.
    """
    configs = [c for c in results.configs.values() if c.kind in kinds and _lines(results, c.name)]
    if not configs:
        return ""
    others = {
        mode: [p for p in _OTHERS if any(results.find(c.name, mode, p) for c in configs)]
        for mode in ("inference", "step")
    }
    titles = {"inference": "inference", "step": "forward + backward"}
    heads = [f"gate or network{_what_is_unusual(results)}", "x"]
    for mode, names in others.items():
        heads += [f"{titles[mode]}: × {' / '.join(PROVIDERS[p].title for p in names)}"] if names else []
    heads.append("MiB kept for backward (eager)")
    rows = []
    for config in configs:
        cells = [f"{config.title} (`{config.name}`)", config.shape_text]
        cells += [_speeds(results, config.name, mode, names) for mode, names in others.items() if names]
        cells.append(_kept(results, config))
        rows.append(cells)
    legend = _legend("".join(cell for cells in rows for cell in cells[2:]))  # what follows name and x
    gates = [c for c in configs if c.kind == "gate"]
    means = [_mean(results, gates, mode) for mode, names in others.items() if names]
    if any(means):
        rows.append(["geometric mean of the gates", "", *means, ""])
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    lines.insert(1, "|" + "---|" * len(heads))
    return "\n".join(lines) + "\n" + legend


def _what_is_unusual(results: Results) -> str:
    parts = [results.dtype] if results.dtype != "float32" else []
    if results.threads != results.machine["threads"]:
        parts.append(threads_text(results.threads))
    return f" ({', '.join(parts)})" if parts else ""


def _mean(results: Results, gates: Sequence[AnyConfig], mode: str) -> str:
    parts = []
    for name, over in (("eager", ("eager",)), ("the fastest of PyTorch's own", PYTORCH)):
        if found := gain(results, gates, mode, over):
            parts.append(f"{_factor(found.mean)} ({name}) {found.without}".rstrip())
    return ", ".join(parts)


def _legend(text: str) -> str:
    """What the marks in the text mean; empty where there are none."""
    meanings = {**MARKS, _NOT_MEASURED: "not measured"}
    said = [f"{mark}: {meaning}" for mark, meaning in meanings.items() if mark in text]
    return f"\n{'; '.join(said)}.\n" if said else ""


def _lines(results: Results, config: str) -> bool:
    return any(results.find(config, mode, "attn_gate") for mode in ("inference", "step"))


def _speeds(results: Results, config: str, mode: str, others: Sequence[str]) -> str:
    """How many times faster attn_gate is than each of these, and its time; marks as in the other tables."""
    ours = results.find(config, mode, "attn_gate")
    if ours is None:
        return _without_time(results, config, mode, "attn_gate")
    speeds = []
    for name in others:
        other = results.find(config, mode, name)
        if other is None:
            speeds.append(_without_time(results, config, mode, name))
            continue
        speed = other.median_ms / ours.median_ms
        speeds.append((NOISY if other.summary.noisy else "") + _factor(speed))
    return f"{' / '.join(speeds)} ({milliseconds(ours)} ms)"


def _without_time(results: Results, config: str, mode: str, provider: str) -> str:
    key = (config, results.dtype, results.threads, mode, provider)
    is_wrong = any(row.key == key and row.status == "wrong" for row in results.rows)
    return WRONG if is_wrong else _NOT_MEASURED


def _factor(value: float) -> str:
    return f"{value:.{1 if value >= 2 else 2}f}"


def _kept(results: Results, config: AnyConfig) -> str:
    ours, eager = (results.find(config.name, "step", name) for name in ("attn_gate", "eager"))
    if ours is None:
        return ""
    text = three_digits(ours.kept_bytes / 2**20)
    return text if eager is None else f"{text} ({three_digits(eager.kept_bytes / 2**20)})"
