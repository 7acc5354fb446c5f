"""The files of a checkpoint folder: links, pipes, pointers, other tools' folders; what is carried along."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from support.makers.checkpoints import neox

from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.checkpoint.files import TOKENIZER_FILES, read_json
from dijiang_export.convert import convert_checkpoint
from dijiang_export.export.to_onnx import export_bundle

PARTS = ("config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json", "vocab.json",
         "chat_template.jinja", "merges.txt", "tokenizer.model")  # fmt: skip
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")


def make(folder: Path, format: Any = "safetensors") -> Path:
    """A checkpoint with a tokenizer and every file that may lie beside it."""
    neox(vocab=300).with_tokenizer().in_files(format).save(folder)
    for name in TOKENIZER_FILES:
        if not (folder / name).exists():
            (folder / name).write_text("{}" if name.endswith(".json") else f"content of {name}\n")
    return folder


def with_weights(folder: Path, name: str) -> Path:
    kind = {"model.safetensors": "safetensors", "pytorch_model.bin": "bin"}.get(name, "sharded-safetensors")
    return make(folder, kind)


def refused(folder: Path, match: str) -> str:
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(folder)
    assert time.monotonic() - started < 20  # not for ever
    message = str(caught.value)
    assert len(message.splitlines()) <= 5
    return message


def test_a_whole_folder_is_read(tmp_path: Path) -> None:
    with open_checkpoint(make(tmp_path / "m")) as checkpoint:
        assert [path.name for path in checkpoint.tokenizer_files] == list(TOKENIZER_FILES)


@pytest.mark.parametrize("name", [*PARTS, *WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "pointer", "dangling", "loop", "outside"])
def test_what_is_no_file_of_the_checkpoint(kind: str, name: str, tmp_path: Path) -> None:
    folder = with_weights(tmp_path / "m", name)
    path = folder / name
    path.unlink()
    outside = tmp_path / "secret"
    outside.write_text("root:x:0:0")
    match = "is not an ordinary file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
        match = "outside the checkpoint's folder"
    elif kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n")
        match = "Git LFS pointer"
    elif kind == "outside":
        path.symlink_to(outside)
        match = "outside the checkpoint's folder"
    else:
        path.symlink_to("absent" if kind == "dangling" else name)
        match = "link to nothing"
        if name == "config.json":  # read_config asks whether it exists
            match += r"|has no config\.json"
    assert name in refused(folder, match)


def test_a_shard_that_is_a_pipe(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "sharded-safetensors")
    shard = folder / "model-00002-of-00003.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    assert shard.name in refused(folder, "is not an ordinary file")


@pytest.mark.parametrize("format", ["safetensors", "sharded-safetensors", "bin", "sharded-bin"])
def test_snapshots_of_the_hugging_face_cache(format: str, tmp_path: Path) -> None:
    """Every file is a link into ../../blobs there; a link to another model's blobs is not one."""
    home = tmp_path / "models--a--b"
    snapshot, blobs = home / "snapshots" / "0123", home / "blobs"
    make(snapshot, format)
    blobs.mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(Path("../../blobs") / str(i))
    with open_checkpoint(snapshot) as checkpoint:
        checkpoint.tensor("embed_tokens.weight")
        assert len(checkpoint.tokenizer_files) == len(TOKENIZER_FILES)
    alias = tmp_path / "alias"  # a folder may be reached through links
    alias.symlink_to(snapshot)
    open_checkpoint(alias).close()
    other = tmp_path / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("{}")
    (snapshot / "tokenizer_config.json").unlink()
    (snapshot / "tokenizer_config.json").symlink_to(other / "0")
    refused(snapshot, r"tokenizer_config\.json is a link to a file outside")
    (snapshot / "tokenizer_config.json").unlink()
    (snapshot / "tokenizer_config.json").symlink_to("../../blobs/../../models--c--d/blobs/0")
    refused(snapshot, r"tokenizer_config\.json is a link to a file outside")


