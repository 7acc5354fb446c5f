"""Texts that keep to a grammar, by models that want something else: random weights, sampled as they are."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.makers.toy_bundle import SPEC, make_bundle
from support.oracles.array_rows import ArrayRows
from support.oracles.json_schema import satisfies
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from dijiang_engines.errors import BundleError, RunnerError, UsageError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.generation import grammar_apart
from dijiang_engines.generation.generator import Generator
from dijiang_engines.generation.grammar import Grammar, Grammars
from dijiang_engines.generation.loop import Completion, GenerateOptions
from dijiang_engines.generation.response_format import requested_grammar
from dijiang_engines.generation.session import load_session
from dijiang_engines.runners import open_runner
from dijiang_engines.sampling import SamplingOptions
from dijiang_engines.serving.job import Job, JobOptions
from dijiang_engines.serving.scheduler import Limits, Scheduler
from dijiang_engines.tokenizer.load import load_tokenizer
from dijiang_engines.tokenizer.tokenizer import Tokenizer
from dijiang_export.cli import main

HOT = SamplingOptions(temperature=1.0)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "bé", 3, None]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS = {
    "person": PERSON,
    "nested": {
        "type": "object",
        "properties": {"people": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2}},
        "required": ["people"],
        "additionalProperties": False,
    },
    "recursive": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "boolean"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
    },
    "number": {"type": "number", "exclusiveMinimum": -1, "maximum": 2.5},
    "multiple": {"type": "integer", "minimum": 3, "maximum": 100, "multipleOf": 7},
    "const": {"const": {"日本": ["é😀\n\"\\", 0.5, -7, True, None, {}]}},
    "union": {"anyOf": [{"type": "null"}, {"type": "array", "prefixItems": [{"const": 1}], "items": False}]},
    "one of": {"oneOf": [{"type": "boolean"}, {"enum": ["x", "y"]}]},
    "all of": {"allOf": [{"type": "string", "maxLength": 3}, {"pattern": "^[ab]+$"}]},
    "pattern": {"type": "string", "pattern": "^[0-9]{2}-(x|yé)$"},
}  # fmt: skip
REGEXES = [
    "[0-9]{4}-[0-9]{2}", "(yes|no|don't know)", "a+", "é{2}日?", "\\d\\.\\d", "x*?y", "^ab$", "[^a-z\n]{3}",
    "a/b\"c\\\\", "(?i)abc", "[a&\\&b]{3}", "[a-z_]{1,3}\n.", "(a|b){0,9}c",
]  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; every byte is a token, and two ids of the vocabulary are none."""
    folder = tmp_path_factory.mktemp("toy") / "toy.bundle"
    make_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def generator(bundle: Path) -> Generator:
    model = open_bundle(bundle)
    return Generator(open_runner(model, "cpu", threads=1), load_tokenizer(model))


@pytest.fixture(scope="module")
def grammars(generator: Generator) -> Grammars:
    assert generator.tokenizer is not None
    return Grammars(generator.tokenizer, generator.runner.spec)


def run(
    generator: Generator, grammar: Grammar, prompts: list[Any], seed: int = 0, **options: Any
) -> list[Completion]:
    given = GenerateOptions(
        **{"max_tokens": 600, "sampling": HOT, "seed": seed, "grammar": grammar} | options
    )
    generation = generator.start(prompts, given)
    texts = [""] * len(prompts)
    for event in generation:
        texts[event.row] += event.text
    assert texts == [completion.text for completion in generation.completions]
    return generation.completions


@pytest.fixture(scope="module")
def hurried(generator: Generator) -> Iterator[Grammars]:
    """As `grammars`, with less patience."""
    assert generator.tokenizer is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar_apart, "SECONDS", 0.5)
        yield Grammars(generator.tokenizer, generator.runner.spec)


# -- what comes out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_texts_satisfy_their_schema(generator: Generator, grammars: Grammars, name: str) -> None:
    schema = SCHEMAS[name]
    found = set()
    for seed in range(3):
        for completion in run(generator, grammars.json_schema(schema), ["a", "bcd", "ef"], seed):
            assert completion.finish_reason in ("stop", "eos")
            assert completion.grammar_complete
            assert satisfies(json.loads(completion.text), schema), completion.text
            found.add(completion.text)
    assert name == "const" or len(found) > 1


