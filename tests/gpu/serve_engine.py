"""`dijiang-export serve` over an engine: `python serve_engine.py ENGINE [--save FILE] [--streams 16]`.

What tests/serving shows of the server on ONNX Runtime, here on TensorRT and a GPU: a text is what
`generate` makes of the prompt, alone and among others, in a slot that was used before; what the prefix cache
finds is bit for bit what reading gives; a saved, forked and sent conversation goes on as if it had not
stopped. Then `bench serve`. Needs TensorRT, a GPU, and what the extra `serve` installs; no PyTorch. Prints a
line for each check, exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.checks import run_checks
from support.http import ask

from dijiang_engines.formats.engine import open_engine
from dijiang_engines.generation.generator import GenerateOptions, Generator
from dijiang_engines.runners.tensorrt.runner import TensorRTRunner
from dijiang_engines.tokenizer.tokenizer import Tokenizer

TOKENS = 48
"""Of each text."""
START_SECONDS = 120


@contextmanager
def server(engine: Path, *options: str) -> Iterator[int]:
    """`dijiang-export serve` in a process of its own, until the block ends; its port."""
    command = [sys.executable, "-m", "dijiang_export", "serve", str(engine), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said: list[str] = []
    found = threading.Event()

    def listen() -> None:
        for line in process.stdout or ():
            said.append(line)
            if "http://" in line:
                found.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        if not found.wait(START_SECONDS):
            raise AssertionError("the server did not begin to listen: " + "".join(said)[-2000:])
        address = re.search(r"http://[^\s:]+:(\d+)", "".join(said))
        assert address is not None, said
        yield int(address.group(1))
    finally:
        process.terminate()
        process.wait(60)


class Checks:
    """One engine behind a server.

    Half types round otherwise in another batch or another piece of a prompt, so that the likeliest token may
    be another one: there, equal texts are counted, and in float32 they must be all.
    """

    def __init__(self, engine: Path, port: int, streams: int) -> None:
        self.port, self.facts = port, dict[str, Any]()
        opened = open_engine(engine)
        self.vocabulary, self.exact = opened.spec.vocab_size, opened.dtype == "float32"
        self.rng = np.random.default_rng(0)
        assert opened.tokenizer_path is not None, "an engine without a tokenizer"
        self.prompts = [self.tokens(int(n)) for n in self.rng.integers(3, 150, streams)]
        generator = Generator(TensorRTRunner(opened), Tokenizer(opened.tokenizer_path))
        options = GenerateOptions(max_tokens=TOKENS, ignore_eos=True)
        self.expected = []
        for prompt in self.prompts:
            generation = generator.start([prompt], options)
            list(generation)
            self.expected.append(generation.completions[0].text)
        self.alone: list[str] = []

    def tokens(self, count: int) -> list[int]:
        return [int(token) for token in self.rng.integers(0, self.vocabulary, count)]

    def complete(self, **body: Any) -> Any:
        usual = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": 0}
        answer = ask(self.port, "POST", "/v1/completions", usual | body)
        assert answer.status == 200, answer.data
        return answer.json

    def text(self, prompt: list[int]) -> str:
        return str(self.complete(prompt=prompt)["choices"][0]["text"])

    def same(self, texts: list[str], expected: list[str], what: str) -> str:
        equal = sum(a == b for a, b in zip(texts, expected, strict=True))
        assert equal == len(texts) or not self.exact, f"{equal} of {len(texts)} are {what}"
        self.facts[what] = [equal, len(texts)]
        return f"{equal} of {len(texts)} texts are {what}"

    def alone_on_the_server(self) -> str:
        self.alone = [self.text(prompt) for prompt in self.prompts]
        return self.same(self.alone, self.expected, "those of generate")

    def among_others(self) -> str:
        with ThreadPoolExecutor(len(self.prompts)) as pool:
            return self.same(list(pool.map(self.text, self.prompts)), self.alone, "those made alone")

    def in_used_slots(self) -> str:
        """One after the other, so in the same batch as alone: bit for bit, in every type."""
        again = [self.text(prompt) for prompt in self.prompts]
        assert again == self.alone, "a text differs after others had its slot"
        return f"{len(again)} texts as before"

    def found_prefixes(self) -> str:
        waits: dict[str, list[float]] = {"unread": [], "found": []}
        for _ in range(5):
            prompt, logprobs = self.tokens(2020), []
            for kind in waits:
                start = time.perf_counter()
                answer = self.complete(prompt=prompt, max_tokens=1)
                waits[kind].append(time.perf_counter() - start)
                logprobs.append(answer["choices"][0]["logprobs"])
                cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert (cached >= 2020 - 512) == (kind == "found"), answer["usage"]
            assert logprobs[0] == logprobs[1], f"{logprobs}"
        medians = {kind: statistics.median(times) for kind, times in waits.items()}
        self.facts["first token after 2,020 tokens, s"] = medians
        return f"bit for bit; first token after 2,020 tokens: {medians}"

    def conversations(self) -> str:
        prompt = self.prompts[0]
        first = self.complete(prompt=prompt, max_tokens=20, save_session="talk")["choices"][0]["text"]
        more = {"max_tokens": TOKENS - 20}
        fork = ask(self.port, "POST", "/v1/sessions/talk/fork", {"id": "other"})
        assert fork.status == 201, fork.data
        data = ask(self.port, "GET", "/v1/sessions/talk/content").data
        sent = ask(self.port, "PUT", "/v1/sessions/sent/content", data)
        assert sent.status == 201, sent.data
        for name in ("talk", "other", "sent"):
            rest = self.complete(session=name, **more)["choices"][0]["text"]
            assert first + rest == self.alone[0], f"{name}: {first + rest!r} and {self.alone[0]!r}"
        return f"saved, forked and sent: {len(data)} bytes"

    def speed(self) -> str:
        command = [
            sys.executable, "-m", "dijiang_export", "--quiet", "bench", "serve", f"http://127.0.0.1:{self.port}",
            "--tokens", "200", "--concurrency", "1", "--concurrency", "8", "--concurrency", "32", "--json",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        self.facts["bench serve"] = json.loads(done.stdout)
        return done.stdout


def main() -> int:
    """Every check of one engine."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", type=Path)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    with server(arguments.engine, "--slots", "32") as port:
        checks = Checks(arguments.engine, port, arguments.streams)
        names = [
            "alone_on_the_server",
            "among_others",
            "in_used_slots",
            "found_prefixes",
            "conversations",
            "speed",
        ]
        wanted = [(name.replace("_", " "), getattr(checks, name)) for name in names]
        return run_checks(wanted, checks.facts, arguments.save)


if __name__ == "__main__":
    sys.exit(main())
