"""The Triton kernels: interpreted over the matrix where there is no GPU, and on one where there is."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matrix import EDGES, LARGE, LAYOUTS, compare, follows_in_a_graph, recomputes, results

from attn_gate import backends, functional
from attn_gate.cases import CASES, OPERATORS

HERE = Path(__file__).parent


def python(*arguments: str, **environment: str) -> subprocess.Popen:
    """A process of its own: kernels are interpreted or compiled as the environment says at their import."""
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=HERE, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def output_of(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize(
    "half, least", ((0, 250), pytest.param(1, 100, marks=pytest.mark.slow)), ids=("first half", "second half")
)
def test_the_matrix_is_right_in_the_interpreter(half, least):
    parts = [python("triton_matrix.py", str(part), "2", str(half), TRITON_INTERPRET="1") for part in range(2)]
    assert sum(int(output_of(process)) for process in parts) > least


def test_the_repaired_interpreter_finds_what_is_planted():
    assert output_of(python("triton_planted.py", TRITON_INTERPRET="1")) == (
        "load found\nstore found\ntwice found\nbfloat16 found\ntf32 found\n"
    )


def test_what_the_kernels_do_not_take():
    assert output_of(python("triton_edges.py", TRITON_INTERPRET="1")) == "right\n"


def test_a_driver_that_does_not_start_is_a_reason(monkeypatch):
    """As on a GPU's machine without a C compiler; here there is no driver at all."""
    properties = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    backends._why_triton_does_not_start.cache_clear()
    reason = backends.BACKENDS["triton"].why_not(torch.device("cuda"), torch.float32)
    backends._why_triton_does_not_start.cache_clear()
    assert reason.startswith("Triton doesn't start here: ")


def test_triton_is_imported_by_the_first_call_only():
    program = (
        "import sys, torch, attn_gate; attn_gate.functional.apply_attention(torch.ones(1, 2, 3, 4), "
        "torch.ones(1, 1, 3, 4)); print('triton' in sys.modules)"
    )
    assert output_of(python("-c", program)) == "False\n"


def test_cpu_tensors_need_a_driver_for_the_cpu(monkeypatch):
    x, alpha = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4)
    monkeypatch.setattr(backends, "TRITON_RUNS_ON_CPU", False)
    with pytest.raises(ValueError, match="run on GPUs; the tensors are on cpu"):
        functional.apply_attention(x, alpha, backend="triton")


@pytest.mark.slow
def test_compiled_and_exported_graphs_say_who_computes():
    assert output_of(python("triton_graphs.py", TRITON_INTERPRET="1")) == "whole\n"


def test_float64_is_left_to_others():
    reason = backends.BACKENDS["triton"].why_not(torch.device("cuda"), torch.float64)
    assert "float64" in reason


# --------------------------------------------------------------------------- on a real GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
_CASE = next(case for case in CASES if case.name == "paper 3D")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", CASES + EDGES + LARGE, ids=lambda case: case.name)
def test_the_matrix_is_right_on_a_gpu(case, dtype, monkeypatch):
    """Layouts and block sizes in turn; nothing is timed."""
    from attn_gate.triton_kernels import launch

    turn = zlib.crc32(f"{case.name} {dtype}".encode())
    monkeypatch.setattr(launch, "tuned", lambda key, device, choices, run: run(choices[turn % len(choices)]))
    layouts = list(LAYOUTS)
    for operator in OPERATORS:
        for options in recomputes(operator):
            compare(case, operator, dtype, layouts[turn % len(layouts)], backend="triton", **options)
            turn += 1


@pytest.mark.gpu
@gpu
def test_the_same_bits_from_run_to_run():
    tensors = _CASE.inputs("attention_gate", device="cuda")
    options = {**_CASE.options("attention_gate"), "backend": "triton"}
    first, second = (results(functional.attention_gate, tensors, **options) for _ in range(2))
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("operator", ("gate", "attention_gate"))
def test_captured_in_a_graph(operator):
    follows_in_a_graph(_CASE, operator, "triton")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU here")
def test_the_second_gpu():
    tensors = _CASE.inputs("attention_gate", device="cuda:1")
    options = {**_CASE.options("attention_gate"), "backend": "triton"}
    with torch.cuda.device(0):
        found = results(functional.attention_gate, tensors, **options)
    on_first = {name: t if t is None else t.to("cuda:0") for name, t in tensors.items()}
    for name, t in results(functional.attention_gate, on_first, **options).items():
        assert torch.equal(found[name].to("cuda:0"), t), name