def test_the_oracle_knows_what_is_wrong() -> None:
    good = {"name": "x", "age": 3}
    assert satisfies(good, PERSON)
    for bad in (
        {"name": "x"},
        good | {"age": 3.5},
        good | {"more": 1},
        good | {"kind": True},
        [good],
        good | {"name": ""},
    ):
        assert not satisfies(bad, PERSON)


@pytest.mark.parametrize("pattern", REGEXES)
def test_texts_match_their_expression(generator: Generator, grammars: Grammars, pattern: str) -> None:
    for completion in run(generator, grammars.regex(pattern), ["a", "bcd", "ef"]):
        assert completion.finish_reason in ("stop", "eos")
        assert re.fullmatch(pattern, completion.text), completion.text


def test_any_object(generator: Generator, grammars: Grammars) -> None:
    whole = 0
    for completion in run(generator, grammars.json_object(), ["a", "bcd", "ef", "g"]):
        assert completion.grammar_complete == (completion.finish_reason != "length")
        if completion.grammar_complete:
            assert isinstance(json.loads(completion.text), dict)
            whole += 1
        else:
            assert completion.text.startswith("{")
    assert whole


def test_a_row_does_not_depend_on_its_neighbours(generator: Generator, grammars: Grammars) -> None:
    """Whose texts end at other places."""
    grammar = grammars.json_schema(PERSON)
    together = run(generator, grammar, ["a", "bcd", "ef"])
    assert len({len(completion.token_ids) for completion in together}) > 1
    for index, prompt in enumerate(["a", "bcd", "ef"]):
        options = GenerateOptions(600, HOT, grammar=grammar)
        alone = generator.start([prompt], options, first_stream=index)
        assert [event.token for event in alone] == together[index].token_ids


def test_a_grammar_serves_many_texts(generator: Generator, grammars: Grammars) -> None:
    """What one text has consumed, another has not; and equal grammars are compiled once."""
    first = run(generator, grammars.regex("[ab]{5}x"), ["a"])
    assert grammars.regex("[ab]{5}x") is grammars.regex("[ab]{5}x")
    assert run(generator, grammars.regex("[ab]{5}x"), ["a"]) == first


def test_the_end_of_a_text(generator: Generator, grammars: Grammars) -> None:
    exact = run(generator, grammars.regex("[ab]{4}"), ["a"], max_tokens=4)[0]
    assert (exact.finish_reason, len(exact.token_ids)) == ("stop", 4)
    cut = run(generator, grammars.regex("[ab]{5}"), ["a"], max_tokens=4)[0]
    assert (cut.finish_reason, cut.grammar_complete) == ("length", False)
    stopped = run(generator, grammars.regex("aaab{9}"), ["a"], stop=("ab",))[0]
    assert (stopped.finish_reason, stopped.text, stopped.grammar_complete) == ("stop", "aa", False)
    open_end = run(generator, grammars.regex("a*"), ["a"], seed=3, max_tokens=2000)[0]
    assert (open_end.finish_reason, open_end.grammar_complete) == ("eos", True)
    assert set(open_end.text) <= {"a"}


def test_a_model_without_an_end_of_text(generator: Generator) -> None:
    assert generator.tokenizer is not None
    runner: Any = Noise(replace(SPEC, eos_token_ids=()))
    grammars = Grammars(generator.tokenizer, runner.spec)
    without = Generator(runner, generator.tokenizer)
    assert run(without, grammars.regex("a{3}"), ["x"])[0].text == "aaa"
    endless = run(without, grammars.regex("a+"), ["x"], max_tokens=20)[0]
    assert (endless.text, endless.finish_reason, endless.grammar_complete) == ("a" * 20, "length", True)


def test_several_tokens_end_a_text(generator: Generator) -> None:
    assert generator.tokenizer is not None
    spec = replace(SPEC, eos_token_ids=(0, 66))
    grammar = Grammars(generator.tokenizer, spec).regex(".{2,}")
    mask = grammar.guide().allowed()
    assert not mask[[0, 66]].any()
    guide = grammar.guide()
    for token in (5, 6):
        assert not guide.accept(token)
    assert guide.allowed()[[0, 66]].all()
    assert not guide.allowed()[258:].any()  # ids that are no tokens
    assert guide.accept(66)


