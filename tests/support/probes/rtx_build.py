"""Builds plans with the real TensorRT for RTX, which needs no GPU: `rtx_build.py SITE REQUESTS.json
OUT.json`.

SITE holds the unpacked wheels. REQUESTS is a list of BuildRequests as JSON. The worker's own code builds
(dijiang_engines.building.worker); OUT gets for each what the network and the configuration were when the
builder was called, and what the worker said last, or the error. A process of its own, for the parser may end
it, and the loader's path is read when it starts (nvidia/private_link.py).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, sys.argv[1])

from dijiang_engines.building import ahead, worker
from dijiang_engines.building.request import BuildRequest
from dijiang_engines.errors import DijiangError

seen: dict[str, Any] = {}
list_layers, configure = ahead.list_layers, ahead._config


def describe(network: Any) -> None:
    """What goes in and out, once it was parsed."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    seen["inputs"], seen["outputs"] = (
        {t.name: [str(t.dtype).rpartition(".")[2], list(t.shape)] for t in tensors}
        for tensors in (inputs, outputs)
    )
    kinds = [str(network.get_layer(i).type).rpartition(".")[2] for i in range(network.num_layers)]
    seen["plugins"] = sum(kind.startswith("PLUGIN") for kind in kinds)


def configured(trt: Any, builder: Any, request: BuildRequest, events: Any) -> Any:
    """What the builder will be told."""
    config = configure(trt, builder, request, events)
    chosen = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
    seen["capabilities"] = [int(str(kind).rpartition("SM")[2]) for kind in chosen]
    seen["profiles"] = config.num_optimization_profiles
    seen["tf32"] = config.get_flag(trt.BuilderFlag.TF32)
    return config


def main() -> int:
    ahead.list_layers, ahead._config = describe, configured
    found = []
    for data in json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")):
        seen.clear()
        said: list[dict[str, Any]] = []
        events: Any = SimpleNamespace(
            send=lambda event, said=said, **values: said.append({"event": event} | values)
        )
        try:
            worker.build(BuildRequest.from_json(data), events)
            result = {"done": said[-1]}
        except DijiangError as error:
            result = {"error": str(error)}
        found.append(dict(seen) | result)
    Path(sys.argv[3]).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
