"""States after the beginnings of prompts where several servers find them: what is kept, and under which name.

A store keeps bytes under names, and need not be trusted to keep them well: a value is believed only if it is
whole and was put under that very name. samples/scale has a store in Redis.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Protocol

import numpy as np

from dijiang_engines.formats.folder import Model
from dijiang_engines.machine import describe_machine, package_versions
from dijiang_engines.runners.base import FloatArray, HasSettings, Runner
from dijiang_engines.spec import ModelSpec

RULES = 1
"""Of cutting prompts (`pieces`) and of values: whoever changes either raises it, and finds nothing older."""
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "numpy")
"""Distributions whose versions may change a state's last bits."""
_DIGEST_BYTES = 32


class PrefixStore(Protocol):
    """Keeps values by name. `find` is called by one thread, `put` by another, `close` when both have ended.

    Each may raise anything: what cannot be found is read anew.
    """

    def find(self, names: Sequence[str]) -> tuple[int, bytes] | None:
        """The first of these names that there is, in one round trip: its index and its value; None: none."""
        ...

    def put(self, name: str, value: bytes) -> None:
        """Keep a value; an older one of that name goes."""
        ...

    def close(self) -> None:
        """Nothing more is asked."""
        ...


def namespace(model: Model, runner: Runner) -> bytes:
    """What states have to have in common to mean the same to the last bit, as a hash of 32 bytes.

    The model's weights and graphs, the runtime, its version and settings, the machine's kind, and the rules
    by which prompts are cut. States of other namespaces have other keys (`pieces.state_keys`).
    """
    machine = asdict(describe_machine())
    facts = {
        "rules": RULES,
        "spec": model.identity.spec_sha256,
        "weights": model.identity.weights_sha256,
        "files": {name: info.sha256 for name, info in model.files.items()},
        "runner": runner.name,
        "settings": runner.settings() if isinstance(runner, HasSettings) else {},
        "versions": package_versions(RUNTIMES),
        "machine": {
            name: machine[name] for name in ("architecture", "cpu", "cpu_features", "usable_cpus", "gpus")
        },
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def stored_name(key: bytes) -> str:
    """What a state's value is called. The key itself stays here: it proves values (`to_value`)."""
    return hashlib.blake2b(key, digest_size=16, person=b"dijiang-name").hexdigest()


def to_value(key: bytes, layers: Sequence[FloatArray]) -> bytes:
    """A state of one sequence as bytes: a keyed hash, then all numbers, little-endian.

    Args:
        key: of `pieces.state_keys`.
        layers: one float32 [1, H, d, d] array per layer.
    """
    numbers = b"".join(np.ascontiguousarray(layer, "<f4").tobytes() for layer in layers)
    return _digest(key, numbers) + numbers


def from_value(key: bytes, value: bytes, spec: ModelSpec) -> list[FloatArray] | None:
    """The state that was put under a key, one float32 [1, H, d, d] array per layer, read-only.

    None: the value is damaged, was put under another key, or is of another size than the model's states.
    """
    size = 4 * spec.num_layers * int(np.prod(spec.state_shape))
    if len(value) != _DIGEST_BYTES + size:
        return None
    numbers = memoryview(value)[_DIGEST_BYTES:]
    if _digest(key, numbers) != value[:_DIGEST_BYTES]:
        return None
    layers = np.frombuffer(numbers, "<f4").reshape(spec.num_layers, 1, *spec.state_shape)
    return list(layers.astype(np.float32, copy=False))


def _digest(key: bytes, numbers: bytes | memoryview) -> bytes:
    return hashlib.blake2b(numbers, key=key, digest_size=_DIGEST_BYTES, person=b"dijiang-state").digest()
