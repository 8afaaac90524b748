"""fuse_gates: the attention gates of a model made to run fused, in place; unfuse_gates undoes it."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import torch
from torch import nn

from attn_gate import backends, checks, engine, families, patch
from attn_gate.module import AttentionGate
from attn_gate.probe import Found, probe
from attn_gate.spec import Fusion

_PLANS = {
    "whole": "whole gate, one operator",
    "whole_logits": "projections to logits, and the product",
    "whole_moments": "projections and their batch norms to logits, and the product",
    "chain": "sum to product",
    "chain_logits": "sum to logits, and the product",
    "apply": "the product",
}


@dataclass(frozen=True)
class GateEntry:
    """One gate of a FusionReport; what it says about fusion is looked up at each access.

    name: the module's in the model; family: of its description, "" where none is known.
    """

    name: str
    family: str
    module: nn.Module = field(repr=False)
    refused: str = ""

    @property
    def reason(self) -> str:
        """Why the gate is left alone now; empty where it runs fused."""
        state = patch.state_of(self.module)
        if state is None:
            return self.refused or "unfuse_gates was called"
        if why := state.why_original(self.module):
            return why
        large, _ = self._fusions(state)
        if large.plan == "eager":
            mode, other = ("training", "eval") if self.module.training else ("eval", "training")
            return f"in {mode} mode its {large.reason}; in {other} mode it may run fused"
        return ""

    @property
    def fused(self) -> str:
        """What of it fused operators compute now, and why not more; empty where it is left alone."""
        state = patch.state_of(self.module)
        if state is None or self.reason:
            return ""
        if self.backend == "eager":
            return "nothing: PyTorch's operators in place of the fused ones"
        large, small = self._fusions(state)
        text = _PLANS[large.plan]
        if small != large:
            text += " where maps are large; left to PyTorch's layers where they are small"
        if large.reason:
            text += f" ({large.reason})"
        if not self.module.training and state.found.training:
            text += f"; left alone in training mode: there {state.found.training}"
        return text

    @property
    def backend(self) -> str:
        """The backend that runs it where its parameters are."""
        state, parameter = patch.state_of(self.module), next(self.module.parameters(), None)
        if state is None or parameter is None or self.reason:
            return ""
        whole = self._fusions(state)[0].plan.startswith("whole")
        return backends.choose(state.backend, parameter, "attention_gate" if whole else "gate")

    def _fusions(self, state: patch.FusedGate) -> tuple[Fusion, Fusion]:
        """For the largest maps and for small ones: of a training step, or of inference in eval mode."""
        spec, layers = state.found.spec, patch.layers_of(self.module, state.paths)
        weight = layers.theta.weight

        def of_size(n: int) -> Fusion:
            sizes = [n * s for s in spec.theta_stride], [n] * spec.spatial_dims
            x, g = (  # without memory
                weight.new_empty(()).expand(1, channels, *size)
                for channels, size in zip(state.channels, sizes, strict=True)
            )
            return engine.fusion(spec, layers, x, g, state.recompute)

        with torch.set_grad_enabled(self.module.training):
            return of_size(2**12), of_size(2)


@dataclass(frozen=True)
class FusionReport:
    """The gates of a model: `print(report)` for a table.

    It is live: a hook that is added later, a mode or a device that changes shows in what it says next.
    """

    gates: tuple[GateEntry, ...]

    @property
    def fused(self) -> dict[str, str]:
        """{module name: what of it is fused}."""
        return {gate.name: gate.fused for gate in self.gates if not gate.reason}

    @property
    def skipped(self) -> dict[str, str]:
        """{module name: why it is left alone}."""
        return {gate.name: gate.reason for gate in self.gates if gate.reason}

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            Console = None
        if Console is None or not self.gates:
            rows = [f"  {name}: {text}" for name, text in self.fused.items()]
            rows += [f"  {name}: left alone: {text}" for name, text in self.skipped.items()]
            return "\n".join([self._summary(), *rows])
        text = io.StringIO()
        Console(file=text, width=max(Console().width, 100)).print(self)
        return text.getvalue().rstrip()

    def __rich__(self):
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, title=self._summary())
        table.add_column("gate", overflow="fold", max_width=32)
        table.add_column("family", max_width=12)
        table.add_column("fused")
        table.add_column("backend", no_wrap=True)
        for gate in self.gates:
            said = f"[yellow]left alone:[/] {_escaped(gate.reason)}" if gate.reason else _escaped(gate.fused)
            table.add_row(_escaped(gate.name), _escaped(gate.family), said, gate.backend or "-")
        return table

    def _summary(self) -> str:
        if not self.gates:
            return "no attention gates found"
        return f"{len(self.fused)} of {len(self.gates)} attention gates run fused"


def fuse_gates(model: nn.Module, backend: str = "auto", *, recompute: str | bool = "auto") -> FusionReport:
    """Finds the attention gates of a model and makes them run fused, in place.

        report = attn_gate.fuse_gates(model)
        print(report)

    Parameters, buffers, state_dict keys, module names, hooks, mode, dtype, device, and the gates' call and
    results stay what they were; so checkpoints fit both ways. Gates are recognised by their layers (see
    attn_gate.GateFamily and register_family), and only taken if a run of each, on tiny random input in eval
    and training mode, agreed with its own forward. A gate whose layers get hooks or parametrisations, then or
    later, runs as it was; so does one of which a layer is replaced by another kind of layer, or a plain
    attribute changes (a temperature, a dropout's p), and a call that the operators don't take.

    Args:
        model: any module; a gate itself too. Call it before DistributedDataParallel, fully_shard and
            torch.compile.
        backend: "auto" | "cpu" | "cuda" | "triton" | "eager", as in AttentionGate.
        recompute: True, False or "auto", as in AttentionGate.

    Returns:
        The report: each gate, its family, what is fused by which backend, and for a gate that is left alone
        the reason. Gates that are AttentionGate modules fuse themselves and aren't in it.

    Raises:
        TypeError: model is no module. ValueError: there is no such backend, or it can't run on the device of
            the gates.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    backends.check(backend)
    checks.check_recompute(recompute)
    unfuse_gates(model)
    gates = [(name, m) for name, m in model.named_modules() if not isinstance(m, AttentionGate)]
    try:
        entries = [entry for name, module in gates if (entry := _examine(name, module, backend, recompute))]
        for entry in entries:
            _check_backend(backend, entry)
    except BaseException:
        unfuse_gates(model)  # all or nothing
        raise
    return FusionReport(tuple(entries))


def unfuse_gates(model: nn.Module) -> int:
    """Undoes fuse_gates: every gate below `model` has its own class and forward again.

    Returns:
        How many gates there were.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    gates = [module for module in model.modules() if patch.state_of(module) is not None]
    for module in gates:
        patch.unpatch(module)
    return len(gates)


def _check_backend(backend: str, entry: GateEntry) -> None:
    parameter = next(entry.module.parameters(), None)
    if backend == "auto" or parameter is None or parameter.device.type == "meta":
        return
    if reason := backends.BACKENDS[backend].why_not(parameter.device, parameter.dtype):
        raise ValueError(f"backend is {backend!r}, which can't be used for {entry.name}: {reason}")


def _examine(name: str, module: nn.Module, backend: str, recompute: str | bool) -> GateEntry | None:
    """Fuses the module, as the first family with such layers whose description agrees with it.

    None for what is no gate: nothing has such layers, or what might be a gate by other names isn't one.
    """
    reasons = []
    known = [family for family in families.FAMILIES if families.has_layers(family, module)]
    for family in known or families.guess_families(module):
        try:
            structure, found = _understand(family, module)
            fused_class = patch.fused_class(type(module))
        except families.Unreadable as error:
            reasons.append((family.name, str(error)))
            continue
        state = patch.FusedGate(
            family.name,
            found,
            structure.paths,
            structure.channels,
            backend,
            recompute,
            patch.seen_in(module),
        )
        patch.patch(module, state, fused_class)
        return GateEntry(name, family.name, module)
    return GateEntry(name, reasons[0][0], module, reasons[0][1]) if known else None


def _understand(family: families.GateFamily, module: nn.Module) -> tuple[families.Structure, Found]:
    """What the layers of the module show, and what it computes.

    Raises:
        Unreadable: it isn't a gate that can be fused.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise families.Unreadable("it is compiled by TorchScript: fuse before scripting")
    if "forward" in module.__dict__:
        raise families.Unreadable("its forward was replaced on the instance")
    if any(hasattr(p, "device_mesh") for p in module.parameters()):
        raise families.Unreadable("its parameters are sharded: call fuse_gates before fully_shard")
    structure = families.read_structure(family, module)
    found = probe(family, structure, module)
    if found.spec.fusion().plan == "eager":
        raise families.Unreadable(found.spec.fusion().reason)
    return structure, found


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
