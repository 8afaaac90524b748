"""The table that the demo closes with."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from rich.table import Table

from attn_gate.demo.measure import LAYOUTS
from attn_gate.demo.results import Results

_COLUMNS = ("eager", "fused", "floor")
_Row = tuple[str, dict[str, str]]


def closing_table(results: Results) -> Table:
    """Every headline number, eager and fused side by side; what was not reached is blank."""
    titles = {"eager": "eager", "fused": "fused", "floor": "eager, other threads"}
    titles.update((key, run.name) for key, run in results.runs.items())
    kind = ", SYNTHETIC images" if results.synthetic else ", held-out slices of the same patients"
    table = Table(title=f"{results.steps} steps{kind}", title_justify="left")
    table.add_column("")
    for key in _COLUMNS:
        table.add_column(titles[key], justify="right")
    for group in (_dice(results), _agreement(results), _cost(results)):
        for name, cells in group:
            table.add_row(name, *(cells.get(key, "") for key in _COLUMNS))
        table.add_section()
    return table


def _dice(results: Results) -> Iterator[_Row]:
    final = {key: run.dice[max(run.dice)] for key, run in results.runs.items() if run.dice}
    if final:
        yield "Dice, all slices together", {key: f"{dice.pooled:.3f}" for key, dice in final.items()}
        for p, name in enumerate(results.patients):
            yield f"  {name}", {key: f"{dice.patients[p]:.3f}" for key, dice in final.items()}


def _agreement(results: Results) -> Iterator[_Row]:
    if results.float64.difference:
        yield "float64: largest difference of the losses", {"fused": f"{max(results.float64.difference):.1e}"}
    if results.locked and results.locked.gradient_error:
        yield (
            "float32, same weights: error of the loss, largest",
            {"fused": f"{max(results.locked.loss_error):.1e}"},
        )
        yield (
            "float32, same weights: error of the gradient, median",
            {"fused": f"{results.gradient_error():.1e}"},
        )
        errors = {"eager": results.locked.eager_error, "fused": results.locked.fused_error}
        yield "  against float64", {key: f"{median(e.values()):.1e}" for key, e in errors.items() if e}


def _cost(results: Results) -> Iterator[_Row]:
    if cost := results.cost:
        for what, times in (("gates alone", cost.gates_ms), ("whole network", cost.network_ms)):
            for layout in LAYOUTS:
                yield f"{what}, {layout}: ms a step", {key: f"{ms:.1f}" for key, ms in times[layout].items()}
        for what, kept in (("gates alone", cost.gates_bytes), ("whole network", cost.network_bytes)):
            yield f"{what}: MiB kept for backward", {key: f"{n / 2**20:.2f}" for key, n in kept.items()}