def test_sampling_options_and_penalties(generator: Generator, grammars: Grammars) -> None:
    for sampling in (
        SamplingOptions(), SamplingOptions(0.7, top_k=3), SamplingOptions(1.5, top_p=0.5),
        SamplingOptions(1.0, min_p=0.2, repetition_penalty=1.5),
    ):  # fmt: skip
        completion = run(generator, grammars.json_schema(SCHEMAS["multiple"]), ["a"], sampling=sampling)[0]
        assert json.loads(completion.text) % 7 == 0


def test_broken_logits_are_not_hidden_by_a_mask(generator: Generator, grammars: Grammars) -> None:
    assert generator.tokenizer is not None
    runner: Any = Noise(SPEC, broken=200)
    with pytest.raises(RunnerError, match="not finite"):
        run(Generator(runner, generator.tokenizer), grammars.regex("a+"), ["x"])


class Noise(ArrayRows):
    """A fake runner whose logits are random numbers, so it proves what is made of them alone.

    It has a loop of its own, which knows no grammars.
    """

    name, all_logits = "noise", False

    def __init__(self, spec: Any, broken: int | None = None) -> None:
        self.spec, self.broken = spec, broken

    def new_state(self, batch: int) -> list[np.ndarray]:
        return [np.zeros((batch, *self.spec.state_shape), np.float32) for _ in range(self.spec.num_layers)]

    def prefill(self, ids: Any, positions: Any, lens: Any, state: Any) -> np.ndarray:
        rng = np.random.default_rng([int(positions[0]), int(ids[0, 0])])
        logits = rng.standard_normal((len(ids), 1, self.spec.vocab_size)).astype(np.float32) * 5
        if self.broken is not None:
            logits[..., self.broken] = np.nan
        return logits

    step = prefill

    def export_state(self, state: Any) -> list[np.ndarray]:
        return [layer.copy() for layer in state]

    import_state = export_state

    def start_decoding(self, state: Any, request: Any) -> Any:
        raise AssertionError("a runner's own loop cannot keep to a grammar")


def test_a_runner_s_own_loop_is_not_used(generator: Generator, grammars: Grammars) -> None:
    runner: Any = Noise(SPEC)
    assert (
        run(Generator(runner, generator.tokenizer), grammars.regex("[ab]{9}"), ["x"])[0].finish_reason
        == "stop"
    )
    with pytest.raises(AssertionError, match="own loop"):
        list(Generator(runner, generator.tokenizer).start(["x"], GenerateOptions(5)))


# -- beside llguidance itself --------------------------------------------------------------------------------


def test_greedy_text_is_the_likeliest_that_llguidance_allows(sample_bundle: Path) -> None:
    """llguidance reads tokenizer.json by itself there, and the loop is written out."""
    from llguidance import LLMatcher, LLTokenizer

    model = open_bundle(sample_bundle)
    tokenizer, runner = load_tokenizer(model), open_runner(model, "cpu", threads=1)
    assert tokenizer is not None
    assert model.tokenizer_path is not None
    theirs = LLTokenizer(model.tokenizer_path.read_text(), n_vocab=2048, eos_token=[0])
    pattern = "(import [a-z]{3,9}\\n){2}def [a-z_]{2,12}\\(self\\):"
    lark = f'%llguidance {{"no_forcing": true}}\nstart: /{pattern}/\n'
    matcher = LLMatcher(theirs, LLMatcher.grammar_from_lark(lark))
    ids = tokenizer.encode("import os\n")
    state, expected = runner.new_state(1), []
    logits = runner.prefill(np.array([ids]), np.array([0]), np.array([len(ids)]), state)[0, -1]
    guide = Grammars(tokenizer, runner.spec).regex(pattern).guide()
    while not matcher.is_stopped():
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:2048] > 0
        np.testing.assert_array_equal(guide.allowed(), mask)
        token = int(np.where(mask, logits, -np.inf).argmax())
        guide.accept(token)
        assert matcher.consume_token(token)
        expected.append(token)
        place = np.array([len(ids) + len(expected) - 1])
        logits = runner.step(np.array([[token]]), place, np.array([1]), state)[0, 0]
    grammar = Grammars(tokenizer, runner.spec).regex(pattern)
    generator = Generator(runner, tokenizer)
    found = run(generator, grammar, ["import os\n"], sampling=SamplingOptions())[0]
    assert found.token_ids == expected
    assert re.fullmatch(pattern, found.text)


