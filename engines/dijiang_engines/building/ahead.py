"""Builds one plan without a GPU: TensorRT for RTX, in the process that `worker` is.

Nothing is measured, so there is neither a timing cache nor anything to search for. One plan serves all
compute capabilities that are named; the runtime on the device compiles what it holds for the GPU that is
there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from dijiang_engines.building.events import NODE, PARSING, Events, list_layers, progress_monitor, write_plan
from dijiang_engines.building.request import BuildRequest, Profile
from dijiang_engines.building.typed_network import fix_sizes
from dijiang_engines.errors import RunnerError
from dijiang_engines.nvidia.tensorrt_library import failure, make_logger, tensorrt_version
from dijiang_engines.nvidia.tensorrt_versions import RUNTIMES, capabilities_text


def build_ahead(trt: Any, request: BuildRequest, events: Events) -> None:
    """Parse, configure, build, write the plan.

    Args:
        trt: the runtime's module, the plugin loaded if the request names one.
        request: which, and how.
        events: told "phase", "step" and "done".

    Raises:
        RunnerError: the runtime could not build it.
    """
    title = f"{RUNTIMES[request.runtime].title} {tensorrt_version(trt, request.runtime)}"
    messages: list[str] = []
    logger = make_logger(trt, messages, tell=_log)
    started = time.perf_counter()
    events.send("phase", name=PARSING, steps=None)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(request.onnx)):
        raise parser_failure(parser, request.onnx, title, messages)
    fix_sizes(network, request.profiles)
    list_layers(network)
    events.send("phase", name="Building", steps=None)
    config = _config(trt, builder, request, events)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise failure(f"{title} could not build the engine", messages)
    facts = {
        "constraints": "none", "held": "nothing", "plugin_products": None, "plugin_step": None,
        "peak_device_bytes": None,
    }  # fmt: skip
    write_plan(events, request.plan, plan, started, layers=network.num_layers, **facts)


def parser_failure(parser: Any, graph: Path, title: str, messages: list[str]) -> RunnerError:
    """The error for a graph that the parser does not take, with the node that it stopped at."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    named = next((error for error in errors if error.node_name()), None)
    if named is None:
        found = failure(f"{title} cannot parse {graph}", [*messages, *(f"error: {e.desc()}" for e in errors)])
        return found
    words = " ".join(str(named.desc()).split())[:500]
    return RunnerError(
        f"{title} cannot parse {graph}: it stops at the node {named.node_name()} ({named.node_operator()})",
        got=words or None,
        hint="the plugin was not loaded, or is another version's: `dijiang-export build-plugin`"
        if "plugin" in words.lower()
        else "export the checkpoint again with this version of dijiang-export",
    )


def _config(trt: Any, builder: Any, request: BuildRequest, events: Events) -> Any:
    config = builder.create_builder_config()
    # TF32 is on by default, and then a float32 engine is not float32 any more. The workspace keeps its
    # default: with a limit, 1.7.1 allocates that much on a GPU, and fails without one.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.builder_optimization_level = request.optimization_level
    config.progress_monitor = progress_monitor(trt, events)
    for shapes in request.profiles:
        config.add_optimization_profile(_profile(builder, shapes))
    config.num_compute_capabilities = len(request.capabilities)
    for index, capability in enumerate(request.capabilities):
        kind = getattr(trt.ComputeCapability, f"SM{capability}", None)
        if kind is None or not config.set_compute_capability(kind, index):
            raise RunnerError(
                f"{RUNTIMES[request.runtime].title} refuses a compute capability",
                got=capabilities_text([capability]),
            )
    return config


def _profile(builder: Any, shapes: Profile) -> Any:
    profile = builder.create_optimization_profile()
    for name, (least, best, most) in shapes.items():
        profile.set_shape(name, tuple(least), tuple(best), tuple(most))
    return profile


def _log(kind: str, text: str) -> None:
    """Errors, warnings, and the node that is being read: the last one tells where a parser died."""
    if kind or text.startswith(NODE):
        print(f"{kind or 'info'}: {text}", file=sys.stderr, flush=True)
