"""The web sample gives the tokens of `generate`, in Node and in Chromium, where they are installed."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.paths import ROOT

from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.generation.generator import GenerateOptions, Generator, SamplingOptions
from dijiang_engines.runners import open_runner
from dijiang_engines.tokenizer.tokenizer import Tokenizer

WEB = ROOT / "samples/web"
SOURCES = sorted(path for path in WEB.iterdir() if path.suffix in (".js", ".mjs", ".html", ".css", ".json"))
PROMPT = "def read(path):"
TEXTS = [
    "def f(x):\n\n\treturn x  # naïve — 日本語 🦙\u0085\ufeff\u00a0 end ",
    "it's they'll 'S 123 ½ x²\r\n   \n  <|endoftext|>after\x00\x7f",
    " " * 40 + "a" * 70 + "\n" * 9 + "e\u0301 \u2028\u3000x",
    "",
]


def packages(*names: str) -> Path:
    """The folder of Node packages, or a skip that says what is missing."""
    folder = os.environ.get("DIJIANG_NODE_MODULES")
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if folder is None:
        pytest.skip("DIJIANG_NODE_MODULES does not name a folder of Node packages")
    for name in names:
        if not (Path(folder) / name).is_dir():
            pytest.skip(f"{name} is not in {folder}")
    return Path(folder)


def node(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["node", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def ours(bundle: Path, options: GenerateOptions) -> tuple[list[int], str]:
    opened = open_bundle(bundle)
    assert opened.tokenizer_path is not None
    generator = Generator(open_runner(opened, "cpu", threads=1), Tokenizer(opened.tokenizer_path))
    generation = generator.start([PROMPT], options)
    for _ in generation:
        pass
    return generation.completions[0].token_ids, generation.completions[0].text


# Without Node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"from '(\.[^']*)'", text) + re.findall(r'(?:src|href)="(?!data:)([^"]*)"', text)
    for name in named:
        assert "node_modules" in name or (WEB / name).is_file(), name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_there_is_no_remote_address_and_no_text_becomes_html(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"(?:https?:|wss?:|['\"])//", text) == []
    assert (
        re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
        == []
    )


def test_the_page_may_reach_its_own_server_alone() -> None:
    page = (WEB / "index.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy"\s+content="([^"]*)"', page)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert "unsafe-inline" not in policy[1]


# In Node


@pytest.mark.parametrize("runtime", ["onnxruntime-web", "onnxruntime-node"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_node_gives_the_tokens_of_generate(sample_bundle: Path, runtime: str, temperature: float) -> None:
    packages(runtime)
    sampling = SamplingOptions(temperature=temperature, top_k=20 if temperature else 0)
    ids, text = ours(sample_bundle, GenerateOptions(max_tokens=60, sampling=sampling, seed=7))
    done = node(
        WEB / "node.mjs", sample_bundle, PROMPT, "--max-tokens", "60", "--runtime", runtime, "--json",
        "--temperature", str(temperature), "--top-k", str(sampling.top_k), "--seed", "7",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["ids"], result["text"]) == (ids, text)
    assert result["memory"][0]["state_bytes"] == open_bundle(sample_bundle).spec.state_bytes


ENCODE = """
const { Tokenizer } = await import(process.argv[1]);
const { readFileSync } = await import('node:fs');
const tokenizer = new Tokenizer(JSON.parse(readFileSync(process.argv[2], 'utf-8')));
console.log(JSON.stringify(JSON.parse(process.argv[3]).map((text) => {
    const ids = tokenizer.encode(text);
    const stream = tokenizer.stream();
    return [ids, ids.map((id) => stream.push(id)).join('') + stream.finish()];
})));
"""


def test_tokens_are_those_of_the_library(sample_bundle: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    path = sample_bundle / "tokenizer.json"
    library = Tokenizer(path)
    texts = [*TEXTS, *(p.read_text(encoding="utf-8") for p in (Path(__file__), WEB / "tokenizer.js"))]
    done = node("--input-type=module", "-e", ENCODE, WEB / "tokenizer.js", path, json.dumps(texts))
    assert done.returncode == 0, done.stderr
    ids = [library.encode(text) for text in texts]
    assert json.loads(done.stdout) == [[one, library.decode(one)] for one in ids]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", {"type": "Unigram", "vocab": []}, 'its model is "Unigram"'),
        ("normalizer", {"type": "Lowercase"}, 'its normalizer is "Lowercase"'),
        ("pre_tokenizer", {"type": "Metaspace"}, "its pre-tokenizer does not end in ByteLevel"),
        ("decoder", {"type": "WordPiece"}, "its decoder is not ByteLevel"),
        ("post_processor", {"type": "BertProcessing"}, 'its post-processor is "BertProcessing"'),
    ],
)
def test_an_unknown_tokenizer_is_one_message(
    sample_bundle: Path, key: str, value: object, message: str, tmp_path: Path
) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    file = json.loads((sample_bundle / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(file | {key: value}), encoding="utf-8")
    done = node("--input-type=module", "-e", ENCODE, WEB / "tokenizer.js", tmp_path / "tokenizer.json", "[]")
    assert done.returncode != 0
    assert f"does not know the bundle's tokenizer: {message}" in done.stderr


@pytest.mark.parametrize("name", ["weights.data", "step.onnx", "tokenizer.json"])
@pytest.mark.parametrize("short", [False, True])
def test_a_damaged_file_is_named(sample_bundle: Path, name: str, short: bool, tmp_path: Path) -> None:
    packages("onnxruntime-web")
    for path in sample_bundle.iterdir():
        (tmp_path / path.name).symlink_to(path)
    data = bytearray((sample_bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(data[:-1] if short else data)
    done = node(WEB / "node.mjs", tmp_path, PROMPT)
    assert (done.returncode, done.stdout) == (1, "")
    expected = f"{name} has {len(data) - 1} bytes" if short else f"{name} is damaged"
    assert done.stderr.startswith(f"error: {expected}")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    packages("onnxruntime-web")
    os.mkfifo(tmp_path / "manifest.json")
    done = node(WEB / "node.mjs", tmp_path, PROMPT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: manifest.json is no ordinary file")


def test_wrong_usage_is_exit_code_2() -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    for arguments in (["one"], ["a", "b", "--nothing"], ["a", "b", "--seed", "x"]):
        done = node(WEB / "node.mjs", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")


# In a browser


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def site(sample_bundle: Path, tmp_path: Path) -> Iterator[str]:
    """The address of the page, served as its README says: with packages and bundle beside it."""
    folder = packages("onnxruntime-web", "puppeteer-core")
    for path in SOURCES:
        shutil.copy(path, tmp_path)
    (tmp_path / "node_modules").symlink_to(folder)
    (tmp_path / "tiny-stdlib.bundle").symlink_to(sample_bundle)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_the_page_gives_the_text_of_generate_without_a_network(site: str, sample_bundle: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    tokens = 60
    _, text = ours(sample_bundle, GenerateOptions(max_tokens=tokens, ignore_eos=True))
    done = node(ROOT / "tests/samples/web_page.mjs", site, chromium, str(tokens))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["errors"] == []
    assert result["status"] == "done: length"
    assert result["output"] == text
    assert all(url.startswith((site, "data:")) for url in result["requests"])
    size = open_bundle(sample_bundle).spec.state_bytes
    assert result["state"].startswith(f"state: {size} bytes after ")
