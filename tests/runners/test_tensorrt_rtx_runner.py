"""TensorRT for RTX in the TensorRT runner on a fake machine: contexts, kernels that are kept, refusals.

tests/support/fakes/tensorrt_rtx.py stands in for the runtime. That the plan, the kernels and the cache are
what the real one takes, only an RTX shows (`make engine-test`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fakes import cuda as fake_cuda
from support.fakes.tensorrt_rtx import FakeRtx
from support.makers.byte_tokenizer import write_tokenizer
from support.makers.engine_folders import SMALL, build, edit_manifest, tokens
from support.oracles.numpy_runner import NumpyRunner

from dijiang_engines import io_names
from dijiang_engines.errors import DijiangError, PluginError, RunnerError
from dijiang_engines.formats.atomic import OutputError
from dijiang_engines.formats.engine import open_engine
from dijiang_engines.nvidia.cuda import Cuda
from dijiang_engines.runners import open_runner
from dijiang_engines.runners.decoding import DecodeRequest
from dijiang_engines.runners.tensorrt import kernel_cache
from dijiang_engines.runners.tensorrt.kernel_cache import cache_files
from dijiang_engines.runners.tensorrt.runner import TensorRTRunner
from dijiang_engines.sampling import SamplingOptions
from dijiang_engines.validation.validate import validate
from dijiang_export.cli import main

A = np.array
Engine = Callable[..., tuple[Path, NumpyRunner, FakeRtx]]


@pytest.fixture(scope="module")
def built(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, str], Path]:
    """built(plugin, layout) -> an engine for compute capability 8.9, made once each."""
    made: dict[tuple[bool, str], Path] = {}

    def get(plugin: bool, layout: str) -> Path:
        if (plugin, layout) not in made:
            folder = tmp_path_factory.mktemp("rtx")
            options: dict[str, Any] = {"runtime": "tensorrt-rtx", "capabilities": ("8.9",), "validate": False}
            build(
                FakeRtx(folder / "machine"), exported()[0], folder / "e", recipe=SMALL | {"layout": layout},
                use_plugin=plugin, **options,
            )  # fmt: skip
            made[plugin, layout] = folder / "e"
        return made[plugin, layout]

    return get


@pytest.fixture
def engine(
    built: Callable[[bool, str], Path], exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Engine:
    """engine(plugin, layout, **machine) -> (a copy, its oracle, the machine that this process is on)."""

    def make(plugin: bool = True, layout: str = "one", **settings: Any) -> tuple[Path, NumpyRunner, FakeRtx]:
        shutil.rmtree(tmp_path / "e", ignore_errors=True)
        folder = Path(shutil.copytree(built(plugin, layout), tmp_path / "e"))
        return folder, exported()[1], FakeRtx(tmp_path / "machine", **settings).enter(monkeypatch)

    return make


def opened(folder: Path, **options: Any) -> TensorRTRunner:
    runner = open_runner(open_engine(folder), **options)
    assert isinstance(runner, TensorRTRunner)
    return runner


def cache_of(runner: TensorRTRunner) -> Any:
    assert runner.rtx is not None
    return runner.rtx.cache


def close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5 * max(1.0, float(np.std(expected))))


def run(runner: TensorRTRunner, oracle: NumpyRunner, steps: int = 2) -> None:
    """A prefill and steps of two rows, compared."""
    state, expected = runner.new_state(2), oracle.new_state(2)
    ids, lens = tokens(2, 5), A([5, 3])
    got = runner.prefill(ids, A([0, 0]), lens, state)
    close(got, oracle.prefill(ids, A([0, 0]), lens, expected))
    for n in range(steps):
        call = tokens(2, 1, n + 1), lens + n, A([1, 1])
        close(runner.step(*call, state), oracle.step(*call, expected))
    for layer, other in zip(runner.export_state(state), expected, strict=True):
        close(layer, other)


# Numbers


@pytest.mark.parametrize("plugin", [True, False])
@pytest.mark.parametrize("layout", ["one", "two"])
def test_prefill_and_steps(engine: Engine, plugin: bool, layout: str) -> None:
    folder, oracle, _ = engine(plugin, layout)
    runner = opened(folder)
    assert runner.name == "tensorrt" and runner.gpu.integers == np.int64
    run(runner, oracle)


def test_every_replay_of_the_recorded_cases(engine: Engine) -> None:
    runner = opened(engine(False)[0])
    report = validate(runner, runner.engine.reference())
    report.raise_on_mismatch()
    assert sum(result.checks for result in report.results) > 100


def test_states_of_standard_graphs_are_not_written_in_place(engine: Engine) -> None:
    """A runtime may write a state before it has read all of it; the state's own memory stays what it is."""
    folder, oracle, _ = engine(False)
    runner = opened(folder)
    states = [runner.new_state(batch) for batch in (1, 3)]
    bound = [runner.contexts.addresses(state) for state in states]
    for addresses, state in zip(bound, states, strict=True):
        pasts = [addresses[io_names.past_state(i)] for i in range(oracle.spec.num_layers)]
        presents = [addresses[io_names.present_state(i)] for i in range(oracle.spec.num_layers)]
        assert pasts == state.layers and not set(pasts) & set(presents)
    scratch = runner.memory()["state_scratch"]
    assert scratch >= runner.max_batch * oracle.spec.state_bytes
    for address in bound[1].values():  # the largest that the engine takes fits too
        assert address > 0
    full = runner.new_state(runner.max_batch)
    runner.step(tokens(6, 1), A([0] * 6), A([1] * 6), full)
    assert "state_scratch" not in opened(engine(True)[0]).memory()


