"""The decode loop: against plain loops over NumPy models, for every way to prompt, batch, stop and sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.makers.toy_bundle import SPEC, ToyModel, make_bundle, write_byte_tokenizer
from support.oracles.numpy_runner import NumpyRunner, random_parameters

from dijiang_engines.errors import BundleError, PositionError, PromptError, RunnerError, UsageError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.generation.generator import GenerateOptions, Generation, Generator, SamplingOptions
from dijiang_engines.generation.session import load_session, save_session
from dijiang_engines.generation.stop import StopMatcher
from dijiang_engines.runners import open_runner
from dijiang_engines.sampling import sample, uniform
from dijiang_engines.tokenizer.tokenizer import Tokenizer

Toy = tuple[Path, ToyModel]
SAMPLED = SamplingOptions(temperature=1.5, top_k=50, top_p=0.95)
NOT_TOKENS = np.array([258, 259])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_byte_tokenizer(path)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def toy_runner(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ToyModel]:
    folder = tmp_path_factory.mktemp("toy") / "toy.bundle"
    model = make_bundle(folder)
    return open_runner(open_bundle(folder), "cpu", threads=1), model


@pytest.fixture
def generator(toy_runner: tuple[Any, ToyModel], tokenizer: Tokenizer) -> Generator:
    return Generator(toy_runner[0], tokenizer)


def plain_loop(
    model: ToyModel, ids: Sequence[int], count: int, options: SamplingOptions, seed: int = 0, stream: int = 0
) -> list[int]:
    """What must come out: every token from the whole text, with no state at all."""
    ids = list(ids)
    for _ in range(count):
        seen = np.isin(np.arange(SPEC.vocab_size), ids)[None]
        u = np.array([uniform(seed, stream, len(ids))])
        logits = model.logits(ids).astype(np.float32)[None]
        ids.append(int(sample(logits, options, u, seen=seen, banned=NOT_TOKENS)[0]))
    return ids[-count:]


def run(generation: Generation) -> list[list[int]]:
    for _ in generation:
        pass
    return [completion.token_ids for completion in generation.completions]


# -- tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [SamplingOptions(), SAMPLED, SamplingOptions(repetition_penalty=1.5), SamplingOptions(0.7, min_p=0.1)],
    ids=["greedy", "sampled", "penalty", "min-p"],
)
def test_tokens_are_those_of_a_plain_loop(
    generator: Generator, toy_runner: tuple[Any, ToyModel], sampling: SamplingOptions
) -> None:
    options = GenerateOptions(max_tokens=20, sampling=sampling, seed=7, ignore_eos=True)
    got = run(generator.start([[5, 6, 7]], options))
    assert got == [plain_loop(toy_runner[1], [5, 6, 7], 20, sampling, seed=7)]


@pytest.mark.parametrize("sampling", [SamplingOptions(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prefill_tokens", [2048, 5, 1])
def test_unequal_prompts_in_a_batch(
    toy_runner: tuple[Any, ToyModel], tokenizer: Tokenizer, sampling: SamplingOptions, prefill_tokens: int
) -> None:
    generator = Generator(toy_runner[0], tokenizer, prefill_tokens=prefill_tokens)
    prompts = [[5], [9, 8, 7, 6, 5, 4, 3, 2, 1], [11, 12, 13]]
    options = GenerateOptions(max_tokens=8, sampling=sampling, ignore_eos=True)
    got = run(generator.start(prompts, options))
    assert got == [plain_loop(toy_runner[1], p, 8, sampling, stream=i) for i, p in enumerate(prompts)]


def test_a_row_does_not_depend_on_its_neighbours(generator: Generator) -> None:
    options = GenerateOptions(max_tokens=12, sampling=SAMPLED, seed=3, ignore_eos=True)
    together = run(generator.start([[5], [6, 7, 8], [9, 9]], options))
    for index, prompt in enumerate([[5], [6, 7, 8], [9, 9]]):
        assert run(generator.start([prompt], options, first_stream=index)) == [together[index]]


def test_equal_prompts_draw_differently_and_seeds_matter(generator: Generator) -> None:
    options = GenerateOptions(max_tokens=12, sampling=SAMPLED, seed=1, ignore_eos=True)
    a, b = run(generator.start([[5], [5]], options))
    assert a != b
    assert run(generator.start([[5], [5]], options)) == [a, b]
    assert run(generator.start([[5]], replace(options, seed=2))) != [a]


def test_ids_without_a_token_are_never_generated(tokenizer: Tokenizer) -> None:
    """The vocabulary's padding has the largest logits here."""
    weights = random_parameters(NEOX)
    weights["lm_head.weight"][258:] = 0
    weights["final_norm.bias"][:] = 0
    weights["final_norm.bias"][0] = 50.0
    weights["lm_head.weight"][258:, 0] = 100.0
    runner = NumpyRunner(NEOX, weights)
    options = GenerateOptions(max_tokens=5, ignore_eos=True)
    assert all(token >= 258 for token in run(Generator(runner).start([[5]], options))[0])
    for sampling in (SamplingOptions(), SamplingOptions(2.0)):
        tokens = run(Generator(runner, tokenizer).start([[5]], replace(options, sampling=sampling)))[0]
        assert all(token < 258 for token in tokens)


