"""report.html: what a run found, for people; one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from attn_gate.page import document as page
from attn_gate.page.theme import Drawn

from . import baseline, gains, machine, modelled, tables
from .charts import FIGURES
from .providers import PROVIDERS, PYTORCH
from .registry import Config, grid_text
from .results import Results

Figures = Mapping[str, Drawn]

_COLUMNS = {"eager": "eager", "attn_gate": "fused"}  # classes of columns


def html(results: Results, figures: Figures) -> str:
    """The whole page; a section without content is left out."""
    grids = list(tables.grids(results))
    sections = (
        page.header(
            "attn_gate, measured",
            "Attention gates as fused operators, against the same in eager PyTorch and what else one would "
            "use: the same numbers, side by side. What doesn't match float64 has no time here.",
        ),
        page.notes(_notes(results)),
        page.numbers(_headlines(results)),
        _compared(results.compared),
        _speed(results, grids, figures),
        _networks(results, figures),
        _memory(results, grids, figures),
        _scaling(figures),
        _problems(results),
        _modelled(results, figures),
        _method(results),
    )
    footer = """<p>All numbers, all samples: <code>results.json</code>, <code>results.csv</code>. A colour is
the same program in every figure; thin lines across the ends of bars: 95 % intervals of the medians, of fewer
than six samples their range. The fastest of PyTorch's own: eager, eager in channels last, torch.compile, of
those that were measured and match. Means are of what attn_gate fuses: what it leaves to PyTorch's layers is
said beside them.</p>"""
    return page.document("attn_gate bench", sections, footer)


def _notes(results: Results) -> Iterator[str]:
    if results.interrupted:
        yield "<b>Interrupted.</b> The page shows what was measured by then."
    facts = results.machine
    if facts["load"] > facts["cores"] / 2:
        yield f"""<b>A busy machine.</b> Others were using it when the run began (load {facts["load"]:.1f} on
        {facts["cores"]} cores): times don't mean much."""
    if earlier := tables.earlier_note(results):
        yield f"<b>Several runs.</b> {earlier}"
    if results.settings.get("quick"):
        yield "<b>A quick run</b> of few gates. The full one: <code>python -m attn_gate bench</code>."


def _headlines(results: Results) -> Iterator[tuple[str, str, str]]:
    for kind, name in (("gate", "Gates"), ("network", "Whole networks")):
        for mode, title in (("inference", "inference"), ("step", "training step")):
            configs = [config for config in results.configs.values() if config.kind == kind]
            for over, whose in ((("eager",), "eager's speed"), (PYTORCH, "the fastest of PyTorch's own")):
                if found := gains.gain(results, configs, mode, over):
                    said = f"{whose}, geometric mean; {gains.span(found.fused)}, {len(found.fused)} of them"
                    said += f", {found.without}" if found.left else ""
                    yield f"{name}, {title}", f"{found.mean:.2f}×", said
    kept = [
        (results.find(name, "step", "eager"), results.find(name, "step", "attn_gate"))
        for name, config in results.configs.items()
        if config.kind == "gate"
    ]
    kept = [(eager.kept_bytes, ours.kept_bytes) for eager, ours in kept if eager and ours and ours.kept_bytes]
    if kept:
        less = sum(eager for eager, _ in kept) / sum(ours for _, ours in kept)
        yield "Gates, kept for backward", f"{less:.2g}× less", "than eager, all gates together"


def _speed(results: Results, grids: list[tables.Grid], figures: Figures) -> str:
    captions = {
        "speed_inference": "<b>Bars: attn_gate.</b> Marks: the others, in their place on the same scale.",
        "speed_step": "<b>Forward and backward</b>, batch norms in training mode where the gate has them.",
    }
    return page.section(
        "How fast?",
        """Each line is one gate: one level of one network, finest first. To the right of 1 is faster than
        eager PyTorch. Fine levels are bound by memory, and there fusion pays; deep ones by arithmetic."""
        + _kept_memory(results),
        _panels(captions, figures)
        + _sizes(results)
        + "".join(_table(grid) for grid in grids if "MiB" not in grid.title),
    )


