"""ONNX Runtime GenAI runs bundles as they are: its own loop, sampling and tokenizer, against this project's.

Expected tokens come from `Generator` over the NumPy oracle in float64, or, where weights are quantised or
half precision, over ONNX Runtime.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.makers.byte_tokenizer import write_tokenizer
from support.makers.checkpoints import RandomCheckpoint, llama, neox, opt, opt_350m
from support.oracles.numpy_runner import NumpyRunner
from support.paths import ROOT
from tokenizers import Tokenizer as Library
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.generation.generator import GenerateOptions, Generator
from dijiang_engines.runners import open_runner
from dijiang_engines.runners.onnxruntime.runner import OrtRunner
from dijiang_export.cli import main
from dijiang_export.export import genai

OLDEST = (0, 18)
"""The version of GenAI that is tried: older ones do not find a recurrent state in a pipeline."""
Exported = Callable[..., tuple[Path, NumpyRunner]]
Rows = Sequence[Sequence[int]]

GEOMETRIES: dict[str, tuple[RandomCheckpoint, dict[str, Any]]] = {
    "neox": (neox(), {}),
    "neox float16": (neox(), {"dtype": "float16"}),
    "llama, shared heads": (llama(heads=4, kv_heads=2), {}),
    "opt": (opt(), {}),
    "opt-350m's shape": (opt_350m(embedding=32), {}),
    "trained tables, all logits": (neox(layers=1).with_trained_decay(), {"logits": "all", "cases": "none"}),
    "neox int8": (neox(layers=1), {"weight_format": "int8", "cases": "none"}),
    "llama int4": (llama(layers=1, kv_heads=2), {"weight_format": "int4", "cases": "none"}),
}


@pytest.fixture(scope="module")
def og() -> Any:
    """The package; tests that use it skip where there is none that runs these pipelines."""
    try:
        found = tuple(map(int, version("onnxruntime-genai").split(".")[:2]))
    except PackageNotFoundError:
        pytest.skip("onnxruntime-genai is not installed")
    if found < OLDEST:
        pytest.skip(f"onnxruntime-genai {found} is older than {OLDEST}")
    import onnxruntime_genai

    return onnxruntime_genai


@cache
def opened(folder: Path) -> Any:
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(folder))
    config.overlay('{"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}')
    return onnxruntime_genai.Model(config)


def generator(og: Any, folder: Path, rows: int = 1, *, length: int = 128, **search: Any) -> Any:
    parameters = og.GeneratorParams(opened(folder))
    parameters.set_search_options(batch_size=rows, max_length=length, **search)
    return og.Generator(opened(folder), parameters)


def padded(rows: Rows, pad: int) -> Any:
    longest = max(map(len, rows))
    ids = np.array([[*row, *[pad] * (longest - len(row))] for row in rows], np.int32)
    return ids if len(rows) > 1 else ids[0]


def found_tokens(og: Any, folder: Path, rows: Rows, count: int) -> list[list[int]]:
    """What GenAI appends to each row."""
    longest = max(map(len, rows))
    made = generator(og, folder, len(rows), length=longest + count)
    made.append_tokens(padded(rows, pad=0))
    while not made.is_done():
        made.generate_next_token()
    return [made.get_sequence(index)[longest:].tolist() for index in range(len(rows))]


def expected_tokens(runner: Any, rows: Rows, count: int) -> list[list[int]]:
    """The same by this project's loop, without the token that ends a text; what follows that is padding."""
    generation = Generator(runner).start(rows, GenerateOptions(max_tokens=count))
    for _ in generation:
        pass
    ends = runner.spec.eos_token_ids
    return [
        [token for token in completion.token_ids if token not in ends]
        for completion in generation.completions
    ]


def same_text(found: list[list[int]], expected: list[list[int]]) -> None:
    for row, want in zip(found, expected, strict=True):
        assert row[: len(want)] == want
        assert not any(row[len(want) :])  # id 0 ends texts, and pads


