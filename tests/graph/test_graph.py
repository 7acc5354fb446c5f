"""The graphs in standard operators against the reference model in float64, over any geometry."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.makers import random_models as rm

from dijiang_engines import io_names
from dijiang_engines.op_contract import ATTRIBUTES, INPUTS, OP_NAME
from dijiang_export.graph import custom_op, lower, opset, tidy, write

LOGIT_TOLERANCE = 1e-4  # of the logits' standard deviation, in float32
# Of the state's largest magnitude. Random tables of both signs cancel in the read-out, and GroupNorm
# then magnifies the rounding that is left.
STATE_TOLERANCE = {"geometric": 1e-5, "tables": 1e-4}

GEOMETRIES = {
    "neox": rm.NEOX,
    "neox-sequential": dataclasses.replace(rm.NEOX, parallel_residual=False),
    "straddling-d80": rm.with_heads(rm.NEOX, 3, 3, 80, 20),
    "d256-one-head": rm.with_heads(rm.NEOX, 1, 1, 256, 64),
    "d64-tables": rm.with_tables(rm.with_heads(rm.NEOX, 2, 2, 64, 16), 400),
    "llama-gqa": rm.LLAMA,
    "llama-gqa-tables": rm.with_tables(rm.LLAMA, 400),
    "opt-350m": rm.OPT_350M,
    "no-rope-no-bias": dataclasses.replace(
        rm.NEOX, rotary_dim=0, attention_bias=False, activation="gelu_tanh"
    ),
}


def compare(spec, model, session, call, *, all_logits: bool = False, slack: float = 0.0) -> None:
    """Run a call through a session and the float64 reference; `slack` is allowed on top for logits."""
    ids, positions, lens, states = call
    with torch.no_grad():
        logits, presents = model(
            *(torch.from_numpy(x) for x in (ids, positions, lens)),
            [torch.from_numpy(s).double() for s in states],
            form="recurrent", all_logits=all_logits,
        )  # fmt: skip
    got = session.run(None, rm.feed(ids, positions, lens, states))
    assert np.isfinite(got[0]).all()
    valid = np.arange(ids.shape[1]) < lens[:, None] if all_logits else lens[:, None] > 0
    expected = logits.numpy()
    assert np.abs(got[0] - expected)[valid].max() <= LOGIT_TOLERANCE * expected[valid].std() + slack
    for output, present, past in zip(got[1:], presents, states, strict=True):
        exact = present.numpy()
        assert np.abs(output - exact).max() <= STATE_TOLERANCE[spec.decay] * np.abs(exact).max()
        assert np.array_equal(output[lens == 0], past[lens == 0])


def float32_error(spec, model, call) -> float:
    """The largest error of the reference model's own float32 logits, on valid tokens."""
    ids, positions, lens, states = call
    tensors = [torch.from_numpy(x) for x in (ids, positions, lens)]
    single = rm.ReferenceModel(spec)
    single.load_state_dict(model.state_dict())
    carried = [torch.from_numpy(s) for s in states]
    with torch.no_grad():
        exact, _ = model(*tensors, [s.double() for s in carried])
        rounded, _ = single(*tensors, carried)
    valid = torch.arange(ids.shape[1]) < tensors[2].unsqueeze(-1)
    return float((rounded - exact)[valid].abs().max())


@pytest.fixture(scope="module", params=GEOMETRIES)
def graphs(request):
    spec = GEOMETRIES[request.param]
    model = rm.random_model(spec, dtype=torch.float32)
    sessions = {kind: rm.session(rm.graph_model(spec, model, kind)) for kind in ("prefill", "step")}
    return spec, model, sessions


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 200])
def test_prefill_is_the_recurrence(graphs, length: int) -> None:
    spec, model, sessions = graphs
    compare(spec, model, sessions["prefill"], rm.random_call(spec, 3, length, seed=length))


@pytest.mark.parametrize("batch", [1, 4])
def test_step_is_the_recurrence(graphs, batch: int) -> None:
    spec, model, sessions = graphs
    compare(spec, model, sessions["step"], rm.random_call(spec, batch, 1, seed=batch))


def test_positions_of_a_million(graphs) -> None:
    spec, model, sessions = graphs
    if spec.position_embeddings:
        pytest.skip("learned positions end at the table")
    for kind, length in (("prefill", 70), ("step", 1)):
        compare(spec, model, sessions[kind], rm.random_call(spec, 2, length, seed=1, far=999_950))


