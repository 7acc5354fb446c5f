"""`dijiang-export inspect`: what a checkpoint, bundle or engine is, and what it would take to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from dijiang_export.commands.arguments import PATH, takes
from dijiang_export.commands.common import DEFAULT_BUNDLE, Output, is_checkpoint

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from dijiang_engines.formats.quantised.manifest import Quantisation
    from dijiang_engines.inspection import Inspection


@dataclass(frozen=True)
class InspectArguments:
    """What `inspect` is given."""

    path: Annotated[Path, click.argument("path", type=PATH, default=DEFAULT_BUNDLE)]
    verify: Annotated[
        bool,
        click.option(
            "--verify",
            is_flag=True,
            help="Check the hash of every file of a bundle or an engine, large ones included.",
        ),
    ]


@click.command("inspect", epilog="Example: dijiang-export inspect ./pythia-410m-dijiang --json")
@takes(InspectArguments)
def inspect(output: Output, given: InspectArguments) -> None:
    """Describe the checkpoint, bundle or engine at PATH without running it.

    Shows geometry, parameters, how fast each layer forgets, the memory of a sequence next to the KV cache
    that the same model would need with softmax attention, and what running it takes. A bundle needs no
    PyTorch for this, an engine no TensorRT and no GPU. PATH defaults to ./tiny-stdlib.bundle.
    """
    found = _inspect(given, output)
    for note in found.details.get("notes", ()):
        output.log(f"note: {note}")
    result = found.to_json()
    output.print_result(result, lambda: draw(found, result))


def _inspect(given: InspectArguments, output: Output) -> Inspection:
    if is_checkpoint(given.path):
        from dijiang_export.checkpoint.inspection import inspect_checkpoint

        return inspect_checkpoint(given.path)
    from dijiang_engines.formats.bundle import Bundle
    from dijiang_engines.formats.engine import EngineFolder
    from dijiang_engines.formats.open import open_model
    from dijiang_engines.inspection import inspect_bundle, inspect_engine

    model = open_model(given.path, verify=False)
    if given.verify:
        with output.progress("Hashing", sum(f.bytes for f in model.files.values()), "bytes") as bar:
            model.verify(bar.advance)
    if isinstance(model, EngineFolder):
        return inspect_engine(model)
    assert isinstance(model, Bundle)
    return inspect_bundle(model)


def draw(found: Inspection, result: dict[str, Any]) -> Group:
    """For people: what `to_json` holds, in tables."""
    from rich.console import Group

    tables: list[Table | Group] = [_model(found, result), _parameters(found, result)]
    if found.quantisation is not None:
        tables.append(_quantisation(found.quantisation))
    if found.decay:
        tables.append(_decay(found))
    return Group(*tables, _memory(result), _running(result))


def size(count: float) -> str:
    """A number of bytes, as people read it: powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _model(found: Inspection, result: dict[str, Any]) -> Table:
    spec, details = found.spec, found.details
    table = _table(f"{found.name} ({found.kind})", "", "")
    table.show_header = False
    table.columns[1].justify = "left"
    kv = "" if spec.num_kv_heads == spec.num_heads else f", {spec.num_kv_heads} key/value heads"
    residual = "parallel" if spec.parallel_residual else "sequential"
    mlp = f"{spec.intermediate_size}, {spec.activation}{', gated' if spec.gated_mlp else ''}"
    limit = spec.max_positions
    rows = {
        "family": spec.family,
        "type of the weights": found.dtype
        if found.quantisation is None
        else f"{found.quantisation.weight_format}, and {found.dtype}",
        "layers": f"{spec.num_layers}, {residual} residual, {spec.norm}",
        "hidden size": str(spec.hidden_size),
        "heads": f"{spec.num_heads} of {spec.head_dim}{kv}",
        "rotary": f"{spec.rotary_dim} of {spec.head_dim} dimensions" if spec.rotary_dim else "none",
        "MLP": mlp,
        "vocabulary": str(spec.vocab_size),
        "longest sequence": "no limit" if limit is None else f"{limit} tokens",
        "trained context": str(spec.max_position_embeddings),
        "tokenizer": "yes" if details["tokenizer"] else "no",
        "on disk": size(details["total_bytes"]),
    }
    if found.kind == "engine":
        rows |= _engine(details)
    if found.kind == "bundle":
        cases = details["cases"]
        rows["logits"] = f"of {'all tokens' if details['logits'] == 'all' else 'the last token'}"
        rows["graphs"] = ", ".join(details["graphs"])
        rows["ONNX Runtime GenAI"] = "runs it as it is" if details["genai"] else "no: export it again"
        rows["recorded cases"] = ", ".join(cases) if cases else "none"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _engine(details: Mapping[str, Any]) -> dict[str, str]:
    """What an engine was built for, and whether it was found right."""
    made, profiles, checked = details["made_for"], details["profiles"], details["validated"]
    capabilities = ", ".join(f"{each // 10}.{each % 10}" for each in made["compute_capabilities"])
    gpu = f"any GPU of compute capability {capabilities}" if made["gpu"] is None else made["gpu"]
    plugin = "without the plugin" if made["plugin_version"] is None else f"plugin {made['plugin_version']}"
    rows = {
        "plans": ", ".join(f"{name}, {size(count)}" for name, count in details["plans"].items()),
        "built for": f"{made['runtime']} {made['tensorrt']}, {gpu}, {plugin}",
        "takes": f"{profiles['max_batch']} sequences at once, {profiles['max_length']} tokens of each a call",
        "recorded cases": ", ".join(details["cases"]) if details["cases"] else "none",
    }
    if details["step"] is not None:
        rows["a step"] = details["step"]
    if checked is None:
        return rows | {"validated": "not as it was built: `dijiang-export validate` does"}
    return rows | {"validated": f"as it was built: {checked['checks']} checks passed"}


