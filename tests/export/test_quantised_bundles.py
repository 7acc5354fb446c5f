"""Bundles with quantised weights, from checkpoint to tokens: stored, read, run, validated, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from support.makers.checkpoints import RandomCheckpoint, llama, neox, opt_350m
from support.makers.weight_files import load_tensors, save_tensors
from support.oracles.numpy_runner import NumpyRunner

from dijiang_engines.errors import BundleError, CheckpointError, UsageError
from dijiang_engines.formats.bundle import Bundle, open_bundle
from dijiang_engines.inspection import step_bytes
from dijiang_engines.runners import open_runner
from dijiang_engines.validation.validate import validate
from dijiang_engines.weight_formats import matrix_shapes
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.cli import main
from dijiang_export.export.to_onnx import export_bundle
from dijiang_export.export.windows import WindowModel
from dijiang_export.graph.weights import layout_of
from dijiang_export.quantise.recipe import choose_recipe

Array = npt.NDArray[Any]

SIZES = {"hidden": 64, "heads": 4, "intermediate": 96, "vocab": 97}
MODELS: Mapping[str, RandomCheckpoint] = {
    "neox": neox(**SIZES),
    "llama-tied": llama(kv_heads=2, **SIZES).with_config(tie_word_embeddings=True),
    "opt-350m": opt_350m(embedding=32, **SIZES),
}
FLOAT_PORTABLE = {"weight_format": "int4", "variants": ("portable",), "activations": "float"}
KINDS = [("neox", "int8"), ("llama-tied", "int4"), ("opt-350m", "int4"), ("neox", "int4")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """made(model, options) -> (checkpoint, bundle): exported once each."""
    done: dict[str, tuple[Path, Path]] = {}

    def make(model: str, **options: Any) -> tuple[Path, Path]:
        key = repr((model, sorted(options.items())))
        if key not in done:
            folder = tmp_path_factory.mktemp("quantised")
            checkpoint = MODELS[model].save(folder / "checkpoint")
            export_bundle(checkpoint, folder / "bundle", **options)
            done[key] = checkpoint, folder / "bundle"
        return done[key]

    return make


def stored_weights(folder: Path, graph: str = "step.onnx") -> dict[str, Array]:
    """Canonical name -> dequantised matrix in float64, read by onnx and put together here."""
    model = onnx.load(folder / graph)
    tensors = {t.name: t for t in model.graph.initializer}
    found: dict[str, Array] = {}
    for name, tensor in tensors.items():
        head, _, kind = name.rpartition(".")
        if kind not in ("int8", "int4"):
            continue
        data = np.frombuffer(tensor.raw_data, np.uint8)
        if kind == "int4":
            data = np.stack((data & 15, data >> 4), -1)
        scale = onnx.numpy_helper.to_array(tensors[f"{head}.scale"]).astype(np.float64)
        q = data.reshape(*scale.shape, 32).astype(np.float64) - (128 if kind == "int8" else 8)
        found[head] = (q * scale[..., None]).reshape(len(scale), -1)
    for part in [name for name in found if name.endswith("qkv.qk.weight")]:
        rest = part.replace("qkv.qk.", "qkv.v.")
        found[part.replace("qkv.qk.", "qkv.")] = np.concatenate((found.pop(part), found.pop(rest)))
    return found


def compare(bundle: Bundle, oracle: NumpyRunner, error: float, *, step: bool) -> None:
    """Three unequal rows, a prefill and then a step, against NumPy with the stored weights."""
    runner = open_runner(bundle, "cpu", threads=1)
    ids = np.random.default_rng(3).integers(0, 97, (3, 9))
    lens, positions = np.array([9, 1, 5]), np.array([0, 7, 100])
    got, want = runner.new_state(3), oracle.new_state(3)
    pairs = [
        (runner.prefill(ids, positions, lens, got), oracle.prefill(ids, positions, lens, want)),
    ]
    if step:
        ones = np.ones(3, np.int64)
        pairs.append(
            (
                runner.step(ids[:, :1], positions + lens, ones, got),
                oracle.step(ids[:, :1], positions + lens, ones, want),
            )
        )
    for ours, theirs in pairs:
        assert np.abs(ours - theirs).max() <= error * theirs.std()


@pytest.mark.parametrize(("model", "kind"), KINDS)
def test_a_bundle_computes_with_the_stored_weights_and_passes_its_validation(
    made: Any, model: str, kind: str
) -> None:
    checkpoint, folder = made(model, weight_format=kind)
    bundle = open_bundle(folder)
    assert bundle.quantisation is not None and bundle.quantisation.weight_format == kind
    with open_checkpoint(checkpoint) as opened:
        weights = {k: v.double().numpy() for k, v in opened.load_state_dict(torch.float64).items()}
    stored = stored_weights(folder)
    assert set(stored) == set(matrix_shapes(bundle.spec))
    for name, matrix in stored.items():
        step = np.abs(weights[name]).max() / (127 if kind == "int8" else 8)
        assert np.abs(matrix - weights[name]).max() <= 1.1 * step
    compare(bundle, NumpyRunner(bundle.spec, weights | stored), 1e-5, step=False)
    report = validate(
        open_runner(bundle, "cpu", threads=1), bundle.reference(), activations=bundle.activations
    )
    assert report.passed, report.first_failure
    errors = {r.replay: r.logits_error for r in report.results}
    assert errors["prefill"] < 1e-5 < errors["steps"], "a step rounds activations to int8"
    assert report.bounds_of("steps").logits.max_error > report.bounds_of("prefill").logits.max_error


def test_float_activations_make_steps_as_exact_as_prefills(made: Any) -> None:
    checkpoint, folder = made("llama-tied", **FLOAT_PORTABLE)
    bundle = open_bundle(folder)
    with open_checkpoint(checkpoint) as opened:
        weights = {k: v.double().numpy() for k, v in opened.load_state_dict(torch.float64).items()}
    compare(bundle, NumpyRunner(bundle.spec, weights | stored_weights(folder)), 1e-5, step=True)
    report = validate(
        open_runner(bundle, "cpu", threads=1), bundle.reference(), activations=bundle.activations
    )
    assert report.passed and report.step_bounds is None


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_portable_graphs_read_the_same_bytes_and_give_the_same(made: Any, dtype: str) -> None:
    import onnxruntime as ort

    _, folder = made("llama-tied", **FLOAT_PORTABLE, **({} if dtype == "float32" else {"dtype": dtype}))
    open_bundle(folder)
    inputs = {
        "input_ids": np.arange(8).reshape(2, 4), "positions": np.array([0, 3]), "seq_lens": np.array([4, 2]),
    }  # fmt: skip
    results = []
    for file in ("prefill.onnx", "prefill.portable.onnx"):
        model = onnx.load(folder / file, load_external_data=False)
        operators = {(node.domain, node.op_type) for node in model.graph.node}
        portable = "portable" in file
        assert (("", "DequantizeLinear") in operators) == portable
        assert any(domain for domain, _ in operators) != portable
        session = ort.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        states = {
            i.name: np.zeros((2, *i.shape[1:]), np.float32)
            for i in session.get_inputs()
            if i.name not in inputs
        }
        results.append(session.run(None, inputs | states))
    for one, other in zip(*results, strict=True):
        assert np.abs(one - other).max() <= (1e-5 if dtype == "float32" else 2e-2) * np.abs(one).max()


def test_an_older_reader_refuses_in_one_sentence_and_float_bundles_are_as_before(made: Any) -> None:
    from dijiang_engines.formats.file_table import check_format

    _, folder = made("neox", weight_format="int8")
    manifest = json.loads((folder / "manifest.json").read_text())
    with pytest.raises(BundleError, match="a format version that this program does not know") as error:
        check_format(manifest, "bundle", "dijiang-bundle", (1,), source="manifest.json", again="")
    assert error.value.hint == "update dijiang-export"
    _, plain = made("neox")
    manifest = json.loads((plain / "manifest.json").read_text())
    assert manifest["format_version"] == 1 and "quantisation" not in manifest
    assert open_bundle(plain).quantisation is None


def test_the_manifest_says_which_matrices_are_int8_and_why(made: Any) -> None:
    spec = open_bundle(made("neox", weight_format="int4")[1]).spec
    plain = json.loads((made("neox", weight_format="int4")[1] / "manifest.json").read_text())["quantisation"]
    assert choose_recipe(spec, "int4").to_json().items() <= plain.items()
    said = choose_recipe(spec, "int4", ("layers.1.mlp.*",)).to_json()
    formats = said["matrices"]
    in_int8 = {name for name, kind in formats.items() if kind == "int8"}
    layers = {name for name in formats if name.startswith("layers.")}
    assert in_int8 == {"embed_tokens.weight", "lm_head.weight"} | {
        name
        for name in layers
        if name.endswith(("qkv.v.weight", "dense.weight")) or name.startswith("layers.1.mlp.")
    }
    assert {rule["matrices"] for rule in said["kept_in_int8"]} >= {"lm_head.weight", "layers.1.mlp.*"}
    assert all(rule["reason"] for rule in said["kept_in_int8"])


def test_bytes_of_weights(made: Any) -> None:
    sizes = {
        kind: (made("neox", weight_format=kind)[1] / "weights.data").stat().st_size
        for kind in ("float", "int8", "int4")
    }
    assert sizes["int8"] < 0.6 * sizes["float"], "small models are mostly padding and tables"
    assert sizes["int4"] < sizes["int8"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"weight_format": "int2"}, "unknown weight format"),
        ({"keep_int8": ("lm_head",)}, "--keep-int8 is for quantised weights"),
        ({"activations": "int8"}, "--activations is for quantised weights"),
        ({"variants": ("portable",)}, "--variant portable is for quantised weights"),
        ({"weight_format": "int8", "keep_int8": ("lm_head",)}, "--keep-int8 is for --weight-format int4"),
        ({"weight_format": "int4", "keep_int8": ("layers.7.*",)}, "--keep-int8 fits no matrix"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    made: Any, tmp_path: Path, options: dict[str, Any], what: str
) -> None:
    checkpoint, _ = made("neox")
    with pytest.raises(UsageError, match=what):
        export_bundle(checkpoint, tmp_path / "b", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path, kind: Any) -> None:
    checkpoint = neox(hidden=48, heads=3, intermediate=64, vocab=97).save(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="not whole blocks of 32") as error:
        export_bundle(checkpoint, tmp_path / "b", weight_format=kind)
    assert "embed_tokens.weight" in str(error.value) and "--weight-format float" in str(error.value.hint)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, value: float) -> None:
    checkpoint = MODELS["neox"].save(tmp_path / "checkpoint")
    tensors = load_tensors(checkpoint)
    name = next(name for name in tensors if name.endswith("mlp.dense_h_to_4h.weight"))
    tensors[name][3, 40] = value
    save_tensors(checkpoint, tensors)
    with pytest.raises(CheckpointError, match="holds weights that are not numbers"):
        export_bundle(checkpoint, tmp_path / "b", weight_format="int4")
    assert not (tmp_path / "b").exists()


def test_constant_and_zero_blocks_pass(tmp_path: Path) -> None:
    checkpoint = MODELS["neox"].save(tmp_path / "checkpoint")
    tensors = load_tensors(checkpoint)
    name = next(name for name in tensors if name.endswith("mlp.dense_h_to_4h.weight"))
    tensors[name][:8] = 0
    tensors[name][8:16] = 0.125
    tensors[name][16:24] = -0.125
    save_tensors(checkpoint, tensors)
    export_bundle(checkpoint, tmp_path / "b", weight_format="int4")
    stored = stored_weights(tmp_path / "b")["layers.0.mlp.up.weight"]
    assert not stored[:8].any()
    assert set(np.unique(stored[16:24])) == {-0.125} and set(np.unique(stored[8:16])) == {0.125}
    bundle = open_bundle(tmp_path / "b")
    runner = open_runner(bundle, "cpu", threads=1)
    assert validate(runner, bundle.reference(), activations=bundle.activations).passed


def test_graphs_for_tensorrt_have_nodes_of_the_plugin_with_the_stored_bytes(
    made: Any, tmp_path: Path
) -> None:
    """TensorRT is not here: elements and scales are compared, and tokens are embedded by ONNX Runtime."""
    import onnxruntime as ort

    _, folder = made("llama-tied", **FLOAT_PORTABLE, dtype="float16")
    open_bundle(folder)
    stored = stored_weights(folder)
    for file in ("prefill.trt.onnx", "step.trt.onnx"):
        model = onnx.load(folder / file)
        tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        products = [node for node in model.graph.node if node.op_type == "DijiangLinear"]
        assert len(products) == 2 * (2 + 1 + 1 + 3) + 1  # qk, v, gate, dense, the MLP's three; the head
        for node in products:
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert (values["plugin_namespace"], values["plugin_version"]) == (b"dijiang", b"1")
            name, _, kind = node.input[1].rpartition(".")
            words, scale = tensors[node.input[1]], tensors[node.input[2]].astype(np.float64)
            u = words.astype("<i4").view(np.uint8)
            if kind == "int4":
                u = np.stack((u & 15, u >> 4), -1).reshape(*u.shape[:2], 32)
            q = u.astype(np.float64) - (128 if kind == "int8" else 8)
            whole = stored[name.replace("qkv.qk.", "qkv.").replace("qkv.v.", "qkv.")]
            rows = slice(-len(q), None) if "qkv.v." in name else slice(None, len(q))
            np.testing.assert_array_equal((q * scale[..., None]).reshape(len(q), -1), whole[rows])
        assert not [node for node in model.graph.node if node.domain == "com.microsoft"]
    graph = onnx.load(folder / "prefill.trt.onnx").graph
    embedded = next(
        node
        for node in graph.node
        if node.name.startswith("/embed_tokens/Cast") and node.attribute[0].i == 10
    )
    last = list(graph.node).index(embedded)
    out = onnx.helper.make_tensor_value_info(embedded.output[0], onnx.TensorProto.FLOAT16, None)
    del graph.node[last + 1 :]
    used = {name for node in graph.node for name in node.input}
    kept = [t for t in graph.initializer if t.name in used]
    part = onnx.helper.make_graph(list(graph.node), "part", [graph.input[0]], [out], kept)
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(part, opset_imports=[opset], ir_version=8), tmp_path / "part.onnx")
    ids = np.arange(97).reshape(1, 97)
    session = ort.InferenceSession(tmp_path / "part.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": ids})
    np.testing.assert_array_equal(found[0], stored["embed_tokens.weight"].astype(np.float16))


def test_tensorrt_is_refused_by_name_without_half_precision(made: Any) -> None:
    _, folder = made("neox", weight_format="int8")
    with pytest.raises(BundleError, match="no graphs for TensorRT") as error:
        open_bundle(folder).graph_path("prefill_trt")
    assert "ONNX Runtime" in str(error.value.hint)


def damage(folder: Path, target: Path, change: Any) -> Path:
    """A copy with a changed manifest."""
    shutil.copytree(folder, target)
    manifest = json.loads((target / "manifest.json").read_text())
    change(manifest, manifest["quantisation"])
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


HOSTILE: Mapping[str, Any] = {
    "another format for all": lambda m, q: q["matrices"].update(dict.fromkeys(q["matrices"], "int8")),
    "an unknown format": lambda m, q: q["matrices"].update({"lm_head.weight": "int3"}),
    "a matrix too many": lambda m, q: q["matrices"].update({"layers.9.mlp.up.weight": "int8"}),
    "a matrix too few": lambda m, q: q["matrices"].pop("lm_head.weight"),
    "no object of names": lambda m, q: q.update(matrices=["lm_head.weight"]),
    "a whole matrix and its parts": lambda m, q: q["matrices"].update(
        {"layers.0.attention.qkv.weight": "int8"}
    ),
    "other blocks": lambda m, q: q.update(block_size=16),
    "blocks of true": lambda m, q: q.update(block_size=True),
    "an unknown key": lambda m, q: q.update(more=1),
    "no reasons": lambda m, q: q.pop("kept_in_int8"),
    "a reason of a megabyte": lambda m, q: q.update(kept_in_int8=[{"matrices": "*", "reason": "x" * 2**20}]),
    "activations of another type": lambda m, q: q["activations"].update(step="int4"),
    "activations of an unknown graph": lambda m, q: q["activations"].update(other="int8"),
    "a cost that is no number": lambda m, q: q["cost"].update(kl="low"),
    "a negative cost": lambda m, q: q["cost"].update(kl=-1.0),
    "a perplexity below one": lambda m, q: q["cost"].update(perplexity=0.5),
    "a share above one": lambda m, q: q["cost"].update(top1=1.5),
    "nothing but its name": lambda m, q: m.update(quantisation=None),
    "the key in an old version": lambda m, q: m.update(format_version=1),
    "a new version without the key": lambda m, q: m.pop("quantisation"),
    "a version of the future": lambda m, q: m.update(format_version=3),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_manifest_that_does_not_fit_is_refused(made: Any, tmp_path: Path, kind: str) -> None:
    _, folder = made("neox", weight_format="int4")
    with pytest.raises(BundleError):
        open_bundle(damage(folder, tmp_path / "b", HOSTILE[kind]))


def test_inspect_and_the_report_say_what_it_is_and_costs(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = made("llama-tied", weight_format="int4")
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    manifest = json.loads((folder / "manifest.json").read_text())["quantisation"]
    assert found["bundle"]["quantisation"] == manifest
    bundle = open_bundle(folder)
    of_layout = layout_of(bundle.spec, torch.float32, choose_recipe(bundle.spec, "int4"))
    stored = sum(weight.nbytes for name, weight in of_layout.items() if name != "inv_freq")
    assert found["to_run"]["int4"]["weight_bytes"] == stored < found["to_run"]["float16"]["weight_bytes"]
    assert step_bytes(bundle.spec, "float32", bundle.quantised) == stored  # the tied head is read whole
    cost = manifest["cost"]
    assert cost["tokens"] >= 64 and cost["kl"] > 0 and "the float model wrote" in cost["text"]
    for command in (
        ["inspect", str(folder)],
        ["validate", str(folder), "--report", str(tmp_path / "r.html")],
    ):
        assert main(command) == 0
        capsys.readouterr()
    page = (tmp_path / "r.html").read_text()
    assert "Quantisation costs: perplexity" in page and "Tolerances of steps, resume" in page


def test_the_cost_is_that_of_the_text_that_the_model_writes(made: Any) -> None:
    """Written by NumPy's model from the same first tokens, both models' losses summed up here."""
    checkpoint, folder = made("neox", weight_format="int4")
    cost = open_bundle(folder).quantisation.cost
    with open_checkpoint(checkpoint) as opened:
        plain = WindowModel(opened, torch.float32)
        first = np.random.default_rng(0).integers(0, 97, 32)
        with torch.inference_mode():
            rows, _ = plain.write(first, 16, 0, NoProgress())
        weights = {k: v.double().numpy() for k, v in opened.load_state_dict(torch.float64).items()}
        spec = opened.spec
    losses = []
    for parameters in (weights, weights | stored_weights(folder)):
        oracle = NumpyRunner(spec, parameters, all_logits=True)
        lens = np.full(32, 16)
        logits = oracle.prefill(rows[:, :-1], np.zeros(32, np.int64), lens, oracle.new_state(32))
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(logits)
    kl = (np.exp(losses[0]) * (losses[0] - losses[1])).sum(-1).mean()
    assert cost.kl == pytest.approx(kl, rel=1e-3) and cost.tokens == 512
    for found, logits in zip((cost.perplexity_float, cost.perplexity), losses, strict=True):
        chosen = np.take_along_axis(logits, rows[:, 1:, None], -1)
        assert found == pytest.approx(np.exp(-chosen.mean()), rel=1e-4)


class NoProgress:
    def advance(self, amount: float = 1) -> None:
        pass