def test_pieces_and_steps_equal_one_prefill(graphs) -> None:
    spec, _, sessions = graphs
    ids = np.random.default_rng(5).integers(0, spec.vocab_size, (2, 150))
    zeros = [np.zeros((2, *spec.state_shape), np.float32) for _ in range(spec.num_layers)]

    def run(kind: str, tokens: np.ndarray, start: int, states: list[np.ndarray]) -> list[np.ndarray]:
        lens = np.full(2, tokens.shape[1])
        return sessions[kind].run(None, rm.feed(tokens, np.full(2, start), lens, states))

    whole = run("prefill", ids, 0, zeros)
    states, done, outputs = zeros, 0, whole
    for size in (3, 64, 71, *[1] * 12):
        kind = "step" if size == 1 else "prefill"
        outputs = run(kind, ids[:, done : done + size], done, states)
        states, done = outputs[1:], done + size
    assert done == 150
    assert np.abs(outputs[0] - whole[0]).max() <= LOGIT_TOLERANCE * whole[0].std()
    for got, expected in zip(outputs[1:], whole[1:], strict=True):
        assert np.abs(got - expected).max() <= STATE_TOLERANCE[spec.decay] * np.abs(expected).max()


@given(
    heads=st.integers(1, 5),
    group=st.sampled_from([1, 2, 3]),
    d=st.sampled_from([16, 48, 80]),
    rotary=st.sampled_from([0, 4, 10, 16]),
    tables=st.booleans(),
    length=st.integers(1, 140),
    seed=st.integers(0, 1000),
)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_geometry(
    heads: int, group: int, d: int, rotary: int, tables: bool, length: int, seed: int
) -> None:
    spec = rm.with_heads(dataclasses.replace(rm.NEOX, num_layers=1), heads * group, heads, d, rotary)
    spec = rm.with_tables(spec, 100) if tables else spec
    model = rm.random_model(spec, seed, dtype=torch.float32)
    session = rm.session(rm.graph_model(spec, model, "prefill", all_logits=True))
    call = rm.random_call(spec, 3, length, seed)
    # GroupNorm over groups of one to a few channels of random sign magnifies rounding where they nearly
    # agree. How much, PyTorch in float32 tells.
    rounding = float32_error(spec, model, call)
    compare(spec, model, session, call, all_logits=True, slack=4 * rounding)


def test_steep_and_zero_decay_stay_finite() -> None:
    spec = dataclasses.replace(rm.NEOX, num_layers=1)
    for rates in ([0.0, 0.0, 0.0], [-1e-8, -5.0, -29.0], [-float("inf"), -200.0, -1.0]):
        model = rm.random_model(spec, dtype=torch.float32)
        model.layers[0].attention.log_decay.data = torch.tensor(rates, dtype=torch.float64)
        for kind, length in (("prefill", 130), ("step", 1)):
            session = rm.session(rm.graph_model(spec, model, kind))
            outputs = session.run(None, rm.feed(*rm.random_call(spec, 2, length, seed=2)))
            assert all(np.isfinite(output).all() for output in outputs)


def test_float16_graph_rounds_only_outside_the_op() -> None:
    spec = rm.with_heads(rm.NEOX, 2, 2, 64, 16)
    model = rm.random_model(spec, dtype=torch.float16)
    graph = rm.graph_model(spec, model, "prefill", dtype=torch.float16)
    call = rm.random_call(spec, 2, 100, seed=0)
    outputs = rm.session(graph).run(None, rm.feed(*call))
    assert outputs[0].dtype == np.float32
    assert outputs[1].dtype == np.float32
    with torch.no_grad():
        tensors = [torch.from_numpy(x) for x in call[:3]]
        expected, _ = model(*tensors, [torch.from_numpy(s).double() for s in call[3]], all_logits=False)
    assert np.abs(outputs[0] - expected.numpy())[0].max() < 0.02 * expected.std()


