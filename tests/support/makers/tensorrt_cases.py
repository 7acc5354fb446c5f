"""Record calls of DijiangAttention for programs that have neither PyTorch nor the reference:
`python tests/support/makers/tensorrt_cases.py FILE` (CPU, seconds). plugins/tests/registry_cases.cpp and
tests/gpu/tensorrt86_plugin.py read the file.

Little-endian. "DJCASES1", int32 count, then each case:

    int32 length of the name, the name (ASCII)
    int32 num_heads, num_kv_heads, head_dim, rotary_dim; float32 epsilon
    int32 number of inputs (10, or 12 with tables), the inputs in the contract's order
    output's expected value, its bound, present_state's expected value, its bound

A tensor is int32 type (0 float32, 1 float16, 2 bfloat16, 3 int32), int32 rank, int64 sizes, the elements.
Expected values come from the float64 reference and are stored as float32, like the bounds (kernel_bounds.py).
An element is right if |got - expected| <= bound; the bound is 0 where a result has to be exact.
"""

from __future__ import annotations

import argparse
import struct
import sys
from pathlib import Path
from typing import BinaryIO

import torch
from support.makers.kernel_cases import Call, Case, make_call
from support.oracles.kernel_bounds import TOLERANCES, exact
from torch import Tensor

from dijiang_engines.op_contract import INPUTS

MAGIC = b"DJCASES1"
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int32: 3}

CASES = {
    "decode 16x64 float16": Case(heads=16, d=64, dtype="float16", batch=2, position=1000),
    "decode 12x64 float16, groups straddle heads": Case(
        heads=12, d=64, dtype="float16", batch=2, lens=(1, 1)
    ),
    "decode 4x80 bfloat16, tables": Case(
        heads=4, d=80, dtype="bfloat16", batch=3, decay="trained", position=290
    ),
    "decode 4x128 float16, grouped kv": Case(
        heads=4, d=128, kv_heads=1, dtype="float16", rotary=128, batch=2
    ),
    "decode 2x256 float16": Case(heads=2, d=256, dtype="float16", rotary=64, position=999_999),
    "decode 5x48 float32, no rotary": Case(heads=5, d=48, rotary=0, batch=5),
    "prefill 4x64 float16": Case(heads=4, d=64, dtype="float16", length=100, batch=3),
    "prefill 3x80 bfloat16, tables": Case(
        heads=3, d=80, dtype="bfloat16", length=129, batch=2, decay="trained"
    ),
    "prefill 2x128 float16": Case(heads=2, d=128, dtype="float16", length=350, lens=(349,)),
    "prefill 1x256 float16": Case(heads=1, d=256, dtype="float16", length=63, batch=2, rotary=64),
    "prefill 6x32 float32": Case(heads=6, d=32, kv_heads=3, length=65, batch=3, position=123_456),
}  # fmt: skip


def write_tensor(file: BinaryIO, value: Tensor) -> None:
    """One tensor of the format."""
    value = value.contiguous()
    file.write(struct.pack(f"<2i{value.dim()}q", TYPES[value.dtype], value.dim(), *value.shape))
    raw = value.view(torch.int16) if value.element_size() == 2 else value.view(torch.int32)
    file.write(raw.numpy().tobytes())


def results(call: Call) -> list[Tensor]:
    """Expected output, its bound, expected state, its bound: float32."""
    truth, tolerance = exact(call), TOLERANCES[call.dtype]
    unit = tolerance.roundings * tolerance.roundoff
    padding = ~call.valid().unsqueeze(-1)
    output = truth.output.masked_fill(padding, 0.0)
    output_bound = (unit * truth.output_scale + tolerance.least).masked_fill(padding, 0.0)
    empty = (call.seq_lens == 0).reshape(-1, 1, 1, 1)
    state = torch.where(empty, call.past_state.double(), truth.state)
    state_bound = (unit * truth.state_scale + 1e-37).masked_fill(empty, 0.0)
    return [x.float() for x in (output, output_bound, state, state_bound)]


def write(path: Path, cases: dict[str, Case]) -> None:
    """All cases into one file."""
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<i", len(cases)))
        for name, case in cases.items():
            call = make_call(case)
            g = call.geometry
            file.write(struct.pack("<i", len(name)) + name.encode("ascii"))
            file.write(struct.pack("<4if", g.num_heads, g.num_kv_heads, g.head_dim, g.rotary_dim, g.epsilon))
            inputs = [getattr(call, formal.name) for formal in INPUTS]
            given = [x for x in inputs if x is not None]
            file.write(struct.pack("<i", len(given)))
            for value in (*given, *results(call)):
                write_tensor(file, value)


def main() -> int:
    """Record every case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    write(options.file, CASES)
    print(f"{options.file}: {len(CASES)} cases, {options.file.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
