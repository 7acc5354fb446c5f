"""Bad checkpoints: each gives one clear CheckpointError, and nothing in them is ever run."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bad_checkpoints import AT, change, delete, fails, put, read_all
from support.makers.byte_tokenizer import write_tokenizer
from support.makers.checkpoints import llama, neox, of_family, opt
from support.makers.weight_files import load_tensors

from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.checkpoint import Checkpoint, open_checkpoint

# The folder and config.json


def test_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(tmp_path / "absent", "is not a folder")
    (tmp_path / "file").write_text("x")
    fails(tmp_path / "file", "is not a folder")
    monkeypatch.chdir(tmp_path)
    assert "hf download EleutherAI/pythia-160m" in fails(Path("EleutherAI/pythia-160m"), "is not a folder")


def test_no_config(tmp_path: Path) -> None:
    fails(tmp_path, r"has no config\.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"null", b"[" * 100_000])
def test_corrupt_config(content: bytes, tmp_path: Path) -> None:
    folder = neox().save(tmp_path / "m")
    (folder / "config.json").write_bytes(content)
    fails(folder, r"config\.json is not")


@pytest.mark.parametrize(
    "overrides",
    [
        {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
        {"model_type": None, "architectures": None},
        {"architectures": ["GPTNeoXForSequenceClassification"]},
        {"model_type": ["gpt_neox"]},
        {"architectures": "LlamaForCausalLM"},
    ],
)
def test_unknown_architecture(overrides: dict[str, Any], tmp_path: Path) -> None:
    message = fails(neox().config_says(**overrides).save(tmp_path / "m"), "not supported")
    for supported in ("GPTNeoXForCausalLM", "LlamaForCausalLM", "OPTForCausalLM"):
        assert supported in message


@pytest.mark.parametrize(
    ("family", "overrides", "match"),
    [
        ("gpt_neox", {"hidden_size": None}, "lacks hidden_size"),
        ("gpt_neox", {"hidden_size": "64"}, "bad value for hidden_size"),
        ("gpt_neox", {"num_hidden_layers": 0}, "bad value for num_hidden_layers"),
        ("gpt_neox", {"num_hidden_layers": True}, "bad value for num_hidden_layers"),
        ("gpt_neox", {"num_hidden_layers": 2**30}, "lacks most of the layers"),
        ("gpt_neox", {"vocab_size": 2.5}, "bad value for vocab_size"),
        ("gpt_neox", {"num_attention_heads": 3}, "not divisible"),
        ("gpt_neox", {"num_attention_heads": 8}, "heads of this size"),
        ("gpt_neox", {"num_attention_heads": 64}, "heads of this size"),
        ("gpt_neox", {"hidden_size": 68}, "heads of this size"),
        ("gpt_neox", {"hidden_size": 2048}, "heads of this size"),
        ("gpt_neox", {"rotary_pct": 0.2}, "odd number of dimensions"),
        ("gpt_neox", {"rotary_pct": 1.5}, "bad value for rotary_pct"),
        ("gpt_neox", {"rotary_emb_base": -1}, "bad value for rotary_emb_base"),
        ("gpt_neox", {"rotary_emb_base": float("nan")}, "bad value for rotary_emb_base"),
        ("gpt_neox", {"layer_norm_eps": 0}, "bad value for layer_norm_eps"),
        ("gpt_neox", {"hidden_act": "mish"}, "activation 'mish' is not supported"),
        ("gpt_neox", {"use_parallel_residual": "yes"}, "bad value for use_parallel_residual"),
        ("gpt_neox", {"eos_token_id": 256}, "eos_token_id is not a token"),
        ("gpt_neox", {"bos_token_id": -1}, "bos_token_id is not a token"),
        ("gpt_neox", {"quantization_config": {"bits": 4}}, "quantised"),
        ("gpt_neox", {"rope_parameters": [1]}, "bad rope_parameters"),
        ("llama", {"num_key_value_heads": 3}, "does not divide"),
        ("llama", {"head_dim": 15}, "heads of this size"),
        ("opt", {"layer_norm_elementwise_affine": False}, "not supported"),
    ],
)
def test_bad_config_values(family: Any, overrides: dict[str, Any], match: str, tmp_path: Path) -> None:
    fails(of_family(family).config_says(**overrides).save(tmp_path / "m"), match)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "su", "mrope", 5])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_unsupported_rope_scaling(kind: Any, key: str, tmp_path: Path) -> None:
    folder = neox().with_config(rope_scaling={key: kind, "factor": 2.0}).save(tmp_path / "m")
    assert repr(kind) in fails(folder, "rope_scaling of type .* is not supported")
    folder = llama().config_says(rope_parameters={key: kind}).save(tmp_path / "n")
    fails(folder, "rope_parameters of type .* is not supported")


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear"},
        {"type": "linear", "factor": 0},
        {"type": "linear", "factor": "2"},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
         "original_max_position_embeddings": 8192},
        "linear",
    ],
)  # fmt: skip
def test_incomplete_rope_scaling(scaling: Any, tmp_path: Path) -> None:
    fails(llama().with_config(rope_scaling=scaling).save(tmp_path / "m"), "rope_scaling")


def test_tokenizer_larger_than_the_vocabulary(tmp_path: Path) -> None:
    folder = neox(vocab=300).with_tokenizer().save(tmp_path / "m")
    read_all(folder)  # fewer tokens than vocab_size are normal
    write_tokenizer(folder, 300, extra_tokens=44)
    assert "id 300" in fails(folder, "tokenizer does not fit the model")
    (folder / "tokenizer.json").write_text("{}")
    fails(folder, "is not a tokenizer")


# Which tensors there are


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "opt"])
def test_vanilla_checkpoint(family: Any, tmp_path: Path) -> None:
    folder = of_family(family).vanilla().with_leftovers().save(tmp_path / "pythia 160m")
    message = fails(folder, f"is a vanilla {family} checkpoint")
    assert f"dijiang-export convert '{folder}' 'pythia 160m-dijiang'" in message


@pytest.mark.parametrize(
    "name",
    [f"{AT}.D1", f"{AT}.W_G", f"{AT}.query_key_value.bias", "embed_out.weight", "gpt_neox.embed_in.weight"],
)
def test_missing_tensor(name: str, tmp_path: Path) -> None:
    assert name in fails(change(neox().save(tmp_path / "m"), delete(name)), "lacks 1 tensor")


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    folder = neox().config_says(num_hidden_layers=3).save(tmp_path / "m")
    assert "and 13 more" in fails(folder, "lacks 18 tensors")


@pytest.mark.parametrize(
    ("name", "shape"),
    [(f"{AT}.D1", (1, 4, 100, 1)), (f"{AT}.D2", (4, 128)), (f"{AT}.W_G", (64, 63)),
     (f"{AT}.proj_matrix", (16,)), ("gpt_neox.embed_in.weight", (255, 64)), (f"{AT}.group_norm.weight", ())],
)  # fmt: skip
def test_misshapen_tensor(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    message = fails(change(neox().save(tmp_path / "m"), put(name, torch.ones(shape))), "wrong shape")
    assert name in message
    assert str(list(shape)) in message


def test_extra_tensor(tmp_path: Path) -> None:
    folder = change(neox().save(tmp_path / "m"), put("gpt_neox.layers.0.lora.A", torch.ones(2)))
    assert "gpt_neox.layers.0.lora.A" in fails(folder, "1 tensor that such a model does not have")
    folder = neox().config_says(num_hidden_layers=1).save(tmp_path / "n")
    fails(folder, "that such a model does not have")


def test_an_official_buffer_elsewhere_is_still_an_extra(tmp_path: Path) -> None:
    folder = change(neox().save(tmp_path / "m"), put("gpt_neox.attention.bias", torch.ones(2)))
    fails(folder, "does not have")


def test_integer_weights(tmp_path: Path) -> None:
    folder = change(neox().save(tmp_path / "m"), put(f"{AT}.W_G", torch.ones((64, 64), dtype=torch.int8)))
    assert "int8" in fails(folder, "not stored as floating point")


def test_tied_embeddings_that_differ(tmp_path: Path) -> None:
    folder = change(opt().save(tmp_path / "m"), put("lm_head.weight", torch.ones(256, 64)))
    assert "tie_word_embeddings" in fails(folder, "although config.json ties them")


# Numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", [f"{AT}.query_key_value.weight", f"{AT}.W_G", "gpt_neox.final_layer_norm.bias"]
)
def test_weights_that_are_not_numbers(name: str, value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = neox(layers=1).stored_in(str(dtype).removeprefix("torch.")).save(tmp_path / "m")
    bad = load_tensors(folder)[name]
    bad.view(-1)[-1] = value
    change(folder, put(name, bad))
    assert name in fails(folder, "not numbers")
    with open_checkpoint(folder) as checkpoint:  # found where it is read, not before
        checkpoint.tensor("embed_tokens.weight")


def test_extreme_finite_weights_are_fine(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        folder = neox(layers=1).stored_in(str(dtype).removeprefix("torch.")).save(tmp_path / str(dtype))
        values = torch.tensor([info.max, info.min, info.smallest_normal, -0.0] * 16, dtype=dtype)
        change(folder, put("gpt_neox.final_layer_norm.bias", values))
        read_all(folder)


def test_nan_in_decay_tables(tmp_path: Path) -> None:
    folder = neox().save(tmp_path / "m")
    for name in (f"{AT}.D1", f"{AT}.D2"):
        bad = load_tensors(folder)[name]
        bad[0, 1, 7] = float("nan")
        assert "row 7 of 128" in fails(change(folder, put(name, bad)), "layer 0: the decay tables")


def test_max_positions(tmp_path: Path) -> None:
    trained = neox().with_trained_decay().save(tmp_path / "m")
    fails(trained, "--max-positions does not fit", max_positions=129)
    fails(trained, "--max-positions does not fit", max_positions=0)
    fails(neox().save(tmp_path / "g"), "this checkpoint has none", max_positions=64)


def test_unknown_parameter_names(tmp_path: Path) -> None:
    checkpoint: Checkpoint
    with open_checkpoint(neox().save(tmp_path / "m")) as checkpoint:
        for name in (
            "layers.2.attention.log_decay",
            "layers.0.attention.gain",
            "layers.9.mlp.up.weight",
            "x",
        ):
            with pytest.raises(CheckpointError, match="has no parameter"):
                checkpoint.tensor(name)


def test_auto_map_is_not_followed(tmp_path: Path) -> None:
    folder = neox().save(tmp_path / "m")
    marker = tmp_path / "it ran"
    (folder / "modeling_gpt_neox_dijiang.py").write_text(f"open({str(marker)!r}, 'w')\n")
    read_all(folder)
    assert not marker.exists()
    assert "modeling_gpt_neox_dijiang" not in sys.modules


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_flipped_bytes_never_cause_anything_but_a_clear_error(format: Any, tmp_path: Path) -> None:
    tiny = neox(layers=1, positions=16, vocab=20, hidden=32, heads=2, intermediate=16)
    folder = tiny.in_files(format).save(tmp_path / "m")
    file = folder / ("model.safetensors" if format == "safetensors" else "pytorch_model.bin")
    good = file.read_bytes()
    rng = random.Random(0)
    described = 3000  # bytes at either end that describe the data
    refused = 0
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(described)
            bad[at if format == "safetensors" or rng.random() < 0.5 else -at] = rng.randrange(256)
        file.write_bytes(bad)
        try:
            read_all(folder)
        except CheckpointError:
            refused += 1
    assert refused > 100