def test_tokens_are_the_bytes_that_llguidance_reads(sample_bundle: Path, tmp_path: Path) -> None:
    from llguidance import LLTokenizer

    pieces(tmp_path)
    for path, size in ((sample_bundle / "tokenizer.json", 2048), (tmp_path / "tokenizer.json", len(PIECES))):
        theirs = LLTokenizer(path.read_text(), n_vocab=size, eos_token=[0])
        mine = Tokenizer(path).token_bytes(size)
        assert mine[0] is None
        for token in range(1, size):
            if mine[token] != b"\xff":  # which is in no text, and marks special tokens there
                assert mine[token] == theirs.decode_bytes([token])


# -- other tokenizers ----------------------------------------------------------------------------------------

PIECES = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "a", "▁", "日", "the"]


def pieces(folder: Path, decoder: Any = None) -> Tokenizer:
    """As SentencePiece's: words that begin with a space, and bytes; the first space of a text is none."""
    backend = Backend(models.WordLevel({t: i for i, t in enumerate(PIECES)}, unk_token="a"))
    backend.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("prompt", [[0], [257, 258]], ids=["at the start", "after words"])
def test_pieces_and_bytes(tmp_path: Path, prompt: list[int]) -> None:
    tokenizer = pieces(tmp_path)
    runner: Any = Noise(replace(SPEC, vocab_size=len(PIECES), bos_token_id=0))
    grammars, generator = Grammars(tokenizer, runner.spec), Generator(runner, tokenizer)
    for pattern in ("the cat", "( ?the| cat)+a", "日é日{2}", "[ a]{3}"):
        for seed in range(4):
            text = run(generator, grammars.regex(pattern), [[*prompt, *[0] * seed]], seed)
            assert [re.fullmatch(pattern, one.text) is not None for one in text] == [True], text
    schema: Any = {"const": ["日é😀 the"]}
    assert json.loads(run(generator, grammars.json_schema(schema), [prompt])[0].text) == schema["const"]


def test_a_first_space_that_would_be_lost_is_not_chosen(tmp_path: Path) -> None:
    tokenizer = pieces(tmp_path)
    grammar = Grammars(tokenizer, replace(SPEC, vocab_size=len(PIECES))).regex(" the")
    assert np.flatnonzero(grammar.guide().allowed()).tolist() == [1 + 0x20, 257, 260]
    with pytest.raises(RunnerError, match="no token that can come next"):
        grammar.guide(at_start=True).allowed()


def test_a_decoder_whose_words_depend_on_their_neighbours(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be kept to a grammar"):
        Grammars(pieces(tmp_path, decoders.BPEDecoder("e")), replace(SPEC, vocab_size=len(PIECES)))
    spaced = pieces(tmp_path, decoders.WordPiece(cleanup=False))
    assert spaced.token_bytes(len(PIECES))[259] == b" a"


def test_characters_split_over_tokens_never_show_in_half(generator: Generator, grammars: Grammars) -> None:
    options = GenerateOptions(sampling=HOT, grammar=grammars.json_schema({"const": "日é😀"}))
    pieces_out = [event.text for event in generator.start(["a"], options)]
    assert "".join(pieces_out) == '"日é😀"'
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces_out)


def test_a_model_that_cannot_spell_it(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"</s>": 0, "a": 1, "b": 2}, unk_token="a"))
    backend.decoder = decoders.Fuse()
    backend.save(str(tmp_path / "tokenizer.json"))
    grammars = Grammars(Tokenizer(tmp_path / "tokenizer.json"), replace(SPEC, vocab_size=3))
    assert grammars.regex("ab").guide().allowed().tolist() == [False, True, False]
    for pattern in ("é", "[ab]{2}c"):
        with pytest.raises(UsageError, match="cannot be used"):
            grammars.regex(pattern)


# -- one text of several gets stuck --------------------------------------------------------------------------


