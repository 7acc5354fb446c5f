"""Give a traced graph quantised weights: products by MatMulNBits or DequantizeLinear, embedded tokens.

    MatMul(x, W)            MatMulNBits(x, elements, scale); one for each part of W, results side by side
    Gemm(x, W, transB)      the same; a tied head, with the embedding's own tensors
    Gather(W, ids)          Gather of elements and of scales, then (u - 128) · scale

For TensorRT a product is a node of the plugin DijiangLinear (docs/tensorrt-plugin.md), which `build-engine`
packs, and bytes are read as int32, four at a time: not every TensorRT has tensors of bytes.
The portable form has DequantizeLinear (opset 21) over blocks of a row, Transpose and MatMul. All read the
same bytes. Where activations are float32, scales are cast to it, so that q · scale is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from dijiang_engines.op_contract import DOMAIN as PLUGIN_DOMAIN
from dijiang_engines.op_contract import LINEAR_NAME, linear_fields
from dijiang_engines.weight_formats import BLOCK, ZERO, Activations, Matrix
from dijiang_export.graph.builder import Builder
from dijiang_export.graph.weights import Layout, StoredWeight, zero_point_name
from dijiang_export.quantise.recipe import Recipe

Form = Literal["nbits", "portable", "plugin"]
DOMAIN, DOMAIN_VERSION = "com.microsoft", 1
ACCURACY_LEVELS: dict[Activations, int] = {"float": 0, "int8": 4}
"""MatMulNBits' attribute: 0 leaves it to the runtime, which multiplies in the type of the activations."""
TERMS = 3
"""Of 8 bits each, into which floats are cut."""
LEAST_STEP = 1e-30
"""In the place of a 127th of zero."""
FLOAT, INT32 = ir.DataType.FLOAT.value, ir.DataType.INT32.value
PLUGIN_TYPES = {ir.DataType.FLOAT16: 1, ir.DataType.BFLOAT16: 2}
"""Of activations, as DijiangLinear's `dtype` numbers them; it has no float32."""


