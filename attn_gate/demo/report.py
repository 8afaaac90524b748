"""report.html: one file that needs nothing else, light and dark, for a desk and for a phone."""

from __future__ import annotations

import base64
import math
from html import escape
from pathlib import Path

from attn_gate.demo import dataset, train
from attn_gate.demo.compare import FLOAT64_STEPS, TRUTH_EVERY
from attn_gate.demo.figures import Drawn
from attn_gate.demo.measure import LAYOUTS, REPEATS, Cost
from attn_gate.demo.results import Results

_ALT = {
    "attention": "CT slice with contours and the attention map of every gate at several moments of the training",
    "segmentation": "CT close-up of every patient with the experts' and both predicted contours, attention map below",
    "difference_float64": "Difference of the losses of two float64 runs, step by step",
    "difference_locked": "Relative error of loss and gradient at the same weights, step by step",
    "difference_free": "Difference of the losses of free float32 runs, step by step",
    "learning_loss": "Training loss of the free runs",
    "learning_dice": "Dice of the free runs on held-out slices",
    "cost_time": "Bars: milliseconds of one training step, gates alone and whole network",
    "cost_memory": "Bars: MiB kept for the backward pass, gates alone and whole network",
}


def page(results: Results, figures: dict[str, Drawn]) -> str:
    """The whole page as HTML; sections without figures are left out."""
    sections = [
        _head(results),
        _notes(results),
        _numbers(results),
        _attention(results, figures),
        _segmentation(results, figures),
        _same_numbers(results, figures),
        _learning(results, figures),
        _cost(results, figures),
        _method(results),
        f"<footer><p>{escape(results.source)}</p><p>Numbers: <code>metrics.csv</code>, <code>env.json</code>. "
        "A demonstration of software; nothing here is a statement about diagnosis or treatment.</p></footer>",
    ]
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>attn_gate demo</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def _head(results: Results) -> str:
    images = "synthetic images" if results.synthetic else "lung CT"
    return (
        "<header><h1>An attention gate learns where to look</h1>"
        f'<p class="lead">A small Attention U-Net learns to outline tumours in {images}, once with eager PyTorch gates '
        "and once with fused ones: the same weights at the start, the same batches. What do the gates learn, do both "
        "compute the same, and what does each cost?</p></header>"
    )


def _notes(results: Results) -> str:
    notes = []
    if results.synthetic:
        notes.append("<b>Synthetic images.</b> They were drawn by a program; none of this is a patient.")
    else:
        notes.append(
            f"<b>Images:</b> {escape(results.source)}. Scores are on held-out slices of the same patients: they say "
            "that the network learns, not that it would work on anybody else, and claim nothing clinical."
        )
    if results.fused_backend == "eager":
        notes.append("<b>No fused operator can be used here</b>, so both sides are eager: see `attn_gate info`.")
    if results.interrupted:
        notes.append("<b>Interrupted.</b> The page shows what was finished by then.")
    return "".join(f'<p class="note">{note}</p>' for note in notes)


def _numbers(results: Results) -> str:
    cards = []
    dice = results.final_dice()
    if "eager" in dice and "fused" in dice:
        cards.append(("Dice, held-out slices", f"{dice['fused']:.3f}", f"fused; eager {dice['eager']:.3f}"))
    if results.float64.difference:
        cards.append(("float64 losses differ by", f"{max(results.float64.difference):.0e}", "at most, fused against eager"))
    if results.locked:
        cards.append(("float32 gradients differ by", f"{results.gradient_error():.0e}", "median, at the same weights"))
    if cost := results.cost:
        less = cost.gates_bytes["eager"] / max(cost.gates_bytes["fused"], 1)
        cards.append(("Gates, memory for backward", f"{less:.2g}×", "less than eager"))
        gates, network = (values["contiguous"] for values in (cost.gates_ms, cost.network_ms))
        faster, whole = (values["eager"] / values["fused"] for values in (gates, network))
        cards.append(("Gates, time of a step", f"{faster:.2g}×", f"faster; whole network {whole:.2f}×"))
    items = "".join(f"<div><dt>{dt}</dt><dd>{dd}<small>{small}</small></dd></div>" for dt, dd, small in cards)
    return f'<dl class="numbers">{items}</dl>' if cards else ""


