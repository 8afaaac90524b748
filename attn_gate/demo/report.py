"""report.html: one file that needs nothing else, light and dark, for a desk and for a phone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from attn_gate.demo import dataset, train
from attn_gate.demo.compare import TRUTH_EVERY
from attn_gate.demo.measure import LAYOUTS, REPEATS, Cost
from attn_gate.demo.results import Results
from attn_gate.page.document import document, facts, figure, header, notes, numbers, panels, section, table
from attn_gate.page.theme import Drawn

Figures = dict[str, Drawn]

_ALT = {
    "attention": "CT slice with contours, and every gate's attention map, at several moments of the training",
    "segmentation": "CT close-ups with the experts' and both predicted contours, and attention maps",
    "difference_float64": "Difference of the losses of two float64 runs, step by step",
    "difference_locked": "Relative error of loss and gradient at the same weights, step by step",
    "difference_free": "Difference of the losses of free float32 runs, step by step",
    "learning_loss": "Training loss of the free runs",
    "learning_dice": "Dice of the free runs on held-out slices",
    "cost_time": "Bars: milliseconds of one training step, gates alone and whole network",
    "cost_memory": "Bars: MiB kept for the backward pass, gates alone and whole network",
}


def page(results: Results, figures: Figures) -> str:
    """The whole page as HTML; a section without figures is left out."""
    sections = (
        _head(results),
        _notes(results),
        numbers(_headlines(results)),
        _attention(figures),
        _segmentation(results, figures),
        _same_numbers(results, figures),
        _learning(figures),
        _cost(results, figures),
        _method(results),
    )
    footer = f"""<p>{escape(results.source)}</p>
<p>All numbers: <code>metrics.csv</code>, <code>env.json</code>. A demonstration of software: nothing here is
a statement about diagnosis or treatment.</p>"""
    return document("attn_gate demo", sections, footer)


def _head(results: Results) -> str:
    images = "synthetic images" if results.synthetic else "lung CT"
    return header(
        "An attention gate learns where to look",
        f"""A small Attention U-Net learns to outline tumours in {images}, once with eager PyTorch gates
