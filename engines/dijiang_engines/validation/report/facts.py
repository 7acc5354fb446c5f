"""What a report is about: the model, the runner, the machine, the versions, the date."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from dijiang_engines.formats.open import Model
from dijiang_engines.formats.reference_cases import Reference
from dijiang_engines.machine import describe_machine, package_versions
from dijiang_engines.runners.base import HasSettings, Runner
from dijiang_engines.version import __version__

_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "cuda-bindings")


def describe_run(model: Model, runner: Runner, reference: Reference) -> list[tuple[str, str]]:
    """Names and values for `report_html`; takes as long as nvidia-smi does."""
    spec, machine = model.spec, describe_machine()
    now = datetime.datetime.now(datetime.timezone.utc)
    decay: str = spec.decay
    if spec.max_positions is not None:
        decay += f", {spec.max_positions} positions"
    hardware = [machine.cpu, f"{machine.usable_cpus} of {machine.logical_cpus} CPUs", machine.architecture]
    if machine.board:
        hardware.insert(0, machine.board)
    if machine.memory_bytes:
        hardware.append(f"{machine.memory_bytes / 2**30:.1f} GiB")
    gpus = [
        ", ".join(filter(None, (g.name, f"driver {g.driver}" if g.driver else None, g.compute_capability)))
        for g in machine.gpus
    ]
    made_for = model.manifest.get("made_for")
    settings = _pairs(runner.settings()) if isinstance(runner, HasSettings) else ""
    facts = {
        "model": model.name,
        "folder": str(model.path),
        "geometry": f"{spec.family}, {spec.num_layers} layers of {spec.num_heads} × {spec.head_dim}, "
        f"hidden size {spec.hidden_size}, vocabulary {spec.vocab_size}, decay {decay}",
        "weights and activations": _types(model),
        "weights, SHA-256": model.identity.weights_sha256,
        "made by": _pairs(model.manifest.get("created_by")),
        "engine made for": _pairs(made_for),
        "compared with": f"cases {', '.join(reference.cases)}; recorded in {reference.compute_dtype}",
        "runner": f"{runner.name} ({settings})" if settings else runner.name,
        "machine": "; ".join(hardware),
        "GPU": "; ".join(gpus),
        "system": machine.system,
        "versions": _pairs(
            {"dijiang-export": __version__, "Python": machine.python, **package_versions(_PACKAGES)}
        ),
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
    }
    return [(name, value) for name, value in facts.items() if value]


def _types(model: Model) -> str:
    """Types of everything, and of quantised weights what they cost."""
    if model.quantisation is None:
        return f"{model.dtype}; state and logits float32"
    quantised = model.quantisation
    kinds = [part.format for part in quantised.stored]
    text = f"weights {', '.join(f'{kinds.count(kind)} matrices {kind}' for kind in sorted(set(kinds)))}"
    if quantised.calibration is not None:
        text += (
            f", calibrated with {quantised.calibration['tokens']} tokens of {quantised.calibration['file']}"
        )
    text += f"; all else {model.dtype}; activations of products "
    text += model.dtype if model.activations is None else quantised.multiplied_with
    text += "; state and logits float32"
    return text if quantised.cost is None else f"{text}. Quantisation costs: {quantised.cost.sentence}"


def _pairs(values: Any) -> str:
    """A manifest's table of names and versions in one line; empty if it has none."""
    if not isinstance(values, Mapping):
        return ""
    return ", ".join(f"{key} {value}" for key, value in values.items())
