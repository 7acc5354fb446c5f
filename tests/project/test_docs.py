"""The documents are true: commands run, links lead somewhere, names exist, tables match the code."""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import click
import pytest
from support.fakes.elf_files import cuda_target
from support.fakes.tensorrt import FakeMachine
from support.fakes.toolchain import FakeToolchain, without_tools
from support.makers.checkpoints import neox
from support.paths import ROOT

from dijiang_export.cli import COMMANDS, cli

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
OTHER_PAGES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("samples", "plugins", "tests")
    for path in sorted((ROOT / folder).glob("**/*.md"))
]
SOURCES = ("exporter", "engines", "tests", "samples", ".ci")


@cache
def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def shown_commands(name: str) -> list[str]:
    """The `$ ` lines of a page's console blocks, continued lines joined."""
    commands: list[str] = []
    for block in re.findall(r"^```console\n(.*?)^```", text(name), re.DOTALL | re.MULTILINE):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        commands += [line[2:] for line in lines if line.startswith("$ ")]
    return commands


ALL_COMMANDS = [(name, command) for name in NAMES for command in shown_commands(name)]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random models under the names that the documents use."""
    from dijiang_export.export.to_onnx import export_bundle

    folder = tmp_path_factory.mktemp("documents")
    for name in ("pythia-70m", "pythia-160m"):
        neox().vanilla().with_tokenizer().save(folder / name)
    for name in ("pythia-160m-dijiang", "pythia-410m-dijiang"):
        neox().with_tokenizer().save(folder / name)
    (folder / "pythia-dijiang").symlink_to(folder / "pythia-410m-dijiang")
    export_bundle(folder / "pythia-dijiang", folder / "pythia.bundle")
    return folder


def shell(
    command: str, cwd: Path, tools: FakeToolchain | FakeMachine | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it; with `tools`, on a machine that compiles within no time, or that has a GPU and TensorRT."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "100"}
    if isinstance(tools, FakeMachine):
        environment |= tools.environment
    elif tools is not None:
        environment = without_tools() | tools.environment | {"PATH": f"{tools.bin}:{path}", "COLUMNS": "100"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=cwd, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture
def tools(tmp_path_factory: pytest.TempPathFactory) -> FakeToolchain:
    """Compilers that compile nothing, a GPU, and TensorRT's headers: what `build-plugin` needs."""
    made = FakeToolchain(tmp_path_factory.mktemp("tools"))
    made.gpu()
    made.variables["TENSORRT_ROOT"] = str(made.headers())
    return made


# Commands


@pytest.mark.parametrize("name", [*NAMES, *OTHER_PAGES])
def test_lines_of_prose_are_short(name: str) -> None:
    """Below 120 characters; a table's row, a line of code and a link cannot be broken."""
    prose = re.sub(r"^ *```.*?^ *```", "", text(name), flags=re.DOTALL | re.MULTILINE)
    long = [line for line in prose.splitlines() if len(line) >= 120]
    assert [line for line in long if not line.startswith(("|", "    ")) and " " in line.strip()] == []


def test_there_are_commands_and_each_is_of_a_known_kind() -> None:
    assert len(ALL_COMMANDS) > 10
    others = [c for _, c in ALL_COMMANDS if "dijiang-export " not in c]
    assert [command for command in others if not command.startswith(("make ", "pip install "))] == []


def test_the_commands_of_the_readme(models: Path, tmp_path: Path, tools: FakeToolchain) -> None:
    """In order and in one folder, as a reader would type them."""
    for name in ("pythia-160m-dijiang", "pythia-70m"):
        (tmp_path / name).symlink_to(models / name)
    commands = [c for c in shown_commands("README.md") if "dijiang-export " in c]
    assert len(commands) >= 10
    for command in commands:
        done = shell(command, tmp_path, tools if "build-plugin" in command else None)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if "--json" in command:
            assert json.loads(done.stdout)
    assert (tmp_path / "tiny-stdlib.bundle/manifest.json").exists()
    assert (tmp_path / "pythia-70m-dijiang/config.json").exists()


def test_other_pages_show_commands_of_make_and_build_plugin_only() -> None:
    others = {command for name, command in ALL_COMMANDS if name not in ("README.md", "docs/plugin.md")}
    assert [command for command in others if not command.startswith("make ")] == []