def _parameters(found: Inspection, result: dict[str, Any]) -> Table:
    table = _table("Parameters", "part", "count", "share")
    counts = dict(result["parameters"])
    total = counts.pop("total")
    for name, count in counts.items():
        table.add_row(name, f"{count:,}", f"{100 * count / total:.1f}%")
    table.add_section()
    table.add_row("total", f"{total:,}", "100%")
    return table


def _quantisation(quantised: Quantisation) -> Group:
    """Which matrices have how many bits, why, and what that costs."""
    from rich.console import Group
    from rich.text import Text

    from dijiang_engines.weight_formats import BLOCK

    parts = quantised.stored
    table = _table(
        f"Quantised weights: {quantised.weight_format}, blocks of {BLOCK}", "", "matrices", "bytes"
    )
    for kind in sorted({part.format for part in parts}):
        of_kind = [part for part in parts if part.format == kind]
        table.add_row(kind, str(len(of_kind)), size(sum(part.nbytes for part in of_kind)))
    lines = [f"in int8: {pattern}: {reason}" for pattern, reason in quantised.kept_in_int8]
    lines.append(f"multiplied with activations in {quantised.multiplied_with}")
    if quantised.calibration is not None:
        lines.append("calibrated with {tokens:,} tokens of {file}".format(**quantised.calibration))
    cost = quantised.cost
    lines.append("what it costs was not measured" if cost is None else f"it costs: {cost.sentence}")
    return Group(table, Text("\n".join(lines)))


def _decay(found: Inspection) -> Table:
    spec = found.spec
    kind = "geometric, any length"
    if spec.decay == "tables":
        kind = f"trained tables of {spec.decay_rows} rows" + (", extended" if spec.decay_extended else "")
    table = _table(f"Decay: {kind}", "layer", "γ, fastest head", "γ, slowest head", "half-lives, tokens")
    if spec.decay == "tables":
        table.add_column("negative", justify="right")
    for layers, decay in _runs_of_equals(found):
        life = " to ".join(
            "∞" if value is None else f"{value:.3g}" for value in (decay.half_life_min, decay.half_life_max)
        )
        cells = [layers, f"{decay.gamma_min:.6f}", f"{decay.gamma_max:.6f}", life]
        if decay.negative is not None:
            cells.append(f"{100 * decay.negative:.1f}%")
        table.add_row(*cells)
    return table


def _runs_of_equals(found: Inspection) -> list[tuple[str, Any]]:
    """Untrained decay is the same in every layer: show it once."""
    from dataclasses import replace

    runs: list[tuple[int, int, Any]] = []
    for decay in found.decay:
        if runs and replace(runs[-1][2], layer=decay.layer) == decay:
            runs[-1] = (runs[-1][0], decay.layer, runs[-1][2])
        else:
            runs.append((decay.layer, decay.layer, decay))
    return [(str(a) if a == b else f"{a} to {b}", decay) for a, b, decay in runs]


def _memory(result: dict[str, Any]) -> Table:
    state = result["state"]
    table = _table(
        "Memory of one sequence, beside a KV cache of the same shape", "", "bytes", "times the state"
    )
    table.add_row("recurrent state, float32, any length", size(state["bytes_per_sequence"]), "1")
    for row in state["kv_cache"]:
        label = f"KV cache, {row['dtype']}, {row['tokens']:,} tokens"
        table.add_row(label, size(row["bytes"]), f"{row['times_state']:.2f}")
    even = state["break_even_tokens"]
    table.caption = (
        f"The state is the smaller one beyond {even['float16']:,} tokens (float16 cache) or "
        f"{even['float32']:,} (float32)."
    )
    return table


def _running(result: dict[str, Any]) -> Table:
    table = _table(
        "To run one sequence", "exported as", "weights", "read per token", "working, step", "working, prefill"
    )
    for dtype, row in result["to_run"].items():
        table.add_row(
            dtype,
            size(row["weight_bytes"]),
            size(row["bytes_read_per_token"]),
            size(row["step_working_bytes_estimate"]),
            size(row["prefill_working_bytes_estimate"]),
        )
    table.caption = f"Working memory is an estimate; prefill of {result['prefill_tokens']:,} tokens at once."
    return table
