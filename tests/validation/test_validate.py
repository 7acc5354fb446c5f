"""validate.py and replay.py on a runner whose faults are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.fakes.runner import ToyRunner, toy_case, write_reference
from support.makers.toy_bundle import SPEC, ToyModel
from support.oracles.numpy_runner import NumpyRunner

from dijiang_engines.errors import UsageError, ValidationMismatch
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.formats.reference_cases import Reference
from dijiang_engines.runners.base import Runner
from dijiang_engines.validation import replay
from dijiang_engines.validation.replay import REPLAYS
from dijiang_engines.validation.validate import MAX_FAILURES, Report, validate

MODEL = ToyModel.random(SPEC)
ALL = tuple(REPLAYS)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    path = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    cases = {"short": toy_case(MODEL, [13, 7, 1], [0, 0, 0]), "far": toy_case(MODEL, [5, 5], [40, 3], seed=1)}
    return Reference(write_reference(path, cases), SPEC)


@pytest.fixture(params=[False, True], ids=["last", "all"])
def runner(request: pytest.FixtureRequest) -> ToyRunner:
    return ToyRunner(MODEL, all_logits=request.param)


def failed_replays(report: Report) -> set[str]:
    return {result.replay for result in report.results if not result.passed}


def test_a_right_runner_passes_every_replay(runner: ToyRunner, reference: Reference) -> None:
    assert isinstance(runner, Runner)
    report = validate(runner, reference)
    assert report.passed
    report.raise_on_mismatch()
    assert [(r.case, r.replay) for r in report.results] == [(c, w) for c in ("short", "far") for w in ALL]
    for result in report.results:
        assert result.checks >= 5
        assert result.logits_error is not None
        assert result.logits_error <= 1e-4
        assert result.state_error is not None
        assert result.top1 == 1
        assert (result.padding_error is not None) == (result.replay in ("alone", "padding"))
    # Every mark of every row is compared, also where marks coincide.
    steps = next(r for r in report.results if r.replay == "steps" and r.case == "short")
    states, marks, layers, rows = 2, 4, SPEC.num_layers, 3
    calls, kept = 13 + 1, layers * rows
    assert steps.checks == rows * (marks + states * layers) + calls + kept


def test_all_logits_compares_every_mark_of_a_prefill(reference: Reference) -> None:
    counts = [
        validate(ToyRunner(MODEL, all_logits=every), reference, cases=["short"], replays=["prefill"]).results[
            0
        ]
        for every in (False, True)
    ]
    assert counts[1].checks - counts[0].checks == 3 * 3


def test_cases_and_replays_can_be_chosen(reference: Reference) -> None:
    runner = ToyRunner(MODEL)
    report = validate(runner, reference, cases=["far"], replays=["steps", "prefill"])
    assert [(r.case, r.replay) for r in report.results] == [("far", "prefill"), ("far", "steps")]
    assert runner.calls.count("prefill") == 1
    assert runner.calls.count("step") == 6
    with pytest.raises(UsageError, match="no recorded case 'near'") as info:
        validate(runner, reference, cases=["near"])
    assert info.value.exit_code == 2
    with pytest.raises(UsageError, match="no replay 'backwards'"):
        validate(runner, reference, replays=["backwards"])


def test_nothing_compared_is_no_pass(reference: Reference) -> None:
    for report in (
        validate(ToyRunner(MODEL), reference, cases=[]),
        validate(ToyRunner(MODEL), reference, replays=[]),
    ):
        assert not report.passed
        with pytest.raises(ValidationMismatch, match="nothing was compared"):
            report.raise_on_mismatch()


def swap_states(_name: str, a: dict) -> None:
    a[0][...], a[1][...] = a[1].copy(), a[0].copy()


def nan_in_padding(_name: str, a: dict) -> None:
    if a["logits"].shape[1] > 1:
        for row, count in enumerate(a["seq_lens"]):
            a["logits"][row, count:] = np.nan
    else:
        a["logits"][a["seq_lens"] == 0] = np.nan


def nan_state(_name: str, a: dict) -> None:
    a[1][0, 0, 0, 0] = np.nan
    a["logits"][0] = np.nan


def touch_finished(_name: str, a: dict) -> None:
    a[1][a["seq_lens"] == 0] *= np.float32(1 + 1e-6)


def small_logit_error(_name: str, a: dict) -> None:
    a["logits"] += np.float32(2e-4 * 3) * np.sin(np.arange(a["logits"].shape[-1]))


def forget_state(_name: str, a: dict) -> None:
    for layer in range(2):
        a[layer][...] -= a["old"][layer] * (a["seq_lens"] > 0)[:, None, None, None]


def step_only(fault):
    return lambda name, a: fault(name, a) if name == "step" else None


def leak(_name: str, a: dict) -> None:
    """One padded token a row gets into the state."""
    length = a["ids"].shape[1]
    for row, count in enumerate(a["seq_lens"]):
        if 0 < count < length:
            a[1][row] += MODEL.states(a["ids"][row, count : count + 1])[0] * 1e-2


@pytest.mark.parametrize(
    ("fault", "failing", "quantity", "layer"),
    [
        (swap_states, set(ALL), "state", 0),
        (nan_state, set(ALL), "finite", 1),
        (small_logit_error, set(ALL), "logits", None),
        (nan_in_padding, {"pieces", "steps", "resume"}, "finite", None),
        (touch_finished, {"pieces", "steps", "resume"}, "kept", 1),
        (forget_state, {"pieces", "steps", "resume"}, "state", 0),
        (step_only(swap_states), {"steps", "resume"}, "state", 0),
        (leak, {"prefill", "pieces", "alone", "padding", "resume"}, "state", 1),
    ],
    ids=["swap", "nan", "logits", "nan-in-padding", "finished", "forget", "step-graph", "leak"],
)
def test_a_fault_is_found_where_it_is(
    fault, failing: set[str], quantity: str, layer: int | None, reference: Reference
) -> None:
    runner = ToyRunner(MODEL)
    runner.tamper = fault
    report = validate(runner, reference, cases=["short"])
    assert failed_replays(report) == failing
    first = report.first_failure
    assert first is not None
    assert first.quantity == quantity
    assert first.layer == layer
    with pytest.raises(ValidationMismatch) as info:
        report.raise_on_mismatch()
    assert info.value.exit_code == 1
    assert f"row {first.row} after {first.tokens} tokens" in str(info.value)
    if layer is not None:
        assert f"layer {layer}" in str(info.value)


def test_nan_in_the_padding_of_all_logits_is_found(reference: Reference) -> None:
    runner = ToyRunner(MODEL, all_logits=True)
    runner.tamper = nan_in_padding
    report = validate(runner, reference, cases=["short"], replays=["prefill", "padding"])
    assert failed_replays(report) == {"prefill", "padding"}


def test_the_first_failure_is_the_earliest_token_and_layer(reference: Reference) -> None:
    runner = ToyRunner(MODEL)

    def late(name: str, a: dict) -> None:
        if name == "step" and a["positions"][1] == 6:  # row 1's last token
            a[1][1] += 1
            a["logits"][1] += 1

    runner.tamper = late
    report = validate(runner, reference, cases=["short"], replays=["steps"])
    first = report.first_failure
    assert first is not None
    assert (first.row, first.tokens, first.layer, first.quantity) == (1, 7, 1, "state")
    assert report.results[0].failed == 2


def test_wrong_shapes_are_a_mismatch_not_a_crash(reference: Reference) -> None:
    class Misshapen(ToyRunner):
        def _run(self, *args) -> np.ndarray:
            return super()._run(*args)[:, :, :-1]

    report = validate(Misshapen(MODEL), reference)
    assert failed_replays(report) == set(ALL)
    assert report.first_failure is not None
    assert report.first_failure.comparison.reason == "shape is [3, 1, 259], expected [3, 1, 260]"


@pytest.mark.parametrize("key", ["logits", "state.1"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_record_that_is_not_finite_fails_by_itself(tmp_path: Path, key: str, value: float) -> None:
    case = toy_case(MODEL, [6, 3], [0, 0])
    case[key][1, 1].reshape(-1)[5] = value
    reference = Reference(write_reference(tmp_path / "r.safetensors", {"short": case}), SPEC)
    runner = ToyRunner(MODEL)
    report = validate(runner, reference)
    assert not report.passed
    assert runner.calls == []
    first = report.first_failure
    assert first is not None
    assert (first.quantity, first.row) == ("reference", 1)
    with pytest.raises(ValidationMismatch, match="the record") as info:
        report.raise_on_mismatch()
    assert "corrupt" in str(info.value.hint)


@pytest.mark.parametrize("key", ["logits", "state.0"])
def test_a_record_with_other_values_fails(tmp_path: Path, key: str) -> None:
    case = toy_case(MODEL, [6, 3], [0, 0])
    case[key][0, 1] *= 1.01
    reference = Reference(write_reference(tmp_path / "r.safetensors", {"short": case}), SPEC)
    assert not validate(ToyRunner(MODEL), reference).passed


def test_another_dtype_chooses_other_tolerances(reference: Reference) -> None:
    runner = ToyRunner(MODEL)
    runner.tamper = small_logit_error
    assert not validate(runner, reference, dtype="float32").passed
    assert validate(runner, reference, dtype="float16").passed


def single(case: dict[str, np.ndarray], marks: list[int], state_marks: list[int]) -> dict[str, np.ndarray]:
    """One row's case with marks of one's own, from the model's closed form."""
    ids = case["input_ids"][0]
    logits = [MODEL.logits(ids[:mark]) for mark in marks]
    case = case | {"marks": np.array([marks]), "state_marks": np.array(state_marks)}
    case["logits"] = np.array([logits], np.float32)
    for layer in range(SPEC.num_layers):
        states = [MODEL.states(ids[: marks[m]])[layer] for m in state_marks]
        case[f"state.{layer}"] = np.array([states], np.float32)
    return case


