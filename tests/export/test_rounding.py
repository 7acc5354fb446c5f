"""rounding.py: what is rounded, and where, against the graph's operators written out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.makers.checkpoints import neox, of_family

from dijiang_engines.op_contract import Attributes
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.export.cases import CaseInputs, choose_cases
from dijiang_export.export.rounding_recorder import RoundingRecorder
from dijiang_export.reference.attention import Decay, dijiang_attention
from dijiang_export.reference.rope import inverse_frequencies
from dijiang_export.rounding import main, rounding_errors


def by_hand(checkpoint, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    """Logits [L, V] of a one-layer model, an operator of the ONNX graph a line; r(x) is x in T."""
    spec = checkpoint.spec
    weights = checkpoint.load_state_dict(torch.float32)

    def r(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).double()

    def w(name: str) -> torch.Tensor:
        return r(weights[name])

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        y = r(x @ w(f"{name}.weight").T)
        return r(y + w(f"{name}.bias")) if f"{name}.bias" in weights else y

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        if spec.norm == "rms_norm":
            return r(
                w(f"{name}.weight") * r(x / (x.square().mean(-1, keepdim=True) + spec.norm_epsilon).sqrt())
            )
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + spec.norm_epsilon).sqrt()
        return r(centred / deviation * w(f"{name}.weight") + w(f"{name}.bias"))

    def mlp(x: torch.Tensor) -> torch.Tensor:
        up = linear("layers.0.mlp.up", x)
        if spec.gated_mlp:
            gate = linear("layers.0.mlp.gate", x)
            inner = r(r(gate * r(torch.sigmoid(gate))) * up)
        else:
            inner = r(r(up * r(r(torch.erf(r(up / 2**0.5))) + 1)) * 0.5)
        return linear("layers.0.mlp.down", inner)

    at = "layers.0.attention"
    hidden = w("embed_tokens.weight")[ids]
    x = norm("layers.0.attention_norm", hidden)
    constants = [weights[f"{at}.{name}"].double() for name in ("proj", "norm_weight", "norm_bias")]
    constants[0] = r(constants[0])
    mixed, _ = dijiang_attention(
        linear(f"{at}.qkv", x)[None], linear(f"{at}.gate", x)[None],
        torch.zeros(1, *spec.state_shape, dtype=torch.float64), torch.tensor([0]), torch.tensor([len(ids)]),
        *constants, inverse_frequencies(spec), decay=Decay(weights[f"{at}.log_decay"].double()),
        attributes=Attributes(
            spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.rotary_dim, spec.group_norm_epsilon
        ),
        form="recurrent",
    )  # fmt: skip
    after = r(hidden + linear(f"{at}.dense", r(mixed[0])))
    source = hidden if spec.parallel_residual else after
    hidden = r(after + mlp(norm("layers.0.mlp_norm", source)))
    return linear("lm_head", norm("final_norm", hidden))


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations_are_rounded_where_the_graph_has_operators(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = of_family(family, layers=1).save(tmp_path / "model")
    marks = np.arange(1, 21)
    with open_checkpoint(folder) as checkpoint:
        ids = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, 20)
        case = CaseInputs("one", [ids], [0], marks[None], [19])
        with torch.inference_mode():
            got = RoundingRecorder(checkpoint, dtype, [case]).run()["one.logits"][0]
        expected = by_hand(checkpoint, dtype, torch.from_numpy(ids)).numpy()
    # Float64 sums in another order may fall on the other side of a rounding border, though hardly ever do.
    differs = got != expected
    assert differs.mean() < 0.02
    assert np.abs(got - expected).max() <= 4 * torch.finfo(dtype).eps * np.abs(expected).max()
    assert np.array_equal(got, torch.from_numpy(got).to(dtype).float().numpy())


def test_errors_scale_with_the_type_and_stay_inside_the_tolerances(tmp_path: Path) -> None:
    folder = neox().save(tmp_path / "model")
    with open_checkpoint(folder) as checkpoint:
        found = {t: rounding_errors(checkpoint, t, "short") for t in ("float32", "float16", "bfloat16")}
        names = [case.name for case in choose_cases(checkpoint.spec, "short")]
    for errors in found.values():
        assert [(e.case, e.quantity) for e in errors] == [(n, q) for n in names for q in ("logits", "state")]
        assert all(0 < e.share < 1 for e in errors)
        assert all(max(e.by_tokens.values()) == e.error for e in errors)
        assert all((e.kl is None) == (e.quantity == "state") for e in errors)
    for half, brain, single in zip(found["float16"], found["bfloat16"], found["float32"], strict=True):
        assert 3 < brain.error / half.error < 20  # 2^3
        assert 2**11 < half.error / single.error < 2**15  # 2^13


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    folder = neox(layers=1).save(tmp_path / "model")
    done = CliRunner().invoke(main, [str(folder), "--cases", "short", "--dtype", "float16"])
    assert done.exit_code == 0, done.output
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[1] for row in rows] == ["short", "short", "far", "far"]
    assert {row[0] for row in rows} == {"| float16"}
