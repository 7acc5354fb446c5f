"""A bundle or an engine that is replaced or changed while it is open: what was opened runs, or nothing."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.fakes.runner import toy_case, write_reference
from support.makers.engine_folders import write_engine
from support.makers.toy_bundle import SPEC, ToyModel, make_bundle, write_manifest

from dijiang_engines.errors import BundleError
from dijiang_engines.formats import opened_files
from dijiang_engines.formats.atomic import _exchange, output_folder
from dijiang_engines.formats.bundle import Bundle, open_bundle
from dijiang_engines.formats.engine import open_engine
from dijiang_engines.formats.open import open_model
from dijiang_engines.formats.opened_files import OpenedFiles
from dijiang_engines.inspection import inspect_bundle
from dijiang_engines.runners.onnxruntime.runner import OrtRunner
from dijiang_engines.tokenizer.load import load_tokenizer

A = np.array
REPLACED = "was replaced or changed while it was open"
TOKENS = [5, 6, 7, 8]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path, list[ToyModel]]:
    """Two bundles that differ in their weights alone."""
    models = [make_bundle(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))]
    return tmp_path / "a", tmp_path / "b", models


def results(bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a prefill and of a step after it: two graphs, loaded one after the other."""
    runner = OrtRunner(bundle, threads=1)
    state = runner.new_state(1)
    prefill = runner.prefill(A([TOKENS[:3]]), A([0]), A([3]), state)
    return prefill[0, 0], runner.step(A([TOKENS[3:]]), A([3]), A([1]), state)[0, 0]


def made_by(model: ToyModel, found: tuple[np.ndarray, np.ndarray]) -> bool:
    expected = model.logits(TOKENS[:3]), model.logits(TOKENS)
    return all(np.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(found, expected, strict=True))


def replace_by_export(folder: Path, source: Path) -> None:
    """As `to-onnx --force` does it: a new folder takes the name in one step, and the old one is removed."""
    with output_folder(folder, force=True) as new:
        shutil.copytree(source, new, dirs_exist_ok=True)


def copy_over(folder: Path, source: Path) -> None:
    """As `cp -r source/. folder` does it."""
    for file in source.iterdir():
        shutil.copyfile(file, folder / file.name)


def rename(folder: Path, source: Path) -> None:
    folder.rename(folder.with_name("old"))
    shutil.copytree(source, folder)


Replace = Callable[[Path, Path], None]
WAYS = pytest.mark.parametrize("replace", [replace_by_export, copy_over, rename])


@WAYS
@pytest.mark.parametrize("verify", [True, False])
def test_a_bundle_that_is_replaced_before_its_step(
    two: tuple[Path, Path, list[ToyModel]], replace: Replace, verify: bool
) -> None:
    """The issue's case: the step graph is loaded by a path that leads to other weights by then."""
    folder, other, models = two
    runner = OrtRunner(open_bundle(folder, verify=verify), threads=1)
    state = runner.new_state(1)
    first = runner.prefill(A([TOKENS[:3]]), A([0]), A([3]), state)[0, 0]
    replace(folder, other)
    if replace is rename:  # the folder is still there under another name, and held
        second = runner.step(A([TOKENS[3:]]), A([3]), A([1]), state)[0, 0]
        assert made_by(models[0], (first, second))
    else:
        with pytest.raises(BundleError, match=REPLACED) as caught:
            runner.step(A([TOKENS[3:]]), A([3]), A([1]), state)
        assert str(folder) in str(caught.value) and "/proc/" not in str(caught.value)
        assert "open it again" in str(caught.value.hint)
    assert made_by(models[1], results(open_bundle(folder)))  # opened again, it is the new one


@WAYS
def test_a_bundle_that_is_replaced_before_it_is_loaded(
    two: tuple[Path, Path, list[ToyModel]], replace: Replace
) -> None:
    folder, other, models = two
    bundle = open_bundle(folder)
    replace(folder, other)
    if replace is rename:
        assert made_by(models[0], results(bundle))
    else:
        with pytest.raises(BundleError, match=REPLACED):
            results(bundle)


