"""Matrix products with what is around them, from Python: plugins/include/dijiang/linear.h.

Engines call dijiang_linear through the TensorRT plugin; `bench step` and tests do directly.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dijiang_engines.errors import KernelError
from dijiang_engines.kernels import abi
from dijiang_engines.kernels.device_arrays import DeviceArray, device_array
from dijiang_engines.kernels.library import Device, Library, device_argument
from dijiang_engines.kernels.packing import packed_bytes

Activation = Literal["identity", "relu", "gelu", "gelu_tanh", "silu", "swiglu"]
Norm = Literal["norm_none", "layer_norm", "rms_norm"]


@dataclass(frozen=True)
class LinearTerm:
    """One product, input weight^T + bias. T is float16 or bfloat16."""

    input: Any
    """T [..., K]; K is a multiple of 32."""
    weight: Any
    """T [N, K]."""
    bias: Any = None
    """float32 [N], or None."""
    weight_format: Literal["same", "int8", "int4"] = "same"
    """Quantised, the weight is uint8 [bytes], as dijiang_engines.kernels.packing.pack makes it."""
    bias_is_rounded: bool = False
    """The bias' numbers are T's."""


@dataclass(frozen=True)
class LinearOutput:
    """activation(the sum of the terms) + residual; with "swiglu", silu(first term) * second."""

    output: Any
    """T [..., N], written."""
    terms: Sequence[LinearTerm]
    """One or two; with a norm, of the same input."""
    activation: Activation = "identity"
    residual: Any = None
    """T [..., N], or None."""
    norm: Norm = "norm_none"
    """Of the input, rounded to T."""
    norm_weight: Any = None
    """float32 [K], with a norm."""
    norm_bias: Any = None
    """float32 [K], or None."""
    epsilon: float = 0.0


class LinearKernels(Library):
    """Products of few rows; conventions as in `dijiang_engines.kernels.attention`."""

    def linear(
        self,
        outputs: Sequence[LinearOutput],
        *,
        constant_weights: bool = False,
        workspace: Any = None,
        stream: int = 0,
    ) -> None:
        """Enqueue up to four outputs that do not depend on each other, in one launch.

        All leading dimensions together are the rows; arrays are dense. Everything is summed in float32.

        Args:
            outputs: what to compute.
            constant_weights: no work on the stream writes weights, biases or norms; they may be read while
                the work before still runs.
            workspace: uint8 [workspace_size or more], for many rows, or None.
            stream: where to.

        Raises:
            KernelError: an array is wrong, or CUDA refused.
        """
        call = linear_call(outputs, constant_weights)
        if workspace is None:
            self.call("dijiang_linear", ctypes.byref(call), stream)
            return
        array = device_array("workspace", workspace)
        array.require(["uint8"], array.shape, 0)
        self.call(
            "dijiang_linear_with_workspace", ctypes.byref(call), array.pointer, _count(array.shape), stream
        )

    def workspace_size(self, outputs: Sequence[LinearOutput]) -> int:
        """Bytes of workspace that `linear` may use for these outputs; 0 for few rows."""
        size = ctypes.c_size_t()
        call = linear_call(outputs, False)
        self.call("dijiang_linear_workspace_size", ctypes.byref(call), ctypes.byref(size))
        return size.value

    def library(self) -> str:
        """The cuBLASLt that products of many rows use, and its version.

        Raises:
            KernelError: there is none.
        """
        text = ctypes.create_string_buffer(1024)
        self.call("dijiang_linear_library", text, len(text))
        return text.value.decode()

    def linear_plan(self, outputs: Sequence[LinearOutput], device: Device | None = None) -> str:
        """One line that says how `linear` cuts the work.

        Args:
            outputs: as in `linear`.
            device: None for the current one; given, no GPU is needed.

        Raises:
            KernelError: a size is out of range, or too large for the device.
        """
        text = ctypes.create_string_buffer(1024)
        call = linear_call(outputs, False)
        self.call("dijiang_linear_plan", ctypes.byref(call), device_argument(device), text, len(text))
        return text.value.decode()


def linear_call(outputs: Sequence[LinearOutput], constant_weights: bool) -> abi.LinearCallStruct:
    """dijiang_linear_call of the C ABI; arguments and errors as of `LinearKernels.linear`."""
    terms = [(index, term) for index, output in enumerate(outputs) for term in output.terms]
    if len(outputs) > abi.LINEAR_MAX_OUTPUTS or len(terms) > abi.LINEAR_MAX_TERMS:
        raise KernelError(
            "too much for one call",
            got=f"{len(outputs)} outputs of {len(terms)} terms",
            expected=f"up to {abi.LINEAR_MAX_OUTPUTS} outputs and {abi.LINEAR_MAX_TERMS} terms",
        )
    if not outputs or not outputs[0].terms:
        raise KernelError("nothing to compute", got="no output or no term", expected="one or more")
    first = device_array("outputs[0].output", outputs[0].output)
    width = first.size(len(first.shape) - 1)
    rows = _count(first.shape) // max(width, 1)
    dtype = str(first.dtype)
    if dtype not in ("float16", "bfloat16"):
        raise KernelError("outputs[0].output has the wrong type", got=dtype, expected="float16 or bfloat16")
    call = abi.LinearCallStruct(
        dtype=abi.DTYPES[dtype], rows=rows, term_count=len(terms), output_count=len(outputs),
        constant_weights=int(constant_weights),
    )  # fmt: skip
    for t, (index, term) in enumerate(terms):
        weight = device_array(f"terms[{t}].weight", term.weight)
        if term.weight_format == "same":
            sizes = [weight.size(0), weight.size(1)]
            weight.require([dtype], sizes, 0)
        else:
            sizes = [
                device_array("output", outputs[index].output).shape[-1],
                device_array("input", term.input).shape[-1],
            ]
            weight.require(["uint8"], [packed_bytes(term.weight_format, *sizes)], 0)
        call.rounded_biases |= int(term.bias_is_rounded) << t
        call.weight_formats |= abi.WEIGHT_FORMATS[term.weight_format] << (8 * t)
        call.terms[t] = abi.LinearTermStruct(
            input=_matrix(f"terms[{t}].input", term.input, dtype, rows, sizes[1]),
            weight=weight.pointer,
            bias=_vector(f"terms[{t}].bias", term.bias, sizes[0]),
            inner=sizes[1],
            output=index,
        )
        if sizes[0] != device_array("output", outputs[index].output).shape[-1]:
            raise KernelError(
                f"terms[{t}].weight has the wrong shape", got=sizes,
                expected=f"as many rows as outputs[{index}].output has columns",
            )  # fmt: skip
    for o, output in enumerate(outputs):
        inner = next((call.terms[t].inner for t, (index, _) in enumerate(terms) if index == o), 0)
        array = device_array(f"outputs[{o}].output", output.output)
        width = array.shape[-1]
        call.outputs[o] = abi.LinearOutputStruct(
            output=_matrix(array.name, output.output, dtype, rows, width),
            residual=_matrix(f"outputs[{o}].residual", output.residual, dtype, rows, width),
            norm_weight=_vector(f"outputs[{o}].norm_weight", output.norm_weight, inner),
            norm_bias=_vector(f"outputs[{o}].norm_bias", output.norm_bias, inner),
            width=width,
            activation=abi.ACTIVATIONS[output.activation],
            norm=abi.NORMS[output.norm],
            epsilon=output.epsilon,
        )
    return call


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _matrix(name: str, value: Any, dtype: str, rows: int, width: int) -> int:
    array: DeviceArray = device_array(name, value)
    if not array.known:
        return array.pointer
    array.require([dtype], array.shape, 0)
    if not array.shape or array.shape[-1] != width or _count(array.shape) != rows * width:
        raise KernelError(
            f"{name} has the wrong shape", got=list(array.shape), expected=f"{rows} rows of {width}"
        )
    return array.pointer


def _vector(name: str, value: Any, size: int) -> int:
    array = device_array(name, value)
    array.require(["float32"], [size])
    return array.pointer
