"""Bundles that were broken on purpose: `validate` must see it even where every hash is right.

First a real export passes; then one thing is changed and the manifest's hashes are set right again, so that
only the replayed numbers can tell. That the hashes alone would have told is tested beside it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.paths import GOLDENS

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.formats.onnx_external import ExternalTensor, external_tensors
from dijiang_export.cli import main


@pytest.fixture(scope="session")
def exported(once: Callable[..., Path]) -> dict[str, Path]:
    from dijiang_export.export.to_onnx import export_bundle

    def made(golden: str) -> Path:
        return once(golden, lambda folder: export_bundle(GOLDENS / golden, folder / "b")) / "b"

    return {"tables": made("neox-trained-tables"), "geometric": made("neox-geometric")}


@pytest.fixture
def tables(exported: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported["tables"], tmp_path / "tables.bundle"))


@pytest.fixture
def geometric(exported: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported["geometric"], tmp_path / "geometric.bundle"))


def rehash(folder: Path) -> None:
    """Make the manifest describe the files as they are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def place(folder: Path, name: str) -> ExternalTensor:
    tensors = external_tensors((folder / "step.onnx").read_bytes())
    return next(t for t in tensors if t.name == name)


def edit_weight(folder: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Change a float32 tensor of weights.data in place."""
    where = place(folder, name)
    assert where.data_type == TensorProto.FLOAT
    data = np.memmap(folder / "weights.data", np.float32, "r+", where.offset, where.dims)
    before = data.copy()
    change(data)
    assert not np.array_equal(before, data)
    data.flush()
    rehash(folder)


def edit_graph(folder: Path, name: str, change: Callable[[onnx.ModelProto], None]) -> None:
    path = folder / f"{name}.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    rehash(folder)


def run_validate(folder: Path, capfd: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict, str]:
    capfd.readouterr()
    code = main(
        ["validate", str(folder), "--runner", "onnxruntime-cpu", "--threads", "1", "--json", *options]
    )
    out, err = capfd.readouterr()
    return code, json.loads(out) if out else {}, err


def assert_mismatch(result: tuple[int, dict, str]) -> dict:
    """Exit code 1, a report on stdout, one message on stderr; returns the first failure."""
    code, report, err = result
    assert code == 1
    assert report["passed"] is False
    message = json.loads(err)["error"]
    assert message["type"] == "ValidationMismatch"
    first = report["first_failure"]
    assert f"row {first['row']} after {first['tokens']} tokens" in message["what"]
    return first


@pytest.mark.parametrize("kind", ["tables", "geometric"])
def test_the_whole_bundle_passes(
    kind: str, exported: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    code, report, err = run_validate(exported[kind], capfd)
    assert (code, err) == (0, "")
    assert report["passed"] is True
    assert len(report["results"]) == 2 * 6
    assert all(r["logits_error"] < 2e-5 and r["state_error"] < 2e-5 for r in report["results"])


def test_cases_and_replays_are_chosen_by_options(
    exported: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    code, report, _ = run_validate(exported["tables"], capfd, "--case", "far", "--replay", "steps")
    assert code == 0
    assert [(r["case"], r["replay"]) for r in report["results"]] == [("far", "steps")]
    code, report, err = run_validate(exported["tables"], capfd, "--case", "near")
    assert (code, report) == (2, {})
    assert "near" in err


def test_validation_needs_nothing_of_the_export_side(exported: dict[str, Path]) -> None:
    code = (
        "import sys\n"
        "for m in ('torch', 'transformers', 'onnx', 'onnx_ir', 'onnxscript'): sys.modules[m] = None\n"
        "from dijiang_export.cli import main\n"
        f"sys.exit(main(['validate', {str(exported['tables'])!r}, '--threads', '1', '--replay', 'prefill']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pass" in done.stdout
    assert done.stderr == ""


# -- weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layers.0.attention_norm.weight", 0),
        ("layers.1.attention.qkv.weight", 1),
        ("layers.1.attention.qkv.bias", 1),
        ("layers.1.attention.dense.weight", 2),
        ("layers.1.attention.norm_weight", 2),
        ("layers.1.mlp.down.weight", 2),
        ("layers.2.attention.proj", 2),
        ("layers.2.mlp.up.bias", None),
        ("final_norm.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_a_weight_of_flipped_sign(
    name: str, layer: int | None, tables: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def flip(weight: np.ndarray) -> None:
        where = np.unravel_index(np.abs(weight).argmax(), weight.shape)
        weight[where] *= -1

    edit_weight(tables, name, flip)
    first = assert_mismatch(run_validate(tables, capfd))
    # The states say where: the first layer that reads what the weight changed.
    assert first["quantity"] == ("logits" if layer is None else "state")
    assert first["layer"] == layer


def test_one_flipped_exponent_bit(tables: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def flip(weight: np.ndarray) -> None:
        weight.view(np.uint32)[3, -5] ^= 1 << 24  # a value column: those of q leave the state alone

    edit_weight(tables, "layers.0.attention.qkv.weight", flip)
    assert assert_mismatch(run_validate(tables, capfd))["layer"] == 0


def test_a_weight_that_is_not_finite(tables: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def spoil(weight: np.ndarray) -> None:
        weight[0, -1] = np.nan

    edit_weight(tables, "layers.1.attention.qkv.weight", spoil)
    first = assert_mismatch(run_validate(tables, capfd))
    assert first["quantity"] == "finite"
    assert first["layer"] == 1


# -- states --------------------------------------------------------------------------------------------


def swap_presents(model: onnx.ModelProto) -> None:
    """Layer 0's new state comes out under layer 1's name and the other way round."""
    a, b = "present.0.recurrent_state", "present.1.recurrent_state"
    for node in model.graph.node:
        for names in (node.output, node.input):
            for index, name in enumerate(names):
                names[index] = {a: b, b: a}.get(name, name)


@pytest.mark.parametrize(
    ("graph", "failing"),
    [
        ("prefill", {"prefill", "pieces", "alone", "padding", "resume"}),
        ("step", {"steps", "resume"}),
    ],
)
def test_two_layers_states_swapped(
    graph: str, failing: set[str], geometric: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_graph(geometric, graph, swap_presents)
    result = run_validate(geometric, capfd)
    first = assert_mismatch(result)
    assert (first["quantity"], first["layer"]) == ("state", 0)
    assert {r["replay"] for r in result[1]["results"] if not r["passed"]} == failing


def test_a_state_that_is_not_carried(geometric: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def forget(model: onnx.ModelProto) -> None:
        """Layer 1 reads zeros instead of its past."""
        past = "past_key_values.1.recurrent_state"
        model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "nought"))
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name == past:
                    node.input[index] = "forgotten"
        model.graph.node.insert(0, helper.make_node("Mul", [past, "nought"], ["forgotten"]))

    edit_graph(geometric, "prefill", forget)
    result = run_validate(geometric, capfd)
    first = assert_mismatch(result)
    assert first["layer"] == 1
    # A prefill that starts from nothing is still right; only carrying on is wrong.
    assert {r["replay"] for r in result[1]["results"] if not r["passed"]} == {"pieces"}


# -- decay and positions -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log_decay", "gain", "read_scale"])
def test_trained_tables_off_by_one_row(name: str, tables: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def shift(table: np.ndarray) -> None:
        table[:-1] = table[1:].copy()

    edit_weight(tables, f"layers.1.attention.{name}", shift)
    first = assert_mismatch(run_validate(tables, capfd))
    # read_scale acts on what is read: the logits of the first token show it, where no state is recorded.
    assert first["layer"] == (None if name == "read_scale" else 1)


def test_every_tensor_of_decay_off_by_one_row(tables: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def shift(table: np.ndarray) -> None:
        table[1:] = table[:-1].copy()

    for layer in range(3):
        for name in ("log_decay", "gain", "read_scale"):
            edit_weight(tables, f"layers.{layer}.attention.{name}", shift)
    assert_mismatch(run_validate(tables, capfd))


@pytest.mark.parametrize("graph", ["prefill", "step"])
@pytest.mark.parametrize("kind", ["tables", "geometric"])
def test_positions_off_by_one(
    kind: str, graph: str, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    folder: Path = request.getfixturevalue(kind)

    def later(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.int64(1), "one_too_many"))
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name == "positions":
                    node.input[index] = "positions_off"
        model.graph.node.insert(0, helper.make_node("Add", ["positions", "one_too_many"], ["positions_off"]))

    edit_graph(folder, graph, later)
    assert_mismatch(run_validate(folder, capfd, "--case", "short"))


def test_a_heads_decay_that_belongs_to_its_neighbour(
    geometric: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def roll(log_decay: np.ndarray) -> None:
        log_decay[:] = np.roll(log_decay, 1)

    edit_weight(geometric, "layers.1.attention.log_decay", roll)
    first = assert_mismatch(run_validate(geometric, capfd))
    assert (first["quantity"], first["layer"]) == ("state", 1)


# -- the record ----------------------------------------------------------------------------------------


def edit_record(folder: Path, key: str, change: Callable[[np.ndarray], None]) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = folder / "reference.safetensors"
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
    change(tensors[key])
    save_file(tensors, path, metadata=metadata)
    rehash(folder)


@pytest.mark.parametrize(
    ("key", "quantity"), [("short.logits", "logits"), ("short.state.1", "state"), ("far.state.0", "state")]
)
def test_a_record_with_another_value(
    key: str, quantity: str, geometric: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def nudge(values: np.ndarray) -> None:
        last = values[0, -1].reshape(-1)
        last[np.abs(last).argmax()] *= 1.01

    edit_record(geometric, key, nudge)
    first = assert_mismatch(run_validate(geometric, capfd))
    assert first["case"] == key.split(".")[0]
    assert first["quantity"] == quantity


def test_a_record_that_is_not_finite(geometric: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def spoil(values: np.ndarray) -> None:
        values[1, 0, 3] = np.inf

    edit_record(geometric, "short.logits", spoil)
    first = assert_mismatch(run_validate(geometric, capfd))
    assert (first["quantity"], first["row"]) == ("reference", 1)


def test_a_record_of_other_tokens(geometric: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def other(ids: np.ndarray) -> None:
        ids[0, 0] = (ids[0, 0] + 1) % 256

    edit_record(geometric, "short.input_ids", other)
    assert_mismatch(run_validate(geometric, capfd))


def test_a_record_that_contradicts_itself(geometric: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def longer(lens: np.ndarray) -> None:
        lens[0] += 1000

    edit_record(geometric, "short.seq_lens", longer)
    code, report, err = run_validate(geometric, capfd)
    assert (code, report) == (1, {})
    assert json.loads(err)["error"]["type"] == "BundleError"


# -- what the hashes and sizes see ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights.data", "prefill.onnx", "step.onnx", "reference.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_without_new_hashes_is_found_before_anything_runs(
    name: str, damage: str, geometric: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = geometric / name
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-100])
    elif damage == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    code, report, err = run_validate(geometric, capfd)
    assert (code, report) == (1, {})
    message = json.loads(err)["error"]
    assert message["type"] == "BundleError"
    assert name in message["what"]
    with pytest.raises(BundleError):
        open_bundle(geometric).reference()


@pytest.mark.parametrize("name", ["prefill.onnx", "step.onnx", "weights.data", "reference.safetensors"])
def test_a_truncated_file_with_new_hashes_fails_too(
    name: str, geometric: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = geometric / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - len(data) // 3])
    rehash(geometric)
    code, report, err = run_validate(geometric, capfd)
    assert (code, report) == (1, {})
    assert json.loads(err)["error"]["type"] in ("BundleError", "RunnerError")
    assert "Traceback" not in err


def test_a_bundle_without_a_record_cannot_be_validated(
    geometric: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((geometric / "manifest.json").read_text())
    manifest["reference"] = None
    del manifest["files"]["reference.safetensors"]
    (geometric / "reference.safetensors").unlink()
    (geometric / "manifest.json").write_text(json.dumps(manifest))
    code, report, err = run_validate(geometric, capfd)
    assert (code, report) == (1, {})
    assert "--cases" in json.loads(err)["error"]["hint"]
