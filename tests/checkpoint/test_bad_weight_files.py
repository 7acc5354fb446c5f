"""Files of weights, safetensors above all, missing, cut, hostile or at odds: one clear error each."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.bad_checkpoints import fails
from support.makers.checkpoints import neox

from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.checkpoint import open_checkpoint


def test_no_weights(tmp_path: Path) -> None:
    folder = neox().save(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "flax_model.bin")
    assert "flax_model.bin" in fails(folder, "holds no weights")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 3000, -1])
def test_truncated_safetensors(keep: int, tmp_path: Path) -> None:
    file = neox().save(tmp_path / "m") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    fails(file.parent, "is truncated")


def test_safetensors_truncated_while_open(tmp_path: Path) -> None:
    file = neox().save(tmp_path / "m") / "model.safetensors"
    with open_checkpoint(file.parent) as checkpoint:
        os.truncate(file, 10_000)
        with pytest.raises(CheckpointError, match="is truncated"):
            checkpoint.load_state_dict()


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        safetensors({}, length=2**63),
        safetensors({}, length=200_000_000),
        safetensors(b"{"),
        safetensors(b"[]"),
        safetensors(b"\xff\xff"),
        safetensors(b"[" * 100_000),
        safetensors(b'{"a": ' + b"9" * 5000 + b"}"),
        safetensors({"a": 5}),
        safetensors({"a": {"dtype": "F32", "shape": [1]}}),
        safetensors({"a": entry(0, 4, [1], "F99")}, bytes(4)),
        safetensors({"a": entry(0, 4, [2])}, bytes(4)),
        safetensors({"a": entry(0, 4, [-1, -1])}, bytes(4)),
        safetensors({"a": entry(0, 4, [True])}, bytes(4)),
        safetensors({"a": entry(0, 4, [1.0])}, bytes(4)),
        safetensors({"a": entry(4, 0, [1])}, bytes(4)),
        safetensors({"a": entry(0, 4, [2**62, 2**62, 4])}, bytes(4)),
        safetensors({"a": entry(0, 4, [1]), "b": entry(2, 6, [1])}, bytes(6)),  # overlap
        safetensors({"a": entry(0, 4, [1]), "b": entry(6, 10, [1])}, bytes(10)),  # hole
        safetensors({"a": entry(2, 6, [1])}, bytes(6)),
        safetensors({"a": entry(0, 4, [1])}, bytes(5)),  # something after the end
        safetensors(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            bytes(8),
        ),
    ],
)
def test_hostile_safetensors(content: bytes, tmp_path: Path) -> None:
    folder = neox().save(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(content)
    fails(folder, "not a valid safetensors file|is truncated")


def shard_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    edit(content["weight_map"])
    file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/outside.safetensors", "sub/outside.safetensors", "", "..",
     "a\0.safetensors", "..\\outside.safetensors", "{absolute}", "link.safetensors"],
)  # fmt: skip
def test_shard_outside_the_folder(name: str, tmp_path: Path) -> None:
    folder = neox().in_files("sharded-safetensors").save(tmp_path / "m")
    outside = tmp_path / "outside.safetensors"
    (folder / "model-00001-of-00003.safetensors").rename(outside)
    (folder / "link.safetensors").symlink_to(outside)
    name = name.replace("{absolute}", str(outside))

    def edit(weight_map: dict[str, Any]) -> None:
        for key, value in weight_map.items():
            if value == "model-00001-of-00003.safetensors":
                weight_map[key] = name

    fails(shard_index(folder, edit), "outside the checkpoint's folder")


def test_bad_shard_index(tmp_path: Path) -> None:
    folder = neox().in_files("sharded-safetensors").save(tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    key = next(iter(json.loads(good)["weight_map"]))
    fails(shard_index(folder, lambda m: m.__setitem__(key, 5)), "bad entry")
    index.write_text(good)
    fails(shard_index(folder, lambda m: m.__setitem__(key, "config.json")), "unknown kind")
    index.write_text(good)
    fails(
        shard_index(folder, lambda m: m.__setitem__(key, "model-00002-of-00003.safetensors")),
        "does not hold it",
    )
    index.write_text("{}")
    fails(folder, "has no weight_map")
    index.write_text(good[:50])
    fails(folder, "not valid JSON")
    index.write_text(good)
    (folder / "model-00002-of-00003.safetensors").unlink()
    fails(folder, "is missing")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = neox().in_files("sharded-safetensors").save(tmp_path / "m")
    (folder / "model-00001-of-00003.safetensors").write_bytes(
        (folder / "model-00002-of-00003.safetensors").read_bytes()
    )
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    second = {k: v for k, v in content["weight_map"].items() if v.startswith("model-00002")}
    first = dict(list(second.items())[:1])
    content["weight_map"] = {k: v for k, v in second.items() if k not in first}
    content["weight_map"] |= dict.fromkeys(first, "model-00001-of-00003.safetensors")
    index.write_text(json.dumps(content))
    fails(folder, "is stored twice")
