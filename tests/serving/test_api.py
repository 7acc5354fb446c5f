"""What clients ask and get: the official client's view, and every field's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from support.http import Answer, ask
from support.server import serving

from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.generation.generator import Completion, GenerateOptions, Generator
from dijiang_engines.runners import Runner
from dijiang_engines.sampling import SamplingOptions
from dijiang_engines.serving.serve import ServerOptions
from dijiang_engines.tokenizer.load import load_tokenizer

PROMPT = "def read(path):\n"
WORK = "/v1/completions"


@pytest.fixture(scope="module")
def generator(model: Bundle, runner: Runner) -> Generator:
    from dijiang_engines.runners import open_runner

    return Generator(open_runner(model, "cpu", threads=1, spinning="off"), load_tokenizer(model))


def generated(generator: Generator, prompt: str, **options: Any) -> Completion:
    generation = generator.start([prompt], GenerateOptions(**options))
    list(generation)
    return generation.completions[0]


def complete(port: int, **body: Any) -> Answer:
    return ask(port, "POST", WORK, {"prompt": PROMPT, "temperature": 0} | body)


# -- the official client -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(port: int) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)


def test_the_official_client_completes(client: Any, generator: Generator) -> None:
    expected = generated(generator, PROMPT, max_tokens=20)
    answer = client.completions.create(model="tiny-stdlib", prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.choices[0].text == expected.text and answer.object == "text_completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 20
    assert answer.usage.prompt_tokens == len(generator.encode(PROMPT))


def test_the_official_client_streams(client: Any, generator: Generator) -> None:
    expected = generated(generator, PROMPT, max_tokens=40, sampling=SamplingOptions(0.8, top_p=0.9), seed=7)
    stream = client.completions.create(
        model="tiny-stdlib", prompt=PROMPT, max_tokens=40, temperature=0.8, top_p=0.9, seed=7, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == [
        "length"
    ]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    assert all(chunk.usage is None for chunk in chunks[:-1])  # kubeai#283
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_official_client_sees_errors_and_models(client: Any) -> None:
    import openai

    assert [model.id for model in client.models.list()] == ["tiny-stdlib"]
    assert client.models.retrieve("tiny-stdlib").id == "tiny-stdlib"
    with pytest.raises(openai.NotFoundError, match="no model gpt"):
        client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.completions.create(model="tiny-stdlib", prompt="x", temperature=-1)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="chat template"):
        client.chat.completions.create(model="tiny-stdlib", messages=[{"role": "user", "content": "x"}])


# -- fields --------------------------------------------------------------------------------------------------


def test_prompts_of_every_form(port: int, generator: Generator) -> None:
    ids = generator.encode(PROMPT)
    other = "import os\n"
    one, two = (
        complete(port, prompt=each, max_tokens=9).json["choices"][0]["text"] for each in (PROMPT, other)
    )
    assert complete(port, prompt=ids, max_tokens=9).json["choices"][0]["text"] == one
    both = complete(port, prompt=[PROMPT, other], max_tokens=9).json
    assert [choice["text"] for choice in both["choices"]] == [one, two]
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    lists = complete(port, prompt=[ids, generator.encode(other)], max_tokens=9, n=1).json
    assert [choice["text"] for choice in lists["choices"]] == [one, two]
    assert both["usage"]["completion_tokens"] == 18


def test_several_choices_are_those_of_the_seed(port: int, generator: Generator) -> None:
    sampled: dict[str, Any] = {"temperature": 1, "seed": 3, "max_tokens": 12}
    whole = complete(port, n=3, **sampled).json
    texts = [choice["text"] for choice in whole["choices"]]
    assert len(set(texts)) == 3
    assert texts[0] == generated(generator, PROMPT, max_tokens=12, sampling=SamplingOptions(1.0), seed=3).text
    streamed = complete(port, n=3, stream=True, **sampled).events
    for index, text in enumerate(texts):
        found = [c["choices"][0] for c in streamed if c["choices"][0]["index"] == index]
        assert "".join(each["text"] for each in found) == text
        assert [each["finish_reason"] for each in found][-1] == "length"


def test_stop_strings_never_leak(port: int, generator: Generator) -> None:
    """FastChat#1048: not their beginnings either, streamed or not."""
    text = generated(generator, PROMPT, max_tokens=60).text
    for start, length in ((10, 1), (17, 4), (30, 9)):
        stop = text[start : start + length]
        before = text[: text.index(stop)]
        whole = complete(port, max_tokens=60, stop=stop).json["choices"][0]
        assert (whole["text"], whole["finish_reason"]) == (before, "stop")
        pieces = ""
        for chunk in complete(port, max_tokens=60, stop=["never", stop], stream=True).events:
            pieces += chunk["choices"][0]["text"]
            assert before.startswith(pieces)
        assert pieces == before


