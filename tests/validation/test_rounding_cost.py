"""What rounding costs a model: measured, kept with the record, read from any file, and made into bounds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.fakes.runner import ToyRunner, toy_case, write_reference
from support.makers.checkpoints import llama, neox, of_family
from support.makers.toy_bundle import SPEC, ToyModel
from support.makers.weight_files import load_tensors, save_tensors
from support.oracles.numpy_runner import NumpyRunner

from dijiang_engines.errors import BundleError, UsageError
from dijiang_engines.formats.reference_cases import Reference
from dijiang_engines.formats.rounding_cost import KEY, Cost, RoundingCost
from dijiang_engines.op_contract import T_TYPES
from dijiang_engines.validation.report.page import report_html
from dijiang_engines.validation.tolerances import Bounds, scale_of, tolerance
from dijiang_engines.validation.validate import validate
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.export.cases import choose_cases, first_tokens
from dijiang_export.export.record import record_cases

MODEL = ToyModel.random(SPEC)


def cost(error: float, layers: int = SPEC.num_layers, dtype: str = "float32") -> RoundingCost:
    square = min(error, 1e100) ** 2
    return RoundingCost(dtype, Cost(error, square, square), (Cost(error, square),) * layers)


def reference(tmp_path: Path, value: Any) -> Reference:
    """The toy's cases, with `value` as their rounding cost; None: without any."""
    path = write_reference(tmp_path / "r.safetensors", {"short": toy_case(MODEL, [9, 4], [0, 0])})
    metadata = {
        "format": "dijiang-reference", "version": "1", "compute_dtype": "float64", "cases": '["short"]',
    }  # fmt: skip
    if value is not None:
        metadata[KEY] = value if isinstance(value, str) else json.dumps(value)
    save_file(load_file(path), path, metadata)
    return Reference(path, SPEC)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = cost(3e-5)
    assert reference(tmp_path, written.to_json()).rounding_cost == written
    assert reference(tmp_path, None).rounding_cost is None


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(put("logits", "error", value=v) for v in (-1e-9, True, "1e-3", None, [], 10**400)),
        put("logits", "kl", value=-1), put("state", 1, "cosine_distance", value=-0.5),
        put("state", value=[]), put("state", value={}), put("state", 0, value=1.0), put("logits", value=3),
        put("dtype", value="int4"), put("dtype", value=["float32"]), put("version", value=2),
        put("version", value="1"), put("factor", value=100), put("logits", "reason", value="x"),
        drop("logits"), drop("logits", "error"), drop("logits", "kl"), drop("state"), drop("state", 0),
        drop("state", 1, "error"), drop("version"), drop("dtype"),
    ],
)  # fmt: skip
def test_hostile_or_broken_values_are_refused(change: Callable[[Any], None], tmp_path: Path) -> None:
    data = copy.deepcopy(cost(1e-5).to_json())
    change(data)
    with pytest.raises(BundleError, match="rounding"):
        reference(tmp_path, data)


