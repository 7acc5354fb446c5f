"""`--calibrate`: what it rounds better, what texts it takes, and that it leaves nothing behind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.makers.checkpoints import neox

from dijiang_engines.errors import CheckpointError, TextError, UsageError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.formats.safe_files import LIMITS
from dijiang_engines.runners import open_runner
from dijiang_engines.validation.validate import validate
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.export import calibration
from dijiang_export.export.dequantised import DequantisedCheckpoint
from dijiang_export.export.to_onnx import export_bundle
from dijiang_export.graph.weights import layout_of
from dijiang_export.quantise.recipe import choose_recipe
from dijiang_export.reference.model import ReferenceModel

TINY = neox(hidden=64, heads=4, intermediate=96, vocab=300).with_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.save(tmp_path_factory.mktemp("calibration") / "checkpoint")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = random.Random(0).choices(["def", "return", "x", "(", ")", "for", "in", "range", "0", "1"], k=3000)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words))
    return path


def stored(folder: Path, checkpoint: Any) -> DequantisedCheckpoint:
    recipe = choose_recipe(checkpoint.spec, "int4")
    layout = layout_of(checkpoint.spec, torch.float32, recipe)
    return DequantisedCheckpoint(checkpoint, recipe, layout, folder / "weights.data")


def test_products_on_the_text_change_less_and_everything_else_is_as_without_it(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    export_bundle(checkpoint, tmp_path / "plain", weight_format="int4", cases="none")
    export_bundle(checkpoint, tmp_path / "better", weight_format="int4", calibrate=text)
    said = json.loads((tmp_path / "better" / "manifest.json").read_text())["quantisation"]
    assert said["calibration"]["file"] == "text.txt" and said["calibration"]["tokens"] >= 1024
    assert said["cost"]["text"].startswith("the end of text.txt")
    bundle = open_bundle(tmp_path / "better")
    runner = open_runner(bundle, "cpu", threads=1)
    assert validate(runner, bundle.reference(), activations=bundle.activations).passed
    with open_checkpoint(checkpoint) as opened:
        exact = opened.load_state_dict(torch.float64)
        models = {name: stored(tmp_path / name, opened) for name in ("plain", "better")}
        ids = torch.from_numpy(calibration.read_calibration_text(text, opened).measured.windows)
        heard: dict[str, torch.Tensor] = {}
        reference = ReferenceModel(opened.spec, dtype=torch.float64)
        reference.load_state_dict(
            exact | {"embed_tokens.weight": models["better"].tensor("embed_tokens.weight")}
        )
        first = reference.layers[0]
        for path in ("attention.qkv", "attention.dense", "mlp.down"):
            first.get_submodule(path).register_forward_hook(
                lambda _, inputs, __, path=path: heard.__setitem__(path, inputs[0])
            )
        reference(ids)
        for path, x in heard.items():
            name = f"layers.0.{path}.weight"
            plain, better = (
                float((x @ (model.tensor(name).double() - exact[name]).T).square().mean())
                for model in models.values()
            )
            assert better < 0.8 * plain, name
        for name in ("embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(models["plain"].tensor(name), models["better"].tensor(name))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"text\0with a zero byte" * 100, "is no text"),
        (b"\xff\xfe" * 2000, "is not UTF-8"),
        (b"short", "is too short to calibrate with"),
    ],
)
def test_what_is_no_text_to_calibrate_with_is_refused(
    checkpoint: Path, tmp_path: Path, content: bytes, what: str
) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TextError, match=what):
        export_bundle(checkpoint, tmp_path / "b", weight_format="int4", calibrate=tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_a_text_beyond_the_limit_is_refused_unread(checkpoint: Path, tmp_path: Path) -> None:
    with (tmp_path / "t").open("wb") as file:
        file.truncate(LIMITS["text"] + 1)
    with pytest.raises(TextError, match="large"):
        export_bundle(checkpoint, tmp_path / "b", weight_format="int4", calibrate=tmp_path / "t")


def test_a_long_text_is_cut_with_a_word(
    checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MOST_CHARACTERS", 5000)
    with open_checkpoint(checkpoint) as opened:
        found = calibration.read_calibration_text(text, opened)
    assert found.note is not None and "the first 5,000 are used" in found.note
    windows = {tuple(row) for row in found.windows.tolist()}
    assert not windows & {tuple(row) for row in found.measured.windows.tolist()}


def test_a_checkpoint_without_a_tokenizer_is_refused(text: Path, tmp_path: Path) -> None:
    bare = neox(hidden=64, heads=4, intermediate=96, vocab=97).save(tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        export_bundle(bare, tmp_path / "b", weight_format="int4", calibrate=text)
    with pytest.raises(UsageError, match="--calibrate is for quantised weights"):
        export_bundle(bare, tmp_path / "b", calibrate=text)


def test_an_interrupted_calibration_leaves_nothing(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "compensate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint, tmp_path / "b", weight_format="int4", calibrate=text)
    assert not list(tmp_path.iterdir())
