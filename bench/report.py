"""The tables that `python -m attn_gate bench` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.table import Table
from rich.text import Text

from attn_gate.bench.providers import PROVIDERS, Provider
from attn_gate.bench.results import Results, Row

OURS = "attn_gate"
NOISY = 0.25  # of the median, between the quartiles: above, a time gets a mark


def tables(results: Results, providers: Iterable[Provider]) -> list[Table | Text]:
    """Times, attn_gate's speed-ups, and memory, as far as they were measured, and a remark for what wasn't."""
    measured = {row.provider for row in results.rows if row.times_ms}
    shown = [p for p in providers if p.name in measured]
    if not shown:
        return remarks(results)
    parts: list[Table | Text] = [_times(results, shown)]
    others = [p for p in shown if p.name != OURS]
    if OURS in measured and others:
        parts.append(_speedups(results, others))
    if any(row.kept_bytes is not None or row.peak_bytes is not None for row in results.rows):
        parts.append(_memory(results, [p for p in shown if p.name != "limit"]))
    return parts + remarks(results)


def remarks(results: Results) -> list[Text]:
    """One line for everything that has no time, equal reasons together."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in results.rows:
        if row.status != "measured":
            reasons.setdefault((row.provider, row.status, row.note), []).append(f"{row.config} {row.mode}")
    lines = []
    for (provider, status, note), where in reasons.items():
        places = "" if status == "unavailable" else f" at {', '.join(where)}"
        style = "dim" if status == "unavailable" else "bold red"
        lines.append(Text(f"{provider}: {status}{places}: {note}", style=style))
    return lines


def line(results: Results, config: str, mode: str) -> str:
    """One case in one line, for logs: times in milliseconds."""
    rows = [row for row in results.rows if (row.config, row.mode) == (config, mode) and row.times_ms]
    return f"{config} {mode}: " + ", ".join(f"{row.provider} {_milliseconds(row)}" for row in rows)


def _times(results: Results, shown: list[Provider]) -> Table:
    caption = (
        f"~ quartiles more than {NOISY:.0%} of the median apart: a noisy machine" if _any_noisy(results) else None
    )
    title = f"Milliseconds, median, {results.machine['threads']} threads"
    return _by_provider(results, shown, title, lambda row: _milliseconds(row), caption)


def _speedups(results: Results, others: list[Provider]) -> Table:
    def cell(row: Row) -> str:
        speedup = results.speedup(row.config, row.mode, OURS, over=row.provider)
        if speedup is None:
            return ""
        # No gate can beat the limit: the other way round it reads better.
        return f"{1 / speedup:.2f}x limit" if row.provider == "limit" else f"{speedup:.2f}x"

    return _by_provider(results, others, "How many times faster attn_gate is; its time relative to the memory limit", cell)


def _memory(results: Results, shown: list[Provider]) -> Table:
    def cell(row: Row) -> str:
        if row.peak_bytes is None:
            return ""
        kept = "" if row.kept_bytes is None else f"{_mebibytes(row.kept_bytes)} / "
        return kept + _mebibytes(row.peak_bytes)

    shown = [p for p in shown if any(r.provider == p.name and r.peak_bytes is not None for r in results.rows)]
    title = "MiB: (step) kept by autograd beyond x, g, parameters / peak of what a call allocates, results included"
    return _by_provider(results, shown, title, cell)


def _by_provider(
    results: Results,
    shown: list[Provider],
    title: str,
    cell: Callable[[Row], str],
    caption: str | None = None,
) -> Table:
    """A line per config and mode, a column per provider."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", title_style="bold")
    table.add_column("gate")
    for provider in shown:
        table.add_column(provider.title, justify="right", min_width=7)
    for mode in dict.fromkeys(row.mode for row in results.rows):
        configs = [c for c in results.configs if any((r.config, r.mode) == (c.name, mode) for r in results.rows)]
        for config in configs:
            rows = [results.find(config.name, mode, provider.name) for provider in shown]
            cells = ["" if row is None else cell(row) for row in rows]
            table.add_row(f"{config.name} {mode}", *cells, end_section=config is configs[-1])
    return table


def _any_noisy(results: Results) -> bool:
    return any(_noisy(row) for row in results.rows if row.times_ms)


def _noisy(row: Row) -> bool:
    q1, q3 = row.quartiles_ms
    return q3 - q1 > NOISY * row.median_ms


def _milliseconds(row: Row) -> str:
    return ("~" if _noisy(row) else "") + _three_digits(row.median_ms)


def _mebibytes(count: int) -> str:
    return _three_digits(count / 2**20)


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def provider_names() -> str:
    """For help texts."""
    return ", ".join(PROVIDERS)
