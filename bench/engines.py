"""Inference engines beside PyTorch, on the CPU: what one would export a trained network to."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from .providers import AnyCase

Engine = Callable[[], np.ndarray]


def onnxruntime(case: AnyCase) -> Engine:
    """The case's eager module in ONNX Runtime, with as many threads as PyTorch has."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(_onnx(case), options, providers=["CPUExecutionProvider"])
    inputs = {name: t.numpy() for name, t in zip(case.input_names, case.inputs, strict=True)}
    return lambda: session.run(None, inputs)[0]


def openvino(case: AnyCase) -> Engine:
    """The case's eager module in OpenVINO, with as many threads as PyTorch has."""
    import openvino as ov

    core = ov.Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the CPU has it
    }
    model = core.compile_model(core.read_model(_onnx(case)), "CPU", options)
    inputs = {name: t.numpy() for name, t in zip(case.input_names, case.inputs, strict=True)}
    return lambda: model(inputs, share_inputs=True, share_outputs=True)[0]


def _onnx(case: AnyCase) -> bytes:
    """The case's eager module in eval mode, batch norms folded by the exporter."""
    buffer = io.BytesIO()
    names = {"input_names": list(case.input_names), "output_names": ["y"]}
    module = case.module.eval()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        # The older exporter: the same graph as from the newer one, in a tenth of the time.
        torch.onnx.export(module, case.inputs, buffer, dynamo=False, **names)
    return buffer.getvalue()
