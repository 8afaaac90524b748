"""The matrix on Triton's interpreter: TRITON_INTERPRET=1 python tests/triton_matrix.py PART PARTS HALF

Every case and operator in the part, dtypes, layouts and block sizes in turn; prints how many were compared.
Of the two ways that a whole gate's backward may go (recomputing, or from what forward stored) each half of
the matrix has one, in turn; what has one way only is in the first half, 0. A process of its own, for kernels
are interpreted or compiled as the environment says when they are imported.
"""

from __future__ import annotations

import itertools
import sys

import torch
import triton_repairs
from attn_gate.triton_kernels import launch, passes
from matrix import EDGES, LAYOUTS, compare, recomputes

from attn_gate.cases import CASES, OPERATORS, GateCase

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Small for the interpreter, but of more programs than one an axis, and of more channels than a block of them.
SEVERAL_TILES = (
    GateCase("tiles, one grid", (19, 31), (19, 31), batch=1, channels=70, gating=40, inter=20),
    GateCase("tiles, patches", (21, 66), (10, 33), batch=1, channels=20, inter=5, kernel=2, stride=2),
    GateCase("tiles, patches 3D", (7, 7, 36), (3, 3, 18), batch=1, channels=9, kernel=2, stride=2),
    GateCase("tiles, nearest", (40, 51), (10, 17), batch=1, kernel=2, stride=3, phi_resize="nearest",
             alpha_resize="nearest"),
    GateCase("tiles, aligned", (33, 58), (9, 20), batch=1, stride=2, phi_resize="align_corners",
             alpha_resize="align_corners"),
    GateCase("tiles, many inner channels", (9, 13), (9, 13), batch=1, channels=20, gating=18, inter=150),
    GateCase("tiles, g coarser", (21, 30), (7, 10), batch=1, channels=17, inter=6),
)  # fmt: skip


def main() -> None:
    part, parts, half = map(int, sys.argv[1:])
    triton_repairs.repair()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    blocks = itertools.count()
    launch.tuned = lambda key, device, choices, run: run(choices[next(blocks) % len(choices)])
    compared, layouts, narrow = 0, list(LAYOUTS), passes.WIDE_FROM
    turns = list(itertools.product(CASES + EDGES + SEVERAL_TILES, OPERATORS))[part::parts]
    for turn, (case, operator) in enumerate(turns, half):
        ways = list(recomputes(operator))
        if len(ways) == 1 and half == 1:
            continue
        passes.WIDE_FROM = 0 if compared % 5 == 0 else narrow  # 64-bit offsets in every fifth
        compare(
            case, operator, DTYPES[turn % 3], layouts[turn % len(layouts)],
            backend="triton", **ways[turn % len(ways)],
        )  # fmt: skip
        compared += 1
    print(compared)


if __name__ == "__main__":
    main()
