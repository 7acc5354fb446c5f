"""Copies of the op's contract that cannot be made from `op_contract`: each against it, from its own text."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
import torch
from support.makers import random_models as rm
from support.paths import ROOT

from dijiang_engines.kernels import abi
from dijiang_engines.kernels.attention import AttentionBuffers
from dijiang_engines.op_contract import (
    ATTRIBUTES,
    CONSTANTS,
    DOMAIN,
    INPUTS,
    OP_NAME,
    OP_VERSION,
    OUTPUTS,
    T_TYPES,
    Attributes,
    Formal,
    Inputs,
    attributes_of,
    dimensions,
)
from dijiang_engines.spec import ModelSpec
from dijiang_export.graph import custom_op
from dijiang_export.reference import attention as reference
from dijiang_export.reference.model import ReferenceModel

TENSORS = (*INPUTS, *OUTPUTS)
KERNELS_HEADER = (ROOT / "plugins/include/dijiang/kernels.h").read_text()
MODELS = pytest.mark.parametrize(
    "spec", [rm.NEOX, rm.LLAMA, rm.with_tables(rm.OPT_350M, 40)], ids=["neox", "llama", "opt tables"]
)
C_TYPES = {"T": "void", "float32": "float", "int32": "int32_t"}


def only(pattern: str, folder: str) -> str:
    """The text of the one C++ file below `folder` that matches."""
    texts = [path.read_text() for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    found = [text for text in texts if re.search(pattern, text)]
    assert len(found) == 1, f"{pattern} in {len(found)} files"
    return found[0]


def c_struct(name: str) -> list[tuple[str, str, str]]:
    """(type, name, comment) of each field of a struct of kernels.h."""
    body = re.search(rf"typedef struct \{{([^}}]*)\}} {name};", KERNELS_HEADER)
    assert body is not None
    return re.findall(r"^ *([\w ]+\*?) (\w+); */\* (.*?) \*/", body[1], re.MULTILINE)


# -- C and C++ ----------------------------------------------------------------------------------------------


def test_the_c_header_has_the_tensors_in_order() -> None:
    fields = c_struct("dijiang_attention_buffers")[: len(TENSORS)]
    assert [name for _, name, _ in fields] == [formal.name for formal in TENSORS]
    for (kind, _, comment), formal in zip(fields, TENSORS, strict=True):
        const = "const " if formal in INPUTS else ""
        assert kind == f"{const}{C_TYPES[formal.kind]}*", formal.name
        # Its comments write shapes without the dots, and say NULL where the contract has "optional".
        shape = formal.shape.replace("2·Hkv", "2 Hkv").replace("·d", " d").replace("+", " + ")
        assert comment.replace("P [d, d]", "[d, d]").removeprefix("T ").startswith(shape), formal.name
        assert ("NULL with geometric" in comment) == formal.optional, formal.name


def test_the_c_header_has_the_attributes() -> None:
    kinds = {"int": "int32_t", "float": "float"}
    fields = {name: kind for kind, name, _ in c_struct("dijiang_geometry")}
    assert {name: fields.pop(name) for name in ATTRIBUTES} == {n: kinds[k] for n, k in ATTRIBUTES.items()}
    assert list(fields) == ["dtype", "table_rows", "reserved"]


def test_the_c_header_has_the_types_of_t() -> None:
    numbers = re.findall(r"DIJIANG_(FLOAT32|FLOAT16|BFLOAT16) = (\d)", KERNELS_HEADER)
    assert {name.lower(): int(number) for name, number in numbers} == abi.DTYPES
    assert tuple(abi.DTYPES) == T_TYPES


def test_the_tensorrt_plugin_has_the_tensors_and_their_sizes() -> None:
    """plugins/tensorrt/**/tensors.cpp, as text: the order of names, and the sizes that it wants of each."""
    text = only(r"kNames\[kInputsWithTables\]", "plugins/tensorrt")
    names, outputs = re.findall(r"k(?:Output)?Names\[\w+\] = \{([^}]*)\}", text)
    assert re.findall(r'"(\w+)"', names + outputs) == [formal.name for formal in TENSORS]
    letters = {
        "batch": "B", "length": "L", "heads": "H", "size": "d", "rows": "N", "width": "H·d",
        "qkv_width": "(H+2·Hkv)·d", "frequencies": "max(r/2, 1)",
    }  # fmt: skip
    start = text.index("wanted = {")
    geometric, with_tables = text[start : text.index("if (tables)", start)], text[start:]

    def shapes(part: str) -> list[tuple[str, ...]]:
        found = re.findall(r"\{((?:&\w+(?:, )?)+)\}", part)
        return [tuple(letters[name] for name in re.findall(r"&(\w+)", shape)) for shape in found]

    fixed = [formal for formal in INPUTS if not formal.optional]
    assert shapes(geometric) == [tuple(dim for dim in formal.dims if dim != "N") for formal in fixed]
    end = with_tables.index("const Sizes sizes")
    rest = [f for f in INPUTS if f.name == "log_decay" or f.optional] + list(OUTPUTS)
    assert shapes(with_tables[:end])[len(fixed) :] == [formal.dims for formal in rest]


def test_the_tensorrt_plugin_has_the_attributes() -> None:
    kinds = {"kINT32": "int", "kFLOAT32": "float"}
    fields = only(r'\{"num_heads", PluginFieldType', "plugins/tensorrt")
    table = re.findall(r'\{"(\w+)", PluginFieldType::(\w+), 1\}', fields)[: len(ATTRIBUTES)]
    assert [(name, kinds[kind]) for name, kind in table] == list(ATTRIBUTES.items())
    identity = only(r'kPluginName\[\] = "DijiangAttention"', "plugins/tensorrt")
    for constant, value in (("Name", OP_NAME), ("Version", OP_VERSION), ("Namespace", DOMAIN)):
        assert f'kPlugin{constant}[] = "{value}"' in identity

    assert f"kAttributeFields = {len(ATTRIBUTES)};" in only("int32_t kAttributeFields = ", "plugins/tensorrt")


def test_the_tensorrt_plugin_counts_and_numbers_tensors() -> None:
    text = only("constexpr int32_t kInputsWithTables = ", "plugins/tensorrt")
    for name, value in (
        ("kInputs", sum(not formal.optional for formal in INPUTS)),
        ("kInputsWithTables", len(INPUTS)),
        ("kOutputs", len(OUTPUTS)),
    ):
        assert f"constexpr int32_t {name} = {value};" in text
    for enum, formals in (("Input", INPUTS), ("Output", OUTPUTS)):
        body = re.search(rf"enum {enum} \{{([^}}]*)\}}", text)
        assert body is not None
        camel = ["k" + formal.name.title().replace("_", "") for formal in formals]
        assert re.findall(r"\w+", body[1]) == camel


def test_the_cuda_kernels_have_the_tensors_and_attributes() -> None:
    text = only(r"struct AttentionParams \{", "plugins/kernels")
    body = re.search(r"struct AttentionParams \{([^}]*)\}", text)
    assert body is not None
    tensors = re.findall(r"^ *((?:const )?\w+\*) (\w+);", body[1], re.MULTILINE)[: len(TENSORS)]
    assert tensors == [
        (f"{'const ' if formal in INPUTS else ''}{C_TYPES[formal.kind]}*", formal.name) for formal in TENSORS
    ]
    for kind, c_type in (("int", "int32_t"), ("float", "float")):
        declared = re.findall(rf"^ *{c_type} ([\w, ]+);", body[1], re.MULTILINE)
        assert ", ".join(name for name, k in ATTRIBUTES.items() if k == kind) in declared


def test_plan_bytes_have_the_attributes() -> None:
    """A plan of TensorRT 8.6 keeps them as bytes: four integers in order, then epsilon, from byte 8 on."""
    header = only('magic "DJTA"', "plugins/tensorrt")
    places = {name: int(at) for at, name in re.findall(r"(\d+)  (\w+)", header)}
    assert {name: places[name] for name in ATTRIBUTES} == {
        name: 8 + 4 * index for index, name in enumerate(ATTRIBUTES)
    }


# -- Python that writes names out ---------------------------------------------------------------------------


def test_the_reference_has_the_tensors_in_order() -> None:
    """Its three forms of decay are one argument, the attributes another."""
    parameters = inspect.signature(reference.dijiang_attention).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    decay = [field.name for field in dataclasses.fields(reference.Decay)]
    assert positional + decay == [formal.name for formal in INPUTS]
    assert parameters["attributes"].annotation == Attributes.__name__


@MODELS
def test_the_models_attributes_are_its_specs(spec: ModelSpec) -> None:
    found = attributes_of(spec)
    assert list(vars(found)) == list(ATTRIBUTES)
    assert vars(found) == {
        **{name: getattr(spec, name) for name in ATTRIBUTES if name != "epsilon"},
        "epsilon": spec.group_norm_epsilon,
    }
    assert (found.width, found.packed_width) == (spec.attention_size, spec.qkv_size)


@MODELS
def test_the_models_parameters_have_the_contracts_shapes(spec: ModelSpec) -> None:
    layer = ReferenceModel(spec, device="meta").layers[0].attention
    of = dimensions(attributes_of(spec), 1, 1, spec.decay_rows)
    own = {name: list(p.shape) for name, p in layer.named_parameters(recurse=False)}
    wanted = {f.name: f.sizes(of) for f in INPUTS if f.name in CONSTANTS - {"inv_freq"}}
    if spec.decay == "geometric":
        wanted = {name: shape for name, shape in wanted.items() if name not in ("gain", "read_scale")}
    assert own == wanted


def test_the_torch_op_has_the_contracts_signature() -> None:
    schema = torch.ops.dijiang.attention.default._schema
    kinds = {"int": "int", "float": "float"}
    found = [(a.name, str(a.type)) for a in schema.arguments]
    tensors = [(f.name, "Optional[Tensor]" if f.optional else "Tensor") for f in INPUTS]
    assert found == [*tensors, *((name, kinds[kind]) for name, kind in ATTRIBUTES.items())]
    assert str(schema) == f"{DOMAIN}::attention{custom_op.torch_schema()}"


def test_strides_belong_to_tensors_of_the_op() -> None:
    struct = [name for name, *_ in abi.AttentionBuffersStruct._fields_]
    fields = [field.name for field in dataclasses.fields(AttentionBuffers)]
    assert sorted(fields) == sorted(struct)
    by_name = {formal.name: formal for formal in TENSORS}
    for name, strides in abi.STRIDES.items():
        assert by_name[name].dims[: len(strides)] == ("B", "L")[: len(strides)]


# -- the data itself ----------------------------------------------------------------------------------------


def test_inputs_are_checked_by_name() -> None:
    values = {formal.name: index for index, formal in enumerate(INPUTS)}
    needed = {name: value for name, value in values.items() if name not in ("gain", "read_scale")}
    assert Inputs(**needed).gain is None
    with pytest.raises(TypeError, match="log_decay"):
        Inputs(**{name: value for name, value in needed.items() if name != "log_decay"})
    with pytest.raises(TypeError, match="logdecay"):
        Inputs(**needed, logdecay=1)


def test_shapes_of_one_call() -> None:
    attributes = Attributes(num_heads=6, num_kv_heads=2, head_dim=16, rotary_dim=0, epsilon=1e-5)
    geometric = {f.name: f.sizes(dimensions(attributes, 3, 7, 0)) for f in TENSORS}
    tables = {f.name: f.sizes(dimensions(attributes, 3, 7, 40)) for f in TENSORS}
    assert geometric["qkv"] == [3, 7, 160] and geometric["gate"] == geometric["output"] == [3, 7, 96]
    assert geometric["past_state"] == [3, 6, 16, 16] and geometric["inv_freq"] == [1]
    assert geometric["log_decay"] == [6] and tables["log_decay"] == tables["gain"] == [40, 6]
    assert Formal("x", "T", ("N", "H"), optional=False).shape == "[H] or [N, H]"
