"""plugins/include/dijiang/{kernels,sampling,linear,step}.h in ctypes: structs and functions.

The headers say what everything means; fields that are the op's come from `op_contract`.
tests/kernels/test_kernels_host.py compares sizes and offsets with what a C compiler makes of them.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int32, c_int64, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p

from dijiang_engines.op_contract import ATTRIBUTES, INPUTS, OUTPUTS

ABI_VERSION = 1

OK, INVALID_ARGUMENT, UNSUPPORTED, CUDA_ERROR, INTERNAL_ERROR = range(5)

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
INTEGERS = {"int32": 0, "int64": 1}
NORMS = {"norm_none": 0, "layer_norm": 1, "rms_norm": 2}
ACTIVATIONS = {"identity": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "swiglu": 5}
WEIGHT_FORMATS = {"same": 0, "int8": 1, "int4": 2}
LINEAR_MAX_TERMS = LINEAR_MAX_OUTPUTS = 4
LINEAR_INNER_STEP = 32
"""The inner dimension of dijiang_linear is a multiple of it."""

STEP_MAX_LAYERS = 128
STEP_MATRICES = ("q", "k", "v", "gate", "dense", "up", "mlp_gate", "down", "head")
"""Matrices of a quantised model of dijiang_step, by number."""

ROW_STATUS = ("ok", "not finite", "nothing allowed", "bad options")
"""Names of what `sample` writes to row_status, by number."""


STRIDES = {
    "qkv": ("qkv_batch_stride", "qkv_token_stride"),
    "gate": ("gate_batch_stride", "gate_token_stride"),
    "output": ("output_batch_stride", "output_token_stride"),
    "past_state": ("past_batch_stride",),
    "present_state": ("present_batch_stride",),
}
"""Tensors of the op that need not be dense: the fields that say their strides, from the first axis on."""


class DeviceStruct(ctypes.Structure):
    """dijiang_device."""

    _fields_ = [
        ("compute_capability", c_int32),
        ("multiprocessors", c_int32),
        ("shared_memory", c_int32),
        ("reserved", c_int32),
    ]


class GeometryStruct(ctypes.Structure):
    """dijiang_geometry."""

    _fields_ = [
        *((name, c_int32) for name, kind in ATTRIBUTES.items() if kind == "int"),
        ("dtype", c_int32),
        ("table_rows", c_int32),
        *((name, c_float) for name, kind in ATTRIBUTES.items() if kind == "float"),
        ("reserved", c_int32),
    ]


class AttentionBuffersStruct(ctypes.Structure):
    """dijiang_attention_buffers."""

    _fields_ = [
        *((formal.name, c_void_p) for formal in (*INPUTS, *OUTPUTS)),
        *((name, c_int64) for names in STRIDES.values() for name in names),
        ("workspace", c_void_p),
        ("workspace_size", c_size_t),
        ("sync", c_void_p),
        ("sync_size", c_size_t),
    ]


class SamplingOptionsStruct(ctypes.Structure):
    """dijiang_sampling_options."""

    _fields_ = [
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("repetition_penalty", c_double),
        ("seed", c_uint64),
        ("top_k", c_int32),
        ("reserved", c_int32),
    ]


class SampleBuffersStruct(ctypes.Structure):
    """dijiang_sample_buffers."""

    _fields_ = [
        ("logits", c_void_p),
        ("logits_row_stride", c_int64),
        ("allowed", c_void_p),
        ("allowed_row_stride", c_int64),
        ("seen", c_void_p),
        ("seen_row_stride", c_int64),
        ("row_options", c_void_p),
        ("streams", c_void_p),
        ("draws", c_void_p),
        ("tokens", c_void_p),
        ("row_status", c_void_p),
        ("batch", c_int32),
        ("vocabulary", c_int32),
        ("integers", c_int32),
        ("reserved", c_int32),
    ]


class AdvanceBuffersStruct(ctypes.Structure):
    """dijiang_advance_buffers."""

    _fields_ = [
        ("tokens", c_void_p),
        ("row_status", c_void_p),
        ("positions", c_void_p),
        ("seq_lens", c_void_p),
        ("draws", c_void_p),
        ("input_ids", c_void_p),
        ("history", c_void_p),
        ("history_lens", c_void_p),
        ("history_row_stride", c_int64),
        ("seen", c_void_p),
        ("seen_row_stride", c_int64),
        ("finished", c_void_p),
        ("stop_ids", c_void_p),
        ("active", c_void_p),
        ("batch", c_int32),
        ("vocabulary", c_int32),
        ("history_max", c_int32),
        ("stop_count", c_int32),
        ("pad_id", c_int32),
        ("integers", c_int32),
    ]


class LinearTermStruct(ctypes.Structure):
    """dijiang_linear_term."""

    _fields_ = [
        ("input", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("inner", c_int32),
        ("output", c_int32),
    ]


class LinearOutputStruct(ctypes.Structure):
    """dijiang_linear_output."""

    _fields_ = [
        ("output", c_void_p),
        ("residual", c_void_p),
        ("norm_weight", c_void_p),
        ("norm_bias", c_void_p),
        ("width", c_int32),
        ("activation", c_int32),
        ("norm", c_int32),
        ("epsilon", c_float),
    ]


class LinearCallStruct(ctypes.Structure):
    """dijiang_linear_call."""

    _fields_ = [
        ("dtype", c_int32),
        ("rows", c_int32),
        ("term_count", c_int32),
        ("output_count", c_int32),
        ("constant_weights", c_int32),
        ("weight_formats", c_uint32),
        ("rounded_biases", c_uint32),
        ("reserved", c_uint32),
        ("terms", LinearTermStruct * LINEAR_MAX_TERMS),
        ("outputs", LinearOutputStruct * LINEAR_MAX_OUTPUTS),
    ]


class StepModelStruct(ctypes.Structure):
    """dijiang_step_model."""

    _fields_ = [
        *(
            (name, c_int32)
            for name in (
                "layers", "hidden", "inner", "vocabulary", "num_heads", "num_kv_heads", "head_dim",
                "rotary_dim", "dtype", "norm", "activation", "parallel_residual", "table_rows",
                "position_rows", "position_offset",
            )
        ),
        ("norm_epsilon", c_float),
        ("group_norm_epsilon", c_float),
        ("quantised", c_int32),
        ("head_format", c_int32),
        ("embedding_format", c_int32),
        ("int8_matrices", c_uint8 * STEP_MAX_LAYERS),
        ("reserved", c_int32),
    ]  # fmt: skip


class StepSizeStruct(ctypes.Structure):
    """dijiang_step_size."""

    _fields_ = [
        ("packed", c_size_t),
        ("sync", c_size_t),
        ("blocks", c_int32),
        ("threads", c_int32),
        ("shared_memory", c_int32),
        ("ring", c_int32),
    ]


class StepLayerStruct(ctypes.Structure):
    """dijiang_step_layer."""

    _fields_ = [
        (name, c_void_p)
        for name in (
            "qkv", "gate", "dense", "up", "mlp_gate", "down", "qkv_bias", "dense_bias", "up_bias",
            "mlp_gate_bias", "down_bias", "attention_norm_weight", "attention_norm_bias",
            "mlp_norm_weight", "mlp_norm_bias", "proj", "norm_weight", "norm_bias", "log_decay", "gain",
            "read_scale",
        )
    ]  # fmt: skip


class StepEndsStruct(ctypes.Structure):
    """dijiang_step_ends."""

    _fields_ = [(name, c_void_p) for name in ("head", "norm_weight", "norm_bias", "inv_freq")]


class StepBuffersStruct(ctypes.Structure):
    """dijiang_step_buffers."""

    _fields_ = [
        ("packed", c_void_p),
        ("embedding", c_void_p),
        ("embedding_scales", c_void_p),
        ("position_embedding", c_void_p),
        ("input_ids", c_void_p),
        ("positions", c_void_p),
        ("seq_lens", c_void_p),
        ("states", ctypes.POINTER(c_void_p)),
        ("state_row_stride", c_int64),
        ("logits", c_void_p),
        ("logits_row_stride", c_int64),
        ("sync", c_void_p),
        ("sync_size", c_size_t),
        ("rows", c_int32),
        ("integers", c_int32),
    ]


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "dijiang_device": DeviceStruct,
    "dijiang_geometry": GeometryStruct,
    "dijiang_attention_buffers": AttentionBuffersStruct,
    "dijiang_sampling_options": SamplingOptionsStruct,
    "dijiang_sample_buffers": SampleBuffersStruct,
    "dijiang_advance_buffers": AdvanceBuffersStruct,
    "dijiang_linear_term": LinearTermStruct,
    "dijiang_linear_output": LinearOutputStruct,
    "dijiang_linear_call": LinearCallStruct,
    "dijiang_step_model": StepModelStruct,
    "dijiang_step_size": StepSizeStruct,
    "dijiang_step_layer": StepLayerStruct,
    "dijiang_step_ends": StepEndsStruct,
    "dijiang_step_buffers": StepBuffersStruct,
}

_pointer = ctypes.POINTER
_text = ctypes.c_char_p
_sizes = [_pointer(GeometryStruct), c_int32, c_int32, _pointer(DeviceStruct), _pointer(c_size_t)]

FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "dijiang_abi_version": (c_int32, []),
    "dijiang_version": (_text, []),
    "dijiang_architectures": (_text, []),
    "dijiang_status_name": (_text, [c_int32]),
    "dijiang_last_error": (_text, []),
    "dijiang_query_device": (c_int32, [_pointer(DeviceStruct)]),
    "dijiang_attention_workspace_size": (c_int32, [*_sizes]),
    "dijiang_attention_sync_size": (c_int32, [*_sizes]),
    "dijiang_attention_plan": (
        c_int32,
        [_pointer(GeometryStruct), c_int32, c_int32, _pointer(DeviceStruct), c_void_p, c_size_t],
    ),
    "dijiang_attention": (
        c_int32,
        [_pointer(GeometryStruct), c_int32, c_int32, _pointer(AttentionBuffersStruct), c_void_p],
    ),
    "dijiang_sample": (c_int32, [_pointer(SamplingOptionsStruct), _pointer(SampleBuffersStruct), c_void_p]),
    "dijiang_sample_plan": (c_int32, [c_int32, c_int32, _pointer(DeviceStruct), c_void_p, c_size_t]),
    "dijiang_advance": (c_int32, [_pointer(AdvanceBuffersStruct), c_void_p]),
    "dijiang_linear": (c_int32, [_pointer(LinearCallStruct), c_void_p]),
    "dijiang_linear_with_workspace": (c_int32, [_pointer(LinearCallStruct), c_void_p, c_size_t, c_void_p]),
    "dijiang_linear_workspace_size": (c_int32, [_pointer(LinearCallStruct), _pointer(c_size_t)]),
    "dijiang_linear_library": (c_int32, [c_void_p, c_size_t]),
    "dijiang_linear_plan": (
        c_int32,
        [_pointer(LinearCallStruct), _pointer(DeviceStruct), c_void_p, c_size_t],
    ),
    "dijiang_step_sizes": (
        c_int32,
        [_pointer(StepModelStruct), c_int32, _pointer(DeviceStruct), _pointer(StepSizeStruct)],
    ),
    "dijiang_step_pack_layer": (
        c_int32,
        [_pointer(StepModelStruct), c_int32, _pointer(StepLayerStruct), c_void_p, c_size_t, c_void_p],
    ),
    "dijiang_step_pack_matrix": (
        c_int32,
        [
            _pointer(StepModelStruct),
            c_int32,
            c_int32,
            c_void_p,
            c_void_p,
            c_void_p,
            c_size_t,
            c_void_p,
        ],
    ),
    "dijiang_step_pack_ends": (
        c_int32,
        [_pointer(StepModelStruct), _pointer(StepEndsStruct), c_void_p, c_size_t, c_void_p],
    ),
    "dijiang_step": (c_int32, [_pointer(StepModelStruct), _pointer(StepBuffersStruct), c_void_p]),
}
"""Name -> result, arguments."""


def declare(library: ctypes.CDLL) -> None:
    """Give every function of the ABI its types.

    Raises:
        AttributeError: the library lacks one.
    """
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
