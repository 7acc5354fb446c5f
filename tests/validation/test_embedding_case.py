"""The case `embedding`: every token once, and a wrong embedding row shows, whichever it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.makers.checkpoints import llama, neox, opt, opt_350m
from support.oracles.numpy_runner import NumpyRunner

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.reference_cases import EMBEDDING, Reference
from dijiang_engines.spec import ModelSpec
from dijiang_engines.validation.validate import Report, validate
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.export import cases as export_cases
from dijiang_export.export.embedding_recorder import embedding_inputs
from dijiang_export.export.record import record_cases

VOCAB = 90
MODELS = {
    "gpt_neox": neox(layers=3),
    "llama-gqa-tied": llama(layers=2, kv_heads=2).with_config(tie_word_embeddings=True),
    "opt-350m": opt_350m(positions=40, embedding=32),
    "trained-tables": neox(positions=50).with_trained_decay(),
    "few-positions": opt(positions=9).with_trained_decay(),
    "one-layer": neox(layers=1),
}
Recorded = tuple[ModelSpec, dict[str, np.ndarray], Path]


@pytest.fixture(scope="module", params=MODELS)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """The spec, the weights and a record with all cases, of which `drift` is short."""
    folder = (
        MODELS[request.param].with_config(vocab_size=VOCAB).save(tmp_path_factory.mktemp("model") / "model")
    )
    with pytest.MonkeyPatch.context() as patch, open_checkpoint(folder) as checkpoint:
        patch.setattr(export_cases, "DRIFT_TOKENS", 20)
        record_cases(checkpoint, torch.float32, folder / "reference.safetensors", "full")
        weights = {k: v.numpy() for k, v in checkpoint.load_state_dict().items()}
        return checkpoint.spec, weights, folder / "reference.safetensors"


def check(recorded: Recorded, runner: NumpyRunner, *replays: str, dtype: str = "float32") -> Report:
    reference = Reference(recorded[2], recorded[0])
    if dtype != "float32":  # other bounds; the weights are float32's, which is nearer than they need
        reference.rounding_cost = None
    return validate(runner, reference, dtype=dtype, cases=[EMBEDDING], replays=replays or None)


def test_each_token_is_read_once_and_a_right_runner_passes(recorded: Recorded) -> None:
    case = Reference(recorded[2], recorded[0]).embedding
    assert case is not None
    valid = np.arange(case.input_ids.shape[1]) < case.seq_lens[:, None]
    assert sorted(case.input_ids[valid].tolist()) == list(range(VOCAB))
    report = check(recorded, NumpyRunner(*recorded[:2]))
    assert report.passed, report.first_failure
    assert [(r.case, r.replay) for r in report.results] == [(EMBEDDING, "prefill"), (EMBEDDING, "steps")]
    assert all(r.state_error is not None and r.state_error < 1e-5 for r in report.results)
    assert report.to_json()["embedding_rows"] == {"seen": VOCAB, "total": VOCAB}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_any_row_with_the_other_sign_fails_in_any_type(recorded: Recorded, dtype: str) -> None:
    spec, weights, _ = recorded
    table = weights["embed_tokens.weight"]
    for token in np.random.default_rng(0).choice(VOCAB, 8, replace=False):
        wrong = table.copy()
        wrong[token] *= -1
        runner = NumpyRunner(spec, weights | {"embed_tokens.weight": wrong})
        first = check(recorded, runner, "prefill", dtype=dtype).first_failure
        assert first is not None, token
        tokens = first.comparison.reason.partition("the row's tokens: ")[2].split(", ")
        assert str(token) in tokens


def test_a_row_of_another_length_and_two_rows_that_changed_places_fail(recorded: Recorded) -> None:
    spec, weights, _ = recorded
    table = weights["embed_tokens.weight"]
    for i, j in ((0, VOCAB - 1), (17, 40)):
        swapped = table.copy()
        swapped[[i, j]] = swapped[[j, i]]
        assert not check(
            recorded, NumpyRunner(spec, weights | {"embed_tokens.weight": swapped}), "prefill"
        ).passed
        longer = table.copy()
        longer[i] *= 1.5  # the first norm takes it away again; the second layer sees it
        report = check(recorded, NumpyRunner(spec, weights | {"embed_tokens.weight": longer}), "prefill")
        assert report.passed == (spec.num_layers == 1)


def test_the_step_graph_is_looked_at_by_itself(recorded: Recorded) -> None:
    spec, weights, _ = recorded
    wrong = weights["embed_tokens.weight"].copy()
    wrong[5] *= -1

    class Other(NumpyRunner):
        """Its steps have another embedding."""

        def step(self, *args):  # type: ignore[no-untyped-def]
            right, self.weights["embed_tokens.weight"] = self.weights["embed_tokens.weight"], wrong
            try:
                return super().step(*args)
            finally:
                self.weights["embed_tokens.weight"] = right

    report = check(recorded, Other(spec, dict(weights)))
    assert {r.replay: r.passed for r in report.results} == {"prefill": True, "steps": False}


def test_short_cases_say_what_they_did_not_see(recorded: Recorded) -> None:
    spec, weights, path = recorded
    runner = NumpyRunner(spec, weights)
    report = validate(runner, Reference(path, spec), cases=["far"], replays=["prefill"])
    seen = report.to_json()["embedding_rows"]
    ids = load_file(path)["far.input_ids"]
    lens = load_file(path)["far.seq_lens"]
    assert seen == {"seen": len({int(i) for row, n in zip(ids, lens) for i in row[:n]}), "total": VOCAB}  # noqa: B905
    assert seen["seen"] < VOCAB
    assert "--cases full" in report.coverage[0]
    positions = report.to_json()["position_rows"]
    assert (positions is None) == (spec.position_embeddings == 0)
    if positions is not None:
        assert positions["total"] == spec.position_embeddings
        assert 0 < positions["seen"] <= 14


def test_rows_lie_where_tables_let_them_be_seen(tmp_path: Path) -> None:
    """The tables of `trained_tables` drop the token at a third of their length, in all heads."""
    folder = neox(positions=60, vocab=500).with_trained_decay().save(tmp_path / "model")
    with open_checkpoint(folder) as checkpoint:
        inputs = embedding_inputs(checkpoint)
        gain = checkpoint.tensor("layers.0.attention.gain").numpy()
    assert (gain[20] == 0).all()
    for start, length in zip(inputs.positions, inputs.seq_lens, strict=True):
        assert not start <= 20 < start + length
        assert start + length <= 60


def test_fast_decay_makes_rows_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = neox(vocab=50).save(tmp_path / "model")
    with open_checkpoint(folder) as checkpoint:
        assert embedding_inputs(checkpoint).input_ids.shape[1] == 16
        monkeypatch.setattr(
            type(checkpoint), "tensor", lambda *_: torch.log(torch.tensor([0.1, 0.5, 0.01, 1e-9]))
        )
        assert embedding_inputs(checkpoint).input_ids.shape == (25, 2)


@pytest.mark.parametrize("change", ["0", "9", "x", "", "1e0", "-1"])
def test_a_wrong_number_of_layers_is_refused(change: str, recorded: Recorded, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="embedding"):
        rewritten(recorded, tmp_path, {EMBEDDING: change})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input_ids", VOCAB), ("input_ids", -1), ("seq_lens", 0), ("seq_lens", 17), ("positions", -1),
        ("values.0", None), ("input_ids", None),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(
    key: str, value: int | None, recorded: Recorded, tmp_path: Path
) -> None:
    tensors = load_file(recorded[2])
    if value is None:
        del tensors[f"embedding.{key}"]
    else:
        tensors[f"embedding.{key}"].reshape(-1)[-1] = value
    with pytest.raises(BundleError, match="embedding"):
        rewritten(recorded, tmp_path, {}, tensors)


def test_a_record_that_is_not_finite_fails_by_itself(recorded: Recorded, tmp_path: Path) -> None:
    tensors = load_file(recorded[2])
    tensors["embedding.values.0"][1, 0, 0] = np.nan
    runner = NumpyRunner(*recorded[:2])
    report = validate(runner, rewritten(recorded, tmp_path, {}, tensors), cases=[EMBEDDING])
    first = report.first_failure
    assert first is not None and first.quantity == "reference" and first.row == 1
    assert runner.calls == []


def rewritten(
    recorded: Recorded, folder: Path, metadata: dict[str, str], tensors: dict[str, np.ndarray] | None = None
) -> Reference:
    from safetensors import safe_open

    with safe_open(recorded[2], framework="numpy") as file:
        old = file.metadata()
    path = folder / "reference.safetensors"
    save_file(tensors or load_file(recorded[2]), path, old | metadata)
    assert json.loads(old["cases"])
    return Reference(path, recorded[0])
