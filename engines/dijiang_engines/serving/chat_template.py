"""A conversation as the text that its model was trained on: the checkpoint's chat template.

A template is a program in Jinja's language, from whoever made the checkpoint. It runs in Jinja's sandbox, in
a process of its own with a limit on time and memory, as transformers would run it: with the same settings,
functions and filters (transformers 5.23.0, utils/chat_template_utils.py, `_cached_compile_jinja_template`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from dijiang_engines.errors import BundleError, PromptError
from dijiang_engines.formats.file_table import CHAT_TEMPLATE, TOKENIZER_CONFIG
from dijiang_engines.formats.folder import Model
from dijiang_engines.formats.safe_files import LIMITS, parse_json, read_bounded
from dijiang_engines.fresh_interpreter import command_for
from dijiang_engines.limited_process import (
    DONE,
    FAILED,
    LOAD,
    LimitedProcess,
    ProcessEndedError,
    limit_process,
    receive,
    send,
)

SECONDS = 5.0
"""Of CPU, for each conversation."""
BYTES = 256 << 20
MOST_ENDS = 128
"""Messages whose ends are looked for; each takes a rendering."""
Message = Mapping[str, Any]


class Conversation(NamedTuple):
    """What a template makes of messages."""

    text: str
    """With the beginning of the answer."""
    ends: list[int]
    """Characters of the text that the first k messages take, for each k whose text the whole text begins
    with."""


class ChatTemplate:
    """Renders conversations, in another process that starts when it is first needed.

    Args:
        source: the template.
        tokens: what it may name: bos_token, eos_token, ...
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        given = json.dumps({"source": source, "tokens": dict(tokens)}).encode()
        self._process = LimitedProcess(command_for("dijiang_engines.serving.chat_template"), given, {})

    def render(self, messages: Sequence[Message]) -> Conversation:
        """The text of a conversation, up to where the model's answer begins. May be called in any thread.

        Raises:
            PromptError: the template refuses these messages, fails, or takes too long.
        """
        try:
            status, answer = self._process.ask(b"R", json.dumps(list(messages)).encode(), SECONDS)
        except ProcessEndedError as error:
            if error.too_long:
                got = f"more than {SECONDS:.0f} s"
                raise PromptError("the model's chat template takes too long", got=got) from None
            raise PromptError(
                "the model's chat template needs too much memory, or ends its process"
            ) from None
        if status != DONE:
            raise PromptError("the model's chat template refuses these messages", got=answer.decode())
        found = json.loads(answer)
        return Conversation(found["text"], found["ends"])

    def close(self) -> None:
        """End the process."""
        self._process.close()


def load_chat_template(model: Model) -> ChatTemplate | None:
    """The chat template that came with a model; None if there is none, or no jinja2 to run it.

    Raises:
        BundleError: the file that holds it is damaged.
    """
    config: dict[str, Any] = {}
    if TOKENIZER_CONFIG in model.files:
        config = _object(model, TOKENIZER_CONFIG)
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
        source = named.get("default")
    if CHAT_TEMPLATE in model.files:
        with model.opened.unchanged(CHAT_TEMPLATE) as root:
            data = read_bounded(root / CHAT_TEMPLATE, LIMITS["tokenizer part"])
        try:
            source = data.decode()
        except UnicodeDecodeError as error:
            raise BundleError(f"{CHAT_TEMPLATE} is not UTF-8", got=error) from error
    if not isinstance(source, str):
        return None
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return ChatTemplate(source, tokens)


def _object(model: Model, name: str) -> dict[str, Any]:
    with model.opened.unchanged(name) as root:
        data = read_bounded(root / name, LIMITS["tokenizer part"])
    found = parse_json(data, name, lenient=True)
    if not isinstance(found, dict):
        raise BundleError(f"{name} is not a JSON object")
    return found


# -- in the other process --------------------------------------------------------------------------------


def main() -> None:
    """Answer until there are no more conversations."""
    template: Any = None
    tokens: dict[str, str] = {}
    problem = ""
    while True:
        try:
            kind, data = receive(sys.stdin.buffer)
        except EOFError:
            return
        limit_process(float(sys.argv[1]), BYTES + 64 * len(data))
        status, answer = DONE, b""
        try:
            given = json.loads(data)
            if kind == LOAD:
                tokens = given["tokens"]
                template = _compile(given["source"])
            elif template is None:
                status, answer = FAILED, problem.encode()
            else:
                answer = json.dumps(_render(template, given, tokens)._asdict()).encode()
        except Exception as error:  # noqa: BLE001 - whatever a template does
            problem = " ".join(str(error).split())[:300].encode("utf-8", "replace").decode()
            if kind != LOAD:  # what is wrong with a template is said to whoever uses it
                status, answer = FAILED, problem.encode()
        send(sys.stdout.buffer, status, answer)


def _compile(source: str) -> Any:
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the answers for training; here it is what it encloses."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: object) -> None:
        raise TemplateError(str(message))

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment.from_string(source)


def _render(template: Any, messages: list[Message], tokens: Mapping[str, str]) -> Conversation:
    given = {**tokens, "tools": None, "documents": None}
    text = template.render(messages=messages, add_generation_prompt=True, **given)
    ends = []
    for count in range(1, min(len(messages), MOST_ENDS) + 1):
        try:
            part = template.render(messages=messages[:count], add_generation_prompt=False, **given)
        except Exception:  # noqa: BLE001, S112 - some want the roles to alternate to the end
            continue
        if text.startswith(part):
            ends.append(len(part))
    return Conversation(text, ends)


if __name__ == "__main__":
    main()
