"""The Triton kernels compiled for GPUs that aren't here: no spills, and the resources that the table says."""

from __future__ import annotations

from pathlib import Path

import attn_gate.triton_kernels as triton_kernels
import pytest
import torch
from attn_gate.bench import triton_resources
from attn_gate.bench.triton_offline import TARGETS, code_of
from attn_gate.bench.triton_resources import compiled, launches, shares, title
from attn_gate.bench.triton_settings import PAPER, combinations
from attn_gate.triton_kernels import launch

TABLE = triton_resources.read_table()
REGENERATE = "python -m attn_gate.bench.triton_resources --write"


def differing(target: tuple) -> set:
    """Launches that only the kernels have, or only the table."""
    made = {found for made in combinations() for found in launches(target, made)}
    fields = triton_resources.Launch.__dataclass_fields__
    recorded = {
        triton_resources.Launch(*(getattr(row, name) for name in fields))
        for row in TABLE
        if row.target == title(target)
    }
    return made ^ recorded


def sample(target: tuple, one_in: int) -> list[tuple]:
    """Of what the target's launches compile to, a part that their names choose: another for each target."""
    found, turn = [], TARGETS.index(target)
    for _, made, names in shares([target]):
        if chosen := {name for name in names if (int(name, 16) + turn) % one_in == 0}:
            found.append((target, made, chosen))
    return found


def prove(samples: list[tuple]) -> None:
    """Compiles them: the table says what they take."""
    recorded = {row.key: (row.warps, row.registers, row.spills, row.shared) for row in TABLE}
    assert samples
    for share in samples:
        for key, found in compiled(*share).items():
            assert found == recorded[key], (key, REGENERATE)


def test_no_kernel_spills_on_any_gpu():
    assert {row.target for row in TABLE} == set(map(title, TARGETS))
    assert [row for row in TABLE if row.spills] == []
    assert max(row.shared for row in TABLE) <= 99 * 1024  # what the smallest of these GPUs gives a program


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_every_choice_of_block_sizes_is_recorded(dtype):
    maps = torch.empty(0, dtype=dtype)
    lists = {
        "gate_fwd": launch.CHAIN,
        "gate_bwd": launch.CHAIN,
        "attention_gate_fwd": launch.whole(maps),
        "attention_gate_bwd": launch.whole_backward(maps),
    }
    for target in map(title, TARGETS):
        for operator, choices in lists.items():
            kernel = "forward_kernel" if operator.endswith("fwd") else "backward_kernel"
            key = (target, operator, PAPER.name, str(dtype).removeprefix("torch."), kernel)
            found = {
                row.choice
                for row in TABLE
                if (row.target, row.operator, row.gate, row.dtype, row.kernel) == key
            }
            assert found == set(range(len(choices))), (target, operator)


@pytest.mark.parametrize("target", TARGETS, ids=title)
def test_the_table_is_of_these_kernels(target):
    """Every launch of every setting is in it, by the name of what it compiles to; and no other is."""
    assert not differing(target), f"{len(differing(target))} launches differ: {REGENERATE}"


def test_a_launch_that_changes_is_noticed(monkeypatch):
    monkeypatch.setattr(launch, "CHAIN", (launch.Blocks(256, warps=8), *launch.CHAIN[1:]))
    assert differing(TARGETS[0])


def test_code_that_changes_is_noticed():
    folder = Path(triton_kernels.__file__).parent
    source = (folder / "maps.py").read_text()
    other_words = source.replace('"""d activation / d s."""', '"""The slope."""').replace("CL:", "CL :")
    assert other_words != source
    assert list(code_of(source)) == list(code_of("# More.\n\n" + other_words))
    changed = source.replace("s * tl.sigmoid(s)", "tl.sigmoid(s) * s")
    assert changed != source
    assert list(code_of(source)) != list(code_of(changed))


@pytest.mark.parametrize("target", (("cuda", 90), ("hip", "gfx942")), ids=title)
def test_the_table_is_true(target):
    prove(sample(target, one_in=150))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=title)
def test_more_of_the_table_is_true(target):
    """python -m attn_gate.bench.triton_resources compares all of it."""
    prove(sample(target, one_in=75))
