"""A small matrix for processes of their own: python tests/compact.py prints the instruction set and what it
compared.

Memory that nobody wrote holds NaN (tensors) or what the environment variable MALLOC_PERTURB_ says (scratch
memory).
"""

from __future__ import annotations

import torch
from matrix import DTYPES, EDGES, LAYOUTS, STREAMED, compare, recomputes

from attn_gate import keep_memory
from attn_gate._library import cpu_isa
from attn_gate.cases import CASES, OPERATORS


def main() -> None:
    torch.set_num_threads(1)
    keep_memory(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(7).isnan().all()
    count = 0
    layouts = list(LAYOUTS)
    for case in CASES + EDGES:
        for operator in OPERATORS:
            for options in recomputes(operator):
                dtype, layout = DTYPES[count % len(DTYPES)], layouts[count % len(layouts)]
                compare(case, operator, dtype, layout, **options)
                count += 1
    *_, shallow, patches = STREAMED
    for dtype in DTYPES:
        compare(patches, "apply_attention", dtype)
    for dtype in DTYPES[:2]:
        compare(shallow, "attention_gate", dtype)
    print(cpu_isa(), count)


if __name__ == "__main__":
    main()
