"""Builds one plan in a process of its own, which `run_worker` starts with the request's file.

A process of its own, because the builder cannot be interrupted in TensorRT 8.6, takes several times the
model's memory and gives little of it back, and ends the whole process if it crashes. What it has to say goes
to the parent as one JSON object per line on the descriptor `events`; everything that TensorRT and Polygraphy
print goes to standard error, which the parent keeps as a log.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dijiang_engines.building.ahead import build_ahead
from dijiang_engines.building.events import PARSING, Events, list_layers, progress_monitor, write_plan
from dijiang_engines.building.plugin_products import MAX_NORM_ROWS, has_quantised, rewrite
from dijiang_engines.building.product_layers import Rewritten
from dijiang_engines.building.recipes import ONE_LAUNCH, PRODUCTS
from dijiang_engines.building.request import BuildRequest, read_request
from dijiang_engines.building.step.one_launch import add_step
from dijiang_engines.building.typed_network import ATTEMPTS, PLUGIN_ATTEMPTS, fix_sizes, type_network
from dijiang_engines.errors import DijiangError, RunnerError
from dijiang_engines.kernels.step import StepKernels
from dijiang_engines.nvidia.cuda import Cuda
from dijiang_engines.nvidia.tensorrt_library import failure, load_plugin, tensorrt_module, tensorrt_version
from dijiang_engines.nvidia.tensorrt_versions import Dialect, context_without_memory, dialect_of

POLL_SECONDS = 0.1


class PeakMemory:
    """Watches how much device memory is taken while the builder works."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._least = self._start = cuda.memory()[0]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        with suppress(RunnerError):
            self._cuda.activate()
            while not self._stop.wait(POLL_SECONDS):
                self._least = min(self._least, self._cuda.memory()[0])

    def finish(self) -> int:
        """Most bytes that were taken."""
        self._stop.set()
        self._thread.join()
        return self._start - self._least


def build(request: BuildRequest, events: Events) -> None:
    """Parse, configure, build, write the plan.

    Args:
        request: which, and how.
        events: told "phase", "step" and "done".

    Raises:
        RunnerError: TensorRT could not build it.
    """
    trt = tensorrt_module(request.runtime)
    version = tensorrt_version(trt, request.runtime)
    dialect = dialect_of(version, request.runtime)
    if request.plugin is not None:
        load_plugin(trt, request.plugin, request.runtime)
    if dialect.ahead_of_time:
        build_ahead(trt, request, events)
        return
    cuda = Cuda(request.device)
    poly = _polygraphy()
    _say_all()
    poly.get_trt_logger()  # Polygraphy's, which prints to standard output: that is the log
    messages = _keep_messages()
    peak = PeakMemory(cuda)
    events.send("phase", name=PARSING, steps=None)
    started = time.perf_counter()
    built, left = None, None
    if request.step != PRODUCTS:
        built, left = _build_one_launch(trt, poly, request, dialect, version, cuda, events, messages)
    if built is None:
        built = _build_layers(trt, poly, request, dialect, version, events, messages)
    write_plan(
        events, request.plan, built.plan, started, peak_device_bytes=peak.finish(),
        layers=built.layers, constraints=built.constraints, held=built.held,
        plugin_products=built.products, plugin_step=left or built.step,
    )  # fmt: skip


@dataclass(frozen=True)
class _Built:
    """A plan, and how it came about."""

    plan: Any
    layers: int
    held: str = "nothing"
    constraints: str = "none"
    products: dict[str, Any] | None = None
    step: dict[str, Any] | None = None
    """Of a step in one launch: what engine.json says of it."""


