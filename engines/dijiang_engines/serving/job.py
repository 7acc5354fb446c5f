"""What the server computes for one request: one prompt, and one or several texts that go on from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dijiang_engines.errors import DijiangError
from dijiang_engines.generation.guide import Guide
from dijiang_engines.generation.row import FinishReason
from dijiang_engines.generation.session import Session
from dijiang_engines.sampling import SamplingOptions


@dataclass(frozen=True)
class JobOptions:
    """How a job's texts go on, and when they end."""

    max_tokens: int
    """New tokens of each text, at least 1."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    choices: int = 1
    """How many texts; each draws from its own stream of random numbers."""
    logprobs: int | None = None
    """Of how many of the likeliest tokens the log-probability is given beside that of the chosen one; None:
    of none, nor of the chosen one."""
    guide: Callable[[], Guide] | None = None
    """Makes the guide of one text."""
    save: bool = False
    """The first text's session is handed over with its last token."""


@dataclass(frozen=True)
class TokenOut:
    """One token that was chosen."""

    id: int
    logprob: float | None = None
    """Natural logarithm of its probability under the model alone, before temperature and filters."""
    top: Mapping[int, float] | None = None
    """The likeliest tokens' log-probabilities, the likeliest first."""


@dataclass(frozen=True)
class Update:
    """What happened to one text of a job in one round; or to the whole job."""

    job: Job
    choice: int = 0
    token: TokenOut | None = None
    text: str = ""
    """What became certain with the token."""
    finish: FinishReason | None = None
    session: Session | None = None
    """With the last token of the first text, if it was asked for."""
    error: DijiangError | None = None
    """The job has ended by it; no other update follows."""


@dataclass(eq=False)
class Job:
    """One prompt on its way through the scheduler.

    Attributes:
        prompt: token ids, at least one that is not in the session's state yet.
        options: how it goes on.
        splits: ascending places in the prompt where a piece ends whatever its length, such as the ends of a
            conversation's messages: states there are worth keeping.
        session: what came before; its tokens are the beginning of `prompt`.
        salt: states are shared with jobs of the same salt only.
        cached_tokens: of the prompt, those whose state was found; set when reading begins.
        done: nothing more comes.
    """

    prompt: list[int]
    options: JobOptions
    splits: tuple[int, ...] = ()
    session: Session | None = None
    salt: bytes = b""
    cached_tokens: int = 0
    done: bool = False
