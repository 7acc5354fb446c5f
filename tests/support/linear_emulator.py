"""Kernels of dijiang_linear compiled for a CPU (plugins/tests/emulator), and calls on its memory."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.linear_cases import Case
from support.paths import ROOT

from dijiang_engines.kernels.linear import LinearOutput, linear_call

PLUGINS = ROOT / "plugins"
INCLUDES = ("tests/emulator", "include", "kernels")


def compiled(target: Path, sources: tuple[str, ...], *more: str) -> Path:
    """A shared library of `sources`, which lie below plugins/; skips the test without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc, which hands C++ to the host's compiler with CUDA's headers")
    subprocess.run([
        nvcc, "-std=c++17", "-O1", "-Xcompiler=-fPIC,-Wno-unknown-pragmas", "-shared", "-cudart=none",
        *(f"-I{PLUGINS / folder}" for folder in INCLUDES), *(str(PLUGINS / source) for source in sources),
        *more, "-o", str(target),
    ], check=True)  # fmt: skip
    return target


def host_call(cases: list[Case]) -> Any:
    """The call that makes the outputs of `cases`, whose tensors are in the host's memory."""
    return host_call_of([case.output for case in cases])


def host_call_of(outputs: list[LinearOutput]) -> Any:
    """The same of bare outputs."""
    call = linear_call([_on_host(output) for output in outputs], True)
    call.dtype = {torch.float16: 1, torch.bfloat16: 2}[outputs[0].output.dtype]
    return call


class _Host:
    """A tensor in the host's memory, as if it were the GPU's."""

    def __init__(self, tensor: Any) -> None:
        kinds = {torch.float16: "<f2", torch.bfloat16: "<f2", torch.float32: "<f4", torch.uint8: "|u1"}
        assert tensor.is_contiguous()
        self.__cuda_array_interface__ = {
            "data": (tensor.data_ptr(), False), "shape": tuple(tensor.shape),
            "typestr": kinds[tensor.dtype], "version": 3,
        }  # fmt: skip


def _on_host(output: LinearOutput) -> LinearOutput:
    def host(tensor: Any) -> Any:
        return None if tensor is None else _Host(tensor)

    inputs = {id(term.input): _Host(term.input) for term in output.terms}
    return replace(
        output, output=host(output.output), residual=host(output.residual),
        norm_weight=host(output.norm_weight), norm_bias=host(output.norm_bias),
        terms=[
            replace(term, input=inputs[id(term.input)], weight=host(term.weight), bias=host(term.bias))
            for term in output.terms
        ],
    )  # fmt: skip
