"""Times dijiang_step on a GPU beside the kernels of its parts, after comparing it with the reference.

    python tests/gpu/step_times.py libdijiang_kernels.so [--shape 410m] [--rows 1 8]
        [--weights same int8 int4] [--save times.json]

The step in one launch and the same step in three launches a layer (linear_times.py) are each a CUDA graph;
times are medians of replays between two events. int8 and int4 weights are as --weight-format chooses them;
beside int4 stand the bare products by PyTorch's tinygemm (quantised/times.py). The floor is the weights'
bytes over the memory's rate, as in linear_times.py. A step that differs from the reference is not timed.
Exits with 1 if one does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.quantised_models import QuantisedWeights, quantise_model
from support.step_models import ALLOWED, PackedStep, error, torch_dtype, wide_reference

from dijiang_engines.kernels.step import StepKernels, step_parts
from dijiang_engines.spec import ModelSpec
from dijiang_export.bench.memory_rate import memory_rate
from dijiang_export.reference.model import ReferenceModel, is_op_constant

NEOX_410M = ModelSpec(
    family="gpt_neox", vocab_size=50304, hidden_size=1024, intermediate_size=4096, num_layers=24,
    num_heads=16, num_kv_heads=16, head_dim=64, rotary_dim=16, rope_theta=10000.0, rope_scaling=None,
    norm="layer_norm", norm_epsilon=1e-5, activation="gelu", gated_mlp=False, parallel_residual=True,
    post_norm=False, final_norm=True, attention_bias=True, dense_bias=True, mlp_bias=True,
    position_embeddings=0, position_offset=0, embedding_size=1024, tied_embeddings=False,
    max_position_embeddings=2048, decay="geometric", decay_rows=0, decay_extended=False,
    group_norm_epsilon=1e-5, bos_token_id=0, eos_token_ids=(0,),
)  # fmt: skip
SPECS = {
    "410m": NEOX_410M,
    "1b": dataclasses.replace(
        NEOX_410M, hidden_size=2048, embedding_size=2048, intermediate_size=8192, num_layers=16, num_heads=8,
        num_kv_heads=8, head_dim=256, rotary_dim=64,
    ),
    "2.8b": dataclasses.replace(
        NEOX_410M, hidden_size=2560, embedding_size=2560, intermediate_size=10240, num_layers=32,
        num_heads=32, num_kv_heads=32, head_dim=80, rotary_dim=20,
    ),
    "smollm2-135m": dataclasses.replace(
        NEOX_410M, family="llama", vocab_size=49152, hidden_size=576, embedding_size=576,
        intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, rotary_dim=64, norm="rms_norm",
        activation="silu", gated_mlp=True, parallel_residual=False, attention_bias=False, dense_bias=False,
        mlp_bias=False, tied_embeddings=True,
    ),
}  # fmt: skip
POSITIONS = (100, 100_000)


def random_model(spec: ModelSpec, dtype: torch.dtype, seed: int = 1) -> ReferenceModel:
    """On the GPU, with weights such that activations stay near one."""
    generator = torch.Generator("cuda").manual_seed(seed)
    model = ReferenceModel(spec, dtype=dtype, device="cuda")
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cuda")
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "log_decay":
            noise = -noise.abs() * 0.1
        elif "norm" in name and leaf.endswith("weight"):
            noise = 1 + 0.1 * noise
        elif is_op_constant(name):
            noise = noise if leaf == "proj" else 0.1 * noise
        elif noise.dim() > 1:
            noise *= 1.0 if name.startswith("embed") else 0.5 / noise.shape[-1] ** 0.5
        else:
            noise *= 0.1
        parameter.data.copy_(noise)
    return model


def errors(step: PackedStep, reference: ReferenceModel, position: int, steps: int = 2) -> float:
    """The largest error of some steps from a random state, each from where the kernel's last one ended."""
    generator = torch.Generator("cuda").manual_seed(position)
    rows, spec = step.rows, step.spec
    states = [torch.randn(s.shape, generator=generator, device="cuda") for s in step.states]
    worst = 0.0
    for count in range(steps):
        ids = torch.randint(spec.vocab_size, (rows,), generator=generator, device="cuda")
        positions = torch.full((rows,), position + count, device="cuda")
        step.start(ids, positions, torch.ones_like(ids), states)
        step.run()
        wide = [state.double() for state in states]
        logits, new = reference(ids.reshape(-1, 1), positions, torch.ones_like(ids), wide, form="recurrent")
        torch.cuda.synchronize()
        worst = max(worst, error(step.logits, logits[:, 0].cpu()))
        worst = max(worst, *(error(a, b.cpu()) for a, b in zip(step.states, new, strict=True)))
        states = [state.clone() for state in step.states]
    return worst if step.sync.guards_are_intact() and step.packed.guards_are_intact() else float("inf")


