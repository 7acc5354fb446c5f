"""Graphs for TensorRT's parsers, which read less of ONNX than its checker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from support.makers.checkpoints import RandomCheckpoint, llama, opt, opt_350m

from dijiang_export.export.to_onnx import export_bundle

FOLDERS: dict[str, RandomCheckpoint] = {
    "llama-tied": llama().with_config(tie_word_embeddings=True),
    "opt": opt(),
    "opt-350m": opt_350m(embedding=32),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_shapes_are_said_without_start_and_end(name: str, tmp_path: Path) -> None:
    """TensorRT 8.6's parser does not look at them (seen: "reshape changes volume" for a tied head)."""
    export_bundle(FOLDERS[name].save(tmp_path / "c"), tmp_path / "b")
    for kind in ("prefill", "step"):
        graphs = [
            onnx.load(tmp_path / "b" / f"{kind}{target}.onnx", load_external_data=False).graph
            for target in ("", ".trt")
        ]
        cut = [
            node for node in graphs[0].node if node.op_type == "Shape" and node.name.startswith("/lm_head")
        ]
        assert cut and cut[0].attribute, "the graph no longer has what this test is about"
        shapes = [node for node in graphs[1].node if node.op_type == "Shape"]
        assert shapes and not any(node.attribute for node in shapes)
        for node in shapes:
            assert values(graphs[1], node.output[0]) == values(graphs[0], node.output[0])


def values(graph: onnx.GraphProto, whole: str) -> list[int]:
    """What a graph makes of a shape [3, 5, 7] (or [3, 5]) where the other one's Shape of the same name is."""
    scope = whole.split("/Shape")[0]
    nodes = [
        n
        for n in graph.node
        if n.op_type in ("Shape", "Gather") and "Shape" in n.name and n.name.split("/Shape")[0] == scope
    ]
    source = nodes[0].input[0]
    constants = [i for i in graph.initializer if i.name in {name for n in nodes for name in n.input}]
    dims = (3, 5) if source == "input_ids" else (3, 5, 7)
    made = onnx.helper.make_graph(
        nodes,
        "shapes",
        [onnx.helper.make_tensor_value_info(source, onnx.TensorProto.FLOAT, dims)],
        [onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.INT64, None)],
        constants,
    )
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 17)])
    return ReferenceEvaluator(model).run(None, {source: np.zeros(dims, np.float32)})[0].tolist()
