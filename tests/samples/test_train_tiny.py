"""The sample's training script, end to end at a toy size, and the checkpoint that it made for shipping."""

from __future__ import annotations

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.oracles.official import official_forward
from support.paths import ROOT
from tokenizers import Tokenizer

SCRIPTS = ROOT / "samples" / "train_tiny"
SHIPPED = ROOT / "samples" / "tiny-stdlib"


def official_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official GPT-NeoX DiJiang checkpoint, spelled out."""
    h, i, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, n = config["num_attention_heads"], config["max_position_embeddings"]
    d = h // heads
    shapes: dict[str, tuple[int, ...]] = {
        "gpt_neox.embed_in.weight": (v, h),
        "gpt_neox.final_layer_norm.weight": (h,),
        "gpt_neox.final_layer_norm.bias": (h,),
        "embed_out.weight": (v, h),
    }
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (h,),
        "input_layernorm.bias": (h,),
        "post_attention_layernorm.weight": (h,),
        "post_attention_layernorm.bias": (h,),
        "attention.query_key_value.weight": (3 * h, h),
        "attention.query_key_value.bias": (3 * h,),
        "attention.dense.weight": (h, h),
        "attention.dense.bias": (h,),
        "attention.W_G": (h, h),
        "attention.group_norm.weight": (h,),
        "attention.group_norm.bias": (h,),
        "attention.proj_matrix": (d, d),
        "attention.D1": (1, heads, n, 1),
        "attention.D2": (1, heads, n, 1),
        "mlp.dense_h_to_4h.weight": (i, h),
        "mlp.dense_h_to_4h.bias": (i,),
        "mlp.dense_4h_to_h.weight": (h, i),
        "mlp.dense_4h_to_h.bias": (h,),
    }
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"gpt_neox.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def check_layout(folder: Path) -> dict[str, torch.Tensor]:
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == official_shapes(config)
    assert config["model_type"] == "gpt_neox"
    assert config["torch_dtype"] == "float16"
    heads, n = config["num_attention_heads"], config["max_position_embeddings"]
    gamma = 1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), heads, dtype=torch.float64).exp()
    expected = gamma.view(1, heads, 1, 1) ** torch.arange(n, dtype=torch.float64).view(1, 1, n, 1)
    for name, tensor in tensors.items():
        wide = name.endswith((".D1", ".D2"))
        assert tensor.dtype == (torch.float32 if wide else torch.float16), name
        assert tensor.isfinite().all(), name
        if wide:
            table = expected if name.endswith("D1") else 1 / expected
            # float32 γ is off by up to 6e-8, which grows with the power.
            torch.testing.assert_close(tensor.double(), table, rtol=1e-7 * (n + 10), atol=0)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|endoftext|>") == config["eos_token_id"] == 0
    text = "def naïve(x):\n\treturn '日本' + x  # \x00 🐍\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    return tensors


def run_script(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", SCRIPTS / script, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred kilobytes of the standard library with files in all three splits."""
    folder = tmp_path_factory.mktemp("library")
    stdlib = Path(sysconfig.get_path("stdlib"))
    for name in ("asyncio", "email", "xml"):
        shutil.copytree(stdlib / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "not_utf8.py").write_bytes(b"# \xff\n")
    return folder