def _kept_memory(results: Results) -> str:
    """How much of the speed is kept memory's; empty where that wasn't measured."""
    shares = []
    configs = [config for config in results.configs.values() if config.kind == "gate"]
    for mode, title in (("inference", "inference"), ("step", "a training step")):
        if found := gains.gain(results, configs, mode, ("attn_gate-unkept",)):
            plural = "s" if len(found.fused) > 1 else ""
            shares.append(f"{found.mean:.2f} times in {title} of {len(found.fused)} gate{plural}")
    if not shares:
        return ""
    return f""" Part of the speed is kept memory (<code>attn_gate.keep_memory</code>): {" and ".join(shares)},
    over results from PyTorch's allocator, in the geometric mean."""


def _sizes(results: Results) -> str:
    """What the names of configs stand for."""
    rows = []
    for name, config in results.configs.items():
        cells = [config.title, config.shape_text, "", ""]
        if isinstance(config, Config):
            g = f"{config.batch} × {config.gating} × {grid_text(config.gating_size)}"
            cells[2:] = [g, str(config.inter)]
        rows.append(("name", name, cells))
    head = ["", "what it is", "x, or the image", "g", "channels between"]
    content = page.table(head, rows, {"what it is": "text"})
    return page.details("Sizes of the gates and networks", content) if rows else ""


def _networks(results: Results, figures: Figures) -> str:
    captions = {
        "network_inference": "<b>Inference.</b>",
        "network_step": "<b>Forward and backward</b>, without an optimizer, which costs the same for all.",
    }
    lines = []
    networks = [config for config in results.configs.values() if config.kind == "network"]
    for mode, title in (("inference", "inference"), ("step", "training step")):
        for config in networks:
            found = [results.find(config.name, mode, provider) for provider in ("eager", "attn_gate")]
            if all(found):
                cells = [tables.time_and_spread(row) for row in found]
                cells += [tables.mebibytes(row.peak_bytes) for row in found]
                lines.append((title, config.name, [config.shape_text, *cells]))
    head = ["", "image", "ms before", "ms after", "peak MiB before", "peak MiB after"]
    table = page.table(head, _rows(lines)) + _legend(tables.legend(lines)) if lines else ""
    return page.section(
        "Whole networks",
        """Gates are a part of a network, so a network gains less than a gate. Before and after
        <code>attn_gate.fuse_gates(model)</code>: times, and the most that tensors of a call hold at once.""",
        table + _panels(captions, figures),
    )


def _memory(results: Results, grids: list[tables.Grid], figures: Figures) -> str:
    captions = {
        "memory_kept": """What autograd keeps from forward to backward, each storage once, beyond x, g and the
        parameters, which the network holds anyway. <b>Logarithmic.</b>""",
        "memory_peak": """The most that tensors made in forward and backward hold at one time, gradients
        included. <b>Logarithmic.</b>""",
    }
    content = _panels(captions, figures) + "".join(_table(grid) for grid in grids if "MiB" in grid.title)
    if results.fits:
        rows = [
            (
                "fused" if PROVIDERS[fit["provider"]].name.startswith("attn_gate") else "eager",
                f"{fit['config']}, {PROVIDERS[fit['provider']].title}",
                [
                    f"{fit['limit_bytes'] / 2**30:g} GiB",
                    str(fit["batch"]),
                    tables.mebibytes(fit["bytes"]),
                    tables.mebibytes(fit["more_bytes"]),
                ],
            )
            for fit in results.fits
        ]
        head = ["Largest batch that fits", "memory", "batch", "MiB", "MiB of one more"]
        content += page.table(head, rows)
    return page.section("How much memory?", "", content)