def _attention(results: Results, figures: dict[str, Drawn]) -> str:
    if "attention" not in figures:
        return ""
    caption = (
        "<b>Read from left to right.</b> Before training the maps are flat or random; with the loss falling, the finest "
        "gate brightens on the tumour and little else, while the coarser ones pick up where in the chest they are. "
        "Each row has one colour scale, from the smallest to the largest α that its gate reaches in it."
    )
    return (
        "<section><h2>The maps learn</h2><p>A gate multiplies every voxel of a skip connection by α between 0 and 1. "
        "Nobody tells it where the tumour is: its only teacher is the loss of the final contour.</p>"
        + _figure("attention", figures, caption, scroll="scroll")
        + "</section>"
    )


def _segmentation(results: Results, figures: dict[str, Drawn]) -> str:
    if "segmentation" not in figures:
        return ""
    caption = (
        "<b>Held-out slices</b>, of each patient the one with most tumour. The dashed contour (eager) and the solid one "
        "(fused) come from two separate trainings: where they part, they do so by as much as two eager runs would."
    )
    return (
        "<section><h2>What comes out</h2>"
        + _figure("segmentation", figures, caption, scroll="scroll low")
        + _dice_table(results)
        + "</section>"
    )


def _dice_table(results: Results) -> str:
    scored = {key: run for key, run in results.runs.items() if run.dice}
    head = "".join(f"<th>{escape(name)}</th>" for name in results.patients)
    rows = []
    for key, run in scored.items():
        last = run.dice[max(run.dice)]
        cells = "".join(f"<td>{'–' if math.isnan(d) else f'{d:.3f}'}</td>" for d in last.patients)
        rows.append(f'<tr><th class="{key}">{escape(run.name)}</th><td>{last.pooled:.3f}</td>{cells}</tr>')
    return (
        f'<div class="table"><table><thead><tr><th>Dice</th><th>pooled</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _same_numbers(results: Results, figures: dict[str, Drawn]) -> str:
    captions = {
        "difference_float64": (
            f"<b>In float64</b> rounding is negligible and the two programs agree to the last bits over {FLOAT64_STEPS} "
            "steps: the fused gates compute the same function and the same gradients. (Plain gradient descent: Adam's "
            "division would blow up the rounding of vanishing gradients.)"
        ),
        "difference_locked": (
            "<b>In float32, step-locked:</b> at every step both get the same weights and the same batch, so nothing "
            f"accumulates. Circles and crosses, every {TRUTH_EVERY} steps: how far each is from a float64 network at "
            "these weights. Equal heights mean that fused rounds no worse than eager."
        ),
        "difference_free": (
            "<b>In float32, running free,</b> last-bit differences grow, as in any chaotic system. The dashed line is "
            "eager PyTorch against itself on another number of threads: the noise floor. Fused drifts no "
            "further than that."
        ),
    }
    panels = [_figure(name, figures, caption) for name, caption in captions.items() if name in figures]
    if not panels:
        return ""
    return (
        "<section><h2>Do both compute the same?</h2><p>Yes, up to rounding. But in float32 the order of a sum decides "
        "its last bit, and training amplifies that, so two free runs alone would prove nothing. Hence three "
        f'comparisons.</p><div class="panels">{"".join(panels)}</div></section>'
    )


def _learning(results: Results, figures: dict[str, Drawn]) -> str:
    captions = {
        "learning_loss": "Cross entropy + Dice loss of each step's batch, running mean.",
        "learning_dice": "All held-out slices of all patients together, running average of the weights.",
    }
    panels = [_figure(name, figures, caption) for name, caption in captions.items() if name in figures]
    if not panels:
        return ""
    return f'<section><h2>Learning curves</h2><div class="panels">{"".join(panels)}</div></section>'


def _cost(results: Results, figures: dict[str, Drawn]) -> str:
    if results.cost is None:
        return ""
    cost = results.cost
    shares = " and ".join(f"<b>{100 * cost.gate_share(layout):.0f} %</b> ({layout})" for layout in LAYOUTS)
    kept = 100 * cost.gates_bytes["eager"] / cost.network_bytes["eager"]
    captions = {
        "cost_time": f"Forward + backward, batch of {results.batch}, {results.environment()['threads']} threads, medians of "
        f"{REPEATS} rounds in which all programs take turns; maps contiguous (PyTorch's default) and channels last. "
        "<b>The two scales differ.</b>",
        "cost_memory": "What autograd keeps from forward to backward, each storage once, without parameters and without "
        "the gates' inputs x and g, which the network holds anyway. <b>The two scales differ.</b>",
    }
    panels = "".join(_figure(name, figures, caption) for name, caption in captions.items() if name in figures)
    return (
        "<section><h2>What does it cost?</h2><p>A faster gate makes the whole network only a little faster, for the gates "
        f"are a part of it. Here they take {shares} of the eager network's step, and {kept:.0f} % of what it keeps for "
        "the backward pass. In small networks the share of the time is 10 to 28 %.</p>"
        f'<div class="panels">{panels}</div>{_cost_table(cost)}</section>'
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
    rows = "".join(
        f"<tr><th>{name}</th><td>{values['eager'] / scale:.2f} {unit}</td><td>{values['fused'] / scale:.2f} {unit}</td>"
        f"<td>{values['eager'] / max(values['fused'], 1e-9):.2f}</td></tr>"
        for name, unit, values, scale in lines
    )
    return (
        '<div class="table"><table><thead><tr><th></th><th class="eager">eager</th><th class="fused">fused</th>'
        f"<th>eager / fused</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _method(results: Results) -> str:
    environment = results.environment()
    facts = {
        "Images": f"{len(results.patients)} {'synthetic volumes' if results.synthetic else 'patients'}, pixels of "
        f"{dataset.PIXEL_MM:g} mm, {dataset.SIZE} × {dataset.SIZE}; a slice and its two neighbours are the three channels",
        "Split": f"every {dataset.EVERY}th slab of {dataset.SLAB} slices is held out, with a guard slice on either side: "
        f"{results.training_slices} slices to train on, {len(results.held_out)} held out, of the same patients",
        "Network": f"AttentionUNet, channels {train.CHANNELS}, same-grid gates without norm of their own",
        "Training": f"{results.steps} steps, batch {results.batch}, Adam, learning rate {train.LEARNING_RATE:g} falling to "
        f"{train.LAST_LEARNING_RATE:g}, cross entropy + Dice loss, mirroring and shifts, running average of the weights",
        "Fused gates": f"backend {results.fused_backend}",
        "Machine": f"{environment['processor']}, {environment['threads']} threads, {environment['instructions']}",
        "Software": f"attn_gate {environment['attn_gate']}, torch {environment['torch']}, Python {environment['python']}",
        "Made": f"{environment['date']}, in {sum(results.seconds.values()):.0f} s",
    }
    rows = "".join(f"<tr><th>{name}</th><td>{escape(fact)}</td></tr>" for name, fact in facts.items())
    return f'<section><h2>How it was made</h2><div class="table"><table class="facts">{rows}</table></div></section>'


def _figure(name: str, figures: dict[str, Drawn], caption: str, scroll: str = "") -> str:
    drawn = figures[name]
    picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data(drawn.dark)}">'
        f'<img alt="{escape(_ALT[name])}" src="{_data(drawn.light)}"></picture>'
    )
    if scroll:
        picture = f'<div class="{scroll}" tabindex="0">{picture}</div>'
    return f'<figure class="{"wide" if scroll else "panel"}">{picture}<figcaption>{caption}</figcaption></figure>'


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
