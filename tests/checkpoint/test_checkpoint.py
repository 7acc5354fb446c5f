"""The reader delivers what the official formula uses: every family, file format and type."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.makers.checkpoints import llama, neox, of_family, opt, opt_350m
from support.makers.decay_tables import geometric_tables
from support.makers.weight_files import DTYPES, load_tensors
from support.oracles.official import inverse_frequencies, official_forward, rope
from support.paths import GOLDENS

from dijiang_engines.spec import ModelSpec
from dijiang_export.checkpoint.checkpoint import open_checkpoint

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 97, 9, 3, 2, 38, 46, 26, 43]])


def canonical_forward(spec: ModelSpec, w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Float64 logits from canonical parameters, by the spec: token by token, decay by its recurrence.

    The other side of `official_forward`: it would agree only if every parameter were in its place.
    """
    heads, kv, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
    inv = inverse_frequencies(spec.rotary_dim, spec.rope_theta, spec.rope_scaling)

    def norm(at: str, x: torch.Tensor) -> torch.Tensor:
        if spec.norm == "rms_norm":
            return F.rms_norm(x, x.shape[-1:], w[f"{at}.weight"], spec.norm_epsilon)
        return F.layer_norm(x, x.shape[-1:], w[f"{at}.weight"], w[f"{at}.bias"], spec.norm_epsilon)

    def linear(at: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w[f"{at}.weight"], w.get(f"{at}.bias"))

    def attend(at: str, x: torch.Tensor) -> torch.Tensor:
        q, k, v = linear(f"{at}.qkv", x).split((heads * d, kv * d, kv * d), dim=-1)
        q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(heads // kv, dim=1) for t in (rope(k, inv, True), v))
        q, k = (torch.softmax(t @ w[f"{at}.proj"], dim=-1) for t in (rope(q, inv, True), k))
        state = torch.zeros(x.shape[0], heads, d, d, dtype=x.dtype)
        out = torch.empty_like(v)
        for n in range(x.shape[1]):
            if spec.decay == "geometric":
                log_decay, gain, scale = w[f"{at}.log_decay"], torch.ones(heads), torch.ones(heads)
            else:
                log_decay, gain, scale = (w[f"{at}.{p}"][n] for p in ("log_decay", "gain", "read_scale"))
            outer = k[:, :, n, :, None] * v[:, :, n, None, :]
            state = log_decay.exp()[:, None, None] * state + gain[:, None, None] * outer
            out[:, :, n] = scale[:, None] * (q[:, :, n, None, :] @ state)[:, :, 0]
        merged = out.transpose(1, 2).reshape(-1, heads * d)
        merged = F.group_norm(merged, d, w[f"{at}.norm_weight"], w[f"{at}.norm_bias"], 1e-5)
        gate = F.silu(x @ w[f"{at}.gate.weight"].T)
        return linear(f"{at}.dense", gate * merged.view(gate.shape))

    def mlp(at: str, x: torch.Tensor) -> torch.Tensor:
        gelu = {"gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}
        act = (gelu | {"relu": F.relu, "silu": F.silu})[spec.activation]
        up = linear(f"{at}.up", x)
        return linear(f"{at}.down", act(linear(f"{at}.gate", x)) * up if spec.gated_mlp else act(up))

    x = F.embedding(ids, w["embed_tokens.weight"])
    if "project_in.weight" in w:
        x = x @ w["project_in.weight"].T
    if spec.position_embeddings:
        x = x + w["embed_positions.weight"][spec.position_offset :][: ids.shape[1]]
    for i in range(spec.num_layers):
        at = f"layers.{i}"
        if spec.post_norm:
            x = norm(f"{at}.attention_norm", x + attend(f"{at}.attention", x))
            x = norm(f"{at}.mlp_norm", x + mlp(f"{at}.mlp", x))
            continue
        y = attend(f"{at}.attention", norm(f"{at}.attention_norm", x))
        inner = x if spec.parallel_residual else x + y
        x = x + y + mlp(f"{at}.mlp", norm(f"{at}.mlp_norm", inner))
    if spec.final_norm:
        x = norm("final_norm", x)
    if "project_out.weight" in w:
        x = x @ w["project_out.weight"].T
    return x @ w.get("lm_head.weight", w["embed_tokens.weight"]).T


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.std())


def check_against_oracle(folder: Path, bound: float = 1e-11, **options: Any) -> ModelSpec:
    with open_checkpoint(folder, keep_tables=True, **options) as checkpoint:
        w = checkpoint.load_state_dict(torch.float64)
        assert list(w) == checkpoint.names()
        for name, value in w.items():
            assert tuple(value.shape) == checkpoint.shape(name), name
        ours = canonical_forward(checkpoint.spec, w, IDS)
        theirs = official_forward(load_tensors(folder), checkpoint.config, IDS)
        assert relative(ours, theirs) < bound
        return checkpoint.spec


@pytest.mark.parametrize("golden", ["neox-geometric", "neox-trained-tables"])
def test_goldens(golden: str) -> None:
    recorded = np.load(GOLDENS / golden / "reference.npz")
    ids, logits = torch.from_numpy(recorded["input_ids"]), torch.from_numpy(recorded["logits"])
    with open_checkpoint(GOLDENS / golden, keep_tables=True) as checkpoint:
        ours = canonical_forward(checkpoint.spec, checkpoint.load_state_dict(torch.float64), ids)
    assert relative(ours, logits) < 1e-9
    with open_checkpoint(GOLDENS / golden) as checkpoint:
        assert checkpoint.spec.decay == ("geometric" if golden == "neox-geometric" else "tables")
        ours = canonical_forward(checkpoint.spec, checkpoint.load_state_dict(torch.float64), ids)
    assert relative(ours, logits) < (1e-6 if golden == "neox-geometric" else 1e-9)


def test_golden_in_half_precision() -> None:
    recorded = np.load(GOLDENS / "neox-fp16-d80" / "reference.npz")
    ids, logits = torch.from_numpy(recorded["input_ids"]), torch.from_numpy(recorded["logits"])
    with open_checkpoint(GOLDENS / "neox-fp16-d80") as checkpoint:
        assert checkpoint.storage_dtype == "float16"
        assert checkpoint.spec.decay == "geometric"
        assert checkpoint.spec.max_positions is None
        w = checkpoint.load_state_dict(torch.float64)
        assert relative(canonical_forward(checkpoint.spec, w, ids), logits) < 1e-9
        tables = geometric_tables(w["layers.0.attention.log_decay"].numpy(), 512)
        refitted = {0: tuple(torch.from_numpy(t) for t in tables)}
        stored = load_tensors(GOLDENS / "neox-fp16-d80")
        assert relative(official_forward(stored, checkpoint.config, ids, tables=refitted), logits) < 1e-9


@pytest.mark.parametrize("golden", ["neox-geometric", "neox-trained-tables"])
def test_the_oracle_itself_reproduces_the_goldens(golden: str) -> None:
    recorded = np.load(GOLDENS / golden / "reference.npz")
    config = json.loads((GOLDENS / golden / "config.json").read_text())
    logits = official_forward(load_tensors(GOLDENS / golden), config, recorded["input_ids"])
    assert relative(logits, torch.from_numpy(recorded["logits"])) < 1e-12


CONFIGURATIONS = {
    "gpt_neox": neox(),
    "gpt_neox sequential, trained": neox()
    .with_config(use_parallel_residual=False, rotary_pct=1.0)
    .with_trained_decay(),
    "gpt_neox straddling groups": neox(hidden=96, heads=6).with_config(rotary_pct=0.5).with_trained_decay(),
    "gpt_neox tied, tanh": neox().with_config(tie_word_embeddings=True, hidden_act="gelu_new"),
    "gpt_neox without biases": neox().with_config(attention_bias=False),
    "gpt_neox linear rope": neox().with_config(rope_scaling={"type": "linear", "factor": 2.0}),
    "gpt_neox half": neox().stored_in("float16", tables="float32"),
    "llama": llama(),
    "llama grouped, trained": llama(heads=6, hidden=96, kv_heads=2).with_trained_decay(),
    "llama one kv head, tied": llama(kv_heads=1).with_config(tie_word_embeddings=True),
    "llama biases": llama(kv_heads=2).with_config(attention_bias=True, mlp_bias=True),
    "llama wide heads": llama(hidden=80, heads=4, kv_heads=2, head_dim=32),
    "llama bfloat16": llama().stored_in("bfloat16", tables="float32"),
    "llama3 rope": llama().with_config(
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "opt": opt(),
    "opt trained": opt().with_trained_decay(),
    "opt 350m": opt_350m(embedding=48),
    "opt untied, no biases": opt().with_config(tie_word_embeddings=False, enable_bias=False),
    "opt with copies": opt().with_leftovers(),
    "gpt_neox with buffers": neox().with_leftovers(),
    "llama with buffers": llama().with_leftovers(),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_families(name: str, tmp_path: Path) -> None:
    spec = check_against_oracle(CONFIGURATIONS[name].save(tmp_path / "model"))
    assert spec.family == CONFIGURATIONS[name].family
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize("format", ["safetensors", "bin", "sharded-safetensors", "sharded-bin"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_formats_and_types(format: str, dtype: str, tmp_path: Path) -> None:
    folder = neox(layers=1).stored_in(dtype, tables="float32").in_files(format).save(tmp_path / "m")
    check_against_oracle(folder)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.storage_dtype == dtype
        assert checkpoint.tensor("layers.0.attention.qkv.weight").dtype == getattr(torch, dtype)
        assert checkpoint.tensor("layers.0.attention.log_decay").dtype == torch.float32
        assert checkpoint.tensor("embed_tokens.weight").dtype == DTYPES[dtype]
        assert len(checkpoint.files) == (3 if format.startswith("sharded") else 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_geometric_tables_in_half_precision(dtype: str, tmp_path: Path) -> None:
    folder = neox(positions=600).stored_in(dtype).save(tmp_path / "m")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.spec.decay == "geometric"
        half = checkpoint.tensor("layers.0.attention.log_decay")
    with open_checkpoint(neox(positions=600).save(tmp_path / "f")) as checkpoint:
        torch.testing.assert_close(half, checkpoint.tensor("layers.0.attention.log_decay"), rtol=1e-5, atol=0)


def test_mixed_types_in_one_parameter(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = llama(layers=1).stored_in("float16", tables="float32").save(tmp_path / "m")
    stored = load_file(str(folder / "model.safetensors"))
    name = "model.layers.0.self_attn.k_proj.weight"
    stored[name] = stored[name].float() / 3
    stored["model.norm.weight"] = stored["model.norm.weight"].double()
    save_file(stored, str(folder / "model.safetensors"))
    with open_checkpoint(folder) as checkpoint:
        qkv = checkpoint.tensor("layers.0.attention.qkv.weight")
        assert qkv.dtype == torch.float32
        assert torch.equal(qkv[64:128], stored[name])
        assert checkpoint.tensor("final_norm.weight").dtype == torch.float32
        assert torch.equal(checkpoint.tensor("final_norm.weight"), stored["model.norm.weight"].float())
    check_against_oracle(folder)


def test_blocks_make_the_whole(tmp_path: Path) -> None:
    folder = llama(hidden=96, heads=6, kv_heads=3).with_trained_decay().save(tmp_path / "m")
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.names():
            whole = checkpoint.tensor(name)
            for max_bytes in (1, 1000, 1 << 20):
                blocks = list(checkpoint.row_blocks(name, max_bytes))
                assert [start for start, _ in blocks] == [
                    sum(len(b) for _, b in blocks[:i]) for i in range(len(blocks))
                ]
                assert torch.equal(torch.cat([b for _, b in blocks]), whole)
                row_bytes = whole[0].numel() * whole.element_size()
                assert all(len(b) * row_bytes <= max(max_bytes, row_bytes) for _, b in blocks)
        with pytest.raises(IndexError):
            checkpoint.rows("embed_tokens.weight", 0, 257)


def test_gate_strips_equal_the_transpose(tmp_path: Path) -> None:
    folder = neox(hidden=256, heads=4, layers=1).save(tmp_path / "m")
    gate = load_tensors(folder)["gpt_neox.layers.0.attention.W_G"].T
    with open_checkpoint(folder) as checkpoint:
        for start, stop in ((0, 256), (0, 1), (100, 163), (192, 256), (7, 7)):
            assert torch.equal(
                checkpoint.rows("layers.0.attention.gate.weight", start, stop), gate[start:stop]
            )


def test_names_of_a_tied_model(tmp_path: Path) -> None:
    with open_checkpoint(neox().with_config(tie_word_embeddings=True).save(tmp_path / "m")) as checkpoint:
        assert "lm_head.weight" not in checkpoint.names()
        assert "lm_head.weight" not in checkpoint.load_state_dict()
        assert torch.equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor("embed_tokens.weight"))
        assert checkpoint.shape("lm_head.weight") == (256, 64)


def test_opt_names_without_model_prefix(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = opt(layers=1).save(tmp_path / "m")
    stored = load_file(str(folder / "model.safetensors"))
    save_file({k.removeprefix("model."): v for k, v in stored.items()}, str(folder / "model.safetensors"))
    with open_checkpoint(folder) as checkpoint:
        assert torch.equal(
            checkpoint.tensor("embed_positions.weight"), stored["model.decoder.embed_positions.weight"]
        )


# Decay over whole models


def test_trained_tables_in_a_checkpoint(tmp_path: Path) -> None:
    folder = neox(positions=64).with_trained_decay().save(tmp_path / "m")
    with open_checkpoint(folder) as checkpoint:
        spec = checkpoint.spec
        assert (spec.decay, spec.decay_rows, spec.decay_extended, spec.max_positions) == (
            "tables", 64, False, 64,
        )  # fmt: skip
        for part in ("log_decay", "gain", "read_scale"):
            assert checkpoint.shape(f"layers.1.attention.{part}") == (64, 4)
        assert checkpoint.decay_notes == ["layers 0 to 1: trained tables, 64 rows"]
        gain = checkpoint.tensor("layers.1.attention.gain")
    with open_checkpoint(folder, max_positions=40) as checkpoint:
        assert (checkpoint.spec.decay_rows, checkpoint.spec.max_positions) == (40, 40)
        assert torch.equal(checkpoint.tensor("layers.1.attention.gain"), gain[:40])
    with open_checkpoint(folder, max_positions=40, extend_decay=True) as checkpoint:
        assert (checkpoint.spec.decay_rows, checkpoint.spec.max_positions) == (41, None)
        assert checkpoint.spec.decay_extended
        assert torch.equal(checkpoint.tensor("layers.1.attention.gain")[40], gain[39])
    check_against_oracle(folder, extend_decay=True)


def test_one_trained_layer_makes_all_layers_tables(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = neox().save(tmp_path / "m")
    stored = load_file(str(folder / "model.safetensors"))
    stored["gpt_neox.layers.1.attention.D1"][0, 2, 5] *= -1.5
    save_file(stored, str(folder / "model.safetensors"))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.spec.decay == "tables"
        assert "geometric" in checkpoint.decay_notes[0]
        assert "trained" in checkpoint.decay_notes[1]
        assert torch.equal(checkpoint.tensor("layers.0.attention.gain"), torch.ones(128, 4))
        w = checkpoint.load_state_dict(torch.float64)
        ours = canonical_forward(checkpoint.spec, w, IDS)
        assert relative(ours, official_forward(stored, checkpoint.config, IDS)) < 1e-6


# Config spellings


def spec_of(folder: Path) -> ModelSpec:
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.spec


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("gpt_neox", {"rotary_pct": None, "rotary_emb_base": None, "rope_scaling": None, "rope_parameters": {
            "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 500}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 500, "partial_rotary_factor": 0.5,
            "rope_theta": 500.0}),  # transformers 4.45 to 4.57 write all four
    ],
)  # fmt: skip
def test_rope_spellings(family: Any, overrides: dict[str, Any], tmp_path: Path) -> None:
    spec = spec_of(of_family(family).config_says(**overrides).save(tmp_path / "m"))
    assert (spec.rotary_dim, spec.rope_theta, spec.rope_scaling) == (8, 500.0, None)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4}}, {"rope_type": "linear", "factor": 4}),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
         {"rope_type": "linear", "factor": 4.0}),
        ({"rope_scaling": {"type": "default"}}, None),
        ({"rope_scaling": {}}, None),
    ],
)  # fmt: skip
def test_rope_scaling_spellings(overrides: Any, expected: Any, tmp_path: Path) -> None:
    for family in ("gpt_neox", "llama"):
        folder = of_family(family).config_says(**overrides).save(tmp_path / family)
        assert spec_of(folder).rope_scaling == expected


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [("gelu", "gelu"), ("gelu_fast", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("swish", "silu")],
)
def test_activation_spellings(spelling: str, expected: str, tmp_path: Path) -> None:
    assert spec_of(neox().with_config(hidden_act=spelling).save(tmp_path / "m")).activation == expected


def test_special_tokens_and_tokenizer_files(tmp_path: Path) -> None:
    folder = llama(vocab=300).with_tokenizer().save(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 299], "bos_token_id": 7}))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.spec.eos_token_ids == (5, 299)
        assert checkpoint.spec.bos_token_id == 7
        assert [p.name for p in checkpoint.tokenizer_files] == [
            "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
        ]  # fmt: skip
    spec = spec_of(neox().config_says(eos_token_id=None).save(tmp_path / "n"))
    assert (spec.bos_token_id, spec.eos_token_ids) == (0, ())


def test_huggingface_cache_links(tmp_path: Path) -> None:
    home = tmp_path / "models--org--name"
    snapshot, blobs = home / "snapshots" / "0123", home / "blobs"
    neox().in_files("sharded-safetensors").save(snapshot)
    blobs.mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(Path("../../blobs") / str(i))
    assert spec_of(snapshot).num_layers == 2


def test_reading_keeps_no_file_pages_and_needs_little_memory(tmp_path: Path) -> None:
    large = neox(layers=1, hidden=1024, heads=16, vocab=24000, intermediate=1024)
    folder = large.stored_in("float16", tables="float32").save(tmp_path / "m")
    size = (folder / "model.safetensors").stat().st_size
    assert size > 100 << 20
    code = """
import resource, sys
import torch
from dijiang_export.checkpoint.checkpoint import open_checkpoint
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
with open_checkpoint(sys.argv[1]) as checkpoint:
    for name in checkpoint.names():
        for _ in checkpoint.row_blocks(name, 4 << 20):
            pass
print(peak() - before)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) < 40 << 20