def test_one_buffer_with_the_plugin(engine: Engine) -> None:
    runner = opened(engine(True)[0])
    bound = runner.contexts.addresses(runner.new_state(2))
    assert bound[io_names.past_state(0)] == bound[io_names.present_state(0)]


def test_a_step_that_cannot_be_recorded_is_run(engine: Engine) -> None:
    folder, oracle, _ = engine(False, capturable=False)
    runner = opened(folder)
    run(runner, oracle)
    state = runner.new_state(1)
    runner.step(tokens(1, 1), A([0]), A([1]), state)
    assert state.graph is None


# How kernels are compiled, and kept


def test_settings_of_contexts(engine: Engine) -> None:
    runner = opened(engine()[0])
    runner.warm_up()
    prefill, step = runner.contexts.for_prefill().config, runner.contexts.for_steps(1).config
    assert {repr(c.cuda_graph_strategy) for c in (prefill, step)} == {"CudaGraphStrategy.DISABLED"}
    assert repr(prefill.dynamic_shapes_kernel_specialization_strategy) == "Specialization.LAZY"
    assert repr(step.dynamic_shapes_kernel_specialization_strategy) == "Specialization.EAGER"
    assert prefill.cache is step.cache
    assert runner.settings() == {
        "cuda_graph": True, "kernels_kept": False, "step_kernels": "EAGER", "prefill_kernels": "LAZY",
    }  # fmt: skip


def test_kernels_are_compiled_once(engine: Engine) -> None:
    folder, oracle, _ = engine()
    first = opened(folder)
    run(first, oracle)
    compiled = cache_of(first)._cache.compiled
    assert compiled > 0 and cache_files(folder) == []
    del first  # what is compiled is written when the runner goes
    (path,) = cache_files(folder)
    assert path.name.startswith("kernels-sm89-") and open_engine(folder).made_for.runtime == "tensorrt-rtx"
    second = opened(folder)
    run(second, oracle)
    assert cache_of(second).loaded and cache_of(second)._cache.compiled == 0
    assert second.notes() == [f"{folder} was built, not validated: run `dijiang-export validate {folder}` on "
                              "this device"]  # fmt: skip
    before = path.stat().st_mtime_ns
    second.warm_up()
    del second
    assert path.stat().st_mtime_ns == before, "nothing new: nothing is written"


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    header, _, blob = data.partition(b"\n")
    changed = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "a bit": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        "noise": os.urandom(1000),
        "no line": b"x" * (1 << 18),
        "another's": json.dumps(json.loads(header) | {"made_for": {"gpu": "other"}}).encode() + b"\n" + blob,
        "deep": b"[" * 100_000 + b"\n" + blob,
    }[how]
    path.write_bytes(changed)