@pytest.fixture(scope="module")
def long_reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    marks = [1, 20, 100, 130, 700, 900, 1300]
    case = single(toy_case(MODEL, [1300], [0]), marks, [2, 6])
    path = tmp_path_factory.mktemp("long") / "reference.safetensors"
    return Reference(write_reference(path, {"drift": case}), SPEC)


def test_a_long_case_goes_through_pieces_and_steps_only(long_reference: Reference) -> None:
    runner = ToyRunner(MODEL)
    lengths: list[int] = []
    runner.tamper = lambda name, a: lengths.append(a["ids"].shape[1])
    report = validate(runner, long_reference)
    assert report.passed
    assert [r.replay for r in report.results] == ["pieces", "steps"]
    assert {s.replay for s in report.skipped} == set(ALL) - {"pieces", "steps"}
    assert max(lengths) == replay.PIECE_TOKENS
    assert runner.calls.count("step") == 1300 + 1
    assert report.left_out[0].startswith("drift: no prefill, alone, padding, resume: it would take 1300")
    assert {s["replay"] for s in report.to_json()["skipped"]} == {s.replay for s in report.skipped}
    for result in report.results:  # nothing is skipped inside of what is replayed
        assert [p.tokens for p in result.per_position] == [1, 20, 100, 130, 700, 900, 1300]
    only = validate(ToyRunner(MODEL), long_reference, replays=["alone"])
    with pytest.raises(ValidationMismatch, match="nothing was compared") as info:
        only.raise_on_mismatch()
    assert "1300 tokens in one call" in str(info.value)