def test_the_commands_about_the_plugin(tmp_path: Path, tools: FakeToolchain) -> None:
    tools.headers(folder=tmp_path / "TensorRT-10.13/include")
    tools.nvcc("13.0", "80 87 89 90 110")
    tools.cross_compiler()
    cuda_target(tmp_path / "cuda-aarch64", version=13000)
    commands = [c for c in shown_commands("docs/plugin.md") if not c.startswith("make ")]
    assert len(commands) >= 5
    if platform.machine() == "aarch64":  # where nothing is compiled for another kind of processor
        commands = [c for c in commands if "--target" not in c]
    for command in commands:
        assert command.startswith(("dijiang-export build-plugin", "dijiang-export doctor"))
        done = shell(command, tmp_path, tools)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "plugin/libdijiang_kernels.so").exists()


def test_the_table_of_messages_about_the_plugin() -> None:
    """Each message is one that the code prints, or that a compiler does."""
    code = "\n".join(path.read_text() for path in (ROOT / "engines/dijiang_engines").rglob("*.py"))
    rows = table("docs/plugin.md", "When something goes wrong")
    assert len(rows) >= 8
    assert [message for message, _ in rows if message.split("...")[-1].strip() not in code] == []


@pytest.mark.parametrize("command", sorted({c for _, c in ALL_COMMANDS if c.startswith("make ")}))
def test_make_targets(command: str) -> None:
    """CI runs demo, test and lint for real; every target must at least be known to make."""
    target = command.split()[1]
    done = shell(f"make --dry-run {target}", ROOT)
    assert done.returncode == 0, done.stderr
    if target in ("demo", "test", "lint"):
        assert re.search(rf"^(begin \w+ )?make {target}$", text(".ci/run"), re.MULTILINE)


def test_pip_commands() -> None:
    torch_pin = re.search(r"^(torch==\S+)$", text("constraints.txt"), re.MULTILINE)
    assert torch_pin is not None
    for command in [c for _, c in ALL_COMMANDS if c.startswith("pip install ")]:
        if command.startswith("pip install torch"):  # from an index that tests must not need
            assert command.split()[2] == torch_pin[1]
            assert command.split()[-1] in text("Makefile")
            continue
        offline = "--dry-run --no-deps --no-build-isolation --no-index --disable-pip-version-check"
        done = shell(command.replace("pip install", f"pip install {offline}"), ROOT)
        assert done.returncode == 0, done.stderr
        assert "Would install dijiang-export" in done.stdout
        assert "does not provide the extra" not in done.stderr


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_the_examples_of_help(
    name: str, models: Path, sample_bundle: Path, tmp_path: Path, tools: FakeToolchain
) -> None:
    command = cli.get_command(click.Context(cli), name) if name else cli
    assert command is not None
    found = re.search(r"Example[^:]*: (.*)", command.epilog or "", re.DOTALL)
    assert found is not None
    example = " ".join(found[1].split())
    outputs = {"to-onnx": 3, "convert": 3}  # which word names what the command makes
    words = example.split()
    made = words[outputs[words[1]]] if words[1] in outputs and len(words) > 3 else ""
    for model in models.iterdir():
        if f"./{model.name}" in words and f"./{model.name}" != made:
            (tmp_path / model.name).symlink_to(model)
    if "to-onnx" not in words:
        (tmp_path / sample_bundle.name).symlink_to(sample_bundle)
    (tmp_path / "held-out.txt").write_text("def main():\n    pass\n")
    if name == "bench":
        example += " --seconds 0.01 --length 16 --batch 1"  # what is measured, for less long
    if name == "serve":  # until it is told to end
        example = f"timeout --preserve-status -s TERM 8 {example} --port 0"
    machine = {"build-plugin": tools, "build-engine": FakeMachine(tools.bin.parent / "gpu")}.get(name)
    done = shell(example, tmp_path, machine)
    assert done.returncode == 0, f"{example}\n{done.stdout}\n{done.stderr}"


def test_options_in_the_documents_exist() -> None:
    known = {"--help", "--version", "--json", "--quiet", "--index-url", "--extra-index-url", "--runner"}
    tools = json.loads((ROOT / "tests/data/trtexec_options.json").read_text())
    for tool in (*tools["versions"].values(), tools["tensorrt_rtx"]):
        known |= set(tool["options"].split())
    known |= {"--onnx", "--staticPlugins", "--dynamicPlugins", "--setPluginsToSerialize"}
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        inner = command.commands.values() if isinstance(command, click.Group) else ()
        for one in (command, *inner):
            known |= {option for p in one.params for option in (*p.opts, *p.secondary_opts)}
    shown = {
        (name, option)
        for name in NAMES
        for option in re.findall(r"(?<![\w-])--[a-z][A-Za-z0-9-]+", text(name))
    }
    assert {pair for pair in shown if pair[1] not in known} == set()


# Names