def test_a_text_that_cannot_go_on_is_the_only_one_that_ends(
    generator: Generator, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = grammars.regex("[ab]{20}")
    options = GenerateOptions(sampling=HOT, grammar=grammar)
    generation = generator.start(["a", "bcd", "ef"], options)
    broken = generation._guides[1]  # type: ignore[index]
    monkeypatch.setattr(broken, "_matcher", grammars.regex("c").guide()._matcher)
    with pytest.raises(RunnerError, match="row 1"):
        list(generation)
    first, second, third = generation.completions
    assert [first.finish_reason, second.finish_reason, third.finish_reason] == ["stop", "error", "stop"]
    assert len(first.text) == len(third.text) == 20


def test_jobs_of_the_scheduler(
    generator: Generator, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(generator.runner, generator.tokenizer, Limits(slots=4))
    good, bad = grammars.json_schema(PERSON), grammars.regex("[ab]{20}")
    spoiled = bad.guide()
    monkeypatch.setattr(spoiled, "_matcher", grammars.regex("c").guide()._matcher)
    jobs = [
        Job([5, 6], JobOptions(600, HOT, seed=1, choices=2, guide=good.guide)),
        Job([7], JobOptions(600, HOT, guide=lambda: spoiled)),
        Job([8], JobOptions(30, HOT, ignore_eos=True)),
        Job([9], JobOptions(20, HOT, guide=bad.guide)),
    ]
    for job in jobs:
        scheduler.submit(job)
    texts: dict[tuple[int, int], str] = {}
    ends: dict[tuple[int, int], Any] = {}
    while not scheduler.idle:
        for update in scheduler.round():
            key = (jobs.index(update.job), update.choice)
            texts[key] = texts.get(key, "") + update.text
            ends[key] = update.finish or update.error
    assert isinstance(ends.pop((1, 0)), RunnerError)
    assert ends == {(0, 0): "stop", (0, 1): "stop", (2, 0): "length", (3, 0): "stop"}
    assert all(satisfies(json.loads(texts[0, choice]), PERSON) for choice in (0, 1))
    assert re.fullmatch("[ab]{20}", texts[3, 0])


# -- bad and hostile grammars --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "not valid JSON"), ('{"a": 1, "a": 2}', "same key twice"), ("[]", "not a schema"),
        (3, "not a schema"),
        ({"type": "strin"}, "strin"), ({"enum": []}, "anyOf is empty"), ({"properties": 3}, "properties"),
        ({"items": 3}, "not a schema"), ({"minLength": "a"}, "minLength"), (False, "not a schema"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "greater"), ({"pattern": "("}, "unclosed group"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems' at #"), ({"not": {}}, "'not' at #"),
        ({"properties": {"a": {"maximun": 1}}}, "'maximun' at #/properties/a"),
        ({"$defs": {"a": {"if": {}}}}, "'if' at #/\\$defs/a"), ({"dependencies": {}}, "dependencies"),
        ({"x-guidance": {"lenient": True}}, "x-guidance"), ({"format": "credit-card"}, "credit-card"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "anyOf"),
        ({"minProperties": 3}, "minProperties"),
        ({"$ref": "https://example.com/s"}, "another document"),
        ({"$ref": "file:///etc/passwd"}, "another document"),
        ({"$ref": "#/$defs/none"}, "not there"), ({"$ref": "#"}, "no text satisfies it"),
        ({"$ref": "#/default", "default": {"not": {}}}, "'not'"),
        ({"const": "a\x01"}, "control character"), ({"const": 2**53 + 1}, "too large"),
        ({"const": float("nan")}, "no JSON value"), ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"properties": {"a": {"$id": "x"}}}, "identifier"), ({"a": object()}, "no JSON value"),
    ],
)  # fmt: skip
def test_schemas_that_no_text_can_be_kept_to(grammars: Grammars, schema: Any, message: str) -> None:
    with pytest.raises(UsageError, match=r"^the JSON schema") as failed:
        grammars.json_schema(schema)
    assert re.search(message, str(failed.value)), failed.value
    assert "%llguidance" not in str(failed.value)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "unclosed group"), ("", "empty"), ("a\\", "backslash"), ("(a)\\1", "backreferences"),
        ("(?!a)b", "look-around"), ("a$b", "lookarounds"), ("[a&&b]", "set intersection"),
        ("a{3,2}", "repetition"),
        ("[[:alpha:]]", "nested set"), ("[^\\s\\S]", "no text satisfies it"), ("\ud800", "surrogate"),
        (7, "not a text"),
        ("$", "empty text alone"), ("x" * 20_000, "too long"),
    ],
)  # fmt: skip
def test_expressions_that_no_text_can_be_kept_to(grammars: Grammars, pattern: Any, message: str) -> None:
    with pytest.raises(UsageError, match=r"^the regular expression") as failed:
        grammars.regex(pattern)
    assert re.search(message, str(failed.value)), failed.value


