"""torch.compile and torch.export of the Triton operators: TRITON_INTERPRET=1 python tests/triton_graphs.py"""

from __future__ import annotations

import torch
import triton_repairs
from matrix import results

from attn_gate import functional
from attn_gate.cases import CASES


def main() -> None:
    triton_repairs.repair()
    case = next(case for case in CASES if case.name == "paper 2D")
    tensors = case.inputs("attention_gate")
    options = {**case.options("attention_gate"), "backend": "triton"}

    def attention_gate(**tensors):
        return functional.attention_gate(**tensors, **options)

    eager = results(attention_gate, tensors)
    compiled = results(torch.compile(attention_gate, fullgraph=True, backend="aot_eager"), tensors)
    assert all(torch.equal(t, compiled[name]) for name, t in eager.items())

    class Module(torch.nn.Module):
        def forward(self, x, g):
            return attention_gate(**{**tensors, "x": x, "g": g})

    program = torch.export.export(Module(), (tensors["x"], tensors["g"]))
    assert any("attn_gate_triton" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(tensors["x"], tensors["g"])[0], eager["y"])
    print("whole")


if __name__ == "__main__":
    main()
