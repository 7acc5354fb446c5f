"""The C++ sample given engine folders and plugins that are damaged, foreign or hostile; its JSON and hashes
beside Python's."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fakes.elf_files import elf
from support.makers.cpp_sample import (
    Make,
    compiled_fakes,
    engine_maker,
    expected,
    failed,
    generated,
    needs_compiler,
    run,
)

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.engine import open_engine
from dijiang_engines.formats.safe_files import parse_json
from dijiang_engines.plugin.elf import machine_of

pytestmark = needs_compiler


@pytest.fixture
def fakes() -> Path:
    """A folder with the program on fakes, and with plugins that are right and wrong."""
    return compiled_fakes()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes engine folders in tmp_path."""
    return engine_maker(tmp_path)


# Engine folders


@pytest.mark.parametrize("layout", ["one", "two"])
def test_plans_that_are_not_what_was_built(fakes: Path, make: Make, layout: str) -> None:
    engine = make(layout)
    plans = {"one": ["model.plan"], "two": ["prefill.plan", "step.plan"]}[layout]
    for name in plans:
        whole = (engine / name).read_bytes()
        for content, message in (
            (whole[:-9], f"{name} has {len(whole) - 9} bytes; engine.json says {len(whole)}"),
            (b"", f"{name} has 0 bytes"),
            (whole[:-1] + b"!", f"{name} is corrupt: its SHA-256 differs"),
            (None, f"{name}: No such file"),
        ):
            (engine / name).unlink()
            if content is not None:
                (engine / name).write_bytes(content)
            assert message in failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")
            (engine / name).write_bytes(whole)
        (engine / name).unlink()
        os.mkfifo(engine / name)
        assert "is not a file" in failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")
        (engine / name).unlink()
        (engine / name).write_bytes(whole)
    assert generated(fakes, engine, "1", "--max-tokens=2") == [expected([1], 2)]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"layers": 3}, "has 10 inputs and outputs; a model of 2 layers has 8"),
        ({"foreign": 1}, "is not a plan of a DiJiang model: it has no input input_ids"),
        ({"vocabulary": 98}, "its logits are not float32 of 97 ids"),
        ({"profiles": 1}, "has 1 optimization profiles"),
        ({"least_batch": 2}, "was not built for one sequence"),
        ({"longest": 0}, "was not built for one sequence"),
        ({"tensorrt": "8.6.1"}, "was made for another TensorRT: 8.6.1; here is 10.3.0"),
        ({"gpu": "Orin"}, "was made for another GPU: Orin, sm_87; here is Fake GPU, sm_87"),
        ({"plugin_version": "0.2.0"}, "another version of the plugin: 0.2.0; here is 0.1.0"),
    ],
)
def test_foreign_engines(fakes: Path, make: Make, facts: dict[str, Any], message: str) -> None:
    said = failed(fakes, "--plugin", fakes / "libplugin.so", make(**facts), "1")
    assert message in said
    assert "hint: build" in said


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
@pytest.mark.parametrize("name", ["model.plan", "engine.json"])
def test_a_link_out_of_the_folder(fakes: Path, make: Make, tmp_path: Path, name: str, kind: str) -> None:
    """Right by its hash, and refused all the same: as `open_engine` does."""
    engine = make()
    outside = tmp_path / "outside"
    (engine / name).rename(outside)
    if kind == "symbolic":
        (engine / name).symlink_to(outside)
    else:
        (engine / name).hardlink_to(outside)
    said = failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")
    assert f"{name} is a {kind} link" in said
    assert "hint: copy the folder with `cp -rL`" in said
    with pytest.raises(BundleError):
        open_engine(engine)


@pytest.mark.parametrize("name", ["../model.plan", "/etc/passwd", "sub/model.plan"])
def test_names_that_leave_the_folder_are_never_opened(
    fakes: Path, make: Make, tmp_path: Path, name: str
) -> None:
    """The program opens the plans of its layout and nothing else, whatever else engine.json lists."""
    engine = make()
    content = (engine / "model.plan").read_bytes()
    (tmp_path / "model.plan").write_bytes(content)
    (engine / "sub").mkdir()
    (engine / "sub/model.plan").write_bytes(content)
    manifest = json.loads((engine / "engine.json").read_text())
    manifest["files"][name] = manifest["files"].pop("model.plan")
    (engine / "engine.json").write_text(json.dumps(manifest))
    said = failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")
    assert 'files is not an object with "model.plan"' in said
    with pytest.raises(BundleError):
        open_engine(engine)
    manifest["layout"] = name
    (engine / "engine.json").write_text(json.dumps(manifest))
    assert f"does not know: {name}" in failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")