NEOX = replace(
    SPEC, hidden_size=24, intermediate_size=40, num_heads=3, num_kv_heads=3, head_dim=8, rotary_dim=4,
    embedding_size=24,
)  # fmt: skip


def test_the_oracle_runs_in_the_same_loop(tokenizer: Tokenizer) -> None:
    """NumPy's DiJiang model with all logits, in pieces, against itself without a state."""
    weights = random_parameters(NEOX)
    options = GenerateOptions(max_tokens=6, ignore_eos=True)
    prompts = [[5, 6, 7, 8, 9], [10]]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            fresh = NumpyRunner(NEOX, weights)
            logits = fresh.prefill(np.array([ids]), np.array([0]), np.array([len(ids)]), fresh.new_state(1))
            logits[..., 258:] = -np.inf
            ids.append(int(logits[0, 0].argmax()))
        expected.append(ids[len(prompt) :])
    for all_logits in (False, True):
        runner = NumpyRunner(NEOX, weights, all_logits=all_logits)
        assert run(Generator(runner, tokenizer, prefill_tokens=4).start(prompts, options)) == expected
        assert max(batch * length for call, batch, length in runner.calls if call == "prefill") <= 4


def test_all_logits_bundles(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = make_bundle(tmp_path / "b", logits="all")
    runner = open_runner(open_bundle(tmp_path / "b"), "cpu", threads=1)
    options = GenerateOptions(max_tokens=5, ignore_eos=True)
    got = run(Generator(runner, tokenizer).start([[5, 6, 7], [8]], options))
    assert got == [plain_loop(model, p, 5, SamplingOptions()) for p in ([5, 6, 7], [8])]


def test_one_token_prompts_need_no_prefill_graph(toy: Toy) -> None:
    runner = open_runner(open_bundle(toy[0]), "cpu", threads=1)
    run(Generator(runner).start([[5]], GenerateOptions(max_tokens=3)))
    assert runner.sessions.loaded == ("step",)  # type: ignore[attr-defined]


def test_broken_logits_stop_with_a_message(tokenizer: Tokenizer) -> None:
    weights = random_parameters(NEOX)
    weights["layers.1.mlp.up.weight"][:] = np.nan
    generator = Generator(NumpyRunner(NEOX, weights), tokenizer)
    with pytest.raises(RunnerError, match="row 0 are not finite"):
        run(generator.start([[5]]))


# -- when rows end ---------------------------------------------------------------------------------------


class Script:
    """A runner that says given tokens, whatever it reads: row r's n-th token is texts[r][n]."""

    name, all_logits = "script", False

    def __init__(self, texts: Sequence[Sequence[int]], spec: Any = SPEC) -> None:
        self.texts, self.spec = [list(text) for text in texts], spec
        self.steps: list[list[int]] = []

    def new_state(self, batch: int) -> dict[str, Any]:
        return {"said": [0] * batch}

    def prefill(self, ids: Any, positions: Any, lens: Any, state: dict[str, Any]) -> Any:
        self.steps.append(np.asarray(lens).tolist())
        logits = np.zeros((len(ids), 1, self.spec.vocab_size), np.float32)
        for row in np.flatnonzero(lens):
            said = state["said"][row]
            logits[row, 0, self.texts[row][min(said, len(self.texts[row]) - 1)]] = 1
            state["said"][row] += 1
        return logits

    step = prefill

    def export_state(self, state: Any) -> Any:
        return []

    def import_state(self, layers: Any) -> Any:
        return {"said": [0]}


def say(tokenizer: Tokenizer, *texts: str, **options: Any) -> tuple[Generation, list[Any]]:
    script = Script([[*tokenizer.encode(text), 0] for text in texts])
    options = {"max_tokens": 100} | options
    generation = Generator(script, tokenizer).start(["x"] * len(texts), GenerateOptions(**options))
    return generation, list(generation)


def test_end_of_text(tokenizer: Tokenizer) -> None:
    generation, events = say(tokenizer, "hello")
    (done,) = generation.completions
    assert (done.text, done.finish_reason, done.prompt_tokens) == ("hello", "eos", 1)
    assert done.token_ids == [*tokenizer.encode("hello"), 0]
    assert [event.text for event in events] == [*"hello", ""]
    assert [event.finish_reason for event in events] == [None] * 5 + ["eos"]


def test_end_of_text_can_be_ignored(tokenizer: Tokenizer) -> None:
    generation, _ = say(tokenizer, "hello", ignore_eos=True, max_tokens=8)
    assert generation.completions[0].text == "hello"
    assert generation.completions[0].token_ids[5:] == [0, 0, 0]
    assert generation.completions[0].finish_reason == "length"


def test_max_tokens(tokenizer: Tokenizer) -> None:
    generation, events = say(tokenizer, "hello", max_tokens=3)
    assert generation.completions[0].text == "hel"
    assert events[-1].finish_reason == "length"
    assert generation.stats.generated_tokens == 3


def test_half_a_character_at_max_tokens(tokenizer: Tokenizer) -> None:
    generation, events = say(tokenizer, "a😀b", max_tokens=3)
    assert generation.completions[0].text == "a\N{REPLACEMENT CHARACTER}"
    assert [event.text for event in events] == ["a", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (["lo w"], "hel"),
        (["hello"], ""),
        (["world"], "hello "),
        (["d"], "hello worl"),
        (["o", "l"], "he"),
        (["lo wx", "or"], "hello w"),
        (["nothing"], "hello world"),
        (["dd", "worldx"], "hello world"),
    ],
)
def test_stop_strings_across_tokens(tokenizer: Tokenizer, stops: list[str], text: str) -> None:
    generation, events = say(tokenizer, "hello world", stop=tuple(stops))
    assert generation.completions[0].text == text
    assert "".join(event.text for event in events) == text
    assert events[-1].finish_reason == ("eos" if text == "hello world" else "stop")


