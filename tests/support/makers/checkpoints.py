"""Small random checkpoints in the official layouts, for everybody's tests.

    folder = llama(heads=4, kv_heads=2).with_trained_decay().save(tmp_path / "model")

A family and its sizes make a config.json; the weights follow from what it says (official_weights.py). What a
checkpoint is to be besides stands in the sentence. Nothing here uses the package under test: it is the other
side of the reader. Only `tensors` and `save` need PyTorch: what is to be made can be said without.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from support.makers.byte_tokenizer import write_tokenizer

if TYPE_CHECKING:
    import torch
    from support.makers.official_weights import DecayTables
    from support.makers.weight_files import Format

Family = Literal["gpt_neox", "llama", "opt"]


@dataclass(frozen=True)
class RandomCheckpoint:
    """What is to be written; each method returns a changed copy, `save` writes it."""

    config: dict[str, Any]
    """config.json, which the weights follow."""
    says: dict[str, Any] = field(default_factory=dict)
    """Keys of config.json that the weights do not follow; None: the key is not there."""
    decay: DecayTables | None = "geometric"
    """None: a vanilla checkpoint, without any of DiJiang's parameters."""
    leftovers: bool = False
    tables_dtype: str | None = None
    format: Format = "safetensors"
    tokenizer: bool = False

    @property
    def family(self) -> Family:
        """config.json's model_type."""
        family: Family = self.config["model_type"]
        return family

    def with_config(self, **keys: Any) -> RandomCheckpoint:
        """With these keys in config.json, in the family's own spelling, and weights to match."""
        return dataclasses.replace(self, config=self.config | keys)

    def with_rope(self, *, base: float = 10000.0, scaling: dict[str, Any] | None = None) -> RandomCheckpoint:
        """With these frequencies, in the spelling of GPT-NeoX or LLaMA."""
        key = {"gpt_neox": "rotary_emb_base", "llama": "rope_theta"}[self.family]
        return self.with_config(**{key: base, "rope_scaling": scaling})

    def config_says(self, **keys: Any) -> RandomCheckpoint:
        """Keys that the file has whatever the weights are; a key that is None is left out of the file."""
        return dataclasses.replace(self, says=self.says | keys)

    def with_trained_decay(self) -> RandomCheckpoint:
        """With tables that no γ describes."""
        return dataclasses.replace(self, decay="trained")

    def vanilla(self) -> RandomCheckpoint:
        """Without DiJiang's parameters."""
        return dataclasses.replace(self, decay=None)

    def with_leftovers(self) -> RandomCheckpoint:
        """With the buffers, and the copy of OPT's tied head, that old files carry."""
        return dataclasses.replace(self, leftovers=True)

    def with_tokenizer(self) -> RandomCheckpoint:
        """With a byte-level tokenizer's files."""
        return dataclasses.replace(self, tokenizer=True)

    def stored_in(self, dtype: str, *, tables: str | None = None) -> RandomCheckpoint:
        """With weights of another type than float32, and perhaps D1 and D2 of yet another."""
        return dataclasses.replace(self.with_config(torch_dtype=dtype), tables_dtype=tables)

    def in_files(self, format: Format) -> RandomCheckpoint:
        """With weights in another kind of file than one model.safetensors."""
        return dataclasses.replace(self, format=format)

    def config_json(self) -> dict[str, Any]:
        """What config.json holds."""
        absent = {key for key, value in self.says.items() if value is None}
        return {key: value for key, value in (self.config | self.says).items() if key not in absent}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights under their official names, in the types in which they are stored."""
        from support.makers.official_weights import official_weights
        from support.makers.weight_files import stored_as

        made = official_weights(self.config, self.decay, leftovers=self.leftovers)
        dtype = self.config["torch_dtype"]
        tables = self.tables_dtype or dtype
        return {
            name: stored_as(value, tables if name.endswith((".D1", ".D2")) else dtype)
            for name, value in made.items()
        }

    def save(self, folder: Path) -> Path:
        """Write the files into `folder` (created) and return it."""
        from support.makers.weight_files import save_tensors

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config_json(), indent=2))
        save_tensors(folder, self.tensors(), self.format)
        if self.tokenizer:
            write_tokenizer(folder, self.config["vocab_size"])
        return folder


@dataclass(frozen=True)
class Sizes:
    """Of a model; each may be given to `neox`, `llama`, `opt`."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    intermediate: int = 96
    vocab: int = 256
    positions: int = 128

    def config(self, architecture: str, family: Family) -> dict[str, Any]:
        """The keys that all families share."""
        return {
            "architectures": [architecture],
            "model_type": family,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.positions,
            "torch_dtype": "float32",
            "bos_token_id": 0,
            "eos_token_id": 0,
        }


def neox(**sizes: int) -> RandomCheckpoint:
    """GPT-NeoX, in the spelling of Pythia's config.json."""
    chosen = Sizes(**sizes)
    return RandomCheckpoint(
        chosen.config("GPTNeoXForCausalLM", "gpt_neox")
        | {
            "auto_map": {"AutoModelForCausalLM": "modeling_gpt_neox_dijiang.GPTNeoXForCausalLM"},
            "intermediate_size": chosen.intermediate,
            "hidden_act": "gelu",
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000.0,
            "rope_scaling": None,
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
        }
    )


def llama(*, kv_heads: int | None = None, head_dim: int | None = None, **sizes: int) -> RandomCheckpoint:
    """LLaMA; `head_dim` may be other than hidden / heads."""
    chosen = Sizes(**sizes)
    return RandomCheckpoint(
        chosen.config("LlamaForCausalLM", "llama")
        | {
            "intermediate_size": chosen.intermediate,
            "hidden_act": "silu",
            "num_key_value_heads": kv_heads or chosen.heads,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
        }
        | ({} if head_dim is None else {"head_dim": head_dim})
    )


def opt(**sizes: int) -> RandomCheckpoint:
    """OPT, but for the size of 350M."""
    chosen = Sizes(**sizes)
    return RandomCheckpoint(
        chosen.config("OPTForCausalLM", "opt")
        | {
            "ffn_dim": chosen.intermediate,
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "word_embed_proj_dim": chosen.hidden,
            "enable_bias": True,
            "tie_word_embeddings": True,
        }
    )


def opt_350m(*, embedding: int, **sizes: int) -> RandomCheckpoint:
    """OPT as its size of 350M has it: norms behind the blocks, and narrower embeddings."""
    return opt(**sizes).with_config(do_layer_norm_before=False, word_embed_proj_dim=embedding)


def of_family(family: str, **sizes: int) -> RandomCheckpoint:
    """`neox`, `llama` or `opt` by the name in config.json."""
    return {"gpt_neox": neox, "llama": llama, "opt": opt}[family](**sizes)
