"""inspect: its arithmetic against the model itself, and what it says of bundles and checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.makers.engine_folders import write_engine
from support.makers.random_models import LLAMA, NEOX, OPT_350M, with_tables
from support.makers.toy_bundle import make_bundle
from support.paths import GOLDENS

from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.inspection import (
    break_even_tokens,
    inspect_bundle,
    kv_cache_bytes,
    layer_decay,
    step_bytes,
    working_bytes,
)
from dijiang_engines.sizes import part_sizes, weight_bytes
from dijiang_engines.spec import ModelSpec
from dijiang_export.cli import main

SPECS = {
    "neox": NEOX,
    "llama": LLAMA,
    "opt-350m": OPT_350M,
    "tables": with_tables(NEOX, 40),
    "untied-opt": dataclasses.replace(OPT_350M, embedding_size=48, tied_embeddings=False, final_norm=True),
}
PYTHIA_410M = dataclasses.replace(
    NEOX, vocab_size=50304, hidden_size=1024, embedding_size=1024, intermediate_size=4096, num_layers=24,
    num_heads=16, num_kv_heads=16, head_dim=64, rotary_dim=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dijiang_export.export.to_onnx import export_bundle

    path = tmp_path_factory.mktemp("inspect") / "tables.bundle"
    export_bundle(GOLDENS / "neox-trained-tables", path, cases="short")
    return path


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_parameters_are_those_of_the_reference_model(spec: ModelSpec) -> None:
    from dijiang_export.reference.model import ReferenceModel, is_op_constant

    model = ReferenceModel(spec, device="meta")
    parameters = dict(model.named_parameters())
    wide = sum(p.numel() for name, p in parameters.items() if is_op_constant(name))
    total = sum(p.numel() for p in parameters.values())
    parts = part_sizes(spec)
    assert sum(part.wide for part in parts.values()) == wide
    assert sum(part.count for part in parts.values()) == total - wide
    assert weight_bytes(spec, "float32") == 4 * total
    assert weight_bytes(spec, "float16") == 2 * total + 2 * wide


def test_pythia_410m_by_hand() -> None:
    spec = PYTHIA_410M
    state = 24 * 16 * 64 * 64 * 4
    assert spec.state_bytes == state == 6_291_456
    assert kv_cache_bytes(spec, 2048, 2) == 2 * 24 * 1024 * 2048 * 2 == 32 * state
    assert kv_cache_bytes(spec, 32768, 4) == 1024 * state
    assert break_even_tokens(spec, 2) == 64
    assert break_even_tokens(spec, 4) == 32
    # 405 M as published, plus W_G of 1024 x 1024 a layer.
    total = sum(part.count for part in part_sizes(spec).values())
    assert total == 405_334_016 + 24 * 1024 * 1024
    assert weight_bytes(spec, "float32") - step_bytes(spec, "float32") == 50304 * 1024 * 4


def test_grouped_heads_shrink_the_cache_but_not_the_state() -> None:
    grouped = dataclasses.replace(PYTHIA_410M, num_kv_heads=4)
    assert grouped.state_bytes == PYTHIA_410M.state_bytes
    assert kv_cache_bytes(grouped, 2048, 2) * 4 == kv_cache_bytes(PYTHIA_410M, 2048, 2)
    assert break_even_tokens(grouped, 2) == 256


def test_a_tied_embedding_is_read_as_the_head() -> None:
    tied = dataclasses.replace(NEOX, tied_embeddings=True)
    assert step_bytes(tied, "float32") == step_bytes(NEOX, "float32")
    assert weight_bytes(NEOX, "float32") - weight_bytes(tied, "float32") == 4 * 97 * 48


def test_working_memory_grows_with_the_length_only() -> None:
    one, many = (working_bytes(PYTHIA_410M, "float32", n) for n in (1, 2048))
    assert one < 1 << 20
    assert 64 << 20 < many < 1 << 30
    assert working_bytes(PYTHIA_410M, "float16", 2048) < many


def test_decay_summaries() -> None:
    decay = layer_decay(3, np.log([0.5, 0.25, 1.0]))
    assert decay.layer == 3
    assert decay.gamma_min == pytest.approx(0.25)
    assert decay.gamma_max == 1.0
    assert decay.half_life_min == pytest.approx(0.5)
    assert decay.half_life_max is None  # γ = 1 never forgets
    assert decay.negative is None
    tables = np.log(np.array([[0.5, 0.9], [0.5, 0.9], [0.5, 0.9], [0.5, 0.9]]))
    gain = np.array([[1, 1], [-1, 1], [1, 1], [1, 1.0]])
    read = np.array([[1, 1], [-1, 1], [1, -1], [1, 1.0]])
    decay = layer_decay(0, tables, gain, read)
    assert decay.half_life_min == pytest.approx(1)
    assert decay.half_life_max == pytest.approx(math.log(0.5) / math.log(0.9))
    assert decay.negative == 2 / 8


def test_a_bundle(bundle: Path) -> None:
    opened = open_bundle(bundle)
    result = json.loads(json.dumps(inspect_bundle(opened).to_json(), allow_nan=False))
    assert result["kind"] == "bundle"
    assert result["bundle"]["cases"] == ["short", "far"]
    assert result["bundle"]["logits"] == "last"
    assert result["decay"]["max_positions"] == result["decay"]["rows"] == 256
    assert len(result["decay"]["layers"]) == 3
    for layer in result["decay"]["layers"]:
        assert 0.9 < layer["gamma_min"] < layer["gamma_max"] < 1
        assert 0 < layer["negative"] < 0.1
    # What it says about weights is what lies in the file, but for padding and inv_freq.
    said, there = result["to_run"]["float32"]["weight_bytes"], opened.files["weights.data"].bytes
    assert 0 <= there - said < 4096 * 60
    state = result["state"]
    assert state["bytes_per_sequence"] == 3 * 6 * 16 * 16 * 4
    assert [(row["dtype"], row["tokens"]) for row in state["kv_cache"]] == [
        ("float16", 2048), ("float16", 32768), ("float32", 2048), ("float32", 32768),
    ]  # fmt: skip


def test_a_checkpoint_and_its_bundle_agree(bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = []
    for path in (GOLDENS / "neox-trained-tables", bundle):
        assert main(["inspect", str(path), "--json"]) == 0
        results.append(json.loads(capfd.readouterr().out))
    checkpoint, exported = results
    assert checkpoint["kind"] == "checkpoint"
    for key in ("spec", "parameters", "state", "to_run"):
        assert checkpoint[key] == exported[key]
    for a, b in zip(checkpoint["decay"]["layers"], exported["decay"]["layers"], strict=True):
        assert a == pytest.approx(b)
    assert checkpoint["checkpoint"]["decay_notes"]


@pytest.mark.parametrize("golden", ["neox-geometric", "neox-trained-tables", "neox-fp16-d80"])
def test_the_tables_for_people(golden: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(GOLDENS / golden)]) == 0
    out = capfd.readouterr().out
    for words in (
        "KV cache, float16, 32,768 tokens",
        "half-lives",
        "language model head",
        "working, prefill",
    ):
        assert words in out
    assert ("no limit" in out) == (golden != "neox-trained-tables")
    assert ("negative" in out) == (golden == "neox-trained-tables")


def test_verify_finds_a_flipped_byte_that_a_plain_look_does_not(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = tmp_path / "copy.bundle"
    shutil.copytree(bundle, copy)
    data = bytearray((copy / "weights.data").read_bytes())
    data[100] ^= 1
    (copy / "weights.data").write_bytes(data)
    assert main(["inspect", str(copy)]) == 0
    assert main(["inspect", "--verify", str(copy)]) == 1
    assert "SHA-256" in capfd.readouterr().err


def test_an_engine(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its manifest alone: no TensorRT and no GPU is here."""
    monkeypatch.setenv("COLUMNS", "250")
    checked = {"passed": True, "checks": 12, "cases": ["greedy"], "replays": ["whole"]}
    folder = write_engine(tmp_path / "toy.engine", "two", validated=checked)
    assert main(["--json", "inspect", str(folder)]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["kind"] == "engine" and found["name"] == "toy" and found["decay"]["layers"] == []
    assert found["engine"]["plans"] == {"prefill.plan": 1000, "step.plan": 1000}
    assert found["engine"]["made_for"]["gpu"] == "NVIDIA Test" and found["engine"]["validated"] == checked
    assert found["engine"]["profiles"]["max_batch"] == 4
    assert main(["inspect", "--verify", str(folder)]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "toy (engine)" in said and "tensorrt 8.6.0, NVIDIA Test, plugin 0.1.0" in said
    assert "4 sequences at once, 64 tokens of each a call" in said and "12 checks passed" in said
    (folder / "step.plan").write_bytes(bytes(1000))
    assert main(["inspect", str(folder)]) == 0
    assert main(["inspect", "--verify", str(folder)]) == 1
    assert "step.plan" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"launches": 1, "blocks": 132, "packed_bytes": 9}, "one launch"),
        ({"launches": 0, "left": "up to 16 \x1b sequences"}, r"layer by layer: up to 16 \x1b sequences"),
        (None, None), ("odd", None),
    ],
)  # fmt: skip
def test_how_an_engine_steps(
    step: Any, said: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "250")
    plans = [{"file": "prefill.plan", "plugin_step": None}, {"file": "step.plan", "plugin_step": step}]
    folder = write_engine(tmp_path / "toy.engine", "two", made_with={"plans": plans})
    assert main(["--json", "inspect", str(folder)]) == 0
    assert json.loads(capfd.readouterr().out)["engine"]["step"] == said
    assert main(["inspect", str(folder)]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert said in shown if said is not None else "a step" not in shown


def test_an_engine_for_several_gpus(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    made = {
        "runtime": "tensorrt-rtx", "tensorrt": "1.7.1", "gpu": None, "compute_capabilities": [86, 120],
        "graphs": "standard", "plugin_sources": None, "plugin_version": None,
    }  # fmt: skip
    assert main(["inspect", str(write_engine(tmp_path / "toy.engine", made_for=made))]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "tensorrt-rtx 1.7.1, any GPU of compute capability 8.6, 12.0, without the plugin" in said
    assert "not as it was built" in said


def test_what_is_neither(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert "is not a bundle" in capfd.readouterr().err
    assert main(["inspect", str(tmp_path / "absent")]) == 1
    assert "there is no bundle" in capfd.readouterr().err


def test_a_bundle_needs_no_torch_and_no_runtime(tmp_path: Path) -> None:
    make_bundle(tmp_path / "toy.bundle")
    code = (
        "import sys\n"
        "for m in ('torch', 'transformers', 'onnx', 'onnxruntime'): sys.modules[m] = None\n"
        "from dijiang_export.cli import main\n"
        f"sys.exit(main(['inspect', {str(tmp_path / 'toy.bundle')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "KV cache" in done.stdout