def test_a_stop_string_of_several_bytes_per_character(tokenizer: Tokenizer) -> None:
    generation, _ = say(tokenizer, "ab☃cd", stop=("☃",))
    assert generation.completions[0].text == "ab"


def test_rows_end_on_their_own(tokenizer: Tokenizer) -> None:
    script = Script([[*tokenizer.encode(text), 0] for text in ("a", "abc", "ab")])
    generation = Generator(script, tokenizer).start(["x", "xx", "x"], GenerateOptions(max_tokens=10))
    events = list(generation)
    assert [c.text for c in generation.completions] == ["a", "abc", "ab"]
    assert script.steps == [[1, 2, 1], [1, 1, 1], [0, 1, 1], [0, 1, 0]]
    assert [sum(event.row == row for event in events) for row in range(3)] == [2, 4, 3]
    stats = generation.stats
    assert (stats.prompt_tokens, stats.generated_tokens, stats.decoded_tokens) == (4, 9, 6)


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=3), max_size=12),
)
def test_stop_matching_equals_searching_the_whole_text(stops: list[str], pieces: list[str]) -> None:
    matcher, given_out = StopMatcher(stops), ""
    for piece in pieces:
        given_out += matcher.push(piece)
        assert not any(stop in given_out for stop in stops)
        if matcher.found:
            break
    given_out += matcher.flush()
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    if not places:
        assert (given_out, matcher.found) == (whole, False)
        return
    # Text is searched as it comes: the first stop string to be complete ends it.
    ends = min(whole.find(stop) + len(stop) for stop in stops if stop in whole)
    assert matcher.found
    assert whole.startswith(given_out)
    assert len(given_out) < ends or given_out == whole[: min(places)]


# -- prompts ---------------------------------------------------------------------------------------------


def test_text_prompts_are_encoded(generator: Generator, toy_runner: tuple[Any, ToyModel]) -> None:
    assert generator.tokenizer is not None
    ids = generator.tokenizer.encode("héllo")
    options = GenerateOptions(max_tokens=5, ignore_eos=True)
    assert run(generator.start(["héllo"], options)) == run(generator.start([ids], options))


def test_an_empty_prompt_starts_from_the_beginning_of_text(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    assert generator.encode("") == [0]
    script = Script([[5]], replace(SPEC, bos_token_id=None))
    with pytest.raises(PromptError, match="the prompt is empty") as caught:
        Generator(script, tokenizer).start([""])
    assert caught.value.exit_code == 1


def test_bad_prompts(generator: Generator) -> None:
    for ids, words in (([], "no tokens"), ([260], "token id"), ([-1], "token id")):
        with pytest.raises(PromptError, match=words):
            generator.start([ids])
    with pytest.raises(UsageError, match="no prompt"):
        generator.start([])


def test_text_without_a_tokenizer(toy_runner: tuple[Any, ToyModel]) -> None:
    generator = Generator(toy_runner[0])
    with pytest.raises(UsageError, match="no tokenizer"):
        generator.start(["text"])
    with pytest.raises(UsageError, match="stop strings"):
        generator.start([[5]], GenerateOptions(stop=("x",)))
    generation = generator.start([[5]], GenerateOptions(max_tokens=2))
    assert [event.text for event in generation] == ["", ""]


def test_a_tokenizer_of_another_model(tokenizer: Tokenizer) -> None:
    with pytest.raises(BundleError, match="token id 257"):
        Generator(Script([[5]], replace(SPEC, vocab_size=200)), tokenizer)


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="max-tokens"):
        GenerateOptions(max_tokens=-1)
    with pytest.raises(UsageError, match="empty"):
        GenerateOptions(stop=("a", ""))
    with pytest.raises(UsageError, match="prefill-tokens"):
        Generator(Script([[5]]), prefill_tokens=0)


