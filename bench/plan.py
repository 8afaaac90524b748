"""What a run measures: groups of configs, each with its modes, dtypes, threads, providers and patience."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from attn_gate import backends

from .measure import Patience
from .providers import PROVIDERS
from .registry import CONFIGS, KINDS, AnyConfig

_ALL = ("attn_gate", "attn_gate-channels-last", "eager", "eager-channels-last", "compile", "onnxruntime",
        "openvino", "limit")  # fmt: skip
_NOT_COMPILED = tuple(name for name in _ALL if name != "compile")
_PAIR = ("attn_gate", "eager")


@dataclass(frozen=True)
class Group:
    """Configs that are measured alike.

    Attributes:
        default: names of configs that run if none are asked for; universe: those that may be asked for.
        providers: names; on a GPU those of `on_gpu` too.
        thread_counts: empty for the run's own.
        patience: None: no times.
        memory: whether to look at the peak of resident memory, for each in a fresh process, and for the
            largest batch that fits in a given memory.
    """

    default: tuple[str, ...]
    universe: tuple[str, ...]
    patience: Patience | None
    modes: tuple[str, ...] = ("inference", "step")
    dtypes: tuple[str, ...] = ("float32",)
    providers: tuple[str, ...] = _PAIR
    thread_counts: tuple[int, ...] = ()
    memory: bool = False


@dataclass(frozen=True)
class Job:
    """One config in one dtype on so many threads."""

    config: AnyConfig
    dtype: str
    threads: int
    modes: tuple[str, ...]
    providers: tuple[str, ...]
    patience: Patience | None
    memory: bool


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; None: the plan's own."""

    configs: Sequence[str] | None = None
    providers: Sequence[str] | None = None
    modes: Sequence[str] | None = None
    dtypes: Sequence[str] | None = None
    thread_counts: Sequence[int] | None = None


def _of(kind: str) -> tuple[str, ...]:
    return tuple(name for name, config in CONFIGS.items() if config.kind == kind)


def quick() -> list[Group]:
    """Under a minute on two cores: the finest and a deep level, without what compiles."""
    levels = ("same-256", "same-32", "paper-256", "monai-96")
    providers = ("attn_gate", "eager", "eager-channels-last", "onnxruntime", "limit")
    return [Group(levels, tuple(CONFIGS), Patience(6, 6, 0.5), providers=providers)]


def full() -> list[Group]:
    """8 to 15 minutes on two cores, and up to 10 more where torch.compile has nothing in its cache.

    At least six turns each, for intervals of 95 %.
    """
    gates, sweeps, networks = _of("gate"), _of("sweep"), _of("network")
    finest = ("same-256", "paper-256", "lee-256", "monai-96", "oktay-80", "keras-256")
    # Like finer ones of their family: without torch.compile, or with none but eager and the limit beside.
    alike = ("monai-24", "monai-12", "oktay-20", "keras-128", "keras-64", "keras-32")
    compiled = ("same3d-96",)
    coarser = tuple(name for name in gates if name not in (*finest, *alike, *compiled))
    by_parts = ("same-256", "lee-256", "monai-96")
    weighed = ("same-256", "monai-96")
    memory_bound = ("same-256", "same-128", "paper-256", "same3d-96")
    ends = ("same-256", "same-32")
    counts = tuple(n for n in (1, 2, 4, 8, 16, 32, 64) if n < torch.get_num_threads())
    return [
        Group(finest, finest, Patience(21, 6, 1.0), providers=(*_ALL, "attn_gate-unkept")),
        Group(compiled, gates, Patience(21, 6, 1.0), providers=_ALL),
        Group(coarser, coarser, Patience(21, 6, 1.0), providers=_NOT_COMPILED),
        Group(alike, alike, Patience(21, 6, 1.0), providers=(*_PAIR, "limit")),
        Group(by_parts, finest, Patience(15, 6, 0.5), modes=("forward", "backward")),
        Group(memory_bound, memory_bound, Patience(15, 6, 1.0), dtypes=("bfloat16",)),
        Group(sweeps, sweeps, Patience(15, 6, 1.0), providers=(*_PAIR, "limit")),
        *([Group(ends, ends, Patience(15, 6, 1.0), thread_counts=counts)] if counts else []),
        Group(weighed, gates, None, providers=(*_PAIR, "onnxruntime"), memory=True),
        Group(networks, networks, Patience(6, 6, 2.0),
              providers=("attn_gate", "attn_gate-compile", "eager", "eager-channels-last", "compile")),
    ]  # fmt: skip


def jobs(groups: Iterable[Group], wanted: Wanted, device: str) -> Iterator[Job]:
    """What to do, in order: a filter takes the place of that part of each group."""
    seen: set[tuple[str, str, int, str, str]] = set()
    for group in groups:
        names = group.default
        if wanted.configs is not None:
            names = [name for name in wanted.configs if name in group.universe]
        for name in names:
            for dtype in wanted.dtypes or group.dtypes:
                # Memory is a matter of the group's own providers: what compiles would do so at every batch.
                providers = wanted.providers or _on(device, group.providers)
                if group.patience is None:
                    providers = [n for n in providers if n in group.providers]
                for count in wanted.thread_counts or group.thread_counts or (torch.get_num_threads(),):
                    job = Job(
                        CONFIGS[name],
                        dtype,
                        count,
                        tuple(wanted.modes or group.modes),
                        tuple(providers),
                        group.patience,
                        group.memory,
                    )
                    rows = {
                        (name, dtype, count, m, p)
                        for m in job.modes
                        for p in job.providers
                        if PROVIDERS[p].has(job.config, m)
                    }
                    if rows and (job.patience is None or not rows <= seen):
                        seen |= set() if job.patience is None else rows
                        yield job


def why_nothing(wanted: Wanted) -> str:
    """What to say where there are no jobs: who of the wanted has what."""
    parts = []
    for name in wanted.providers or PROVIDERS:
        provider = PROVIDERS[name]
        kinds = "" if provider.kinds == KINDS else f" of {' and '.join(provider.kinds)} configs"
        parts.append(f"{name} has {', '.join(provider.modes)}{kinds}")
    return f"nothing to measure: {'; '.join(parts)}; take another --mode, --config or --provider"


def _on(device: str, providers: Sequence[str]) -> tuple[str, ...]:
    """On a GPU also max-autotune, and each of attn_gate's backends that "auto" doesn't pick."""
    if device == "cpu" or "compile" not in providers:
        return tuple(providers)
    picked = backends.choose("auto", torch.empty(0, device=device))
    ours = [
        f"attn_gate-{name}"
        for name, backend in backends.BACKENDS.items()
        if name not in ("eager", picked) and not backend.why_not(torch.device(device), torch.float32)
    ]
    return (*providers[:1], *ours, *providers[1:], "compile-max-autotune")
