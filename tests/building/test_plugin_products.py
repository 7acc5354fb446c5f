"""A step's products given to the plugin: the same function before and after, in float64.

The networks of whole models are those that TensorRT for RTX really parsed, replayed on fakes/network.py; the
small ones are made by hand and show what no model of ours has. That a real TensorRT takes the layers is
tests/nvidia/test_tensorrt_bindings.py's and the GPU's to show.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.fakes.network import Network, Registry, Tensor, Trt, replay
from support.makers.step_graphs import FAMILIES, PARALLEL, description, initializers, step_graph

from dijiang_engines.building.plugin_products import rewrite
from dijiang_engines.errors import RunnerError
from dijiang_engines.spec import ModelSpec


def step_network(family: str) -> Network:
    """The step network of a random model, with its float16 weights."""
    return replay(description(family), initializers(step_graph(FAMILIES[family])))


def call(spec: ModelSpec, rows: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    given: dict[str, Any] = {
        "input_ids": rng.integers(0, spec.vocab_size, (rows, 1)),
        "positions": rng.integers(0, 9, rows),
        "seq_lens": np.ones(rows, np.int64),
    }
    for layer in range(spec.num_layers):
        given[f"past_key_values.{layer}.recurrent_state"] = rng.standard_normal((rows, *spec.state_shape))
    return given


def same(before: list[Any], after: list[Any], bound: float = 1e-9) -> None:
    for one, other in zip(before, after, strict=True):
        assert np.abs(one - other).max() <= bound * np.abs(one).max()


def plugins(network: Network) -> list[Any]:
    return [layer for layer in network.layers if layer.kind == "PLUGIN_V2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rewritten_network_computes_the_same(family: str) -> None:
    spec = FAMILIES[family]
    network, given = step_network(family), call(spec)
    before = network.evaluate(given)
    done = rewrite(Trt(), network)
    # The graph's GELU has constants rounded to float16, the plugin's has not.
    same(before, network.evaluate(given), 5e-5 if spec.activation == "gelu" else 1e-9)
    # qkv and gate, the MLP's first product and, with parallel residual, all three in one; the last products.
    launches = 2 if spec.parallel_residual else 4
    head = int(not spec.tied_embeddings)  # a tied head multiplies by the transposed table
    assert done.launches == launches * spec.num_layers + head == len(plugins(network))
    assert done.products == (6 if spec.gated_mlp else 5) * spec.num_layers + head
    assert done.left == 1 - head
    assert [layer.kind for layer in needed_layers(network)].count("MATRIX_MULTIPLY") == done.left


def needed_layers(network: Network) -> list[Any]:
    makers = {tensor.name: layer for layer in network.layers for tensor in layer.outputs}
    found: list[Any] = []
    waiting = list(network.outputs)
    while waiting:
        layer = makers.get(waiting.pop().name)
        if layer is not None and not any(layer is other for other in found):
            found.append(layer)
            waiting += [tensor for tensor in layer.inputs if tensor is not None]
    return found


def test_what_is_fused() -> None:
    network = step_network("parallel")
    rewrite(Trt(), network)
    first, second, *_, head = (layer.own["linear"] for layer in plugins(network))
    assert first["term_output"].tolist() == [0, 1, 2] and first["output_norm"].tolist() == [1, 1, 1]
    assert first["output_activation"].tolist() == [0, 0, 2] and first["dtype"].tolist() == [1]
    assert np.allclose(first["output_epsilon"], PARALLEL.norm_epsilon)
    assert second["term_output"].tolist() == [0, 0] and second["output_residual"].tolist() == [1]
    assert second["output_norm"].tolist() == [0]
    assert head["output_norm"].tolist() == [1] and head["output_residual"].tolist() == [0]
    llama = step_network("llama")
    rewrite(Trt(), llama)
    assert [5] in [layer.own["linear"]["output_activation"].tolist() for layer in plugins(llama)]


def test_weights_keep_their_bits() -> None:
    network = step_network("parallel")
    weight = next(layer for layer in network.layers if "qkv.weight" in layer.outputs[0].name).own["weights"]
    rewrite(Trt(), network)
    packed = plugins(network)[0].inputs[1]
    constant = next(layer for layer in network.layers if packed in layer.outputs).own["weights"]
    assert constant.dtype == np.int32 and np.array_equal(constant.view(np.uint16), weight.T.view(np.uint16))


# -- quantised ----------------------------------------------------------------------------------------


def stored(rng: Any, width: int, inner: int, form: str) -> tuple[Any, Any]:
    """Random words and scales."""
    words = rng.integers(-(2**31), 2**31, (width, inner // 32, 4 if form == "int4" else 8)).astype(np.int32)
    return words, (rng.standard_normal(words.shape[:2]) / (40 if form == "int4" else 700)).astype(np.float16)


def quantised(network: Network, forms: str) -> int:
    """Products with constant weights become nodes DijiangLinear, as a quantised bundle has them."""
    rng, count = np.random.default_rng(3), 0
    for layer in list(network.layers):
        if layer.kind != "MATRIX_MULTIPLY" or "transposed" in layer.own:
            continue
        form = ("int4", "int8")[count % 2] if forms == "both" else forms
        words, scales = stored(rng, layer.outputs[0].shape[-1], layer.inputs[0].shape[-1], form)
        layer.inputs[1:] = [network.constant(words), network.constant(scales)]
        layer.kind, layer.own = "PLUGIN_V3", {"stored": True}
        count += 1
    return count


@pytest.mark.parametrize(("family", "forms"), [("parallel", "int4"), ("parallel", "both"), ("llama", "both")])
@pytest.mark.parametrize("norms", [True, False])
def test_quantised_products_are_packed_and_fused(family: str, forms: str, norms: bool) -> None:
    spec = FAMILIES[family]
    network, given = step_network(family), call(spec)
    count = quantised(network, forms)
    before = network.evaluate(given)
    done = rewrite(Trt(), network, floats=False, norms=norms)
    same(before, network.evaluate(given), 5e-5 if spec.activation == "gelu" else 1e-9)
    assert count > 0 and done.products == count
    made = [layer.own["linear"] for layer in plugins(network)]
    assert all(
        {1: "int8", 2: "int4"}[f] in (forms, "int4", "int8") for m in made for f in m["term_weight_format"]
    )
    assert any(m["output_norm"].any() for m in made) == (norms and family == "parallel")
    assert not [layer for layer in needed_layers(network) if "stored" in layer.own]


def test_a_launch_is_quantised_or_it_is_not() -> None:
    small = Small()
    words, scales = stored(small.rng, 64, 64, "int8")
    inputs = [small.x, small.network.constant(words), small.network.constant(scales)]
    node = small.network.add("PLUGIN_V2", inputs, [(-1, 1, 64)], [""], stored=True).outputs[0]
    done = small.check(small.pointwise("SUM", small.product(small.x, 64), node), small.product(small.x, 8))
    assert done.products == 3
    for layer in plugins(small.network):
        if "linear" in layer.own:
            assert len(set(layer.own["linear"].get("term_weight_format", [0]))) == 1


def quantised_parts(
    small: Small, widths: tuple[int, ...], forms: tuple[str, ...] = ("int4", "int4")
) -> list[Tensor]:
    parts = []
    for width, form in zip(widths, forms, strict=True):
        words, scales = stored(small.rng, width, 64, form)
        inputs = [small.x, small.network.constant(words), small.network.constant(scales)]
        parts.append(small.network.add("PLUGIN_V2", inputs, [(-1, 1, width)], [""], stored=True).outputs[0])
    return parts


def beside(small: Small, parts: list[Tensor]) -> Tensor:
    """Along the last axis."""
    shape = (-1, 1, sum(part.shape[-1] for part in parts))
    return small.network.add(
        "CONCATENATION", parts, [shape], [""], function=lambda *given: [np.concatenate(given, -1)]
    ).outputs[0]


def added(small: Small, tensor: Tensor) -> Tensor:
    bias = small.network.constant(small.rng.standard_normal((1, 1, tensor.shape[-1])).astype(np.float16))
    return small.pointwise("SUM", tensor, bias)


def test_parts_of_a_matrix_take_their_pieces_of_its_bias() -> None:
    small = Small()
    whole = added(small, beside(small, quantised_parts(small, (40, 24))))
    small.check(whole)
    (fields,) = [layer.own["linear"] for layer in plugins(small.network) if "linear" in layer.own]
    assert fields["term_bias"].tolist() == [2, 2] and fields["output_width"].tolist() == [40, 24]
    assert "ELEMENTWISE" not in [layer.kind for layer in needed_layers(small.network)]


def test_a_bias_behind_parts_stays_where_something_else_reads_them() -> None:
    small = Small()
    parts = quantised_parts(small, (40, 24))
    small.check(added(small, beside(small, parts)), parts[0])
    twice = Small()
    pieces = quantised_parts(twice, (8, 8))
    both = beside(twice, pieces)
    twice.check(added(twice, both), twice.pointwise("RELU", both))
    for made in (small, twice):
        fields = [layer.own["linear"] for layer in plugins(made.network) if "linear" in layer.own]
        assert [each["term_bias"].tolist() for each in fields] == [[0, 0]]


@pytest.mark.parametrize(
    ("forms", "one"), [(("int4", "int8"), 1), (("int8", "int4"), 1), (("int4", "int4"), 2)]
)
def test_parts_become_one_matrix_of_the_same_numbers(forms: tuple[str, str], one: int) -> None:
    small = Small()
    small.check(added(small, beside(small, quantised_parts(small, (40, 24), forms))), whole=True)
    (fields,) = [layer.own["linear"] for layer in plugins(small.network) if "linear" in layer.own]
    assert fields["term_weight_format"].tolist() == [one] and fields["output_width"].tolist() == [64]
    assert fields["term_bias"].tolist() == [2]
    assert {"CONCATENATION", "ELEMENTWISE"}.isdisjoint(layer.kind for layer in needed_layers(small.network))


def test_parts_stay_parts_where_something_else_reads_one() -> None:
    small, other = Small(), Small()
    parts = quantised_parts(small, (40, 24), ("int4", "int8"))
    small.check(beside(small, parts), parts[1], whole=True)
    mixed = [*quantised_parts(other, (40, 24), ("int4", "int8")), other.product(other.x, 8)]
    other.check(beside(other, mixed), whole=True)
    for made in (small, other):
        assert "CONCATENATION" in [layer.kind for layer in needed_layers(made.network)]


def test_floats_can_be_left_to_tensorrt() -> None:
    network = step_network("parallel")
    done = rewrite(Trt(), network, floats=False)
    assert (done.products, done.launches) == (0, 0) and done.left > 0


def test_a_quantised_product_that_cannot_be_the_plugins_is_an_error() -> None:
    small = Small()
    words, scales = stored(small.rng, 8, 64, "int4")
    for wide in (scales, scales.astype(np.float32) * 1.0001):
        inputs = [small.x, small.network.constant(words), small.network.constant(wide)]
        node = small.network.add("PLUGIN_V2", inputs, [(-1, 1, 8)], [""], stored=True).outputs[0]
        small.network.outputs = [node]
        with pytest.raises(RunnerError, match="cannot be the plugin's"):
            rewrite(Trt(), small.network)
        small.network.layers.pop()


# -- small networks ------------------------------------------------------------------------------------


class Small:
    """x -> products, built by hand."""

    def __init__(self, inner: int = 64) -> None:
        self.network = Network()
        self.rng = np.random.default_rng(0)
        self.x = Tensor("x", (-1, 1, inner))
        self.given = {"x": self.rng.standard_normal((2, 1, inner))}

    def product(self, x: Tensor, width: int, kind: Any = np.float16) -> Tensor:
        weight = (self.rng.standard_normal((x.shape[-1], width)) / 8).astype(kind)
        constant = self.network.shuffled(self.network.constant(weight), (1, *weight.shape))
        return self.network.add("MATRIX_MULTIPLY", [x, constant], [(-1, 1, width)], [""]).outputs[0]

    def pointwise(self, op: str, *tensors: Tensor) -> Tensor:
        kind = "ELEMENTWISE" if len(tensors) == 2 else "ACTIVATION"
        return self.network.add(kind, list(tensors), [tensors[0].shape], [""], op=op).outputs[0]

    def scalar(self, number: float) -> Tensor:
        return self.network.shuffled(self.network.constant(np.array(number, np.float16)), (1, 1, 1))

    def check(self, *outputs: Tensor, whole: bool = False) -> Any:
        """Rewritten, with the same outputs as before."""
        # An output of the network is a cast in real graphs.
        self.network.outputs = [
            self.network.add("CAST", [t], [t.shape], [""], function=lambda x: [x]).outputs[0] for t in outputs
        ]
        before = self.network.evaluate(self.given)
        done = rewrite(Trt(), self.network, whole=whole)
        same(before, self.network.evaluate(self.given))
        return done


def test_sizes_that_the_kernels_do_not_have_stay_tensorrts() -> None:
    small = Small(40)
    done = small.check(small.product(small.x, 8))
    assert (done.products, done.left) == (0, 1)


def test_weights_that_are_no_float16_stay_tensorrts() -> None:
    small = Small()
    done = small.check(small.product(small.x, 8, np.float64), small.product(small.x, 8, np.float32))
    assert (done.products, done.left) == (0, 2)
    wide = Small()  # what TensorRT's parser widened is float16 all the same
    weight = wide.rng.standard_normal((64, 8)).astype(np.float16).astype(np.float32)
    constant = wide.network.shuffled(wide.network.constant(weight), (1, 64, 8))
    result = wide.network.add("MATRIX_MULTIPLY", [wide.x, constant], [(-1, 1, 8)], [""]).outputs[0]
    assert wide.check(result).products == 1


def test_a_product_that_is_read_twice_keeps_its_value() -> None:
    small = Small()
    product = small.product(small.x, 64)
    done = small.check(small.pointwise("RELU", product), small.pointwise("SUM", product, small.x))
    assert done.products == 1
    fields = plugins(small.network)[0].own["linear"]
    assert fields["output_activation"].tolist() == [0] and fields["output_residual"].tolist() == [0]


def test_an_unknown_activation_stays_tensorrts() -> None:
    small = Small()
    done = small.check(small.pointwise("TANH", small.product(small.x, 16)))
    assert done.products == 1
    assert plugins(small.network)[0].own["linear"]["output_activation"].tolist() == [0]
    near = Small()  # twice what SiLU is
    product = near.product(near.x, 16)
    half = near.pointwise("PROD", product, near.pointwise("SIGMOID", product))
    near.check(near.pointwise("PROD", half, near.scalar(2.0)))
    assert plugins(near.network)[0].own["linear"]["output_activation"].tolist() == [0]


def test_a_residual_that_is_broadcast_stays_tensorrts() -> None:
    small = Small()
    row = small.network.add("GATHER", [small.x], [(-1, 1, 1)], [""], function=lambda x: [x[..., :1]]).outputs[
        0
    ]
    small.check(small.pointwise("SUM", small.product(small.x, 64), row))
    assert plugins(small.network)[0].own["linear"]["output_residual"].tolist() == [0]


def test_three_products_in_one_sum() -> None:
    small = Small()
    a, b, c = (small.product(small.x, 64) for _ in range(3))
    small.check(small.pointwise("SUM", small.pointwise("SUM", a, b), c))


def test_a_layer_that_is_listed_before_what_it_reads() -> None:
    """As TensorRT's parser does: the launches still follow each other, and none reads what was replaced."""
    small = Small()
    middle = small.pointwise("TANH", small.x)
    small.check(small.product(small.product(middle, 64), 8))
    again = Small()
    middle = again.pointwise("TANH", again.x)
    result = again.product(again.product(middle, 64), 8)
    again.network.layers.append(again.network.layers.pop(0))
    again.check(result)
    for network in (small.network, again.network):
        assert "MATRIX_MULTIPLY" not in [layer.kind for layer in needed_layers(network)]


def test_an_output_of_the_network_keeps_its_name() -> None:
    small = Small()
    product = small.product(small.x, 8)
    small.network.outputs = [product]
    before = small.network.evaluate(small.given)
    done = rewrite(Trt(), small.network)
    assert (done.products, done.left) == (0, 1)
    same(before, small.network.evaluate(small.given))


def test_more_outputs_than_a_launch_takes() -> None:
    small = Small()
    done = small.check(*(small.product(small.x, 8 * n) for n in range(1, 8)))
    assert (done.products, done.launches) == (7, 2)


@pytest.mark.parametrize(
    ("registry", "what"), [(Registry(found=False), "not registered"), (Registry(accepts=False), "refuses")]
)
def test_a_plugin_that_is_missing_or_refuses(registry: Registry, what: str) -> None:
    with pytest.raises(RunnerError, match=what):
        rewrite(Trt(registry), step_network("parallel"))
