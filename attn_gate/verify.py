"""`python -m attn_gate verify`: every gate on every backend that works here, against the float64 reference.

Each operator runs the named cases of `attn_gate.cases`; AttentionGate runs its presets, with trained-looking
batch norms in eval mode. Compared are all outputs and the gradients of all inputs and parameters; the rule is
in `attn_gate.judge`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import backends, functional, reference
from .cases import CASES, LAYOUTS, OPERATORS, GateCase, channels_last
from .judge import Judgement, float32_products, judge, worst
from .module import AttentionGate

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
QUICK_DTYPES = ("float32", "bfloat16")
BACKENDS = ("cpu", "cuda", "triton")

DESCRIPTION = """\
Compare every gate, forward and all gradients, on every backend that works on this machine, in every dtype and
layout, with a float64 reference, and print one table.

A result is right if its error is at most twice that of eager PyTorch in the same dtype, plus a few units in
the last place of the largest value. The table shows, for each operator or preset, the result that comes
closest to that limit, over all cases and layouts.
"""

EPILOG = """\
examples:
  python -m attn_gate verify                                   everything, in less than a minute
  python -m attn_gate verify --quick                           float32 and bfloat16 only
  python -m attn_gate verify --dtype float64 --seed 7          other numbers
  ATEN_CPU_CAPABILITY=default python -m attn_gate verify       the kernels for old CPUs

exit code: 0 all right; 1 something is wrong; 2 it could not run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument(
        "--backend", choices=BACKENDS, nargs="+", help="only these (default: all that work here)"
    )
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", help="only these (default: all)")
    parser.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of the random numbers (default: 0)"
    )
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK_DTYPES)}")


def _seed(text: str) -> int:
    """A seed that torch.manual_seed takes."""
    try:
        seed = int(text)
    except ValueError:
        seed = None
    if seed is None or not -(2**63) <= seed < 2**64:
        raise argparse.ArgumentTypeError(f"N must be an integer from -2^63 to 2^64 - 1; got {text!r}")
    return seed


def run(args: argparse.Namespace) -> int:
    """Compare, print the table; the exit code."""
    usable = {name: reason for name, works, reason in backends.report() if not works}
    chosen = args.backend or [name for name in BACKENDS if name not in usable]
    for name in chosen:
        if name in usable:
            print(f"attn_gate verify: backend {name} can't be used: {usable[name]}", file=sys.stderr)
            return 2
    dtypes = args.dtype or (QUICK_DTYPES if args.quick else tuple(DTYPES))
    rows = [
        Row(subject, backend, dtype)
        for subject in (*OPERATORS, *MODULES)
        for backend in chosen
        for dtype in dtypes
        if not backends.BACKENDS[backend].why_not(torch.device(backends.device_of(backend)), DTYPES[dtype])
    ]
    if not rows:
        print(f"attn_gate verify: {', '.join(chosen)} can't compute {', '.join(dtypes)}", file=sys.stderr)
        return 2
    with _progress(len(rows)) as advance:
        for row in rows:
            advance(f"{row.subject}, {row.backend}, {row.dtype}")
            row.compare(args.seed)
    _print_table(rows)
    wrong = [row for row in rows if not row.ok]
    count = sum(row.count for row in rows)
    for row in wrong:
        print(f"WRONG: {row.subject}, {row.dtype}, {row.backend}: {row.explain()}")
    if wrong:
        print(f"{len(wrong)} of {len(rows)} are wrong. Please report it, with `python -m attn_gate info`.")
        return 1
    print(f"All {count} results match the float64 reference ({', '.join(chosen)}; seed {args.seed}).")
    return 0


# --------------------------------------------------------------------------------------------- comparison