def test_a_loaded_bundle_outlives_its_folder(two: tuple[Path, Path, list[ToyModel]]) -> None:
    """Both sessions hold the weights: removing or replacing the folder changes nothing for them."""
    folder, other, models = two
    runner = OrtRunner(open_bundle(folder), threads=1)
    runner.warm_up()
    replace_by_export(folder, other)
    for _ in range(2):
        state = runner.new_state(1)
        first = runner.prefill(A([TOKENS[:3]]), A([0]), A([3]), state)[0, 0]
        assert made_by(models[0], (first, runner.step(A([[8]]), A([3]), A([1]), state)[0, 0]))


@pytest.mark.parametrize("prepack", ["none", "all"])
def test_weights_that_are_written_to_while_they_run(
    two: tuple[Path, Path, list[ToyModel]], prepack: str
) -> None:
    """Sessions map the file: from then on nothing may be believed."""
    folder, other, _ = two
    runner = OrtRunner(open_bundle(folder), threads=1, prepack=prepack)  # type: ignore[arg-type]
    runner.warm_up()
    state = runner.new_state(1)
    runner.step(A([[5]]), A([0]), A([1]), state)
    with (folder / "weights.data").open("r+b") as file:
        file.write((other / "weights.data").read_bytes())
    for _ in range(2):
        with pytest.raises(BundleError, match=REPLACED) as caught:
            runner.step(A([[5]]), A([1]), A([1]), state)
        assert caught.value.got == "weights.data"
        with pytest.raises(BundleError, match=REPLACED):
            runner.prefill(A([[5]]), A([1]), A([1]), state)


def test_the_same_bytes_are_the_same_file(two: tuple[Path, Path, list[ToyModel]]) -> None:
    """Touched, or exported again with the same outcome: nothing that matters has changed."""
    folder, _, models = two
    bundle = open_bundle(folder)
    for file in folder.iterdir():
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
    assert made_by(models[0], results(bundle))
    runner = OrtRunner(bundle, threads=1)
    runner.warm_up()
    os.utime(folder / "weights.data")
    runner.step(A([[5]]), A([0]), A([1]), runner.new_state(1))


@contextmanager
def swapping(folder: Path, other: Path) -> Iterator[list[int]]:
    """A thread that exchanges two folders all the time; yields how often it did."""
    count, stop = [0], threading.Event()

    def work() -> None:
        while not stop.is_set():
            assert _exchange(folder, other)
            count[0] += 1
            time.sleep(0.0005)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("below_descriptor", [True, False])
def test_a_bundle_that_is_swapped_all_the_time(
    two: tuple[Path, Path, list[ToyModel]], monkeypatch: pytest.MonkeyPatch, below_descriptor: bool
) -> None:
    """Never a mixture: what comes out is one of the two, or an error that says why."""
    folder, other, models = two
    if not below_descriptor:
        monkeypatch.setattr(OpenedFiles, "_below_descriptor", lambda self: None)  # as where there is no /proc
    seen = {"a": 0, "b": 0, "refused": 0}
    with swapping(folder, other) as swaps:
        for number in range(60):
            try:
                found = results(open_bundle(folder, verify=bool(number % 2)))
            except BundleError:
                seen["refused"] += 1
                continue
            which = [made_by(model, found) for model in models]
            assert sum(which) == 1, f"a mixture, after {swaps[0]} swaps: {seen}"
            seen["a" if which[0] else "b"] += 1
    assert swaps[0] > 50
    if below_descriptor:
        assert seen["a"] and seen["b"], seen