def test_links_inside_the_folder_and_downloads_to_a_folder(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / ".gitignore").write_text("*")
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "model.safetensors")
    (folder / "model.safetensors").symlink_to("weights/model.safetensors")
    open_checkpoint(folder).close()
    shutil.copytree(folder, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    open_checkpoint(tmp_path / "link").close()


def test_names_in_a_shard_index(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "sharded-safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    plain = dict(content["weight_map"])

    def write(rename: Any) -> None:
        content["weight_map"] = {name: rename(file) for name, file in plain.items()}
        index.write_text(json.dumps(content))

    write(lambda file: f"./{file}")
    with open_checkpoint(folder) as checkpoint:
        assert len(checkpoint.files) == 3
    write(lambda file: file if "00002" in file else f".//./{file}")
    open_checkpoint(folder).close()
    (folder / "sub").mkdir()
    for file in set(plain.values()):
        shutil.copy(folder / file, folder / "sub" / file)
    write(lambda file: f"sub/{file}")
    message = refused(folder, "outside the checkpoint's folder")
    assert "in a folder below" in message
    assert "trust" not in message
    write(lambda file: f"sub/../../m/{file}")
    assert "trust" in refused(folder, "outside the checkpoint's folder")


# -- sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "vocab.json", "model.safetensors.index.json"]
)
def test_files_beyond_their_limit(name: str, tmp_path: Path) -> None:
    folder = with_weights(tmp_path / "m", name if "index" in name else "model.safetensors")
    os.truncate(folder / name, 5 << 30)  # sparse
    assert name in refused(folder, "is too large")


def test_the_largest_tokenizers_are_read(tmp_path: Path) -> None:
    """260,000 tokens and 500,000 merges, each a pair."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b'{"model": {"vocab": {}, "merges": [' + b'["a","b"],' * 620_000 + b'["a","b"]]}}')
    assert len(read_json(path)["model"]["merges"]) == 620_001


def test_json_of_millions_of_values(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b'{"model": {"vocab": {}}, "a": [' + b"[]," * 5_000_000 + b"[]]}")
    with pytest.raises(CheckpointError, match="too many values"):
        read_json(path)
    for content, match in (
        (b"[" * 100_000, "not a JSON object"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "deeply"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            read_json(path)


# -- folders of other tools ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "match", "hint"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "is a PEFT adapter", "merge_and_unload"),
        (["adapter_model.bin"], "is a PEFT adapter", "merge_and_unload"),
        (["global_step500/x", "latest", "zero_to_fp32.py", "config.json"], "DeepSpeed", "zero_to_fp32.py"),
        (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed", "zero_to"),
        (["__0_0.distcp", ".metadata", "config.json"], "FSDP", "accelerate merge-weights"),
        (["pytorch_model_fsdp_0/__0_0.distcp", "config.json"], "FSDP", "accelerate merge-weights"),
        (["consolidated.00.pth", "params.json", "tokenizer.model"], "its author's own format", "-hf"),
        (["model.Q4_0.gguf"], "for other software", "save_pretrained"),
        (["tf_model.h5", "config.json"], "for other software", "save_pretrained"),
    ],
)
def test_folders_of_other_tools(names: list[str], match: str, hint: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")
    assert hint in refused(folder, match)


def test_an_adapter_beside_a_model_is_ambiguous(tmp_path: Path) -> None:
    """transformers would load both; leaving the adapter out silently would be another model."""
    folder = make(tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "is a PEFT adapter")


def test_whole_models_that_came_with_other_files_are_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    for name in ("zero_to_fp32.py", "tf_model.h5", "model.onnx", "params.json"):
        (folder / name).write_text("")
    (folder / "global_step10").mkdir()
    open_checkpoint(folder).close()


# -- what is carried along ----------------------------------------------------------------------------------


def test_tokenizer_files_are_copied(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    export_bundle(folder, tmp_path / "b", cases="none")
    files = json.loads((tmp_path / "b" / "manifest.json").read_text())["files"]
    for name in ("config.json", *TOKENIZER_FILES):
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes()
        assert name in files
    vanilla = neox(vocab=300).vanilla().save(tmp_path / "v")
    for name in TOKENIZER_FILES:
        shutil.copy(folder / name, vanilla / name)
    convert_checkpoint(vanilla, tmp_path / "c")
    for name in TOKENIZER_FILES:
        assert (tmp_path / "c" / name).read_bytes() == (folder / name).read_bytes()


def test_nothing_outside_reaches_a_bundle(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / "merges.txt").unlink()
    (folder / "merges.txt").symlink_to("/etc/passwd")
    for make_output in (export_bundle, convert_checkpoint):
        with pytest.raises(CheckpointError, match=r"merges\.txt is a link to a file outside"):
            make_output(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_opened_is_what_is_hashed(tmp_path: Path) -> None:
    import hashlib

    file = make(tmp_path / "m") / "model.safetensors"
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    with open_checkpoint(file.parent) as checkpoint:
        size = file.stat().st_size
        file.rename(tmp_path / "aside")
        file.write_bytes(b"another model")
        seen: list[int] = []
        hashes = checkpoint.hash_files(seen.append)
    assert hashes == {"model.safetensors": {"sha256": expected, "bytes": size}}
    assert sum(seen) == size
