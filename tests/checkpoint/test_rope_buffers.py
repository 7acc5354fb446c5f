"""Buffers that old versions of transformers leave among the weights: passed over, and RoPE's checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.makers.checkpoints import neox, of_family, opt
from support.makers.weight_files import load_tensors, save_tensors
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.checkpoint import open_checkpoint

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PLACES = {
    "gpt_neox": ("gpt_neox.layers.1.attention.rotary_emb.inv_freq", "gpt_neox.rotary_emb.inv_freq"),
    "llama": ("model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
}


def own_frequencies(folder: Path) -> torch.Tensor:
    """What transformers' model of that config.json keeps in its buffer."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "llama":
        return LlamaRotaryEmbedding(LlamaConfig(**config)).inv_freq
    return GPTNeoXRotaryEmbedding(GPTNeoXConfig(**config)).inv_freq


def with_buffers(folder: Path, **buffers: torch.Tensor) -> Path:
    save_tensors(folder, load_tensors(folder) | buffers)
    return folder


def opens(folder: Path) -> bool:
    with open_checkpoint(folder) as checkpoint:
        assert not [name for name in checkpoint.names() if "rotary" in name or "inv_freq" in name]
    return True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3])
@pytest.mark.parametrize("base", [10000.0, 5e5])
def test_frequencies_that_fit(family: Any, scaling: Any, base: float, dtype: Any, tmp_path: Path) -> None:
    folder = of_family(family, layers=2).with_rope(base=base, scaling=scaling).save(tmp_path / "m")
    stored = own_frequencies(folder).to(dtype)
    assert opens(with_buffers(folder, **{name: stored.clone() for name in PLACES[family]}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("saved", "config"),
    [
        ({"base": 500.0}, {}),
        ({}, {"base": 10600.0}),
        ({}, {"scaling": LLAMA3}),
        ({"scaling": LINEAR}, {}),
        ({"scaling": LINEAR}, {"scaling": LINEAR | {"factor": 4.0}}),
    ],
)
def test_frequencies_of_another_config(
    family: Any, place: int, dtype: Any, saved: Any, config: Any, tmp_path: Path
) -> None:
    model = of_family(family, hidden=256)
    stored = own_frequencies(model.with_rope(**saved).save(tmp_path / "saved")).to(dtype)
    folder = model.with_rope(**config).save(tmp_path / "m")
    name = PLACES[family][place]
    with pytest.raises(CheckpointError, match="trained with other RoPE frequencies") as caught:
        opens(with_buffers(folder, **{name: stored}))
    message = str(caught.value)
    assert name in message
    assert f"{config.get('base', 1e4):g}" in message


def test_old_linear_scaling_divides_positions(tmp_path: Path) -> None:
    """So its buffer, and the official code's (@3459531:356), are those of a model without scaling."""
    stored = own_frequencies(neox().save(tmp_path / "plain"))
    for family in ("gpt_neox", "llama"):
        folder = of_family(family).with_rope(scaling=LINEAR).save(tmp_path / family)
        if family == "llama":
            stored = own_frequencies(of_family(family).save(tmp_path / "plain llama"))
        assert opens(with_buffers(folder, **{PLACES[family][0]: stored}))


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (), (0,)])
def test_another_number_of_frequencies(shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = with_buffers(neox().save(tmp_path / "m"), **{PLACES["gpt_neox"][1]: torch.ones(shape)})
    with pytest.raises(CheckpointError, match="another number of dimensions"):
        opens(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_frequencies_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    folder = neox().save(tmp_path / "m")
    stored = own_frequencies(folder).clone()
    stored[1] = value
    with pytest.raises(CheckpointError, match="trained with other RoPE frequencies"):
        opens(with_buffers(folder, **{PLACES["gpt_neox"][0]: stored}))


def test_no_rotation_has_no_frequencies(tmp_path: Path) -> None:
    folder = neox().with_config(rotary_pct=0.0).save(tmp_path / "m")
    assert opens(with_buffers(folder, **{PLACES["gpt_neox"][1]: torch.empty(0)}))
    with pytest.raises(CheckpointError, match="another number of dimensions"):
        opens(with_buffers(folder, **{PLACES["gpt_neox"][1]: torch.ones(2)}))


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt_neox", ["layers.0.attention.bias", "layers.1.attention.masked_bias", "rotary_emb.cos_cached",
                      "layers.0.attention.rotary_emb.sin_cached", "rotary_emb.original_inv_freq"]),
        ("llama", ["layers.0.self_attn.rotary_emb.cos_cached", "rotary_emb.sin_cached",
                   "rotary_emb.original_inv_freq"]),
        ("opt", ["decoder.version"]),
    ],
)  # fmt: skip
def test_other_buffers_are_passed_over(family: Any, names: list[str], tmp_path: Path) -> None:
    base = "gpt_neox" if family == "gpt_neox" else "model"
    folder = of_family(family).save(tmp_path / "m")
    assert opens(with_buffers(folder, **{f"{base}.{name}": torch.ones(3) for name in names}))


def test_a_buffer_of_opt_that_cannot_be(tmp_path: Path) -> None:
    folder = opt().save(tmp_path / "m")
    with pytest.raises(CheckpointError):
        opens(with_buffers(folder, **{"model.decoder.rotary_emb.inv_freq": torch.ones(8)}))