@pytest.mark.parametrize("grows", [False, True])
def test_drift_is_said_in_words(grows: bool, long_reference: Reference) -> None:
    runner = ToyRunner(MODEL)

    def err(_name: str, a: dict) -> None:
        done = int(a["positions"][0] + a["seq_lens"][0])
        a["logits"] += np.float32(1e-3) * (done / 1000 if grows else 1) * np.sin(np.arange(260) + done)

    runner.tamper = err
    report = validate(runner, long_reference, dtype="float16", replays=["steps"])
    logits = next(d for d in report.drift if d.quantity == "logits")
    assert logits.grows == grows
    assert (logits.case, logits.replay, logits.tokens) == ("drift", "steps", 1300)
    assert ("error grows" if grows else "error does not grow") in logits.sentence
    assert any(d["sentence"] == logits.sentence for d in report.to_json()["drift"])


def test_short_cases_say_nothing_about_drift(reference: Reference) -> None:
    assert validate(ToyRunner(MODEL), reference).drift == ()


@pytest.mark.parametrize("most", [1, 2])
def test_a_runner_for_few_rows_gets_few_rows(most: int, reference: Reference) -> None:
    runner = ToyRunner(MODEL)
    runner.max_batch = most  # type: ignore[attr-defined]
    sizes: list[int] = []
    runner.tamper = lambda name, a: sizes.append(len(a["ids"]))
    whole = validate(ToyRunner(MODEL), reference)
    report = validate(runner, reference)
    assert report.passed
    assert max(sizes) == most
    for a, b in zip(whole.results, report.results, strict=True):
        assert [p.tokens for p in a.per_position] == [p.tokens for p in b.per_position]

    def third(name: str, a: dict) -> None:  # short's last row has one token
        a["logits"][a["seq_lens"] == 1] += 1

    runner.tamper = third
    first = validate(runner, reference, cases=["short"], replays=["prefill"]).first_failure
    assert first is not None
    assert (first.row, first.tokens) == (2, 1)


