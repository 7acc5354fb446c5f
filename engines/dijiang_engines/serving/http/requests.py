"""From a request's body to jobs: prompts become token ids, conversations text, grammars guides."""

from __future__ import annotations

import asyncio
import hashlib
from bisect import bisect_right
from collections.abc import Callable
from typing import TypeVar

from dijiang_engines.errors import BundleError, PromptError, SessionError, UsageError
from dijiang_engines.generation.grammar import Grammar
from dijiang_engines.generation.guide import Guide
from dijiang_engines.generation.response_format import requested_grammar
from dijiang_engines.generation.session import Session, session_from_bytes
from dijiang_engines.runners.checks import last_position, position_error
from dijiang_engines.serving.http.bodies import ChatBody, CompletionBody, Wanted
from dijiang_engines.serving.http.errors import ApiError, as_api_error
from dijiang_engines.serving.http.service import Service
from dijiang_engines.serving.job import Job, JobOptions

T = TypeVar("T")
_SHORT = 4096
"""Characters that are made tokens at once, without another thread: a thread costs more."""


async def _elsewhere(size: int, work: Callable[[], T]) -> T:
    """Do what may take long in another thread, so that others are answered meanwhile."""
    return work() if size <= _SHORT else await asyncio.to_thread(work)


async def completion_jobs(service: Service, body: CompletionBody, key: str) -> list[Job]:
    """One job for each prompt.

    Raises:
        ApiError: a prompt is too long or not of this model, or there is no such session.
        DijiangError: the tokenizer refuses a prompt.
    """
    session = None if body.session is None else await read_session(service, body.session, key)
    grammar = await _grammar(service, body.wanted)
    jobs = []
    for prompt in body.prompts:
        ids = prompt if isinstance(prompt, list) else await _encode(service, prompt, first=session is None)
        ids = ids if session is None else [*session.token_ids[0], *ids]
        jobs.append(_job(service, ids, (), body.wanted, key, session, grammar))
    return jobs


async def chat_job(service: Service, body: ChatBody, key: str) -> Job:
    """The job of a conversation. Errors as above."""
    chat, tokenizer = service.served.chat, service.served.tokenizer
    if chat is None or tokenizer is None:
        raise ApiError(
            400, "this model has no chat template: use /v1/completions", code="no_chat_template",
            param="messages",
        )  # fmt: skip
    grammar = await _grammar(service, body.wanted)
    text, ends = await asyncio.to_thread(chat.render, body.messages)
    # The template wrote the special tokens itself.
    ids, places = await _elsewhere(len(text), lambda: tokenizer.encode_with_ends(text, special_tokens=False))
    splits = tuple(sorted({bisect_right(places, end) for end in ends}))
    return _job(service, ids, splits, body.wanted, key, None, grammar)


async def _grammar(service: Service, wanted: Wanted) -> Grammar | None:
    """What the answer is kept to; None: it may be any text."""
    if not wanted.form:
        return None
    if wanted.ignore_eos:
        raise ApiError(400, "ignore_eos has no meaning for an answer with a form", param="ignore_eos")
    try:
        return await asyncio.to_thread(requested_grammar, service.grammars, **wanted.form)
    except UsageError as error:
        raise as_api_error(error, next(iter(wanted.form))) from error
    except BundleError as error:
        raise ApiError(400, str(error), param=next(iter(wanted.form))) from error


async def _encode(service: Service, prompt: str, *, first: bool) -> list[int]:
    """Token ids of a prompt; of what follows a session there may be none."""
    generator, tokenizer = service.generator, service.served.tokenizer

    def work() -> list[int]:
        if first or tokenizer is None:
            return generator.encode(prompt)
        return tokenizer.encode(prompt, special_tokens=False)

    try:
        return await _elsewhere(len(prompt), work)
    except (UsageError, PromptError) as error:
        raise as_api_error(error, "prompt") from error


def _job(
    service: Service,
    ids: list[int],
    splits: tuple[int, ...],
    wanted: Wanted,
    key: str,
    session: Session | None,
    grammar: Grammar | None,
) -> Job:
    served = service.served
    if not ids:
        raise ApiError(400, "the prompt is empty", param="prompt")
    try:
        service.generator.check_tokens(ids)
    except PromptError as error:
        raise as_api_error(error, "prompt") from error
    if len(ids) > served.max_prompt_tokens:
        raise ApiError(
            400, f"the prompt has {len(ids)} tokens; this server reads at most {served.max_prompt_tokens}",
            param="prompt", code="context_length_exceeded",
        )  # fmt: skip
    limit = _limit(service, len(ids), wanted)
    options = JobOptions(
        max_tokens=limit, sampling=wanted.sampling, seed=wanted.seed, stop=wanted.stop,
        ignore_eos=wanted.ignore_eos, choices=wanted.choices, logprobs=wanted.logprobs,
        save=wanted.save_session is not None, guide=_guide(service, grammar, ids),
    )  # fmt: skip
    if wanted.stop and served.tokenizer is None:
        raise ApiError(400, "stop strings need a tokenizer, and this model has none", param="stop")
    return Job(ids, options, splits, session, service.salt(key))


def _guide(service: Service, grammar: Grammar | None, ids: list[int]) -> Callable[[], Guide] | None:
    if grammar is None:
        return None
    at_start = service.generator.at_start(ids)
    return lambda: grammar.guide(at_start=at_start)


def _limit(service: Service, tokens: int, wanted: Wanted) -> int:
    """How many new tokens: the last one is never read, so it needs no position."""
    served = service.served
    if wanted.max_tokens is not None and wanted.max_tokens > served.max_tokens:
        raise ApiError(
            400, f"this server generates at most {served.max_tokens} tokens for a request", param="max_tokens"
        )
    most = last_position(service.scheduler.runner)
    if tokens > most:
        raise position_error(served.model.spec, 0, tokens, most=most)
    room = most - tokens + 1
    if wanted.max_tokens is None:
        return min(served.max_tokens, room)
    if wanted.max_tokens > room:
        raise ApiError(
            400, f"the prompt has {tokens} tokens, and the model has {most} positions: ask for at most "
            f"{room} new tokens", param="max_tokens", code="context_length_exceeded",
        )  # fmt: skip
    return wanted.max_tokens


async def read_session(service: Service, name: str, key: str) -> Session:
    """A kept session of this API key.

    Raises:
        ApiError: there is none of that name.
        SessionError: it is damaged.
    """
    data = await asyncio.to_thread(service.sessions.get, stored_name(key, name))
    if data is None:
        raise ApiError(404, f"there is no session {name}, or not any more", param="session")
    model = service.served.model
    session = await asyncio.to_thread(session_from_bytes, data, f"the session {name}", model)
    if session.batch != 1:
        raise SessionError("a session of the server is of one text", got=f"{session.batch} texts")
    return session


def stored_name(key: str, name: str) -> str:
    """What a session is called in the store: names of one API key are not those of another."""
    return f"{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}/{name}"
