"""What TensorRT for RTX has beyond TensorRT: how a context's kernels are compiled and kept."""

from __future__ import annotations

from typing import Any

from dijiang_engines.nvidia.tensorrt_library import TensorRT
from dijiang_engines.runners.tensorrt.kernel_cache import KernelCache

STEPS, PREFILLS = "EAGER", "LAZY"
"""When kernels are made for a shape that is new. A context for steps has one shape, and what is recorded of
it is run from then on: its kernels are made for that shape before the first run. Prefills have many shapes:
they begin on general kernels, and better ones are compiled beside them."""
CUDA_GRAPHS = "DISABLED"
"""Steps are recorded as CUDA graphs by the runner, together with what chooses the token: the runtime's own
recording would only come between."""


class RtxContexts:
    """Makes a plan's execution contexts with one cache of kernels.

    Args:
        tensorrt: the loaded runtime.
        cache: for all plans of the engine.
    """

    def __init__(self, tensorrt: TensorRT, cache: KernelCache) -> None:
        self._trt, self.cache = tensorrt.trt, cache

    def make(self, plan: Any, *, steps: bool) -> Any:
        """An execution context whose activations go where `give_memory` says; None if it cannot be made.

        Args:
            plan: an ICudaEngine.
            steps: it will have one shape.
        """
        trt, config = self._trt, plan.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.cache.attach(config)
        config.cuda_graph_strategy = getattr(trt.CudaGraphStrategy, CUDA_GRAPHS)
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = getattr(
            strategies, STEPS if steps else PREFILLS
        )
        return plan.create_execution_context(config)

    def settings(self) -> dict[str, str | int | bool]:
        """For records of what was measured."""
        return {"kernels_kept": self.cache.loaded, "step_kernels": STEPS, "prefill_kernels": PREFILLS}