class NeverSteps(OrtRunner):
    """What GenAI makes of a batch: its every call has several tokens, which to it are a prompt."""

    def step(self, *call: Any) -> Any:
        return self.prefill(*call)


def prompts(vocab: int, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(1, vocab, length).tolist() for length in lengths]


# -- tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GEOMETRIES)
def test_tokens_are_those_of_generate(name: str, og: Any, exported: Exported) -> None:
    """Prompts of one token, of several chunks, and between, by themselves and in one batch."""
    model, options = GEOMETRIES[name]
    folder, oracle = exported(model, **({"dtype": "float32"} | options))
    exact = not {"dtype", "weight_format"} & set(options)
    runner = oracle if exact else open_runner(open_bundle(folder), "cpu", threads=1)
    rows = prompts(256, 1, 5, 70, 33)
    alone = [found_tokens(og, folder, [row], 12)[0] for row in rows]
    same_text(alone, expected_tokens(runner, rows, 12))
    runner = oracle if exact else NeverSteps(open_bundle(folder), threads=1)
    same_text(found_tokens(og, folder, rows, 12), expected_tokens(runner, rows, 12))


def test_the_sample_in_its_own_words(og: Any, sample_bundle: Path) -> None:
    """Text through GenAI's tokenizer: greedy as `generate` has it, and seeded."""
    folder = sample_bundle
    tokenizer = og.Tokenizer(opened(folder))
    ours = Library.from_file(str(folder / "tokenizer.json"))
    text = "def main(args):\n    été = ☃"
    ids = tokenizer.encode(text).tolist()
    assert ids == ours.encode(text).ids
    assert tokenizer.decode(np.array(ids, np.int32)) == text
    texts = ["import os", "class Reader(object):\n    def __init__(self, path):", "x"]
    batch = tokenizer.encode_batch(texts).as_numpy()
    rows = [ours.encode(text).ids for text in texts]
    np.testing.assert_array_equal(batch, padded(rows, pad=0))
    runner = open_runner(open_bundle(folder), "cpu", threads=1)
    assert found_tokens(og, folder, rows, 24) == expected_tokens(runner, rows, 24)
    sampled = []
    for seed in (7, 7, 8):
        made = generator(
            og, folder, do_sample=True, top_k=40, top_p=0.9, temperature=0.8, random_seed=seed, length=40
        )
        made.append_tokens(ids)
        while not made.is_done():
            made.generate_next_token()
        sampled.append(made.get_sequence(0).tolist())
    assert sampled[0] == sampled[1] != sampled[2]