and once with fused ones: the same weights at the start, the same batches. What do the gates learn, do both
compute the same, and what does each cost?""",
    )


def _notes(results: Results) -> str:
    if results.synthetic:
        texts = ["<b>Synthetic images.</b> They were drawn by a program; none of this is a patient."]
    else:
        texts = [
            f"""<b>Images:</b> {escape(results.source)}. Scores are on held-out slices of the same patients:
            they say that the network learns, not that it would work on anybody else, and claim nothing
            clinical."""
        ]
    if results.fused_backend == "eager":
        texts.append("<b>Both sides are eager here:</b> no fused operator can be used, or eager was forced.")
    if results.interrupted:
        texts.append("<b>Interrupted.</b> The page shows what was finished by then.")
    return notes(texts)


def _headlines(results: Results) -> Iterator[tuple[str, str, str]]:
    dice = results.final_dice()
    if "eager" in dice and "fused" in dice:
        yield "Dice, held-out slices", f"{dice['fused']:.3f}", f"fused; eager {dice['eager']:.3f}"
    if results.float64.difference:
        yield "float64 losses", f"{max(results.float64.difference):.0e}", "largest difference, fused to eager"
    if results.locked:
        yield "float32 gradients", f"{results.gradient_error():.0e}", "relative difference, same weights"
    if cost := results.cost:
        less = cost.gates_bytes["eager"] / max(cost.gates_bytes["fused"], 1)
        yield "Gates, kept for backward", f"{less:.2g}× less", "memory than eager"
        for name, times in (("Gates", cost.gates_ms), ("Whole network", cost.network_ms)):
            speed = times["contiguous"]["eager"] / times["contiguous"]["fused"]
            yield f"{name}, step", f"{speed:.2f}×", "eager's speed (contiguous)"


def _attention(figures: Figures) -> str:
    caption = """<b>Read from left to right.</b> Before training the maps are all but flat. As the network
    learns, they take shape: the finest gate usually brightens on the tumour, the coarser ones show where in
    the chest the network looks. Each row has one colour scale, from the smallest to the largest α in it."""
    return section(
        "The maps learn",
        """A gate multiplies every voxel of a skip connection by an α between 0 and 1. Nobody tells it where
        the tumour is: its only teacher is the loss of the final contour.""",
        _figure("attention", figures, caption, scroll="scroll"),
    )


def _segmentation(results: Results, figures: Figures) -> str:
    caption = """<b>Held-out slices</b>, of each patient the one with most tumour. The dashed contour (eager)
    and the solid one (fused) come from two separate trainings: the table says how far two eager ones part."""
    picture = _figure("segmentation", figures, caption, scroll="scroll low")
    return section("What comes out", "", picture and picture + _dice_table(results))


def _dice_table(results: Results) -> str:
    rows = []
    for key, run in results.runs.items():
        if run.dice:
            last = run.dice[max(run.dice)]
            values = (last.pooled, *last.patients)
            rows.append((key, run.name, ["–" if math.isnan(d) else f"{d:.3f}" for d in values]))
    return _table(["Dice", "all slices", *results.patients], rows)


def _same_numbers(results: Results, figures: Figures) -> str:
    captions = {
        "difference_float64": f"""<b>In float64</b> rounding is negligible: over
        {len(results.float64.eager)} steps the losses of two programs with the same function and the same
        gradients stay together to the last bits. (Plain gradient descent: Adam's division would blow up the
        rounding of vanishing gradients.)""",
        "difference_locked": f"""<b>In float32, step-locked:</b> at every step both get the same weights and
        the same batch, so nothing accumulates. Circles and crosses, every {TRUTH_EVERY} steps: how far each
        is from a float64 network at these weights; where they coincide, fused rounds no worse than eager.
        Spikes are steps at which rounding turned the choice of a max pool or a ReLU.""",
        "difference_free": """<b>In float32, running free,</b> differences in the last bit grow, as in any
        chaotic system. Dashed, the noise floor: eager PyTorch against itself on another number of
        threads.""",
    }
    verdict = "Yes, up to rounding." if results.agree else "<b>No: run python -m attn_gate verify.</b>"
    return section(
        "Do both compute the same?",
        f"""{verdict} In float32 the order of a sum decides its last bit, and training amplifies
        that, so two free runs alone would prove nothing. Hence three comparisons.""",
        _panels(captions, figures),
    )


def _learning(figures: Figures) -> str:
    captions = {
        "learning_loss": "Cross entropy + Dice loss of each step's batch, running mean.",
        "learning_dice": "All held-out slices of all patients together, running average of the weights.",
    }
    return section("Learning curves", "", _panels(captions, figures))


def _cost(results: Results, figures: Figures) -> str:
    if results.cost is None:
        return ""
    cost = results.cost
    shares = " and ".join(f"<b>{100 * cost.gate_share(layout):.0f} %</b> ({layout})" for layout in LAYOUTS)
    kept = 100 * cost.gates_bytes["eager"] / cost.network_bytes["eager"]
    captions = {
        "cost_time": f"""Forward + backward, batch of {results.batch}, medians of {REPEATS} rounds in which
        all programs take turns; maps contiguous (PyTorch's default) and channels last (used for the training
        here). <b>The two scales differ.</b>""",
        "cost_memory": """What autograd keeps from forward to backward, each storage once, without
        parameters, the batch, and the gates' inputs x and g, which the network holds anyway. <b>The two
        scales differ.</b>""",
    }
    return section(
        "What does it cost?",
        f"""A faster gate makes the whole network only a little faster, for the gates are a part of it: here
        {shares} of the time of the eager network's step, and {kept:.0f} % of what it keeps for the backward
        pass. Other small networks spend 10 to 28 % of their time in gates.""",
        _panels(captions, figures) + _cost_table(cost),
    )


def _cost_table(cost: Cost) -> str:
    lines = [
        (f"{what}, {layout}", "ms", values[layout], 1.0)
        for what, values in (("gates alone", cost.gates_ms), ("whole network", cost.network_ms))
        for layout in LAYOUTS
    ]
    lines += [
        ("gates alone, kept", "MiB", cost.gates_bytes, 2**20),
        ("whole network, kept", "MiB", cost.network_bytes, 2**20),
    ]
    rows = []
    for name, unit, values, scale in lines:
        cells = [f"{values[program] / scale:.3g} {unit}" for program in ("eager", "fused")]
        rows.append(("", name, [*cells, f"{values['eager'] / max(values['fused'], 1e-9):.2f}"]))
    return _table(["", "eager", "fused", "eager / fused"], rows)


def _method(results: Results) -> str:
    env = results.environment()
    kind = "synthetic volumes" if results.synthetic else "patients"
    about = {
        "Images": f"""{len(results.patients)} {kind}, pixels of {dataset.PIXEL_MM:g} mm, {dataset.SIZE} ×
        {dataset.SIZE}; a slice and its two neighbours are the three channels""",
        "Split": f"""every {dataset.EVERY}th slab of {dataset.SLAB} slices is held out, with a guard slice on
        either side: {results.training_slices} slices to train on, {len(results.held_out)} held out, of the
        same {kind}""",
        "Network": f"""AttentionUNet, channels {train.CHANNELS}, {env["parameters"]:,} parameters; same-grid
        gates without norms of their own""",
        "Training": f"""{results.steps} steps, batch {results.batch}, Adam, learning rate
        {train.LEARNING_RATE:g} falling to {train.LAST_LEARNING_RATE:g}, cross entropy + Dice loss, mirroring
        and shifts, running average of the weights""",
        "Fused gates": f"backend {results.fused_backend}",
        "Machine": f"{env['processor']}, {env['threads']} threads, {env['instructions']}",
        "Software": f"attn_gate {env['attn_gate']}, torch {env['torch']}, Python {env['python']}",
        "Made": f"{env['date'][:16].replace('T', ' ')}, in {sum(results.seconds.values()):.0f} s",
    }
    return section("How it was made", "", facts(about))


def _table(head: list[str], rows: list[tuple[str, str, list[str]]]) -> str:
    """A table whose columns "eager" and "fused" have their colours."""
    return table(head, rows, {"eager": "eager", "fused": "fused"})


def _panels(captions: dict[str, str], figures: Figures) -> str:
    return panels(_figure(name, figures, caption) for name, caption in captions.items())


def _figure(name: str, figures: Figures, caption: str, scroll: str = "") -> str:
    return figure(figures.get(name), _ALT[name], caption, scroll)
