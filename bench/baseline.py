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
# How much medians usually change between two runs of one program beyond their intervals, attn_gate's and
# others': as in quick runs on a shared virtual machine. It counts as much as so many of the rows at hand.
USUAL, OTHERS_USUAL, USUAL_ROWS = 0.05, 0.2, 4
_NORMAL_95 = 1.96  # half of a normal distribution's 95 %, in its standard deviations
# Of Student's t with four degrees of freedom, in its scale: half of its 95 %, the scale in median absolute
# deviations, and the error of a median of n, times the root of n.
_T_95, _MAD, _MEDIAN = 2.776, 1.35, 4 / 3
_ORDER = ("slower", "faster", "unclear", "same")
_STYLES = {"slower": "bold red", "faster": "green", "same": "dim", "unclear": "yellow"}


def compare(new: Results, old: Results) -> dict[str, Any]:
    """Verdicts on attn_gate's rows that both runs have, of configs that were the same in both.

    The machine may be in another mood than then. What isn't attn_gate's ran in both as well: the median
    change of those is the machine's, and is taken off; their scatter over the root of their number is how
    well that is known. The memory limit isn't among them: its copies of a millisecond say little.

    A row's error is made of that, of both medians' intervals, and of how much more attn_gate's own changes
    scatter about their median than those intervals say. A slowdown of all doesn't add to that, nor does one
    of a single row. Now and then a row is off by a third in one run, for its memory, so errors are taken to
    have the long tails of Student's t with four degrees of freedom.

    If the median of attn_gate's changes is beyond chance, its rows have changed together: each has whose
    change is nearer to that median than to none. A row has as well if its own change is more than chance
    makes in any of all the rows (Holm's method). Each of the two may be wrong in WRONG / 2 of comparisons of
    a program with itself. A row that has changed by more than LEAST is "faster" or "slower". It is "same" if
    change and noise (95 % of its error) are within twice LEAST together; else, and with too few samples on
    either side for an interval, "unclear": repeat on a quieter machine.
    """
    changed = [n for n, config in new.configs.items() if n in old.configs and old.configs[n] != config]
    pairs = [(row, _match(row, old)) for row in new.rows if row.times_ms and row.config not in changed]
    pairs = [(row, before) for row, before in pairs if before is not None]
    others = [_change(r, b) for r, b in pairs if not r.is_ours and r.provider != "limit"]
    drift = statistics.median(others) if others else 0.0
    drift_error = _MEDIAN * _scatter(others, OTHERS_USUAL) / math.sqrt(len(others)) if others else 0.0
    ours = [(row, before) for row, before in pairs if row.is_ours]
    few = [row.summary.few or before.summary.few for row, before in ours]
    changes = [_change(row, before) - drift for row, before in ours]
    own = [math.hypot(_error(row), _error(before)) for row, before in ours]
    tested = [i for i in range(len(ours)) if not few[i]]
    own_tested = statistics.median(own[i] for i in tested) if tested else 0.0
    scatter = _scatter([changes[i] for i in tested], USUAL, own_tested)
    own = [math.hypot(error, scatter) for error in own]
    errors = [math.hypot(error, drift_error) for error in own]
    real = _changed_together(changes, own, drift_error, tested) | _changed_alone(changes, errors, tested)
    noises = [_T_95 * error for error in errors]
    rows = [
        {
            **dict(zip(("config", "dtype", "threads", "mode", "provider"), row.key, strict=True)),
            "before_ms": before.median_ms,
            "now_ms": row.median_ms,
            "change": math.expm1(changes[i]),
            "noise": math.expm1(noises[i]),
            "verdict": "unclear" if few[i] else _verdict(changes[i], noises[i], i in real),
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


def machines_change(compared: dict[str, Any]) -> str:
    """How much the machine itself has changed, in a line, or that nothing tells."""
    if not compared["others"]:
        return (
            "how much the machine itself has changed is not known, and is in the changes below: the runs "
            "have no row in common that isn't attn_gate's or the memory limit's"
        )
    return (
        f"what isn't attn_gate's takes {compared['drift']:+.0%} time "
        f"({compared['others']} rows, median): the machine, taken off below"
    )


def together(compared: dict[str, Any]) -> str:
    """Why rows have a verdict though their change is within their noise, in a line; empty if none has."""
    within = [row for row in compared["rows"] if abs(row["change"]) <= row["noise"]]
    if not any(row["verdict"] in ("slower", "faster") for row in within):
        return ""
    return "attn_gate's rows have changed together: that is beyond chance where a row's own change isn't"


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
    yield Text(machines_change(compared), style="dim" if compared["others"] else "yellow")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "before, ms", "now, ms", "change of time", "noise", "verdict"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in compared["rows"]:
        name = title(row, compared["threads"])
        change, noise = f"{row['change']:+.1%}", f"±{row['noise']:.1%}"
        verdict = Text(row["verdict"], style=_STYLES[row["verdict"]])
        table.add_row(name, f"{row['before_ms']:.2f}", f"{row['now_ms']:.2f}", change, noise, verdict)
    yield table
    if remark := together(compared):
        yield Text(remark, style="dim")


def _match(row: Row, old: Results) -> Row | None:
    return old.find(row.config, row.mode, row.provider, dtype=row.dtype, threads=row.threads)


def _change(row: Row, before: Row) -> float:
    """Of the medians, as a logarithm."""
    return math.log(row.median_ms / before.median_ms)


def _error(row: Row) -> float:
    """Of the median, from its interval, as a logarithm."""
    return math.log(row.summary.high / row.summary.low) / 2 / _NORMAL_95


def _scatter(changes: list[float], usual: float, own: float = 0.0) -> float:
    """How far changes scatter about their median beyond their own error, whatever the farthest half does.

    The fewer there are, the more counts what is usual.
    """
    if not changes:
        return usual
    middle = statistics.median(changes)
    scale = _MAD * statistics.median(abs(change - middle) for change in changes)
    beyond = max(scale**2 - own**2, 0.0)
    known = len(changes) - 1  # one alone tells nothing
    return math.sqrt((USUAL_ROWS * usual**2 + known * beyond) / (USUAL_ROWS + known))


def _chance(change: float, error: float) -> float:
    """That an error alone is as far from none: both tails of Student's t with four degrees of freedom."""
    x = abs(change) / math.hypot(change, 2 * error) if change else 0.0
    return 1 - x * (3 - x * x) / 2


def _changed_together(
    changes: list[float], own: list[float], drift_error: float, tested: list[int]
) -> set[int]:
    """Rows that are nearer to the median change than to none, if that isn't chance's."""
    if not tested:
        return set()
    common = statistics.median(changes[i] for i in tested)
    error = _MEDIAN * statistics.median(own[i] for i in tested) / math.sqrt(len(tested))
    if _chance(common, math.hypot(error, drift_error)) > WRONG / 2:
        return set()
    return {i for i in tested if abs(changes[i] - common) < abs(changes[i])}


def _changed_alone(changes: list[float], errors: list[float], tested: list[int]) -> set[int]:
    """Rows whose own change isn't chance's: Holm's method."""
    chances = {i: _chance(changes[i], errors[i]) for i in tested}
    real: set[int] = set()
    for i in sorted(tested, key=chances.__getitem__):
        if chances[i] > WRONG / 2 / (len(tested) - len(real)):
            break
        real.add(i)
    return real


def _verdict(change: float, noise: float, real: bool) -> str:
    least = math.log1p(LEAST)
    if real and abs(change) > least:
        return "slower" if change > 0 else "faster"
    return "same" if abs(change) + noise <= 2 * least else "unclear"
