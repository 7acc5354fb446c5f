"""validate.py and replay.py on a runner whose faults are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from toy_bundle import SPEC, ToyModel
from toy_runner import ToyRunner, toy_case, write_reference

from dijiang_engines.errors import UsageError, ValidationMismatch
from dijiang_engines.reference_cases import Reference
from dijiang_engines.replay import REPLAYS
from dijiang_engines.runners.base import Runner
from dijiang_engines.validate import MAX_FAILURES, Report, validate

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