def test_log_probabilities_are_the_model_s(port: int, generator: Generator) -> None:
    """Beside the logits of a prefill of the whole text."""
    answer = complete(port, max_tokens=5, logprobs=4).json["choices"][0]
    table, text = answer["logprobs"], answer["text"]
    ids = generator.encode(PROMPT)
    for number in range(5):
        logits = generator.runner.prefill(
            np.array([ids]), np.array([0]), np.array([len(ids)]), generator.runner.new_state(1)
        )[0, 0].astype(np.float64)
        logs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        best = int(logits.argmax())
        assert table["token_logprobs"][number] == pytest.approx(logs[best], abs=1e-3)
        top = table["top_logprobs"][number]
        assert sorted(top.values(), reverse=True) == list(top.values()) and len(top) <= 4
        assert max(top.values()) == pytest.approx(logs.max(), abs=1e-3)
        ids = [*ids, best]
    assert "".join(table["tokens"]) == text
    assert table["text_offset"] == [sum(map(len, table["tokens"][:n])) for n in range(5)]
    streamed = complete(port, max_tokens=5, logprobs=0, stream=True).events
    flat = [value for event in streamed for value in event["choices"][0]["logprobs"]["text_offset"]]
    assert flat == table["text_offset"]


def test_tokens_of_a_split_character_never_show(port: int, generator: Generator) -> None:
    """llama.cpp#28724: a prompt and a text with characters of several tokens."""
    prompt = "# ünïcödé 🙂🙃 日本語 "
    answer = complete(port, prompt=prompt, max_tokens=50, temperature=1.5, seed=2, stream=True)
    assert answer.status == 200
    whole = complete(port, prompt=prompt, max_tokens=50, temperature=1.5, seed=2).json["choices"][0]["text"]
    assert "".join(event["choices"][0]["text"] for event in answer.events) == whole
    found = ask(port, "POST", "/tokenize", {"prompt": prompt}).json
    assert found["tokens"] == generator.encode(prompt) and found["count"] == len(found["tokens"])
    assert ask(port, "POST", "/detokenize", {"tokens": found["tokens"]}).json["prompt"] == prompt


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"), ({"prompt": [True]}, "prompt"), ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"), ({"prompt": {}}, "prompt"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 10**6}, "max_tokens"), ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"), ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"), ({"min_p": 2}, "min_p"), ({"seed": "x"}, "seed"), ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop"), ({"stop": ["a"] * 17}, "stop"), ({"stop": 5}, "stop"), ({"n": 0}, "n"),
    ({"n": 1000}, "n"), ({"logprobs": 21}, "logprobs"), ({"stream": 1}, "stream"), ({"echo": True}, "echo"),
    ({"stream_options": {"include_usage": True}}, "stream_options"), ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options"), ({"suffix": "x"}, "suffix"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"), ({"best_of": 3}, "best_of"),
    ({"bets_of": 3}, "bets_of"),
    ({"ignore_eos": "yes"}, "ignore_eos"), ({"model": 5}, "model"), ({"session": "../x"}, "session"),
    ({"save_session": "a b"}, "save_session"), ({"best_of": True}, "best_of"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), BAD, ids=str)
def test_bad_fields(port: int, body: dict[str, Any], param: str) -> None:
    answer = complete(port, **body)
    assert (answer.status, answer.error["param"]) == (400, param), answer.data
    assert answer.error["type"] == "invalid_request_error"


