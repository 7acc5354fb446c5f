"""The files of a checkpoint folder: which there may be, and how each is opened.

Somebody else made them, so each is an ordinary file of bounded size in the folder itself. A symbolic link may
lead elsewhere only as in the Hugging Face cache, from models--*/snapshots/<revision> to models--*/blobs.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from dijiang_engines.errors import CheckpointError
from dijiang_engines.formats.safe_files import LIMITS, open_regular, parse_json, read_bounded

CONFIG = "config.json"
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SLOW_TOKENIZERS = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Vocabularies of tokenizers that are not tokenizer.json, as transformers' classes name them."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *SLOW_TOKENIZERS,
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""What transformers writes beside the weights for its tokenizers (VOCAB_FILES_NAMES of each class, and
tokenization_utils_base.py) and for generating. Carried along where it exists."""

MOST_INDEX_BYTES = 16 << 20
"""Of a shard index: 150,000 tensors. Real ones have a few hundred."""
MOST_JSON_VALUES = 4_000_000
"""Values in a JSON file of a checkpoint: they take a quarter of a gigabyte as Python objects. The largest
published tokenizers, of 260,000 tokens and 500,000 merges, have half as many."""

_FOREIGN = (
    (
        r"global_step\d+|zero_to_fp32\.py|zero_pp_rank_.*|mp_rank_\d+_.*",
        "a DeepSpeed checkpoint, whose weights are in pieces",
        "put the weights together first: `python zero_to_fp32.py . merged` in that folder (DeepSpeed writes "
        "the script there), then copy config.json and the tokenizer to merged",
    ),
    (
        r".*\.distcp|\.metadata|pytorch_model_fsdp.*",
        "a distributed PyTorch checkpoint (FSDP), whose weights are in pieces",
        "put the weights together first: `accelerate merge-weights FOLDER_OF_PIECES merged`, then copy "
        "config.json and the tokenizer to merged",
    ),
    (
        r"consolidated\.\d+\.pth|consolidated\.safetensors|params\.json",
        "a model in its author's own format, not in Hugging Face's",
        "convert it with transformers (convert_llama_weights_to_hf.py), or download the -hf version",
    ),
    (
        r".*\.gguf|tf_model.*\.h5|flax_model.*\.msgpack|.*\.onnx|rust_model\.ot",
        "a model for other software",
        "load it with transformers, and save it with save_pretrained()",
    ),
)  # fmt: skip
"""Names of what other tools write; what such a folder is; what to do."""


def find_file(folder: Path, name: str) -> Path | None:
    """The path of the file `name` of a checkpoint; None if there is no such name.

    Raises:
        CheckpointError: it is a link that leads out of the checkpoint, or to nothing.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    check_link(path)
    return path


def check_link(path: Path) -> None:
    """A file of a checkpoint must be in its folder, or be a link of the Hugging Face cache.

    Raises:
        CheckpointError: it is a link that leads elsewhere, or to nothing.
    """
    if not path.is_symlink():
        return
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path} is a link to a file outside the checkpoint's folder",
            got=str(real)[:500],
            expected=f"a file in {path.parent}",
            hint="if you trust the link, copy the checkpoint with `cp -rL`",
        )
    if not real.exists():
        raise CheckpointError(
            f"{path} is a link to nothing",
            got=f"no file {real}"[:500],
            hint="the checkpoint is incomplete: download or copy it again",
        )


def limit_of(name: str) -> int:
    """Bytes that a checkpoint's file of this name may have; weights are not meant."""
    if name in INDEX_FILES:
        return MOST_INDEX_BYTES
    return LIMITS[{CONFIG: "config", "tokenizer.json": "tokenizer"}.get(name, "tokenizer part")]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: the file is missing, a link out of the checkpoint, too large, not an ordinary file,
            not UTF-8, not JSON, or not an object.
    """
    check_link(path)
    data = read_bounded(path, limit_of(path.name), links=True, error=CheckpointError)
    if data.lstrip().startswith(b"["):
        raise CheckpointError(f"{path} is not a JSON object", got="a list")
    value = parse_json(data, str(path), error=CheckpointError, lenient=True, most_values=MOST_JSON_VALUES)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object", got=type(value).__name__)
    return value


def tokenizer_files(folder: Path) -> list[Path]:
    """Those of TOKENIZER_FILES that a checkpoint has, each opened once to see that it can be copied.

    Raises:
        CheckpointError: one of them is not an ordinary file, leads out of the checkpoint, or is too large.
    """
    found = [path for name in TOKENIZER_FILES if (path := find_file(folder, name)) is not None]
    for path in found:
        with open_regular(path, most=limit_of(path.name), links=True, error=CheckpointError):
            pass
    return found


def copy_file(path: Path, folder: Path) -> None:
    """Copy a file of a checkpoint into `folder`, under the same name.

    Raises:
        CheckpointError: as `tokenizer_files`.
    """
    check_link(path)
    most = limit_of(path.name)
    with (
        open_regular(path, most=most, links=True, error=CheckpointError) as source,
        (folder / path.name).open("xb") as target,
    ):
        shutil.copyfileobj(source, target)


def check_kind(folder: Path) -> None:
    """Refuse, by its name, a folder of something other than a whole model.

    Raises:
        CheckpointError: it is a PEFT adapter; or it holds no weights, but pieces or other software's files.
    """
    if not folder.is_dir():
        return
    names = sorted(os.listdir(folder))
    adapters = [name for name in names if re.fullmatch(r"adapter_(config|model)\..*", name)]
    if adapters:
        load = f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r})"
        raise CheckpointError(
            f"{folder} is a PEFT adapter, not a whole model",
            got=", ".join(adapters[:5]),
            hint=f"merge it first, with peft: {load}.merge_and_unload().save_pretrained('merged'), and copy "
            "the tokenizer to merged",
        )
    if {*SINGLE_FILES, *INDEX_FILES} & set(names):
        return
    for pattern, what, hint in _FOREIGN:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            raise CheckpointError(f"{folder} holds {what}", got=", ".join(found[:5])[:500], hint=hint)
