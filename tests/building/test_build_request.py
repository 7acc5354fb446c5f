"""What the builder's process is asked for: all of it arrives, and nothing else is taken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from support.makers.toy_bundle import SPEC

from dijiang_engines.building.request import BuildRequest, read_request
from dijiang_engines.building.worker import rewriting
from dijiang_engines.errors import RunnerError
from dijiang_engines.weight_formats import matrices, matrix_shapes

PROFILE = {"input_ids": [[1, 1], [2, 32], [4, 64]], "positions": [[1], [2], [4]]}
REQUEST = BuildRequest(
    onnx=Path("/b/prefill.trt.onnx"), plan=Path("/e/model.plan"), plugin=Path("/p/lib.so"), dtype="float16",
    profiles=[PROFILE], workspace=256 << 20, optimization_level=3, timing_cache=None, device=0,
    plugin_products=True,
)  # fmt: skip
QUANTISED = dataclasses.replace(
    SPEC, hidden_size=64, embedding_size=64, intermediate_size=32, num_heads=4, num_kv_heads=4, head_dim=16
)
MATRICES = dict.fromkeys(matrix_shapes(QUANTISED), "int8") | {"lm_head.weight": "int4"}


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"timing_cache": Path("/c/t.cache"), "plugin_products": False}, {"step": "auto", "spec": SPEC},
        {"step": "one-launch", "spec": QUANTISED, "matrices": MATRICES},
    ],
)  # fmt: skip
def test_it_arrives_as_it_was(changes: dict[str, Any], tmp_path: Path) -> None:
    request = dataclasses.replace(REQUEST, **changes)
    request.write(tmp_path / "request.json")
    assert read_request(tmp_path / "request.json") == request


@pytest.mark.parametrize(
    ("lengths", "products", "expected"),
    [
        ((1,), True, (True, True, False)),  # a step plan
        ((64,), False, (False, False, True)),  # a prefill plan
        ((64,), True, (True, False, True)),
        ((64, 1), False, (False, False, True)),  # one plan
        ((64, 1), True, (True, True, True)),
    ],
)
def test_what_the_plugin_takes(
    lengths: tuple[int, ...], products: bool, expected: tuple[bool, bool, bool]
) -> None:
    """Float weights' products, norms, matrices whole."""
    profiles = [PROFILE | {"input_ids": [[1, 1], [1, n], [4, n]]} for n in lengths]
    request = dataclasses.replace(REQUEST, profiles=profiles, plugin_products=products)
    assert tuple(rewriting(request).values()) == expected


def test_the_most_rows_are_those_of_all_profiles() -> None:
    step = {name: [[1] * len(shape) for shape in shapes] for name, shapes in PROFILE.items()}
    assert REQUEST.most_rows == 4 * 64
    assert dataclasses.replace(REQUEST, profiles=[step]).most_rows == 1
    both = dataclasses.replace(REQUEST, profiles=[step, PROFILE])
    assert (both.most_rows, both.step_rows) == (4 * 64, 1)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(BuildRequest)])
def test_every_field_is_needed(name: str) -> None:
    data = REQUEST.to_json()
    del data[name]
    with pytest.raises(RunnerError, match="something odd"):
        BuildRequest.from_json(data)


WRONG: dict[str, list[Any]] = {
    "onnx": [None, 3, ["a"]],
    "timing_cache": [3, True],
    "dtype": ["float64", None, 16],
    "profiles": [
        [], {}, None, [{}], [[]], [{"x": []}], [{"x": [[1], [2]]}], [{"x": [[1], [2], [3, 4]]}],
        [{"x": [[2], [1], [3]]}], [{"x": [[1], [3], [2]]}], [{"x": [[0], [1], [1]]}],
        [{"x": [[1.0], [1], [1]]}], [{"x": [[True], [1], [1]]}], [{"x": [1, 1, 1]}],
        [PROFILE, {"input_ids": PROFILE["input_ids"]}],
    ],
    "workspace": [0, -1, 1.5, "1", True, None],
    "optimization_level": [-1, 6, "3", None],
    "device": [-1, 0.0, False, "0"],
    "plugin_products": [0, 1, "yes", None],
    "step": ["both", None, 1, "auto", "one-launch"],  # the last two without a model
    "matrices": [{}, MATRICES],  # without a model
    "spec": [{}, {"layers": 1}, 3, SPEC.to_json()],  # the last for a step that needs none
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in WRONG.items() for v in values])
def test_what_cannot_be_built_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RunnerError, match="something odd") as caught:
        BuildRequest.from_json(REQUEST.to_json() | {name: value})
    assert len(str(caught.value.got)) <= 200


@pytest.mark.parametrize(
    "value",
    [
        {}, [], 3, "int8", {"lm_head.weight": "int8"}, MATRICES | {"lm_head.weight": "int2"},
        MATRICES | {"lm_head.weight": 8}, MATRICES | {"more": "int8"},
    ],
)  # fmt: skip
def test_matrices_that_are_not_the_model_s_are_refused(value: Any) -> None:
    data = REQUEST.to_json() | {"step": "auto", "spec": QUANTISED.to_json(), "matrices": MATRICES}
    assert BuildRequest.from_json(data).quantised == matrices(QUANTISED, MATRICES)
    with pytest.raises(RunnerError, match="something odd: matrices"):
        BuildRequest.from_json(data | {"matrices": value})


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", json.dumps(REQUEST.to_json() | {"more": 1}), "[" * 9999]
)
def test_a_file_that_is_something_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(text)
    with pytest.raises(RunnerError):
        read_request(tmp_path / "request.json")
