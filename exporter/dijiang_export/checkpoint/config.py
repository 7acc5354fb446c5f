"""config.json and its neighbours -> family and ModelSpec, in every spelling that published files use."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from dijiang_engines.errors import CheckpointError
from dijiang_engines.spec import Activation, ModelSpec, is_positive
from dijiang_export.checkpoint.families import FAMILIES, NEUTRAL, REQUIRED, Family, Key
from dijiang_export.checkpoint.files import SLOW_TOKENIZERS, read_json
from dijiang_export.checkpoint.rope_config import read_rope

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' names (ACT2FN) -> ours."""

GROUP_NORM_EPSILON = 1e-5
"""torch.nn.GroupNorm's default, which the official code leaves (@3459531:111)."""

_SOME = 5  # names in a message

HEAD_SIZES = range(16, 257, 16)


def read_config(folder: Path) -> tuple[dict[str, Any], Family]:
    """config.json of a checkpoint folder, and the family that it names.

    `auto_map` is not looked at: code in a checkpoint is never run.

    Raises:
        CheckpointError: there is no such folder or file, or the architecture is not supported.
    """
    if not folder.is_dir():
        hint = "give the folder of a Hugging Face checkpoint"
        if not folder.exists() and len(folder.parts) == 2 and not folder.is_absolute():
            hint = f"if that is a model on the Hugging Face hub, download it first: hf download {folder}"
        raise CheckpointError(f"{folder} is not a folder", hint=hint)
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} has no config.json", hint="give the folder of a Hugging Face checkpoint"
        )
    config = read_json(folder / "config.json")
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = [architectures]
    for family in FAMILIES.values():
        known = any(name in family.architectures for name in architectures)
        if model_type == family.name and (known or not architectures):
            return config, family
        if model_type is None and known:
            return config, family
    supported = [f"{f.architectures[0]} ({f.name})" for f in FAMILIES.values()]
    raise CheckpointError(
        f"{folder / 'config.json'} names an architecture that is not supported",
        got=f"{', '.join(map(str, architectures)) or 'no architectures'}, model_type {model_type!r}",
        expected=" or ".join(supported),
    )