def test_a_bundle_that_is_exported_anew_all_the_time(two: tuple[Path, Path, list[ToyModel]]) -> None:
    """As above, but the folder that loses its name is removed, while it may be being read."""
    folder, other, models = two
    sources = [folder.with_name("source0"), other]
    shutil.copytree(folder, sources[0])
    stop = threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            replace_by_export(folder, sources[number % 2])

    thread = threading.Thread(target=work)
    thread.start()
    good = 0
    try:
        for number in range(40):
            try:
                found = results(open_bundle(folder, verify=bool(number % 2)))
            except BundleError:
                continue
            assert sum(made_by(model, found) for model in models) == 1
            good += 1
    finally:
        stop.set()
        thread.join()
    assert good


# -- everything else that is read late ----------------------------------------------------------------------


def with_cases(folder: Path, model: ToyModel) -> Path:
    write_reference(folder / "reference.safetensors", {"short": toy_case(model, [5, 3], [0, 2])})
    write_manifest(folder, SPEC)
    return folder


def test_recorded_cases_are_those_that_were_opened(two: tuple[Path, Path, list[ToyModel]]) -> None:
    folder, other, models = two
    for path, model in zip((folder, other), models, strict=True):
        with_cases(path, model)
    bundle = open_bundle(folder)
    kept = open_bundle(folder).reference().cases["short"]
    kept.logits()
    copy_over(folder, other)
    with pytest.raises(BundleError, match=REPLACED):
        bundle.reference()
    with pytest.raises(BundleError, match=REPLACED):
        kept.logits()
    with pytest.raises(BundleError, match=REPLACED):
        kept.state(0)


def test_a_tokenizer_is_the_one_that_was_opened(two: tuple[Path, Path, list[ToyModel]]) -> None:
    folder = two[0]
    bundle = open_bundle(folder)
    tokenizer = load_tokenizer(bundle)
    assert tokenizer is not None and tokenizer.encode("ab")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|endoftexT|>"))
    with pytest.raises(BundleError, match=REPLACED):
        load_tokenizer(bundle)
    make_bundle(folder.with_name("bare"), tokenizer=False)
    assert load_tokenizer(open_bundle(folder.with_name("bare"))) is None


def test_what_is_inspected_is_what_was_opened(two: tuple[Path, Path, list[ToyModel]]) -> None:
    folder, other, _ = two
    bundle = open_bundle(folder)
    inspect_bundle(bundle)
    copy_over(folder, other)
    with pytest.raises(BundleError, match=REPLACED):
        inspect_bundle(bundle)


def test_an_engine_s_plans_are_those_that_were_opened(tmp_path: Path) -> None:
    folder, other = write_engine(tmp_path / "e", "two"), write_engine(tmp_path / "f", "two")
    (other / "step.plan").write_bytes(bytes(999) + b"\2")
    engine = open_engine(folder)
    with engine.opened.unchanged(*engine.plans) as root:
        assert engine.verified_plan("step.plan") == folder / "step.plan"
        assert (root / "step.plan").read_bytes() == bytes([1]) * 1000
    shutil.copyfile(other / "step.plan", folder / "step.plan")
    with pytest.raises(BundleError, match=REPLACED), engine.opened.unchanged(*engine.plans):
        pytest.fail("not reached")


def test_a_change_inside_the_block_is_noticed(tmp_path: Path) -> None:
    """Whatever was read there may be of either state."""
    engine = open_engine(write_engine(tmp_path / "e"))
    with pytest.raises(BundleError, match=REPLACED), engine.opened.unchanged("model.plan"):
        (tmp_path / "e" / "model.plan").write_bytes(bytes([9]) * 1000)
    with pytest.raises(BundleError, match=REPLACED), engine.opened.unchanged("model.plan"):
        pytest.fail("not reached")
    with pytest.raises(BundleError, match=REPLACED):
        engine.verify()


def test_another_process_reads_by_name(two: tuple[Path, Path, list[ToyModel]]) -> None:
    """A builder's process is given the folder's name: a swap is noticed though the held folder is intact."""
    folder, other, _ = two
    bundle = open_bundle(folder)
    with bundle.opened.unchanged_by_name(*bundle.files):
        pass
    with pytest.raises(BundleError, match=REPLACED), bundle.opened.unchanged_by_name(*bundle.files):
        assert _exchange(folder, other)
    with pytest.raises(BundleError, match=REPLACED), bundle.opened.unchanged_by_name(*bundle.files):
        pytest.fail("not reached")


