"""Our graphs through the parser of a real TensorRT: TensorRT for RTX, whose wheel needs no GPU to parse.

`make bindings` fetches it. Its API is that of TensorRT 10 and 11. What 8.6's parser makes, only the record of
runs on a GPU tells (docs/evidence/engines-linear-h200.txt: all 26 products of the sample were found).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from support.fakes.network import Trt, replay
from support.makers.step_graphs import (
    FAMILIES,
    NETWORKS,
    description,
    initializers,
    plugin_graph,
    step_graph,
)
from support.paths import TESTS
from support.probes.rtx_network import environment
from support.tensorrt_wheels import FOLDER, REQUIRED, unpack, version_of, wheels, without

from dijiang_engines.building.plugin_products import rewrite

WHEELS = ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu13_libs")
MISSING = without(*WHEELS)
pytestmark = pytest.mark.skipif(MISSING is not None and not REQUIRED, reason=MISSING or "")


@pytest.fixture(scope="module")
def site() -> Path:
    assert MISSING is None, MISSING
    paths = [wheels(name)[-1] for name in WHEELS]
    return unpack(FOLDER / f"rtx-{version_of(paths[0])}", *paths)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_description_is_what_the_parser_makes(family: str, site: Path, tmp_path: Path) -> None:
    """And plugin_products.py finds in the real network what it finds in the replayed one."""
    graph = step_graph(FAMILIES[family])
    ir.save(graph, tmp_path / "graph.onnx")
    parsed = _parse(site, tmp_path)
    found = parsed.pop("products")
    assert parsed == description(family), f"`{NETWORKS / family}.json` is not what TensorRT makes any more"

    network = replay(parsed, initializers(graph))
    replayed = rewrite(Trt(), network)
    plugins = [layer.own["linear"] for layer in network.layers if "linear" in layer.own]
    fields = [{name: value.tolist() for name, value in plugin.items()} for plugin in plugins]
    assert found["fields"] == fields
    assert {name: found[name] for name in replayed.to_json()} == replayed.to_json()
    assert found["launches"] == len(fields) > 0
    assert [tensor["name"] for tensor in found["outputs"]] == parsed["outputs"]
    widths = [tensor["shape"][-1] for tensor in found["outputs"]]
    assert widths[0] == FAMILIES[family].vocab_size  # the logits' shape follows from the layers' new inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_graph_s_products_are_the_plugin_s(family: str, site: Path, tmp_path: Path) -> None:
    """Without norms, which have no kernel of many rows; as many as in a step."""
    graph = plugin_graph(FAMILIES[family], "prefill")
    ir.save(graph, tmp_path / "graph.onnx")
    parsed = _parse(site, tmp_path, "--prefill")
    found = parsed.pop("products")
    network = replay(description(family), initializers(step_graph(FAMILIES[family])))
    step = rewrite(Trt(), network)
    assert (found["products"], found["left"]) == (step.products, step.left)
    launches = [layer.own["linear"] for layer in network.layers if "linear" in layer.own]
    for field in ("output_activation", "output_residual", "term_bias"):
        of_step, of_prefill = (
            sorted(int(number) for fields in every for number in fields[field])
            for every in (launches, found["fields"])
        )
        assert of_prefill == of_step, field
    assert not any(any(launch["output_norm"]) for launch in found["fields"])
    assert [tensor["name"] for tensor in found["outputs"]] == parsed["outputs"]


def _parse(site: Path, folder: Path, *more: str) -> Any:
    script = TESTS / "support/probes/rtx_network.py"
    command = [sys.executable, script, site, folder / "graph.onnx", folder / "out.json", "--products", *more]
    done = subprocess.run(
        command, env=environment(site, folder / "links"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))