class Quantiser:
    """Rewrites one model's products.

    Args:
        model: traced, its weights as inputs; changed in place.
        recipe: of the weights.
        layout: where they are in weights.data.
        form: of the products.
        activations: of MatMulNBits.
    """

    def __init__(
        self, model: ir.Model, recipe: Recipe, layout: Layout, form: Form, activations: Activations
    ) -> None:
        self.model, self.graph, self.recipe, self.layout = model, model.graph, recipe, layout
        self.form, self.activations = form, activations
        self.views: Layout = {}
        """The tensors that the graph reads now, by the names of its new inputs."""
        self._builder = Builder(model.graph)
        self._inputs: dict[str, ir.Value] = {}
        self._terms: dict[str, ir.Value] = {}

    def run(self) -> Layout:
        """Rewrite; where the graph's weights are, old ones and new ones, for `weights.attach`."""
        by_name = {value.name: value for value in self.graph.inputs}
        for source, parts in self.recipe.parts.items():
            weight = by_name[source]
            for node, _ in list(weight.uses()):
                self._builder.scope = (node.name or "").rpartition("/")[0]
                if node.op_type == "Gather":
                    self._replace(node, node, self._rows(node, parts))
                elif node.op_type == "Gemm":
                    self._replace_gemm(node, parts)
                else:
                    assert node.op_type == "MatMul", f"{node.op_type} reads {source}"
                    self._replace(node, node, self._product(node.inputs[0], parts, node.outputs[0]))
            self.graph.inputs.remove(weight)
        passes.RemoveUnusedNodesPass()(self.model)
        if self.form == "nbits":
            self.graph.opset_imports[DOMAIN] = DOMAIN_VERSION
        return {name: one for name, one in self.layout.items() if name not in self.views} | self.views

    def _replace(self, node: ir.Node, last: ir.Node, result: ir.Value) -> None:
        """`result` in the place of what `last` makes; its nodes stand before `node`."""
        old = last.outputs[0]
        result.shape, result.type = old.shape, old.type
        if old.is_graph_output():
            result.name = old.name
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        self.graph.insert_before(node, self._builder.nodes)
        self._builder.nodes = []

    def _replace_gemm(self, node: ir.Node, parts: Sequence[Matrix]) -> None:
        """A tied head is Reshape, Gemm, Reshape: MatMulNBits takes any number of dimensions."""
        flat = node.inputs[0]
        assert flat is not None
        before = flat.producer()
        ((after, _),) = node.outputs[0].uses()
        assert before is not None and before.op_type == "Reshape" and after.op_type == "Reshape"
        self._replace(node, after, self._product(before.inputs[0], parts, after.outputs[0]))

    # -- products ----------------------------------------------------------------------------------------

    def _product(self, x: ir.Value | None, parts: Sequence[Matrix], like: ir.Value) -> ir.Value:
        """x [B, L, K] -> [B, L, N], the parts' rows side by side."""
        assert x is not None and x.dtype is not None and like.shape is not None
        make = {"nbits": self._nbits, "portable": self._dequantised, "plugin": self._plugin}[self.form]
        products = []
        for part in parts:
            product = make(x, part)
            product.shape = ir.Shape([*like.shape[:-1], part.rows])
            product.type = like.type
            products.append(product)
        return products[0] if len(parts) == 1 else self._builder.op("Concat", *products, axis=-1)

    def _nbits(self, x: ir.Value, part: Matrix) -> ir.Value:
        one_token = x.shape is not None and x.shape[1] == 1
        if self.activations == "float" and one_token and x.dtype == ir.DataType.FLOAT:
            return self._exact(x, part)
        return self._multiply(x, part, ACCURACY_LEVELS[self.activations])

    def _exact(self, x: ir.Value, part: Matrix) -> ir.Value:
        """x [B, 1, K] as `TERMS` rows of int8 that add up to it: ONNX Runtime multiplies few rows of int8
        tens of times as fast as it widens an int8 matrix for floats, and 3 times 8 bits are float32's."""
        b = self._builder
        if x.name not in self._terms:
            before, b.nodes = b.nodes, []
            self._terms[str(x.name)] = self._int8_terms(x, part.columns)
            made, b.nodes = b.nodes, before
            producer = x.producer()
            assert producer is not None
            self.graph.insert_after(producer, made)  # before whatever else reads x
        rows = self._multiply(self._terms[str(x.name)], part, ACCURACY_LEVELS["int8"])
        parts = b.split(rows, [1] * TERMS, 1, label="terms/split")
        result = parts[0]
        for term in parts[1:]:
            result = b.op("Add", result, term, label="terms/sum")
        return result

    def _int8_terms(self, x: ir.Value, columns: int) -> ir.Value:
        """[B, 3, K]: multiples of a 127th of each block's largest, the same of the rest, and what is left."""
        b = self._builder
        rest = b.reshape(x, 0, 0, columns // BLOCK, BLOCK, label="terms/blocks")
        terms = []
        for _ in range(TERMS - 1):
            size = b.op("Abs", rest, label="terms/abs")
            largest = b.op("ReduceMax", size, axes=[-1], keepdims=1, label="terms/largest")
            share = b.op("Div", largest, b.real(127.0), label="terms/share")
            step = b.op("Max", share, b.real(LEAST_STEP), label="terms/step")
            ratio = b.op("Div", rest, step, label="terms/ratio")
            near = b.op("Floor", b.op("Add", ratio, b.real(0.5), label="terms/half"), label="terms/near")
            terms.append(b.op("Mul", near, step, label="terms/term"))
            rest = b.op("Sub", rest, terms[-1], label="terms/rest")
        joined = b.op("Concat", *terms, rest, axis=1, label="terms")
        result: ir.Value = b.reshape(joined, 0, 0, columns, label="terms/rows")
        return result

    def _multiply(self, x: ir.Value, part: Matrix, level: int) -> ir.Value:
        elements = self._input(part.stored_name, self.layout[part.stored_name])
        accuracy: dict[str, Any] = {"accuracy_level": level} if level else {}
        result: ir.Value = self._builder.op(
            "MatMulNBits", x, elements, self._scale(part, x.dtype or ir.DataType.FLOAT), domain=DOMAIN,
            K=part.columns, N=part.rows, bits=part.bits, block_size=BLOCK,
            **accuracy,
        )  # fmt: skip
        return result

    def _plugin(self, x: ir.Value, part: Matrix) -> ir.Value:
        """One term, one output, nothing fused: what of it is fused, `build-engine` decides."""
        assert x.dtype is not None
        fields: dict[str, Any] = dict(linear_fields(part.format, PLUGIN_TYPES[x.dtype]))
        scale = self._input(part.scale_name, self.layout[part.scale_name])
        result: ir.Value = self._builder.op(
            LINEAR_NAME, x, self._words(part), scale, domain=PLUGIN_DOMAIN, **fields
        )
        return result

    def _words(self, part: Matrix) -> ir.Value:
        """The elements as int32 [N, K/32, 4 or 8]."""
        rows, blocks, width = part.stored_shape
        name, offset = part.stored_name, self.layout[part.stored_name].offset
        shape = (rows, blocks, width // 4)
        return self._input(name, StoredWeight(name, ir.DataType.INT32, shape, False, offset))

    def _dequantised(self, x: ir.Value, part: Matrix) -> ir.Value:
        b, dtype = self._builder, x.dtype
        assert dtype is not None
        stored, kind = (
            self.layout[part.stored_name],
            ir.DataType.UINT8 if part.bits == 8 else ir.DataType.UINT4,
        )
        zeros = self.layout[zero_point_name(part.format)]
        elements = self._input(
            part.stored_name,
            StoredWeight(part.stored_name, kind, (part.rows, part.columns), False, stored.offset),
        )
        name = f"{part.name}.zero_points"
        zero = self._input(name, StoredWeight(name, kind, part.scale_shape, False, zeros.offset))
        wide = ir.DataType.FLOAT if dtype == ir.DataType.BFLOAT16 else dtype
        weight = b.op("DequantizeLinear", elements, self._scale(part, wide), zero, axis=1, block_size=BLOCK)
        if wide != dtype:
            weight = b.op("Cast", weight, to=dtype.value)
        weight = b.op("Transpose", weight, perm=[1, 0])
        result: ir.Value = b.op("MatMul", x, weight)
        return result

    def _scale(self, part: Matrix, dtype: ir.DataType | None) -> ir.Value:
        """[N, K/32] in `dtype`."""
        assert dtype is not None
        scale = self._input(part.scale_name, self.layout[part.scale_name])
        if dtype == ir.DataType.FLOAT16:
            return scale
        cast: ir.Value = self._builder.op("Cast", scale, to=dtype.value, label="scale/Cast")
        cast.shape, cast.type = scale.shape, ir.TensorType(dtype)
        return cast

    # -- rows of the embedding ---------------------------------------------------------------------------

    def _rows(self, node: ir.Node, parts: Sequence[Matrix]) -> ir.Value:
        """Gather [B, L] of them: [B, L, E] in T, computed in float32."""
        b = self._builder
        (part,) = parts
        assert part.format == "int8", "an embedding is kept in int8"
        ids, dtype = node.inputs[1], node.outputs[0].dtype
        assert dtype is not None
        scales = self._input(part.scale_name, self.layout[part.scale_name])
        if self.form == "plugin":
            elements = self._bytes(b.op("Gather", self._words(part), ids, axis=0, label="elements"))
        else:  # in portable graphs products see the same bytes as [N, K]
            name = part.stored_name if self.form == "nbits" else f"{part.stored_name}.rows"
            stored = self._input(name, self.layout[part.stored_name])
            elements = b.op("Gather", stored, ids, axis=0, label="elements")
        rows = b.op("Cast", elements, to=FLOAT)
        scale = b.op("Cast", b.op("Gather", scales, ids, axis=0, label="scales"), to=FLOAT)
        scale = b.op("Unsqueeze", scale, b.ints(3))
        whole = b.op("Mul", b.op("Sub", rows, b.real(float(ZERO["int8"]))), scale, label="dequantised")
        result: ir.Value = b.reshape(whole, 0, 0, part.columns)
        return result if dtype == ir.DataType.FLOAT else b.op("Cast", result, to=dtype.value)

    def _bytes(self, words: ir.Value) -> ir.Value:
        """int32 [.., n] -> its bytes, int32 0..255 [.., 4 n], whichever way a runtime rounds quotients."""
        b, parts, rest = self._builder, [], words
        step, zero = b.constant(256, np.int32), b.constant(0, np.int32)
        for index in range(4):
            quotient = b.op("Div", rest, step) if index < 3 else None
            part = rest if quotient is None else b.op("Sub", rest, b.op("Mul", quotient, step))
            below = b.op("Cast", b.op("Less", part, zero), to=INT32)
            parts.append(b.op("Unsqueeze", b.op("Add", part, b.op("Mul", below, step)), b.ints(4)))
            if quotient is not None:
                rest = b.op("Sub", quotient, below)
        result: ir.Value = b.reshape(b.op("Concat", *parts, axis=-1), 0, 0, 0, BLOCK)
        return result

    def _input(self, name: str, stored: StoredWeight) -> ir.Value:
        """The graph's input for a stored tensor."""
        if name not in self._inputs:
            value = ir.Value(name=name, shape=ir.Shape(stored.shape), type=ir.TensorType(stored.dtype))
            self.graph.inputs.append(value)
            self._inputs[name], self.views[name] = value, stored
        return self._inputs[name]