def test_fields_that_change_nothing(port: int) -> None:
    plain = complete(port, max_tokens=5).json["choices"]
    more = {
        "user": "me", "metadata": {"a": "b"}, "frequency_penalty": 0, "presence_penalty": 0.0, "echo": False,
        "logit_bias": {}, "best_of": 1, "suffix": None, "n": None, "stop": None, "top_k": -1,
        "logprobs": None,
        "seed": 5, "stream": False, "tools": [],
    }  # fmt: skip
    assert complete(port, max_tokens=5, **more).json["choices"] == plain


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"5", b'{"prompt": "a", "prompt": "b"}', b"\xff", b'{"prompt": NaN}', b"[" * 5000],
)
def test_bodies_that_are_no_object(port: int, data: bytes) -> None:
    answer = ask(port, "POST", WORK, data)
    assert answer.status == 400 and answer.error["code"] == "invalid_json"


def test_half_a_surrogate_pair_is_refused(port: int) -> None:
    assert ask(port, "POST", WORK, b'{"prompt": "\\ud83d"}').status == 400
    for field in ("model", "stop", "session", "other", "\\ud83d"):
        answer = ask(port, "POST", WORK, b'{"prompt": "a", "%s": "\\ud83d"}' % field.encode())
        assert answer.status in (200, 400, 404) and "\ud83d" not in answer.data.decode()


def test_paths_and_methods_that_there_are_not(port: int) -> None:
    assert ask(port, "GET", "/v1/nothing").status == 404
    assert ask(port, "GET", WORK).status == 405
    assert ask(port, "GET", "/v1/nothing").error["type"] == "not_found_error"
    assert ask(port, "GET", "/v1/models/other").status == 404


def test_health_and_metrics(port: int) -> None:
    assert ask(port, "GET", "/health").json == {"status": "ok"}
    assert ask(port, "GET", "/health/ready").status == 200

    def numbers() -> dict[str, float]:
        lines = ask(port, "GET", "/metrics").data.decode().splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if line and line[0] != "#"}

    before = numbers()
    complete(port, max_tokens=7)
    after = numbers()
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 7
    assert (
        after["vllm:time_to_first_token_seconds_count"] - before["vllm:time_to_first_token_seconds_count"]
        == 1
    )
    assert after["vllm:num_requests_running"] == 0 and math.isfinite(sum(after.values()))


# -- keys ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(model: Bundle, runner: Runner) -> Iterator[int]:
    options = ServerOptions(
        keys=("alpha", "beta"), max_body_bytes=4096, max_prompt_tokens=100, slots=4, piece=64
    )
    with serving(model, runner, options) as running:
        yield running.port


def test_only_who_has_a_key_is_answered(locked: int) -> None:
    body = {"prompt": PROMPT, "max_tokens": 2}
    for key in (None, "", "alph", "alphaa", "gamma", "alpha beta", "ä"):
        answer = ask(locked, "POST", WORK, body, key and key.encode().decode("latin-1"))
        assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.error["code"] == "invalid_api_key"
    for path in ("/v1/models", "/v1/sessions"):
        assert ask(locked, "GET", path).status == 401
    for key in ("alpha", "beta"):
        assert ask(locked, "POST", WORK, body, key).status == 200
    assert ask(locked, "GET", "/health").status == 200


def test_limits_of_size(locked: int) -> None:
    large = ask(locked, "POST", WORK, {"prompt": "x" * 5000}, "alpha")
    assert large.status == 413 and large.error["code"] == "request_too_large"
    long = ask(locked, "POST", WORK, {"prompt": [5] * 101}, "alpha")
    assert long.status == 400 and long.error["code"] == "context_length_exceeded"
    assert ask(locked, "POST", WORK, {"prompt": [5] * 100, "max_tokens": 1}, "alpha").status == 200


def test_states_are_not_shared_between_keys(locked: int) -> None:
    """What one has read is read again for the other, and nobody can tell from the usage."""
    body = {"prompt": [7] * 90 + [9], "max_tokens": 1}

    def cached(key: str) -> int:
        answer = ask(locked, "POST", WORK, body, key)
        found: int = answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    assert cached("alpha") == 0
    assert cached("alpha") == 64
    assert cached("beta") == 0