@pytest.mark.parametrize("how", ["empty", "cut", "a bit", "noise", "no line", "another's", "deep"])
def test_a_damaged_or_foreign_cache_is_made_anew(engine: Engine, how: str) -> None:
    folder, oracle, _ = engine()
    first = opened(folder)
    run(first, oracle)
    del first
    (path,) = cache_files(folder)
    whole = path.read_bytes()
    damaged(path, how)
    second = opened(folder)
    run(second, oracle)
    assert not cache_of(second).loaded and path.name in second.notes()[-1]
    del second
    assert path.read_bytes() == whole


def test_a_cache_that_the_runtime_refuses(engine: Engine) -> None:
    """Our own hash is right, and the runtime sees more: a driver of the same version from elsewhere, say."""
    folder, oracle, _ = engine()
    first = opened(folder)
    run(first, oracle)
    del first
    (path,) = cache_files(folder)
    header, _, blob = path.read_bytes().partition(b"\n")
    blob = blob.replace(b"13000", b"13001")
    facts = json.loads(header) | {"sha256": hashlib.sha256(blob).hexdigest()}
    path.write_bytes(json.dumps(facts).encode() + b"\n" + blob)
    second = opened(folder)
    run(second, oracle)
    assert not cache_of(second).loaded and "compiled anew" in second.notes()[-1]


@pytest.mark.parametrize("name", ["driver", "gpu", "tensorrt"])
def test_another_machine_has_another_file(engine: Engine, name: str, monkeypatch: Any) -> None:
    folder, oracle, machine = engine()
    first = opened(folder)
    run(first, oracle)
    path = cache_of(first).path
    del first
    changed = {"driver": 13010, "gpu": "NVIDIA RTX Other", "tensorrt": "1.7.1"}[name]
    machine.enter(monkeypatch, **{name: changed})
    assert (cache_of(opened(folder)).path == path) == (name == "tensorrt")


def test_a_link_is_not_followed(engine: Engine, tmp_path: Path) -> None:
    folder, oracle, _ = engine()
    first = opened(folder)
    run(first, oracle)
    path = cache_of(first).path
    del first
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    runner = opened(folder)
    run(runner, oracle)
    assert not cache_of(runner).loaded and "symbolic link" in runner.notes()[-1]