def test_the_example_of_the_page(
    og: Any, sample_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/genai.md").read_text(), re.DOTALL | re.M)
    (tmp_path / "tiny-stdlib.bundle").symlink_to(sample_bundle)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.startswith("def main():\n")


@pytest.mark.parametrize(
    ("kind", "grammar", "accepts"),
    [
        ("regex", "[0-9]{3}-[a-c]{2,5}", lambda text: len(text) <= 9 and text[3] == "-"),
        (
            "json_schema",
            '{"type": "object", "properties": {"a": {"enum": [12, 345]}}, "required": ["a"],'
            ' "additionalProperties": false}',
            lambda text: json.loads(text) in ({"a": 12}, {"a": 345}),
        ),
    ],
)
def test_guidance(kind: str, grammar: str, accepts: Any, og: Any, sample_bundle: Path) -> None:
    tokenizer = og.Tokenizer(opened(sample_bundle))
    ids = tokenizer.encode("def main(")
    parameters = og.GeneratorParams(opened(sample_bundle))
    parameters.set_search_options(max_length=100)
    parameters.set_guidance(kind, grammar)
    made = og.Generator(opened(sample_bundle), parameters)
    made.append_tokens(ids)
    while not made.is_done():
        made.generate_next_token()
    assert accepts(tokenizer.decode(made.get_sequence(0)[len(ids) :]))


def test_appended_prompts(og: Any, exported: Exported) -> None:
    """Before anything is generated, in the middle of it, of one token, and of several chunks."""
    folder, oracle = exported(neox())
    made = generator(og, folder, length=250)
    sequence: list[int] = []
    for piece in prompts(256, 9, 4, 130, 1, 40):
        if sequence:
            made.get_logits()  # reads the token that was chosen last
        made.append_tokens(piece)
        sequence += piece
        want = expected_tokens(oracle, [sequence], 3)[0]
        for _ in want:
            made.generate_next_token()
        sequence += want
        assert made.get_sequence(0).tolist() == sequence


def test_a_conversation_goes_on_after_the_end_of_a_text(og: Any, exported: Exported) -> None:
    """What ends a text is not part of it, so nothing has to be read before the next prompt."""
    folder, oracle = exported(neox())
    made, sequence = generator(og, folder), prompts(256, 9)[0]
    made.append_tokens(sequence)
    logits = np.full((1, 1, 256), -1.0, np.float32)
    logits[..., 0] = 1.0  # the model would go on: say for it that the text ends
    made.set_logits(logits)
    made.generate_next_token()
    assert made.is_done() and made.get_sequence(0).tolist() == sequence
    more = prompts(256, 6)[0]
    made.append_tokens(more)
    made.generate_next_token()
    assert made.get_sequence(0).tolist()[-1:] == expected_tokens(oracle, [[*sequence, *more]], 1)[0]


# -- what would be wrong is refused --------------------------------------------------------------------------


def test_a_prompt_after_a_token_that_was_not_read(og: Any, exported: Exported) -> None:
    made = generator(og, exported(neox())[0])
    made.append_tokens([5, 6, 7])
    made.generate_next_token()
    with pytest.raises(RuntimeError, match="call get_logits before append_tokens"):
        made.append_tokens([8, 9])


def test_beam_search(og: Any, exported: Exported) -> None:
    with pytest.raises(RuntimeError, match="Beam search "):
        generator(og, exported(neox())[0], num_beams=2)


@pytest.mark.parametrize(
    "rows", [[[5, 6, 7], []], [[0, 0, 5], [6, 7, 8]]], ids=["nothing else", "on the left"]
)
def test_a_batch_with_padding_in_front(rows: list[list[int]], og: Any, exported: Exported) -> None:
    made = generator(og, exported(neox())[0], 2)
    with pytest.raises(RuntimeError, match="begins with padding"):
        made.append_tokens(padded(rows, pad=0))


def test_padding_that_is_no_other_token_may_begin_no_prompt_of_a_batch(
    og: Any, remade: Any, exported: Exported
) -> None:
    folder, oracle = remade(config={"pad_token_id": 3})[0], exported(neox())[1]
    made = generator(og, folder, 2)
    with pytest.raises(RuntimeError, match="begins with padding"):
        made.append_tokens(np.array([[3, 5], [6, 7]], np.int32))
    rows = [[0, 5], [6, 7, 8]]
    made = generator(og, folder, 2)
    made.append_tokens(padded(rows, pad=3))
    made.generate_next_token()
    assert [[made.get_sequence(index)[3]] for index in (0, 1)] == expected_tokens(oracle, rows, 1)
    alone = generator(og, folder)
    alone.append_tokens([3, 5])  # by itself a row has no padding
    alone.generate_next_token()
    assert [alone.get_sequence(0)[2]] == expected_tokens(oracle, [[3, 5]], 1)[0]


def test_token_ids_that_the_model_does_not_have(og: Any, exported: Exported) -> None:
    folder = exported(neox())[0]
    with pytest.raises(RuntimeError, match="a token id is negative"):
        generator(og, folder).append_tokens([5, -1])
    with pytest.raises(RuntimeError, match="out of data bounds"):
        generator(og, folder).append_tokens([5, 256])


def test_more_tokens_than_the_model_has_positions(og: Any, exported: Exported) -> None:
    model, options = GEOMETRIES["trained tables, all logits"]
    folder = exported(model, **({"dtype": "float32"} | options))[0]
    with pytest.raises(RuntimeError, match="cannot be greater than model context_length"):
        generator(og, folder, length=129)
    generator(og, exported(neox())[0], length=100_000)


# -- the files -----------------------------------------------------------------------------------------------


@pytest.fixture
def remade(exported: Exported, tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """remade(fields of the spec, name=content of name.json...): a bundle's graphs with GenAI's files made
    anew, as an export makes them, and genai_config.json."""

    def make(fields: dict[str, Any] | None = None, **files: Any) -> tuple[Path, dict[str, Any]]:
        bundle, folder = open_bundle(exported(neox())[0]), tmp_path / "remade"
        folder.mkdir()
        for name in ("prefill.onnx", "step.onnx", "weights.data"):
            (folder / name).symlink_to(bundle.path / name)
        for name, content in ({"config": {}} | files).items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        genai.write_genai(replace(bundle.spec, **(fields or {})), folder)
        return folder, json.loads((folder / "genai_config.json").read_text())

    return make


def test_defaults_are_the_checkpoint_s(remade: Any, og: Any) -> None:
    generation = {
        "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 1000, "num_beams": 4, "max_length": 20,
        "repetition_penalty": 1.2, "pad_token_id": 9,
    }  # fmt: skip
    folder, found = remade({"bos_token_id": 4, "eos_token_ids": (7, 8)}, generation_config=generation)
    assert found["search"] == {
        "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 256, "repetition_penalty": 1.2,
        "num_beams": 1, "max_length": 128,
    }  # fmt: skip
    model = found["model"]
    tokens = [model[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
    assert (tokens, model["vocab_size"], model["context_length"]) == ([4, [7, 8], 9], 256, 2**31 - 1)
    made = og.Generator(opened(folder), og.GeneratorParams(opened(folder)))
    made.append_tokens([5, 6])
    made.generate_next_token()


def test_a_model_without_an_end_and_with_odd_defaults(remade: Any, og: Any) -> None:
    """Values that GenAI would refuse are left out, so that its own hold; texts go on to max_length."""
    odd = {"temperature": 0, "top_p": 1.5, "top_k": -1, "repetition_penalty": "much", "do_sample": None}
    folder, found = remade(
        {"bos_token_id": None, "eos_token_ids": ()}, config={"pad_token_id": -1}, generation_config=odd
    )
    assert found["search"] == {"do_sample": False, "num_beams": 1, "max_length": 128}
    assert "bos_token_id" not in found["model"]
    assert (found["model"]["eos_token_id"], found["model"]["pad_token_id"]) == ([], 0)
    assert len(found_tokens(og, folder, [[5, 6]], 20)[0]) == 20


def test_defaults_know_the_last_position(remade: Any) -> None:
    found = remade({"decay": "tables", "decay_rows": 64})[1]
    assert (found["search"]["max_length"], found["model"]["context_length"]) == (64, 64)


def unigram() -> Library:
    """Of a few letters."""
    pieces = [("<unk>", 0.0), *((letter, -2.0) for letter in "▁abc"), ("▁a", -1.0), ("bc", -1.0)]
    library = Library(Unigram(pieces, unk_id=0))
    library.pre_tokenizer = Metaspace()
    return library


@pytest.mark.parametrize(
    ("kind", "given", "left"),
    [
        ("BPE", None, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ("BPE", {"tokenizer_class": "HouseTokenizer", "a": 1},
         {"tokenizer_class": "PreTrainedTokenizerFast", "a": 1}),
        ("BPE", {"tokenizer_class": "GPTNeoXTokenizerFast"}, {"tokenizer_class": "GPTNeoXTokenizerFast"}),
        ("BPE", {"a": 1}, {"a": 1}),
        ("Unigram", None, {}),
        ("Unigram", {"tokenizer_class": "LlamaTokenizerFast", "a": 1}, {"a": 1}),
        ("Unigram", {"tokenizer_class": "T5Tokenizer"}, {"tokenizer_class": "T5Tokenizer"}),
    ],
)  # fmt: skip
def test_tokenizers_open(
    kind: str, given: dict[str, Any] | None, left: dict[str, Any], og: Any, remade: Any, tmp_path: Path
) -> None:
    """GenAI wants a class that it knows; what it makes of tokenizer.json is what `tokenizers` makes of it."""
    (tmp_path / "t").mkdir()
    if kind == "BPE":
        write_tokenizer(tmp_path / "t", 256)
        library = Library.from_file(str(tmp_path / "t/tokenizer.json"))
    else:
        library = unigram()
    files = {"tokenizer": json.loads(library.to_str())}
    if given is not None:
        files["tokenizer_config"] = given
    folder, _ = remade(**files)
    assert json.loads((folder / "tokenizer_config.json").read_text()) == left
    found = og.Tokenizer(opened(folder)).encode("abc a bcb").tolist()
    assert found == library.encode("abc a bcb").ids


def test_a_bundle_without_a_tokenizer_runs_with_token_ids(og: Any, exported: Exported) -> None:
    folder = exported(neox())[0]
    assert not (folder / "tokenizer.json").exists()
    assert not (folder / "tokenizer_config.json").exists()
    assert found_tokens(og, folder, [[5, 6]], 2)


# -- as parts of a bundle ------------------------------------------------------------------------------------


def test_readers_that_do_not_know_them_see_nothing_of_them(exported: Exported, tmp_path: Path) -> None:
    """They take each .onnx in `files` for a graph of the model; `genai` is a key that they pass over."""
    folder = exported(neox())[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["genai"]) == {"genai_config.json", "adapter.onnx"}
    assert manifest["format_version"] == 1 and not set(manifest["genai"]) & set(manifest["files"])
    assert open_bundle(folder).runs_with_genai


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("name", ["genai_config.json", "adapter.onnx"])
def test_they_are_checked_like_all_files(name: str, exported: Exported, tmp_path: Path) -> None:
    folder = copy_of(exported(neox())[0], tmp_path / "b")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises(BundleError, match="SHA-256 differs"):
        open_bundle(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match="is missing"):
        open_bundle(folder)


def test_bundles_without_them_open(exported: Exported, tmp_path: Path, capsys: Any) -> None:
    folder = copy_of(exported(neox())[0], tmp_path / "b")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest.pop("genai"):
        (folder / name).unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert not open_bundle(folder).runs_with_genai
    for path, runs in ((folder, False), (exported(neox())[0], True)):
        assert main(["--json", "inspect", str(path)]) == 0
        assert json.loads(capsys.readouterr().out)["bundle"]["genai"] is runs


@pytest.mark.parametrize(
    "table", [None, [], {}, {"adapter.onnx": {"sha256": "0" * 64, "bytes": 1}}, {"genai_config.json": 1}]
)
def test_bad_tables_are_refused(table: Any, exported: Exported, tmp_path: Path) -> None:
    folder = copy_of(exported(neox())[0], tmp_path / "b")
    manifest = json.loads((folder / "manifest.json").read_text()) | {"genai": table}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="bad or missing value for genai"):
        open_bundle(folder)


def test_no_graph_that_is_run_here_hides_among_them(exported: Exported, tmp_path: Path) -> None:
    """They are not checked for what they hold, only for being what the manifest says."""
    folder = copy_of(exported(neox())[0], tmp_path / "b")
    whole = json.loads((folder / "manifest.json").read_text())
    manifest = whole | {
        "graphs": whole["graphs"] | {"step": whole["graphs"]["step"] | {"file": "adapter.onnx"}}
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"bad or missing value for graphs.step.file"):
        open_bundle(folder)
    listed = whole | {"files": whole["files"] | whole.pop("genai")}
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in listed.items() if k != "genai"}))
    with pytest.raises(BundleError, match="a graph has other outputs"):
        open_bundle(folder)