def test_errors_are_kept_by_layer_and_by_position(reference: Reference) -> None:
    runner = ToyRunner(MODEL)

    def late(name: str, a: dict) -> None:  # row 0 from its 12th token on, layer 1
        if name == "step" and a["seq_lens"][0] and a["positions"][0] >= 11:
            a[1][0] *= np.float32(1.001)

    runner.tamper = late
    result = validate(runner, reference, cases=["short"], replays=["steps"]).results[0]
    errors = {point.layer: point for point in result.per_layer}
    assert set(errors) == {0, 1}
    assert errors[0].state_error is not None and errors[0].state_error < 1e-5
    assert errors[0].failed == 0
    assert errors[1].state_error == pytest.approx(0.002, rel=0.6)
    assert errors[1].failed == 1
    positions = {point.tokens: point for point in result.per_position}
    assert set(positions) == {1, 2, 4, 6, 7, 12, 13}
    assert positions[13].state_error == errors[1].state_error == result.state_error
    assert positions[13].failed >= 1
    assert all(p.failed == 0 for n, p in positions.items() if n < 12)
    assert positions[2].state_error is not None and positions[12].state_error is None  # kept there or not
    assert all(p.top1 is not None and 0 <= p.top1 <= 1 for p in result.per_position)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_by_layer_row_and_token(value: float, reference: Reference) -> None:
    runner = ToyRunner(MODEL)

    def fault(name: str, a: dict) -> None:  # as in a model: logits follow from the state
        if name == "step" and a["seq_lens"][1] and a["positions"][1] == 4:
            a[1][1, 0, 2, 3] = value
        a["logits"][~np.isfinite(a[1]).all((1, 2, 3))] = np.nan

    runner.tamper = fault
    report = validate(runner, reference, cases=["short"], replays=["steps"])
    with pytest.raises(ValidationMismatch) as info:
        report.raise_on_mismatch()
    message = str(info.value)
    assert "NaN or infinity in the logits and in the state of layer 1, row 1 after 5 tokens" in message
    assert "while that of layer 0 is: it began between the two" in message
    layers = {point.layer: point.failed for point in report.results[0].per_layer}
    assert layers[0] == 0 and layers[1] > 0
    json.dumps(report.to_json(), allow_nan=False)


