"""Small random models of every family as graphs for TensorRT; what its parser makes of steps."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import onnx_ir as ir
import torch
from support.makers.random_models import LLAMA, NEOX, give_weights, random_model, traced, with_heads
from support.paths import NETWORKS

from dijiang_engines.spec import ModelSpec
from dijiang_export.graph import lower

PARALLEL = with_heads(NEOX, 4, 4, 16, 4)
SEQUENTIAL = dataclasses.replace(PARALLEL, parallel_residual=False)
OPT = dataclasses.replace(
    SEQUENTIAL, family="opt", rotary_dim=0, position_embeddings=512, position_offset=2, activation="relu"
)
FAMILIES = {"parallel": PARALLEL, "sequential": SEQUENTIAL, "opt": OPT, "llama": LLAMA}


def step_graph(spec: ModelSpec) -> ir.Model:
    """The float16 step graph with the plugin's node, weights inside."""
    return plugin_graph(spec, "step")


def plugin_graph(spec: ModelSpec, kind: Literal["prefill", "step"]) -> ir.Model:
    """Likewise, or that of prefill."""
    model = random_model(spec, dtype=torch.float16)
    graph = traced(spec, torch.float16, kind)
    lower.lower_to_tensorrt(graph)
    give_weights(graph, spec, model)
    return graph


def initializers(graph: ir.Model) -> dict[str, Any]:
    """Arrays by name."""
    values = graph.graph.initializers.values()
    return {str(v.name): v.const_value.numpy() for v in values if v.const_value is not None}


def description(family: str) -> Any:
    """What TensorRT for RTX made of `step_graph(FAMILIES[family])`, as probes/rtx_network.py wrote it."""
    return json.loads((NETWORKS / f"{family}.json").read_text(encoding="utf-8"))