@pytest.mark.parametrize("size", [0, -1, -(2**40), 1.5, "7", None, 2**60, 10**400])
def test_sizes_that_no_file_has(fakes: Path, make: Make, size: Any) -> None:
    engine = make()
    manifest = json.loads((engine / "engine.json").read_text())
    manifest["files"]["model.plan"]["bytes"] = size
    (engine / "engine.json").write_text(json.dumps(manifest))
    said = failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")
    assert "size out of range" in said or "bytes is not an integer" in said or "is not JSON" in said


def test_files_that_are_far_too_large(fakes: Path, make: Make) -> None:
    """Sparse files of a terabyte: refused by their size, neither read nor hashed."""
    engine = make()
    for name, message in (
        ("model.plan", "has 1099511627776 bytes; engine.json says"), ("engine.json", "is too large")
    ):  # fmt: skip
        before = (engine / name).read_bytes()
        with (engine / name).open("r+b") as file:
            try:
                file.truncate(2**40)
            except OSError as error:  # pragma: no cover
                pytest.skip(f"no sparse files here: {error}")
        assert message in failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")
        (engine / name).write_bytes(before)


def test_a_file_that_is_no_plan(fakes: Path, make: Make) -> None:
    engine = make()
    content = b"something else"
    (engine / "model.plan").write_bytes(content)
    manifest = json.loads((engine / "engine.json").read_text())
    manifest["files"]["model.plan"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (engine / "engine.json").write_text(json.dumps(manifest))
    assert "TensorRT cannot load" in failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "is not JSON (byte 0)"),
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: text + "x", "is not JSON"),
        (lambda text: "[" * 100_000, "is not JSON"),
        (lambda text: "[]", "is not an object"),
        (lambda text: text.replace("dijiang-engine", "dijiang-bundle"), "is not an engine of format 1"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "not an engine of format"),
        (lambda text: text.replace('"layout": "one"', '"layout": "three"'), "does not know: three"),
        (lambda text: text.replace('"vocab_size"', '"words"'), 'spec is not an object with "vocab_size"'),
        (lambda text: text.replace('"vocab_size": 97', '"vocab_size": "97"'), "vocab_size is not an integer"),
        (lambda text: text.replace('"vocab_size": 97', '"vocab_size": 9.5'), "vocab_size is not an integer"),
        (lambda text: text.replace('"vocab_size": 97', '"vocab_size": -1'), "sizes out of range"),
        (lambda text: text.replace('"vocab_size": 97', '"vocab_size": 4294967393'), "sizes out of range"),
        (lambda text: text.replace('"num_layers": 2', '"num_layers": 20000'), "sizes out of range"),
        (lambda text: text.replace('"eos_token_ids": []', '"eos_token_ids": [-1]'), "that is no token: -1"),
        (lambda text: text.replace('"logits": "last"', '"logits": "some"'), "does not know: some"),
        (lambda text: text.replace('"layout"', '"layout": "two", "layout"'), "is not JSON"),
        (lambda text: text.replace('"model.plan"', '"m\\u00f6del.plan"'), 'an object with "model.plan"'),
    ],
)  # fmt: skip
def test_manifests_that_make_no_sense(
    fakes: Path, make: Make, change: Callable[[str], str], message: str
) -> None:
    engine = make()
    text = (engine / "engine.json").read_text()
    assert change(text) != text
    (engine / "engine.json").write_text(change(text))
    assert message in failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")


def test_every_cut_of_a_manifest_is_an_error(fakes: Path, make: Make) -> None:
    engine = make()
    text = (engine / "engine.json").read_text().rstrip()
    for length in range(0, len(text), 97):
        (engine / "engine.json").write_text(text[:length])
        failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")


