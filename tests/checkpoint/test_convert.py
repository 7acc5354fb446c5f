"""convert: the official layout and initialisation, streamed, whole or not at all."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.fft import dct
from scipy.special import ndtr
from support.makers.checkpoints import RandomCheckpoint, llama, neox, opt, opt_350m
from support.makers.decay_tables import official_tables
from support.makers.weight_files import DTYPES, load_tensors, save_tensors
from support.paths import GOLDENS

from dijiang_engines.errors import CheckpointError, OutputError, UsageError
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.commands.common import Output
from dijiang_export.commands.convert import convert
from dijiang_export.convert import convert_checkpoint, projection

FAMILIES = {
    "gpt_neox": neox(),
    "llama": llama(kv_heads=2, head_dim=32),
    "opt": opt(),
    "opt 350m": opt_350m(embedding=48),
}


def vanilla(tmp_path: Path, made: RandomCheckpoint | None = None) -> Path:
    return (made or neox()).vanilla().with_leftovers().save(tmp_path / "vanilla")


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes_are_the_official_ones(name: str, tmp_path: Path) -> None:
    source = vanilla(tmp_path, FAMILIES[name])
    convert_checkpoint(source, tmp_path / "out")
    official = load_tensors(FAMILIES[name].save(tmp_path / "official"))
    made = load_tensors(tmp_path / "out")
    assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in official.items()}
    for tensor_name, value in load_tensors(source).items():
        if tensor_name in made:
            assert torch.equal(made[tensor_name], value)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.spec.decay == "geometric"
        assert "official" in checkpoint.decay_notes[0]
        checkpoint.load_state_dict()


def test_golden_names_and_shapes(tmp_path: Path) -> None:
    golden = load_tensors(GOLDENS / "neox-geometric")
    added = ("proj_matrix", "W_G", "group_norm.weight", "group_norm.bias", "D1", "D2")
    save_tensors(tmp_path / "v", {n: t for n, t in golden.items() if not n.endswith(added)})
    (tmp_path / "v" / "config.json").write_bytes((GOLDENS / "neox-geometric" / "config.json").read_bytes())
    convert_checkpoint(tmp_path / "v", tmp_path / "out")
    made = load_tensors(tmp_path / "out")
    assert {n: (t.shape, t.dtype) for n, t in made.items()} == {
        n: (t.shape, t.dtype) for n, t in golden.items()
    }
    for name in golden:
        if name.endswith(("D1", "D2", "query_key_value.weight", "embed_out.weight")):
            assert torch.equal(made[name], golden[name])


@pytest.mark.parametrize("sampling", ["sobol", "monte-carlo"])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 256])
def test_projection_is_dct_times_normal_weights(sampling: Any, head_dim: int) -> None:
    p = projection(head_dim, sampling, 0, 0)
    assert (p.dtype, p.shape) == (torch.float32, (head_dim, head_dim))
    c = dct(np.eye(head_dim), axis=0, norm="ortho")
    product = c.T @ p.double().numpy()  # C is orthonormal: diag(w) is left
    w = np.diag(product)
    np.testing.assert_allclose(product, np.diag(w), atol=1e-6)
    u = np.sort(ndtr(w))
    steps = (np.arange(head_dim) + 0.5) / head_dim
    discrepancy = np.abs(u - steps).max() * head_dim
    if sampling == "sobol":
        assert discrepancy < (0.6 if head_dim & (head_dim - 1) == 0 else 3)  # one point in each of d strata
    else:
        assert discrepancy > 0.6
    assert abs(w.mean()) < 4 / math.sqrt(head_dim)
    assert 0.5 < w.std() < 1.5


def test_infinite_weights_become_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dijiang_export.convert._uniform", lambda d, *_: torch.linspace(0, 0.9, d))
    p = projection(16, "sobol", 0, 0)
    assert torch.isfinite(p).all()
    assert (p[:, 0] == 0).all()
    assert (p[:, 1] != 0).any()


def test_initial_values(tmp_path: Path) -> None:
    source = neox(hidden=256, heads=4, layers=2, positions=300).vanilla().save(tmp_path / "v")
    convert_checkpoint(source, tmp_path / "out")
    made = load_tensors(tmp_path / "out")
    at = "gpt_neox.layers.{}.attention"
    d1, d2 = official_tables(4, 300)
    for i in range(2):
        assert torch.equal(made[f"{at.format(i)}.D1"], d1)
        assert torch.equal(made[f"{at.format(i)}.D2"], d2)
        assert torch.equal(made[f"{at.format(i)}.group_norm.weight"], torch.ones(256))
        assert torch.equal(made[f"{at.format(i)}.group_norm.bias"], torch.zeros(256))
        w = made[f"{at.format(i)}.W_G"]
        bound = 2**-2.5 * math.sqrt(6 / 512)
        assert 0.99 * bound < float(w.abs().max()) <= bound
        assert float(w.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    for name in ("proj_matrix", "W_G"):
        assert not torch.equal(made[f"{at.format(0)}.{name}"], made[f"{at.format(1)}.{name}"])


def test_seeds(tmp_path: Path) -> None:
    source = vanilla(tmp_path)
    for name, options in {
        "a": {"seed": 1}, "b": {"seed": 1}, "c": {"seed": 2}, "d": {"seed": 1, "sampling": "monte-carlo"},
    }.items():  # fmt: skip
        convert_checkpoint(source, tmp_path / name, **options)
    a, b, c, d = (load_tensors(tmp_path / name) for name in "abcd")
    key = "gpt_neox.layers.0.attention.proj_matrix"
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert not torch.equal(a[key], c[key])
    assert not torch.equal(a[key], d[key])
    assert b.keys() == c.keys()
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    convert_checkpoint(source, tmp_path / "e")
    assert torch.equal(torch.rand(1), before)  # nobody else's random numbers are used up


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_dtypes(dtype: str, stored: str, tmp_path: Path) -> None:
    source = vanilla(tmp_path, neox(layers=1).stored_in(stored))
    convert_checkpoint(source, tmp_path / "as-is")
    convert_checkpoint(source, tmp_path / "cast", dtype=dtype)
    original = load_tensors(source)
    for folder, expected in (("as-is", stored), ("cast", dtype)):
        for name, value in load_tensors(tmp_path / folder).items():
            table = name.endswith((".D1", ".D2"))
            assert value.dtype == (torch.float32 if table else DTYPES[expected])
            if name in original:
                assert torch.equal(value, original[name].to(DTYPES[expected]))
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["torch_dtype"] == expected
        with open_checkpoint(tmp_path / folder) as checkpoint:
            assert checkpoint.storage_dtype == expected


def test_overflow_in_the_narrower_type(tmp_path: Path) -> None:
    source = vanilla(tmp_path)
    stored = load_tensors(source)
    stored["embed_out.weight"][5, 5] = 1e6
    save_tensors(source, stored)
    with pytest.raises(CheckpointError, match=r"embed_out\.weight holds weights that are not numbers"):
        convert_checkpoint(source, tmp_path / "out", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["vanilla"]
    convert_checkpoint(source, tmp_path / "out", dtype="bfloat16")


def test_long_context_overflows_float32_tables_and_still_loads(tmp_path: Path) -> None:
    convert_checkpoint(vanilla(tmp_path, llama(positions=4096)), tmp_path / "out")
    assert torch.isinf(load_tensors(tmp_path / "out")["model.layers.0.self_attn.D2"]).any()
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.spec.decay == "geometric"


def test_files(tmp_path: Path) -> None:
    source = vanilla(tmp_path, neox(vocab=300).config_says(my_key=[1, "ü"]).with_tokenizer())
    (source / "generation_config.json").write_text("{}")
    (source / "modeling_gpt_neox_dijiang.py").write_text("raise SystemExit")
    report = convert_checkpoint(source, tmp_path / "out", seed=3)
    assert sorted(report.files) == sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "out"))
    assert after.pop("dijiang") == {"version": 1, "sampling": "sobol", "seed": 3}
    assert before.pop("auto_map")
    assert after == before
    assert report.bytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    made = load_tensors(tmp_path / "out")
    assert report.parameters == sum(t.numel() for t in made.values())
    kept = {n: t for n, t in load_tensors(source).items() if n in made}
    assert report.added_parameters == report.parameters - sum(t.numel() for t in kept.values())
    assert json.loads(json.dumps(asdict(report)))["seed"] == 3


@pytest.mark.parametrize("format", ["bin", "sharded-bin", "sharded-safetensors"])
def test_sharded_sources_and_results(format: Any, tmp_path: Path) -> None:
    source = vanilla(tmp_path, neox().in_files(format))
    convert_checkpoint(source, tmp_path / "whole")
    limit = 40_000
    report = convert_checkpoint(source, tmp_path / "shards", max_shard_bytes=limit)
    weights = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(weights) > 3
    assert weights[0].name == f"model-00001-of-{len(weights):05d}.safetensors"
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    whole, shards = load_tensors(tmp_path / "whole"), load_tensors(tmp_path / "shards")
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert all(torch.equal(whole[name], shards[name]) for name in whole)
    assert "model.safetensors.index.json" in report.files
    largest_tensor = max(t.nbytes for t in whole.values())
    assert all(file.stat().st_size < max(limit, largest_tensor) + 8000 for file in weights)


def test_transformers_reads_the_vanilla_part(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = llama(kv_heads=2).vanilla().save(tmp_path / "v")
    convert_checkpoint(source, tmp_path / "out", max_shard_bytes=100_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    again = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(tmp_path / "out"))
    missing, unexpected = again.load_state_dict(load_tensors(tmp_path / "out"), strict=False)
    assert missing == []
    assert {name.split("self_attn.")[1] for name in unexpected} == {
        "proj_matrix", "W_G", "group_norm.weight", "group_norm.bias", "D1", "D2",
    }  # fmt: skip
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_refused(tmp_path: Path) -> None:
    source = vanilla(tmp_path)
    with pytest.raises(CheckpointError, match="is a DiJiang checkpoint already"):
        convert_checkpoint(GOLDENS / "neox-geometric", tmp_path / "out")
    with pytest.raises(UsageError, match="unknown sampling"):
        convert_checkpoint(source, tmp_path / "out", sampling="latin")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown dtype"):
        convert_checkpoint(source, tmp_path / "out", dtype="int8")
    with pytest.raises(UsageError, match="negative"):
        convert_checkpoint(source, tmp_path / "out", seed=-1)
    for output in (source, source.parent, source / ".." / source.name):
        with pytest.raises(UsageError, match="would replace the checkpoint"):
            convert_checkpoint(source, output, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["vanilla"]


def test_existing_output(tmp_path: Path) -> None:
    source = vanilla(tmp_path)
    convert_checkpoint(source, tmp_path / "out", seed=1)
    with pytest.raises(OutputError, match="already exists"):
        convert_checkpoint(source, tmp_path / "out", seed=2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dijiang"]["seed"] == 1
    convert_checkpoint(source, tmp_path / "out", seed=2, force=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dijiang"]["seed"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "vanilla"]


def test_failures_leave_nothing(tmp_path: Path) -> None:
    source = vanilla(tmp_path)
    stored = load_tensors(source)
    stored["gpt_neox.final_layer_norm.bias"][3] = float("nan")
    save_tensors(source, stored)
    with pytest.raises(CheckpointError, match="not numbers"):
        convert_checkpoint(source, tmp_path / "deep" / "out")
    del stored["gpt_neox.final_layer_norm.bias"]
    save_tensors(source, stored)
    with pytest.raises(CheckpointError, match="lacks 1 tensor"):
        convert_checkpoint(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["vanilla"]


def test_full_disk(tmp_path: Path) -> None:
    source = vanilla(tmp_path)
    code = """
