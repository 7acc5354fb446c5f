"""`build-engine --print-trtexec`: flags that trtexec of each version has, and build-engine's shapes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.makers.plugin_cache import make_build
from support.paths import ROOT, TESTS

from dijiang_engines.building.plans import profile_shapes
from dijiang_engines.building.recipes import load_recipe
from dijiang_engines.building.trtexec import TrtexecCommands, rtx_commands, trtexec_commands
from dijiang_engines.errors import DijiangError, RunnerError, UsageError
from dijiang_engines.formats.bundle import Bundle, open_bundle
from dijiang_engines.plugin.cache import cache_folder
from dijiang_export.cli import main
from dijiang_export.commands.build_engine import build_engine

onnx = pytest.importorskip("onnx")

DATA = json.loads((TESTS / "data/trtexec_options.json").read_text())
TABLE = DATA["versions"]
"""What trtexec's own parser asks for, by tag."""
OPTIONS = {tag.removeprefix("v"): set(entry["options"].split()) for tag, entry in TABLE.items()}
RTX_OPTIONS = set(DATA["tensorrt_rtx"]["options"].split())
RECIPE = load_recipe("datacenter").with_changes(max_batch=3, opt_batch=2, max_length=96, opt_length=32)
SHAPES = ("--minShapes", "--optShapes", "--maxShapes")


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DIJIANG_PLUGIN", raising=False)


@pytest.fixture(scope="module")
def bundles(exported: Callable[..., tuple[Path, Any]]) -> dict[str, Bundle]:
    return {dtype: open_bundle(exported(dtype=dtype)[0]) for dtype in ("float32", "float16")}


def commands(bundle: Bundle, version: str, layout: str = "one", **options: Any) -> TrtexecCommands:
    return trtexec_commands(
        bundle, Path("plans"), RECIPE.with_changes(layout=layout), version=version, **options
    )


def parse(command: list[str]) -> tuple[dict[str, str], list[dict[str, list[list[int]]]]]:
    """Read a command as trtexec does: the shapes of a profile stand right behind its --profile.

    Returns:
        The other options, and for each profile {input: [min, opt, max]}.
    """
    assert command[0] in ("trtexec", "tensorrt_rtx")
    words = [tuple(word.split("=", 1)) if "=" in word else (word, "") for word in command[1:]]
    names = [name for name, _ in words if name not in (*SHAPES, "--profile")]
    assert len(names) == len(set(names))
    found: dict[str, str] = {}
    profiles: list[dict[str, list[list[int]]]] = []
    several = any(name == "--profile" for name, _ in words)
    for index, (name, value) in enumerate(words):
        if name == "--profile":
            assert int(value) == len(profiles)
            behind = [other for other, _ in words[index + 1 : index + 4]]
            assert sorted(behind) == sorted(SHAPES)
            profiles.append({})
        elif name in SHAPES:
            if not profiles:
                assert not several
                profiles.append({})
            for part in value.split(","):
                tensor, _, dims = part.rpartition(":")
                rows = profiles[-1].setdefault(tensor, [[], [], []])
                rows[SHAPES.index(name)] = [int(size) for size in dims.split("x")]
        else:
            found[name] = value
    return found, profiles