HOSTILE: dict[str, Any] = {
    "repeats of repeats": "(((a{1000}){1000}){1000}){1000}",
    "parentheses": "(" * 8000 + "a" + ")" * 8000,
    "optional": "(a?){5000}a{5000}",
    "many states": "(.*a.{100}|.*b.{101}|.*c.{99})",
    "expressions": "([a-z]*[a-y]*[a-x]*){500}!",
    "a slow set": "(?i)" + "[\x00-\U0010ffff]" * 400,
    "divisor": {"type": "integer", "multipleOf": 123456789},
    "names": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}},
    "depth": '{"items":' * 100_00 + "{}" + "}" * 100_00,
    "references": {
        "$ref": "#/$defs/d30",
        "$defs": {
            "d0": {"type": "object"},
            **{f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i - 1}"}] * 2} for i in range(1, 31)},
        },
    },
    "products": {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}{j}": {"type": "integer"}}} for j in range(4)]}
            for i in range(12)
        ]
    },
    "intersections": {"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnop"]},
    "counts": {"type": "array", "items": {"type": "array", "minItems": 10**9}, "minItems": 10**9},
    "values": {"enum": list(range(30_000))},
    "length": "[" * 300_000,
}


@pytest.mark.parametrize("name", sorted(HOSTILE.keys() - {"divisor"}))
def test_hostile_grammars_take_neither_long_nor_much(hurried: Grammars, name: str) -> None:
    """They are refused, or texts are kept to them with a bounded effort for each token."""
    value, started = HOSTILE[name], time.process_time()
    text = isinstance(value, str) and name not in ("depth", "length")
    make = hurried.regex if text else hurried.json_schema
    try:
        guide = make(value).guide()
    except UsageError:
        return
    rng = np.random.default_rng(0)
    try:
        for _ in range(100):
            if guide.accept(int(rng.choice(np.flatnonzero(guide.allowed())))):
                break
    except RunnerError:
        pass
    assert time.process_time() - started < 5


def test_a_compiler_that_dies_is_started_again(grammars: Grammars) -> None:
    grammars.regex("first")
    process = grammars._apart._process.running
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(UsageError, match="ends its process"):
        grammars.regex("second")
    assert grammars.regex("second").guide().allowed().any()


def test_a_grammar_that_takes_too_long(hurried: Grammars) -> None:
    with pytest.raises(UsageError, match="takes too long"):
        hurried.json_schema(HOSTILE["divisor"], "the JSON schema")
    assert hurried.json_schema({"type": "integer"})