# -- sessions ------------------------------------------------------------------------------------------------


def test_a_conversation_is_saved_forked_moved_and_forgotten(
    locked: int, port: int, generator: Generator
) -> None:
    whole = generated(generator, PROMPT, max_tokens=10).text
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 4}
    first = ask(locked, "POST", WORK, body | {"save_session": "talk"}, "alpha").json
    assert first["session"]["id"] == "talk"
    more = {"session": "talk", "temperature": 0, "max_tokens": 6}
    rest = ask(locked, "POST", WORK, more, "alpha").json
    assert first["choices"][0]["text"] + rest["choices"][0]["text"] == whole
    # A copy goes another way, and the original stays.
    assert ask(locked, "POST", "/v1/sessions/talk/fork", {"id": "copy"}, "alpha").status == 201
    other = more | {"session": "copy", "prompt": "\n", "save_session": "copy", "stream": True}
    events = ask(locked, "POST", WORK, other, "alpha").events
    assert any("session" in event for event in events)
    assert ask(locked, "POST", WORK, more, "alpha").json["choices"] == rest["choices"]
    names = [each["id"] for each in ask(locked, "GET", "/v1/sessions", key="alpha").json["data"]]
    assert names == ["copy", "talk"]
    told = ask(locked, "GET", "/v1/sessions/talk", key="alpha").json
    assert told["tokens"] == first["session"]["tokens"] and told["text"].startswith(PROMPT)
    # Others see nothing of it.
    assert ask(locked, "GET", "/v1/sessions", key="beta").json["data"] == []
    assert ask(locked, "POST", WORK, more, "beta").status == 404
    # Another server goes on from the file.
    data = ask(locked, "GET", "/v1/sessions/talk/content", key="alpha").data
    assert ask(port, "PUT", "/v1/sessions/here/content", data).status == 201
    moved = ask(port, "POST", WORK, more | {"session": "here"}).json
    assert moved["choices"][0]["text"] == rest["choices"][0]["text"]
    damaged = bytearray(data)
    damaged[-5] ^= 1
    assert ask(port, "PUT", "/v1/sessions/bad/content", bytes(damaged)).status == 400
    assert ask(locked, "DELETE", "/v1/sessions/talk", key="alpha").json["deleted"] is True
    assert ask(locked, "DELETE", "/v1/sessions/talk", key="alpha").status == 404
    assert ask(locked, "POST", WORK, more, "alpha").status == 404


# -- answers with a form -------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"], "additionalProperties": False,
}  # fmt: skip


def test_answers_keep_to_their_form(port: int) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    for more in ({"response_format": form}, {"guided_json": SCHEMA}):
        answer = complete(port, max_tokens=200, temperature=1, n=3, seed=1, **more).json
        for choice in answer["choices"]:
            found = json.loads(choice["text"])
            assert set(found) == {"a", "b"} and found["a"] in ("x", "y") and isinstance(found["b"], bool)
            assert choice["finish_reason"] == "stop"
    pattern = "(ab|cd){3}[0-9]+!"
    events = complete(port, max_tokens=60, temperature=1, seed=2, guided_regex=pattern, stream=True).events
    text = "".join(event["choices"][0]["text"] for event in events)
    if events[-1]["choices"][0]["finish_reason"] == "stop":
        assert re.fullmatch(pattern, text)
    assert re.match("(ab|cd){3}[0-9]", text)
    assert complete(port, max_tokens=3, response_format={"type": "text"}).status == 200


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "thing"}}}},
        {"guided_regex": "((("}, {"guided_regex": 5}, {"guided_json": {"not": {}}}, {"response_format": 5},
        {"guided_regex": "a", "guided_json": {}},
        {"guided_regex": "a", "ignore_eos": True},
    ],
)  # fmt: skip
def test_a_bad_form_is_refused_and_the_server_lives(port: int, form: dict[str, Any]) -> None:
    """vllm#17313."""
    pytest.importorskip("llguidance")
    answer = complete(port, max_tokens=5, **form)
    assert answer.status == 400 and answer.error["param"] in (*form, "ignore_eos")
    assert complete(port, max_tokens=2).status == 200