def test_a_disk_that_cannot_be_written_to(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, oracle, _ = engine()

    def refuse(path: Path) -> Any:
        raise OutputError(f"cannot write {path}", got="Read-only file system")

    monkeypatch.setattr(kernel_cache, "output_file", refuse)
    runner = opened(folder)
    run(runner, oracle)
    runner.warm_up()
    assert "compiled at every start" in runner.notes()[-1] and "Read-only file system" in runner.notes()[-1]
    run(runner, oracle)
    del runner
    assert cache_files(folder) == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(engine: Engine) -> None:
    folder, oracle, _ = engine()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        runner = opened(folder)
        run(runner, oracle)
        runner.warm_up()
        assert "compiled at every start" in runner.notes()[-1]
    finally:
        folder.chmod(0o755)


# Choosing tokens


def request() -> DecodeRequest:
    one = A([1])
    sampling = SamplingOptions()
    return DecodeRequest(one, one, one * 3, sampling=sampling, seed=0, streams=one * 0, draws=one * 0)


def test_without_the_kernels_logits_come_to_the_host(engine: Engine) -> None:
    """A standard engine needs no compiler on the device, so there may be no library of kernels."""
    runner = opened(engine(False)[0])
    assert runner.tensorrt.plugin is None and runner.tensorrt.kernels_library is None
    assert runner.start_decoding(runner.new_state(1), request()) is None


def test_without_recording_logits_come_to_the_host(engine: Engine, monkeypatch: Any) -> None:
    monkeypatch.setattr("dijiang_engines.kernels.attention.load_kernels", lambda library: object())
    runner = opened(engine(True, capturable=False)[0])
    assert runner.tensorrt.kernels_library is not None
    assert runner.start_decoding(runner.new_state(1), request()) is None


def test_generate_says_what_was_not_validated_until_it_is(engine: Engine, capfd: Any, tmp_path: Path) -> None:
    folder, _, _ = engine(False)
    write_tokenizer(tmp_path, 256)
    tokenizer = tmp_path / "tokenizer.json"
    generate = ["generate", str(folder), "--prompt", "ab", "--max-tokens", "4", "--tokenizer", str(tokenizer)]
    assert main(generate) == 0
    said = capfd.readouterr().err
    assert f"was built, not validated: run `dijiang-export validate {folder}` on this device" in said
    assert main(["validate", str(folder), "--case", "short"]) == 0  # a part is not the whole
    assert main(generate) == 0
    assert "not validated" in capfd.readouterr().err
    assert main(["validate", str(folder)]) == 0
    assert main(generate) == 0
    assert "not validated" not in capfd.readouterr().err


# Refused, with both sides named


def test_a_gpu_that_the_plan_is_not_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, machine = engine()
    machine.enter(monkeypatch, capability=[12, 0], gpu="NVIDIA RTX 5090")
    with pytest.raises(RunnerError, match="was made for other GPUs") as info:
        opened(folder)
    assert info.value.got == "NVIDIA RTX 5090, compute capability 12.0"
    assert info.value.expected == "TensorRT for RTX 1.7.1, compute capability 8.9"
    assert "--compute-capability 12.0" in str(info.value.hint)


def test_a_gpu_that_the_runtime_is_not_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the manifest says so: H100 and H200 are refused by the runtime itself."""
    folder, _, machine = engine()
    machine.enter(monkeypatch, capability=[9, 0], gpu="NVIDIA H100")
    with pytest.raises(RunnerError, match="was made for other GPUs") as info:
        opened(folder)
    assert "TensorRT for RTX does not run on this GPU" in str(info.value.hint)
    edit_manifest(folder, ("made_for", "compute_capabilities"), [90])
    with pytest.raises(RunnerError, match="TensorRT for RTX does not run on this GPU") as info:
        opened(folder)
    assert info.value.got == "compute capability 9.0" and "12.0" in str(info.value.expected)
    assert "--runtime tensorrt" in str(info.value.hint)


def test_another_version(engine: Engine) -> None:
    folder, _, _ = engine()
    edit_manifest(folder, ("made_for", "tensorrt"), "1.8.0")
    with pytest.raises(RunnerError, match="was made for another TensorRT for RTX") as info:
        opened(folder)
    assert (info.value.got, info.value.expected) == ("1.7.1", "1.8.0")


def test_a_driver_that_is_too_old(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, machine = engine()
    machine.enter(monkeypatch, driver=12080)
    with pytest.raises(RunnerError, match="NVIDIA's driver is too old for TensorRT for RTX") as info:
        opened(folder)
    assert info.value.got == "a driver for CUDA 12.8" and info.value.expected == "CUDA 13.0 or newer"


def test_a_driver_that_is_too_old_for_cuda_s_bindings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA itself answers with an error then, which is not that there is no GPU."""
    FakeRtx(tmp_path / "machine").enter(monkeypatch, count_error=35, driver=11040)
    with pytest.raises(RunnerError, match="driver is too old for this CUDA") as info:
        Cuda()
    assert info.value.got == "a driver for CUDA 11.4" and "12.6" in str(info.value.expected)
    FakeRtx(tmp_path / "machine").enter(monkeypatch, count_error=35, driver=0)
    with pytest.raises(RunnerError, match="there is no NVIDIA GPU here, or its driver is missing"):
        Cuda()


def test_a_plugin_without_this_gpu_s_architecture(engine: Engine) -> None:
    folder, _, machine = engine()
    machine.build_plugin(architectures=["sm_86"])
    with pytest.raises(PluginError) as info:
        opened(folder)
    assert "sm_89" in str(info.value.expected)


def test_another_plugin(engine: Engine) -> None:
    folder, _, _ = engine()
    edit_manifest(folder, ("made_for", "plugin_sources"), "0" * 64)
    with pytest.raises(RunnerError, match="was made for another plugin"):
        opened(folder)


def test_the_runtime_is_not_installed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, _ = engine()
    for name in ("tensorrt_rtx_bindings", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        DijiangError, match=r"was made for TensorRT for RTX 1\.7\.1: .* is not installed"
    ) as info:
        opened(folder)
    assert "[rtx]" in str(info.value.hint) and "compute capability 8.9" in str(info.value.expected)


def test_a_plan_that_the_runtime_refuses(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, machine = engine()
    machine.enter(monkeypatch, capability=[8, 6])
    edit_manifest(folder, ("made_for", "compute_capabilities"), [86])
    with pytest.raises(RunnerError, match="cannot load") as info:
        opened(folder)
    assert "not compatible with this version and GPU" in str(info.value.got)
    assert fake_cuda.settings()["capability"] == [8, 6]
