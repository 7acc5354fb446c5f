"""Canonical parameters back into the layout that a checkpoint has: the opposite of reading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.makers.checkpoints import RandomCheckpoint, llama, neox, opt, opt_350m

from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.checkpoint import open_checkpoint

FOLDERS: dict[str, RandomCheckpoint] = {
    "gpt_neox": neox(),
    "llama-gqa": llama(kv_heads=2),
    "llama-tied": llama().with_config(tie_word_embeddings=True),
    "opt": opt(),
    "opt-350m": opt_350m(embedding=32),
    "half": llama().stored_in("bfloat16", tables="float32"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_was_read_is_what_is_stored(name: str, tmp_path: Path) -> None:
    folder = FOLDERS[name].save(tmp_path / "c")
    with open_checkpoint(folder) as checkpoint:
        read = {parameter: checkpoint.tensor(parameter) for parameter in checkpoint.names()}
        given = checkpoint.stored_tensors(read)
    wanted = load_file(folder / "model.safetensors")
    assert given.keys() == wanted.keys()
    for key, value in wanted.items():
        if not key.endswith((".D1", ".D2")):
            assert given[key].dtype == value.dtype and torch.equal(given[key], value), key
            continue
        finite = torch.isfinite(value)
        torch.testing.assert_close(given[key][finite], value[finite], rtol=2e-5, atol=0)


def test_what_cannot_be_stored(tmp_path: Path) -> None:
    with open_checkpoint(llama().save(tmp_path / "c")) as checkpoint:
        parameters = checkpoint.load_state_dict()
        for change in (None, torch.zeros(3)):
            name = "layers.1.mlp.up.weight"
            spoiled = {k: v for k, v in parameters.items() if k != name}
            if change is not None:
                spoiled[name] = change
            with pytest.raises(CheckpointError, match=name):
                checkpoint.stored_tensors(spoiled)
    folder = neox().with_trained_decay().save(tmp_path / "t")
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(CheckpointError, match="trained decay tables"),
    ):
        checkpoint.stored_tensors(checkpoint.load_state_dict())