def test_no_engine(fakes: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        said = failed(fakes, "--plugin", fakes / "libplugin.so", place, "1")
        assert "it has no engine.json\nhint: make one with `dijiang-export build-engine" in said


# Plugins


@pytest.mark.parametrize(
    ("library", "message"),
    [
        ("libnothing.so", "there is no plugin at"),
        ("libtext.so", "cannot open the plugin"),
        ("libempty.so", "is not a plugin of dijiang-export: no dijiang_abi_version"),
        ("libkernels.so", "is not a plugin for TensorRT 10.3.0\nhint: libdijiang_kernels.so is none"),
        ("libother_abi.so", "has version 7 of the kernels' interface"),
        (".", "there is no plugin at"),
    ],
)
def test_libraries_that_are_no_plugin(fakes: Path, make: Make, library: str, message: str) -> None:
    assert message in failed(fakes, "--plugin", fakes / library, make(), "1")


def test_a_plugin_for_another_processor(fakes: Path, make: Make, tmp_path: Path) -> None:
    """In words: dlopen says that there is no such file. Both ways round: tests/arm64."""
    own = machine_of(fakes / "dijiang_generate")
    other = "x86_64" if own == "aarch64" else "aarch64"
    plugin = tmp_path / "libdijiang_tensorrt_10.so"
    plugin.write_bytes(elf(other))
    said = failed(fakes, "--plugin", plugin, make(), "1")
    assert said.startswith(f"error: {plugin} is compiled for {other} and cannot be loaded on {own}\nhint: ")


def test_a_plugin_of_other_sources(fakes: Path, make: Make, tmp_path: Path) -> None:
    """plugin.json, which `build-plugin --output` puts beside the library, is compared where it is there."""
    shutil.copy(fakes / "libplugin.so", tmp_path)
    engine = make()
    (tmp_path / "plugin.json").write_text(json.dumps({"sources": "cd" * 32}))
    assert "was made for another plugin: abab" in failed(
        fakes, "--plugin", tmp_path / "libplugin.so", engine, "1"
    )
    (tmp_path / "plugin.json").write_text(json.dumps({"sources": "ab" * 32}))
    done = run(fakes, "--plugin", tmp_path / "libplugin.so", engine, "1", "--max-tokens=3")
    assert [int(token) for token in done.stdout.split()] == expected([1], 3)


# Hashes and JSON


def host_parts(fakes: Path, mode: str, inputs: list[bytes]) -> list[str]:
    done = subprocess.run(
        [fakes / "host_parts", mode], input="".join(one.hex() + "\n" for one in inputs),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_hashes_are_sha256(fakes: Path) -> None:
    rng = random.Random(0)
    inputs = [rng.randbytes(length) for length in [*range(200), 1000, 4096, 99_999]]
    assert host_parts(fakes, "sha256", inputs) == [hashlib.sha256(one).hexdigest() for one in inputs]


def described(value: Any) -> str:
    """As tests/host_parts.cpp describes a value."""
    if isinstance(value, str):
        return f"text {value.encode().hex()}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)) and value == math.floor(value) and abs(value) <= 9e15:
        return f"integer {int(value)}"
    if isinstance(value, list):
        return "[" + "".join(described(part) + "," for part in value) + "]"
    return "other"


def python_says(document: str) -> str | None:
    """Python's JSON reader with what the C++ one adds: finite numbers, whole characters. None: an error."""

    def finite(text: str) -> float:
        value = float(text)
        if math.isinf(value):
            raise ValueError(text)
        return int(text) if text.lstrip("-").isdigit() else value

    try:
        root = parse_json(document.encode(), "here")  # no NaN, no repeated names
        json.loads(document, parse_int=finite, parse_float=finite)
        json.dumps(root, ensure_ascii=False).encode()  # no half characters
        return described(root["value"]) if isinstance(root, dict) and "value" in root else None
    except (BundleError, ValueError):
        return None


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 3 else 7)
    if kind < 2:
        return "".join(rng.choice('az"\\/\b\n\t\x7fé語😀') for _ in range(rng.randrange(6)))
    if kind < 7:
        numbers = (rng.randrange(-(10**17), 10**17), rng.random(), rng.uniform(-1e300, 1e300), 9e15, -0.0)
        return rng.choice([0, 7, rng.randrange(1000), True, False, None, *numbers])
    parts = [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return parts if kind == 7 else {f"k{n}": part for n, part in enumerate(parts)}


def test_json_is_read_as_python_reads_it(fakes: Path) -> None:
    """Documents, and documents with a few characters changed, which mostly are none any more."""
    rng = random.Random(1)
    values = [
        r'"\ud83d"', r'"\ude00x"', r'"\ud83d\u0041"', r'"\uD83D\uDE00 \u0000"', r'"\u00G0"', '"\t"', "'x'",
        "01", "1.", ".5", "+1", "-", "1e", "5e0", "1e-2", "1e999", "NaN", "-Infinity", "1, ", "[1,]", "tru",
        "", '1, "value": 1', "[[[[" + "]" * 4, "[" * 40 + "]" * 40,
    ]  # fmt: skip
    documents = ["", "null", '"value"', "{'value': 1}", *(f'{{"value": {value}}}' for value in values)]
    for _ in range(3000):
        text = json.dumps(
            {"value": random_value(rng)}, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])
        )
        documents.append(text)
        changed = list(text)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(changed) + 1)
            changed[at : at + rng.randrange(2)] = rng.choice(
                ['"', "\\", "{", "]", ",", "0", "-", ".", "e", "\\u", ""]
            )
        documents.append("".join(changed))
    wanted = [python_says(document) for document in documents]
    assert 500 < wanted.count(None) < len(wanted) - 3000
    for document, want, got in zip(
        documents,
        wanted,
        host_parts(fakes, "json", [document.encode() for document in documents]),
        strict=True,
    ):
        assert got.startswith("error here") if want is None else got == want, document
