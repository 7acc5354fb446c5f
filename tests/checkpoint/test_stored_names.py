"""Names that training tools leave in files: read and said, or refused by their name.

Vanilla checkpoints come from transformers itself, whatever version is installed; what is read from them must
be the tensors of its model, bit by bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.makers.checkpoints import llama, neox, of_family
from support.makers.weight_files import load_tensors, save_tensors

from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.checkpoint.source import Source
from dijiang_export.convert import convert_checkpoint

FAMILIES = ("gpt_neox", "llama", "opt")
HEADS = {"gpt_neox": "embed_out.weight", "llama": "lm_head.weight", "opt": "lm_head.weight"}
Tensors = dict[str, torch.Tensor]


def model_of(family: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }  # fmt: skip
    if family == "opt":
        sizes |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    else:
        sizes |= {"intermediate_size": 48}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **sizes, **options)
    return transformers.AutoModelForCausalLM.from_config(config)


def read(folder: Path) -> tuple[Tensors, list[str]]:
    """Every tensor that is read, under its official name; and the notes."""
    source = Source(folder)
    try:
        source.check(dijiang=False)
        return {name: stored.exact() for name, stored in source.tensors.items()}, source.notes
    finally:
        source.close()


def official(family: str, model: Any) -> Tensors:
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if family == "gpt_neox" and "lm_head.weight" in state:  # transformers >= 5.14
        state["embed_out.weight"] = state.pop("lm_head.weight")
    if model.config.tie_word_embeddings:
        del state[HEADS[family]]
    return state


def same(found: Tensors, expected: Tensors) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["save_pretrained", "sharded", "torch.save", "legacy", "sharded bin"])
def test_what_transformers_saves(layout: str, tied: bool, family: str, tmp_path: Path) -> None:
    model = model_of(family, tie_word_embeddings=tied)
    folder = tmp_path / "m"
    model.save_pretrained(folder, **({"max_shard_size": "12KB"} if layout == "sharded" else {}))
    if "sharded" in layout:
        assert layout == "sharded bin" or len(list(folder.glob("model-*.safetensors"))) > 2
    if layout not in ("save_pretrained", "sharded"):
        for file in folder.glob("model*"):
            file.unlink()
        state = model.state_dict()
        if layout == "sharded bin":
            weight_map = {}
            for i, (name, value) in enumerate(state.items()):
                if not (tied and name == "lm_head.weight"):
                    weight_map[name] = f"./pytorch_model-{i:05d}.bin"
                    torch.save({name: value}, folder / weight_map[name])
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        else:
            file = folder / "pytorch_model.bin"
            torch.save(state, file, _use_new_zipfile_serialization=layout == "torch.save")
    found, notes = read(folder)
    assert notes == []
    assert same(found, official(family, model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model(family: str, tmp_path: Path) -> None:
    tied = model_of(family, tie_word_embeddings=True)
    tied.base_model.save_pretrained(tmp_path / "tied")
    found, notes = read(tmp_path / "tied")
    assert same(found, official(family, tied))
    assert family == "opt" or "base model" in notes[0]  # published OPT files have such names
    model_of(family, tie_word_embeddings=False).base_model.save_pretrained(tmp_path / "untied")
    with pytest.raises(CheckpointError, match="lacks 1 tensor") as caught:
        read(tmp_path / "untied")
    assert HEADS[family] in str(caught.value)
    assert "without its head" in str(caught.value)
    convert_checkpoint(tmp_path / "tied", tmp_path / "converted")
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["architectures"] == [type(tied).__name__]


Rename = Callable[[str], str]


def inside(mark: str) -> Rename:
    """`mark` after the first part and before the last, as wrapped submodules have it."""
    return lambda name: re.sub(r"(layers\.\d+\.)", rf"\1{mark}.", name)


WRAPPED: dict[str, tuple[Rename, str]] = {
    "data parallel": (lambda n: f"module.{n}", "module"),
    "compiled": (lambda n: f"_orig_mod.{n}", "_orig_mod"),
    "compiled in data parallel": (lambda n: f"module._orig_mod.{n}", "_orig_mod, module"),
    "data parallel in compiled": (lambda n: f"_orig_mod.module.{n}", "_orig_mod, module"),
    "merged PEFT": (lambda n: f"base_model.model.{n}", "'base_model.model.'"),
    "Lightning": (lambda n: f"model.{n}", "'model.'"),
    "Lightning and compiled": (lambda n: f"model._orig_mod.{n}", "'model.'"),
    "Fabric": (lambda n: f"_forward_module.{n}", "_forward_module"),
    "FSDP": (lambda n: f"_fsdp_wrapped_module.{n}", "_fsdp_wrapped_module"),
    "FSDP of layers": (inside("_fsdp_wrapped_module"), "_fsdp_wrapped_module"),
    "compiled layers": (inside("_orig_mod"), "_orig_mod"),
    "checkpointed layers": (inside("_checkpoint_wrapped_module"), "_checkpoint_wrapped_module"),
    "everything": (lambda n: "student.net.module." + inside("_orig_mod")(n), "'student.net.'"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers(name: str, family: Any, tmp_path: Path) -> None:
    rename, said = WRAPPED[name]
    folder = of_family(family).with_config(tie_word_embeddings=False).with_leftovers().save(tmp_path / "m")
    with open_checkpoint(folder) as checkpoint:
        expected = checkpoint.load_state_dict()
        assert checkpoint.notes == []
    stored = {rename(key): value for key, value in load_tensors(folder).items()}
    save_tensors(folder, stored)
    with open_checkpoint(folder) as checkpoint:
        assert same(checkpoint.load_state_dict(), expected)
        assert any(said in note for note in checkpoint.notes), checkpoint.notes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_wrapped_base_models(tied: bool, family: Any, tmp_path: Path) -> None:
    """Of a base model behind a wrapper nothing is lost, and of a whole one nothing is taken for a prefix."""
    folder = of_family(family).with_config(tie_word_embeddings=tied).save(tmp_path / "m")
    expected = load_tensors(folder)
    base = "gpt_neox." if family == "gpt_neox" else "model."
    head = HEADS[family]
    bare = {f"net.{n.removeprefix(base)}": v for n, v in expected.items() if n != head}
    save_tensors(folder, bare if tied else bare | {f"net.{head}": expected[head]})
    source = Source(folder)
    source.check(dijiang=True)
    assert set(source.tensors) == set(expected)
    assert any("'net.'" in note for note in source.notes)
    source.close()


def tampered(folder: Path, edit: Callable[[Tensors], Tensors | None]) -> Path:
    stored = load_tensors(folder)
    save_tensors(folder, edit(stored) or stored)
    return folder


def refused(folder: Path, match: str) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert len(message.splitlines()) <= 5
    return message


def test_both_spellings_of_the_head(tmp_path: Path) -> None:
    folder = neox().save(tmp_path / "m")
    head = load_tensors(folder)["embed_out.weight"]
    tampered(folder, lambda stored: stored | {"lm_head.weight": head.clone()})
    with open_checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.tensor("lm_head.weight"), head)
    other = head.clone()
    other[-1, -1] += 1
    tampered(folder, lambda stored: stored | {"lm_head.weight": other})
    message = refused(folder, "embed_out.weight is stored twice, with different values")
    assert "lm_head.weight" in message
    tampered(folder, lambda stored: stored | {"lm_head.weight": head[:3].clone()})
    refused(folder, "stored twice, with different values")


def test_what_is_there_is_named(tmp_path: Path) -> None:
    """Some names with a prefix, some without: nothing is guessed."""
    folder = neox().save(tmp_path / "m")
    tampered(folder, lambda s: {(f"ema.{n}" if "layers.1" in n else n): v for n, v in s.items()})
    message = refused(folder, "lacks 18 tensors")
    assert "no gpt_neox.layers.1" in message
    assert "instead ema.gpt_neox.layers.1" in message
    folder = llama().save(tmp_path / "n")
    meta = {"model.embed_tokens.weight": "tok_embeddings.weight", "lm_head.weight": "output.weight"}
    tampered(folder, lambda s: {meta.get(n, n): v for n, v in s.items()})
    assert "tok_embeddings.weight" in refused(folder, "lacks 2 tensors")


def test_a_second_model_is_not_dropped(tmp_path: Path) -> None:
    folder = neox().save(tmp_path / "m")
    tampered(folder, lambda s: s | {f"teacher.{n}": v.clone() for n, v in s.items()})
    assert "teacher.gpt_neox" in refused(folder, "that such a model does not have")
    tampered(neox().save(tmp_path / "n"), lambda s: {f"model.{n}": v for n, v in s.items()}
             | {"loss.weight": torch.ones(3)})  # fmt: skip
    assert "model.gpt_neox" in refused(tmp_path / "n", "lacks")


def test_zero_3_shards(tmp_path: Path) -> None:
    folder = neox().save(tmp_path / "m")
    tampered(folder, lambda s: {f"module.{n}": torch.empty(0) for n in s})
    assert "zero_to_fp32.py" in refused(folder, "DeepSpeed ZeRO-3")


def test_adapters_that_are_not_merged(tmp_path: Path) -> None:
    folder = neox().save(tmp_path / "m")

    def adapt(stored: Tensors) -> Tensors:
        out = {f"base_model.model.{n}": v for n, v in stored.items()}
        at = "base_model.model.gpt_neox.layers.0.attention.query_key_value"
        out[f"{at}.base_layer.weight"] = out.pop(f"{at}.weight")
        return out | {f"{at}.lora_A.default.weight": torch.ones(2, 64)}

    tampered(folder, adapt)
    assert "merge_and_unload" in refused(folder, "PEFT adapters that are not merged")


# -- types of safetensors -----------------------------------------------------------------------------------


def raw_safetensors(path: Path, entries: dict[str, tuple[str, list[int], int]]) -> None:
    """A file of zeros: name -> type, shape, bytes."""
    header, at = {}, 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))


OTHER_TYPES = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6,
}  # fmt: skip


@pytest.mark.parametrize("dtype", OTHER_TYPES)
def test_every_type_of_the_format_is_known(dtype: str, tmp_path: Path) -> None:
    """The library, too, takes the file; a weight that is needed is refused by its type's name."""
    from safetensors import safe_open

    bits = OTHER_TYPES[dtype]
    folder = neox().save(tmp_path / "m")
    file = folder / "model.safetensors"
    entries = {name: ("F32", list(value.shape), 4 * value.numel()) for name, value in load_file(file).items()}
    bad = "gpt_neox.layers.1.attention.W_G"
    raw_safetensors(file, entries | {bad: (dtype, [64, 64], 64 * 64 * bits // 8)})
    with safe_open(file, "pt") as opened:
        assert bad in opened.keys()  # noqa: SIM118
    message = refused(folder, "W_G in model.safetensors is not stored as floating point")
    assert dtype in message
    buffer = "gpt_neox.layers.0.attention.masked_bias"  # not needed: whatever its type is
    raw_safetensors(file, entries | {buffer: (dtype, [8], bits)})
    Source(folder).check(dijiang=True)


def test_half_bytes_must_add_up(tmp_path: Path) -> None:
    folder = neox().save(tmp_path / "m")
    raw_safetensors(folder / "model.safetensors", {"a": ("F4", [3], 1)})
    refused(folder, "1 bytes for .* of F4")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[' + b"1," * 100_000 + b'1],"data_offsets":[0,4]}}',
        b'{"' + b"a" * 2_000_000 + b'":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":' + b"[" * 3_000_000 + b"]" * 3_000_000 + b"}",
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 3_000_000 + b'],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"' + b"F" * 3_000_000 + b'","shape":[1],"data_offsets":[0,4]}}',
        b"{" + b",".join(b'"%d":{}' % i for i in range(500_000)) + b"}",
        b"{" + b" " * 60_000_000 + b"}",
    ],
    ids=["dimensions", "name", "nesting", "digits", "type", "entries", "blanks"],
)
def test_absurd_headers_are_refused_quickly(header: bytes, tmp_path: Path) -> None:
    import time

    folder = neox().save(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    started = time.process_time()
    message = refused(folder, "not a valid safetensors file")
    assert time.process_time() - started < 4
    assert len(message) < 1500


def test_saved_by_the_library(tmp_path: Path) -> None:
    """Metadata, and names in any order."""
    folder = neox().save(tmp_path / "m")
    stored = load_tensors(folder)
    save_file(dict(reversed(stored.items())), folder / "model.safetensors", metadata={"format": "pt"})
    found = Source(folder)
    assert same({n: t.exact() for n, t in found.tensors.items()}, stored)
    found.close()