def median_us(run: Callable[[], object], repeats: int = 200) -> float:
    """Between two events, of one run."""
    times = []
    for _ in range(repeats + 20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return float(statistics.median(times[20:]))


def graph_of(run: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph


def measure(step: PackedStep) -> dict[str, float]:
    """µs of a step: a launch on a stream, one in a CUDA graph, and of eight in one."""
    one, eight = graph_of(step.run, 1), graph_of(step.run, 8)
    step.ids.fill_(1)
    step.lens.fill_(1)
    found = {}
    for position in POSITIONS:
        step.positions.fill_(position)
        found[f"launch at {position}"] = median_us(step.run)
        found[f"graph at {position}"] = median_us(one.replay)
        found[f"graph of 8 at {position}"] = median_us(eight.replay, 60) / 8
    return found


def three_launches(library: Path, shape: str, rows: int) -> float:
    """µs of the same step by three launches a layer (GPT-NeoX shapes, float16)."""
    from gpu.linear_times import AllKernels, Step, median_ms

    step = Step(AllKernels(library), shape, rows)
    return 1e3 * median_ms(step.all(step.first, step.attention, step.second))


def tinygemm(shape: str, rows: int) -> float:
    """µs of the step's products alone, by PyTorch's int4 kernel."""
    from gpu.quantised.times import SHAPES, peer

    return 1e3 * peer(shape, rows, SHAPES[shape][0], True, tinygemm=True)


def weight_bytes(step: PackedStep, quantised: QuantisedWeights | None) -> int:
    """Of what a step reads: the packed units."""
    spec = step.spec
    if quantised is not None:
        return sum(
            part.stored.nbytes * part.rows // part.stored.rows for part in step_parts(spec, quantised.parts)
        )
    wide, gated = spec.attention_size, 2 if spec.gated_mlp else 1
    layer = spec.hidden_size * (spec.qkv_size + 2 * wide + (gated + 1) * spec.intermediate_size)
    return 2 * (spec.num_layers * layer + spec.vocab_size * spec.hidden_size)


def compare(
    library: Path, shape: str, dtype: str, weights: str, row_counts: list[int], peers: bool
) -> list[dict[str, Any]]:
    """One shape, type and format of weights, for all numbers of rows."""
    kernels, spec = StepKernels(library), SPECS[shape]
    model = random_model(spec, torch_dtype(dtype))
    reference = wide_reference(spec, model)
    quantised = None if weights == "same" else quantise_model(spec, reference, weights)
    found: list[dict[str, Any]] = []
    for rows in row_counts:
        step = PackedStep(kernels, spec, model, dtype, rows, "cuda", quantised)
        row: dict[str, Any] = {"shape": shape, "dtype": dtype, "weights": weights, "rows": rows}
        row |= dataclasses.asdict(step.size)
        row["error"] = max(errors(step, reference, position) for position in POSITIONS)
        row["right"] = row["error"] <= ALLOWED[dtype]
        if row["right"]:
            row["us"] = measure(step)
            row["weight_bytes"] = weight_bytes(step, quantised)
        known = peers and dtype == "float16" and shape in ("410m", "1b", "2.8b")
        if known and weights == "int4":
            row["products by tinygemm, us"] = tinygemm(shape, rows)
        if known and weights == "same":
            row["three launches a layer, us"] = three_launches(library, shape, rows)
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--shape", nargs="+", default=["410m"], choices=SPECS)
    parser.add_argument("--dtype", nargs="+", default=["float16"], choices=ALLOWED)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--weights", nargs="+", default=["same"], choices=("same", "int8", "int4"))
    parser.add_argument("--alone", action="store_true", help="without others")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    gpu = torch.device("cuda")
    rates, found = [memory_rate(gpu, 0).copy], []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for shape in given.shape:
        for dtype in given.dtype:
            for weights in given.weights:
                found += compare(given.library, shape, dtype, weights, given.rows, not given.alone)
                torch.cuda.empty_cache()
    rates.append(memory_rate(gpu, 0).copy)
    for row in found:
        if "us" in row:
            row["floor_us"] = 1e6 * row["weight_bytes"] / max(rates)
            best = row["us"][f"graph at {POSITIONS[0]}"]
            name = f"{row['shape']} {row['dtype']} weights {row['weights']} {row['rows']} rows"
            others = row.get("three launches a layer, us", row.get("products by tinygemm, us"))
            print(
                f"{name}: {best:.1f} µs, {best / row['floor_us']:.2f} of the floor {row['floor_us']:.1f}"
                + (f", {others / best:.2f} times as fast" if others else "")
            )
    record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rates": rates, "steps": found}
    if given.save:
        given.save.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["right"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