LIMITED = replace(SPEC, decay="tables", decay_rows=10)


@pytest.mark.parametrize(("tokens", "wanted"), [(11, None), (11, 0), (10, 2), (1, 11)])
def test_beyond_the_last_position(tokens: int, wanted: int | None) -> None:
    generator = Generator(Script([[5]], LIMITED))
    with pytest.raises(PositionError, match="last position") as caught:
        generator.start([[1] * tokens], GenerateOptions(max_tokens=wanted))
    assert ("--extend-decay" if tokens > 10 else f"--max-tokens {11 - tokens}") in str(caught.value)


def test_up_to_the_last_position() -> None:
    """The last token is never read, so one more fits than the table has rows."""
    script = Script([[5]], LIMITED)
    assert len(run(Generator(script).start([[1] * 10], GenerateOptions(max_tokens=1)))[0]) == 1
    (tokens,) = run(Generator(script).start([[1] * 4], GenerateOptions(ignore_eos=True)))
    assert len(tokens) == 7
    assert sum(sum(lens) for lens in script.steps[1:]) == 10


def test_the_default_length(tokenizer: Tokenizer) -> None:
    assert len(run(Generator(Script([[5]])).start([[1]]))[0]) == 128


def test_stats_count_and_time(generator: Generator) -> None:
    generation = generator.start([[5] * 100, [6] * 50], GenerateOptions(max_tokens=4, ignore_eos=True))
    run(generation)
    stats = generation.stats
    assert (stats.prompt_tokens, stats.generated_tokens, stats.decoded_tokens) == (150, 8, 6)
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0
    assert stats.prefill_rate == pytest.approx(150 / stats.prefill_seconds)
    assert stats.decode_rate == pytest.approx(6 / stats.decode_seconds)
    total = type(stats)()
    assert total.decode_rate == total.prefill_rate == 0
    total.add(stats)
    total.add(stats)
    assert total.generated_tokens == 16


# -- the sample model ------------------------------------------------------------------------------------


def test_the_sample_says_what_the_recurrence_in_numpy_says(sample_bundle: Path) -> None:
    """Text in, text out, over everything that is shipped: checkpoint, export, graphs, runtime, tokenizer."""
    from dijiang_engines.shipped_sample import sample_checkpoint
    from dijiang_export.checkpoint.checkpoint import open_checkpoint

    bundle = open_bundle(sample_bundle)
    assert bundle.tokenizer_path is not None
    words = Tokenizer(bundle.tokenizer_path)
    with open_checkpoint(sample_checkpoint()) as checkpoint:
        oracle = NumpyRunner(bundle.spec, {k: v.numpy() for k, v in checkpoint.load_state_dict().items()})
    prompts = ["def __init__(self", "class", "import os\nimport sys\n\n\nclass Path(object):\n" * 6]
    options = GenerateOptions(max_tokens=16)
    texts = []
    for runner in (open_runner(bundle, "cpu", threads=1), oracle):
        generation = Generator(runner, words).start(prompts, options)
        tokens = run(generation)
        texts.append((tokens, [completion.text for completion in generation.completions]))
    assert texts[0] == texts[1]
    assert all(texts[0][1])


def test_the_sample_goes_on_from_a_file_exactly(sample_bundle: Path, tmp_path: Path) -> None:
    bundle = open_bundle(sample_bundle)
    assert bundle.tokenizer_path is not None
    generator = Generator(open_runner(bundle, "cpu", threads=1), Tokenizer(bundle.tokenizer_path))
    prompts = ["def " * 40, "class"]
    options = GenerateOptions(20, SamplingOptions(0.9, top_p=0.95), seed=6, ignore_eos=True)
    whole = run(generator.start(prompts, options))
    generation = generator.start(prompts, replace(options, max_tokens=9))
    save_session(tmp_path / "s", generation.session(), bundle)
    begun = [completion.token_ids for completion in generation.completions]
    rest = generator.start([], replace(options, max_tokens=11), session=load_session(tmp_path / "s", bundle))
    assert [a + b for a, b in zip(begun, run(rest), strict=True)] == whole
