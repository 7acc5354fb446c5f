"""Conversations: what a template makes of them, beside transformers, and what a server answers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("jinja2")

from support.fakes.runner import ToyRunner
from support.http import ask
from support.makers.toy_bundle import SPEC, make_bundle, write_manifest
from support.server import Running, serving

from dijiang_engines.errors import PromptError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.serving.chat_template import ChatTemplate, load_chat_template
from dijiang_engines.serving.serve import ServerOptions

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALTERNATING = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}{% set rest = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if loop.index0 == 0 and system %}{% set content = '<<' + system + '>>' + message.content %}
    {%- else %}{% set content = message.content %}{% endif %}
    {%- if message.role == 'user' %}{{ '[INST] ' + content | trim + ' [/INST]' }}
    {%- else %}{% generation %}{{ ' ' + content + eos_token }}{% endgeneration %}{% endif %}
    {%- if loop.index0 > 100 %}{% break %}{% endif %}
{%- endfor %}
"""
JSONISH = "{{ messages | tojson }}{% if tools %}{{ tools }}{% endif %}{{ strftime_now('%Y') | length }}"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALKS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "hello <b>&\"quotes\"</b> ünï"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": " hi \n"}],
    [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
]  # fmt: skip


@pytest.mark.parametrize("source", [CHATML, ALTERNATING, JSONISH], ids=["chatml", "alternating", "json"])
def test_a_template_is_what_transformers_makes_of_it(source: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    template = ChatTemplate(source, TOKENS)
    for talk in TALKS:
        expected, _ = utils.render_jinja_template(
            [talk], chat_template=source, add_generation_prompt=True, **TOKENS
        )
        found = template.render(talk)
        assert found.text == expected[0]
        for count in range(1, len(talk) + 1):
            try:
                part = utils.render_jinja_template([talk[:count]], chat_template=source, **TOKENS)[0][0]
            except Exception:  # noqa: BLE001 - a template's own
                continue
            assert (len(part) in found.ends) == expected[0].startswith(part)
    template.close()


def test_a_template_may_refuse() -> None:
    template = ChatTemplate(ALTERNATING, TOKENS)
    with pytest.raises(PromptError, match="refuses") as caught:
        template.render([{"role": "assistant", "content": "x"}])
    assert "roles must alternate" in str(caught.value)
    assert template.render(TALKS[0]).text  # and goes on
    template.close()


HOSTILE = {
    "a loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "a file": "{% include '/etc/passwd' %}",
    "a change": "{{ messages.append(5) }}",
    "syntax": "{% for %}",
    "a format": "{{ '%0999999999d' % 5 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_with_a_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dijiang_engines.serving.chat_template.SECONDS", 1.0)
    template = ChatTemplate(HOSTILE[name], TOKENS)
    begun = time.monotonic()
    with pytest.raises(PromptError, match="chat template"):
        template.render(TALKS[0])
    assert time.monotonic() - begun < 30
    template.close()


# -- served --------------------------------------------------------------------------------------------------


def bundle_with(folder: Path, source: str, *, in_config: bool = False) -> Path:
    make_bundle(folder)
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    if in_config:
        config["chat_template"] = [
            {"name": "other", "template": "x"},
            {"name": "default", "template": source},
        ]
    else:
        (folder / "chat_template.jinja").write_text(source)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    write_manifest(folder, SPEC)
    return folder


@pytest.mark.parametrize("in_config", [False, True])
def test_a_template_comes_with_its_model(tmp_path: Path, in_config: bool) -> None:
    template = load_chat_template(open_bundle(bundle_with(tmp_path / "b", ALTERNATING, in_config=in_config)))
    assert template is not None
    assert template.render(TALKS[1]).text == "<s>[INST] <<be brief>> hi [/INST]"
    template.close()
    make_bundle(tmp_path / "bare")
    assert load_chat_template(open_bundle(tmp_path / "bare")) is None


@pytest.fixture
def chatting(tmp_path: Path) -> Iterator[Running]:
    model = open_bundle(bundle_with(tmp_path / "b", CHATML))
    runner = ToyRunner(make_bundle(tmp_path / "same"))
    with serving(model, runner, ServerOptions(piece=16)) as running:
        yield running


def chat(running: Running, messages: Any, **more: Any) -> Any:
    return ask(running.port, "POST", "/v1/chat/completions", {"messages": messages, "temperature": 0} | more)


def test_a_chat_is_the_completion_of_its_text(chatting: Running) -> None:
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    body = {"prompt": text, "max_tokens": 9, "temperature": 0}
    expected = ask(chatting.port, "POST", "/v1/completions", body).json
    answer = chat(chatting, [{"role": "user", "content": "hi"}], max_completion_tokens=9).json
    choice = answer["choices"][0]
    assert answer["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == expected["choices"][0]["text"]
    assert answer["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    events = chat(chatting, [{"role": "user", "content": parts}], max_tokens=9, stream=True).events
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert deltas == choice["message"]["content"]
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == choice["finish_reason"]


def test_the_official_client_chats(chatting: Running) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{chatting.url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "hi"}]
    whole = client.chat.completions.create(
        model="toy", messages=messages, max_tokens=5, seed=1, logprobs=True, top_logprobs=2
    )
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens and len(content[0].top_logprobs) == 2
    with client.chat.completions.stream(model="toy", messages=messages, max_tokens=5, seed=1) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    assert text == whole.choices[0].message.content


def test_a_conversation_that_grows_is_read_once(chatting: Running) -> None:
    messages = [{"role": "system", "content": "s" * 50}, {"role": "user", "content": "first"}]
    first = chat(chatting, messages, max_tokens=4).json
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    messages += [{"role": "assistant", "content": "an answer"}, {"role": "user", "content": "second"}]
    second = chat(chatting, messages, max_tokens=4).json
    shared = len("<|im_start|>system\n" + "s" * 50 + "<|im_end|>\n<|im_start|>user\nfirst<|im_end|>\n")
    # A byte is a token here, and the next message begins like the answer that was asked for: another piece.
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == shared + 16
    again = chat(chatting, messages, max_tokens=4).json
    assert again["choices"] == second["choices"]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"), ("hi", "messages"), ([5], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"content": "x"}], "messages[0].role"), ([{"role": 5, "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "messages[0]"),
    ],
)  # fmt: skip
def test_bad_messages(chatting: Running, messages: Any, param: str) -> None:
    answer = chat(chatting, messages)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_what_a_chat_does_not_take(chatting: Running) -> None:
    hi = [{"role": "user", "content": "hi"}]
    for more in ({"session": "x"}, {"top_logprobs": 3}, {"tools": [{"type": "function"}]}, {"prompt": "x"}):
        answer = chat(chatting, hi, **more)
        assert answer.status == 400 and answer.error["param"] == next(iter(more))
    assert chat(chatting, hi, max_tokens=2, tools=[], tool_choice="none").status == 200
