"""LLaMA and OPT as transformers models them, with DiJiang attention in place of softmax attention.

No official DiJiang code exists for these families, so their surroundings (norms, positions, gating, grouped
heads, tied and projected embeddings) are checked against transformers itself: its attention interface is
replaced, everything else is its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.makers.checkpoints import RandomCheckpoint, llama, opt, opt_350m
from support.makers.weight_files import load_tensors
from support.oracles.official import official_forward

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 97, 9, 3, 2, 38, 46, 26, 43]])


def dijiang_interface(module: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> tuple[Any, None]:
    """What transformers calls between the projections: [B, H, T, d] thrice -> [B, T, H, d]."""
    p = module.dijiang
    if p["undo_scale"]:
        q = q / module.scaling
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    length = q.shape[2]
    q = torch.softmax(q @ p["proj_matrix"], -1) * p["D1"][:, :, :length]
    k = torch.softmax(k @ p["proj_matrix"], -1) * p["D2"][:, :, :length]
    out = ((q @ k.transpose(2, 3)).tril() @ v).transpose(1, 2)
    rows = out.reshape(-1, p["W_G"].shape[1])
    rows = F.group_norm(rows, q.shape[3], p["group_norm.weight"], p["group_norm.bias"])
    return (F.silu(p["x"] @ p["W_G"]) * rows.view(*out.shape[:2], -1)).view(out.shape), None


def transformers_logits(folder: Path, family: str) -> torch.Tensor:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("dijiang-test", dijiang_interface)
    config = transformers.AutoConfig.from_pretrained(folder)
    config._attn_implementation = "dijiang-test"
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    model.set_attn_implementation("dijiang-test")
    stored = {name: value.double() for name, value in load_tensors(folder).items()}
    attention = {name: value for name, value in stored.items() if name.split(".")[-1] in PARAMETERS
                 or ".group_norm." in name}  # fmt: skip
    left = model.load_state_dict({n: v for n, v in stored.items() if n not in attention}, strict=False)
    assert left.unexpected_keys == []
    assert set(left.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()

    def remember(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        module.dijiang["x"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.dijiang = {
                n.removeprefix(f"{name}."): v for n, v in attention.items() if n.startswith(name)
            }
            module.dijiang["undo_scale"] = family == "opt"
            module.register_forward_pre_hook(remember, with_kwargs=True)
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


PARAMETERS = ("proj_matrix", "W_G", "D1", "D2")


@pytest.mark.parametrize(
    "made",
    [
        llama(kv_heads=2).with_config(attention_bias=True, mlp_bias=True).with_trained_decay(),
        llama(head_dim=32).with_config(tie_word_embeddings=True, rope_scaling={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}),
        llama().with_rope(scaling={"rope_type": "linear", "factor": 2.0}),
        opt().with_trained_decay(),
        opt_350m(embedding=48),
        opt().with_config(tie_word_embeddings=False, enable_bias=False),
    ],
)  # fmt: skip
def test_oracle_equals_transformers(made: RandomCheckpoint, tmp_path: Path) -> None:
    folder = made.save(tmp_path / "m")
    ours = official_forward(load_tensors(folder), made.config, IDS)
    theirs = transformers_logits(folder, made.family)
    assert float((ours - theirs).abs().max() / theirs.std()) < 1e-6
