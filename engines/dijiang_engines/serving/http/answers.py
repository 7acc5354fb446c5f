"""Answers in the API's own shapes: completions and chat completions, whole and in chunks."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from dijiang_engines.generation.row import FinishReason
from dijiang_engines.serving.job import TokenOut, Update
from dijiang_engines.tokenizer.tokenizer import Tokenizer

_FINISH: dict[FinishReason, str] = {"eos": "stop", "stop": "stop", "length": "length", "error": "error"}


@dataclass
class Choice:
    """One text as it grows."""

    text: list[str] = field(default_factory=list)
    tokens: list[TokenOut] = field(default_factory=list)
    finish: FinishReason | None = None
    before: int = 0
    """Characters of the tokens that came in earlier chunks."""

    def add(self, update: Update) -> None:
        """Take what came."""
        self.text.append(update.text)
        if update.token is not None:
            self.tokens.append(update.token)
        self.finish = update.finish or self.finish


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def json(self) -> dict[str, Any]:
        """The API's object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Shape(Protocol):
    """How one endpoint answers."""

    def head(self, chunk: bool) -> dict[str, Any]:
        """What stands before the choices."""
        ...

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """A choice of a whole answer."""
        ...

    def chunk(self, index: int, choice: Choice) -> dict[str, Any]:
        """A choice of a chunk: what has come since the last."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk's choice, before there is any text; None: there is no such chunk."""
        ...


@dataclass
class _Head:
    model: str
    tokenizer: Tokenizer | None
    prefix: str
    kind: str
    chunk_kind: str

    def __post_init__(self) -> None:
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def head(self, chunk: bool) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self.chunk_kind if chunk else self.kind,
            "created": self._created,
            "model": self.model,
        }

    def spelt(self, token: int) -> str:
        """A token's own text; bytes that are no character as U+FFFD."""
        if self.tokenizer is None:
            return f"token_id:{token}"
        return self.tokenizer.decode([token], skip_special=False)


class CompletionShape(_Head):
    """POST /v1/completions."""

    def __init__(self, model: str, tokenizer: Tokenizer | None, logprobs: int | None) -> None:
        super().__init__(model, tokenizer, "cmpl", "text_completion", "text_completion")
        self._logprobs = logprobs

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """See `Shape`."""
        return {
            "index": index,
            "text": "".join(choice.text),
            "logprobs": None if self._logprobs is None else self._table(choice),
            "finish_reason": choice.finish and _FINISH[choice.finish],
        } | ({} if self.tokenizer is not None else {"token_ids": [token.id for token in choice.tokens]})

    def chunk(self, index: int, choice: Choice) -> dict[str, Any]:
        """See `Shape`."""
        return self.whole(index, choice)

    def opening(self, index: int) -> dict[str, Any] | None:
        """There is none."""
        return None

    def _table(self, choice: Choice) -> dict[str, Any]:
        tokens, place = choice.tokens, choice.before
        names, offsets = [self.spelt(token.id) for token in tokens], []
        for name in names:
            offsets.append(place)
            place += len(name)
        choice.before = place
        top = [{self.spelt(i): value for i, value in (token.top or {}).items()} for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top if self._logprobs else None,
            "text_offset": offsets,
        }


class ChatShape(_Head):
    """POST /v1/chat/completions."""

    def __init__(self, model: str, tokenizer: Tokenizer | None, logprobs: int | None) -> None:
        super().__init__(model, tokenizer, "chatcmpl", "chat.completion", "chat.completion.chunk")
        self._logprobs = logprobs

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """See `Shape`."""
        message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        return {"index": index, "message": message} | self._rest(choice)

    def chunk(self, index: int, choice: Choice) -> dict[str, Any]:
        """See `Shape`."""
        text = "".join(choice.text)
        return {"index": index, "delta": {"content": text} if text else {}} | self._rest(choice)

    def opening(self, index: int) -> dict[str, Any] | None:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _rest(self, choice: Choice) -> dict[str, Any]:
        content = None if self._logprobs is None else {"content": [self._entry(t) for t in choice.tokens]}
        return {"logprobs": content, "finish_reason": choice.finish and _FINISH[choice.finish]}

    def _entry(self, token: TokenOut) -> dict[str, Any]:
        top = [self._token(i, value) for i, value in (token.top or {}).items()]
        return self._token(token.id, token.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        name = self.spelt(token)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
