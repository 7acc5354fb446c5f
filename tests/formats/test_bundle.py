"""Opening bundles: good ones open, and every kind of bad one is refused with one clear message."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.makers.toy_bundle import SPEC, ToyModel, make_bundle, write_manifest

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.bundle import Bundle, open_bundle
from dijiang_engines.formats.safe_files import LIMITS

Toy = tuple[Path, ToyModel]


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refusal(folder: Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert "Traceback" not in str(caught.value)
    return caught.value


def test_a_good_bundle_opens(toy: Toy) -> None:
    folder, _ = toy
    bundle = open_bundle(str(folder))
    assert bundle.spec == SPEC
    assert (bundle.dtype, bundle.logits, bundle.all_logits, bundle.name) == ("float32", "last", False, "toy")
    assert bundle.graph_path("step") == folder / "step.onnx"
    assert bundle.weights_path == folder / "weights.data"
    assert bundle.tokenizer_path == folder / "tokenizer.json"
    assert bundle.config_path == folder / "config.json"
    assert bundle.reference_path is None
    assert set(bundle.files) == {"prefill.onnx", "step.onnx", "weights.data", "tokenizer.json", "config.json"}
    assert [t.name for t in bundle.graphs["step"].inputs[:3]] == ["input_ids", "positions", "seq_lens"]
    bundle.verify()


def test_a_bundle_without_a_tokenizer_opens(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", tokenizer=False)
    assert open_bundle(tmp_path / "b").tokenizer_path is None


def test_verify_reports_every_byte(toy: Toy) -> None:
    seen: list[int] = []
    bundle = open_bundle(toy[0])
    bundle.verify(seen.append)
    assert sum(seen) == sum(f.bytes for f in bundle.files.values())


def test_a_missing_graph_is_named(toy: Toy) -> None:
    with pytest.raises(BundleError, match="no graph 'step_trt'"):
        open_bundle(toy[0]).graph_path("step_trt")


def test_no_folder(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nothing")
    assert "there is no bundle" in str(error)
    assert "to-onnx" in str(error.hint)


def test_a_checkpoint_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "looks like a checkpoint" in str(refusal(tmp_path))


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    assert "not a bundle" in str(refusal(tmp_path / "f"))


@pytest.mark.parametrize(
    "name", ["prefill.onnx", "step.onnx", "weights.data", "tokenizer.json", "config.json"]
)
@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "flipped", "symlink", "hardlink", "folder", "pipe"]
)
def test_damaged_files_are_refused(toy: Toy, name: str, damage: str) -> None:
    folder, _ = toy
    file = folder / name
    data = file.read_bytes()
    elsewhere = folder.parent / "elsewhere"
    elsewhere.write_bytes(data)
    file.unlink()
    if damage == "truncated":
        file.write_bytes(data[:-1])
    elif damage == "flipped":
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "symlink":
        file.symlink_to(elsewhere)
    elif damage == "hardlink":
        file.hardlink_to(elsewhere)
    elif damage == "folder":
        file.mkdir()
    elif damage == "pipe":
        os.mkfifo(file)
    words = {
        "missing": "is missing", "truncated": "wrong size", "flipped": "SHA-256 differs",
        "symlink": "symbolic link", "hardlink": "hard link",
        "folder": "ordinary file", "pipe": "ordinary file",
    }  # fmt: skip
    message = str(refusal(folder))
    assert words[damage] in message
    assert name in message


def test_weights_hash_can_be_left_out_but_not_their_size(toy: Toy) -> None:
    weights = toy[0] / "weights.data"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    bundle = open_bundle(toy[0], verify=False)
    with pytest.raises(BundleError, match="SHA-256 differs"):
        bundle.verify()
    weights.write_bytes(data[:-1])
    with pytest.raises(BundleError, match="wrong size"):
        open_bundle(toy[0], verify=False)


def test_the_bundle_itself_may_be_reached_through_a_link(toy: Toy) -> None:
    link = toy[0].parent / "link"
    link.symlink_to(toy[0])
    assert open_bundle(link).spec == SPEC


def test_a_manifest_that_is_a_link_is_refused(toy: Toy) -> None:
    manifest = toy[0] / "manifest.json"
    manifest.rename(toy[0].parent / "outside.json")
    manifest.symlink_to(toy[0].parent / "outside.json")
    assert "symbolic link" in str(refusal(toy[0]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ('{"format": NaN}', "not valid JSON"),
        ('{"format": 1, "format": 2}', "same key twice"),
        ("[" * 33 + "]" * 33, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": ' + "9" * 10_000 + "}", "manifest.json"),
        ("{}", "not a bundle's"),
        ('{"format": "other"}', "not a bundle's"),
        ('{"format": "dijiang-bundle", "format_version": 3}', "update dijiang-export"),
        ('{"format": "dijiang-bundle", "format_version": "1"}', "format version"),
        ('{"format": "dijiang-bundle", "format_version": true}', "format version"),
        ('{"format": "dijiang-bundle", "format_version": 1}', "dtype"),
    ],
)
def test_bad_manifests_are_refused(toy: Toy, text: str, words: str) -> None:
    (toy[0] / "manifest.json").write_text(text)
    assert words in str(refusal(toy[0]))


def test_a_manifest_that_is_not_utf8_is_refused(toy: Toy) -> None:
    (toy[0] / "manifest.json").write_bytes(b'{"format": "\xff"}')
    assert "offset 12" in str(refusal(toy[0]))


def test_a_huge_manifest_is_not_read(toy: Toy) -> None:
    with open(toy[0] / "manifest.json", "r+b") as file:
        file.truncate(LIMITS["manifest"] + 1)
    assert "too large" in str(refusal(toy[0]))


def put(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        place = manifest
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


HEX = "0" * 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("dtype", value="int8"), "dtype"),
        (put("dtype", value=["float32"]), "dtype"),
        (put("logits", value="some"), "logits"),
        (put("op", value=None), "op"),
        (put("op", "version", value=2), "another version of DijiangAttention"),
        (put("weights", "file", value="../weights.data"), "weights"),
        (put("reference", value={"file": "x", "cases": []}), "reference"),
        (put("reference", value={"file": "reference.safetensors", "cases": []}), "reference.safetensors"),
        (put("spec", value=None), "model spec"),
        (put("spec", "num_heads", value=-1), "num_heads"),
        (put("spec", "num_heads", value=True), "num_heads"),
        (put("spec", "vocab_size", value=261), "do not fit its model spec"),
        (put("spec", "num_layers", value=3), "do not fit its model spec"),
        (put("files", value={}), "files"),
        (put("files", "../evil", value={"sha256": HEX, "bytes": 1}), "file name that a bundle cannot have"),
        (put("files", "a/b", value={"sha256": HEX, "bytes": 1}), "file name that a bundle cannot have"),
        (put("files", "a\\b", value={"sha256": HEX, "bytes": 1}), "file name that a bundle cannot have"),
        (put("files", ".hidden", value={"sha256": HEX, "bytes": 1}), "file name that a bundle cannot have"),
        (put("files", "", value={"sha256": HEX, "bytes": 1}), "file name that a bundle cannot have"),
        (
            put("files", "manifest.json", value={"sha256": HEX, "bytes": 1}),
            "file name that a bundle cannot have",
        ),
        (put("files", "more.bin", value={"sha256": HEX, "bytes": 1}), "more.bin is missing"),
        (put("files", "step.onnx", "sha256", value="0" * 63), "files.step.onnx"),
        (put("files", "step.onnx", "sha256", value="G" * 64), "files.step.onnx"),
        (put("files", "step.onnx", "bytes", value=-1), "files.step.onnx"),
        (put("files", "step.onnx", "bytes", value=1.5), "files.step.onnx"),
        (put("graphs", value=[]), "graphs"),
        (put("graphs", "step", value=None), "graphs.step.file"),
        (put("graphs", "step", "file", value="../step.onnx"), "graphs.step.file"),
        (put("graphs", "step", "file", value="tokenizer.json"), "graphs.step.file"),
        (put("graphs", "step", "inputs", value=[]), "inputs of graph 'step' do not fit"),
        (put("graphs", "step", "inputs", value=[{"name": 1}]), "graphs.step.inputs"),
        (put("graphs", "step", "inputs", value=7), "graphs.step.inputs"),
    ],
)
def test_manifests_that_do_not_make_sense_are_refused(
    toy: Toy, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    change_manifest(toy[0], change)
    assert words in str(refusal(toy[0]))


def test_weights_outside_the_bundle_are_refused(toy: Toy) -> None:
    """A graph rewritten to read another file, with a manifest that agrees."""
    folder, _ = toy
    graph = (folder / "step.onnx").read_bytes()
    assert graph.count(b"weights.data") == 2
    (folder / "step.onnx").write_bytes(graph.replace(b"weights.data", b"../passwords"))
    write_manifest(folder, SPEC)
    message = str(refusal(folder))
    assert "step.onnx" in message
    assert "outside the bundle's weights" in message


def test_weights_out_of_bounds_are_refused(toy: Toy) -> None:
    folder, _ = toy
    weights = (folder / "weights.data").read_bytes()
    (folder / "weights.data").write_bytes(weights[:-4])
    write_manifest(folder, SPEC)
    assert "lies outside weights.data" in str(refusal(folder))


def test_an_onnx_file_that_no_graph_names_is_checked_too(toy: Toy) -> None:
    folder, _ = toy
    graph = (folder / "step.onnx").read_bytes()
    (folder / "extra.ort.onnx").write_bytes(graph.replace(b"weights.data", b"/etc/weights"))
    write_manifest(folder, SPEC)
    assert "extra.ort.onnx" in str(refusal(folder))


def test_identity_follows_weights_and_spec_only(tmp_path: Path) -> None:
    def identity(name: str, **options: Any) -> object:
        make_bundle(tmp_path / name, **options)
        return open_bundle(tmp_path / name).identity

    first = identity("a")
    assert identity("b", logits="all") == first
    assert identity("c", seed=1) != first
    assert identity("d", rope_theta=500.0) != first


# -- recorded cases ------------------------------------------------------------------------------------


def case_tensors(model: ToyModel, name: str = "short") -> dict[str, np.ndarray]:
    ids = np.array([[5, 6, 7], [8, 9, 0]])
    lens, positions = np.array([3, 2]), np.array([0, 4])
    marks, state_marks = np.array([[1, 3], [1, 2]]), np.array([1])
    rows = range(2)
    logits = [[model.logits(ids[b, :m], positions[b]) for m in marks[b]] for b in rows]
    tensors = {
        "input_ids": ids, "seq_lens": lens, "positions": positions, "marks": marks,
        "state_marks": state_marks, "logits": np.array(logits, np.float32),
    }  # fmt: skip
    for i in range(SPEC.num_layers):
        states = [[model.states(ids[b, : marks[b, s]], positions[b])[i] for s in state_marks] for b in rows]
        tensors[f"state.{i}"] = np.array(states, np.float32)
    return {f"{name}.{key}": value for key, value in tensors.items()}


def add_reference(folder: Path, tensors: dict[str, np.ndarray], **metadata: str) -> Bundle:
    head = {"format": "dijiang-reference", "version": "1", "cases": '["short"]', "compute_dtype": "float64"}
    save_file(tensors, folder / "reference.safetensors", metadata=head | metadata)
    write_manifest(folder, SPEC)
    return open_bundle(folder)


def test_recorded_cases_are_read_lazily_and_exactly(toy: Toy) -> None:
    tensors = case_tensors(toy[1])
    reference = add_reference(toy[0], tensors).reference()
    assert list(reference.cases) == ["short"]
    assert reference.compute_dtype == "float64"
    case = reference.cases["short"]
    assert case.batch == 2
    for name in ("input_ids", "seq_lens", "positions", "marks", "state_marks"):
        np.testing.assert_array_equal(getattr(case, name), tensors[f"short.{name}"])
    np.testing.assert_array_equal(case.logits(), tensors["short.logits"])
    np.testing.assert_array_equal(case.logits(row=1), tensors["short.logits"][1])
    np.testing.assert_array_equal(case.state(1), tensors["short.state.1"])
    np.testing.assert_array_equal(case.state(1, row=0), tensors["short.state.1"][0])


def test_no_recorded_cases(toy: Toy) -> None:
    with pytest.raises(BundleError, match="no recorded cases"):
        open_bundle(toy[0]).reference()


def test_a_corrupt_reference_stops_its_reader_only(toy: Toy) -> None:
    add_reference(toy[0], case_tensors(toy[1]))
    file = toy[0] / "reference.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    bundle = open_bundle(toy[0])
    with pytest.raises(BundleError, match="SHA-256 differs"):
        bundle.reference()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "version that this program knows"),
        ({"version": "2"}, "version that this program knows"),
        ({"compute_dtype": "float16"}, "compute_dtype"),
        ({"cases": "["}, "not valid JSON"),
        ({"cases": '"short"'}, "bad list of cases"),
        ({"cases": '["short", "short"]'}, "bad list of cases"),
        ({"cases": '["a/b"]'}, "odd name"),
        ({"cases": '["missing"]'}, "lacks the tensor"),
        ({"cases": "[]"}, "other cases"),
    ],
)
def test_bad_reference_metadata(toy: Toy, change: dict[str, str], words: str) -> None:
    bundle = add_reference(toy[0], case_tensors(toy[1]), **change)
    with pytest.raises(BundleError) as caught:
        bundle.reference()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("logits", np.zeros((2, 2, 7), np.float32), "another type or shape"),
        ("logits", np.zeros((2, 2, 260), np.float64), "another type or shape"),
        ("state.1", np.zeros((2, 1, 2, 4, 5), np.float32), "another type or shape"),
        ("state.1", None, "lacks the tensor"),
        ("input_ids", np.full((2, 3), 260), "out of range"),
        ("input_ids", np.zeros((0, 3), np.int64), "another type or shape"),
        ("seq_lens", np.array([4, 2]), "out of range"),
        ("seq_lens", np.array([3, 0]), "out of range"),
        ("marks", np.array([[3, 1], [1, 2]]), "out of range"),
        ("marks", np.array([[1, 2], [1, 2]]), "out of range"),
        ("state_marks", np.array([2]), "out of range"),
        ("positions", np.array([-1, 0]), "out of range"),
    ],
)
def test_bad_reference_tensors(toy: Toy, field: str, value: np.ndarray | None, words: str) -> None:
    tensors = case_tensors(toy[1])
    if value is None:
        del tensors[f"short.{field}"]
    else:
        tensors[f"short.{field}"] = value
    with pytest.raises(BundleError, match=words):
        add_reference(toy[0], tensors).reference()


def test_a_reference_that_is_not_safetensors(toy: Toy) -> None:
    (toy[0] / "reference.safetensors").write_bytes(b"\xff" * 100)
    write_manifest(toy[0], SPEC)
    with pytest.raises(BundleError, match="not a safetensors file"):
        open_bundle(toy[0]).reference()


def test_opening_changes_nothing(toy: Toy) -> None:
    def snapshot() -> dict[str, str]:
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in toy[0].iterdir()}

    before = snapshot()
    open_bundle(toy[0]).verify()
    assert snapshot() == before


def test_a_copied_bundle_opens(toy: Toy, tmp_path: Path) -> None:
    shutil.copytree(toy[0], tmp_path / "copy")
    assert open_bundle(tmp_path / "copy").identity == open_bundle(toy[0]).identity
