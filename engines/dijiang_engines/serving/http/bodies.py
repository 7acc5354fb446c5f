"""What the two completion endpoints are asked for, checked field by field."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dijiang_engines.errors import UsageError
from dijiang_engines.sampling import SamplingOptions
from dijiang_engines.serving.http.errors import ApiError, as_api_error
from dijiang_engines.serving.http.fields import Fields, shown, wrong

MOST_STOPS, MOST_STOP_LENGTH = 16, 1000
MOST_PROMPTS = 64
MOST_LOGPROBS = 20
MOST_MESSAGES = 10_000


@dataclass(frozen=True)
class Wanted:
    """What a request asks for besides its prompts, of both endpoints."""

    model: str | None
    max_tokens: int | None
    sampling: SamplingOptions
    seed: int
    stop: tuple[str, ...]
    ignore_eos: bool
    choices: int
    logprobs: int | None
    """As `JobOptions.logprobs`."""
    stream: bool
    usage_chunk: bool
    """The stream ends with a chunk that has the usage, and no choices."""
    form: dict[str, Any]
    """What is said about the answer's form, by field; see `generation.response_format`."""
    save_session: str | None
    """The name under which the text's session is kept."""


@dataclass(frozen=True)
class CompletionBody:
    """POST /v1/completions."""

    prompts: list[str | list[int]]
    session: str | None
    """The session that the prompt goes on from."""
    wanted: Wanted


@dataclass(frozen=True)
class ChatBody:
    """POST /v1/chat/completions."""

    messages: list[dict[str, str]]
    wanted: Wanted


def completion_body(body: Mapping[str, Any], slots: int) -> CompletionBody:
    """Read the JSON object of a request for completions.

    Args:
        body: the object.
        slots: texts that the server generates at a time; nobody can ask for more at once.

    Raises:
        ApiError: a field is wrong, missing or unknown.
    """
    fields = Fields(body)
    session = session_name(fields, "session")
    prompts = _prompts(fields.take("prompt"), optional=session is not None)
    logprobs = fields.integer("logprobs", None, 0, MOST_LOGPROBS)
    limit = fields.integer("max_tokens", 16, 1, 2**31)
    wanted = _wanted(fields, limit, logprobs, slots // len(prompts))
    if (session or wanted.save_session) and len(prompts) > 1:
        raise ApiError(400, "a session is of one prompt", param="session")
    return CompletionBody(prompts, session, wanted)


def chat_body(body: Mapping[str, Any], slots: int) -> ChatBody:
    """Read the JSON object of a request for a chat completion; arguments and errors as above."""
    fields = Fields(body)
    messages = _messages(fields.take("messages"))
    most = fields.integer("max_completion_tokens", None, 1, 2**31)
    older = fields.integer("max_tokens", None, 1, 2**31)  # the name until 2024
    top = fields.integer("top_logprobs", None, 0, MOST_LOGPROBS)
    logprobs = fields.flag("logprobs")
    if top is not None and not logprobs:
        raise ApiError(400, "top_logprobs has no meaning without logprobs", param="top_logprobs")
    if fields.take("session") is not None:
        raise ApiError(
            400, "a chat goes on from its messages: send them all, and what the server has read of them "
            "before is not read again; /v1/completions goes on from a session", param="session",
        )  # fmt: skip
    wanted = _wanted(fields, most or older, (top or 0) if logprobs else None, slots)
    return ChatBody(messages, wanted)


def _wanted(fields: Fields, limit: int | None, logprobs: int | None, slots: int) -> Wanted:
    stream = fields.flag("stream")
    options = fields.object("stream_options", {"include_usage", "include_obfuscation"}) or {}
    if options and not stream:
        raise ApiError(400, "stream_options has no meaning without stream", param="stream_options")
    if not isinstance(options.get("include_usage", False), bool):
        raise wrong("stream_options.include_usage", options["include_usage"], "true or false")
    wanted = Wanted(
        model=fields.text("model", 500),
        max_tokens=limit,
        sampling=_sampling(fields),
        seed=_seed(fields),
        stop=fields.strings("stop", MOST_STOPS, MOST_STOP_LENGTH),
        ignore_eos=fields.flag("ignore_eos"),
        choices=fields.integer("n", 1, 1, max(slots, 1)) or 1,
        logprobs=logprobs,
        stream=stream,
        usage_chunk=options.get("include_usage", False),
        form=_form(fields),
        save_session=session_name(fields, "save_session"),
    )
    fields.end()
    return wanted


def _form(fields: Fields) -> dict[str, Any]:
    given = {name: fields.take(name) for name in ("response_format", "guided_json", "guided_regex")}
    return {name: value for name, value in given.items() if value not in (None, {"type": "text"})}


def _sampling(fields: Fields) -> SamplingOptions:
    temperature = fields.number("temperature", 1.0, 0, 100)
    top_k = fields.integer("top_k", 0, -1, 2**31) or 0
    top_p = fields.number("top_p", 1.0, 0, 1)
    min_p = fields.number("min_p", 0.0, 0, 1)
    penalty = fields.number("repetition_penalty", 1.0, 0, float("inf"))
    try:
        return SamplingOptions(temperature, max(top_k, 0), top_p, min_p, penalty)
    except UsageError as error:
        raise as_api_error(error) from error


def _seed(fields: Fields) -> int:
    seed = fields.integer("seed", None, -(2**63), 2**64 - 1)
    return int.from_bytes(os.urandom(8), "little") if seed is None else seed


def session_name(fields: Fields, field: str) -> str | None:
    """The name of a session: letters, digits and -_.: only."""
    name = fields.text(field, 100)
    if name is not None:
        check_session_name(name, field)
    return name


def check_session_name(name: str, field: str) -> None:
    """Refuse a name that a URL or a store might take for something else.

    Raises:
        ApiError: it is one.
    """
    if not name or len(name) > 100 or not all(c.isascii() and (c.isalnum() or c in "-_.:") for c in name):
        raise wrong(field, name, "1 to 100 letters, digits, and characters of -_.:")


def _prompts(value: Any, *, optional: bool) -> list[str | list[int]]:
    if value is None and optional:
        return [""]
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(_is_id(each) for each in value):
            return [value]
        strings = all(isinstance(each, str) for each in value)
        lists = all(isinstance(each, list) and each and all(map(_is_id, each)) for each in value)
        if (strings or lists) and len(value) <= MOST_PROMPTS:
            return list(value)
    raise wrong("prompt", value, f"a string, a list of token ids, or at most {MOST_PROMPTS} of one of these")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
        raise wrong("messages", value, f"a list of 1 to {MOST_MESSAGES} messages")
    return [_message(each, f"messages[{number}]") for number, each in enumerate(value)]


def _message(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise wrong(name, value, "an object with role and content")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or not 0 < len(role) <= 100:
        raise wrong(f"{name}.role", role, "a string such as user")
    if isinstance(content, list):
        content = "".join(_part(part, f"{name}.content[{n}]") for n, part in enumerate(content))
    if not isinstance(content, str):
        raise wrong(f"{name}.content", content, "text")
    found = {"role": role, "content": content}
    for other, given in value.items():
        if other in found or given in (None, [], {}):
            continue
        if other != "name" or not isinstance(given, str):
            raise ApiError(
                400, f"{name} has a field that this server does not know: {shown(other)}", param=name
            )
        found["name"] = given
    return found


def _part(value: Any, name: str) -> str:
    if isinstance(value, dict) and value.get("type") == "text" and isinstance(value.get("text"), str):
        return str(value["text"])
    raise wrong(name, value, "a text: this model reads nothing else")
