"""Continuous batching: requests join and leave a batch that keeps running.

    printf 'def read(path):\\nimport os\\nclass Reader:\\n' |
        python samples/batch_server_loop.py tiny-stdlib.bundle --slots 2 --max-tokens 30

A batch has a fixed number of slots. Each round makes one call of the runner for all of them: a slot that
still reads its prompt takes a piece of it, a slot that generates takes the token it chose last, an idle slot
takes nothing. `seq_lens` says which is which, so no slot waits for another's prompt, and no state is moved
when a request comes or goes: its row of the state is zeroed, and the next request starts there. A sequence's
state has the same size at every length, so nothing has to be paged or reserved by length either.

If some slot reads more than one token, the round goes through the prefill graph, whose work grows with the
longest piece; otherwise through the step graph. `piece` is the trade: large pieces read prompts fast, small
ones keep the tokens of the other slots coming.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

import dijiang_engines as dj


@dataclass
class Request:
    """A prompt and what became of it."""

    number: int
    """Names the request, and the stream of random numbers that it draws from."""
    prompt: list[int]
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    """New tokens, including one that ended the text."""
    consumed: int = 0
    """How many of prompt + tokens are in the slot's state."""


class BatchLoop:
    """Runs requests through a fixed number of slots of one runner.

    Args:
        runner: any runner.
        slots: sequences at a time.
        sampling: how tokens are chosen. A repetition penalty is left out here.
        seed: of the random numbers; a request's depend on this, its number and its length alone.
        piece: most prompt tokens of one slot in one call.
        banned: token ids that are never chosen, such as `Generator.banned`.

    Attributes:
        rounds: calls of the runner so far.
        busy: slots that did something, summed over the rounds.
    """

    def __init__(
        self,
        runner: dj.Runner,
        slots: int,
        sampling: dj.SamplingOptions | None = None,
        *,
        seed: int = 0,
        piece: int = 64,
        banned: np.ndarray | None = None,
    ) -> None:
        self.sampling = sampling or dj.SamplingOptions()
        if slots < 1 or piece < 1:
            raise dj.UsageError("slots and piece must be at least 1", got=f"{slots}, {piece}")
        if self.sampling.repetition_penalty != 1:
            raise dj.UsageError("this loop has no repetition penalty")
        self.runner, self.seed, self.piece, self.banned = runner, seed, piece, banned
        self.waiting: deque[Request] = deque()
        self.slots: list[Request | None] = [None] * slots
        self.state = runner.new_state(slots)
        self.rounds = self.busy = 0

    def submit(self, request: Request) -> None:
        """Queue a request; it starts as soon as a slot is free. May be called between any two rounds.

        Raises:
            PromptError: no prompt, nothing to generate, or a token id that the model does not have.
            PositionError: prompt and max_tokens together run past the last position that the runner knows.
        """
        spec = self.runner.spec
        if not request.prompt or request.max_tokens < 1:
            raise dj.PromptError("a request needs a prompt, and at least one token to generate")
        if not 0 <= min(request.prompt) <= max(request.prompt) < spec.vocab_size:
            raise dj.PromptError("a prompt holds a token id that the model does not have")
        # The last token is never read, so it needs no position.
        longest = len(request.prompt) + request.max_tokens - 1
        most = dj.last_position(self.runner)
        if longest > most:
            raise dj.position_error(spec, request.number, longest, most=most)
        self.waiting.append(request)

    @property
    def idle(self) -> bool:
        """True if there is nothing to do."""
        return not self.waiting and all(slot is None for slot in self.slots)

    def round(self) -> list[Request]:
        """One call of the runner; returns the requests that it finished."""
        for index, slot in enumerate(self.slots):
            if slot is None and self.waiting:
                self.slots[index] = self.waiting.popleft()
        active = [(index, slot) for index, slot in enumerate(self.slots) if slot is not None]
        if not active:
            return []

        pending = {
            index: (slot.prompt + slot.tokens)[slot.consumed :][: self.piece] for index, slot in active
        }
        length = max(map(len, pending.values()))
        ids = np.zeros((len(self.slots), length), np.int64)  # what no slot reads may be any token
        seq_lens = np.zeros(len(self.slots), np.int64)
        positions = np.zeros(len(self.slots), np.int64)
        for index, slot in active:
            seq_lens[index] = len(pending[index])
            ids[index, : len(pending[index])] = pending[index]
            positions[index] = slot.consumed
        call = self.runner.step if length == 1 else self.runner.prefill
        logits = call(ids, positions, seq_lens, self.state)
        self.rounds += 1
        self.busy += len(active)

        # Who has read everything chooses a token. With logits of all tokens, the last valid one's counts.
        choosing = []
        for index, slot in active:
            slot.consumed += len(pending[index])
            if slot.consumed == len(slot.prompt) + len(slot.tokens):
                choosing.append((index, slot))
        if not choosing:
            return []
        last = [logits[index, len(pending[index]) - 1 if logits.shape[1] > 1 else 0] for index, _ in choosing]
        uniforms = np.array([dj.uniform(self.seed, slot.number, slot.consumed) for _, slot in choosing])
        chosen = dj.sample(np.stack(last), self.sampling, uniforms, banned=self.banned)

        finished = []
        for (index, slot), token in zip(choosing, chosen.tolist(), strict=True):
            slot.tokens.append(token)
            if token in self.runner.spec.eos_token_ids or len(slot.tokens) >= slot.max_tokens:
                self.slots[index] = None
                finished.append((index, slot))
        self.runner.reset_rows(self.state, [index for index, _ in finished])
        return [slot for _, slot in finished]

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Everything, from the first request to the last; requests come out in the order they finish in."""
        for request in requests:
            self.submit(request)
        while not self.idle:
            yield from self.round()


def serve(
    path: str, prompts: Sequence[str], sampling: dj.SamplingOptions, *, slots: int, max_tokens: int,
    piece: int, seed: int, runner_name: str,
) -> None:  # fmt: skip
    """Run every prompt through a batch of `slots`, and print each answer when it is complete."""
    model = dj.open_model(path)
    tokenizer = dj.load_tokenizer(model)
    if tokenizer is None:
        raise dj.UsageError(f"{path} has no tokenizer")
    runner = dj.open_runner(model, runner_name)
    generator = dj.Generator(runner, tokenizer)  # knows how to encode a prompt, and what is no token
    requests = [Request(n, generator.encode(prompt), max_tokens) for n, prompt in enumerate(prompts)]
    loop = BatchLoop(runner, slots, sampling, seed=seed, piece=piece, banned=generator.banned)
    for request in loop.run(requests):
        ended = request.tokens[-1] in runner.spec.eos_token_ids
        new = request.tokens[:-1] if ended else request.tokens
        text = tokenizer.continuation(request.prompt, new)
        print(f"== {request.number}: {prompts[request.number]}\n{text}", flush=True)
    print(
        f"{runner.name}: {len(requests)} requests in {loop.rounds} rounds, "
        f"{loop.busy / max(loop.rounds, 1):.2f} of {slots} slots busy",
        file=sys.stderr,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, serve."""
    parser = argparse.ArgumentParser(description="Continuous batching of prompts from standard input")
    parser.add_argument("model", help="a bundle, or an engine folder")
    parser.add_argument("--slots", type=int, default=4, help="sequences at a time")
    parser.add_argument("--piece", type=int, default=64, help="most prompt tokens of a slot in one call")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token, always")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runner", default="auto", help="as in `dijiang-export generate --runner`")
    args = parser.parse_args(arguments)
    try:
        sampling = dj.SamplingOptions(temperature=args.temperature, top_p=args.top_p)
        prompts = [line for line in sys.stdin.read().splitlines() if line]
        if not prompts:
            raise dj.UsageError("there is no prompt on standard input", hint="one prompt a line")
        serve(
            args.model, prompts, sampling, slots=args.slots, max_tokens=args.max_tokens, piece=args.piece,
            seed=args.seed, runner_name=args.runner,
        )  # fmt: skip
    except dj.DijiangError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