def test_whole_script_makes_an_official_checkpoint(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    done = run_script(
        "train.py", "--out", out, "--stdlib", library, "--device", "cpu", "--vocab", "384", "--hidden", "64",
        "--heads", "4", "--layers", "2", "--intermediate", "96", "--context", "64", "--batch", "4",
        "--steps", "24", "--finetune-steps", "12", "--lr", "1e-2", "--no-controls",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tensors = check_layout(out / "dijiang")

    metrics = json.loads((out / "metrics.json").read_text())
    stages = metrics["stages"]
    assert set(stages) == {"vanilla", "converted", "fine-tuned", "fine-tuned float16"}
    loss = {name: stage["held_out"]["all"]["loss"] for name, stage in stages.items()}
    assert loss["vanilla"] < math.log(384) - 0.5  # it learned something
    assert loss["fine-tuned"] < loss["converted"] - 0.02
    assert loss["fine-tuned float16"] == pytest.approx(loss["fine-tuned"], abs=1e-3)
    assert stages["fine-tuned"]["compute"]["tokens"] == 12 * 4 * 64

    # Fine-tuning moved the weights and left alone what is frozen.
    before = load_file(out / "converted" / "model.safetensors")
    for name, tensor in tensors.items():
        frozen = name.endswith((".D1", ".D2", ".proj_matrix"))
        assert torch.equal(tensor, before[name].to(tensor.dtype)) == frozen, name

    card = (out / "dijiang" / "README.md").read_text()
    assert f"{stages['fine-tuned float16']['held_out']['all']['perplexity']:.2f}" in card
    assert metrics["corpus"]["sha256"] in card
    assert metrics["corpus"]["files"] == len([p for p in library.rglob("*.py") if p.read_bytes().strip()]) - 1

    # The project's reference model, a second implementation, finds the same held-out loss.
    done = run_script("check.py", out / "dijiang", "--stdlib", library, "--windows", "64")
    assert done.returncode == 0, done.stderr
    head, result = map(json.loads, done.stdout.splitlines())
    assert head["corpus_sha256"] == metrics["corpus"]["sha256"]
    assert result["held_out"]["all"]["loss"] == pytest.approx(loss["fine-tuned float16"], abs=1e-4)


def test_bad_arguments_get_one_clear_message(tmp_path: Path) -> None:
    done = run_script("train.py", "--out", tmp_path / "tiny", "--hidden", "72", "--heads", "3")
    assert done.returncode == 2
    assert "must be a multiple of 16, got 72 / 3" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "tiny").exists()


def test_corpus_without_source_or_without_a_split_says_so(tmp_path: Path) -> None:
    corpus = runpy.run_path(str(SCRIPTS / "corpus.py"), run_name="corpus")
    with pytest.raises(SystemExit, match="no Python source below"):
        corpus["read_corpus"](tmp_path)
    (tmp_path / "one.py").write_text("pass\n")
    with pytest.raises(SystemExit, match="hint: use a larger folder"):
        corpus["read_corpus"](tmp_path)


def test_shipped_checkpoint_has_the_official_layout() -> None:
    assert (SHIPPED / "model.safetensors").stat().st_size <= 10_000_000
    check_layout(SHIPPED)


@pytest.mark.parametrize("name", ["runpy.py", "operator.py"])
def test_shipped_checkpoint_predicts_held_out_source(name: str) -> None:
    """By the official formula: about one bit per byte. Letter frequencies alone give more than four."""
    text = (Path(sysconfig.get_path("stdlib")) / name).read_text()[:4000]
    ids = torch.tensor([[0, *Tokenizer.from_file(str(SHIPPED / "tokenizer.json")).encode(text).ids]])
    config = json.loads((SHIPPED / "config.json").read_text())
    tensors = load_file(SHIPPED / "model.safetensors")
    logits = official_forward(tensors, config, ids[:, :1024], dtype=torch.float32)[0, : ids.shape[1] - 1]
    targets = ids[0, 1 : 1 + len(logits)]
    nats = torch.nn.functional.cross_entropy(logits, targets).item()
    bytes_per_token = len(text.encode()) / (ids.shape[1] - 1)
    assert nats / math.log(2) / bytes_per_token < 1.7


def test_shipped_card_quotes_the_recorded_run() -> None:
    metrics = json.loads((ROOT / "docs" / "evidence" / "train-tiny-h200.json").read_text())
    card = (SHIPPED / "README.md").read_text()
    for stage in metrics["stages"].values():
        assert f"{stage['held_out']['all']['perplexity']:.2f}" in card
        assert f"{stage['held_out']['all']['bits_per_byte']:.3f}" in card
    assert metrics["corpus"]["sha256"] in card
    assert "PSF" in card