def _build_layers(
    trt: Any,
    poly: Any,
    request: BuildRequest,
    dialect: Dialect,
    version: str,
    events: Events,
    messages: list[str],
) -> _Built:
    """The plan of the graph that was parsed, its products the plugin's where that is asked for.

    Raises:
        DijiangError: it cannot be parsed or built.
    """
    products: Rewritten | None = None
    typed = not dialect.strongly_typed and request.dtype == "float16"
    cache = _cache_of(request)
    whole = request.plugin_products and rewriting(request)["norms"]
    attempts = (PLUGIN_ATTEMPTS if whole else ATTEMPTS) if typed else (("nothing", "none"),)
    for held, constraints in attempts:
        network = _parse(poly, request, dialect, messages)
        fix_sizes(network[1], request.profiles)
        if request.plugin_products or has_quantised(trt, network[1]):
            products = rewrite(trt, network[1], dtype=request.dtype, **rewriting(request))
            print(f"products of the plugin: {products.to_json()}", file=sys.stderr)
        if typed:
            print(f"held to types: {held}, {type_network(trt, network[1], held)}", file=sys.stderr)
        config = _ready(trt, poly, network, request, dialect, constraints, events)
        try:
            plan = poly.engine_bytes_from_network(network, config=config, save_timing_cache=cache)
            if typed:
                check_context(trt, plan, poly.get_trt_logger(), len(request.profiles), messages)
            said = None if products is None else products.to_json()
            return _Built(plan, network[1].num_layers, held, constraints, said)
        except MemoryError:
            raise
        except Exception as error:
            if (held, constraints) != attempts[-1]:  # no kernel for a layer in its type, or a broken fusion
                print(f"holding {held}, {constraints}: {error}", file=sys.stderr)
                continue
            raise _as_failure(error, version, messages) from error
    raise AssertionError("the last attempt returns or raises")


def rewriting(request: BuildRequest) -> dict[str, bool]:
    """What `rewrite` is to take, of a plan's request."""
    few = request.most_rows <= MAX_NORM_ROWS
    one_plan = request.plugin_products and request.step_rows <= MAX_NORM_ROWS
    return {"floats": request.plugin_products, "norms": few or one_plan, "whole": not few}


def _ready(
    trt: Any,
    poly: Any,
    network: Any,
    request: BuildRequest,
    dialect: Dialect,
    constraints: str,
    events: Events,
) -> Any:
    """Say that a network is about to be built; the builder's configuration."""
    list_layers(network[1])
    events.send("phase", name="Building", steps=None)
    return _config(trt, poly, request, dialect, constraints, events)


def _cache_of(request: BuildRequest) -> str | None:
    return None if request.timing_cache is None else str(request.timing_cache)


def _build_one_launch(
    trt: Any,
    poly: Any,
    request: BuildRequest,
    dialect: Dialect,
    version: str,
    cuda: Cuda,
    events: Events,
    messages: list[str],
) -> tuple[_Built | None, dict[str, Any] | None]:
    """The plan of one plugin layer; or what engine.json says of why there is none, where it need not be.

    Raises:
        DijiangError: it does not, or cannot be built, and was insisted on.
    """
    assert request.spec is not None and request.plugin is not None, "BuildRequest saw to it"
    try:
        kernels = StepKernels(request.plugin)
        network = poly.create_network(strongly_typed=dialect.strongly_typed)
        made = add_step(
            trt, network[1], request.spec, request.dtype, request.most_rows, kernels, cuda, request.onnx,
            request.quantised,
        )  # fmt: skip
        fix_sizes(network[1], request.profiles)
        config = _ready(trt, poly, network, request, dialect, "none", events)
        plan = poly.engine_bytes_from_network(network, config=config, save_timing_cache=_cache_of(request))
        check_context(trt, plan, poly.get_trt_logger(), len(request.profiles), messages)
    except MemoryError:
        raise
    except Exception as error:
        failed = _as_failure(error, version, messages)
        if request.step == ONE_LAUNCH:
            raise failed from error
        print(f"no step in one launch: {failed}", file=sys.stderr)
        return None, {"launches": 0, "left": failed.sentence()}
    print(f"a step in one launch: {made.to_json()}", file=sys.stderr)
    return _Built(plan, network[1].num_layers, step=made.to_json()), None


def _as_failure(error: Exception, version: str, messages: list[str]) -> DijiangError:
    if isinstance(error, DijiangError):
        return error
    return failure(f"TensorRT {version} could not build the engine", [*messages, str(error)])