def test_without_the_package(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert generator.tokenizer is not None
    with pytest.raises(UsageError, match="llguidance") as failed:
        Grammars(generator.tokenizer, SPEC)
    assert failed.value.hint == "pip install 'dijiang-export[guided]'"


def test_options_that_have_no_meaning_with_a_grammar(grammars: Grammars) -> None:
    for changes in ({"ignore_eos": True}, {"max_tokens": 0}):
        with pytest.raises(UsageError, match="grammar"):
            GenerateOptions(grammar=grammars.json_object(), **changes)  # type: ignore[arg-type]


# -- requests ------------------------------------------------------------------------------------------------


def test_requests_say_their_form(generator: Generator, grammars: Grammars) -> None:
    def text(**fields: Any) -> str:
        grammar = requested_grammar(lambda: grammars, **fields)
        assert grammar is not None
        return run(generator, grammar, ["a"])[0].text

    def unused() -> Grammars:
        raise AssertionError

    assert requested_grammar(unused) is None
    assert requested_grammar(unused, response_format={"type": "text"}) is None
    schema = {"name": "p", "schema": PERSON, "strict": True}
    assert satisfies(json.loads(text(response_format={"type": "json_schema", "json_schema": schema})), PERSON)
    assert text(response_format={"type": "regex", "pattern": "ab?c"}) in ("abc", "ac")
    assert text(response_format={"type": "text"}, guided_regex="xy") == "xy"
    assert text(guided_json='{"const": [1]}') == text(guided_json={"const": [1]}) == "[1]"
    assert (
        requested_grammar(lambda: grammars, response_format={"type": "json_object"}) is grammars.json_object()
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": "json"}, "response_format is not an object"),
        ({"response_format": {}}, r"response_format\.type"),
        ({"response_format": {"type": ["text"]}}, r"response_format\.type"),
        ({"response_format": {"type": "xml"}}, "json_schema"),
        ({"response_format": {"type": "text", "schema": {}}}, "'schema'"),
        ({"response_format": {"type": "json_schema"}}, r"response_format\.json_schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": 1}}, "not an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, r"json_schema\.schema is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            r"response_format\.json_schema\.schema has a keyword",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}}},
            r"strict is no bool",
        ),
        ({"response_format": {"type": "regex", "pattern": "("}}, r"response_format\.pattern cannot be used"),
        ({"guided_regex": ["a"]}, "guided_regex is not a text"),
        ({"guided_json": "{"}, "guided_json is not valid JSON"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_json and guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "said twice"),
    ],
)
def test_requests_that_are_wrong_name_their_field(grammars: Grammars, fields: Any, message: str) -> None:
    with pytest.raises(UsageError) as failed:
        requested_grammar(lambda: grammars, **fields)
    assert re.search(message, str(failed.value)), failed.value


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(PERSON))
    call = ["generate", str(bundle), "-p", "def main(", "-p", "import", "-t", "1", "--seed", "3"]
    for schema in (str(tmp_path / "schema.json"), json.dumps(PERSON)):
        assert main(["--json", *call, "--json-schema", schema, "-n", "300"]) == 0
        completions = json.loads(capsys.readouterr().out)["completions"]
        assert all(
            one["grammar_complete"] and satisfies(json.loads(one["text"]), PERSON) for one in completions
        )
    assert main([*call[:4], "--regex", "[0-9]{3}-x"]) == 0
    assert re.fullmatch("[0-9]{3}-x\n", capsys.readouterr().out)
    assert main([*call, "--regex", "a{9}", "-n", "2"]) == 0
    assert "ended before the grammar was complete: 2 of 2" in capsys.readouterr().err


def test_the_command_refuses(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text('{"type": "array", "uniqueItems": true}')
    for options, message in (
        (["--json-schema", str(tmp_path / "none.json")], "none.json is missing"),
        (["--json-schema", str(tmp_path / "bad.json")], "uniqueItems"),
        (["--json-schema", "{"], "not valid JSON"), (["--regex", "("], "unclosed group"),
        (["--json-schema", "{}", "--regex", "a"], "exclude each other"),
        (["--regex", "a", "--ignore-eos"], "ignore-eos"),
    ):  # fmt: skip
        assert main(["generate", str(bundle), "-p", "x", *options]) == 2
        output = capsys.readouterr()
        assert message in output.err
        assert not output.out
        assert "Traceback" not in output.err


def test_sessions(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A grammar is for what is new; what is half done cannot be saved, since nobody could go on with it."""
    first, second = tmp_path / "first", tmp_path / "second"
    call = ["generate", str(bundle), "--regex", "[0-9]{8}x"]
    assert main([*call, "-p", "import", "-n", "2", "--save-session", str(first)]) == 2
    assert "before its grammar was complete" in capsys.readouterr().err
    assert not first.exists()
    assert main([*call, "-p", "import", "--save-session", str(first)]) == 0
    assert main([*call, "-p", "\nfrom", "--session", str(first), "--save-session", str(second)]) == 0
    texts = capsys.readouterr().out.split()
    assert [re.fullmatch("[0-9]{8}x", text) is not None for text in texts] == [True, True]
    model = open_bundle(bundle)
    tokenizer = load_tokenizer(model)
    assert tokenizer is not None
    saved = tokenizer.decode(load_session(second, model).token_ids[0])
    assert saved == f"import{texts[0]}\nfrom{texts[1]}"
