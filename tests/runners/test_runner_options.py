"""Options of runners: the one that is given to a runner that does not know it is refused, never dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.fakes.runner import toy_case, write_reference
from support.makers.engine_folders import facts, write_engine
from support.makers.toy_bundle import ToyModel

from dijiang_engines.errors import UsageError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.formats.engine import open_engine, write_engine_manifest
from dijiang_engines.machine import spinning_choice
from dijiang_engines.runners import open_runner, registry
from dijiang_engines.runners.onnxruntime.providers import CPU
from dijiang_engines.runners.onnxruntime.runner import OrtRunner
from dijiang_export.cli import main

Toy = tuple[Path, ToyModel]


@pytest.fixture
def engine(tmp_path: Path, toy: Toy) -> Path:
    """With recorded cases, which `validate` asks for first."""
    folder = write_engine(tmp_path / "toy.engine")
    write_reference(folder / "reference.safetensors", {"short": toy_case(toy[1], [5, 3], [0, 2])})
    write_engine_manifest(folder, facts() | {"reference": {"cases": ["short"]}})
    return folder


@pytest.mark.parametrize("option", ["threads", "spinning", "prepack", "optimization", "lowering"])
def test_an_engine_knows_nothing_of_onnx_runtime(engine: Path, option: str) -> None:
    with pytest.raises(UsageError, match=f"the runner tensorrt has no option '{option}'") as caught:
        open_runner(open_engine(engine), **{option: "auto" if option != "threads" else 2})
    assert caught.value.expected == "device, cuda_graph"
    assert "onnxruntime-cpu" in str(caught.value.hint)


@pytest.mark.parametrize(("option", "value"), [("device", 0), ("device", 1), ("cuda_graph", True)])
def test_a_cpu_knows_nothing_of_a_gpu(toy: Toy, option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"the runner onnxruntime-cpu has no option '{option}'") as caught:
        open_runner(open_bundle(toy[0]), "cpu", **{option: value})
    assert "it is one of onnxruntime-cuda" in str(caught.value.hint)
    assert " and tensorrt: leave it out" in str(caught.value.hint)


def test_nobody_s_option(toy: Toy, engine: Path) -> None:
    for model, name in ((open_bundle(toy[0]), "cpu"), (open_engine(engine), "auto")):
        with pytest.raises(UsageError, match="no runner has an option 'thread'") as caught:
            open_runner(model, name, thread=2)
        assert "threads" in str(caught.value.expected)


def test_what_was_not_given_is_nobody_s_business(toy: Toy) -> None:
    open_runner(open_bundle(toy[0]), "cpu", device=None, cuda_graph=None, threads=1)


def test_every_option_is_one_of_its_runner() -> None:
    """The table says what the classes take."""
    import inspect

    from dijiang_engines.runners.openvino.runner import OvRunner
    from dijiang_engines.runners.tensorrt.runner import TensorRTRunner

    taken = {
        kind: {p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY}
        for kind in (OrtRunner, OvRunner, TensorRTRunner)
    }
    assert set(registry.OPTIONS["onnxruntime-cuda"]) == taken[OrtRunner]
    assert set(registry.OPTIONS["tensorrt"]) == taken[TensorRTRunner]
    assert set(registry.OPTIONS[CPU]) == taken[OrtRunner] - {"device", "cuda_graph"}
    assert set(registry.OPTIONS["openvino-cpu"]) == taken[OvRunner]
    assert set(registry.OPTIONS["openvino-gpu"]) == taken[OvRunner] - {"threads"}
    assert tuple(registry.OPTIONS) == registry.RUNNERS


@pytest.mark.parametrize(
    "option", [("--threads", "2"), ("--prepack", "none"), ("--prepack", "auto"), ("--spinning", "off")]
)
@pytest.mark.parametrize("command", ["generate", "validate", "bench"])
def test_commands_refuse_them_for_an_engine(
    engine: Path, capsys: pytest.CaptureFixture[str], command: str, option: tuple[str, str], toy: Toy
) -> None:
    more = {"generate": ["-p", "a", "--tokenizer", str(toy[0] / "tokenizer.json")]}.get(command, [])
    assert main([command, str(engine), *more, *option]) == 2
    assert f"has no option '{option[0][2:]}'" in capsys.readouterr().err


# -- spinning ------------------------------------------------------------------------------------------------


def spins(runner: OrtRunner) -> list[str]:
    """What ONNX Runtime's sessions were told."""
    runner.warm_up()
    found = []
    for name in runner.sessions.loaded:
        options = runner.sessions.get(name).get_session_options()
        for pool in ("intra", "inter"):
            try:
                found.append(options.get_session_config_entry(f"session.{pool}_op.allow_spinning"))
            except RuntimeError:  # no such entry
                found.append("")
    return found


@pytest.mark.parametrize(
    ("environment", "given", "expected", "told"),
    [
        (None, None, "auto", ""),
        ("", None, "auto", ""),
        ("off", None, "off", "0"),
        ("on", None, "on", "1"),
        ("off", "on", "on", "1"),
        ("off", "auto", "auto", ""),
        (None, "off", "off", "0"),
        ("nonsense", "off", "off", "0"),
    ],
)
def test_spinning(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, environment: str | None, given: Any, expected: str, told: str
) -> None:
    monkeypatch.delenv("DIJIANG_SPINNING", raising=False)
    if environment is not None:
        monkeypatch.setenv("DIJIANG_SPINNING", environment)
    runner = open_runner(open_bundle(toy[0]), "cpu", spinning=given)
    assert isinstance(runner, OrtRunner)
    assert runner.config.spinning == runner.settings()["spinning"] == expected
    assert spins(runner) == [told] * 4


def test_values_that_spinning_does_not_know(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown value for spinning") as caught:
        OrtRunner(open_bundle(toy[0]), spinning="maybe")  # type: ignore[arg-type]
    assert "DIJIANG_SPINNING" not in str(caught.value)
    monkeypatch.setenv("DIJIANG_SPINNING", "yes")
    with pytest.raises(UsageError, match="in the environment variable DIJIANG_SPINNING"):
        spinning_choice(None)
    with pytest.raises(UsageError, match="DIJIANG_SPINNING"):
        OrtRunner(open_bundle(toy[0]))


def test_an_engine_does_not_mind_the_environment(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once for a machine, for whatever runs there on ONNX Runtime."""
    monkeypatch.setenv("DIJIANG_SPINNING", "off")
    registry.check_options("tensorrt", {})
    assert open_engine(engine).name == "toy"


def test_generate_spins_as_it_is_told(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    plain = OrtRunner.warm_up

    def warm_up(self: OrtRunner, prefill: bool = True, step: bool = True) -> None:
        seen.append(self.config.spinning)
        plain(self, prefill, step)

    monkeypatch.setattr(OrtRunner, "warm_up", warm_up)
    command = ["generate", str(toy[0]), "-p", "ab", "-n", "2", "--json", "--spinning", "off"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["completions"]
    assert set(seen) == {"off"}
    assert main([*command[:-1], "never"]) == 2