def check_context(trt: Any, plan: Any, logger: Any, profiles: int, messages: list[str]) -> None:
    """Make an execution context, which TensorRT 8.6 cannot do of every float16 plan that it makes.

    Raises:
        RunnerError: it cannot be made.
    """
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None or context_without_memory(trt, engine) is None:
        found = failure("TensorRT made a plan that it cannot run", messages)
        hint = "build with --layout two" if profiles > 1 else "build again with --no-timing-cache"
        raise RunnerError(found.what, got=found.got, hint=f"{hint}: it depends on which kernels are fastest")


def _polygraphy() -> Any:
    try:
        return importlib.import_module("polygraphy.backend.trt")
    except ImportError as error:
        raise RunnerError(
            "the Python package polygraphy is not installed, or does not load",
            got=error,
            hint="pip install 'dijiang-export[tensorrt]'",
        ) from error


def _parse(poly: Any, request: BuildRequest, dialect: Dialect, messages: list[str]) -> Any:
    try:
        return poly.network_from_onnx_path(str(request.onnx), strongly_typed=dialect.strongly_typed)
    except Exception as error:
        raise failure(f"TensorRT cannot parse {request.onnx}", [*messages, str(error)]) from error


def _config(
    trt: Any, poly: Any, request: BuildRequest, dialect: Dialect, constraints: str, events: Events
) -> Any:
    """A callable for Polygraphy that makes the builder's configuration."""
    profiles = []
    for shapes in request.profiles:
        profile = poly.Profile()
        for name, (least, best, most) in shapes.items():
            profile.add(name, min=tuple(least), opt=tuple(best), max=tuple(most))
        profiles.append(profile)
    options: dict[str, Any] = {
        "profiles": profiles,
        "tf32": False,  # on by default, and then a float32 engine is not float32 any more
        "memory_pool_limits": {trt.MemoryPoolType.WORKSPACE: request.workspace},
        "builder_optimization_level": request.optimization_level,
    }
    if request.timing_cache is not None and request.timing_cache.exists():
        options["load_timing_cache"] = str(request.timing_cache)
    if dialect.tactic_sources is not None:
        options["tactic_sources"] = [getattr(trt.TacticSource, n) for n in dialect.tactic_sources]
    if dialect.preview_features is not None:
        options["preview_features"] = [getattr(trt.PreviewFeature, n) for n in dialect.preview_features]
    if constraints != "none":
        options |= {"fp16": True, "precision_constraints": constraints}
    if dialect.progress_monitor and (monitor := progress_monitor(trt, events)) is not None:
        options["progress_monitor"] = monitor
    return poly.CreateConfig(**options)


def _say_all() -> None:
    """With DIJIANG_TENSORRT_LOG=verbose the log gets everything that TensorRT says, tactics included."""
    from polygraphy.logger import G_LOGGER

    if os.environ.get("DIJIANG_TENSORRT_LOG") == "verbose":
        G_LOGGER.module_severity = G_LOGGER.EXTRA_VERBOSE


def _keep_messages() -> list[str]:
    """What Polygraphy's logger is told from here on, errors and warnings."""
    from polygraphy.logger import G_LOGGER

    messages: list[str] = []

    def keep(original: Any, kind: str) -> Any:
        def log(message: Any, *arguments: Any, **options: Any) -> Any:
            messages.append(f"{kind}: {message() if callable(message) else message}")
            del messages[:-50]
            return original(message, *arguments, **options)

        return log

    G_LOGGER.error = keep(G_LOGGER.error, "error")
    G_LOGGER.warning = keep(G_LOGGER.warning, "warning")
    return messages


def main() -> int:
    """Build what the request file asks for; the exit code says whether it worked."""
    events = Events(os.dup(1))
    os.dup2(2, 1)
    try:
        build(read_request(Path(sys.argv[1])), events)
    except DijiangError as error:
        events.send("error", what=error.what, got=error.got, expected=error.expected, hint=error.hint)
        return 1
    except MemoryError:
        events.send("error", what="the builder ran out of host memory", got=None, expected=None, hint=None)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