@dataclass
class Row:
    """A line of the table: an operator or a preset on one backend in one dtype, over all cases and layouts.

    Attributes:
        worst, where: the result closest to its tolerance or furthest beyond it; case and layout of it.
        count: compared results.
        error: message of an exception that ended the comparison, else empty.
    """

    subject: str
    backend: str
    dtype: str
    worst: Judgement | None = None
    where: str = ""
    count: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether everything was compared and right."""
        return not self.error and self.worst is not None and self.worst.ok

    def explain(self) -> str:
        """The worst result in words, or why there is none."""
        if self.error or self.worst is None:
            return f"{self.error} ({self.where})" if self.error else "nothing to compare"
        name, error, tolerance = self.worst
        return f"{name} is off by {error:.1e}, allowed {tolerance:.1e} ({self.where})"

    def compare(self, seed: int) -> None:
        """Fill the row."""
        for case, variant in _variants(self.subject):
            for layout in LAYOUTS:
                where = ", ".join(filter(None, (case.name, variant.name, layout.replace("_", " "))))
                try:
                    judgements = _compare(self, case, variant, layout, seed)
                except Exception as error:  # any failure of a kernel belongs into the table
                    self.error, self.where = f"{type(error).__name__}: {error}", where
                    return
                self.count += len(judgements)
                found = worst(judgements)
                if self.worst is None or found.ratio > self.worst.ratio:
                    self.worst, self.where = found, where


@dataclass(frozen=True)
class Variant:
    """A way to call the operator that must not change its results."""

    name: str = ""
    options: dict = field(default_factory=dict)


# By preset: the cases that have its kernel, stride and resizes, and so the same parameters.
MODULES = {
    "AttentionGate paper": ("paper", ("paper 2D", "paper 3D")),
    "AttentionGate keras": ("keras", ("keras 2D", "keras 3D")),
    "AttentionGate same_grid": ("same_grid", ("same grid 2D", "same grid 3D")),
}


def _variants(subject: str) -> Iterator[tuple[GateCase, Variant]]:
    variants = [Variant()]
    if subject.startswith("attention_"):
        variants = [Variant("recompute", {"recompute": True}), Variant("store", {"recompute": False})]
    names = MODULES[subject][1] if subject in MODULES else [case.name for case in CASES]
    for case in CASES:
        if case.name in names:
            yield from ((case, variant) for variant in variants)


@float32_products()
def _compare(row: Row, case: GateCase, variant: Variant, layout: str, seed: int) -> list[Judgement]:
    """The judgements of all outputs and gradients of one call."""
    device = backends.device_of(row.backend)
    operator = "attention_gate" if row.subject in MODULES else row.subject
    inputs = case.inputs(operator, DTYPES[row.dtype], layout, seed, device)
    if row.subject in MODULES:
        gate = _module(case, MODULES[row.subject][0], inputs, seed)
        maps = {"x": inputs["x"], "g": inputs["g"]}
        ours, eager = _module_call(gate, row.backend), _module_call(gate, "eager")
        exact = _module_call(copy.deepcopy(gate).double(), "eager")
    else:
        maps, options = inputs, case.options(operator)
        ours = _function_call(
            getattr(functional, operator), backend=row.backend, **options, **variant.options
        )
        eager = exact = _function_call(getattr(reference, operator), **options)
    found = _results(ours, maps, layout, seed)
    with _one_thread():
        with _plain_pytorch(device, DTYPES[row.dtype]):
            in_dtype = _results(eager, maps, layout, seed)
        doubles = {name: None if t is None else t.double() for name, t in maps.items()}
        return judge(found, in_dtype, _results(exact, doubles, layout, seed), DTYPES[row.dtype])


def _plain_pytorch(device: str, dtype: torch.dtype) -> torch.autocast:
    """Make the reference round as PyTorch does in this dtype: by itself it takes 16-bit maps to float32."""
    sixteen_bit = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device, dtype if sixteen_bit else None, enabled=sixteen_bit)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """On maps this small a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# Takes tensors by name; returns outputs by name, and what else to differentiate by.
Call = Callable[[dict[str, Tensor | None]], tuple[dict[str, Tensor], dict[str, Tensor]]]