@pytest.mark.parametrize("name", ["neox", "llama-gqa-tables", "opt-350m"])
@pytest.mark.parametrize("kind", ["prefill", "step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_graphs_are_opset_17_with_the_contracts_names(name, kind, dtype, tmp_path) -> None:
    spec = GEOMETRIES[name]
    traced = rm.traced(spec, dtype, kind)
    standard, plugin = traced.clone(), traced.clone()
    lower.lower_to_standard(standard, kind)
    lower.lower_to_tensorrt(plugin)
    for model, target in ((standard, "standard"), (plugin, "trt")):
        path = tmp_path / f"{target}.onnx"
        ir.save(model, path)
        write.check(path, target)  # checker, shape inference, opset, IR
        names = [value.name for value in model.graph.inputs][: 3 + spec.num_layers]
        assert names[:3] == ["input_ids", "positions", "seq_lens"]
        assert names[3:] == [io_names.past_state(i) for i in range(spec.num_layers)]
        outputs = [value.name for value in model.graph.outputs]
        assert outputs == ["logits", *(io_names.present_state(i) for i in range(spec.num_layers))]
        node_names = [node.name for node in model.graph]
        assert len(set(node_names)) == len(node_names)
        assert all(n is not None and n.startswith("/") for n in node_names)
    domains = {node.domain for node in standard.graph}
    assert domains == {""}
    assert not {"Scan", "Loop", "If"} & {node.op_type for node in standard.graph}


def test_plugin_nodes_follow_the_contract() -> None:
    spec = GEOMETRIES["llama-gqa-tables"]
    model = rm.traced(spec, torch.float32, "prefill")
    lower.lower_to_tensorrt(model)
    nodes = [node for node in model.graph if node.op_type == OP_NAME]
    assert len(nodes) == spec.num_layers
    for node in nodes:
        assert node.domain == "dijiang"
        values = {name: attribute.value for name, attribute in node.attributes.items()}
        epsilon = values.pop("epsilon")
        assert epsilon == pytest.approx(1e-5)
        assert values == {
            "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rotary_dim": 16,
            "plugin_namespace": "dijiang", "plugin_version": "1",
        }  # fmt: skip
        assert len(node.inputs) == len(INPUTS)
        dtypes = {"T": ir.DataType.FLOAT, "float32": ir.DataType.FLOAT, "int32": ir.DataType.INT32}
        for formal, value in zip(INPUTS, node.inputs, strict=True):
            assert value is not None
            assert value.dtype == dtypes[formal.kind], formal.name
    # positions and seq_lens are two inputs, not one traced twice
    assert nodes[0].inputs[3].producer().inputs[0].name == "positions"
    assert nodes[0].inputs[4].producer().inputs[0].name == "seq_lens"


def test_geometric_plugin_nodes_leave_out_the_tables() -> None:
    model = rm.traced(rm.NEOX, torch.float16, "step")
    node = next(node for node in model.graph if node.op_type == OP_NAME)
    assert len(node.inputs) == len(INPUTS) - 2
    assert node.inputs[0].dtype == ir.DataType.FLOAT16
    assert node.inputs[5].dtype == ir.DataType.FLOAT


def test_the_op_runs_in_pytorch_as_in_the_contract() -> None:
    spec = rm.NEOX
    layer = rm.random_model(spec).layers[0].attention.float()
    _, positions, lens, states = rm.random_call(spec, 2, 9, seed=0)
    generator = torch.Generator().manual_seed(0)
    arguments = (
        torch.randn(2, 9, spec.qkv_size, generator=generator),
        torch.randn(2, 9, spec.attention_size, generator=generator),
        torch.from_numpy(states[0]),
        torch.from_numpy(positions).int(),
        torch.from_numpy(lens).int(),
        layer.proj, layer.norm_weight, layer.norm_bias, torch.ones(2), layer.log_decay, None, None,
        3, 3, 16, 4, 1e-5,
    )  # fmt: skip
    torch.library.opcheck(custom_op.attention, arguments)
    schema = custom_op.onnx_schema()
    assert [i.name for i in schema.inputs] == [formal.name for formal in INPUTS]
    traced_names = [a.name for a in torch.ops.dijiang.attention.default._schema.arguments]
    assert traced_names == [*(f.name for f in INPUTS), *ATTRIBUTES]


def test_tracing_notices_a_shape_that_is_not_the_contracts() -> None:
    value = ir.Value(name="x", shape=ir.Shape([2, "s0"]), type=ir.TensorType(ir.DataType.FLOAT))
    with pytest.raises(AssertionError, match="contract"):
        tidy._learn_symbols(value, ("batch", 3), {})


def test_opset_18_reductions_become_opset_17() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> g (float[2, 3] x) => (float[2, 1] y) '
        "<int64[1] axes = {1}> { y = ReduceMean<keepdims = 1>(x, axes) }"
    )
    converted = ir.from_proto(model)
    opset.downgrade_to_17(converted)
    proto = ir.to_proto(converted)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == 17
    x = np.array([[1, 2, 6], [0, 0, 3]], np.float32)
    assert np.array_equal(rm.session(converted).run(None, {"x": x})[0], [[3], [1]])


def test_an_operator_without_a_rule_is_refused() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]> g (float[2, 3] x) => (float[2, 3] y) { y = Mish(x) }'
    )
    with pytest.raises(AssertionError, match="Mish"):
        opset.downgrade_to_17(ir.from_proto(model))