@pytest.mark.parametrize("text", ["", "[]", "null", "NaN", "{", '{"version": 1}', "[" * 100_000])
def test_what_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        reference(tmp_path, text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(number: str, tmp_path: Path) -> None:
    text = json.dumps(cost(0.125).to_json()).replace("0.125", number)
    with pytest.raises(BundleError):
        reference(tmp_path, text)


@pytest.mark.parametrize("dtype", T_TYPES)
def test_bounds_lie_between_floor_and_ceiling(dtype: str) -> None:
    scale = scale_of(dtype)
    for quantity in ("logits", "state", "padding"):
        floor = tolerance(dtype, quantity)  # type: ignore[arg-type]
        last = floor
        for error in (0.0, 1e-9, floor.max_error / scale.factor, 1e-3, 0.1, 1e9, 1e300):
            bounds = Bounds(dtype, cost(error, dtype=dtype))
            found = bounds.widest(quantity)  # type: ignore[arg-type]
            assert floor.max_error <= last.max_error <= found.max_error <= scale.max_error
            if error <= floor.max_error / scale.factor:
                assert found.max_error == floor.max_error  # no wider than a record without a cost has
            assert found.min_cosine is not None
            assert 1 - scale.cosine_distance - 1e-12 <= found.min_cosine <= floor.min_cosine  # type: ignore[operator]
            if found.max_kl is not None:
                assert floor.max_kl <= found.max_kl <= scale.max_kl  # type: ignore[operator]
            last = found
        assert last.max_error == scale.max_error
        assert Bounds(dtype).widest(quantity) == floor  # type: ignore[arg-type]
    assert Bounds(dtype, cost(1e9, dtype=dtype)).at_ceiling
    assert not Bounds(dtype, cost(1e-9, dtype=dtype)).at_ceiling
    assert len(scale.reason) > 40
    with pytest.raises(UsageError):
        scale_of("int4")


def test_each_layer_has_a_bound_of_its_own_that_never_falls() -> None:
    layers = tuple(Cost(error, 0.0) for error in (1e-6, 1e-4, 2e-5, 3e-4))
    bounds = Bounds("float32", RoundingCost("float32", Cost(0, 0, 0), layers))
    factor = scale_of("float32").factor
    assert [bounds.state(i).max_error for i in range(4)] == [
        1e-4, factor * 1e-4, factor * 1e-4, factor * 3e-4,
    ]  # fmt: skip
    assert bounds.padding(1) == bounds.state(1).__class__(
        **{**bounds.padding(1).__dict__, "max_error": bounds.state(1).max_error}
    )
    assert bounds.padding(None).max_error == bounds.logits.max_error == 1e-4


def test_a_runner_is_judged_by_the_layer(tmp_path: Path) -> None:
    """The same error in two layers, of which one may have it."""
    layers = (Cost(1e-7, 1e-14), Cost(2e-4, 4e-8))
    known = reference(tmp_path, RoundingCost("float32", Cost(2e-4, 4e-8, 4e-8), layers).to_json())
    for layer, passes in ((0, False), (1, True)):
        runner = ToyRunner(MODEL)

        def fault(_name: str, a: dict[Any, Any], layer: int = layer) -> None:
            a[layer][...] *= np.float32(1 + 5e-4)

        runner.tamper = fault
        report = validate(runner, known, replays=["prefill"])
        failed = {p.layer for p in report.results[0].per_layer if p.failed}
        assert failed == (set() if passes else {layer})


def test_a_cost_of_another_type_is_refused(tmp_path: Path) -> None:
    known = reference(tmp_path, cost(1e-3, dtype="float16").to_json())
    with pytest.raises(BundleError, match="another type"):
        validate(ToyRunner(MODEL), known, dtype="float32")
    assert validate(ToyRunner(MODEL), known, dtype="float16").passed


def test_the_report_shows_what_was_measured_and_what_follows(tmp_path: Path) -> None:
    report = validate(ToyRunner(MODEL), reference(tmp_path, cost(1e-4).to_json()))
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    factor = scale_of("float32").factor
    assert data["tolerances"]["logits"]["max_error"] == pytest.approx(factor * 1e-4)
    assert data["tolerances_from"]["rounding_cost"] == cost(1e-4).to_json()
    assert data["tolerances_from"]["state_max_error"] == [pytest.approx(factor * 1e-4)] * SPEC.num_layers
    assert data["tolerances_from"]["at_ceiling"] is False
    page = report_html(report, [("model", "toy")])
    for text in (report.bounds.sentence, str(report.table().caption)):
        assert "1.0e-04" in text
    assert "1.0e-04 in logits" in page
    old = validate(ToyRunner(MODEL), reference(tmp_path, None))
    assert old.to_json()["tolerances_from"] is None
    assert "does not say what rounding costs" in report_html(old, [("model", "toy")])
    high = validate(ToyRunner(MODEL), reference(tmp_path, cost(1e9).to_json()))
    assert "more than the most that is allowed" in high.bounds.sentence


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "opt"])
def test_it_is_measured_when_cases_are_recorded(family: str, tmp_path: Path) -> None:
    """A float32 forward written without the exporter errs by as much, within a factor of ten."""
    folder = of_family(family, layers=3).save(tmp_path / "model")
    path = tmp_path / "reference.safetensors"
    with open_checkpoint(folder) as checkpoint:
        record_cases(checkpoint, torch.float32, path, "short")
        weights = {k: v.numpy() for k, v in checkpoint.load_state_dict().items()}
        known = Reference(path, checkpoint.spec)
    measured = known.rounding_cost
    assert measured is not None and measured.dtype == "float32" and len(measured.layers) == 3
    report = validate(NumpyRunner(known._spec, weights, np.float32), known, cases=["far"], replays=["steps"])
    assert report.passed
    (result,) = report.results
    assert result.logits_error is not None and result.state_error is not None
    assert measured.logits.error / 10 < result.logits_error < measured.logits.error * 10
    states = max(one.error for one in measured.layers)
    assert states / 10 < result.state_error < states * 10


def test_half_types_cost_more_by_their_bits(tmp_path: Path) -> None:
    folder = neox().save(tmp_path / "model")
    errors = []
    with open_checkpoint(folder) as checkpoint:
        for dtype in (torch.float16, torch.bfloat16):
            record_cases(checkpoint, dtype, tmp_path / "r", "short")
            found = Reference(tmp_path / "r", checkpoint.spec).rounding_cost
            assert found is not None and found.dtype == str(dtype).removeprefix("torch.")
            errors.append(found.logits.error)
    assert 1e-4 < errors[0] < 1e-2
    assert 3 < errors[1] / errors[0] < 20


def test_activations_that_do_not_fit_the_type_leave_the_tables_rows(tmp_path: Path) -> None:
    folder = llama(layers=1).with_config(hidden_act="relu").save(tmp_path / "model")
    tensors = load_tensors(folder)
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] *= 3000
    save_tensors(folder, tensors)
    with open_checkpoint(folder) as checkpoint:
        record_cases(checkpoint, torch.float16, tmp_path / "r", "short")
        assert Reference(tmp_path / "r", checkpoint.spec).rounding_cost is None


def test_of_long_cases_the_first_tokens_are_measured(tmp_path: Path) -> None:
    folder = neox().save(tmp_path / "model")
    with open_checkpoint(folder) as checkpoint:
        cases = choose_cases(checkpoint.spec, "full")
    for case in cases:
        cut = first_tokens(case, 1000)
        assert (cut.name != "drift") == (cut is case)
        for row, (ids, marks) in enumerate(zip(cut.input_ids, cut.marks, strict=True)):
            assert len(ids) == marks[-1] <= 1000
            assert np.array_equal(ids, case.input_ids[row][: len(ids)])
    drift = first_tokens(cases[-1], 1000)
    assert drift.marks[0].tolist() == [1, 10, 100, 250, 500, 1000]
    assert [int(drift.marks[0, mark]) for mark in drift.state_marks] == [100, 1000]