def _function_call(function: Callable, **options) -> Call:
    def call(tensors: dict[str, Tensor | None]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        outputs = function(**tensors, **options)
        if isinstance(outputs, tuple):
            return dict(zip(("y", "alpha"), outputs, strict=True)), {}
        return {"logits" if function.__name__.endswith("logits") else "y": outputs}, {}

    return call


def _module_call(gate: AttentionGate, backend: str) -> Call:
    gate = copy.deepcopy(gate)
    gate.backend = backend

    def call(tensors: dict[str, Tensor | None]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        y, alpha = gate(tensors["x"], tensors["g"], return_attention=True)
        return {"y": y, "alpha": alpha}, dict(gate.named_parameters())

    return call


def _results(call: Call, tensors: dict[str, Tensor | None], layout: str, seed: int) -> dict[str, Tensor]:
    """Outputs by name, and as "d NAME" the gradients of all inputs and parameters, for random slopes."""
    leaves = {k: v if v is None else v.detach().requires_grad_() for k, v in tensors.items()}
    outputs, parameters = call(leaves)
    generator = torch.Generator().manual_seed(seed)
    slopes = []
    for name, output in outputs.items():
        # Numbers that are exact in every dtype, so that all calls get the same. Those of the one-channel maps
        # have one sign, else the sums over all voxels, which gradients of parameters are, might cancel.
        lowest = -16 if name == "y" else 8
        slope = (
            torch.randint(lowest, 17, output.shape, generator=generator).to(output.device, output.dtype) / 8
        )
        slopes.append(channels_last(slope) if layout == "channels_last" else slope)
    wanted = {**{k: v for k, v in leaves.items() if v is not None}, **parameters}
    gradients = torch.autograd.grad(list(outputs.values()), list(wanted.values()), slopes)
    return {**outputs, **{f"d {name}": grad for name, grad in zip(wanted, gradients, strict=True)}}


def _module(case: GateCase, preset: str, inputs: dict[str, Tensor | None], seed: int) -> AttentionGate:
    """AttentionGate with random batch norms whose fold makes the weights of `inputs`.

    So the pre-activations are those of the case, which stay clear of relu's kink.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = AttentionGate(case.channels, case.gating, case.inter, spatial_dims=case.axes, preset=preset)
        for norm in filter(_is_norm, gate.modules()):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
    x = inputs["x"]
    gate = gate.eval().to(x.device, reference.accumulation_dtype(x))
    zero = inputs["bias"].new_zeros(case.inter)
    # Not every gate has a bias in theta; all have one in phi.
    _set_layer(
        gate.theta, gate.theta_norm, inputs["theta_weight"], zero if gate.theta.bias is not None else None
    )
    _set_layer(gate.phi, gate.phi_norm, inputs["phi_weight"], inputs["bias"])
    _set_layer(gate.psi, gate.psi_norm, inputs["psi_weight"], inputs["psi_bias"])
    return gate


@torch.no_grad()
def _set_layer(conv: nn.Module, norm: nn.Module | None, weight: Tensor, bias: Tensor | None) -> None:
    """Parameters of conv such that norm(conv(t)) is the convolution with this weight and bias."""
    if norm is not None:
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = weight / scale.view(-1, *[1] * (weight.ndim - 1))
        bias = (bias - norm.bias) / scale + norm.running_mean
    conv.weight.copy_(weight)
    if bias is not None:
        conv.bias.copy_(bias)


def _is_norm(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm)


# ------------------------------------------------------------------------------------------------- output


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function to call before each step; it moves a bar where rich is installed and someone looks."""
    try:
        from rich.progress import Progress
    except ModuleNotFoundError:
        yield lambda what: None
        return
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("", total=total, completed=-1)
        yield lambda what: progress.update(task, advance=1, description=what)


COLUMNS = (
    "",
    "compared",
    "error",
    "allowed",
    "verdict",
    "worst result (case, layout)",
)


def _lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """The cells of the table: one for a subject, then those of its rows."""
    subject = ""
    for row in rows:
        if row.subject != subject:
            subject = row.subject
            yield (subject,)
        numbers, result = ("", ""), row.error or "none"
        if row.worst is not None and not row.error:
            numbers = f"{row.worst.error:.1e}", f"{row.worst.tolerance:.1e}"
            result = f"{row.worst.name} ({row.where})"
        verdict = "right" if row.ok else "WRONG"
        yield (f"  {row.dtype}, {row.backend}", str(row.count), *numbers, verdict, result)


def _print_table(rows: Sequence[Row]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        _print_plain(rows)
        return
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS[:-1]:
        table.add_column(name, no_wrap=True, justify="right" if name in COLUMNS[1:4] else "left")
    table.add_column(COLUMNS[-1])
    styles = {"right": "green", "WRONG": "bold red"}
    for cells in _lines(rows):
        subject_style = "bold" if len(cells) == 1 else ""
        table.add_row(*(Text(cell, style=styles.get(cell, subject_style)) for cell in cells))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _print_plain(rows: Sequence[Row]) -> None:
    table = [COLUMNS, *_lines(rows)]
    widths = [max(len(line[i]) for line in table if len(line) > 1) for i in range(len(COLUMNS))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip())
