"""Times dijiang_linear with quantised weights on a GPU: all products of a decoding step, and of a prefill.

    python tests/gpu/quantised/times.py libdijiang_kernels.so [--shape 410m 2.8b] [--rows 1 8]
        [--prefill 2048] [--weights int4 mixed int8 same] [--save times.json]

A prefill has a workspace, so that cuBLASLt multiplies where the process has one: PyTorch brings its own.
Everything is a CUDA graph over as many layers as the model has, each with weights of its own, so that none
stays in the cache; times are medians of replays. Beside it, in the same run: the kernel for float16 weights
("same"), cuBLAS in float16 and PyTorch's `_weight_int4pack_mm` ("tinygemm": int4, bfloat16, groups of 32),
both without norms, biases, activations and residuals. "mixed" has the rows of v and the head in int8, the
rest in int4. Weights are random bytes: what is computed is test_quantised_linear_gpu.py's to show.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpu.linear_times import SHAPES, median_ms, stream

from dijiang_engines.kernels.linear import LinearKernels, LinearOutput, LinearTerm
from dijiang_engines.kernels.packing import CHUNK, packed_bytes
from dijiang_export.bench.memory_rate import memory_rate

FORMS = {
    "same": ["same"] * 7, "int8": ["int8"] * 7, "int4": ["int4"] * 7,
    "mixed": ["int4", "int8", "int4", "int4", "int4", "int4", "int8"],
}  # fmt: skip
"""Of q and k, v, gate, the MLP's first, dense, the MLP's second, head."""


def half(*sizes: int) -> Any:
    return torch.randn(*sizes, device="cuda", dtype=torch.float16) * 0.02


def packed(form: str, width: int, inner: int) -> Any:
    """Random integers, and scales near 0.01."""
    chunk = CHUNK[form]
    each = 512 + chunk // 2
    bytes_ = torch.randint(
        0, 256, (packed_bytes(form, width, inner) // each, each), dtype=torch.uint8, device="cuda"
    )
    scales = (torch.randn(len(bytes_), chunk // 4, device="cuda") * 0.01).half()
    bytes_[:, 512:] = scales.view(torch.uint8)
    return bytes_.view(-1)


class Step:
    """The products of a GPT-NeoX step with parallel residual; of many rows without norms, as in a prefill."""

    def __init__(
        self,
        kernels: LinearKernels,
        shape: str,
        rows: int,
        forms: list[str],
        layers: int,
        rounded: bool = True,
    ) -> None:
        self.rounded = rounded
        _, hidden, inner, heads, d, vocabulary = SHAPES[shape]
        width = heads * d
        self.kernels, self.layers, self.forms = kernels, layers, forms
        self.split = forms[0] != forms[1]

        def weight(form: str, n: int, k: int) -> Any:
            return half(n, k) if form == "same" else packed(form, n, k)

        def layer() -> list[Any]:
            first = [(0, 2 * width), (1, width)] if self.split else [(0, 3 * width)]
            return [weight(forms[f], n, hidden) for f, n in first] + [
                weight(forms[2], width, hidden), weight(forms[3], inner, hidden),
                weight(forms[4], hidden, width), weight(forms[5], hidden, inner),
            ]  # fmt: skip

        self.weights = [layer() for _ in range(layers)]
        self.head = weight(forms[6], vocabulary, hidden)
        self.x, self.y, self.mixed, self.wide = (half(rows, n) for n in (hidden, hidden, width, inner))
        self.qkv = [half(rows, n) for n in ([2 * width, width] if self.split else [3 * width])]
        self.gate, self.logits = half(rows, width), half(rows, vocabulary)
        self.ones = torch.ones(max(3 * max(hidden, inner), vocabulary), device="cuda")
        scale = self.ones[:hidden]
        self.norm: Any = ("layer_norm", scale, scale, 1e-5) if rows <= 16 else ()
        size = max(kernels.workspace_size(outputs) for outputs in (self.first(0), self.second(0)))
        self.workspace = torch.empty(size, dtype=torch.uint8, device="cuda") if size > 0 else None

    def _one(self, output: Any, weight: Any, form: str, activation: Any = "identity") -> LinearOutput:
        bias = self.ones[: output.shape[1]]
        return LinearOutput(
            output, [LinearTerm(self.x, weight, bias, form, self.rounded)], activation, None, *self.norm  # type: ignore[arg-type]
        )  # fmt: skip

    def first(self, layer: int) -> list[LinearOutput]:
        *qkv, gate, up, _, _ = self.weights[layer]
        parts = zip(self.qkv, qkv, self.forms, strict=False)
        return [
            *(self._one(output, weight, form) for output, weight, form in parts),
            self._one(self.gate, gate, self.forms[2]),
            self._one(self.wide, up, self.forms[3], "gelu"),
        ]

    def second(self, layer: int) -> list[LinearOutput]:
        *_, dense, down = self.weights[layer]
        bias = self.ones[: self.y.shape[1]]
        terms: Any = [
            LinearTerm(self.mixed, dense, bias, self.forms[4], self.rounded),  # type: ignore[arg-type]
            LinearTerm(self.wide, down, bias, self.forms[5], self.rounded),  # type: ignore[arg-type]
        ]
        return [LinearOutput(self.y, terms, "identity", self.x)]

    def run(self, *parts: str) -> Callable[[], None]:
        def enqueue(outputs: list[LinearOutput]) -> None:
            self.kernels.linear(outputs, constant_weights=True, workspace=self.workspace, stream=stream())

        def go() -> None:
            for layer in range(self.layers):
                for part in parts:
                    if part != "head":
                        enqueue(getattr(self, part)(layer))
            if "head" in parts:
                enqueue([self._one(self.logits, self.head, self.forms[6])])

        return go

    def bytes(self) -> int:
        return int(sum(w.nbytes for layer in self.weights for w in layer) + self.head.nbytes)


def peer(shape: str, rows: int, layers: int, head: bool, *, tinygemm: bool) -> float:
    """Milliseconds of the bare products by cuBLAS or tinygemm."""
    _, hidden, inner, heads, d, vocabulary = SHAPES[shape]
    width = heads * d
    sizes = [(3 * width, hidden), (width, hidden), (inner, hidden), (hidden, width), (hidden, inner)]

    def weight(n: int, k: int) -> Any:
        if not tinygemm:
            return half(n, k)
        q = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        scales = (torch.randn(k // 32, n, 2, device="cuda") * 0.01).bfloat16()
        return torch.ops.aten._convert_weight_to_int4pack(q, 8), scales

    weights = [[weight(*size) for size in sizes] for _ in range(layers)]
    last = weight(vocabulary, hidden)
    inputs = {k: half(rows, k).to(torch.bfloat16 if tinygemm else torch.float16) for _, k in sizes}

    def multiply(k: int, w: Any) -> Any:
        if tinygemm:
            return torch.ops.aten._weight_int4pack_mm(inputs[k], w[0], 32, w[1])
        return inputs[k] @ w.T

    def run() -> None:
        for layer in weights:
            for (_, k), w in zip(sizes, layer, strict=True):
                multiply(k, w)
        if head:
            multiply(hidden, last)

    return median_ms(run, 30)


def of_a_step(kernels: LinearKernels, shape: str, rows: int, forms: list[str]) -> dict[str, dict[str, float]]:
    layers = SHAPES[shape][0]
    times: dict[str, dict[str, float]] = {}
    for name in forms:
        step = Step(kernels, shape, rows, FORMS[name], layers)
        parts = {"all": ("first", "second", "head"), **{p: (p,) for p in ("first", "second", "head")}}
        times[name] = {part: median_ms(step.run(*which), 30) for part, which in parts.items()}
        times[name]["bytes"] = step.bytes()
        del step
        torch.cuda.empty_cache()
    for name in ("cublas", "tinygemm"):
        times[name] = {"all": peer(shape, rows, layers, True, tinygemm=name == "tinygemm")}
        torch.cuda.empty_cache()
    return times


def of_a_prefill(
    kernels: LinearKernels, shape: str, rows: int, forms: list[str]
) -> dict[str, dict[str, float]]:
    """Of eight layers, without the head: milliseconds of a layer, and the rate."""
    _, hidden, inner, heads, d, _ = SHAPES[shape]
    width, layers = heads * d, 8
    operations = 2 * rows * layers * (hidden * (4 * width + inner) + hidden * (width + inner))
    found: dict[str, float] = {}
    for name in forms:
        found[name] = median_ms(Step(kernels, shape, rows, FORMS[name], layers).run("first", "second"), 12)
    found["cublas"] = peer(shape, rows, layers, False, tinygemm=False)
    torch.cuda.empty_cache()
    return {name: {"ms a layer": ms / layers, "TFLOP/s": operations / ms / 1e9} for name, ms in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--shape", nargs="+", default=["410m", "2.8b"], choices=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prefill", nargs="*", type=int, default=[2048])
    parser.add_argument("--weights", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    kernels = LinearKernels(given.library)
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "copy_gb_s": memory_rate(torch.device("cuda"), 0).copy / 1e9,
    }  # fmt: skip
    for shape in given.shape:
        for rows in given.rows:
            results[f"{shape}, {rows} rows, ms"] = of_a_step(kernels, shape, rows, given.weights)
        for rows in given.prefill:
            results[f"{shape}, prefill of {rows}"] = of_a_prefill(kernels, shape, rows, given.weights)
    print(json.dumps(results, indent=1))
    if given.save:
        given.save.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
