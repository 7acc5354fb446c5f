"""OpenVINO behind the Runner protocol: against NumPy, in every way that tokens can be fed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.makers.toy_bundle import SPEC, ToyModel, make_bundle, write_manifest

from dijiang_engines import doctor
from dijiang_engines.errors import BundleError, PositionError, RunnerError, UsageError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.runners import open_runner, registry
from dijiang_engines.runners.base import HasNotes, HasSettings, Runner, WarmsUp
from dijiang_engines.runners.openvino import config, library
from dijiang_engines.runners.openvino.runner import OvRunner
from dijiang_export.cli import main

if importlib.util.find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)
openvino = library.openvino_module()
Toy = tuple[Path, ToyModel]
A = np.array
REPLACED = "was replaced or changed while it was open"


def runner_of(folder: Path, **options: Any) -> OvRunner:
    runner = open_runner(open_bundle(folder), "openvino-cpu", **({"threads": 1} | options))
    assert isinstance(runner, OvRunner)
    return runner


def close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(np.std(expected))))


def test_is_a_runner(toy: Toy) -> None:
    runner = runner_of(toy[0])
    assert all(isinstance(runner, kind) for kind in (Runner, WarmsUp, HasSettings, HasNotes))
    assert (runner.name, runner.spec, runner.all_logits) == ("openvino-cpu", SPEC, False)
    assert open_runner(open_bundle(toy[0]), "openvino").name == "openvino-cpu"
    assert runner.notes() == []


def test_threads_that_share_a_runner(toy: Toy) -> None:
    folder, model = toy
    runner = runner_of(folder)
    wrong: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for _ in range(5):
                state, tokens = runner.new_state(1), [first, first + 1]
                runner.prefill(A([tokens]), A([0]), A([2]), state)
                for token in range(first, first + 5):
                    logits = runner.step(A([[token]]), A([len(tokens)]), A([1]), state)
                    tokens.append(token)
                    close(logits[0, 0], model.logits(tokens))
        except BaseException as error:  # noqa: BLE001 - for the main thread
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(10 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- what is compiled --------------------------------------------------------------------------------------


def step_of(runner: OvRunner, batch: int) -> None:
    runner.step(A([[5]] * batch), A([0] * batch), A([1] * batch), runner.new_state(batch))


def test_graphs_are_compiled_when_needed(toy: Toy) -> None:
    runner = runner_of(toy[0], fixed_batches=2)
    assert runner.models.loaded == ()
    for batch in (3, 1, 2, 3, 5):
        step_of(runner, batch)
    assert runner.models.loaded == (("step", 3), ("step", 1), ("step", 0))
    runner.warm_up(prefill=True, step=False)
    assert runner.models.loaded[3:] == (("prefill", 0),)


def test_the_step_of_the_newest_state_is_warmed_up(toy: Toy) -> None:
    runner = runner_of(toy[0])
    runner.new_state(3)
    runner.warm_up()
    assert set(runner.models.loaded) == {("prefill", 0), ("step", 3)}


def test_steps_of_their_own_yield_to_scarce_memory(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (toy[0] / "weights.data").stat().st_size
    for free, expected in ((1e12, 4), (float("inf"), 4), (8.5 * size, 2), (3.5 * size, 0)):
        monkeypatch.setattr(config, "available_memory", lambda free=free: free)
        assert runner_of(toy[0]).config.fixed_batches == expected
        assert runner_of(toy[0], fixed_batches=1).config.fixed_batches == 1


def test_what_openvino_is_told(toy: Toy) -> None:
    runner = runner_of(toy[0], threads=2)
    runner.warm_up()
    for compiled in (runner.models.prefill(), runner.models.step(1)):
        assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
        assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 2
        assert compiled.get_property("ENABLE_CPU_PINNING") is False
    assert runner.settings() == {"threads": 2, "fixed_batches": 4, "precision": "float32"}


def test_half_precision_is_noted(toy: Toy) -> None:
    write_manifest(toy[0], SPEC, dtype="float16")
    assert "computes in float32: the float16 weights" in runner_of(toy[0]).notes()[0]


# -- what is refused ---------------------------------------------------------------------------------------


def test_bad_calls(toy: Toy) -> None:
    runner = runner_of(toy[0])
    with pytest.raises(RunnerError, match="token id"):
        runner.prefill(A([[260]]), A([0]), A([1]), runner.new_state(1))
    with pytest.raises(RunnerError, match="do not fit the state"):
        runner.prefill(A([[1], [2]]), A([0]), A([1]), runner.new_state(1))
    with pytest.raises(RunnerError, match="one token"):
        runner.step(A([[1, 2]]), A([0]), A([2]), runner.new_state(1))
    assert runner.models.loaded == ()


def test_foreign_states_are_refused(toy: Toy) -> None:
    one, two = runner_of(toy[0]), runner_of(toy[0])
    for call in ("step", "prefill"):
        with pytest.raises(RunnerError, match="belongs to the runner"):
            getattr(two, call)(A([[1]]), A([0]), A([1]), one.new_state(1))
    for call in (two.export_state, lambda state: two.reset_rows(state, [0])):
        with pytest.raises(RunnerError, match="belongs to the runner"):
            call(one.new_state(1))
    with pytest.raises(RunnerError, match="another shape"):
        one.import_state([np.zeros((1, 2, 4, 5), np.float32)] * 2)
    with pytest.raises(RunnerError, match="at least one sequence"):
        one.new_state(0)


def test_past_a_trained_table(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", decay="tables", decay_rows=10)
    runner = runner_of(tmp_path / "b")
    state = runner.new_state(2)
    runner.prefill(A([[1] * 10, [1] * 10]), A([0, 0]), A([10, 10]), state)
    with pytest.raises(PositionError, match="row 1"):
        runner.step(A([[1], [1]]), A([10, 10]), A([0, 1]), state)


def test_bad_options(toy: Toy) -> None:
    bundle = open_bundle(toy[0])
    with pytest.raises(UsageError, match="number of threads must be at least 1"):
        OvRunner(bundle, threads=0)
    with pytest.raises(UsageError, match="fixed batches must be at least 0"):
        OvRunner(bundle, fixed_batches=-1)
    for option, value in (("spinning", "off"), ("prepack", "none"), ("device", 0)):
        with pytest.raises(UsageError, match=f"the runner openvino-cpu has no option '{option}'"):
            open_runner(bundle, "openvino-cpu", **{option: value})


def test_a_device_that_is_not_here(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    if any(device.startswith("GPU") for device in openvino.Core().available_devices):
        pytest.skip("this machine has one")
    with pytest.raises(RunnerError, match="finds no GPU on this machine") as caught:
        open_runner(open_bundle(toy[0]), "openvino-gpu")
    assert (caught.value.got, caught.value.hint) == ("CPU", "--runner openvino-cpu")
    assert main(["generate", str(toy[0]), "-p", "a", "--runner", "openvino-gpu"]) == 1
    assert capsys.readouterr().err.count("OpenVINO finds no GPU") == 1


def test_devices_by_number() -> None:
    class Two:
        available_devices = ("CPU", "GPU.0", "GPU.1")

    for name in config.DEVICES:
        library.check_device(Two(), name)


def test_openvino_is_absent(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(RunnerError, match="openvino is not installed") as caught:
        runner_of(toy[0])
    assert "pip install 'dijiang-export[openvino]'" in str(caught.value)


def test_a_graph_that_openvino_cannot_load(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    graph = onnx.load(toy[0] / "step.onnx", load_external_data=False)
    cast = next(node for node in graph.graph.node if node.op_type == "Cast")
    cast.attribute[0].i = onnx.TensorProto.INT64  # for a product with float32
    (toy[0] / "step.onnx").write_bytes(graph.SerializeToString())
    write_manifest(toy[0], SPEC)
    runner = runner_of(toy[0])
    with pytest.raises(RunnerError, match=r"OpenVINO cannot load .*step\.onnx") as caught:
        step_of(runner, 1)
    assert str(toy[0]) in caught.value.what and "/proc/self" not in str(caught.value)
    assert caught.value.got
    assert capfd.readouterr() == ("", "")


# -- files that change -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["rename", "copy"])
def test_a_bundle_that_is_replaced_before_its_step(toy: Toy, tmp_path: Path, way: str) -> None:
    folder, model = toy
    make_bundle(tmp_path / "other", seed=7)
    runner = runner_of(folder)
    state = runner.new_state(1)
    runner.prefill(A([[5, 6]]), A([0]), A([2]), state)
    if way == "rename":  # what was opened is still there, and is what is read
        folder.rename(tmp_path / "old")
        (tmp_path / "other").rename(folder)
        close(runner.step(A([[7]]), A([2]), A([1]), state)[0, 0], model.logits([5, 6, 7]))
        return
    for file in (tmp_path / "other").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BundleError, match=REPLACED):
        runner.step(A([[7]]), A([2]), A([1]), state)


def test_weights_that_are_written_to_while_they_run(toy: Toy) -> None:
    """OpenVINO maps the file: from then on nothing may be believed."""
    runner = runner_of(toy[0])
    state = runner.new_state(1)
    runner.step(A([[5]]), A([0]), A([1]), state)
    runner.prefill(A([[5]]), A([1]), A([1]), state)
    with (toy[0] / "weights.data").open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))
    for call in (runner.step, runner.prefill):
        with pytest.raises(BundleError, match=REPLACED) as caught:
            call(A([[5]]), A([1]), A([1]), state)
        assert caught.value.got == "weights.data"


# -- around it ---------------------------------------------------------------------------------------------


def test_auto_takes_openvino_where_onnx_runtime_cannot(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "cuda_devices", lambda: 0)
    assert open_runner(open_bundle(toy[0])).name == "onnxruntime-cpu"
    write_manifest(toy[0], SPEC, dtype="bfloat16")
    assert open_runner(open_bundle(toy[0])).name == "openvino-cpu"
    write_manifest(toy[0], SPEC)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert open_runner(open_bundle(toy[0])).name == "openvino-cpu"


def test_doctor_tries_it(monkeypatch: pytest.MonkeyPatch) -> None:
    works, detail = doctor.probe_in_subprocess("openvino-cpu")
    assert works and detail.startswith("ran a one-node model on ")
    found = {one.name: one for one in doctor._openvino(lambda name: (name.endswith("cpu"), "no GPU: CPU"))}
    assert found["openvino-cpu"].works and found["openvino-cpu"].version
    assert not found["openvino-gpu"].works and found["openvino-gpu"].hint is None
    monkeypatch.setattr(doctor, "package_version", lambda _: None)
    (absent,) = doctor._openvino(lambda name: (True, ""))
    assert absent.hint == "pip install 'dijiang-export[openvino]'"


def test_generate_uses_it(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for runner in ("openvino-cpu", "onnxruntime-cpu"):
        command = ["generate", str(toy[0]), "-p", "ab", "-p", "xyz", "-n", "6", "--json", "--runner", runner]
        assert main([*command, "--threads", "1"]) == 0
        texts.append([one["text"] for one in json.loads(capsys.readouterr().out)["completions"]])
    assert texts[0] == texts[1]


WATCHED = """
import sys
def seen(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "subprocess.", "os.exec", "os.posix_spawn")):
        print("seen", event, arguments)
sys.addaudithook(seen)
"""
GENERATE = """
from dijiang_export.cli import main
code = main(["generate", sys.argv[1], "-p", "ab", "-n", "2", "--runner", "openvino-cpu", "-q", "--json"])
print("code", code, "openvino" in sys.modules, "openvino_telemetry" in sys.modules)
"""


def watched(toy: Toy, home: Path, code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED + code, str(toy[0])],
        capture_output=True, text=True, check=True, timeout=120,
        env={name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(home)},
    )  # fmt: skip
    return done.stdout.splitlines()


def test_nothing_is_sent_anywhere(toy: Toy, tmp_path: Path) -> None:
    """`import openvino` alone sends a report of its use, and writes to the home folder."""
    home = tmp_path / "home"
    home.mkdir()
    lines = watched(toy, home, GENERATE)
    assert lines[-1] == "code 0 True False"
    assert [line for line in lines if line.startswith("seen")] == []
    assert list(home.iterdir()) == []


def test_a_process_that_has_telemetry_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry = types.ModuleType("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", telemetry)
    assert library.openvino_module() is openvino
    assert sys.modules["openvino_telemetry"] is telemetry