@pytest.mark.parametrize("version", OPTIONS)
@pytest.mark.parametrize("layout", ["one", "two"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_flag_is_one_of_that_version(
    version: str, layout: str, dtype: str, bundles: dict[str, Bundle]
) -> None:
    options = {"device": 2, "timing_cache": Path("a.cache")}
    if version.startswith("8.") and (layout == "one" or dtype == "float16"):
        with pytest.raises(UsageError):
            commands(bundles[dtype], version, layout, **options)
        return
    made = commands(bundles[dtype], version, layout, **options)
    assert made.commands[0] == ["mkdir", "-p", "plans"]
    assert len(made.commands) == (2 if layout == "one" else 3)
    for command in made.commands[1:]:
        flags = {word.split("=")[0] for word in command[1:]}
        assert flags <= OPTIONS[version], flags - OPTIONS[version]
        assert "--noTF32" in flags and "--skipInference" in flags
    uncached = commands(bundles[dtype], version, layout, use_timing_cache=False)
    for command in uncached.commands[1:]:
        assert "--noBuilderCache" in command and not any("Cache" in w and "=" in w for w in command)
        assert {word.split("=")[0] for word in command[1:]} <= OPTIONS[version]


def test_the_tables_tell_versions_apart() -> None:
    """So that the test above can fail."""
    assert "--profile" not in OPTIONS["8.6.1"] and "--stronglyTyped" not in OPTIONS["8.6.1"]
    assert "--fp16" in OPTIONS["10.16"] and "--fp16" not in OPTIONS["11.1"]
    assert "--precisionConstraints" in OPTIONS["10.3.0"] and "--precisionConstraints" not in OPTIONS["11.1"]


@pytest.mark.parametrize(
    ("version", "layout"), [("8.6.1", "two"), ("10.3", "one"), ("10.16", "two"), ("11.1", "one")]
)
def test_shapes_are_those_of_build_engine(version: str, layout: str, bundles: dict[str, Bundle]) -> None:
    bundle = bundles["float32"]
    context = profile_shapes(bundle, RECIPE.profiles, step=False)
    generation = profile_shapes(bundle, RECIPE.profiles, step=True)
    read = [parse(command) for command in commands(bundle, version, layout).commands[1:]]
    assert [p for _, profiles in read for p in profiles] == [context, generation]
    files = ["model.plan"] if layout == "one" else ["prefill.plan", "step.plan"]
    assert [options["--saveEngine"] for options, _ in read] == [f"plans/{file}" for file in files]
    for options, profiles in read:
        graph = onnx.load(options["--onnx"], load_external_data=False).graph
        inputs = {i.name: i.type.tensor_type.shape.dim for i in graph.input}
        for profile in profiles:
            assert set(profile) == set(inputs)
            for name, rows in profile.items():
                for row in rows:
                    assert len(row) == len(inputs[name])
                    fixed = [(d.dim_value, n) for d, n in zip(inputs[name], row, strict=True) if d.dim_value]
                    assert all(size == n for size, n in fixed)


def test_types_and_search(bundles: dict[str, Bundle]) -> None:
    def options(version: str, layout: str = "two", dtype: str = "float32") -> dict[str, str]:
        return parse(commands(bundles[dtype], version, layout).commands[1])[0]

    old = options("8.6.1")
    assert old["--tacticSources"] == "+CUBLAS,+CUBLAS_LT,-CUDNN,-EDGE_MASK_CONVOLUTIONS,-JIT_CONVOLUTIONS"
    assert set(old["--preview"].split(",")) == {
        "+fasterDynamicShapes0805", "+profileSharing0806", "-disableExternalTacticSourcesForCore0805",
    }  # fmt: skip
    assert "--stronglyTyped" not in old
    for version in ("10.3.0", "10.16"):
        for dtype in ("float32", "float16"):
            new = options(version, dtype=dtype)
            assert "--stronglyTyped" in new and not {"--tacticSources", "--preview", "--fp16"} & set(new)
    assert "--stronglyTyped" not in options("11.1")
    assert old["--memPoolSize"] == f"workspace:{RECIPE.workspace_mb}"
    assert old["--builderOptimizationLevel"] == str(RECIPE.optimization_level)
    assert "--device" not in old and "--timingCacheFile" not in old


@pytest.mark.parametrize(
    ("version", "layout", "dtype", "kind", "words"),
    [
        ("8.6", "one", "float32", UsageError, "one profile"),
        ("8.6", "two", "float16", UsageError, "types of a float16 bundle"),
        ("9.1", "two", "float32", RunnerError, "not supported"),
        ("10.2", "two", "float32", RunnerError, "not supported"),
        ("10", "two", "float32", UsageError, "not a version"),
        ("latest", "two", "float32", UsageError, "not a version"),
        ("10.x.3", "two", "float32", UsageError, "not a version"),
    ],
)
def test_what_trtexec_cannot_do(
    version: str, layout: str, dtype: str, kind: type[DijiangError], words: str, bundles: dict[str, Bundle]
) -> None:
    with pytest.raises(kind, match=words):
        commands(bundles[dtype], version, layout)


def test_precision_must_fit(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(UsageError, match="another precision"):
        commands(bundles["float32"], "10.3", precision="float16")


def test_the_plugin_that_was_built_here(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    before = trtexec_commands(bundles["float32"], tmp_path, RECIPE)
    assert before.tensorrt == "10.3"
    assert "--dynamicPlugins=./libdijiang_tensorrt_10.so" in before.commands[1]
    assert any("build-plugin" in note for note in before.notes)
    built = make_build(cache_folder(), "eleven", tensorrt="11.1.0")
    made = trtexec_commands(bundles["float32"], tmp_path, RECIPE)
    assert made.tensorrt == "11.1.0"
    assert f"--dynamicPlugins={built}/libdijiang_tensorrt_11.so" in made.commands[1]
    assert not any("build-plugin" in note for note in made.notes)


def test_the_command(bundles: dict[str, Bundle], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A shell script on standard output that a shell reads as it was meant; nothing is written."""
    folder = tmp_path / "my plans"
    arguments = ["build-engine", str(bundles["float16"].path), "-o", str(folder), "--print-trtexec"]
    arguments += ["--max-batch", "1", "--tensorrt", "10.13.3"]
    assert main(arguments) == 0
    shown = capfd.readouterr()
    assert "engine.json" in shown.err and "batch dynamic" in shown.err
    assert not folder.exists()
    assert main(["--json", *arguments]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["tensorrt"] == "10.13.3"
    lines = shown.out.replace("\\\n", " ").splitlines()
    assert [shlex.split(line) for line in lines] == result["commands"]
    # and by a real shell, with a trtexec that only says what it was told
    (tmp_path / "trtexec").write_text(
        f"#!{sys.executable}\nimport sys, json; print(json.dumps(sys.argv[1:]))\n"
    )
    (tmp_path / "trtexec").chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", "-e", "-c", shown.out], env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [["trtexec", *json.loads(line)] for line in done.stdout.splitlines()] == result["commands"][1:]
    assert folder.is_dir()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tensorrt_for_rtx_s_own_tool(dtype: str, bundles: dict[str, Bundle]) -> None:
    """Standard graphs, a plan for prefill and one for steps, for several GPUs; documented flags alone."""
    bundle, recipe = bundles[dtype], RECIPE.with_changes(layout="two")
    made = rtx_commands(bundle, Path("plans"), recipe, capabilities=("12.0", "8.6", "8.6"))
    assert made.tensorrt == "1.7" and made.commands[0] == ["mkdir", "-p", "plans"]
    read = [parse(command) for command in made.commands[1:]]
    graphs = [Path(options["--onnx"]).name for options, _ in read]
    assert graphs == ["prefill.onnx", "step.onnx"]
    expected = [profile_shapes(bundle, RECIPE.profiles, step=step) for step in (False, True)]
    assert [profiles for _, profiles in read] == [[shapes] for shapes in expected]
    for options, _ in read:
        assert options["--computeCapabilities"] == "86,120"
    for command in made.commands[1:]:
        assert {word.split("=")[0] for word in command[1:]} <= RTX_OPTIONS
    assert any("TensorFloat-32" in note for note in made.notes) == (dtype == "float32")
    every = rtx_commands(bundle, Path("plans"), recipe)
    assert "--computeCapabilities=80,86,89,120,121" in every.commands[1]


def test_what_tensorrt_rtx_cannot_do(bundles: dict[str, Bundle]) -> None:
    two = RECIPE.with_changes(layout="two")
    with pytest.raises(UsageError, match="makes plans with one profile"):
        rtx_commands(bundles["float32"], Path("p"), RECIPE)
    with pytest.raises(UsageError, match="does not build for"):
        rtx_commands(bundles["float32"], Path("p"), two, capabilities=("9.0",))
    with pytest.raises(RunnerError, match="not supported"):
        rtx_commands(bundles["float32"], Path("p"), two, version="10.3")
    with pytest.raises(UsageError, match="not a version"):
        rtx_commands(bundles["float32"], Path("p"), two, version="newest")


def test_quantised_weights_are_build_engine_s(bundles: dict[str, Bundle], monkeypatch: Any) -> None:
    bundle = bundles["float32"]
    monkeypatch.setattr(type(bundle), "weight_format", "int4")
    two = RECIPE.with_changes(layout="two")
    for ask in (lambda: commands(bundle, "10.3"), lambda: rtx_commands(bundle, Path("p"), two)):
        with pytest.raises(UsageError, match="do not build engines of quantised weights") as info:
            ask()
        assert "int4" in str(info.value.got) and "build-engine" in str(info.value.hint)


def test_tensorrt_alone_is_wrong_usage(bundles: dict[str, Bundle], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["build-engine", str(bundles["float32"].path), "--tensorrt", "10.3"]) == 2
    assert "--print-trtexec" in capfd.readouterr().err


def test_nothing_heavy_is_imported(bundles: dict[str, Bundle]) -> None:
    """It works where neither TensorRT nor CUDA's bindings are, and does not look for them."""
    code = (
        "import sys\n"
        "for name in ('tensorrt', 'cuda', 'polygraphy', 'torch', 'onnx'): sys.modules[name] = None\n"
        "from dijiang_export.cli import main\n"
        f"sys.exit(main(['build-engine', {str(bundles['float32'].path)!r}, '--print-trtexec']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trtexec") == 1 and "--profile=1" in done.stdout


def test_the_page_about_it(
    sample_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its commands run, and its flags are trtexec's or this program's."""
    page = (ROOT / "docs/trtexec.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    (tmp_path / sample_bundle.name).symlink_to(sample_bundle)
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        assert main(shlex.split(line)[1:]) == 0
        said = capfd.readouterr().out
        assert "--dynamicPlugins" in said or said.count("tensorrt_rtx \\") == 2
    ours = {option for parameter in build_engine.params for option in parameter.opts}
    shown = set(re.findall(r"(?<![\w-])--[a-z][A-Za-z0-9-]+", page))
    assert shown <= ours | set.union(RTX_OPTIONS, *OPTIONS.values()), shown