def _scaling(figures: Figures) -> str:
    captions = {
        "scaling_size_inference": "Shaded: quartiles.",
        "scaling_size_step": """The dotted line grows with the number of voxels: what runs along it takes as
        long for a voxel of a large map as for one of a small map, what leaves it upwards takes longer.""",
        "scaling_channels_inference": "The dotted line grows with the square of the channels, as work does.",
        "scaling_channels_step": "The memory limit grows with the channels only.",
        "scaling_threads": """The thin line is as many times the speed as there are threads. What is bound by
        memory gains less.""",
        "roofline": """Up is faster. Left of the bend memory is the limit, right of it arithmetic. Both roofs
        were measured in this run, as PyTorch's copy of a large buffer and PyTorch's best product of float32
        matrices; points may exceed them: small maps stay in caches, and others may multiply faster.""",
    }
    return page.section("How does it scale?", "", _panels(captions, figures))


def _compared(compared: dict[str, Any] | None) -> str:
    if compared is None:
        return ""
    lines = []
    for row in compared["rows"]:
        change = f"{row['change']:+.1%} ±{row['noise']:.1%}"
        cells = [change, f"{row['before_ms']:.2f} → {row['now_ms']:.2f}"]
        lines.append((row["verdict"], baseline.title(row, compared["threads"]), cells))
    caution = baseline.cautions(compared)
    text = f"<b>{_sentence(caution)}</b> " if caution else ""
    text += _sentence(baseline.machines_change(compared))
    text += f" {_sentence(remark)}" if (remark := baseline.together(compared)) else ""
    since = escape(compared["baseline"][:16].replace("T", " "))
    content = "<p>The runs have no row of attn_gate in common.</p>"
    if lines:
        content = page.table(["", "change of time", "ms"], _rows(lines, kind=""))
    return page.section(f"Since {since}", text, content)


def _sentence(text: str) -> str:
    return f"{escape(text[0].upper() + text[1:])}."


def _problems(results: Results) -> str:
    remarks = "".join(f"<li>{escape(str(remark))}</li>" for remark in tables.remarks(results))
    return page.section("Not measured", "", f"<ul>{remarks}</ul>" if remarks else "")


def _modelled(results: Results, figures: Figures) -> str:
    names = {name: "" for name in ("modelled_inference", "modelled_step")}
    text = f"""<b>{modelled.LABEL.capitalize()}.</b> What rooflines say about gates without norms: each kernel
    takes as long as its traffic or its operations at the data sheet's rates. Launches, caches and imperfect
    kernels are left out, on both sides. On your own GPU measure:
    <code>python -m attn_gate bench --device cuda</code>."""
    return page.section("On GPUs, by a model", text, _panels(names, figures))


def _method(results: Results) -> str:
    facts = {name.replace("_", " "): str(value) for name, value in results.machine.items()}
    outliers = sum(row.summary.outliers for row in results.rows if row.times_ms)
    samples = sum(len(row.times_ms) for row in results.rows)
    about = {
        "Made": f"{results.started[:16].replace('T', ' ')} UTC",
        "Machine": machine.sentence(results.machine),
        "Command": f"python -m attn_gate {' '.join(results.settings.get('command', []))}",
        "Samples": f"{samples} in {len(results.rows)} rows; {outliers} outliers, kept: medians don't mind",
        **facts,
    }
    return page.section("How it was made", "", page.facts(about))


def _table(grid: tables.Grid) -> str:
    head = ["", *(PROVIDERS[name].title for name in grid.columns)]
    table = page.table(head, _rows(grid.lines), _COLUMNS)
    return page.details(escape(grid.title), _legend(grid.legend) + table)


def _legend(text: str) -> str:
    return f'<p class="legend">{escape(text)}.</p>' if text else ""


def _rows(
    lines: Iterable[tuple[str, str, list[str]]], kind: str = "name"
) -> Iterator[tuple[str, str, Sequence[page.Cell]]]:
    """Of a page's table, from (heading, name, cells): a heading where it changes, spreads in small type."""
    before = ""
    for head, name, cells in lines:
        if head != before:
            yield "", head, ()
        before = head
        yield kind, name, [_cell(text) for text in cells]


def _cell(text: str) -> page.Cell:
    number, sign, spread = text.partition(" ±")
    return (number, f"±{spread}") if sign else text


def _panels(captions: Mapping[str, str], figures: Figures) -> str:
    return page.panels(
        page.figure(figures.get(name), FIGURES[name][1], caption) for name, caption in captions.items()
    )