def anchors(page: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text(name)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        if not page.exists() or (anchor and anchor not in anchors(page.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


def test_every_page_is_linked() -> None:
    """A reader who starts at README.md can reach every document."""
    linked, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in linked or page.suffix != ".md":
            continue
        linked.add(page)
        for target in re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("https://"):
                waiting.append((page.parent / target).resolve())
    assert set(PAGES) - linked == set()


@cache
def python_files() -> dict[str, Path]:
    return {path.name: path for top in SOURCES for path in (ROOT / top).rglob("*.py")}


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name: str) -> None:
    page = text(name)
    paths = set(
        re.findall(r"(?<![\w/.])((?:exporter|engines|plugins|tests|docs|samples|\.ci)/[\w./-]*\w)", page)
    )
    inside = ("", "exporter/dijiang_export", "engines", "engines/dijiang_engines")
    missing = [p for p in sorted(paths) if not any((ROOT / top / p).exists() for top in inside)]
    modules = set(re.findall(r"(?<![\w*/-])(\w+\.py)\b", page)) - {"modeling_gpt_neox_dijiang.py"}
    missing += sorted(modules - set(python_files()))
    assert missing == []


def test_documents_named_in_the_code_exist() -> None:
    sources = [path for top in SOURCES for path in (ROOT / top).rglob("*.py")]
    named = {(p.name, doc) for p in sources for doc in re.findall(r"docs/[\w/-]+\.md", p.read_text("utf-8"))}
    assert [pair for pair in sorted(named) if not (ROOT / pair[1]).exists()] == []
    assert len(named) > 5


def test_tests_that_are_named_exist() -> None:
    named = [pair for name in NAMES for pair in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text(name))]
    assert len(named) >= 15
    missing = []
    for file, test in named:
        tree = ast.parse(text(file))
        if test not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
            missing.append(f"{file}::{test}")
    assert missing == []


def test_every_difference_names_a_test() -> None:
    page = text("docs/differences-from-official.md")
    rows = re.findall(r"^\| \[[^|]*\]\(#([\w-]+)\) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) >= 10
    assert all("::test_" in tests for _, tests in rows)
    assert anchors(page) - {section for section, _ in rows} == {
        "differences-from-the-official-code", "not-carried-over",
    }  # fmt: skip


# Tables


def table(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table under `heading`, without its head, backticks removed."""
    section = text(page).split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    return [[cell.strip().replace("`", "") for cell in row.split(" | ")] for row in rows[1:]]


def test_the_op_contract_is_the_codes() -> None:
    from dijiang_engines import op_contract as contract

    assert [row[:3] for row in table("docs/op-contract.md", "Inputs")] == [
        [f.name, f.kind, f.shape] for f in contract.INPUTS
    ]
    assert [row[:3] for row in table("docs/op-contract.md", "Outputs")] == [
        [f.name, f.kind, f.shape] for f in contract.OUTPUTS
    ]
    rows = table("docs/op-contract.md", "Attributes")
    assert {row[0]: row[1] for row in rows} == contract.ATTRIBUTES
    optional = [row[0] for row in table("docs/op-contract.md", "Inputs") if row[3].startswith("optional")]
    assert optional == [f.name for f in contract.INPUTS if f.optional]
    assert all(f"`{name}`" in text("docs/op-contract.md") for name in contract.PLUGIN_ATTRIBUTES)


def test_the_manifest_is_described(models: Path) -> None:
    manifest = json.loads((models / "pythia.bundle/manifest.json").read_text())
    described = [
        key.strip() for row in table("docs/bundle-format.md", "manifest.json") for key in row[0].split(",")
    ]
    assert sorted(described) == sorted(
        [*manifest, "quantisation"]
    )  # which this one has not: its weights are floats


def test_the_weights_are_described() -> None:
    from dijiang_engines.inspection import ModelSpec
    from dijiang_export.checkpoint.checkpoint import open_checkpoint
    from dijiang_export.reference.model import ReferenceModel

    described: set[str] = set()
    for row in table("docs/bundle-format.md", "weights.data"):
        first, *others = (name.strip() for name in row[0].split(","))
        described.add(first)
        described |= {o if not o.startswith(".") else first.rpartition(".")[0] + o for o in others}

    golden = ROOT / "tests/data/goldens/neox-trained-tables"
    with open_checkpoint(golden) as checkpoint:
        spec: ModelSpec = checkpoint.spec
    whole = replace(
        spec, embedding_size=spec.hidden_size // 2, position_embeddings=8, gated_mlp=True, num_layers=1
    )
    names = {name.replace("layers.0.", "layers.{i}.") for name, _ in ReferenceModel(whole).named_parameters()}
    assert described - {"inv_freq"} == names
