"""What has become faster or slower since an earlier run, and what is only noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .machine import differences
from .results import Results, Row

# Changes below this are never called changes: builds of the same source differ as much.
LEAST = 0.05
# How often a comparison of two runs of one program may call any row slower or faster.
WRONG = 0.05
# Facts of machines between which times may differ for reasons that aren't attn_gate's.
FACTS = ("processor", "gpu", "cores", "threads", "instructions", "torch", "pinning")
_NORMAL_95 = 1.96  # half of a normal distribution's 95 %, in its standard deviations
_MAD = 1.4826  # its standard deviation, in median absolute deviations
_ORDER = ("slower", "faster", "unclear", "same")
_STYLES = {"slower": "bold red", "faster": "green", "same": "dim", "unclear": "yellow"}


def compare(new: Results, old: Results) -> dict[str, Any]:
    """Verdicts on attn_gate's rows that both runs have, of configs that were the same in both.

    The machine may be in another mood than then. What isn't attn_gate's ran in both as well: the median
    change of those is the machine's, and their spread is how well that is known. A row's own uncertainty is
    that of both medians (95 %). A row is "faster" or "slower" if its change, the machine's taken off, is more
    than LEAST and more than chance makes of the uncertainties together in any of all the rows (Holm's method,
    but for WRONG of all comparisons); "same" if change and uncertainties together are within twice LEAST;
    else, and with too few samples on either side for an interval, "unclear": repeat on a quieter machine.
    """
    changed = [n for n, config in new.configs.items() if n in old.configs and old.configs[n] != config]
    pairs = [(row, _match(row, old)) for row in new.rows if row.times_ms and row.config not in changed]
    pairs = [(row, before) for row, before in pairs if before is not None]
    others = [math.log(r.median_ms / b.median_ms) for r, b in pairs if not r.is_ours]
    drift = statistics.median(others) if others else 0.0
    # Half of what 95 % of the others around the drift would take.
    deviations = [abs(other - drift) for other in others]
    spread = _NORMAL_95 * _MAD * statistics.median(deviations) if others else 0.0
    ours = [(row, before) for row, before in pairs if row.is_ours]
    changes = [math.log(row.median_ms / before.median_ms) - drift for row, before in ours]
    noises = [math.hypot(_uncertainty(row), _uncertainty(before), spread) for row, before in ours]
    few = [row.summary.few or before.summary.few for row, before in ours]
    real = _beyond_chance(changes, noises, few)
    rows = [
        {
            **dict(zip(("config", "dtype", "threads", "mode", "provider"), row.key, strict=True)),
            "before_ms": before.median_ms,
            "now_ms": row.median_ms,
            "change": math.expm1(changes[i]),
            "noise": math.expm1(noises[i]),
            "verdict": "unclear" if few[i] else _verdict(changes[i], noises[i], real[i]),
        }
        for i, (row, before) in enumerate(ours)
    ]
    rows.sort(key=lambda row: _ORDER.index(row["verdict"]))
    return {
        "baseline": old.started,
        "machine": differences(new.machine, old.machine, FACTS),
        "changed_configs": changed,
        "threads": new.machine["threads"],
        "drift": math.expm1(drift),
        "others": len(others),
        "rows": rows,
    }


def refuse_other_device(device: str, old: Results) -> None:
    """Times on another device are no baseline.

    Raises:
        ValueError: this one is from such.
    """
    before = old.machine.get("device", "cpu")
    if before != device:
        raise ValueError(
            f"--baseline: that run was on {before}, this one would be on {device}: take --device {before}, "
            f"or a baseline that was measured on {device}"
        )


def cautions(compared: dict[str, Any] | None) -> str:
    """What else than attn_gate differs between the runs, in a line; empty if nothing."""
    if compared is None:
        return ""
    facts = [f"{name} {before}, now {now}" for name, (before, now) in compared["machine"].items()]
    parts = [f"not the machine that it was then: {'; '.join(facts)}"] if facts else []
    changed = ", ".join(compared["changed_configs"])
    parts += [f"not compared, since they aren't what they were: {changed}"] if changed else []
    return "; ".join(parts)


def title(row: dict[str, Any], threads: int) -> str:
    """What a row of a comparison is about; without what goes without saying in a run on so many threads."""
    parts = [row["config"], row["mode"]]
    parts += [row["dtype"]] if row["dtype"] != "float32" else []
    parts += [row["provider"].partition("-")[2]] if row["provider"] != "attn_gate" else []
    parts += [f"{row['threads']} threads"] if row["threads"] != threads else []
    return " ".join(parts)


def is_slower(compared: dict[str, Any] | None) -> bool:
    """Whether anything is."""
    return compared is not None and any(row["verdict"] == "slower" for row in compared["rows"])


def tables(compared: dict[str, Any] | None) -> Iterator[Table | Text]:
    """The comparison, for the terminal; nothing without one."""
    if compared is None:
        return
    yield Text(f"Since {compared['baseline']}", style="bold")
    if caution := cautions(compared):
        yield Text(caution, style="yellow")
    if not compared["rows"]:
        yield Text("the runs have no row of attn_gate in common", style="yellow")
        return
    if compared["others"]:
        yield Text(
            f"what isn't attn_gate's takes {compared['drift']:+.0%} time "
            f"({compared['others']} rows, median): the machine, taken off below",
            style="dim",
        )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "before, ms", "now, ms", "change of time", "noise", "verdict"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in compared["rows"]:
        name = title(row, compared["threads"])
        change, noise = f"{row['change']:+.1%}", f"±{row['noise']:.1%}"
        verdict = Text(row["verdict"], style=_STYLES[row["verdict"]])
        table.add_row(name, f"{row['before_ms']:.2f}", f"{row['now_ms']:.2f}", change, noise, verdict)
    yield table


def _match(row: Row, old: Results) -> Row | None:
    return old.find(row.config, row.mode, row.provider, dtype=row.dtype, threads=row.threads)


def _uncertainty(row: Row) -> float:
    """Half of the median's interval, as a logarithm."""
    return math.log(row.summary.high / row.summary.low) / 2


def _beyond_chance(changes: list[float], noises: list[float], few: list[bool]) -> list[bool]:
    """Which changes aren't chance's, but for WRONG of all comparisons: Holm's method on normal p-values."""
    chances = [
        math.erfc(abs(change) / max(noise, 1e-12) * _NORMAL_95 / math.sqrt(2))
        for change, noise in zip(changes, noises, strict=True)
    ]
    tested = sorted((i for i in range(len(chances)) if not few[i]), key=lambda i: chances[i])
    real = [False] * len(chances)
    for rank, i in enumerate(tested):
        if chances[i] > WRONG / (len(tested) - rank):
            break
        real[i] = True
    return real


def _verdict(change: float, noise: float, real: bool) -> str:
    least = math.log1p(LEAST)
    if real and abs(change) > least:
        return "slower" if change > 0 else "faster"
    return "same" if abs(change) + noise <= 2 * least else "unclear"