def test_a_state_that_is_not_finite_is_found_without_the_logits(reference: Reference) -> None:
    runner = ToyRunner(MODEL)

    def fault(_name: str, a: dict) -> None:  # with row 0's last token; its logits are as they should be
        if a["positions"][0] + a["seq_lens"][0] == 13:
            a[0][0, 1, 0, 0] = np.nan
            a["logits"][...] = np.nan_to_num(a["logits"])

    runner.tamper = fault
    for way in ALL:
        first = validate(runner, reference, cases=["short"], replays=[way]).first_failure
        assert first is not None, way
        assert (first.quantity, first.layer, first.row, first.tokens) == ("state", 0, 0, 13)
        assert "non-finite" in first.comparison.reason


@pytest.mark.parametrize("every", [False, True])
def test_the_token_of_a_bad_prefill(every: bool, reference: Reference) -> None:
    """With all logits the token is known; otherwise which tokens the call took is said."""
    runner = ToyRunner(MODEL, all_logits=every)

    def fault(_name: str, a: dict) -> None:
        a["logits"][0, min(8, a["logits"].shape[1] - 1) :] = np.nan

    runner.tamper = fault
    report = validate(runner, reference, cases=["short"], replays=["prefill"])
    first = report.first_failure
    assert first is not None
    assert (first.row, first.layer, first.tokens) == (0, None, 9 if every else 13)
    assert "began behind the last one" in first.comparison.reason
    assert ("tokens 0 to 12" in first.comparison.reason) == (not every)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layers.0.attention.qkv.bias", 0),
        ("layers.0.mlp.up.bias", 1),
        ("layers.1.attention.qkv.bias", 1),
        ("layers.1.mlp.up.bias", None),
    ],
)
def test_nan_from_a_layer_of_a_real_model(name: str, layer: int | None, exported: Callable) -> None:
    bundle, oracle = exported()
    recorded = open_bundle(bundle).reference()
    assert validate(oracle, recorded, cases=["far"]).passed
    weights = {key: value.copy() for key, value in oracle.weights.items()}
    weights[name][-1] = np.nan
    report = validate(NumpyRunner(oracle.spec, weights), recorded, cases=["far"])
    assert failed_replays(report) == set(ALL)
    first = report.first_failure
    assert first is not None
    assert (first.quantity, first.layer, first.row) == ("finite", layer, 0)


def test_the_report_as_json_and_as_a_table(reference: Reference) -> None:
    from rich.console import Console

    runner = ToyRunner(MODEL)
    runner.tamper = nan_state
    report = validate(runner, reference)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["passed"] is False
    assert data["first_failure"]["layer"] == 1
    assert len(data["failures"]) == min(MAX_FAILURES, sum(r["failed"] for r in data["results"]))
    assert data["tolerances"]["logits"]["max_error"] == 1e-4
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    console.file.close()
    text = console.export_text()
    assert text.count("FAIL") == 2 * len(ALL)
    assert "pieces" in text


def test_progress_counts_every_call_of_the_runner(reference: Reference) -> None:
    from contextlib import contextmanager

    bars: list[list[float]] = []

    @contextmanager
    def bar(description: str, total: float, unit: str):
        bars.append([total, 0])

        class Bar:
            def advance(self, amount: float = 1) -> None:
                bars[-1][1] += amount

        yield Bar()

    runner = ToyRunner(MODEL)
    validate(runner, reference, progress=bar)
    assert len(bars) == 2 * len(ALL)
    for total, done in bars:
        assert done == total
    assert sum(total for total, _ in bars) == len(runner.calls)
