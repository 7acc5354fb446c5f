"""How much memory a build takes, before it begins."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dijiang_engines.building.recipes import Recipe
from dijiang_engines.errors import RunnerError
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.manifest import WEIGHTS
from dijiang_engines.machine import available_memory
from dijiang_engines.nvidia.cuda import DeviceFacts

# Multiples of the weights and constant parts; docs/engines.md says what was measured.
DEVICE_COPIES = 2.2
"""The weights that are being timed, and those of the plan that is put together."""
HOST_COPIES = {"float32": 5.0, "float16": 9.5, "bfloat16": 9.5}
"""What the parser reads, what the builder rearranges, and the plan; 8.6 makes float32 of 16-bit weights."""
AHEAD_COPIES, AHEAD_BASE = 4.5, 1 << 30
"""On the host, of a builder that needs no GPU: TensorRT for RTX 1.7.1 took 1.6 GB for 339 MB of weights."""
DEVICE_BASE = 1 << 30
HOST_BASE = 3 << 30
_ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the build's peak."""

    device: int
    host: int

    def text(self, on_gpu: bool) -> str:
        """For people; without the GPU's part for a builder that takes none."""
        device = f"{self.device / 1e9:.1f} GB on the GPU and " if on_gpu else ""
        return f"the build needs about {device}{self.host / 1e9:.1f} GB on the host"


def estimate_memory(bundle: Bundle, recipe: Recipe, *, ahead_of_time: bool = False) -> MemoryEstimate:
    """What building the larger of the recipe's plans takes, from above.

    Args:
        bundle: what is built.
        recipe: for which sizes.
        ahead_of_time: by a builder that needs no GPU.
    """
    spec = bundle.spec
    weights = bundle.files[WEIGHTS].bytes
    tokens = recipe.max_batch * recipe.max_length
    widest = max(2 * spec.intermediate_size, 4 * spec.hidden_size) + 4 * spec.hidden_size
    activations = tokens * widest * _ITEM[bundle.dtype]
    rows = tokens if bundle.all_logits else recipe.max_batch
    logits = rows * spec.vocab_size * (4 + _ITEM[bundle.dtype])
    states = 2 * recipe.max_batch * spec.state_bytes
    device = DEVICE_COPIES * weights + (recipe.workspace_mb << 20) + activations + logits + states
    host = HOST_COPIES[bundle.dtype] * weights + HOST_BASE
    if ahead_of_time:
        host = AHEAD_COPIES * weights + AHEAD_BASE
    return MemoryEstimate(math.ceil(device) + DEVICE_BASE, math.ceil(host))


def check_memory(estimate: MemoryEstimate, facts: DeviceFacts | None) -> None:
    """Refuse what cannot work.

    Args:
        estimate: of the build.
        facts: of the GPU that it takes; None: it takes none.

    Raises:
        RunnerError: the GPU or the host has too little free memory; says what to change.
    """
    host = available_memory()
    hint = "a smaller --max-length, --max-batch or --workspace, a float16 bundle, or --ignore-memory to try"
    if facts is not None and facts.integrated:
        if estimate.device + estimate.host - HOST_BASE > host:
            raise RunnerError(
                "this board has too little free memory to build the engine",
                got=f"{host / 1e9:.1f} GB free, shared by GPU and CPU",
                expected=f"about {(estimate.device + estimate.host - HOST_BASE) / 1e9:.1f} GB",
                hint=f"stop the desktop; {hint} with swap added",
            )
        return
    if facts is not None and estimate.device > facts.free_bytes:
        raise RunnerError(
            "the GPU has too little free memory to build the engine",
            got=f"{facts.free_bytes / 1e9:.1f} GB free of {facts.memory_bytes / 1e9:.1f}",
            expected=f"about {estimate.device / 1e9:.1f} GB",
            hint=hint,
        )
    if estimate.host > host:
        raise RunnerError(
            "the host has too little free memory to build the engine",
            got=f"{host / 1e9:.1f} GB free",
            expected=f"about {estimate.host / 1e9:.1f} GB",
            hint="close other programs, or add swap, which is not counted, and try --ignore-memory",
        )