def test_a_failure_inside_the_block_is_explained_by_the_change(tmp_path: Path) -> None:
    def removed() -> None:
        shutil.rmtree(tmp_path / "e")
        raise RuntimeError("cannot map")

    engine = open_engine(write_engine(tmp_path / "e"))
    with pytest.raises(BundleError, match=REPLACED) as caught, engine.opened.unchanged("model.plan"):
        removed()
    assert "cannot map" in str(caught.value.__cause__)
    other = open_engine(write_engine(tmp_path / "f"))
    with pytest.raises(RuntimeError, match="cannot map"), other.opened.unchanged("model.plan"):
        raise RuntimeError("cannot map")


def test_a_file_that_goes_between_the_check_and_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block finds nothing, and what it is compared with is what was checked."""
    engine = open_engine(write_engine(tmp_path / "e"))
    checked = engine.opened.check

    def then_removed(*names: str) -> None:
        checked(*names)
        (tmp_path / "e" / "model.plan").unlink()

    monkeypatch.setattr(engine.opened, "check", then_removed)
    with (
        pytest.raises(BundleError, match=REPLACED) as caught,
        engine.opened.unchanged("model.plan") as root,
    ):
        (root / "model.plan").read_bytes()
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("times", [1, 2])
def test_a_name_that_is_swapped_faster_than_the_clock_ticks(
    two: tuple[Path, Path, list[ToyModel]], monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Where a folder can only be taken by its name, and has just been put there."""
    folder, other, _ = two
    precise = OpenedFiles._place

    def coarse(self: OpenedFiles) -> opened_files.Stamp | None:
        place = precise(self)
        return place and place._replace(changed=place.changed // 10_000_000 * 10_000_000)

    monkeypatch.setattr(OpenedFiles, "_below_descriptor", lambda self: None)
    monkeypatch.setattr(OpenedFiles, "_place", coarse)
    for _ in range(20):
        bundle = open_bundle(folder)
        assert _exchange(folder, other) and _exchange(folder, other)
        with pytest.raises(BundleError, match=REPLACED), bundle.opened.unchanged(*bundle.files):
            assert all(_exchange(folder, other) for _ in range(times))
        if times % 2:
            assert _exchange(folder, other)


def test_a_file_that_changes_while_it_is_hashed(
    two: tuple[Path, Path, list[ToyModel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other, _ = two
    hashing = opened_files.sha256_of

    def meanwhile(file, on_bytes=None):  # type: ignore[no-untyped-def]
        found = hashing(file, on_bytes)
        if Path(os.readlink(f"/proc/self/fd/{file.fileno()}")).name == "weights.data":
            shutil.copyfile(other / "weights.data", folder / "weights.data")
        return found

    monkeypatch.setattr(opened_files, "sha256_of", meanwhile)
    with pytest.raises(BundleError, match=REPLACED):
        open_bundle(folder)


def test_descriptors_are_given_back(two: tuple[Path, Path, list[ToyModel]]) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    results(open_bundle(two[0]))
    before = count()
    for _ in range(5):
        results(open_bundle(two[0]))
    assert count() <= before


def test_messages_name_the_folder(tmp_path: Path) -> None:
    """Not the descriptor through which it is read."""
    make_bundle(tmp_path / "b")
    (tmp_path / "b" / "step.onnx").unlink()
    with pytest.raises(BundleError, match="is missing") as caught:
        open_model(tmp_path / "b")
    assert str(tmp_path / "b" / "step.onnx") in str(caught.value)
    (tmp_path / "b" / "manifest.json").write_text("{")
    with pytest.raises(BundleError) as caught:
        open_model(tmp_path / "b")
    assert "/proc/" not in str(caught.value)