import resource, sys
from dijiang_engines.errors import OutputError
from dijiang_export.convert import convert_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    convert_checkpoint(sys.argv[1], sys.argv[2])
except OutputError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot write the output" in out.stdout
    assert "File too large" in out.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["vanilla"]


def test_memory_is_bounded(tmp_path: Path) -> None:
    large = neox(hidden=1024, heads=16, layers=1, vocab=24000, intermediate=1024, positions=64)
    large.vanilla().stored_in("float16").save(tmp_path / "v")
    size = (tmp_path / "v" / "model.safetensors").stat().st_size
    assert size > 100 << 20
    code = """
import resource, sys
import scipy.fft, torch
from dijiang_export.convert import convert_checkpoint
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
convert_checkpoint(sys.argv[1], sys.argv[2])
print(peak() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "v"), str(tmp_path / "out")]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(out.stdout) < 64 << 20


# The command


def test_command(tmp_path: Path) -> None:
    source = vanilla(tmp_path)
    out = tmp_path / "out"
    done = CliRunner().invoke(convert, [str(source), str(out), "--dtype", "float16"], obj=Output(quiet=True))
    assert done.exit_code == 0
    assert str(out) in done.stdout
    assert "float16" in done.stdout
    again = CliRunner().invoke(convert, [str(source), str(out)], obj=Output(quiet=True))
    assert isinstance(again.exception, OutputError)
    forced = CliRunner().invoke(
        convert, [str(source), str(out), "--force", "--json", "--sampling", "monte-carlo"], obj=Output()
    )
    assert forced.exit_code == 0
    report = json.loads(forced.stdout)
    assert (report["sampling"], report["seed"], report["dtype"]) == ("monte-carlo", 0, "float32")


def test_command_options(tmp_path: Path) -> None:
    source = vanilla(tmp_path)
    out = tmp_path / "out"
    done = CliRunner().invoke(convert, [str(source), str(out), "--max-shard-size", "0.0001"], obj=Output())
    assert done.exit_code == 0
    assert len(list(out.glob("*.safetensors"))) > 1
    for bad in (["--dtype", "int8"], ["--seed", "-1"], ["--max-shard-size", "0"], ["--sampling", "x"]):
        assert CliRunner().invoke(convert, [str(source), "other", *bad], obj=Output()).exit_code == 2
    assert "Example: dijiang-export convert" in CliRunner().invoke(convert, ["--help"]).stdout
