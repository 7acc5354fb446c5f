"""Requests that nobody would write: every one is answered, none with a defect, none with another's secret."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from support.fakes.runner import ToyRunner
from support.http import ask
from support.makers.toy_bundle import SPEC, make_bundle, write_manifest
from support.server import Running, serving

from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.serving.serve import ServerOptions

COUNT = int(os.environ.get("DIJIANG_MANY_REQUESTS", "600"))
"""Of requests; CI has no time for more."""
KEYS = ("alpha", "beta", "gamma")
PATHS = (
    "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize",
    "/v1/sessions/s/fork", "/v1/sessions", "/v1/sessions/s", "/v1/sessions/s/content",
    "/v1/models", "/v1/models/x", "/health", "/metrics",
    "/v1/../x",
)  # fmt: skip
FIELDS = (
    "prompt", "messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "top_k", "min_p", "repetition_penalty", "seed", "stop", "n", "logprobs", "top_logprobs", "stream",
    "stream_options",
    "response_format", "ignore_eos", "session", "save_session", "tokens", "id", "user", "echo",
    "other", "guided_regex",
)  # fmt: skip


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, mostly of kinds that some field takes."""
    kinds: list[Any] = [
        None, True, False, 0, 1, -1, 2, 5, 63, 10**9, -(10**30), 0.5, 1.0, -0.0, 1e300, 1e-300, "", "a",
        "s", "toy", "\x00", "\ud800", "é🙂", "x" * 500, [],
        {}, [1, 2, 3], ["a", "b"], [[5], [6]],
        [[]],
        [{"role": "user", "content": "hi"}], {"type": "text"}, {"type": "json_object"},
        {"include_usage": True},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string"}}}, "(a|b)+", "(((",
    ]  # fmt: skip
    found = rng.choice(kinds)
    if depth < 2 and rng.random() < 0.1:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return found


def body(rng: random.Random, key: str) -> bytes:
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(200))
    found: dict[str, Any] = {
        "prompt": f"secret of {key}",
        "max_tokens": 3,
        "messages": [{"role": "user", "content": key}],
    }
    if rng.random() < 0.5:
        found.pop("messages")
    for name in rng.sample(FIELDS, rng.randrange(5)):
        found[name] = value(rng)
    if rng.random() < 0.3:
        found["save_session"] = "s"
    data = json.dumps(found).encode()
    if rng.random() < 0.05:
        place = rng.randrange(len(data))
        data = data[:place] + rng.randbytes(2) + data[place + 1 :]
    return data


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Running]:
    make_bundle(tmp_path / "b")
    template = "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
    (tmp_path / "b/chat_template.jinja").write_text(template)
    write_manifest(tmp_path / "b", SPEC)
    options = ServerOptions(keys=KEYS, slots=8, max_tokens=64, max_body_bytes=4096, session_bytes=1 << 20)
    with serving(open_bundle(tmp_path / "b"), ToyRunner(make_bundle(tmp_path / "same")), options) as running:
        yield running


def test_every_request_has_an_answer(guarded: Running) -> None:
    def one(number: int) -> int:
        rng = random.Random(number)
        key = rng.choice([*KEYS, "wrong"])
        method = rng.choice(["POST", "POST", "POST", "GET", "PUT", "DELETE", "HEAD", "PATCH"])
        path = PATHS[0] if rng.random() < 0.3 else rng.choice(PATHS)
        answer = ask(guarded.port, method, path, body(rng, key) if method in ("POST", "PUT") else None, key)
        assert answer.status != 500, (number, answer.data)
        if key == "wrong" and path.startswith("/v1/s"):
            assert answer.status in (401, 404, 405)
        text = answer.data.decode("utf-8", "replace")  # a session file is binary
        others = [other for other in KEYS if other != key]
        assert not any(f"secret of {other}" in text for other in others), (number, text)
        return answer.status

    with ThreadPoolExecutor(6) as pool:
        statuses = Counter(pool.map(one, range(COUNT)))
    assert {200, 400, 401, 404, 405} <= set(statuses), statuses
    assert guarded.busy() == 0 and guarded.service.open_jobs == 0
    assert ask(guarded.port, "GET", "/health").status == 200