def build_spec(folder: Path, config: dict[str, Any], family: Family) -> ModelSpec:
    """The geometry that config.json describes; decay as if it were geometric.

    Raises:
        CheckpointError: a value is missing, of the wrong type, or not supported.
    """
    where = folder / "config.json"
    _check_neutral(where, config, family)
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{where} describes a quantised checkpoint", hint="save the weights in float16 or wider"
        )
    v = {name: _read(where, config, key) for name, key in family.keys.items()}
    heads, hidden = v["num_heads"], v["hidden_size"]
    head_dim = v["head_dim"] or _divide(where, hidden, heads)
    if head_dim not in HEAD_SIZES:
        raise CheckpointError(
            f"{where}: heads of this size are not supported",
            got=f"{head_dim} = hidden_size {hidden} / {heads} heads" if not v["head_dim"] else head_dim,
            expected="a multiple of 16 from 16 to 256",
        )
    kv_heads = v["num_kv_heads"] or heads
    if heads % kv_heads:
        raise CheckpointError(
            f"{where}: num_key_value_heads does not divide num_attention_heads", got=f"{kv_heads}, {heads}"
        )
    _check_given(where, config, {"num_key_value_heads": kv_heads, "head_dim": head_dim})
    rope = read_rope(where, config, family, head_dim)
    bos, eos = _special_tokens(folder, config, v["vocab_size"])
    return ModelSpec(
        family=family.name,
        vocab_size=v["vocab_size"],
        hidden_size=hidden,
        intermediate_size=v["intermediate_size"],
        num_layers=v["num_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=rope.dim,
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        norm=family.norm,
        norm_epsilon=float(v["norm_epsilon"]),
        activation=v["activation"],
        gated_mlp=family.gated_mlp,
        parallel_residual=v["parallel_residual"],
        post_norm=not v["pre_norm"],
        final_norm=v["pre_norm"] and not v["remove_final_norm"],
        attention_bias=v["attention_bias"],
        dense_bias=v["dense_bias"],
        mlp_bias=v["mlp_bias"],
        position_embeddings=v["max_position_embeddings"] if family.position_offset else 0,
        position_offset=family.position_offset,
        embedding_size=v["embedding_size"] or hidden,
        tied_embeddings=v["tied_embeddings"],
        max_position_embeddings=v["max_position_embeddings"],
        decay="geometric",
        decay_rows=0,
        decay_extended=False,
        group_norm_epsilon=GROUP_NORM_EPSILON,
        bos_token_id=bos,
        eos_token_ids=eos,
    )


def check_tokenizer(folder: Path, vocab_size: int) -> list[str]:
    """Compare tokenizer.json, if there is one, with the model's vocabulary.

    Fewer tokens than vocab_size are normal: vocabularies are padded. Tokens that were added to a tokenizer
    but not to the model, such as <pad>, lie beyond it: the model can neither read nor choose them, and a
    note says so. A tokenizer whose own vocabulary goes on beyond the model's is another model's.

    Returns:
        Notes for the user: of such added tokens; and how to make tokenizer.json from older files.

    Raises:
        CheckpointError: it is not a tokenizer, or has ids of its own that the model has no embedding for.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return _without_tokenizer(folder)
    content = read_json(path)
    model, listed = content.get("model"), content.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, (dict, list)):
        raise CheckpointError(
            f"{path} is not a tokenizer", expected="model.vocab", hint="remove or replace it"
        )
    added = {
        entry["id"]: str(entry.get("content"))
        for entry in (listed if isinstance(listed, list) else [])
        if isinstance(entry, dict) and type(entry.get("id")) is int
    }
    if isinstance(vocab, list):  # Unigram: [[token, score], ...]
        own = {i: str(vocab[i]) for i in range(vocab_size, len(vocab))}
    else:
        own = {i: token for token, i in vocab.items() if type(i) is int and i >= vocab_size}
    foreign = max(own.keys() - added.keys(), default=None)
    if foreign is not None:
        raise CheckpointError(
            "the tokenizer does not fit the model: it has ids that the vocabulary lacks",
            got=f"id {foreign} ({own[foreign]!r}) in {path.name}",
            expected=f"ids below vocab_size = {vocab_size}",
            hint="use the tokenizer that the model was trained with",
        )
    beyond = sorted(i for i in added if i >= vocab_size)
    if not beyond:
        return []
    names = ", ".join(f"{added[i]!r} ({i})" for i in beyond[:_SOME])
    more = f" and {len(beyond) - _SOME} more" if len(beyond) > _SOME else ""
    return [
        f"{path.name} adds tokens for which the model has no embedding, beyond vocab_size = {vocab_size}: "
        f"{names}{more}; they are never generated, and a prompt with one is refused"
    ]


def _without_tokenizer(folder: Path) -> list[str]:
    found = [name for name in SLOW_TOKENIZERS if (folder / name).exists()]
    if not found:
        return []
    load = "AutoTokenizer.from_pretrained(sys.argv[1])"
    code = f"import sys; from transformers import AutoTokenizer; {load}.save_pretrained(sys.argv[1])"
    command = shlex.join(["python", "-c", code, str(folder)])
    needs = (
        "transformers"
        if {"vocab.json", "vocab.txt"} & {*found}
        else "transformers, sentencepiece and protobuf"
    )
    return [
        f"there is no tokenizer.json, only {', '.join(found)}: without it prompts are token ids. To make it, "
        f"with {needs} installed: {command}"
    ]


def _special_tokens(folder: Path, config: dict[str, Any], vocab: int) -> tuple[int | None, tuple[int, ...]]:
    """bos and eos: generation_config.json's where it has them, as in transformers' generate."""
    path = folder / "generation_config.json"
    defaults = read_json(path) if path.exists() else {}
    out: dict[str, list[int]] = {}
    for name in ("bos_token_id", "eos_token_id"):
        value = defaults.get(name, config.get(name))
        values = value if isinstance(value, list) else [] if value is None else [value]
        for item in values:
            if type(item) is not int or not 0 <= item < vocab:
                raise CheckpointError(
                    f"{folder}: {name} is not a token of the model",
                    got=repr(item),
                    expected=f"0 .. {vocab - 1}",
                    hint="correct it in config.json (and generation_config.json)",
                )
        out[name] = list(dict.fromkeys(values))
    bos = out["bos_token_id"]
    return bos[0] if bos else None, tuple(out["eos_token_id"])


def _divide(where: Path, hidden: int, heads: int) -> int:
    if hidden % heads:
        raise CheckpointError(
            f"{where}: hidden_size is not divisible by num_attention_heads", got=f"{hidden}, {heads}"
        )
    return hidden // heads


def _read(where: Path, config: dict[str, Any], key: Key) -> Any:
    value = config.get(key.name, key.default)
    if value is REQUIRED:
        raise CheckpointError(f"{where} lacks {key.name}")
    if value is None and key.default is None:
        return None
    if key.kind == "activation":
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise CheckpointError(
                f"{where}: the activation {value!r} is not supported", expected=", ".join(ACTIVATIONS)
            )
        return ACTIVATIONS[value]
    good = {
        "size": type(value) is int and 0 < value <= key.most,
        "flag": isinstance(value, bool),
        "positive": is_positive(value),
    }
    if not good[key.kind]:
        raise CheckpointError(f"{where} has a bad value for {key.name}", got=_json(value))
    return value


_WITHOUT_EFFECT = "transformers' own model ignores the key: remove it if that is what trained the model"


def _check_neutral(where: Path, config: dict[str, Any], family: Family) -> None:
    """Refuse settings that would change what the model computes and that it does not have."""
    for name, neutral in {**NEUTRAL, **family.neutral}.items():
        value = config.get(name)
        parts = value if isinstance(value, list) else [value] if value not in (None, {}) else []
        if any(not any(_equal(part, allowed) for allowed in neutral) for part in parts):
            raise CheckpointError(
                f"{where}: {name} = {_json(value)} is not supported",
                expected=" or ".join(map(_json, neutral)) or "no such key",
                hint=None if name in family.neutral else _WITHOUT_EFFECT,
            )


def _check_given(where: Path, config: dict[str, Any], derived: dict[str, int]) -> None:
    """Refuse keys that a family does not read but that contradict its geometry."""
    for name, value in derived.items():
        if config.get(name) is not None and not _equal(config[name], value):
            raise CheckpointError(
                f"{where}: {name} does not fit this family",
                got=_json(config[name]),
                expected=f"{value}, or no such key",
            )


def _equal(given: Any, value: Any) -> bool:
    """Equality in which true is not 1."""
    return isinstance(given, bool) == isinstance(value, bool) and bool(given == value)


def _json(value: Any) -> str:
    """A value as config.json spells it."""
    return json.dumps(value, ensure_ascii=False)
