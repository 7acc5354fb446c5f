"""Checkpoints of `.bin` files that are cut, foreign or meant to run something; and odd ones that are read."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bad_checkpoints import AT, fails
from support.makers.checkpoints import neox
from support.makers.weight_files import load_tensors

from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.bin_file import read_bin_table
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.checkpoint.stored import WeightFile


class Runs:
    """Pickles as a call that would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.system, (f"touch '{self.marker}'",))


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle", "zip among tensors"])
def test_pickles_are_never_run(container: str, tmp_path: Path) -> None:
    folder = neox().in_files("bin").save(tmp_path / "m")
    marker = tmp_path / "it ran"
    file = folder / "pytorch_model.bin"
    if container == "pickle":
        file.write_bytes(pickle.dumps({"a": Runs(marker)}))
    elif container == "zip among tensors":
        stored = load_tensors(folder)
        torch.save(stored | {"gpt_neox.embed_in.weight": Runs(marker)}, file)
    else:
        torch.save(Runs(marker), file, _use_new_zipfile_serialization=container == "zip")
    message = fails(folder, "other than weights, which was not run")
    assert not marker.exists()
    assert "system" in message or container == "pickle"
    assert "weights_only" not in message


def test_truncated_bin(tmp_path: Path) -> None:
    file = neox().in_files("bin").save(tmp_path / "m") / "pytorch_model.bin"
    whole = file.read_bytes()
    for keep in (0, 3, 100, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:keep])
        fails(file.parent, "corrupt or truncated|other than weights")
    file.write_bytes(b"PK\x03\x04" + bytes(1000))
    fails(file.parent, "corrupt or truncated")


def test_html_in_place_of_bin(tmp_path: Path) -> None:
    file = neox().in_files("bin").save(tmp_path / "m") / "pytorch_model.bin"
    file.write_text("<html>not found</html>")
    fails(file.parent, "corrupt or truncated|other than weights")


def test_bin_with_other_things(tmp_path: Path) -> None:
    file = neox().in_files("bin").save(tmp_path / "m") / "pytorch_model.bin"
    stored = load_tensors(file.parent)
    torch.save([1, 2], file)
    fails(file.parent, "does not hold named tensors")
    torch.save(stored | {"epoch": 3}, file)
    assert "'epoch'" in fails(file.parent, "does not hold just named tensors")
    torch.save(stored | {"gpt_neox.embed_in.weight": torch.eye(4).to_sparse()}, file)
    fails(file.parent, "sparse|other than weights")


def repack(file: Path, edit: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file) as archive:
        content = {name: edit(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def test_compressed_and_foreign_archives(tmp_path: Path) -> None:
    file = neox().in_files("bin").save(tmp_path / "m") / "pytorch_model.bin"
    good = file.read_bytes()
    repack(file, lambda name, data: data, zipfile.ZIP_DEFLATED)
    fails(file.parent, "is compressed")
    file.write_bytes(good)
    repack(file, lambda name, data: b"big" if name.endswith("byteorder") else data)
    fails(file.parent, "not little-endian")
    file.write_bytes(good)
    repack(file, lambda name, data: data[:-4] if name.endswith("data/0") else data)
    fails(file.parent, "corrupt or truncated")


def test_storage_smaller_than_its_tensor(tmp_path: Path) -> None:
    """A pickle may claim any shape for a storage; reading beyond the file must be refused."""
    file = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(10)}, file)
    data = file.read_bytes()
    # numel 10 in the storage's persistent id and 10 in the shape: both are one-byte integers, K\n
    assert data.count(b"K\n") == 2
    file.write_bytes(data.replace(b"K\n", b"K\xff"))
    opened = WeightFile(file)
    with pytest.raises(CheckpointError, match="corrupt or truncated") as caught:
        read_bin_table(opened)
    opened.close()
    assert "a would end at byte" in str(caught.value)


def test_legacy_bin_is_read(tmp_path: Path) -> None:
    folder = neox().in_files("bin").save(tmp_path / "m")
    stored = load_tensors(folder)
    file = folder / "pytorch_model.bin"
    torch.save(stored, file, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(file)
    with open_checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.tensor("embed_tokens.weight"), stored["gpt_neox.embed_in.weight"])
        gate = checkpoint.tensor("layers.0.attention.gate.weight")
        assert torch.equal(gate, stored["gpt_neox.layers.0.attention.W_G"].T)
    whole = file.read_bytes()
    for keep in (20, 200, 5000, len(whole) - 1):
        file.write_bytes(whole[:keep])
        fails(folder, "truncated")


def test_bin_with_views_and_parameters(tmp_path: Path) -> None:
    folder = neox(layers=1).in_files("bin").save(tmp_path / "m")
    plain = load_tensors(folder)
    odd = dict(plain)
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    odd[name] = plain[name].T.contiguous().T  # Fortran order
    big = torch.zeros(300, 64)
    big[20:276] = plain["embed_out.weight"]
    odd["embed_out.weight"] = big[20:276]  # a view into a larger storage
    odd[f"{AT}.W_G"] = torch.nn.Parameter(plain[f"{AT}.W_G"])
    torch.save(odd, folder / "pytorch_model.bin")
    with open_checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.tensor("layers.0.mlp.up.weight"), plain[name])
        assert torch.equal(checkpoint.rows("layers.0.mlp.up.weight", 5, 9), plain[name][5:9])
        assert torch.equal(checkpoint.tensor("lm_head.weight"), plain["embed_out.weight"])
        assert torch.equal(checkpoint.tensor("layers.0.attention.gate.weight"), plain[f"{AT}.W_G"].T)
